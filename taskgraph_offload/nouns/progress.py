"""Progress of long work: whoever does it reports each step, and a caller who listens is told.

Draws nothing. A report costs almost nothing while nobody listens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeAlias, TypeVar

Listener: TypeAlias = Callable[[str, int, int], None]  # (what is being done, steps done, steps in all)
Step = TypeVar("Step")

_listener: ContextVar[Listener | None] = ContextVar("progress", default=None)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Call `listener(what, done, total)` for each report inside of this context.

    One kind of work, `what`, may begin anew: then `done` is 0 or 1 again. It has ended when `done` equals `total`.

    >>> with listening(lambda what, done, total: print(f"{what}: {done} of {total}")):
    ...     report("rows", 1, 2)
    rows: 1 of 2
    """
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


def report(what: str, done: int, total: int) -> None:
    """Tell the listener, if there is one, how many steps are done."""
    listener = _listener.get()
    if listener is not None:
        listener(what, done, total)


def reported(what: str, steps: Sequence[Step]) -> Iterator[Step]:
    """The steps, one after the other, with a report before the first one and after each.

    >>> with listening(lambda what, done, total: print(f"{what}: {done} of {total}")):
    ...     print(*reported("letters", "ab"))
    letters: 0 of 2
    letters: 1 of 2
    letters: 2 of 2
    a b
    """
    report(what, 0, len(steps))
    for done, step in enumerate(steps, 1):
        yield step
        report(what, done, len(steps))
