"""How fast a cycle can be at best, when so many bytes must pass through so much room.

Just before a unit ends, the device holds at most `room` bytes, its own among them. By the start of a later unit, all
that the units from the first to that one read has been there. What did not fit came over the link in between:

    compute   --[--- i ---]-----[ i+1 ]---- ... ----[ j-1 ]--[--- j ---]--
                          |<------ bytes of i..j beyond the room ----->|     at the link's rate

    start of j  >=  end of i  +  link * (bytes that i..j read, each weight once  -  room while i computes)

for every window of no more than one cycle, besides one unit after the other. `pace` says what a steady cycle takes.
This module knows numbers only: no trace, no plan.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate


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
        """The bytes of each unit that no other unit of the last cycle has read."""
        return [n - sum(b for _, b in self.repeats.get(k, ())) for k, n in enumerate(self.nbytes)]

    @cached_property
    def total(self) -> float:
        """The bytes of a whole cycle, each once: the gaps between the reads of the same bytes add up to a cycle."""
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
    """The least that a first cycle takes, when nothing is there yet. `fixed`: bytes that come with a unit, and stay."""
    windows, end, arrived = Windows(cycle, rate), 0.0, 0.0
    for k, seconds in enumerate(cycle.seconds):
        again = sum(nbytes for gap, nbytes in cycle.repeats.get(k, ()) if gap <= k)
        arrived += (cycle.nbytes[k] - again + fixed[k]) / rate
        start, _ = windows.latest(k)
        end = max(end, start, arrived) + seconds
        windows.begin(k, end)
    return end


def room_without_stall(cycle: Cycle, rate: float, more: Sequence[float]) -> float:
    """The least room, beside `more` while each unit computes, with which copies can hide behind computes wholly."""
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
