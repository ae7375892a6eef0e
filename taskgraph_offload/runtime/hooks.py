"""Hooks on the model that tell when a forward begins and ends, and when it enters or leaves a watched module.

The model's own code runs unchanged. A copy or a pickle of the model has no hooks.
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

Given = tuple[tuple[Any, ...], dict[str, Any]]  # the positional and the keyword arguments of a call
Running = Callable[["Entry"], AbstractContextManager[None]]


class Inside:
    """Where the forward is: the call that is `running`, its `block`, and the thread.

    The device has all that the modules of this block read. `seated` is what the device has for the call. It is
    `running`, except where weights of the call collide: see `Need.loose`.
    """

    def __init__(self) -> None:
        self.running: Need | None = None
        self.seated: Need | None = None
        self.block: str | None = None
        self.thread = 0


class Reach:
    """The function that hooks call at a boundary, `tell`. Torch's compiler must not compile it.

    It says whether a forward begins there. Then the hook gives the module the inputs that `inputs` makes of them.
    """

    def __init__(self, tell: Callable[[nn.Module, str, Side], bool], inputs: Callable[[Given], Given]) -> None:
        self.tell, self.inputs, self.is_marked = tell, inputs, False

    def mark(self) -> None:
        """Exclude `tell` from compiling. Call this once the compiler is imported: importing it here takes seconds."""
        self.tell, self.is_marked = sys.modules["torch._dynamo"].disable(self.tell), True


class Hooks:
    """All hooks and stand-ins on the modules of one model. `owner` is the executor that put them there."""

    def __init__(self, model: nn.Module, owner: object, reach: Reach) -> None:
        self._model, self._owner, self._reach = model, owner, reach
        self._hooks: list[tuple[nn.Module, RemovableHandle, RemovableHandle]] = []
        self._stand_ins: list[StandIn] = []

    def watch(self, modules: Iterable[str], returns: Callable[[Any], Any] | None = None) -> None:
        """Report when the forward enters and leaves these modules; what they return goes through `returns`."""
        watched = {module for module, _, _ in self._hooks}
        fast = self._modules_with_a_fast_path()
        for name, module in [(name, self._find(name)) for name in modules]:
            if module in watched or module in fast:
                continue
            enter = _Hook(module, name, "enter", self._reach, self._owner)
            leave = _Hook(module, name, "exit", self._reach, self._owner, returns)
            first = module.register_forward_pre_hook(enter, prepend=True, with_kwargs=True)
            self._hooks.append((module, first, module.register_forward_hook(leave, always_call=True)))
            watched.add(module)
        _forget_compiled_code()

    def _modules_with_a_fast_path(self) -> set[nn.Module]:
        """With hooks on these, torch would compute in another way, and give other bits."""
        layers = [module for module in self._model.modules() if isinstance(module, nn.TransformerEncoderLayer)]
        return {module for layer in layers for module in layer.modules()}

    def wrap_entry(self, module: str, method: str, running: Running, planned: bool) -> None:
        """Let a method run inside `running(entry)`, as a forward. `planned`: the plan was made for this method."""
        self._stand_ins.append(Entry(self._find(module), method, self._owner, running, self._reach, planned))

    def wrap_inside(self, blocks_of: dict[str, tuple[str, ...]], inside: Inside) -> None:
        """Report, too, when a module that has no hook runs while none of its blocks does."""
        told = {module for module, _, _ in self._hooks}
        for path, module in [(path, self._find(path)) for path in blocks_of]:
            if (module not in told or path in blocks_of[path]) and can_stand_in(module):
                self._stand_ins.append(Inner(module, path, self._owner, blocks_of[path], inside, self._reach))
                told.add(module)

    def come_outermost(self) -> None:
        """Move our hooks around those that the user added later, since these may read weights."""
        if not self._reach.is_marked and "torch._dynamo" in sys.modules:
            self._reach.mark()
        for module, first, last in self._hooks:
            if first.id in module._forward_pre_hooks and last.id in module._forward_hooks:
                before: Any = module._forward_pre_hooks
                before.move_to_end(first.id, last=False)
                after: Any = module._forward_hooks
                after.move_to_end(last.id)

    def remove(self) -> None:
        """Remove everything from the modules. One method may have two stand-ins, so the last is removed first."""
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
    """The executors that are attached to a model or to a part of it, each under the name of one module it hooks."""
    found: dict[Any, str] = {}
    for name, module in model.named_modules():
        for hook in (*vars(module).values(), *module._forward_pre_hooks.values()):
            if isinstance(hook, _Hook) or (isinstance(hook, StandIn) and hook.is_offloading and not hook.is_removed):
                found.setdefault(hook.owner, name)
    return {name: owner for owner, name in found.items()}


class StandIn:
    """Replaces a method of one module, and calls the original. It is an attribute of that module.

        module(x)  ->  vars(module)["forward"], the stand-in  ->  the original method

    A copy or a pickle of the module gets the original method back.
    """

    is_offloading = True  # it belongs to an executor; the planner refuses a model on which it sees this

    def __init__(self, module: nn.Module, name: str, owner: object) -> None:
        self.name, self.owner = name, owner
        self._module = module
        self._own = vars(module).get(name)  # an attribute that the module had before
        self.is_removed = False
        functools.update_wrapper(cast(Callable[..., Any], self), self._method(), updated=())
        vars(module)[name] = self

    def _method(self) -> Callable[..., Any]:
        """The original method. It is looked up each time, because the class may have got another one meanwhile."""
        own = self._own if self._own is not None else self._module._modules.get(self.name)
        return own if own is not None else _method(self._module, self.name)

    def remove(self) -> None:
        """Put the method back."""
        self.is_removed = True
        if vars(self._module).get(self.name) is not self:
            return  # the user has replaced our stand-in
        if self._own is not None:
            vars(self._module)[self.name] = self._own
        else:
            del vars(self._module)[self.name]

    def __reduce__(self) -> Any:
        """Give a copy of the module its original method."""
        if self._own is not None:
            return _same, (self._own,)
        return _method, (self._module, self.name)


class Entry(StandIn):
    """A method that is a forward."""

    def __init__(
        self, module: nn.Module, name: str, owner: object, running: Running, reach: Reach, planned: bool
    ) -> None:
        super().__init__(module, name, owner)
        self._reach, self.planned = reach, planned
        self._running, self._uncompiled = running, _Uncompiled(self._run)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._uncompiled(*args, **kwargs)

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        if self.is_removed:  # the user kept a reference to it
            return self._method()(*args, **kwargs)
        with self._running(self):
            args, kwargs = self._reach.inputs((args, kwargs))
            return self._method()(*args, **kwargs)


class Inner(StandIn):
    """The forward of a block, or of a module inside of one. It reports when the module runs without its block.

    While the block runs, the device has what the module reads, so there is nothing to report. This is not a hook of
    torch: those cost several times as much, there are many such modules, and `module.forward(x)` calls no hooks.
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
        begins = self._reach.tell(self._module, self._path, "enter")
        try:
            if begins:
                args, kwargs = self._reach.inputs((args, kwargs))
            return forward(*args, **kwargs)
        finally:
            self._reach.tell(self._module, self._path, "exit")


class _Hook:
    """Reports that the forward enters, or leaves, one module. A copy of the module gets a hook that does nothing."""

    is_offloading = True

    def __init__(
        self,
        module: nn.Module,
        name: str,
        side: Side,
        reach: Reach,
        owner: object,
        returns: Callable[[Any], Any] | None = None,
    ) -> None:
        self._module, self._name, self._side, self._reach, self.owner = module, name, side, reach, owner
        self._returns = returns

    def __call__(self, module: nn.Module, *given: Any) -> Any:
        if module is not self._module:
            return None
        output = None if self._returns is None else self._returns(given[-1])
        begins = self._reach.tell(module, self._name, self._side)
        return self._reach.inputs(cast(Given, given)) if begins else output

    def __reduce__(self) -> Any:
        return _Silence, ()


class _Silence:
    """The hook of a copied module."""

    def __call__(self, *_: Any) -> None:
        """Do nothing."""


class _Uncompiled:
    """A function that torch's compiler leaves alone, with all that it calls.

    It is marked once the compiler is imported, because importing it here takes seconds.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function, self._is_marked = function, False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self._is_marked and "torch._dynamo" in sys.modules:
            self._function, self._is_marked = sys.modules["torch._dynamo"].disable(self._function), True
        return self._function(*args, **kwargs)


def _forget_compiled_code() -> None:
    """Let torch compile again: code that it compiled before does not call hooks that were added later.

    Only if torch has compiled something: `reset` imports all of the compiler, which takes seconds.
    """
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None and dynamo.convert_frame.input_codes.seen:
        dynamo.reset()


def _method(module: nn.Module, name: str) -> Callable[..., Any]:
    found = inspect.getattr_static(type(module), name)
    method: Callable[..., Any] = found.__get__(module, type(module)) if hasattr(found, "__get__") else found
    return method


def _same(value: Any) -> Any:
    return value
