"""Draws strategies side by side: where the step goes and what memory it takes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Final

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from taskgraph_offload.errors import SettingsError
from taskgraph_offload.nouns.budget import readable, readable_seconds
from taskgraph_offload.nouns.reports import Comparison, Row

from . import style
from .output import save_figure
from .page import Page

# The page, in inches:
#
#              step time                                            memory                       TITLE
#                       | bound 136 ms      step  / bound                | budget 1 GiB   peak   HEADS
#   layerwise  [compute    ][wait]        146 ms     1.07           [peak]             928 MiB   ROW each
#   resident   needs 3.04 GiB                                       [ - - - - -]
#              0    50   100   150                                  0     1     2                FOOT
TIMES_WIDTH: Final = 5.2
MEMORY_WIDTH: Final = 2.6
COLUMN: Final = 0.85
BETWEEN: Final = 0.45
EDGE: Final = 0.25
TITLE: Final = 0.4
HEADS: Final = 0.28
ROW: Final = 0.36
FOOT: Final = 0.75
FOOT_LINE: Final = 0.14
BAR: Final = 0.62  # of a row
SPARE: Final = 0.04  # of the longest bar, left free behind it
SOLID: Final[dict[str, Any]] = {"color": style.SKY}
EMPTY: Final[dict[str, Any]] = {
    "facecolor": "none",
    "edgecolor": style.FAINT,
    "linestyle": (0, (3, 2)),
    "linewidth": 0.9,
}


def save_comparison(path: str | os.PathLike[str], comparison: Comparison) -> None:
    """Draw the step of each strategy, split into compute and waits, beside its memory; PNG or SVG, by the suffix.

    >>> import tempfile, taskgraph_offload as tgo
    >>> trace = tgo.Trace.from_units([{"name": n, "seconds": 1e-3, "tensors": [2**20]} for n in "abcd"])
    >>> planner = tgo.Planner.for_trace(trace, "3MiB", strategy="keep", machine="cpu")
    >>> save_comparison(f"{tempfile.mkdtemp()}/comparison.svg", planner.compare(["keep", "layerwise", "resident"]))
    """
    save_figure(draw_comparison(comparison), path)


def draw_comparison(comparison: Comparison) -> Figure:
    """The figure of a comparison."""
    rows = comparison.rows
    if not rows:
        raise SettingsError("no strategy to draw: the comparison has no rows")
    names = [style.legible(row["strategy"]) for row in rows]
    left = EDGE + 0.15 + max(style.text_points(name, style.TEXT_POINTS) for name in names) / 72
    columns = _columns(rows)
    middle = left + TIMES_WIDTH + COLUMN * len(columns) + BETWEEN
    page = Page(middle + MEMORY_WIDTH + COLUMN + EDGE, TITLE + HEADS + ROW * len(rows) + FOOT)
    times = page.axes(left, FOOT, TIMES_WIDTH, HEADS + ROW * len(rows))
    memory = page.axes(middle, FOOT, MEMORY_WIDTH, HEADS + ROW * len(rows))
    for axes in (times, memory):
        axes.set_ylim(len(rows) - 0.5, -0.5 - HEADS / ROW)
        axes.set_yticks([])
    _draw_times(times, rows)
    _draw_memory(memory, rows)
    times.set_yticks(range(len(rows)), names, fontsize=style.TEXT_POINTS, parse_math=False)
    for index, (head, cells) in enumerate(columns.items(), 1):
        _write_column(page, left + TIMES_WIDTH + COLUMN * index, head, cells)
    _write_column(page, page.width - EDGE, "peak", [_peak(row) for row in rows])
    page.write(left, page.height - 0.28, "step time", size=style.TITLE_POINTS, weight="bold")
    page.write(middle, page.height - 0.28, "memory", size=style.TITLE_POINTS, weight="bold")
    _draw_legend(page, left, "measured" in columns)
    return page.figure


def _columns(rows: Sequence[Row]) -> dict[str, list[str]]:
    """What is written beside the bars of times; the ratio is that of the column before it."""
    show = style.seconds_text(max(map(_longest, rows)))
    predicted, measured = ([show(row[key]) for row in rows] for key in ("step_seconds", "measured_step_seconds"))
    steps = {"predicted": predicted, "measured": measured} if any(measured) else {"step": predicted}
    return {**steps, "/ bound": [_to_bound(row) for row in rows]}


def _to_bound(row: Row) -> str:
    step = row["measured_step_seconds"] or row["step_seconds"]
    return f"{step / row['bound_seconds']:.2f}" if step and row["bound_seconds"] else ""


def _peak(row: Row) -> str:
    return readable(row["peak_bytes"]) if row["peak_bytes"] is not None else ""


def _write_column(page: Page, right: float, head: str, cells: Sequence[str]) -> None:
    top = page.height - TITLE - HEADS
    page.write(right, top + 0.08, head, weight="bold", align="right")
    for place, cell in enumerate(cells):
        page.write(right, top - ROW * (place + 0.5) - 0.035, cell, size=style.TEXT_POINTS, align="right")


def _draw_legend(page: Page, left: float, has_measured: bool) -> None:
    x = left
    for colour, meaning in ((style.BLUE, "compute"), (style.WAIT, "waits for copies")):
        page.fill(x, FOOT_LINE - 0.01, 0.3, 0.11, colour)
        x += 0.66 + page.write(x + 0.36, FOOT_LINE, meaning)
    if has_measured:
        page.write(x, FOOT_LINE, "\N{BLACK DIAMOND}  measured")


def _draw_times(axes: Axes, rows: Sequence[Row]) -> None:
    longest = max(map(_longest, rows)) or 1.0
    divisor, unit = style.seconds_unit(longest)
    for place, row in enumerate(rows):
        if row["step_seconds"] is None:
            needs = f"needs {readable(row['smallest_bytes'])}" if row["smallest_bytes"] else "does not work here"
            axes.annotate(
                needs,
                (0, place),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                color=style.FAINT,
                **style.PLAIN,
            )
            continue
        compute, wait = row["compute_seconds"] / divisor, row["stall_seconds"] / divisor
        axes.barh(place, compute, BAR, color=style.BLUE)
        axes.barh(place, wait, BAR, left=compute, color=style.WAIT)
        if row["measured_step_seconds"] is not None:
            measured = row["measured_step_seconds"] / divisor
            axes.plot(measured, place, "D", color=style.INK, markersize=6, markeredgecolor="white")
    _scale(axes, longest / divisor, unit)
    bound = max(row["bound_seconds"] for row in rows)
    if 0 < bound <= longest * (1 + SPARE):
        _mark(axes, bound / divisor, f"bound {readable_seconds(bound)}")


def _longest(row: Row) -> float:
    return max(row["step_seconds"] or 0.0, row["measured_step_seconds"] or 0.0)


def _draw_memory(axes: Axes, rows: Sequence[Row]) -> None:
    """Peaks as bars; for what does not fit, the smallest budget as an empty one."""
    budget = max(row["budget_bytes"] for row in rows)
    sizes = [row["peak_bytes"] or row["smallest_bytes"] or 0 for row in rows]
    divisor, unit = style.bytes_unit(max(budget, *sizes))
    for place, (row, nbytes) in enumerate(zip(rows, sizes, strict=True)):
        look = EMPTY if row["peak_bytes"] is None else SOLID
        axes.barh(place, nbytes / divisor, BAR, **look)
    _scale(axes, max(budget, *sizes) / divisor, unit)
    _mark(axes, budget / divisor, f"budget {readable(budget)}")


def _mark(axes: Axes, x: float, text: str) -> None:
    """A line across all rows, its name above them on the side where there is room."""
    axes.axvline(x, color=style.INK, linewidth=0.9, linestyle=(0, (5, 2)))
    side = "left" if x < 0.6 * axes.get_xlim()[1] else "right"
    place, shift = (x, axes.get_ylim()[1]), (3 if side == "left" else -3, -9)
    axes.annotate(text, place, xytext=shift, textcoords="offset points", ha=side, color=style.INK, **style.PLAIN)


def _scale(axes: Axes, longest: float, unit: str) -> None:
    axes.set_xlim(0, (1 + SPARE) * longest)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axes.set_xlabel(unit, fontsize=style.SMALL_POINTS, color=style.INK, loc="right")
