"""How fast a cycle can be at best, when so many bytes must pass through so much room.

Just before a unit ends, the device holds at most `room` bytes of weights, the unit's own weights among them. When a
later unit starts, everything that the units from the first to that one read has been on the device. What did not fit
was copied in between:

    compute   --[--- i ---]-----[ i+1 ]---- ... ----[ j-1 ]--[--- j ---]--
                          |<------ bytes of i..j beyond the room ----->|     at the link's rate

    start of j  >=  end of i  +  link * (bytes that i..j read, each weight once  -  room while i computes)

for every window of no more than one cycle, besides one unit after the other.

A steady cycle takes at best the largest mean of a circuit through all these constraints between starts:

    unit 0 ---> unit 1 ---> unit 2 ---> unit 3 ---> (unit 0 of the next cycle)      one unit after the other
       \\__________________________________/^                                        windows that bytes must pass

A circuit that goes once round the cycle and adds up to 3 seconds makes every cycle last 3 seconds. One that goes round
twice and adds up to 7 seconds makes it 3.5. This module knows numbers only: no trace, no plan.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

_TOLERANCE = 1e-10
_PATIENCE = 16  # rounds that only move starts: paths can go round many cycles, and matter no more


@dataclass(frozen=True)
class Cycle:
    """Units in the order in which they compute: seconds, bytes read, and the room for weights while each computes.

    `repeats` says which of a unit's bytes were read before: (how many units ago, bytes). All else was last read by the
    same unit a cycle ago.
    """

    seconds: Sequence[float]
    nbytes: Sequence[float]
    room: Sequence[float]
    repeats: Mapping[int, Sequence[tuple[int, float]]] = field(default_factory=dict)

    @cached_property
    def compute_seconds(self) -> float:
        return sum(self.seconds)

    @cached_property
    def own(self) -> list[float]:
        """The bytes of each unit that no other unit read within the last cycle."""
        return [n - sum(b for _, b in self.repeats.get(k, ())) for k, n in enumerate(self.nbytes)]

    @cached_property
    def total(self) -> float:
        """The bytes of a whole cycle, each once; the gaps between reads of the same bytes add up to a cycle."""
        again = sum(nbytes * gap for many in self.repeats.values() for gap, nbytes in many)
        return sum(self.own) + again / len(self.seconds)


class Windows:
    """The best window that ends at each unit in turn: a sliding maximum over the windows' first units.

    A first unit that begins earlier and gives less than a later one never wins again, so the values in the queue fall:

        first units     3       5       6     7    <- the next one drops those before it that give no more
        values         9.1  >  7.0  >  6.5 > 2.2
    """

    def __init__(self, cycle: Cycle, rate: float) -> None:
        self._count = len(cycle.seconds)
        self._own = [nbytes / rate for nbytes in cycle.own]
        self._beyond = [(n - room) / rate for n, room in zip(cycle.nbytes, cycle.room, strict=True)]
        self._repeats = {k: [(gap, b / rate) for gap, b in many] for k, many in cycle.repeats.items() if many}
        self._queue: deque[list[float]] = deque()  # [value, first unit]
        self._copied = 0.0

    def latest(self, unit: int) -> tuple[float, int]:
        """The earliest start that the windows ending at this unit allow, and the first unit of the one that decides."""
        k, queue = unit % self._count, self._queue
        while queue and queue[0][1] <= unit - self._count:
            queue.popleft()
        for gap, seconds in self._repeats.get(k, ()):
            self._raise_after(unit - gap, seconds)
        self._copied += self._own[k]
        return (self._copied + queue[0][0], int(queue[0][1])) if queue else (0.0, unit - 1)

    def begin(self, unit: int, end: float) -> None:
        """Add the windows that begin with this unit."""
        value, queue = end + self._beyond[unit % self._count] - self._copied, self._queue
        while queue and queue[-1][0] <= value:
            queue.pop()
        queue.append([value, unit])

    def _raise_after(self, unit: int, seconds: float) -> None:
        """Bytes last read by `unit` are new to the windows that begin after it."""
        later = [entry for entry in self._queue if entry[1] > unit]
        for entry in later:
            entry[0] += seconds
        while later and len(self._queue) > len(later) and self._queue[-len(later) - 1][0] <= later[0][0]:
            del self._queue[-len(later) - 1]


def cold_seconds(cycle: Cycle, rate: float, fixed: Sequence[float]) -> float:
    """The shortest first cycle, which starts with an empty device. `fixed`: bytes that come with a unit and stay."""
    windows, end, arrived = Windows(cycle, rate), 0.0, 0.0
    for k, seconds in enumerate(cycle.seconds):
        again = sum(nbytes for gap, nbytes in cycle.repeats.get(k, ()) if gap <= k)
        arrived += (cycle.nbytes[k] - again + fixed[k]) / rate
        start, _ = windows.latest(k)
        end = max(end, start, arrived) + seconds
        windows.begin(k, end)
    return end


def room_without_stall(cycle: Cycle, rate: float, more: Sequence[float]) -> float:
    """The smallest room with which no copy delays a compute. `more`: bytes that each unit needs in addition."""
    ends = list(accumulate(cycle.seconds))
    roomless = Cycle(cycle.seconds, cycle.nbytes, [-extra for extra in more], cycle.repeats)
    windows, count = Windows(roomless, rate), len(ends)
    most = max(n + extra for n, extra in zip(cycle.nbytes, more, strict=True))
    for unit in range(2 * count):
        end = ends[unit % count] + unit // count * ends[-1]
        late, _ = windows.latest(unit)
        if unit:
            most = max(most, (late - (end - cycle.seconds[unit % count])) * rate)
        windows.begin(unit, end)
    return most


@dataclass(frozen=True, slots=True)
class Pace:
    """The seconds of a steady cycle, and starts of its units that keep all constraints at that pace."""

    seconds: float
    starts: tuple[float, ...]


def steady_pace(cycle: Cycle, rate: float) -> Pace:
    """The largest mean of a circuit of constraints, by policy iteration: every round is O(units), and few are needed.

    A policy says for each unit which constraint decides its start. Following it back ends in a circuit, whose mean is
    a pace that no schedule beats; starts at that pace show which units another constraint would delay.
    """
    edges = max(_chained(cycle), _longest_windows(cycle, rate), key=lambda policy: max(_circuits(policy)))
    pace, patience = _follow(cycle, edges), _PATIENCE
    while patience:
        changed = False
        for k, (start, edge) in enumerate(_deciding(cycle, rate, pace)):
            if start > pace.starts[k] + _TOLERANCE * pace.seconds:
                edges[k], changed = edge, True
        if not changed:
            break
        slower = _follow(cycle, edges)
        patience = patience - 1 if slower.seconds <= pace.seconds * (1 + _TOLERANCE) else _PATIENCE
        pace = slower
    return pace


class _Edge(NamedTuple):
    """A unit starts so many seconds after another one does; after that of the cycle before, if `origin` is negative."""

    origin: int
    seconds: float


def _chained(cycle: Cycle) -> list[_Edge]:
    """For each unit: it starts when the unit before it ends."""
    return [_Edge(unit - 1, cycle.seconds[unit - 1]) for unit in range(len(cycle.seconds))]


def _longest_windows(cycle: Cycle, rate: float) -> list[_Edge]:
    """For each unit: the window of all units that ends at this one; a single unit follows itself."""
    count = len(cycle.seconds)
    if count == 1:
        return _chained(cycle)
    firsts = [(unit + 1) % count for unit in range(count)]
    seconds = [cycle.seconds[first] + (cycle.total - cycle.room[first]) / rate for first in firsts]
    return [_Edge(unit + 1 - count, lasts) for unit, lasts in enumerate(seconds)]


def _deciding(cycle: Cycle, rate: float, pace: Pace) -> Iterator[tuple[float, _Edge]]:
    """For each unit: the earliest start that those before it allow, and the constraint that decides it."""
    windows, count = Windows(cycle, rate), len(cycle.seconds)
    starts = [start - pace.seconds for start in pace.starts] + list(pace.starts)
    for unit in range(2 * count):
        late, origin = windows.latest(unit)
        if unit >= count:
            chained = starts[unit - 1] + cycle.seconds[unit - count - 1]
            if late <= chained:
                late, origin = chained, unit - 1
            yield late, _Edge(origin - count, late - starts[origin])
            starts[unit] = max(starts[unit], late)
        windows.begin(unit, starts[unit] + cycle.seconds[unit % count])


def _follow(cycle: Cycle, edges: list[_Edge]) -> Pace:
    """The pace of a policy's slowest circuit, and its starts. A unit that leads elsewhere is chained instead."""
    count = len(edges)
    seconds, root = max(_circuits(edges))
    starts: dict[int, float] = {root: 0.0}
    for first in (*range(root + 1, count), *range(root)):
        path: dict[int, None] = {}  # from the unit back to one whose start is known, or to where the path meets itself
        unit = first
        while unit not in starts and unit not in path:
            path[unit] = None
            unit = edges[unit].origin % count
        if path and unit not in starts:
            edges[first], path = _Edge(first - 1, cycle.seconds[first - 1]), {first: None}
        for unit in reversed(path):
            origin, after = edges[unit]
            starts[unit] = starts[origin % count] + after - (seconds if origin < 0 else 0.0)
    return Pace(seconds, tuple(map(starts.__getitem__, range(count))))


def _circuits(edges: Sequence[_Edge]) -> list[tuple[float, int]]:
    """Each circuit of a policy: its mean seconds for one cycle, and one of its units."""
    count = len(edges)
    found: list[tuple[float, int]] = []
    reached_from = [-1] * count
    for first in range(count):
        path: list[int] = []
        unit = first
        while reached_from[unit] < 0:
            reached_from[unit] = first
            path.append(unit)
            unit = edges[unit].origin % count
        if path and reached_from[unit] == first:
            origins, seconds = zip(*[edges[k] for k in path[path.index(unit) :]], strict=True)
            found.append((sum(seconds) / sum([origin < 0 for origin in origins]), unit))
    return found
