"""Tells the executor when the model's forward begins and ends, and when it enters or leaves a module that matters.

The model's own code runs unchanged. A copy or a pickle of a model takes none of this along.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from types import MethodType
from typing import Any, Literal

from torch import nn

from ..errors import PlanError

Side = Literal["enter", "exit"]
Reach = Callable[[str, Side], None]


class Boundaries:
    """Hooks on some modules, and a wrapper around the methods that begin a forward."""

    def __init__(self, model: nn.Module, modules: Iterable[str], reach: Reach) -> None:
        self._handles = []
        for name, module in [(name, _find(model, name)) for name in modules]:
            enter, leave = _Hook(module, name, "enter", reach), _Hook(module, name, "exit", reach)
            self._handles.append(module.register_forward_pre_hook(enter, prepend=True))
            self._handles.append(module.register_forward_hook(leave, always_call=True))
        self._entries: list[Entry] = []

    def wrap(self, model: nn.Module, method: str, running: Callable[[str], AbstractContextManager[None]]) -> None:
        """Let a method of the model run inside `running(method)`."""
        self._entries.append(Entry(model, method, running))

    def remove(self) -> None:
        """No trace is left."""
        for handle in self._handles:
            handle.remove()
        for entry in self._entries:
            entry.remove()


def _find(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise PlanError(f"the plan's module {name!r} is not in this {type(model).__name__}; plan again") from None


class Entry:
    """Stands in for a method of one model, as an attribute of that model."""

    is_offloading = True  # who would trace the model sees this

    def __init__(self, model: nn.Module, name: str, running: Callable[[str], AbstractContextManager[None]]) -> None:
        self._model, self._name, self._running = model, name, running
        self._method = getattr(model, name)
        self._own = vars(model).get(name)  # what the model had as an attribute itself
        functools.update_wrapper(self, self._method)
        vars(model)[name] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self._running(self._name):
            return self._method(*args, **kwargs)

    def remove(self) -> None:
        """The method is found where it was."""
        if self._own is not None:
            vars(self._model)[self._name] = self._own
        else:
            vars(self._model).pop(self._name, None)

    def __reduce__(self) -> Any:
        """In a copy of the model: the method that the copy would have had."""
        if self._own is not None:
            return _same, (self._own,)
        return _method, (self._model, self._name)


class _Hook:
    """Reports one side of one module; in a copy of the module, nothing."""

    is_offloading = True

    def __init__(self, module: nn.Module, name: str, side: Side, reach: Reach) -> None:
        self._module, self._name, self._side, self._reach = module, name, side, reach

    def __call__(self, module: nn.Module, *_: Any) -> None:
        if module is self._module:
            self._reach(self._name, self._side)

    def __reduce__(self) -> Any:
        return _Silence, ()


class _Silence:
    """What is left of a hook in a copy."""

    def __call__(self, *_: Any) -> None:
        """Nothing happens."""


def _method(model: nn.Module, name: str) -> MethodType:
    return MethodType(getattr(type(model), name), model)


def _same(value: Any) -> Any:
    return value
