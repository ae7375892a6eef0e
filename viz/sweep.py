"""Draws the step time against the budget: how much memory is worth having."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Final

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from taskgraph_offload.errors import SettingsError
from taskgraph_offload.nouns.budget import readable, readable_seconds
from taskgraph_offload.nouns.reports import Row, Sweep

from . import style
from .output import save_figure
from .page import Page

# In inches: the curves, and right of them what each one is and where its knee lies.
WIDTH: Final = 11.0
HEIGHT: Final = 5.2
LEFT: Final = 0.75
RIGHT: Final = 3.1
TOP: Final = 0.5
BOTTOM: Final = 0.6


def save_sweep(path: str | os.PathLike[str], sweep: Sweep) -> None:
    """Draw a curve for each strategy, the bound beneath, the knees marked; PNG or SVG, by the suffix.

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
    page = Page(WIDTH, HEIGHT)
    axes = page.axes(LEFT, BOTTOM, WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM)
    axes.set_ylim(0, 1.08 * max(steps) / units.seconds)
    axes.set_xlim(0, 1.04 * max(row["budget_bytes"] for row in sweep.rows) / units.nbytes)
    axes.grid(color=style.GRID, linewidth=0.5)
    axes.set_xlabel(f"budget in {units.of_bytes}", fontsize=style.TEXT_POINTS, color=style.INK)
    axes.set_ylabel(f"step in {units.of_seconds}", fontsize=style.TEXT_POINTS, color=style.INK)
    _draw_bound(axes, sweep, units)
    for index, strategy in enumerate(sweep.strategies):
        _draw_curve(axes, sweep, strategy, index, units)
    _draw_legend(axes)
    page.write(LEFT, HEIGHT - 0.28, "step time against memory", size=style.TITLE_POINTS, weight="bold")
    return page.figure


@dataclass(frozen=True, slots=True)
class Units:
    """What the axes count in: divisors and their names."""

    seconds: float
    of_seconds: str
    nbytes: int
    of_bytes: str

    @staticmethod
    def of(seconds: float, nbytes: int) -> Units:
        """The units that suit the largest values."""
        return Units(*style.seconds_unit(seconds), *style.bytes_unit(nbytes))

    def place(self, row: Row, key: str = "step_seconds") -> tuple[float, float]:
        """Where a row lies on the axes."""
        return row["budget_bytes"] / self.nbytes, row[key] / self.seconds


def _draw_bound(axes: Axes, sweep: Sweep, units: Units) -> None:
    """A field that no schedule enters. Between two budgets the bound is at least what it is at the larger one."""
    known = {units.place(row, "bound_seconds") for row in sweep.rows if math.isfinite(row["bound_seconds"])}
    budgets, bounds = zip(*sorted(known), strict=True) if known else ((), ())
    axes.fill_between(budgets, bounds, color=style.GRID, linewidth=0, step="pre")
    axes.plot(
        budgets, bounds, color=style.FAINT, linewidth=1.2, linestyle=(0, (5, 2)), gid="bound", drawstyle="steps-pre"
    )
    if known:
        middle, low = (budgets[0] + budgets[-1]) / 2, 0.03 * axes.get_ylim()[1]
        axes.text(middle, low, "below the bound: no schedule", ha="center", color=style.INK, **style.PLAIN)


def _draw_curve(axes: Axes, sweep: Sweep, strategy: str, index: int, units: Units) -> None:
    """Where a strategy works, and a ring around its knee."""
    rows = [row for row in sweep.rows if row["strategy"] == strategy and row["step_seconds"] is not None]
    places = sorted(map(units.place, rows))
    colour, marker = style.CURVES[index % len(style.CURVES)], style.MARKERS[index % len(style.MARKERS)]
    line = axes.plot(*zip(*places, strict=True), marker=marker) if places else axes.plot([], [], marker=marker)
    line[0].set(color=colour, markersize=4.5, linewidth=1.5, label=_entry(sweep, strategy), gid=f"curve{index}")
    knee = sweep.knee(strategy)
    if knee is not None:
        axes.plot(*units.place(knee), "o", color=colour, markersize=12, fillstyle="none", markeredgewidth=1.4)


def _entry(sweep: Sweep, strategy: str) -> str:
    """What the legend says of a strategy: how much memory it can use, and how fast it is then."""
    name, knee = style.legible(strategy), sweep.knee(strategy)
    if knee is None:
        return f"{name}\nfits into none of these budgets"
    return f"{name}\n{readable_seconds(knee['step_seconds'])} from {readable(knee['budget_bytes'])} on"


def _draw_legend(axes: Axes) -> None:
    """Right of the curves; the ring is explained last."""
    axes.plot([], [], "o", color=style.INK, markersize=12, fillstyle="none", label="knee: within 5% of the fastest")
    legend = axes.legend(loc="upper left", bbox_to_anchor=(1.02, 1.02), frameon=False, labelspacing=0.9)
    for text in legend.get_texts():
        text.set(fontsize=style.TEXT_POINTS, color=style.INK, parse_math=False)
