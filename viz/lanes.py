"""Draws the lanes of one timeline: bars, waits, and the labels of the longest waits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from matplotlib.axes import Axes

from taskgraph_offload.nouns.graph import Lane
from taskgraph_offload.nouns.timeline import Span

from . import style
from .callouts import Callout, Ruler
from .panel import BAR, CALLOUT, LANE, LINE, NARROW, Panel

LANE_NAMES: Final[dict[Lane, str]] = {"compute": "compute", "h2d": "H2D", "d2h": "D2H"}


def draw_lanes(axes: Axes, panel: Panel) -> None:
    """The lanes, drawn in inches from the bottom so that labels can be placed by their size in print."""
    axes.set_ylim(0, panel.lanes_height)
    axes.spines["left"].set_visible(False)
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(axis="both", length=0, labelbottom=False)
    axes.set_yticks(
        [panel.lane_bottom(lane) + LANE * BAR / 2 for lane in panel.lanes],
        [LANE_NAMES[lane] for lane in panel.lanes],
        fontsize=style.TEXT_POINTS,
    )
    for lane in panel.lanes:
        _draw_bars(axes, panel, lane)
    _draw_stalls(axes, panel)


def _draw_bars(axes: Axes, panel: Panel, lane: Lane) -> None:
    spans, bottom = panel.timeline.lane(lane), panel.lane_bottom(lane)
    colours = [panel.colours.get(style.block_of(span.call), style.FAINT) for span in spans]
    bars = axes.broken_barh([(s.start, s.seconds) for s in spans], (bottom, LANE * BAR), facecolors=colours)
    outline = 0.5 if _are_wide(spans, panel.ruler) else 0.0
    bars.set(linewidth=outline, edgecolor="white", gid=f"timeline{panel.index}-{lane}")
    for span, colour, label in zip(spans, colours, _labels(spans, panel.ruler), strict=True):
        if label:
            x, y, text_colour = (span.start + span.stop) / 2, bottom + LANE * BAR / 2, style.text_colour(colour)
            axes.text(x, y, label, color=text_colour, ha="center", va="center_baseline", **style.PLAIN)


def _are_wide(spans: Sequence[Span], ruler: Ruler) -> bool:
    """Whether most are wide enough in print for an outline."""
    widths = sorted(span.seconds * ruler.points_per_second for span in spans)
    return bool(widths) and widths[len(widths) // 2] > NARROW


def _labels(spans: Sequence[Span], ruler: Ruler) -> list[str]:
    """What is written in each bar: its name, or the last part of it, whichever fits into most; or nothing at all."""
    full = [style.legible(span.name) for span in spans]
    for names in (full, [name.rsplit(".", 1)[-1] for name in full]):
        rooms = (span.seconds * ruler.points_per_second - 4 for span in spans)
        fits = [style.text_points(name, style.SMALL_POINTS) <= room for name, room in zip(names, rooms, strict=True)]
        if 2 * sum(fits) >= len(spans):
            return [name if fit else "" for name, fit in zip(names, fits, strict=True)]
    return [""] * len(spans)


def _draw_stalls(axes: Axes, panel: Panel) -> None:
    """Where compute waited: a pale field under a strong line; and over the longest waits, for what."""
    timeline, bottom = panel.timeline, panel.lane_bottom("compute")
    stalls = [stall for cycle in range(timeline.cycles) for stall in timeline.stalls(cycle)]
    ranges, top = [(stall.start, stall.seconds) for stall in stalls], bottom + LANE * BAR
    fields = axes.broken_barh(ranges, (bottom, LANE * BAR), facecolor=style.PALE_WAIT, linewidth=0)
    fields.set_gid(f"timeline{panel.index}-waits")
    axes.broken_barh(ranges, (top, LINE), facecolor=style.WAIT, linewidth=0)
    for callout in panel.callouts:
        _draw_callout(axes, panel, callout, top + LINE)


def _draw_callout(axes: Axes, panel: Panel, callout: Callout, foot: float) -> None:
    base = LANE * len(panel.lanes) + CALLOUT * callout.row
    seconds = panel.ruler.seconds(callout.stem)
    axes.plot([seconds, seconds], [foot, base + CALLOUT], color=style.WAIT, linewidth=0.7)
    axes.text(panel.ruler.seconds(callout.left), base + 0.05, callout.text, color=style.WAIT, **style.PLAIN)
