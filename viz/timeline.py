"""Draws timelines: what ran when in each lane, where compute waited and for which copy, and the memory below."""

from __future__ import annotations

import os
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from taskgraph_offload.nouns.budget import readable, readable_seconds
from taskgraph_offload.nouns.timeline import Timeline

from . import style
from .lanes import draw_lanes
from .output import save_figure
from .page import Page
from .panel import (
    CYCLE_NAMES,
    FOOT,
    FOOT_LINE,
    GAP,
    HEADER,
    LANE,
    LEFT,
    LINE,
    MEMORY,
    RIGHT,
    TITLE,
    WIDTH,
    Panel,
    arrange,
)


def save_timeline(path: str | os.PathLike[str], *timelines: Timeline) -> None:
    """Draw timelines below each other on one time axis; PNG or SVG, by the suffix.

    >>> import tempfile, taskgraph_offload as tgo
    >>> trace = tgo.Trace.from_units([{"name": n, "seconds": 1e-3, "tensors": [2**20]} for n in "abcd"])
    >>> plan = tgo.Planner.for_trace(trace, "2MiB", strategy="layerwise", machine="cpu").plan()
    >>> save_timeline(f"{tempfile.mkdtemp()}/timeline.svg", plan.predict())
    """
    save_figure(draw_timelines(timelines), path)


def draw_timelines(timelines: Sequence[Timeline]) -> Figure:
    """The figure of some timelines."""
    panels = arrange(timelines)
    page = Page(WIDTH, TITLE + sum(panel.height for panel in panels) + FOOT)
    titles = dict.fromkeys(timeline.title for timeline in timelines)
    page.write(LEFT, page.height - 0.28, " / ".join(titles), size=style.TITLE_POINTS, weight="bold")
    top = page.height - TITLE
    for panel in panels:
        _draw_panel(page, panel, top, is_last=panel is panels[-1])
        top -= panel.height
    _draw_legend(page, panels[0].colours)
    return page.figure


def _draw_panel(page: Page, panel: Panel, top: float, is_last: bool) -> None:
    line, width = top - HEADER + 0.1, WIDTH - LEFT - RIGHT
    source = page.write(LEFT, line, panel.timeline.source, size=style.TEXT_POINTS, weight="bold")
    page.write(LEFT + source + 0.15, line, panel.header, size=style.TEXT_POINTS)
    lanes = page.axes(LEFT, top - HEADER - panel.lanes_height, width, panel.lanes_height)
    memory = page.axes(LEFT, top - panel.height + GAP, width, MEMORY)
    for axes in (lanes, memory):
        axes.set_xlim(panel.ruler.begin, panel.ruler.end)
    draw_lanes(lanes, panel)
    _draw_memory(memory, panel.timeline)
    _draw_cycles(lanes, memory, panel)
    unit = _count_time(memory, panel.ruler.end - panel.ruler.begin)
    memory.tick_params(axis="x", labelbottom=is_last)
    if is_last:
        page.write(LEFT, FOOT_LINE, f"time in {unit}", size=style.TEXT_POINTS)


def _draw_memory(axes: Axes, timeline: Timeline) -> None:
    """The bytes on the device, each value until the next one, below the line of the budget."""
    highest = max(timeline.budget_bytes, timeline.peak_bytes, 1)
    divisor, unit = style.bytes_unit(highest)
    if timeline.memory:
        moments = [*(point.seconds for point in timeline.memory), max(timeline.ends)]
        values = [point.nbytes / divisor for point in (*timeline.memory, timeline.memory[-1])]
        axes.fill_between(moments, values, step="post", color=style.PALE_BLUE, linewidth=0)
        axes.step(moments, values, where="post", color=style.BLUE, linewidth=0.9)
    axes.set_ylim(0, 1.32 * highest / divisor)
    axes.yaxis.set_major_locator(MaxNLocator(3))
    axes.set_ylabel(unit, fontsize=style.TEXT_POINTS, color=style.INK)
    _draw_budget(axes, timeline.budget_bytes, divisor)


def _draw_budget(axes: Axes, budget_bytes: int, divisor: int) -> None:
    axes.axhline(budget_bytes / divisor, color=style.INK, linewidth=0.9, linestyle=(0, (5, 2)))
    axes.annotate(
        f"budget {readable(budget_bytes)}",
        (0, budget_bytes / divisor),
        xycoords=("axes fraction", "data"),
        xytext=(4, 2),
        textcoords="offset points",
        fontsize=style.SMALL_POINTS,
        color=style.INK,
    )


def _draw_cycles(lanes: Axes, memory: Axes, panel: Panel) -> None:
    """Where each cycle ends, and its name: through the bars and the names, but not through the labels between."""
    timeline, top = panel.timeline, panel.lanes_height
    heights = ((lanes, 0.0, LANE * len(panel.lanes)), (lanes, top - CYCLE_NAMES, top), (memory, *memory.get_ylim()))
    for axes, low, high in heights:
        axes.vlines(timeline.ends, low, high, colors=style.INK, linewidth=0.6, linestyle=(0, (2, 2)))
    for cycle in range(timeline.cycles):
        begin, end = timeline.window(cycle)
        label = _cycle_name(timeline, cycle, (end - begin) * panel.ruler.points_per_second - 6)
        lanes.text(
            (begin + end) / 2, top - 0.03, label, ha="center", va="top", fontsize=style.TEXT_POINTS, color=style.INK
        )


def _cycle_name(timeline: Timeline, cycle: int, room: float) -> str:
    """The name and the length of a cycle, or its name, or nothing: what there is room for."""
    begin, end = timeline.window(cycle)
    number = cycle if timeline.starts_cold else cycle + 1
    name = f"step {number}" if number else "cold step"
    labels = (f"{name}   {readable_seconds(end - begin)}", name)
    return next((label for label in labels if style.text_points(label, style.TEXT_POINTS) <= room), "")


def _count_time(axes: Axes, seconds: float) -> str:
    """Number the time axis in the unit that suits it; gives the unit."""
    divisor, unit = style.seconds_unit(seconds)
    axes.xaxis.set_major_locator(MaxNLocator(12, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / divisor:.10g}"))
    return unit


def _draw_legend(page: Page, colours: dict[str, str]) -> None:
    """At the foot, from the right: the colours from the first block to the last, and what a wait looks like."""
    first, last, height = next(iter(colours)), next(reversed(colours)), 0.11
    x, strip = WIDTH - RIGHT, min(1.2, 0.2 * len(colours))
    x -= page.write(x, FOOT_LINE, last, align="right") + 0.06
    for index, colour in enumerate(reversed(colours.values()), 1):
        page.fill(x - index * strip / len(colours), FOOT_LINE - 0.01, strip / len(colours), height, colour)
    x -= strip + 0.06
    if first != last:
        x -= page.write(x, FOOT_LINE, first, align="right")
    x -= 0.35
    x -= page.write(x, FOOT_LINE, "compute waits", align="right") + 0.06
    page.fill(x - 0.3, FOOT_LINE - 0.01, 0.3, height, style.PALE_WAIT)
    page.fill(x - 0.3, FOOT_LINE - 0.01 + height, 0.3, LINE, style.WAIT)
