"""Leave a model, the random number generators and torch as they were before the trace.

A forward may keep things: a cache on a module, a computed weight as a plain attribute, a position in a list. The code
here remembers the content of every object that can be reached from the model. It keeps references, and copies only
numpy arrays. It does not know what a trace is.
"""

from __future__ import annotations

import gc
import logging
import random
import sys
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from operator import is_
from types import BuiltinFunctionType, CellType, FunctionType, MemberDescriptorType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses import fake_tensor

SKIPPED = (type, ModuleType, logging.Logger, str, bytes, int, float, complex, type(None))  # shared, or never change
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

Undo = Callable[[], object]


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Put back, at the end, every object below the model, and every function cache of its classes."""
    classes: set[type] = set()
    for module in model.modules():
        classes.update(type(module).__mro__)
    classes -= set(nn.Module.__mro__)
    roots: list[Any] = [model]
    for cls in classes:
        for value in vars(cls).values():
            if not isinstance(value, IN_CODE):
                roots.append(value)
    undos: list[Undo] = []
    for thing, layout in everything_below(roots):
        _add_undos(undos, thing, layout)
    undos += map(_emptied, _cached_functions(classes))
    try:
        yield
    finally:
        for undo in undos:
            undo()


@contextmanager
def same_random_numbers(device: torch.device) -> Iterator[None]:
    """Put the random number generators back at the end, so that the next numbers are the same as without the trace."""
    python, numbers = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numbers)


@contextmanager
def module_to_makes_new_tensors() -> Iterator[None]:
    """While on, `module.to()` and its like put new tensors into the module, and leave the old tensors as they are.

    Torch changes a parameter in place, which loses the caller's weights and fails on fake tensors. `untouched` puts
    the old tensors back.
    """
    original = nn.Module._apply

    def apply(self: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        for child in self.children() if recurse else ():
            child._apply(fn)
        for name, parameter in self._parameters.items():
            if parameter is not None and (changed := fn(parameter)) is not parameter:
                self._parameters[name] = nn.Parameter(changed, requires_grad=parameter.requires_grad)
        for name, buffer in self._buffers.items():
            self._buffers[name] = None if buffer is None else fn(buffer)
        return self

    nn.Module._apply = apply  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module._apply = original  # type: ignore[method-assign]


@contextmanager
def collector_paused() -> Iterator[None]:
    """Pause the garbage collector, so that storages end when the forward drops them and not at some other time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextmanager
def fakes_quiet() -> Iterator[None]:
    """Stop torch from logging a traceback for each operator that refuses fakes. The error itself says enough."""
    logger = logging.getLogger(fake_tensor.__name__)
    was_disabled, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = was_disabled


@dataclass(frozen=True, slots=True)
class Layout:
    """Where objects of one class hold others: as a plain container, in slots, and in attributes that Python defines.

    `container` is the plain type whose methods read the object: methods of its own class may do more than that.
    `is_cached` is true of functions that `functools.lru_cache` made.
    """

    container: Any
    slots: tuple[MemberDescriptorType, ...]
    references: tuple[str, ...]
    is_cached: bool


def everything_below(roots: Iterable[Any]) -> list[tuple[Any, Layout]]:
    """The roots and all that they hold, each once: in containers, attributes, slots and closures.

    >>> [thing for thing, _ in everything_below([{"a": [(random.Random,)]}]) if isinstance(thing, tuple)]
    [(<class 'random.Random'>,)]
    """
    waiting, seen, found = list(roots), set[int](), list[tuple[Any, Layout]]()
    layouts: dict[type, Layout] = {}
    while waiting:
        thing = waiting.pop()
        if isinstance(thing, SKIPPED) or id(thing) in seen:
            continue
        seen.add(id(thing))
        kind = type(thing)
        layout = layouts.get(kind) or layouts.setdefault(kind, _layout_of(kind))
        found.append((thing, layout))  # holds the thing, so that no other one gets its id
        _add_held(waiting, thing, layout)
    return found


def _layout_of(kind: type) -> Layout:
    container = next(filter(partial(issubclass, kind), CONTAINERS), None)
    slots: list[MemberDescriptorType] = []
    for cls in () if kind in CONTAINERS else kind.__mro__:
        for member in vars(cls).values() if "__slots__" in vars(cls) else ():
            if isinstance(member, MemberDescriptorType):
                slots.append(member)
    return Layout(container, tuple(slots), REFERENCES.get(kind, ()), _is_cached(kind))


def _is_cached(kind: type) -> bool:
    return hasattr(kind, "cache_info") and hasattr(kind, "cache_clear")


def _add_held(waiting: list[Any], thing: Any, layout: Layout) -> None:
    """Add the objects that one object holds."""
    if layout.container is not None:
        waiting += layout.container.__iter__(thing)
        if isinstance(thing, dict):
            waiting += dict.values(thing)
    for name in layout.references:
        with suppress(ValueError):  # an empty cell
            waiting.append(getattr(thing, name))
    if isinstance(thing, np.ndarray) and thing.dtype.hasobject:
        waiting += thing.flat
    if isinstance(attributes := getattr(thing, "__dict__", None), dict):
        waiting.append(attributes)
    if layout.slots:
        waiting += [value for value in _slot_values(thing, layout.slots) if value is not MISSING]


def _slot_values(thing: Any, slots: Sequence[MemberDescriptorType]) -> list[Any]:
    values = []
    for member in slots:
        try:
            values.append(member.__get__(thing))
        except AttributeError:
            values.append(MISSING)
    return values


def _add_undos(undos: list[Undo], thing: Any, layout: Layout) -> None:
    """Add the functions that put the present content of one object back."""
    kind = layout.container
    if kind in (OrderedDict, dict):
        undos.append(partial(_restore_mapping, kind, thing, list(kind.keys(thing)), list(kind.values(thing))))
    elif kind in (list, deque, set):
        undos.append(partial(_restore_collection, kind, thing, list(kind.__iter__(thing))))
    elif isinstance(thing, np.ndarray) and thing.flags.writeable and _is_numbers_of_its_own(thing):
        undos.append(partial(np.copyto, thing, thing.copy()))
    elif isinstance(thing, torch.Generator):
        undos.append(partial(thing.set_state, thing.get_state()))
    elif isinstance(thing, random.Random):
        undos.append(partial(thing.setstate, thing.getstate()))
    elif isinstance(thing, CellType):
        with suppress(ValueError):  # an empty cell
            undos.append(partial(setattr, thing, "cell_contents", thing.cell_contents))
    elif layout.is_cached:
        undos.append(_emptied(thing))
    if layout.slots:
        undos.append(partial(_restore_slots, thing, layout.slots, _slot_values(thing, layout.slots)))


def _restore_mapping(kind: Any, mapping: Any, keys: list[Any], values: list[Any]) -> None:
    if not _same(list(kind.keys(mapping)), keys) or not _same(list(kind.values(mapping)), values):
        kind.clear(mapping)
        for key, value in zip(keys, values, strict=True):
            kind.__setitem__(mapping, key, value)


def _restore_collection(kind: Any, collection: Any, before: list[Any]) -> None:
    if not _same(list(kind.__iter__(collection)), before):
        kind.clear(collection)
        (kind.update if kind is set else kind.extend)(collection, before)


def _same(now: list[Any], before: list[Any]) -> bool:
    """Whether two lists hold the same objects in the same order."""
    return len(now) == len(before) and all(map(is_, now, before))


def _restore_slots(thing: Any, slots: Sequence[MemberDescriptorType], before: Sequence[Any]) -> None:
    for member, now, old in zip(slots, _slot_values(thing, slots), before, strict=True):
        if old is MISSING and now is not MISSING:
            member.__delete__(thing)
        elif old is not now:
            member.__set__(thing, old)


def _is_numbers_of_its_own(array: Any) -> bool:
    """Whether the array owns its memory. Arrays of a file or of a tensor may be large, and are not copied."""
    while isinstance(array, np.ndarray) and not isinstance(array, np.memmap):
        array = array.base
    return not isinstance(array, np.memmap | Tensor)


def _emptied(function: Any) -> Undo:
    """Empty a cached function (`functools.lru_cache`) that a forward has filled."""
    misses = function.cache_info().misses

    def undo() -> None:
        if function.cache_info().misses != misses:
            function.cache_clear()

    return undo


def _cached_functions(classes: Iterable[type]) -> Iterator[Any]:
    """Give the cached functions that classes, and the modules they are from, hold, wrap or call."""
    waiting, seen = list[Any](), dict[int, Any]()
    for cls in classes:
        waiting += vars(cls).values()
        if (module := sys.modules.get(cls.__module__)) is not None:
            waiting += list(vars(module).values())
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen[id(value)] = value
        if _is_cached(type(value)):
            yield value
        elif isinstance(value, FunctionType | staticmethod | classmethod):
            waiting += [getattr(value, "__func__", None), getattr(value, "__wrapped__", None)]
            for cell in getattr(value, "__closure__", None) or ():
                with suppress(ValueError):  # an empty cell
                    waiting.append(cell.cell_contents)
