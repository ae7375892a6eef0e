"""Tables that fit the terminal: aligned columns of which the least important ones go first where there is no room."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from rich.box import Box
from rich.console import Console
from rich.table import Table
from rich.text import Text

Row = TypeVar("Row")

GAP = 2  # characters between columns
ABSENT = "-"

_NOTHING = "    \n"
_LINES = Box(2 * _NOTHING + " ── \n" + 5 * _NOTHING)  # one line under the heads
_ASCII_LINES = Box(2 * _NOTHING + " -- \n" + 5 * _NOTHING, ascii=True)


@dataclass(frozen=True)
class Column(Generic[Row]):
    """A head and what it shows of a row; the more `spare` it is, the earlier it goes, and 0 never."""

    head: str
    show: Callable[[Row], str]
    spare: int = 0
    left: bool = False


def table_of(
    rows: Sequence[Row],
    columns: Sequence[Column[Row]],
    console: Console,
    marked: Callable[[Row], bool],
    faint: Callable[[Row], bool] = lambda row: False,
) -> Table:
    """A table with a mark before some rows, and with as many columns as there is room for."""
    kept = fitting(rows, columns, console.width)
    ascii_only = console.options.ascii_only
    table = Table(
        box=_ASCII_LINES if ascii_only else _LINES,
        safe_box=False,
        pad_edge=False,
        padding=(0, GAP - 1, 0, 0),
        show_edge=False,
        header_style="bold",
    )
    table.add_column("")
    for index, column in enumerate(kept):
        table.add_column(
            column.head, justify="left" if column.left or not index else "right", no_wrap=True, overflow="ellipsis"
        )
    mark = ">" if ascii_only else "▸"
    for row in rows:
        style = "bold green" if marked(row) else "dim" if faint(row) else None
        cells = [Text(column.show(row)) for column in kept]
        table.add_row(mark if marked(row) else " ", *cells, style=style)
    return table


def fitting(rows: Sequence[Row], columns: Sequence[Column[Row]], width: int) -> list[Column[Row]]:
    """The columns that fit beside each other, the least important ones left out.

    >>> columns = [Column("name", str), Column("twice", lambda row: str(2 * row), 1)]
    >>> [column.head for column in fitting([1, 2], columns, 13)]
    ['name']
    """
    kept = list(columns)
    while _width(rows, kept) > width and any(column.spare for column in kept):
        kept.remove(max(kept, key=lambda column: column.spare))
    return kept


def _width(rows: Sequence[Any], columns: Sequence[Column[Any]]) -> int:
    mark = 1 + GAP
    widths = [max([len(column.head), *(len(column.show(row)) for row in rows)]) for column in columns]
    return mark + sum(width + GAP for width in widths)
