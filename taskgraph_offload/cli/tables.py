"""Tables that fit the terminal: without room, columns are left out and words are shortened; figures stay whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.text import Text

from ..nouns.names import printable

Row = TypeVar("Row")

GAP = 2  # characters between columns
ENOUGH = 30  # characters of words: what is longer is shortened before a column is left out
LEAST = 5  # characters of words that are always shown
ABSENT = "-"


@dataclass(frozen=True)
class Column(Generic[Row]):
    """A head, and the text that it shows for a row.

    Columns with the largest `spare` are left out first, those with 0 never. Figures are aligned to the right. Columns
    of `words` are aligned to the left, and may be shortened.
    """

    head: str
    show: Callable[[Row], str]
    spare: int = 0
    words: bool = False


@dataclass(frozen=True)
class Cells:
    """A column with all its texts, the head first. Widths count characters of the terminal."""

    texts: Sequence[str]
    spare: int
    words: bool

    @property
    def width(self) -> int:
        """The width of the widest text."""
        return max(map(cell_len, self.texts))

    @property
    def least(self) -> int:
        """The least width for which the column is kept."""
        return min(self.width, ENOUGH) if self.words else self.width


def print_table(
    console: Console,
    rows: Sequence[Row],
    columns: Sequence[Column[Row]],
    marked: Callable[[Row], bool] = lambda row: False,
    faint: Callable[[Row], bool] = lambda row: False,
) -> None:
    """Print a table with a mark before some rows, and with as many columns as fit.

    If even the columns that must stay do not fit, the terminal breaks the lines.
    """
    mark, line, dots = (">", "-", "...") if console.options.ascii_only else ("▸", "─", "…")
    kept = fitting([_filled(column, rows) for column in columns], console.width - 1 - GAP)
    widths = shared(kept, console.width - 1 - GAP)
    heads, *lines = (
        [_cell(cells.texts[place], width, cells.words, dots) for cells, width in zip(kept, widths, strict=True)]
        for place in range(1 + len(rows))
    )
    table = [_line(" ", heads, "bold"), Text(line * (1 + sum(GAP + width for width in widths)))]
    for row, texts in zip(rows, lines, strict=True):
        style = "bold green" if marked(row) else "dim" if faint(row) else ""
        table.append(_line(mark if marked(row) else " ", texts, style))
    console.print(Text("\n").join(table), soft_wrap=True)
    if left_out := [column.head for column in columns if column.head not in {cells.texts[0] for cells in kept}]:
        console.print(f"no room for: {printable(', '.join(left_out))}; --json has all", style="dim")


def fitting(columns: Sequence[Cells], room: int) -> list[Cells]:
    """The columns that fit beside each other; the most important ones are taken first."""
    kept = list[Cells]()
    for column in sorted(columns, key=lambda column: column.spare):
        if not column.spare or sum(GAP + other.least for other in (*kept, column)) - GAP <= room:
            kept.append(column)
    return [column for column in columns if column in kept]


def shared(columns: Sequence[Cells], room: int) -> list[int]:
    """The width of each column. Figures get what they need; the columns of words share the rest, from left to right.

    >>> shared([Cells(["w" * 40], 0, words=True), Cells(["12 ms"], 0, words=False)], 40)
    [33, 5]
    """
    left = room + GAP - sum(GAP + column.least for column in columns)
    widths = []
    for column in columns:
        least = min(column.width, LEAST) if column.words else column.width
        widths.append(max(least, min(column.width, column.least + left)))
        left -= widths[-1] - column.least
    return widths


def shortened(text: str, width: int, dots: str = "…") -> str:
    """A text, cut in its middle if it is too long: names of blocks differ at their ends.

    >>> shortened("transformer_blocks.10", 12), shortened("blocks.3", 12)
    ('trans…cks.10', 'blocks.3')
    """
    if cell_len(text) <= width:
        return text
    tail = (width - len(dots) + 1) // 2
    return set_cell_size(text, width - len(dots) - tail) + dots + set_cell_size(text[::-1], tail)[::-1]


def _filled(column: Column[Row], rows: Sequence[Row]) -> Cells:
    return Cells([column.head, *(printable(column.show(row)) for row in rows)], column.spare, column.words)


def _cell(text: str, width: int, words: bool, dots: str) -> str:
    """A text as wide as its column."""
    return set_cell_size(shortened(text, width, dots), width) if words else " " * (width - cell_len(text)) + text


def _line(mark: str, texts: Sequence[str], style: str) -> Text:
    return Text((" " * GAP).join([mark, *texts]).rstrip(), style)
