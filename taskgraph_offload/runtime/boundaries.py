"""Tells the executor when the model's forward begins and ends, and when it enters or leaves a module that matters.

The model's own code runs unchanged. A copy or a pickle of a model takes none of this along.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from threading import get_ident
from typing import Any, Literal

from torch import nn
from torch.compiler import is_compiling
from torch.utils.hooks import RemovableHandle

from ..errors import ExecutionError, PlanError
from .inside import Inside, can_stand_in
from .standin import StandIn

Side = Literal["enter", "exit"]
Reach = Callable[[nn.Module, str, Side], None]
Running = Callable[["Entry"], AbstractContextManager[None]]


class Boundaries:
    """Hooks on some modules, and a wrapper around the methods that begin a forward."""

    def __init__(self, model: nn.Module, modules: Iterable[str], reach: Reach) -> None:
        self._hooks: list[tuple[nn.Module, RemovableHandle, RemovableHandle]] = []
        self._stand_ins: list[StandIn] = []
        reach = self._reach = _Uncompiled(reach)
        for name, module in [(name, _find(model, name)) for name in modules]:
            if isinstance(module, nn.TransformerEncoderLayer):  # one with hooks computes in another way
                continue
            enter, leave = _Hook(module, name, "enter", reach), _Hook(module, name, "exit", reach)
            first = module.register_forward_pre_hook(enter, prepend=True)
            self._hooks.append((module, first, module.register_forward_hook(leave, always_call=True)))
        _forget_compiled_code()

    def wrap(self, model: nn.Module, method: str, running: Running) -> None:
        """Let a method of the model run inside `running(entry)`."""
        self._stand_ins.append(Entry(model, method, running))

    def wrap_inner(self, model: nn.Module, inside: Inside) -> None:
        """Tell, too, when a module is entered while none of its blocks runs, and no hook has told of it."""
        told = {module for module, _, _ in self._hooks}
        for path, module in [(path, _find(model, path)) for path in inside.blocks_of]:
            if (module not in told or path in inside.blocks_of[path]) and can_stand_in(module):
                self._stand_ins.append(Inner(module, path, inside, self._reach))
                told.add(module)

    def come_outermost(self) -> None:
        """Hooks that were added since, run inside of ours: they may read weights, too."""
        for module, first, last in self._hooks:
            if first.id in module._forward_pre_hooks and last.id in module._forward_hooks:
                before: Any = module._forward_pre_hooks
                before.move_to_end(first.id, last=False)
                after: Any = module._forward_hooks
                after.move_to_end(last.id)

    def remove(self) -> None:
        """No trace is left."""
        for _, first, last in self._hooks:
            first.remove()
            last.remove()
        for stand_in in self._stand_ins:
            stand_in.remove()
        _forget_compiled_code()


def refuse_attached(model: nn.Module) -> None:
    """One executor at a time, for a model and for all that is in it."""
    for name, module in model.named_modules():
        hooks = (*vars(module).values(), *module._forward_pre_hooks.values())
        if any(isinstance(found, _Hook) or (isinstance(found, StandIn) and not found.is_removed) for found in hooks):
            where = f"its module {name!r}" if name else f"this {type(model).__name__}"
            raise ExecutionError(f"{where} is attached already; detach that executor first")


def _forget_compiled_code() -> None:
    """What torch has compiled knows nothing of hooks that came later. It compiles anew."""
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()


class _Uncompiled:
    """A function that torch compiles no more than what it calls. Marked late: to import the compiler takes seconds."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function, self._is_marked = function, False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self._is_marked and "torch._dynamo" in sys.modules:
            self._function, self._is_marked = sys.modules["torch._dynamo"].disable(self._function), True
        return self._function(*args, **kwargs)


def _find(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise PlanError(f"the plan's module {name!r} is not in this {type(model).__name__}; plan again") from None


class Entry(StandIn):
    """A method of the model that is a forward."""

    def __init__(self, model: nn.Module, name: str, running: Running) -> None:
        super().__init__(model, name)
        self._running, self._uncompiled = running, _Uncompiled(self._run)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._uncompiled(*args, **kwargs)

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        if self.is_removed:  # somebody has kept it
            return self._method()(*args, **kwargs)
        with self._running(self):
            return self._method()(*args, **kwargs)


class Inner(StandIn):
    """The forward of a block, or of a module inside. What it reads is there while its block runs; else we must be told.

    Hooks would cost several times as much, there are many of these modules in a block, and who calls `forward` itself
    passes them by.
    """

    def __init__(self, module: nn.Module, path: str, inside: Inside, reach: Reach) -> None:
        super().__init__(module, "forward")
        self._path, self._inside, self._reach, self._blocks = path, inside, reach, inside.blocks_of[path]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        forward = self._own if self._own is not None else type(self._module).forward.__get__(self._module)
        inside = self._inside
        if is_compiling() or (inside.now in self._blocks and inside.thread == get_ident()) or self.is_removed:
            return forward(*args, **kwargs)
        self._reach(self._module, self._path, "enter")
        try:
            return forward(*args, **kwargs)
        finally:
            self._reach(self._module, self._path, "exit")


class _Hook:
    """Reports one side of one module; in a copy of the module, nothing."""

    is_offloading = True

    def __init__(self, module: nn.Module, name: str, side: Side, reach: Reach) -> None:
        self._module, self._name, self._side, self._reach = module, name, side, reach

    def __call__(self, module: nn.Module, *_: Any) -> None:
        if module is self._module:
            self._reach(module, self._name, self._side)

    def __reduce__(self) -> Any:
        return _Silence, ()


class _Silence:
    """What is left of a hook in a copy."""

    def __call__(self, *_: Any) -> None:
        """Nothing happens."""
