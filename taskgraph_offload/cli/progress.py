"""Draws the progress of long work on stderr, for a person who waits: nothing in a pipe, nothing for short work."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, Task, TaskID, TextColumn, TimeElapsedColumn

from ..nouns.names import printable
from ..nouns.progress import listening, report
from ..nouns.progress import reported as one_by_one

__all__ = ["one_by_one", "show_progress", "working"]

PATIENCE = 1.0  # seconds: work that is done sooner is not drawn


@contextmanager
def show_progress() -> Iterator[Progress | None]:
    """Draw the progress of what runs inside of this context, if stderr is a terminal or this is a notebook.

    The command line does this always; a program that plans and runs models may do it too.

    >>> with show_progress():
    ...     report("counting", 1, 1)
    """
    console = Console(stderr=True)
    if not (sys.stderr.isatty() or console.is_jupyter):
        yield None
        return
    with _Bars(console) as bars, listening(bars.update_from):
        yield bars


@contextmanager
def working(what: str) -> Iterator[None]:
    """Report work of one step."""
    report(what, 0, 1)
    try:
        yield
    finally:
        report(what, 1, 1)


class _Bars(Progress):
    """One bar for each kind of work that is under way, once it has taken long enough."""

    def __init__(self, console: Console) -> None:
        text, count = TextColumn("{task.description}", markup=False), TextColumn("{task.fields[count]}")
        super().__init__(text, BarColumn(), count, TimeElapsedColumn(), console=console, transient=True)
        self._shown = dict[str, TaskID]()

    def update_from(self, what: str, done: int, total: int) -> None:
        """Listen to a report. Work of one step has a bar that moves, without a number."""
        if what not in self._shown:
            self._shown[what] = self.add_task(printable(what), total=None, count="")
        if total > 1:
            self.update(self._shown[what], completed=done, total=total, count=f"{done}/{total}")
        if done >= total:
            self.remove_task(self._shown.pop(what))

    def get_renderables(self) -> Iterator[RenderableType]:
        """The bars to draw now."""
        yield self.make_tasks_table([task for task in self.tasks if _has_taken_long(task)])


def _has_taken_long(task: Task) -> bool:
    return (task.elapsed or 0.0) >= PATIENCE
