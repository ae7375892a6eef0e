"""Draws timelines: what ran when in each lane, where compute waited and for which copy, and the memory below.

First `arrange` decides what is shown and where; then the rest draws it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from taskgraph_offload.errors import SettingsError
from taskgraph_offload.nouns.budget import readable, readable_seconds
from taskgraph_offload.nouns.graph import LANES, Lane
from taskgraph_offload.nouns.timeline import Span, Timeline

from .callouts import Callout, Ruler, callouts
from .fold import Phase, folded
from .page import (
    BLUE,
    FAINT,
    INK,
    PALE_BLUE,
    PALE_WAIT,
    PLAIN,
    SMALL_POINTS,
    TEXT_POINTS,
    TIMES,
    TITLE_POINTS,
    WAIT,
    Page,
    block_colours,
    block_of,
    bytes_unit,
    legible,
    save_figure,
    seconds_unit,
    text_colour,
    text_points,
)

SHOWN_CYCLES: Final = 3  # the cold one and two steady ones: the others look like the last of these

# The page, in inches:
#
#   strategy                                                    TITLE
#   rates   predicted: compute 136 ms ...   measured: ...       RATES
#   measured    step 134 ms = 0.99 x bound 136 ms ...           HEADER
#   below the bound, because the machine was faster ...         NOTE, where it is true
#               cold step     |     step 1     |    step 2      CYCLE_NAMES
#                  12 ms for h2d blocks.2                       CALLOUT for each row of labels
#   compute   [--]//[--][--][--][--]//[--][--]                  LANE
#   H2D       [----][----] [----] [----] [----]                 LANE
#   GiB       ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~                 MEMORY
#             0       100       200                             FOOT
#   time in ms                                       legend
WIDTH: Final = 13.0
LEFT: Final = 0.75
RIGHT: Final = 0.2
TITLE: Final = 0.4
RATES: Final = 0.17
HEADER: Final = 0.3
NOTE: Final = 0.17
CYCLE_NAMES: Final = 0.22
PHASE_NAMES: Final = 0.18  # for programs
CALLOUT: Final = 0.15
LANE: Final = 0.34
MEMORY: Final = 0.75
GAP: Final = 0.08  # above and below the memory
FOOT: Final = 0.42
FOOT_LINE: Final = 0.12  # the legend's distance from the lower edge
LINE: Final = 0.035  # the height of the line that marks a wait, above the bars

BAR: Final = 0.78  # a bar's share of its lane's height
MARGIN: Final = 0.004  # the share of the time axis that stays free at the right
NARROW: Final = 4.0  # points: narrower bars have no outline
BETWEEN: Final = "   ·   "


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
    page = Page(WIDTH, TITLE + RATES + sum(panel.height for panel in panels) + FOOT)
    titles = dict.fromkeys(timeline.title for timeline in timelines)
    page.write(LEFT, page.height - 0.28, " / ".join(titles), size=TITLE_POINTS, weight="bold")
    page.write(LEFT, page.height - 0.28 - RATES, _rates(timelines))
    top = page.height - TITLE - RATES
    for panel in panels:
        _draw_panel(page, panel, top, is_last=panel is panels[-1])
        top -= panel.height
    _draw_legend(page, panels[0].colours)
    return page.figure


# What is shown, and where


@dataclass(frozen=True)
class Panel:
    """One timeline with all that is decided before it is drawn. Heights are in inches."""

    index: int
    timeline: Timeline
    name: str
    header: str
    note: str
    lanes: tuple[Lane, ...]
    callouts: Sequence[Callout]
    colours: dict[str, str]
    ruler: Ruler
    phases: Sequence[Phase]
    seconds: Sequence[float]  # of each cycle, also of what is left out of the picture

    @property
    def header_height(self) -> float:
        return HEADER + (NOTE if self.note else 0.0)

    @property
    def lanes_height(self) -> float:
        rows = max((callout.row + 1 for callout in self.callouts), default=0)
        return LANE * len(self.lanes) + CALLOUT * rows + CYCLE_NAMES + (PHASE_NAMES if self.phases else 0.0)

    @property
    def height(self) -> float:
        return self.header_height + self.lanes_height + GAP + MEMORY + GAP

    def lane_bottom(self, lane: Lane) -> float:
        """The lower edge of a lane's bars, in inches above the axis. The first lane is the highest."""
        return LANE * (len(self.lanes) - 1 - self.lanes.index(lane)) + LANE * (1 - BAR) / 2


def arrange(timelines: Sequence[Timeline]) -> list[Panel]:
    """A panel for each timeline, all on one time axis and in the same colours."""
    _check(timelines)
    folds = [folded(_first_cycles(timeline)) for timeline in timelines]
    shown = _aligned([timeline for timeline, _ in folds])
    spans = [span for timeline in shown for span in timeline.spans]
    begin = min(span.start for span in spans)
    length = max(span.stop for span in spans) - begin or 1.0  # a trace without costs takes no time
    ruler = Ruler(begin, begin + length * (1 + MARGIN), (WIDTH - LEFT - RIGHT) * 72)
    colours = block_colours(span.call for timeline in shown for span in timeline.lane("compute"))
    return [
        Panel(
            index,
            timeline,
            _name(timelines[index], timelines),
            header(timelines[index], timelines),
            note(timelines[index]),
            tuple(lane for lane in LANES if timeline.lane(lane)),
            callouts(timeline, ruler),
            colours,
            ruler,
            folds[index][1],
            [end - begin for begin, end in map(timelines[index].window, range(timeline.cycles))],
        )
        for index, timeline in enumerate(shown)
    ]


def _check(timelines: Sequence[Timeline]) -> None:
    if not timelines:
        raise SettingsError("no timeline to draw: give one or more, as in save_timeline(path, plan.predict())")
    for timeline in timelines:
        if not timeline.lane("compute"):
            raise SettingsError(f"the {timeline.source} timeline has no calls to draw; run the model first")


def _first_cycles(timeline: Timeline) -> Timeline:
    """The part of a timeline that is drawn."""
    if timeline.cycles <= SHOWN_CYCLES:
        return timeline
    end = timeline.ends[SHOWN_CYCLES - 1]
    return replace(
        timeline,
        spans=tuple(span for span in timeline.spans if span.cycle < SHOWN_CYCLES and span.start < end),
        memory=tuple(point for point in timeline.memory if point.seconds < end),
    )


def _aligned(timelines: Sequence[Timeline]) -> list[Timeline]:
    """Put steady steps below steady steps: a timeline without a cold step begins where another one's cold step ends."""
    cold = next((timeline for timeline in timelines if timeline.starts_cold), None)
    return [
        timeline if cold is None or timeline.starts_cold else _later(timeline, cold.ends[0] - timeline.window(0)[0])
        for timeline in timelines
    ]


def _later(timeline: Timeline, seconds: float) -> Timeline:
    return replace(
        timeline,
        spans=tuple(replace(s, start=s.start + seconds, stop=s.stop + seconds) for s in timeline.spans),
        memory=tuple(replace(point, seconds=point.seconds + seconds) for point in timeline.memory),
    )


# What is said in words


def header(timeline: Timeline, others: Sequence[Timeline] = ()) -> str:
    """A timeline in one line: the step, how far it is from the bound, what was hidden, and the memory."""
    step, bound, waits = timeline.step_seconds, timeline.bound_seconds, timeline.stall_seconds
    is_cold = _has_only_a_cold_step(timeline)
    words = [f"{'cold ' * is_cold}{cycle_of(timeline)} {readable_seconds(step)}"]
    if bound > 0 and not is_cold:
        words[0] += f" = {step / bound:.2f} {TIMES} bound {readable_seconds(bound)}"
    guess = next((other for other in others if other.source == "predicted"), None)
    promised = 0.0 if guess is None else guess.cold_seconds if is_cold else guess.step_seconds
    if timeline.source == "measured" and promised > 0:
        words.append(f"{step / promised - 1:+.1%} against predicted")
    words.append(f"waits {readable_seconds(waits)} ({waits / step:.0%})" if waits > 1e-6 * step else "no waits")
    words.append(f"overlap {timeline.overlap:.0%}")
    words.append(f"peak {readable(timeline.peak_bytes)}")
    if timeline.cycles > SHOWN_CYCLES:
        words.append(f"first {SHOWN_CYCLES} of {timeline.cycles} {cycle_of(timeline)}s shown, figures of the last")
    return BETWEEN.join(words)


def cycle_of(timeline: Timeline) -> str:
    """What one cycle of a timeline is called."""
    return "request" if timeline.of_program else "step"


def note(timeline: Timeline) -> str:
    """Why a measured step is below the bound, if one is: the bound holds for the rates that it was computed from."""
    if timeline.source == "predicted" or not timeline.beats_its_bound:
        return ""
    return (
        f"The quickest step took {readable_seconds(timeline.quickest_step_seconds)}, less than the bound: "
        "the machine was faster than the rates that the bound was computed from."
    )


def _name(timeline: Timeline, others: Sequence[Timeline]) -> str:
    """Predicted or measured; and of which plan, where the picture shows several."""
    several = len({other.title for other in others}) > 1
    return f"{timeline.title}, {timeline.source}" if several else timeline.source


def _rates(timelines: Sequence[Timeline]) -> str:
    """The rates of each timeline side by side: what the bound was computed from, and what the machine did."""
    return BETWEEN.join(
        f"{_name(timeline, timelines)} rates: {', '.join(_rates_of(timeline))}" for timeline in timelines
    )


def _rates_of(timeline: Timeline) -> list[str]:
    """The compute of the last step, and the rate of each link in it."""
    rates = [f"compute {readable_seconds(timeline.compute_seconds)} a {cycle_of(timeline)}"]
    for lane in LANES:
        rate = timeline.bytes_per_second(lane)
        if lane != "compute" and rate:
            rates.append(f"{_title(lane)} {rate / 1e9:.2f} GB/s")
    return rates


def _has_only_a_cold_step(timeline: Timeline) -> bool:
    return timeline.starts_cold and timeline.cycles == 1


def _title(lane: Lane) -> str:
    return lane if lane == "compute" else lane.upper()


# One panel


def _draw_panel(page: Page, panel: Panel, top: float, is_last: bool) -> None:
    line, width = top - HEADER + 0.1, WIDTH - LEFT - RIGHT
    name = page.write(LEFT, line, panel.name, size=TEXT_POINTS, weight="bold")
    page.write(LEFT + name + 0.15, line, panel.header, size=TEXT_POINTS)
    page.write(LEFT + name + 0.15, line - NOTE, panel.note, colour=WAIT)
    lanes = page.axes(LEFT, top - panel.header_height - panel.lanes_height, width, panel.lanes_height)
    memory = page.axes(LEFT, top - panel.height + GAP, width, MEMORY)
    for axes in (lanes, memory):
        axes.set_xlim(panel.ruler.begin, panel.ruler.end)
    _draw_lanes(lanes, panel)
    _draw_memory(memory, panel.timeline)
    _draw_cycles(lanes, memory, panel)
    _draw_phases(lanes, memory, panel)
    unit = _count_time(memory, panel.ruler.end - panel.ruler.begin)
    memory.tick_params(axis="x", labelbottom=is_last)
    if is_last:
        what_repeats = ", without what repeats" if any(phase.left_out for phase in panel.phases) else ""
        page.write(LEFT, FOOT_LINE, f"time in {unit}{what_repeats}", size=TEXT_POINTS)


def _draw_lanes(axes: Axes, panel: Panel) -> None:
    """Draw the lanes. The y axis counts inches, so that labels can be placed by their printed size."""
    axes.set_ylim(0, panel.lanes_height)
    axes.spines["left"].set_visible(False)
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(axis="both", length=0, labelbottom=False)
    axes.set_yticks(
        [panel.lane_bottom(lane) + LANE * BAR / 2 for lane in panel.lanes],
        [_title(lane) for lane in panel.lanes],
        fontsize=TEXT_POINTS,
    )
    for lane in panel.lanes:
        _draw_bars(axes, panel, lane)
    _draw_stalls(axes, panel)


def _draw_bars(axes: Axes, panel: Panel, lane: Lane) -> None:
    spans, bottom = panel.timeline.lane(lane), panel.lane_bottom(lane)
    colours = [panel.colours.get(block_of(span.call), FAINT) for span in spans]
    bars = axes.broken_barh([(s.start, s.seconds) for s in spans], (bottom, LANE * BAR), facecolors=colours)
    outline = 0.5 if _are_wide(spans, panel.ruler) else 0.0
    bars.set(linewidth=outline, edgecolor="white", gid=f"timeline{panel.index}-{lane}")
    for span, colour, label in zip(spans, colours, _labels(spans, panel.ruler), strict=True):
        if label:
            x, y = (span.start + span.stop) / 2, bottom + LANE * BAR / 2
            axes.text(x, y, label, color=text_colour(colour), ha="center", va="center_baseline", **PLAIN)


def _are_wide(spans: Sequence[Span], ruler: Ruler) -> bool:
    """Whether most bars are wide enough in print for an outline."""
    widths = sorted(span.seconds * ruler.points_per_second for span in spans)
    return bool(widths) and widths[len(widths) // 2] > NARROW


def _labels(spans: Sequence[Span], ruler: Ruler) -> list[str]:
    """The text in each bar: its name, or the last part of it, whichever fits into most bars; else nothing."""
    full = [legible(span.name) for span in spans]
    for names in (full, [name.rsplit(".", 1)[-1] for name in full]):
        rooms = (span.seconds * ruler.points_per_second - 4 for span in spans)
        fits = [text_points(name, SMALL_POINTS) <= room for name, room in zip(names, rooms, strict=True)]
        if 2 * sum(fits) >= len(spans):
            return [name if fit else "" for name, fit in zip(names, fits, strict=True)]
    return [""] * len(spans)


def _draw_stalls(axes: Axes, panel: Panel) -> None:
    """Mark where compute waited with a pale field below a strong line; the longest waits get a label."""
    timeline, bottom = panel.timeline, panel.lane_bottom("compute")
    stalls = [stall for cycle in range(timeline.cycles) for stall in timeline.stalls(cycle)]
    ranges, top = [(stall.start, stall.seconds) for stall in stalls], bottom + LANE * BAR
    fields = axes.broken_barh(ranges, (bottom, LANE * BAR), facecolor=PALE_WAIT, linewidth=0)
    fields.set_gid(f"timeline{panel.index}-waits")
    axes.broken_barh(ranges, (top, LINE), facecolor=WAIT, linewidth=0)
    for callout in panel.callouts:
        _draw_callout(axes, panel, callout, top + LINE)


def _draw_callout(axes: Axes, panel: Panel, callout: Callout, foot: float) -> None:
    base = LANE * len(panel.lanes) + CALLOUT * callout.row
    seconds = panel.ruler.seconds(callout.stem)
    axes.plot([seconds, seconds], [foot, base + CALLOUT], color=WAIT, linewidth=0.7)
    axes.text(panel.ruler.seconds(callout.left), base + 0.05, callout.text, color=WAIT, **PLAIN)


def _draw_memory(axes: Axes, timeline: Timeline) -> None:
    """Draw the bytes on the device over time, below the line of the budget."""
    highest = max(timeline.budget_bytes, timeline.peak_bytes, 1)
    divisor, unit = bytes_unit(highest)
    if timeline.memory:
        moments = [*(point.seconds for point in timeline.memory), max(timeline.ends)]
        values = [point.nbytes / divisor for point in (*timeline.memory, timeline.memory[-1])]
        axes.fill_between(moments, values, step="post", color=PALE_BLUE, linewidth=0)
        axes.step(moments, values, where="post", color=BLUE, linewidth=0.9)
    axes.set_ylim(0, 1.32 * highest / divisor)
    axes.yaxis.set_major_locator(MaxNLocator(3))
    axes.set_ylabel(unit, fontsize=TEXT_POINTS, color=INK)
    _draw_budget(axes, timeline.budget_bytes, divisor)


def _draw_budget(axes: Axes, budget_bytes: int, divisor: int) -> None:
    axes.axhline(budget_bytes / divisor, color=INK, linewidth=0.9, linestyle=(0, (5, 2)))
    axes.annotate(
        f"budget {readable(budget_bytes)}",
        (0, budget_bytes / divisor),
        xycoords=("axes fraction", "data"),
        xytext=(4, 2),
        textcoords="offset points",
        fontsize=SMALL_POINTS,
        color=INK,
    )


def _draw_cycles(lanes: Axes, memory: Axes, panel: Panel) -> None:
    """Draw a line at the end of each cycle, but not through the labels of waits, and write the cycle's name."""
    timeline, top = panel.timeline, panel.lanes_height
    heights = ((lanes, 0.0, LANE * len(panel.lanes)), (lanes, top - CYCLE_NAMES, top), (memory, *memory.get_ylim()))
    for axes, low, high in heights:
        axes.vlines(timeline.ends, low, high, colors=INK, linewidth=0.6, linestyle=(0, (2, 2)))
    for cycle in range(timeline.cycles):
        begin, end = timeline.window(cycle)
        room = (end - begin) * panel.ruler.points_per_second - 6
        label = _cycle_name(timeline, cycle, panel.seconds[cycle], room)
        lanes.text((begin + end) / 2, top - 0.03, label, ha="center", va="top", fontsize=TEXT_POINTS, color=INK)


def _draw_phases(lanes: Axes, memory: Axes, panel: Panel) -> None:
    """Name the phases of a program below the names of the cycles; a white gap is where iterations are left out."""
    top = panel.lanes_height - CYCLE_NAMES
    for phase in panel.phases:
        times = f" {TIMES} {phase.times}" if phase.times > 1 else ""
        gap = f", {phase.left_out} of them left out" if phase.left_out else ""
        room = (phase.stop - phase.start) * panel.ruler.points_per_second - 4
        names = (
            f"{legible(phase.component)}{times}{gap}",
            f"{legible(phase.component)}{times}",
            legible(phase.component),
        )
        name = next((name for name in names if text_points(name, SMALL_POINTS) <= room), "")
        middle = (phase.start + phase.stop) / 2
        lanes.text(middle, top - 0.02, name, ha="center", va="top", color=INK, **PLAIN)
        for axes, low, high in ((lanes, 0.0, LANE * len(panel.lanes)), (memory, *memory.get_ylim())):
            axes.vlines(phase.stop, low, high, colors=INK, linewidth=0.4, linestyle=(0, (1, 2)))
            if phase.left_out:
                axes.vlines(phase.cut, low, high, colors="white", linewidth=5)


def _cycle_name(timeline: Timeline, cycle: int, seconds: float, room: float) -> str:
    """The name and the length of a cycle; only the name, or nothing, where the room is small."""
    number, what = cycle if timeline.starts_cold else cycle + 1, cycle_of(timeline)
    name = f"{what} {number}" if number else f"cold {what}"
    labels = (f"{name}   {readable_seconds(seconds)}", name)
    return next((label for label in labels if text_points(label, TEXT_POINTS) <= room), "")


def _count_time(axes: Axes, seconds: float) -> str:
    """Number the time axis in the unit that suits it, and return the unit."""
    divisor, unit = seconds_unit(seconds)
    axes.xaxis.set_major_locator(MaxNLocator(12, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / divisor:.10g}"))
    return unit


def _draw_legend(page: Page, colours: dict[str, str]) -> None:
    """At the foot, from the right: the colours from the first block to the last, and the mark of a wait."""
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
    page.fill(x - 0.3, FOOT_LINE - 0.01, 0.3, height, PALE_WAIT)
    page.fill(x - 0.3, FOOT_LINE - 0.01 + height, 0.3, LINE, WAIT)
