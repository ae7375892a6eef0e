"""Spans per lane and a memory curve, predicted or measured. Both are the same type."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from math import inf
from operator import attrgetter
from typing import Literal

from .graph import Lane

Interval = tuple[float, float]  # seconds, half-open

ROUNDING = 1e-6  # of a bound: a step that is shorter by less than this is not shorter


@dataclass(frozen=True, slots=True)
class Span:
    """One task as it ran, or will run: `[start, stop)` in seconds from the beginning of the first cycle.

    `waited_for` is a node: of all tasks that this one had to wait for, the one that ended last. `component` and
    `iteration`, in a program: whose call it is, or copies for, and how often in a row that one has run before.
    """

    node: str
    name: str
    lane: Lane
    call: str
    cycle: int
    start: float
    stop: float
    nbytes: int = 0
    waited_for: str | None = None
    component: str = ""
    iteration: int = 0

    @property
    def seconds(self) -> float:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class MemoryPoint:
    """The bytes that the device holds from this moment on: the arena and the activations."""

    seconds: float
    nbytes: int


@dataclass(frozen=True, slots=True)
class Stall:
    """A time in which the compute lane waits before a call; `cause` is the node that it waits for."""

    call: str
    cycle: int
    start: float
    stop: float
    cause: str | None

    @property
    def seconds(self) -> float:
        return self.stop - self.start


@dataclass(frozen=True)
class Timeline:
    """Some cycles of a plan. The first is the cold one if `starts_cold`; the last one is the steady step.

    Pictures use `title` and `budget_bytes`. `bound_seconds` is the plan's bound on the step, at the rates of the plan's
    machine; 0 if nobody computed it. A cycle of a program is a request.
    """

    source: Literal["predicted", "measured"]
    spans: tuple[Span, ...]
    memory: tuple[MemoryPoint, ...]
    budget_bytes: int
    title: str = ""
    bound_seconds: float = 0.0
    starts_cold: bool = True
    of_program: bool = False

    @cached_property
    def cycles(self) -> int:
        """How many cycles the timeline covers."""
        return 1 + max(map(attrgetter("cycle"), self.spans), default=-1)

    def lane(self, lane: Lane, cycle: int | None = None) -> tuple[Span, ...]:
        """The spans of a lane, in order; of one cycle or of all."""
        return tuple([span for span in self.spans if span.lane == lane and cycle in (None, span.cycle)])

    @cached_property
    def ends(self) -> tuple[float, ...]:
        """When each cycle ended: with its last call, or with its last copy if it has no call."""
        calls: dict[int, float] = {}
        copies: dict[int, float] = {}
        for span in self.spans:
            latest = calls if span.lane == "compute" else copies
            latest[span.cycle] = max(span.stop, latest.get(span.cycle, span.stop))
        ends = copies | calls
        return tuple(map(ends.__getitem__, range(self.cycles)))

    def window(self, cycle: int) -> Interval:
        """A cycle lasts from the end of the one before it to its own end."""
        begin = self.ends[cycle - 1] if cycle else min(map(attrgetter("start"), self.spans))
        return begin, self.ends[cycle]

    @property
    def step_seconds(self) -> float:
        """How long the last cycle took."""
        begin, end = self.window(self.cycles - 1)
        return end - begin

    @property
    def request_seconds(self) -> float:
        """How long the last cycle took, which is a request if the plan is of a program."""
        return self.step_seconds

    @property
    def cold_seconds(self) -> float:
        """How long the first cycle took."""
        begin, end = self.window(0)
        return end - begin

    @property
    def compute_seconds(self) -> float:
        """Compute in the last cycle."""
        return sum(span.seconds for span in self.lane("compute", self.cycles - 1))

    @property
    def stall_seconds(self) -> float:
        """How long the compute lane waited in the last cycle."""
        return max(0.0, self.step_seconds - self.compute_seconds)

    @property
    def quickest_step_seconds(self) -> float:
        """How long the shortest steady cycle took; infinity if there is only a cold one."""
        windows = [self.window(cycle) for cycle in range(1 if self.starts_cold else 0, self.cycles)]
        return min([end - begin for begin, end in windows], default=inf)

    @property
    def beats_its_bound(self) -> bool:
        """Whether a steady step is shorter than the bound: then compute or links are faster than the plan assumed.

        The bound holds for the plan's rates. `Planner.calibrate(timeline)` plans, and bounds, with measured ones.

        >>> span = Span("0/compute a", "a", "compute", "a", 0, 0.0, 1.0)
        >>> Timeline("measured", (span,), (), 0, bound_seconds=1.5, starts_cold=False).beats_its_bound
        True
        """
        return self.quickest_step_seconds < self.bound_seconds * (1 - ROUNDING)

    @property
    def overlap(self) -> float:
        """The share of the copy time in the last cycle that compute hid; 1 when nothing was copied."""
        window = self.window(self.cycles - 1)
        copies = union(clip(((s.start, s.stop) for s in self.spans if s.lane != "compute"), window))
        computes = union(clip(((s.start, s.stop) for s in self.lane("compute")), window))
        copying = length(copies)
        return length(intersection(copies, computes)) / copying if copying > 0 else 1.0

    def bytes_per_second(self, lane: Lane) -> float | None:
        """How fast a link copied in the last cycle; None where it copied nothing."""
        copies = self.lane(lane, self.cycles - 1)
        seconds = sum(copy.seconds for copy in copies)
        return sum(copy.nbytes for copy in copies) / seconds if seconds > 0 else None

    @property
    def peak_bytes(self) -> int:
        return max((point.nbytes for point in self.memory), default=0)

    def figures(self) -> dict[str, float | int]:
        """The figures that tables and documents show, by name."""
        names = ("step_seconds", "cold_seconds", "compute_seconds", "stall_seconds", "overlap", "peak_bytes")
        return {name: getattr(self, name) for name in names}

    def stalls(self, cycle: int | None = None) -> tuple[Stall, ...]:
        """Where the compute lane waited in a cycle (by default the last one), longest first."""
        cycle = self.cycles - 1 if cycle is None else cycle
        last_end, found = self.window(cycle)[0], []
        for span in self.lane("compute", cycle):
            if span.start - last_end > 1e-12:
                found.append(Stall(span.call, cycle, last_end, span.start, span.waited_for))
            last_end = max(last_end, span.stop)
        return tuple(sorted(found, key=lambda stall: -stall.seconds))


def clip(intervals: Iterable[Interval], window: Interval) -> list[Interval]:
    """The parts of intervals inside a window."""
    clipped = ((max(start, window[0]), min(stop, window[1])) for start, stop in intervals)
    return [(start, stop) for start, stop in clipped if start < stop]


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """Sorted, disjoint intervals that cover the same time."""
    merged: list[Interval] = []
    for start, stop in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], stop))
        else:
            merged.append((start, stop))
    return merged


def intersection(first: list[Interval], second: list[Interval]) -> list[Interval]:
    """The time that two sorted disjoint lists share."""
    shared, i, j = [], 0, 0
    while i < len(first) and j < len(second):
        start, stop = max(first[i][0], second[j][0]), min(first[i][1], second[j][1])
        if start < stop:
            shared.append((start, stop))
        if first[i][1] < second[j][1]:
            i += 1
        else:
            j += 1
    return shared


def length(intervals: Iterable[Interval]) -> float:
    """Total seconds of disjoint intervals."""
    return sum(stop - start for start, stop in intervals)
