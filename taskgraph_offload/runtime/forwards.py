"""Begins and ends forwards, one at a time, in one thread. After an error, the model is ready for the next forward."""

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
from .conductor import Conductor
from .edits import Edits
from .hooks import Entry, Given
from .needs import Side


@dataclass(eq=False)
class _Turn:
    """A forward that is allowed to run now. While it runs, `caller` is the `self` of some frame on its thread's stack.

    `module` is set if the user called a module inside of the model directly. The forward ends when that module ends.
    """

    caller: Entry | nn.Module
    planned: bool
    module: str | None = None
    thread: int = field(default_factory=threading.get_ident)
    scope: Any = None  # the context manager that begins and ends the forward

    @property
    def is_mine(self) -> bool:
        return self.thread == threading.get_ident()

    @property
    def is_stale(self) -> bool:
        """Whether the forward is over, but an interrupt (such as Ctrl-C) came before this turn was released."""
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
    """Receives what the hooks report, and passes it to the conductor if it belongs to the forward that runs.

    Calling another method of the model, or a module inside of it, is a forward too, but not a planned one. `entries`
    are modules around all blocks: calling one of them is the planned forward.
    """

    def __init__(self, entries: tuple[str, ...], edits: Edits, ready: Callable[[], Conductor]) -> None:
        self._entries, self._edits, self._ready = entries, edits, ready
        self._turns: dict[str, _Turn] = {}  # the turn that runs, under "now"; a dict, because `setdefault` is atomic
        self._conductor: Conductor | None = None

    @property
    def are_running(self) -> bool:
        """Whether a forward runs."""
        self._end_stale()
        return bool(self._turns)

    def run(self, entry: Entry) -> AbstractContextManager[None]:
        """A context in which one call of an entry method runs."""
        now = self._turns.get("now")
        is_ours = now is not None and now.is_mine and now.caller is not entry and not now.is_stale
        if now is not None and is_ours and (now.module is None or now.planned):
            return nullcontext()  # one method of the model calls another one
        return self._scope(_Turn(entry, entry.planned))

    def reach(self, module: nn.Module, name: str, side: Side) -> bool:
        """The model enters or leaves a module. Returns whether a forward begins with this."""
        now = self._turns.get("now")
        if begins := now is None and side == "enter":
            now = _Turn(module, name in self._entries, name)
            self._scope(now).__enter__()
        elif now is None or now.thread != threading.get_ident():
            if now is not None and side == "enter":
                raise self._busy(now)
            return False
        assert self._conductor is not None
        self._conductor.reach(name, side)
        if now.module == name and not self._conductor.is_inside(name):
            now.scope.__exit__(None, None, None)
        return begins

    def inputs(self, given: Given) -> Given:
        """What the caller gives to the forward that begins, on the device where it runs."""
        return given if self._conductor is None else self._conductor.on_the_device(given)

    def returned(self, output: Any) -> Any:
        """What a module returns that holds weights of which nobody expects a read there. Runs before `reach`."""
        return output if self._conductor is None else self._conductor.apart_from_homes(output)

    def _scope(self, turn: _Turn) -> AbstractContextManager[None]:
        scope = turn.scope = self._forward(turn)
        return scope

    @contextmanager
    def _forward(self, turn: _Turn) -> Iterator[None]:
        try:
            self._take(turn)
            conductor = self._conductor = self._ready()
            conductor.begin(self._edits.changes(), turn.planned)
            saving = saved_from_home(conductor.weight_at) if torch.is_grad_enabled() else nullcontext()
            with saving, conductor.watching():
                yield
            conductor.finish()
            self._release(turn)
        except BaseException:
            self._give_up(turn)
            raise

    def _take(self, turn: _Turn) -> None:
        if torch._C._functorch.peek_interpreter_stack() is not None:
            raise ExecutionError(
                "an offloaded model cannot run inside torch.func transforms (grad, jvp, vmap, ...): its weights move "
                "while it runs; use torch.autograd, or detach first"
            )
        if self._turns:
            self._end_stale()
        now = self._turns.setdefault("now", turn)
        if now is not turn:
            raise self._busy(now)

    def _give_up(self, turn: _Turn) -> None:
        """Clean up after a forward that raised. If an interrupt stops the clean-up, the next forward repeats it."""
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
