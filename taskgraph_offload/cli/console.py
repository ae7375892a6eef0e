"""Where the command line prints: results on stdout, and on stderr, for a person who waits, what is going on."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from ..errors import OffloadError
from ..nouns.names import printable

Item = TypeVar("Item")


@dataclass(frozen=True)
class Answer:
    """What a command found: as an object for scripts, as a page for people; and the error to end with, if any."""

    document: Callable[[], Mapping[str, Any]]
    show: Callable[[Console], None]
    fault: OffloadError | None = None


def print_answer(answer: Answer, command: str, as_json: bool) -> None:
    """On stdout, one JSON object or the page; names are printed as they are, never read as markup."""
    if as_json:
        print(json.dumps({"command": command, **answer.document()}, indent=2, default=list, allow_nan=False))
    else:
        answer.show(Console(markup=False, highlight=False, emoji=False))


@contextmanager
def working(on: str) -> Iterator[None]:
    """A line that says what takes so long, gone when it is done."""
    with _progress(SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn()) as progress:
        progress.add_task(printable(on), total=None)
        yield


def one_by_one(items: Sequence[Item], on: str) -> Iterator[Item]:
    """The items, with a bar that shows how many are done, gone when all are."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with _progress(*columns) as progress:
        yield from progress.track(items, description=on)


def _progress(*columns: Any) -> Progress:
    terminal = Console(stderr=True)
    return Progress(*columns, console=terminal, transient=True, disable=not sys.stderr.isatty())
