"""Tells the executor when a forward of the model begins and ends, and when it enters or leaves a module that matters.

The model's own code runs unchanged. A copy or a pickle of a model takes none of this along.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from threading import get_ident
from typing import Any, cast

from torch import nn
from torch.compiler import is_compiling
from torch.utils.hooks import RemovableHandle

from ..errors import PlanError
from .needs import Need, Side, can_stand_in

Running = Callable[["Entry"], AbstractContextManager[None]]
Served = Callable[[nn.Module, str], AbstractContextManager[None]]


class Inside:
    """Where the forward is: the call that runs, its `block`, and the thread. What the block's modules read is there.

    `seated` is what the device has for the call: usually the same as `running`.
    """

    def __init__(self) -> None:
        self.running: Need | None = None
        self.seated: Need | None = None
        self.block: str | None = None
        self.thread = 0


class Reach:
    """Whom the hooks `tell` of a boundary. Torch must not compile that, once it compiles anything."""

    def __init__(self, tell: Callable[[nn.Module, str, Side], None]) -> None:
        self.tell, self.is_marked = tell, False

    def mark(self) -> None:
        """Tell torch's compiler. Only once somebody has imported it: that takes seconds."""
        self.tell, self.is_marked = sys.modules["torch._dynamo"].disable(self.tell), True


class Hooks:
    """All that is on the modules of one model. `owner` is the executor that put it there."""

    def __init__(self, model: nn.Module, owner: object, reach: Callable[[nn.Module, str, Side], None]) -> None:
        self._model, self._owner, self._reach = model, owner, Reach(reach)
        self._hooks: list[tuple[nn.Module, RemovableHandle, RemovableHandle]] = []
        self._stand_ins: list[StandIn] = []

    def watch(self, modules: Iterable[str]) -> None:
        """Tell when these modules are entered and left."""
        for name, module in [(name, self._find(name)) for name in modules]:
            if isinstance(module, nn.TransformerEncoderLayer):  # with hooks on it, it computes in another way
                continue
            enter, leave = (_Hook(module, name, side, self._reach, self._owner) for side in ("enter", "exit"))
            first = module.register_forward_pre_hook(enter, prepend=True)
            self._hooks.append((module, first, module.register_forward_hook(leave, always_call=True)))
        _forget_compiled_code()

    def wrap_entry(self, module: str, method: str, running: Running, planned: bool) -> None:
        """Let a method run inside `running(entry)`: it is a forward. `planned`: the one that the plan knows."""
        self._stand_ins.append(Entry(self._find(module), method, self._owner, running, planned))

    def wrap_inside(self, blocks_of: dict[str, tuple[str, ...]], inside: Inside) -> None:
        """Tell, too, when a module is entered while none of its blocks runs, and no hook tells it."""
        told = {module for module, _, _ in self._hooks}
        for path, module in [(path, self._find(path)) for path in blocks_of]:
            if (module not in told or path in blocks_of[path]) and can_stand_in(module):
                self._stand_ins.append(Inner(module, path, self._owner, blocks_of[path], inside, self._reach))
                told.add(module)

    def wrap_unread(self, modules: Iterable[str], served: Served) -> None:
        """Let modules that own weights which no call of the plan reads run inside `served(module, name)`."""
        for path in modules:
            if path:
                self._stand_ins.append(Unread(self._find(path), path, self._owner, served))

    def come_outermost(self) -> None:
        """Move our hooks around those that were added since: these may read weights, too."""
        if not self._reach.is_marked and "torch._dynamo" in sys.modules:
            self._reach.mark()
        for module, first, last in self._hooks:
            if first.id in module._forward_pre_hooks and last.id in module._forward_hooks:
                before: Any = module._forward_pre_hooks
                before.move_to_end(first.id, last=False)
                after: Any = module._forward_hooks
                after.move_to_end(last.id)

    def remove(self) -> None:
        """Take everything off the modules. A stand-in may stand before another one: the last comes off first."""
        for _, first, last in self._hooks:
            first.remove()
            last.remove()
        for stand_in in reversed(self._stand_ins):
            stand_in.remove()
        _forget_compiled_code()

    def _find(self, name: str) -> nn.Module:
        try:
            return self._model.get_submodule(name)
        except AttributeError:
            kind = type(self._model).__name__
            raise PlanError(f"the plan's module {name!r} is not in this {kind}; plan again") from None


def owners(model: nn.Module) -> dict[str, Any]:
    """The executors that are attached to a model or to a part of it, each with one module that shows it."""
    found: dict[Any, str] = {}
    for name, module in model.named_modules():
        for hook in (*vars(module).values(), *module._forward_pre_hooks.values()):
            if isinstance(hook, _Hook) or (isinstance(hook, StandIn) and not hook.is_removed):
                found.setdefault(hook.owner, name)
    return {name: owner for owner, name in found.items()}


class StandIn:
    """Stands in for a method of one module, as an attribute of that module.

        module(x)  ->  vars(module)["forward"], the stand-in  ->  the method that would be called without it

    In a copy or a pickle of the module, a stand-in is the method that the copy would have had.
    """

    is_offloading = True  # the planner refuses a model on which it sees this

    def __init__(self, module: nn.Module, name: str, owner: object) -> None:
        self.name, self.owner = name, owner
        self._module = module
        self._own = vars(module).get(name)  # an attribute that the module had before
        self.is_removed = False
        functools.update_wrapper(cast(Callable[..., Any], self), self._method(), updated=())
        vars(module)[name] = self

    def _method(self) -> Callable[..., Any]:
        """What would be called if this were not here. A method of the class may have been replaced meanwhile."""
        own = self._own if self._own is not None else self._module._modules.get(self.name)
        return own if own is not None else _method(self._module, self.name)

    def remove(self) -> None:
        """Put the method back."""
        self.is_removed = True
        if vars(self._module).get(self.name) is not self:
            return  # the module's owner has put something else there
        if self._own is not None:
            vars(self._module)[self.name] = self._own
        else:
            del vars(self._module)[self.name]

    def __reduce__(self) -> Any:
        """In a copy of the module: the method that the copy would have had."""
        if self._own is not None:
            return _same, (self._own,)
        return _method, (self._module, self.name)


class Entry(StandIn):
    """A method that is a forward."""

    def __init__(self, module: nn.Module, name: str, owner: object, running: Running, planned: bool) -> None:
        super().__init__(module, name, owner)
        self.planned = planned
        self._running, self._uncompiled = running, _Uncompiled(self._run)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._uncompiled(*args, **kwargs)

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        if self.is_removed:  # somebody has kept it
            return self._method()(*args, **kwargs)
        with self._running(self):
            return self._method()(*args, **kwargs)


class Inner(StandIn):
    """The forward of a block, or of a module inside of one. What it reads is there while its block runs; else it tells.

    Hooks would cost several times as much, there are many such modules, and a call of `forward` passes hooks by.
    """

    def __init__(
        self, module: nn.Module, path: str, owner: object, blocks: tuple[str, ...], inside: Inside, reach: Reach
    ) -> None:
        super().__init__(module, "forward", owner)
        self._path, self._inside, self._reach, self._blocks = path, inside, reach, blocks

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        forward = self._own if self._own is not None else type(self._module).forward.__get__(self._module)
        inside = self._inside
        if is_compiling() or (inside.block in self._blocks and inside.thread == get_ident()) or self.is_removed:
            return forward(*args, **kwargs)
        self._reach.tell(self._module, self._path, "enter")
        try:
            return forward(*args, **kwargs)
        finally:
            self._reach.tell(self._module, self._path, "exit")


class Unread(StandIn):
    """The forward of a module that owns weights which no call of the plan reads: somebody must bring them."""

    def __init__(self, module: nn.Module, path: str, owner: object, served: Served) -> None:
        super().__init__(module, "forward", owner)
        self._path, self._served, self._uncompiled = path, served, _Uncompiled(self._run)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._uncompiled(*args, **kwargs)

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        if self.is_removed:
            return self._method()(*args, **kwargs)
        with self._served(self._module, self._path):
            return self._method()(*args, **kwargs)


class _Hook:
    """Reports one side of one module; in a copy of the module, nothing."""

    is_offloading = True

    def __init__(self, module: nn.Module, name: str, side: Side, reach: Reach, owner: object) -> None:
        self._module, self._name, self._side, self._reach, self.owner = module, name, side, reach, owner

    def __call__(self, module: nn.Module, *_: Any) -> None:
        if module is self._module:
            self._reach.tell(module, self._name, self._side)

    def __reduce__(self) -> Any:
        return _Silence, ()


class _Silence:
    """What is left of a hook in a copy."""

    def __call__(self, *_: Any) -> None:
        """Do nothing."""


class _Uncompiled:
    """A function that torch does not compile, nor what it calls. Marked late: importing the compiler takes seconds."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function, self._is_marked = function, False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self._is_marked and "torch._dynamo" in sys.modules:
            self._function, self._is_marked = sys.modules["torch._dynamo"].disable(self._function), True
        return self._function(*args, **kwargs)


def _forget_compiled_code() -> None:
    """Let torch compile anew: what it has compiled knows nothing of hooks that came later."""
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()


def _method(module: nn.Module, name: str) -> Callable[..., Any]:
    found = inspect.getattr_static(type(module), name)
    method: Callable[..., Any] = found.__get__(module, type(module)) if hasattr(found, "__get__") else found
    return method


def _same(value: Any) -> Any:
    return value
