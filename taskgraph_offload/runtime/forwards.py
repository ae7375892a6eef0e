"""Begins and ends forwards: one at a time, in one thread; however one ends, the model is fit for the next one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from ..errors import ExecutionError
from .backward import saved_from_home
from .boundaries import Side
from .conductor import Conductor
from .watch import Watch


class Forwards:
    """Takes what the model's boundaries report, and lets the conductor hear it in the right order or not at all.

    `entry` is the method that the plan knows. Another method, or a block that is called by itself, is a forward too,
    but one of which nothing is expected.
    """

    def __init__(self, entry: str, watch: Watch, ready: Callable[[], Conductor]) -> None:
        self._entry, self._watch, self._ready = entry, watch, ready
        self._turn = threading.Lock()
        self._thread: int | None = None  # whose turn it is
        self._running = ""
        self._conductor: Conductor | None = None
        self._alone: tuple[str, AbstractContextManager[None]] | None = None  # a block that was called by itself

    @property
    def are_running(self) -> bool:
        return self._thread is not None

    @contextmanager
    def run(self, method: str) -> Iterator[None]:
        """One call of a method of the model."""
        if self._thread == threading.get_ident() and method != self._running and self._alone is None:
            yield  # one method of the model calls another one
        else:
            with self._forward(method, planned=method == self._entry):
                yield

    def reach(self, module: str, side: Side) -> None:
        """The model enters or leaves a module."""
        if self._thread is None and side == "enter":
            self._alone = (module, self._forward(module, planned=False))
            self._alone[1].__enter__()
        elif self._thread != threading.get_ident():
            if self._thread is not None and side == "enter":
                raise self._busy()
            return
        assert self._conductor is not None
        self._conductor.reach(module, side)
        if self._alone is not None and (module, side) == (self._alone[0], "exit"):
            alone, self._alone = self._alone[1], None
            alone.__exit__(None, None, None)

    @contextmanager
    def _forward(self, name: str, planned: bool) -> Iterator[None]:
        self._give_up_block()
        if not self._turn.acquire(blocking=False):
            raise self._busy()
        try:
            self._thread, self._running = threading.get_ident(), name
            conductor = self._conductor = self._ready()
            try:
                conductor.begin(self._watch.changes(), planned)
                with _saving(conductor), conductor.watching():
                    yield
                conductor.finish()
            except BaseException:
                conductor.abandon()
                raise
            finally:
                self._watch.remember()
        finally:
            self._thread = self._conductor = None
            self._turn.release()

    def _give_up_block(self) -> None:
        """A block that was called by itself and interrupted never said that it ended."""
        if self._alone is not None and self._thread == threading.get_ident():
            alone, self._alone = self._alone[1], None
            end = KeyboardInterrupt()
            alone.__exit__(type(end), end, None)

    def _busy(self) -> ExecutionError:
        who = "this thread, further up" if self._thread == threading.get_ident() else "another thread"
        return ExecutionError(
            f"a forward of this model is running already, in {who}: an offloaded model runs one forward at a time; "
            "wait for it, or give each thread a model and an executor of its own"
        )


def _saving(conductor: Conductor) -> AbstractContextManager[Any]:
    return saved_from_home(conductor.weight_at) if torch.is_grad_enabled() else nullcontext()
