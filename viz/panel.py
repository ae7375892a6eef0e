"""Decides what a picture of timelines shows and where, before anything is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from taskgraph_offload.errors import SettingsError
from taskgraph_offload.nouns.budget import readable, readable_seconds
from taskgraph_offload.nouns.graph import LANES, Lane
from taskgraph_offload.nouns.timeline import Timeline

from . import style
from .callouts import Callout, Ruler, callouts

SHOWN_CYCLES: Final = 3  # the cold one and two steady ones: all others look like the last of these

# The page, in inches:
#
#   strategy                                                    TITLE
#   predicted   step 146 ms = 1.07 x bound 136 ms ...           HEADER
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
HEADER: Final = 0.3
CYCLE_NAMES: Final = 0.22
CALLOUT: Final = 0.15
LANE: Final = 0.34
MEMORY: Final = 0.75
GAP: Final = 0.08  # above and below the memory
FOOT: Final = 0.42
FOOT_LINE: Final = 0.12  # where the legend stands, above the lower edge
LINE: Final = 0.035  # above the bars, where compute waits

BAR: Final = 0.78  # of a lane's height
MARGIN: Final = 0.004  # of the time shown, left free at its end
NARROW: Final = 4.0  # points: bars below it are too narrow for an outline


@dataclass(frozen=True)
class Panel:
    """One timeline with all that was decided before it is drawn. Heights are in inches."""

    index: int
    timeline: Timeline
    header: str
    lanes: tuple[Lane, ...]
    callouts: Sequence[Callout]
    colours: dict[str, str]
    ruler: Ruler

    @property
    def callout_rows(self) -> int:
        return max((callout.row + 1 for callout in self.callouts), default=0)

    @property
    def lanes_height(self) -> float:
        return LANE * len(self.lanes) + CALLOUT * self.callout_rows + CYCLE_NAMES

    @property
    def height(self) -> float:
        return HEADER + self.lanes_height + GAP + MEMORY + GAP

    def lane_bottom(self, lane: Lane) -> float:
        """Where the bars of a lane stand, in inches above the axis: the first lane is the highest."""
        return LANE * (len(self.lanes) - 1 - self.lanes.index(lane)) + LANE * (1 - BAR) / 2


def arrange(timelines: Sequence[Timeline]) -> list[Panel]:
    """A panel for each timeline, all on one time axis and in the same colours."""
    _check(timelines)
    shown = _aligned([_first_cycles(timeline) for timeline in timelines])
    spans = [span for timeline in shown for span in timeline.spans]
    begin = min(span.start for span in spans)
    length = max(span.stop for span in spans) - begin or 1.0  # a trace without costs takes no time at all
    ruler = Ruler(begin, begin + length * (1 + MARGIN), (WIDTH - LEFT - RIGHT) * 72)
    colours = style.block_colours(span.call for timeline in shown for span in timeline.lane("compute"))
    headers = [header(timeline, timelines) for timeline in timelines]
    return [
        Panel(
            index,
            timeline,
            headers[index],
            tuple(lane for lane in LANES if timeline.lane(lane)),
            callouts(timeline, ruler),
            colours,
            ruler,
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
    """Steady steps below steady steps: timelines that start warm begin where the cold step of the first other ends."""
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


def header(timeline: Timeline, others: Sequence[Timeline] = ()) -> str:
    """What a timeline says in one line: the step, how far it is from the bound, what was hidden, what it took."""
    step, bound, waits = timeline.step_seconds, timeline.bound_seconds, timeline.stall_seconds
    is_cold = timeline.starts_cold and timeline.cycles == 1
    words = [f"{'cold ' * is_cold}step {readable_seconds(step)}"]
    if bound > 0 and not is_cold:
        words[0] += f" = {step / bound:.2f} {style.TIMES} bound {readable_seconds(bound)}"
    guess = next((other for other in others if other.source == "predicted"), None)
    promised = 0.0 if guess is None else guess.cold_seconds if is_cold else guess.step_seconds
    if timeline.source == "measured" and promised > 0:
        words.append(f"{step / promised - 1:+.1%} against predicted")
    words.append(f"waits {readable_seconds(waits)} ({waits / step:.0%})" if waits > 1e-6 * step else "no waits")
    words.append(f"overlap {timeline.overlap:.0%}")
    words.append(f"peak {readable(timeline.peak_bytes)}")
    if timeline.cycles > SHOWN_CYCLES:
        words.append(f"first {SHOWN_CYCLES} of {timeline.cycles} steps shown, figures of the last")
    return "   ·   ".join(words)
