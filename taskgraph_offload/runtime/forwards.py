"""Begins and ends forwards: one at a time, in one thread; however one ends, the model is fit for the next one."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import nn

from ..errors import ExecutionError
from .backward import saved_from_home
from .boundaries import Entry, Side
from .conductor import Conductor
from .watch import Watch


@dataclass(eq=False)
class _Turn:
    """A forward that may run now. `caller` is on its thread's stack, as some frame's `self`, as long as it does."""

    caller: Entry | nn.Module
    name: str
    thread: int = field(default_factory=threading.get_ident)
    scope: Any = None  # what begins and ends it

    @property
    def is_block(self) -> bool:
        """Whether it is a block that was called by itself."""
        return isinstance(self.caller, nn.Module)

    @property
    def is_mine(self) -> bool:
        return self.thread == threading.get_ident()

    @property
    def is_stale(self) -> bool:
        """Whether an interrupt has hit where nobody could say any more that the forward had ended."""
        return self._thread_is_gone or (self.is_mine and not any(self.caller is one for one in _callers(self.thread)))

    @property
    def _thread_is_gone(self) -> bool:
        return self.thread not in sys._current_frames()


def _callers(thread: int) -> Iterator[object]:
    frame: FrameType | None = sys._current_frames().get(thread)
    while frame is not None:
        yield frame.f_locals.get("self")
        frame = frame.f_back


class Forwards:
    """Takes what the model's boundaries report, and lets the conductor hear it in the right order or not at all.

    `entry` is the method that the plan knows. Another method, or a block that is called by itself, is a forward too,
    but one of which nothing is expected.
    """

    def __init__(self, entry: str, watch: Watch, ready: Callable[[], Conductor]) -> None:
        self._entry, self._watch, self._ready = entry, watch, ready
        self._turns: dict[str, _Turn] = {}  # whose turn it is `now`; a dict, as `setdefault` cannot be interrupted
        self._conductor: Conductor | None = None

    @property
    def are_running(self) -> bool:
        self._end_stale()
        return bool(self._turns)

    def run(self, entry: Entry) -> AbstractContextManager[None]:
        """One call of a method of the model."""
        now = self._turns.get("now")
        if now is not None and now.is_mine and now.name != entry.name and not now.is_block and not now.is_stale:
            return nullcontext()  # one method of the model calls another one
        return self._scope(_Turn(entry, entry.name))

    def reach(self, module: nn.Module, name: str, side: Side) -> None:
        """The model enters or leaves a module."""
        now = self._turns.get("now")
        if now is None and side == "enter":
            now = _Turn(module, name)
            self._scope(now).__enter__()
        elif now is None or not now.is_mine:
            if now is not None and side == "enter":
                raise self._busy(now)
            return
        assert self._conductor is not None
        self._conductor.reach(name, side)
        if now.is_block and now.name == name and not self._conductor.is_inside(name):
            now.scope.__exit__(None, None, None)

    def _scope(self, turn: _Turn) -> AbstractContextManager[None]:
        scope = turn.scope = self._forward(turn, planned=turn.name == self._entry and not turn.is_block)
        return scope

    @contextmanager
    def _forward(self, turn: _Turn, planned: bool) -> Iterator[None]:
        _refuse_transforms()
        try:
            self._take(turn)
            conductor = self._conductor = self._ready()
            conductor.begin(self._watch.changes(), planned)
            with _saving(conductor), conductor.watching():
                yield
            conductor.finish()
            self._release(turn)
        except BaseException:
            self._give_up(turn)
            raise

    def _take(self, turn: _Turn) -> None:
        self._end_stale()
        now = self._turns.setdefault("now", turn)
        if now is not turn:
            raise self._busy(now)

    def _give_up(self, turn: _Turn) -> None:
        """The forward broke off. If this breaks off too, the next forward does it again."""
        if self._turns.get("now") is not turn:
            return
        try:
            if self._conductor is not None:
                self._conductor.abandon()
        except Exception:
            self._release(turn)
            raise
        self._release(turn)

    def _release(self, turn: _Turn) -> None:
        self._conductor = None
        if self._turns.get("now") is turn:
            self._turns.clear()

    def _end_stale(self) -> None:
        now = self._turns.get("now")
        if now is not None and now.is_stale:
            if now.is_mine and now.scope is not None:
                now.scope.gen.close()
            self._give_up(now)

    def _busy(self, now: _Turn) -> ExecutionError:
        who = "this thread, further up" if now.is_mine else "another thread"
        return ExecutionError(
            f"a forward of this model is running already, in {who}: an offloaded model runs one forward at a time; "
            "wait for it, or give each thread a model and an executor of its own"
        )


def _refuse_transforms() -> None:
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise ExecutionError(
            "an offloaded model cannot run inside torch.func transforms (grad, jvp, vmap, ...): its weights move while "
            "it runs; use torch.autograd, or detach first"
        )


def _saving(conductor: Conductor) -> AbstractContextManager[Any]:
    return saved_from_home(conductor.weight_at) if torch.is_grad_enabled() else nullcontext()
