"""Leave a model, and the random number generators, as they were found.

A forward may keep things: a cache on a module, a computed weight as a plain attribute, a position in a list. Whatever
can be reached from the model is remembered by reference, except arrays of numbers, which are copied.
"""

from __future__ import annotations

import random
import sys
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from logging import Logger
from types import BuiltinFunctionType, CellType, FunctionType, MemberDescriptorType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

OPAQUE = (type, ModuleType, Logger, str, bytes, int, float, complex, type(None))  # belong to others, or cannot change
IN_CODE = (FunctionType, staticmethod, classmethod, property)
CONTAINERS = (OrderedDict, dict, list, deque, set, frozenset, tuple)
REFERENCES: dict[type, tuple[str, ...]] = {
    FunctionType: ("__closure__", "__defaults__", "__kwdefaults__"),
    MethodType: ("__self__", "__func__"),
    BuiltinFunctionType: ("__self__",),
    CellType: ("cell_contents",),
    partial: ("func", "args", "keywords"),
}
MISSING = object()

Undo = Callable[[], None]


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Whatever happens inside, all that hangs on the model and its classes' cached functions end as they began."""
    classes = {base for module in model.modules() for base in type(module).__mro__ if base not in nn.Module.__mro__}
    kept_by_classes = [value for cls in classes for value in vars(cls).values() if not isinstance(value, IN_CODE)]
    things = everything_below([model, *kept_by_classes])
    undos = [undo for thing in things for undo in _undos(thing)]
    undos += [_emptied(function) for function in _cached_functions(classes)]
    try:
        yield
    finally:
        for undo in undos:
            undo()


@contextmanager
def same_random_numbers(device: torch.device) -> Iterator[None]:
    """Whatever happens inside, the next random number is the one that would have come anyway."""
    python, numbers = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numbers)


def everything_below(roots: Iterable[Any]) -> Iterator[Any]:
    """The roots and all that they hold, however deep, each once: in containers, attributes, slots and closures.

    >>> [thing for thing in everything_below([{"a": [(random.Random,)]}]) if isinstance(thing, tuple)]
    [(<class 'random.Random'>,)]
    """
    waiting, seen = list(roots), dict[int, Any]()
    while waiting:
        thing = waiting.pop()
        if not isinstance(thing, OPAQUE) and id(thing) not in seen:
            seen[id(thing)] = thing
            yield thing
            waiting += _directly_below(thing)


def _directly_below(thing: Any) -> Iterator[Any]:
    kind = _container(thing)
    if kind is not None:
        yield from list(kind.__iter__(thing))
    if isinstance(thing, dict):
        yield from list(dict.values(thing))
    for name in REFERENCES.get(type(thing), ()):
        with suppress(ValueError):  # an empty cell
            yield getattr(thing, name)
    if isinstance(thing, np.ndarray) and thing.dtype.hasobject:
        yield from thing.flat
    if isinstance(attributes := getattr(thing, "__dict__", None), dict):
        yield attributes
    yield from (value for value in _slots(thing).values() if value is not MISSING)


def _container(thing: Any) -> Any:
    """The plain container that a thing is: what its class overrides may do more than hold things."""
    return next((kind for kind in CONTAINERS if isinstance(thing, kind)), None)


def _slots(thing: Any) -> dict[MemberDescriptorType, Any]:
    if type(thing) in CONTAINERS:
        return {}
    kinds = [vars(cls) for cls in type(thing).__mro__ if "__slots__" in vars(cls)]
    members = [member for kind in kinds for member in kind.values() if isinstance(member, MemberDescriptorType)]
    return {member: _value_of(member, thing) for member in members}


def _value_of(member: MemberDescriptorType, thing: Any) -> Any:
    try:
        return member.__get__(thing)
    except AttributeError:
        return MISSING


def _undos(thing: Any) -> Iterator[Undo]:
    """How to put the present content of one thing back."""
    kind = _container(thing)
    if kind in (OrderedDict, dict):
        yield _restore_mapping(kind, thing)
    elif kind in (list, deque, set):
        yield _restore_collection(kind, thing)
    elif isinstance(thing, np.ndarray) and thing.flags.writeable and _is_numbers_of_its_own(thing):
        yield partial(np.copyto, thing, thing.copy())
    elif isinstance(thing, torch.Generator):
        yield _restore_state(thing.get_state(), thing.set_state)
    elif isinstance(thing, random.Random):
        yield _restore_state(thing.getstate(), thing.setstate)
    elif isinstance(thing, CellType):
        yield from _restore_cell(thing)
    elif _is_cached(thing):
        yield _emptied(thing)
    if slots := _slots(thing):
        yield _restore_slots(thing, slots)


def _restore_mapping(kind: Any, mapping: Any) -> Undo:
    before = list(kind.items(mapping))

    def undo() -> None:
        now = list(kind.items(mapping))
        if _same([part for pair in now for part in pair], [part for pair in before for part in pair]):
            return
        kind.clear(mapping)
        for key, value in before:
            kind.__setitem__(mapping, key, value)

    return undo


def _restore_collection(kind: Any, collection: Any) -> Undo:
    before = list(kind.__iter__(collection))

    def undo() -> None:
        if not _same(list(kind.__iter__(collection)), before):
            kind.clear(collection)
            (kind.update if kind is set else kind.extend)(collection, before)

    return undo


def _is_numbers_of_its_own(array: Any) -> bool:
    """Not of a file or a tensor, which may be large."""
    while isinstance(array, np.ndarray) and not isinstance(array, np.memmap):
        array = array.base
    return not isinstance(array, np.memmap | Tensor)


def _restore_state(before: Any, restore: Callable[[Any], object]) -> Undo:
    def undo() -> None:
        restore(before)

    return undo


def _restore_cell(cell: CellType) -> Iterator[Undo]:
    with suppress(ValueError):  # an empty cell
        yield partial(setattr, cell, "cell_contents", cell.cell_contents)


def _restore_slots(thing: Any, before: Mapping[MemberDescriptorType, Any]) -> Undo:
    def undo() -> None:
        for member, now in _slots(thing).items():
            if before[member] is MISSING and now is not MISSING:
                member.__delete__(thing)
            elif before[member] is not now:
                member.__set__(thing, before[member])

    return undo


def _same(now: list[Any], before: list[Any]) -> bool:
    return len(now) == len(before) and all(one is other for one, other in zip(now, before, strict=True))


def _is_cached(thing: Any) -> bool:
    return hasattr(type(thing), "cache_info") and hasattr(type(thing), "cache_clear")


def _emptied(function: Any) -> Undo:
    """Empty a cached function (`functools.lru_cache`) that a forward has filled."""
    misses = function.cache_info().misses

    def undo() -> None:
        if function.cache_info().misses != misses:
            function.cache_clear()

    return undo


def _cached_functions(classes: Iterable[type]) -> Iterator[Any]:
    """The cached functions that classes, and the modules they are from, hold, wrap or call."""
    spaces = [vars(space) for cls in classes for space in (cls, sys.modules.get(cls.__module__)) if space is not None]
    waiting, seen = [value for space in spaces for value in list(space.values())], dict[int, Any]()
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen[id(value)] = value
        if _is_cached(value):
            yield value
        elif isinstance(value, FunctionType | staticmethod | classmethod):
            waiting += [getattr(value, "__func__", None), getattr(value, "__wrapped__", None)]
            for cell in getattr(value, "__closure__", None) or ():
                with suppress(ValueError):  # an empty cell
                    waiting.append(cell.cell_contents)
