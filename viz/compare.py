"""Draws strategies side by side: where the time of a step goes, and how much memory it takes."""

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

from .page import (
    BLUE,
    FAINT,
    INK,
    PLAIN,
    SKY,
    SMALL_POINTS,
    TEXT_POINTS,
    TITLE_POINTS,
    WAIT,
    Page,
    bytes_unit,
    legible,
    save_figure,
    seconds_text,
    seconds_unit,
    text_points,
)

# The page, in inches:
#
#              step time                                            memory                       TITLE
#                       | bound 136 ms      step  / bound                | budget 1 GiB   peak   HEADS
#   layerwise  [compute    ][wait]        146 ms     1.07           [peak]             928 MiB   ROW each
#   resident   needs 3.04 GiB                                       [ - - - - -]
#              0    50   100   150                                  0     1     2                SCALE
#              [] compute   [] waits for copies                                                  LEGEND
#              predicted rates: ...     measured rates: ...                                      NOTE each
TIMES_WIDTH: Final = 5.2
MEMORY_WIDTH: Final = 2.6
COLUMN: Final = 0.85
BETWEEN: Final = 0.45
EDGE: Final = 0.25
TITLE: Final = 0.4
HEADS: Final = 0.28
ROW: Final = 0.36
SCALE: Final = 0.49
LEGEND: Final = 0.12
NOTE: Final = 0.17
BOTTOM: Final = 0.14
BAR: Final = 0.62  # a bar's share of its row
SPARE: Final = 0.04  # free space behind the longest bar, as a share of it
SOLID: Final[dict[str, Any]] = {"color": SKY}
EMPTY: Final[dict[str, Any]] = {
    "facecolor": "none",
    "edgecolor": FAINT,
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
    rows, notes = comparison.rows, comparison.notes()
    if not rows:
        raise SettingsError("no strategy to draw: the comparison has no rows")
    names = [legible(row["strategy"]) for row in rows]
    left = EDGE + 0.15 + max(text_points(name, TEXT_POINTS) for name in names) / 72
    columns = _columns(rows, comparison.cycle)
    middle = left + TIMES_WIDTH + COLUMN * len(columns) + BETWEEN
    foot, height = BOTTOM + NOTE * len(notes) + LEGEND + SCALE, HEADS + ROW * len(rows)
    page = Page(middle + MEMORY_WIDTH + COLUMN + EDGE, TITLE + height + foot)
    times = page.axes(left, foot, TIMES_WIDTH, height)
    memory = page.axes(middle, foot, MEMORY_WIDTH, height)
    for axes in (times, memory):
        axes.set_ylim(len(rows) - 0.5, -0.5 - HEADS / ROW)
        axes.set_yticks([])
    _draw_times(times, rows)
    _draw_memory(memory, rows)
    times.set_yticks(range(len(rows)), names, fontsize=TEXT_POINTS, parse_math=False)
    for index, (head, cells) in enumerate(columns.items(), 1):
        _write_column(page, left + TIMES_WIDTH + COLUMN * index, head, cells)
    _write_column(page, page.width - EDGE, "peak", [_peak(row) for row in rows])
    page.write(left, page.height - 0.28, f"{comparison.cycle} time", size=TITLE_POINTS, weight="bold")
    page.write(middle, page.height - 0.28, "memory", size=TITLE_POINTS, weight="bold")
    _draw_legend(page, left, foot - SCALE - LEGEND, "measured" in columns)
    for index, note in enumerate(notes, 1):
        page.write(left, foot - SCALE - LEGEND - NOTE * index, note)
    return page.figure


def _columns(rows: Sequence[Row], cycle: str) -> dict[str, list[str]]:
    """The columns of text beside the times. `/ bound` is of the measured step where there is one."""
    show = seconds_text(max(map(_longest, rows)))
    predicted, measured = ([show(row[key]) for row in rows] for key in ("step_seconds", "measured_step_seconds"))
    steps = {"predicted": predicted, "measured": measured} if any(measured) else {cycle: predicted}
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
        page.write(right, top - ROW * (place + 0.5) - 0.035, cell, size=TEXT_POINTS, align="right")


def _draw_legend(page: Page, left: float, line: float, has_measured: bool) -> None:
    x = left
    for colour, meaning in ((BLUE, "compute"), (WAIT, "waits for copies")):
        page.fill(x, line - 0.01, 0.3, 0.11, colour)
        x += 0.66 + page.write(x + 0.36, line, meaning)
    if has_measured:
        page.write(x, line, "\N{BLACK DIAMOND}  measured")


def _draw_times(axes: Axes, rows: Sequence[Row]) -> None:
    longest = max(map(_longest, rows)) or 1.0
    divisor, unit = seconds_unit(longest)
    for place, row in enumerate(rows):
        if row["step_seconds"] is None:
            _draw_needs(axes, place, row)
            continue
        compute, wait = row["compute_seconds"] / divisor, row["stall_seconds"] / divisor
        axes.barh(place, compute, BAR, color=BLUE)
        axes.barh(place, wait, BAR, left=compute, color=WAIT)
        if row["measured_step_seconds"] is not None:
            measured = row["measured_step_seconds"] / divisor
            axes.plot(measured, place, "D", color=INK, markersize=6, markeredgecolor="white")
    _scale(axes, longest / divisor, unit)
    bound = max(row["bound_seconds"] for row in rows)
    if 0 < bound <= longest * (1 + SPARE):
        _mark(axes, bound / divisor, f"bound {readable_seconds(bound)}")


def _draw_needs(axes: Axes, place: int, row: Row) -> None:
    """In place of a bar: the budget that a strategy would need."""
    needs = f"needs {readable(row['smallest_bytes'])}" if row["smallest_bytes"] else "does not work here"
    shift: dict[str, Any] = {"xytext": (4, 0), "textcoords": "offset points", "va": "center"}
    axes.annotate(needs, (0, place), color=FAINT, **shift, **PLAIN)


def _longest(row: Row) -> float:
    return max(row["step_seconds"] or 0.0, row["measured_step_seconds"] or 0.0)


def _draw_memory(axes: Axes, rows: Sequence[Row]) -> None:
    """Draw peaks as bars. A strategy that does not fit has an empty bar: the smallest budget it needs."""
    budget = max(row["budget_bytes"] for row in rows)
    sizes = [row["peak_bytes"] or row["smallest_bytes"] or 0 for row in rows]
    divisor, unit = bytes_unit(max(budget, *sizes))
    for place, (row, nbytes) in enumerate(zip(rows, sizes, strict=True)):
        look = EMPTY if row["peak_bytes"] is None else SOLID
        axes.barh(place, nbytes / divisor, BAR, **look)
    _scale(axes, max(budget, *sizes) / divisor, unit)
    _mark(axes, budget / divisor, f"budget {readable(budget)}")


def _mark(axes: Axes, x: float, text: str) -> None:
    """Draw a line across all rows, and write its name above them, on the side with more room."""
    axes.axvline(x, color=INK, linewidth=0.9, linestyle=(0, (5, 2)))
    side = "left" if x < 0.6 * axes.get_xlim()[1] else "right"
    place, shift = (x, axes.get_ylim()[1]), (3 if side == "left" else -3, -9)
    axes.annotate(text, place, xytext=shift, textcoords="offset points", ha=side, color=INK, **PLAIN)


def _scale(axes: Axes, longest: float, unit: str) -> None:
    axes.set_xlim(0, (1 + SPARE) * longest)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axes.set_xlabel(unit, fontsize=SMALL_POINTS, color=INK, loc="right")
