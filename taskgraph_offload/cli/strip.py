"""A timeline's last step as a strip of characters: one line for each lane, dark where it works.

compute  ████████░░██████████████████████
h2d      ██████████████████████···███████
         0                        990 ms
"""

from __future__ import annotations

from collections.abc import Iterator

from rich.text import Text

from ..nouns.budget import readable_seconds
from ..nouns.graph import LANES
from ..nouns.timeline import Interval, Timeline, clip, length, union

SHADES, ASCII_SHADES = "·░▒▓█", ".:+*#"
FULL = 0.97  # a cell that is busy for this share of its time looks full
NAMES = 12  # columns left of the strip
WIDEST = 100
STYLES = {"compute": "blue", "h2d": "green", "d2h": "magenta"}


def step_strip(timeline: Timeline, width: int, ascii_only: bool = False) -> list[Text]:
    """The lines of the strip of the last step, at most so many characters wide."""
    begin, end = timeline.window(timeline.cycles - 1)
    cells = max(10, min(WIDEST, width - NAMES - 1))
    shades = ASCII_SHADES if ascii_only else SHADES
    lines = []
    for lane in LANES:
        spans = union(clip(((span.start, span.stop) for span in timeline.lane(lane)), (begin, end)))
        if spans:
            bar = "".join(_shade(share, shades) for share in _shares(spans, begin, end, cells))
            lines.append(Text.assemble((lane.ljust(NAMES), "bold"), (bar, STYLES[lane])))
    scale = "0" + readable_seconds(end - begin).rjust(cells - 1)
    return [*lines, Text(" " * NAMES + scale, style="dim")]


def _shares(spans: list[Interval], begin: float, end: float, cells: int) -> Iterator[float]:
    """How much of each cell's time is covered."""
    size = (end - begin) / cells
    for cell in range(cells):
        start = begin + cell * size
        yield length(clip(spans, (start, start + size))) / size if size > 0 else 0.0


def _shade(share: float, shades: str) -> str:
    """The darker the busier; only a cell that is busy throughout is full, and only an idle one is empty.

    >>> "".join(_shade(share, SHADES) for share in (0, 0.01, 0.5, 0.9, 1))
    '·░▒▓█'
    """
    if share >= FULL:
        return shades[-1]
    return shades[0] if share <= 0 else shades[1 + min(2, int(share * 3))]
