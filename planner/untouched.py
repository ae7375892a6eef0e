"""Leave a model, and the random number generators, as they were found.

A forward may keep things: a cache on a module, a computed weight as a plain attribute, a position in a list.
"""

from __future__ import annotations

import random
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

DEPTH = 4  # how deep below a module's attributes to look for containers
OPAQUE = (type, ModuleType, FunctionType, MethodType, BuiltinFunctionType, Tensor, nn.Module, str, bytes, int, float)

Undo = Callable[[], None]


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Whatever happens inside, the modules' attributes and cached functions end as they began."""
    undos = [*_attributes(model), _caches(model)]
    try:
        yield
    finally:
        for undo in undos:
            undo()


@contextmanager
def same_random_numbers(device: torch.device) -> Iterator[None]:
    """Whatever happens inside, the next random number is the one that would have come anyway."""
    undo = _random_state()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        undo()


def _attributes(model: nn.Module) -> list[Undo]:
    """For each module and each container that hangs on one: how to put its present content back."""
    undos: list[Undo] = []
    seen: set[int] = set()
    for module in model.modules():
        _remember(vars(module), seen, undos, DEPTH)
    return undos


def _remember(value: Any, seen: set[int], undos: list[Undo], depth: int) -> None:
    if depth < 0 or id(value) in seen or isinstance(value, OPAQUE):
        return
    seen.add(id(value))
    if isinstance(value, dict):
        undos.append(_restore_mapping(value, dict(value)))
        _remember_each(dict.values(value), seen, undos, depth)
    elif isinstance(value, list | deque | set):
        undos.append(_restore_collection(value, list(value)))
        _remember_each(value, seen, undos, depth)
    elif isinstance(value, tuple):
        _remember_each(value, seen, undos, depth)
    elif isinstance(getattr(value, "__dict__", None), dict):
        _remember(value.__dict__, seen, undos, depth - 1)


def _remember_each(values: Any, seen: set[int], undos: list[Undo], depth: int) -> None:
    for value in list(values):
        _remember(value, seen, undos, depth - 1)


def _restore_mapping(mapping: dict[Any, Any], before: dict[Any, Any]) -> Undo:
    def undo() -> None:
        same = len(mapping) == len(before) and all(
            now is then and mapping[now] is before[then] for now, then in zip(mapping, before, strict=True)
        )
        if not same:
            mapping.clear()
            mapping.update(before)

    return undo


def _restore_collection(collection: Any, before: list[Any]) -> Undo:
    def undo() -> None:
        if len(collection) != len(before) or any(now is not then for now, then in zip(collection, before, strict=True)):
            collection.clear()
            (collection.update if isinstance(collection, set) else collection.extend)(before)

    return undo


def _caches(model: nn.Module) -> Undo:
    """How to empty the function caches (`functools.lru_cache`) of the model's classes that a forward has filled."""
    classes = {base for module in model.modules() for base in type(module).__mro__ if base not in nn.Module.__mro__}
    spaces: list[Mapping[str, Any]] = [vars(cls) for cls in classes]
    spaces += [vars(module) for cls in classes if (module := sys.modules.get(cls.__module__))]
    found = [value for space in spaces for value in list(space.values())]
    functions = {id(cached): cached for value in found for cached in _cached_functions(value, DEPTH)}
    misses = {key: function.cache_info().misses for key, function in functions.items()}

    def undo() -> None:
        for key, function in functions.items():
            if function.cache_info().misses != misses[key]:
                function.cache_clear()

    return undo


def _cached_functions(value: Any, depth: int) -> Iterator[Any]:
    """The cached functions that a function is, wraps or calls."""
    if hasattr(type(value), "cache_info") and hasattr(type(value), "cache_clear"):
        yield value
    elif depth and isinstance(value, FunctionType | staticmethod | classmethod):
        inner = [getattr(value, "__func__", None), getattr(value, "__wrapped__", None)]
        for cell in getattr(value, "__closure__", None) or ():
            with suppress(ValueError):  # an empty cell
                inner.append(cell.cell_contents)
        for one in inner:
            yield from _cached_functions(one, depth - 1)


def _random_state() -> Undo:
    python = random.getstate()
    numpy = sys.modules.get("numpy")
    state = numpy.random.get_state() if numpy is not None else None

    def undo() -> None:
        random.setstate(python)
        if numpy is not None:
            numpy.random.set_state(state)

    return undo
