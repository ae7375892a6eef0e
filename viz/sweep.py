"""Draws the step time of strategies against the budget, so that one sees how much memory is worth having."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Final

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from taskgraph_offload.errors import SettingsError
from taskgraph_offload.nouns.budget import readable, readable_seconds
from taskgraph_offload.nouns.reports import Row, Sweep

from .page import (
    FAINT,
    GRID,
    INK,
    PLAIN,
    TEXT_POINTS,
    TITLE_POINTS,
    Page,
    bytes_unit,
    curve_colours,
    legible,
    save_figure,
    seconds_unit,
)

# In inches: the curves at the left; right of them the legend, which says where each knee is.
WIDTH: Final = 11.0
HEIGHT: Final = 5.2  # or more, where the legend is longer
ENTRY: Final = 0.4  # of the legend, for each curve
LEFT: Final = 0.75
RIGHT: Final = 3.1
TOP: Final = 0.5
BOTTOM: Final = 0.6
MARKERS: Final = ("o", "s", "^", "D", "v", "P", "X", "h")


def save_sweep(path: str | os.PathLike[str], sweep: Sweep) -> None:
    """Draw a curve for each strategy above the bound, with the knees marked; PNG or SVG, by the suffix.

    >>> import tempfile, taskgraph_offload as tgo
    >>> trace = tgo.Trace.from_units([{"name": n, "seconds": 1e-3, "tensors": [2**20]} for n in "abcd"])
    >>> planner = tgo.Planner.for_trace(trace, "3MiB", strategy="keep", machine="cpu")
    >>> save_sweep(f"{tempfile.mkdtemp()}/sweep.svg", planner.sweep(["2MiB", "3MiB", "4MiB"]))
    """
    save_figure(draw_sweep(sweep), path)


def draw_sweep(sweep: Sweep) -> Figure:
    """The figure of a sweep."""
    steps = [row["step_seconds"] for row in sweep.rows if row["step_seconds"] is not None]
    if not steps:
        raise SettingsError("nothing to draw: no strategy fits into any budget of the sweep")
    units = Units.of(max(steps), max(row["budget_bytes"] for row in sweep.rows))
    height = max(HEIGHT, TOP + ENTRY * (len(sweep.strategies) + 1) + BOTTOM)
    page = Page(WIDTH, height)
    axes = page.axes(LEFT, BOTTOM, WIDTH - LEFT - RIGHT, height - TOP - BOTTOM)
    axes.set_ylim(0, 1.08 * max(steps) / units.seconds)
    axes.set_xlim(0, 1.04 * max(row["budget_bytes"] for row in sweep.rows) / units.nbytes)
    axes.grid(color=GRID, linewidth=0.5)
    axes.set_xlabel(f"budget in {units.of_bytes}", fontsize=TEXT_POINTS, color=INK)
    axes.set_ylabel(f"{sweep.cycle} in {units.of_seconds}", fontsize=TEXT_POINTS, color=INK)
    _draw_bound(axes, sweep, units)
    colours = curve_colours(len(sweep.strategies))
    for index, (strategy, colour) in enumerate(zip(sweep.strategies, colours, strict=True)):
        line = _draw_curve(axes, sweep, strategy, units, colour)
        line.set(marker=MARKERS[index % len(MARKERS)], gid=f"curve{index}")
    _draw_legend(axes)
    page.write(LEFT, height - 0.28, f"{sweep.cycle} time against memory", size=TITLE_POINTS, weight="bold")
    return page.figure


@dataclass(frozen=True, slots=True)
class Units:
    """The units of both axes: divisors and names."""

    seconds: float
    of_seconds: str
    nbytes: int
    of_bytes: str

    @staticmethod
    def of(seconds: float, nbytes: int) -> Units:
        """The units that suit the largest values."""
        return Units(*seconds_unit(seconds), *bytes_unit(nbytes))

    def place(self, row: Row, key: str = "step_seconds") -> tuple[float, float]:
        """The position of a row on the axes."""
        return row["budget_bytes"] / self.nbytes, row[key] / self.seconds


def _draw_bound(axes: Axes, sweep: Sweep, units: Units) -> None:
    """Draw the bound as the edge of a grey field. Between two budgets it is the bound of the larger: never too high."""
    known = {units.place(row, "bound_seconds") for row in sweep.rows if math.isfinite(row["bound_seconds"])}
    budgets, bounds = zip(*sorted(known), strict=True) if known else ((), ())
    axes.fill_between(budgets, bounds, color=GRID, linewidth=0, step="pre")
    axes.plot(budgets, bounds, color=FAINT, linewidth=1.2, linestyle=(0, (5, 2)), gid="bound", drawstyle="steps-pre")
    if known:
        middle, low = (budgets[0] + budgets[-1]) / 2, 0.03 * axes.get_ylim()[1]
        axes.text(middle, low, "below the bound: no schedule", ha="center", color=INK, **PLAIN)


def _draw_curve(axes: Axes, sweep: Sweep, strategy: str, units: Units, colour: str) -> Line2D:
    """Draw a strategy at the budgets that it fits into, and a ring around its knee."""
    rows = [row for row in sweep.rows if row["strategy"] == strategy and row["step_seconds"] is not None]
    budgets, steps = zip(*sorted(map(units.place, rows)), strict=True) if rows else ((), ())
    (line,) = axes.plot(budgets, steps, color=colour, markersize=4.5, linewidth=1.5, label=_entry(sweep, strategy))
    knee = sweep.knee(strategy)
    if knee is not None:
        axes.plot(*units.place(knee), "o", color=colour, markersize=12, fillstyle="none", markeredgewidth=1.4)
    return line


def _entry(sweep: Sweep, strategy: str) -> str:
    """A strategy in the legend: its name, its step at the knee, and the budget there."""
    name, knee = legible(strategy), sweep.knee(strategy)
    if knee is None:
        return f"{name}\nfits into none of these budgets"
    return f"{name}\n{readable_seconds(knee['step_seconds'])} from {readable(knee['budget_bytes'])} on"


def _draw_legend(axes: Axes) -> None:
    """Put the legend right of the curves, and explain the ring last."""
    axes.plot([], [], "o", color=INK, markersize=12, fillstyle="none", label="knee: within 5% of the fastest")
    legend = axes.legend(loc="upper left", bbox_to_anchor=(1.02, 1.02), frameon=False, labelspacing=0.9)
    for text in legend.get_texts():
        text.set(fontsize=TEXT_POINTS, color=INK, parse_math=False)
