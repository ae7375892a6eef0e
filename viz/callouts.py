"""Finds places for the labels above the longest waits, so that all can be read. Draws nothing.

    row 1        12 ms for h2d blocks.2
    row 0        |        9 ms for h2d blocks.5
                 |        |
    compute  [-]   [-][-]   [----]

A label is a stem on the middle of its wait, with the text right or left of it. No text may cover another text, nor the
stem of a label in a higher row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations, product

from taskgraph_offload.nouns.budget import readable_seconds
from taskgraph_offload.nouns.timeline import Span, Stall, Timeline

from .page import SMALL_POINTS, legible, text_points

PER_CYCLE = 3
WORTH_A_LABEL = 0.002  # of the cycle
GAP_POINTS = 6.0


@dataclass(frozen=True, slots=True)
class Ruler:
    """Converts between seconds and points from the left end of an axis. `width` is in points."""

    begin: float
    end: float
    width: float

    @property
    def points_per_second(self) -> float:
        return self.width / (self.end - self.begin)

    def points(self, seconds: float) -> float:
        """The position of a moment."""
        return (seconds - self.begin) * self.points_per_second

    def seconds(self, points: float) -> float:
        """The moment at a position."""
        return self.begin + points / self.points_per_second


@dataclass(frozen=True, slots=True)
class Callout:
    """The label of one wait: its text, the seconds waited, the row, and the positions of stem and text in points."""

    text: str
    seconds: float
    row: int
    stem: float
    left: float
    right: float


def callouts(timeline: Timeline, ruler: Ruler) -> list[Callout]:
    """The labels of the longest waits of each cycle, as many as fit."""
    placed: list[Callout] = []
    for cycle in range(timeline.cycles):
        begin, end = (ruler.points(moment) for moment in timeline.window(cycle))
        place = (begin, end if cycle + 1 < timeline.cycles else ruler.width)
        candidates = [list(_candidates(timeline, stall, ruler)) for stall in _worth_a_label(timeline, cycle)]
        placed += max(_layouts(candidates, placed), key=partial(_merit, place=place))
    return placed


def cause(timeline: Timeline, stall: Stall) -> str:
    """What a call waited for: a copy, by lane and name; or the host, where all copies were there already."""
    if stall.cause is None:
        copy = next(_brought_meanwhile(timeline, stall), None)
        return "the host" if copy is None else f"{copy.lane} {copy.name}"
    span = next((span for span in timeline.spans if span.node == stall.cause), None)
    return stall.cause.split("/", 1)[-1] if span is None else f"{span.lane} {span.name}"


def _brought_meanwhile(timeline: Timeline, stall: Stall) -> Iterator[Span]:
    """The copies for a call that ended while it waited, the latest first."""
    for span in reversed(timeline.spans):
        if span.lane != "compute" and span.call == stall.call and stall.start < span.stop <= stall.stop:
            yield span


def _worth_a_label(timeline: Timeline, cycle: int) -> list[Stall]:
    """The longest waits of a cycle; of equal ones (to the nanosecond) the earlier."""
    begin, end = timeline.window(cycle)
    stalls = sorted(timeline.stalls(cycle), key=lambda stall: (-round(stall.seconds, 9), stall.start))
    return [stall for stall in stalls[:PER_CYCLE] if stall.seconds >= WORTH_A_LABEL * (end - begin)]


def _candidates(timeline: Timeline, stall: Stall, ruler: Ruler) -> Iterator[Callout]:
    """All places for a label: any row, left or right of its stem."""
    text = legible(f"{readable_seconds(stall.seconds)} for {cause(timeline, stall)}")
    stem, width = ruler.points((stall.start + stall.stop) / 2), text_points(text, SMALL_POINTS)
    for row, left in product(range(PER_CYCLE), (stem + 3, stem - 3 - width)):
        if left >= 0 and left + width <= ruler.width:
            yield Callout(text, stall.seconds, row, stem, left, left + width)


def _layouts(candidates: Sequence[Sequence[Callout]], placed: Sequence[Callout]) -> Iterator[list[Callout]]:
    """All ways to label some of the waits, each with at most one label, so that all can be read."""
    for layout in product(*([None, *labels] for labels in candidates)):
        labels = [label for label in layout if label is not None]
        if all(_are_apart(one, other) for one, other in combinations([*placed, *labels], 2)):
            yield labels


def _are_apart(one: Callout, other: Callout) -> bool:
    """Whether no text covers the other text, or the stem of the label in the higher row."""
    if one.row == other.row:
        return one.right + GAP_POINTS <= other.left or other.right + GAP_POINTS <= one.left
    low, high = sorted((one, other), key=lambda label: label.row)
    return not low.left - 2 <= high.stem <= low.right + 2


def _merit(layout: Sequence[Callout], place: tuple[float, float]) -> tuple[float, int, float, int, int]:
    """Which layout is better, the most important first: label the longest wait; stay inside the own cycle; label many
    seconds of waits; use low rows; stand right of the stem.
    """
    outside = sum(label.left < place[0] or label.right > place[1] for label in layout)
    longest = round(max((label.seconds for label in layout), default=0.0), 9)
    explained = round(sum(label.seconds for label in layout), 9)
    rows, rightward = sum(label.row for label in layout), sum(label.left > label.stem for label in layout)
    return longest, -outside, explained, -rows, rightward
