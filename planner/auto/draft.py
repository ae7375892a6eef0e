"""A draft: which items stream, their seats and copies, and how fast that is. It never chooses what streams.

The arena of every draft looks like this:

    |<---- streaming region: a ring ---->|<------ what stays ------>|
    0                                  room                     capacity

The streaming region is a ring: bundles of items lie one behind the other, and begin at 0 again at the end.

    bytes       0                                    room
    turn 1      [ unit 0 )[ unit 1 )[ unit 2 )[3, part)
    turn 2      [3, rest )[ unit 4 )[ unit 5 )[ unit 6 )
    next cycle  [ unit 0 )[ unit 1 ) ...

Each byte is overwritten about one turn after it was copied. Every cycle begins at 0, so an item has the same seat in
all cycles; if the last turn is nearly full, little is wasted. A unit that reaches over the end is cut between items.

A seat may overlap the seats of several earlier visits, which end at different times. It is then copied in parts, one
for each unit that must end first:

    region bytes     [-- unit 4's --)[---- unit 5's ----)
    unit 9's seat          [-----------------)
    its copies             [ after 4 )[after 5)

`steady_seconds` runs the cycle again and again on plain numbers. It finds the same longest path as `Plan.predict`:

    h2d      [--copy--][copy]   [--copy--]       a copy waits for the link, and for the unit whose bytes it overwrites
    compute       [--- unit ---][- unit -]       a unit waits for the unit before it, and for its own copies

`to_schedule` gives names to what travels together, and puts the tasks of a steady cycle in order. Each copy stands as
early as it may, behind the last unit whose bytes it overwrites. The first copies of the next cycle stand behind the
last units of this one:

    compute a | h2d c | compute b | h2d a | compute c | h2d b        (a and b: for the next cycle)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain, groupby
from math import inf
from operator import attrgetter, itemgetter
from typing import Final, NamedTuple

from taskgraph_offload.nouns.graph import Task
from taskgraph_offload.nouns.machine import Machine
from taskgraph_offload.nouns.ranges import ByteMap
from taskgraph_offload.nouns.trace import Trace
from taskgraph_offload.plan.plan import ALIGNMENT, span_bytes

from ..strategies import Schedule, unique
from .fluid import Stock, Visits, subset_sums

# A machine is never what was measured. Other rates of the link, as shares of it, and what the step with each is worth.
# Rather faster than slower: estimates leave out what kernels wait for, so that calls rather take longer.
ERRORS: Final = {0.6: 0.1, 0.9: 0.2, 1.1: 0.4, 1.7: 0.1}
WORTH_A_COPY = (4, 32)  # latencies: a part that takes less time than this travels with its neighbour
_MANY_COPIES = 0.01  # of the step, in latencies: fewer copies are tried too
_CYCLES = 10
_SAME = 1e-9

Part = tuple[int, int, tuple[int, int]]  # bytes [start, stop) of the region, (their last reader, its seat)


class Seat(NamedTuple):
    """Bytes `[offset, offset + nbytes)` of the streaming region, and the visits of the bundle that has them."""

    offset: int
    nbytes: int
    visits: Visits


class Copy(NamedTuple):
    """Bytes `[start, stop)` of a seat for the unit `due`, once the unit `after` has ended (negative: a cycle ago)."""

    seat: int
    start: int
    stop: int
    due: int
    after: int


@dataclass(frozen=True)
class Draft:
    """A schedule in numbers. `bundles` are items next to each other: one seat for each bundle."""

    stock: Stock
    bundles: tuple[tuple[int, ...], ...]
    seats: tuple[Seat, ...]
    copies: tuple[Copy, ...]
    step_seconds: float
    others: Mapping[float, float]  # the step with each of the other links
    score: float

    def seconds(self, link: float) -> float:
        """The step with a link `link` times as fast as measured: 1.0, or one of `ERRORS`."""
        return self.step_seconds if link == 1.0 else self.others[link]


@dataclass(frozen=True)
class Drafter:
    """Makes drafts of one stock, for a capacity in bytes and a machine."""

    stock: Stock
    capacity: int
    machine: Machine

    def draft(self, streaming: Sequence[Sequence[int]], beat: float = inf) -> Draft | None:
        """Seat the items that stream (given for each unit), and time the cycle.

        None if they do not fit, or if the draft cannot have a better score than `beat`.
        """
        sizes, visits = self.stock.sizes, self.stock.visits
        streamed = sum(map(sizes.__getitem__, chain.from_iterable(streaming)))
        if self._least_score(0.0, streamed) >= beat:
            return None
        placed = ring(streaming, sizes, self.capacity - (self.stock.nbytes - streamed))
        if placed is None:
            return None
        bundles: list[tuple[int, ...]] = []
        seats: list[Seat] = []
        for offset, items in placed:
            for same_visits, neighbours in groupby(items, visits.__getitem__):
                bundle = tuple(neighbours)
                seats.append(Seat(offset, sum(map(sizes.__getitem__, bundle)), same_visits))
                bundles.append(bundle)
                offset += seats[-1].nbytes
        return self._timed(tuple(bundles), tuple(seats), beat)

    def everything_streams(self) -> Draft | None:
        """The draft in which nothing stays, the better of two rings: the largest possible, and the smallest."""
        small = replace(self, capacity=min(self.capacity, self.stock.largest_unit_bytes))
        best: Draft | None = None
        for drafter in (self, small):
            draft = drafter.draft(self.stock.everything.items)
            if draft is not None and (best is None or draft.score < best.score):
                best = draft
        return best

    def _least_score(self, step: float, streamed: int) -> float:
        """No draft that copies `streamed` bytes in each cycle, or has this step, has a lower score."""
        copying = streamed / self.machine.h2d_bytes_per_second
        computing = self.stock.compute_seconds
        step = max(step, computing, copying)
        return score(step, {link: max(step if link < 1 else computing, copying / link) for link in ERRORS})

    def _timed(self, bundles: tuple[tuple[int, ...], ...], seats: tuple[Seat, ...], beat: float) -> Draft | None:
        """The draft with these seats; where latencies matter, with fewer and larger copies if that is better."""
        usual, larger = WORTH_A_COPY
        draft = self._with_copies(bundles, seats, usual, beat)
        if draft is None or len(draft.copies) * self.machine.latency_seconds <= _MANY_COPIES * draft.step_seconds:
            return draft
        other = self._with_copies(bundles, seats, larger, draft.score)
        return other if other is not None and other.score < draft.score else draft

    def _with_copies(
        self, bundles: tuple[tuple[int, ...], ...], seats: tuple[Seat, ...], latencies: int, beat: float
    ) -> Draft | None:
        """Copies follow from the seats; then the cycle is run, with the link as it is and with the others."""
        seconds, rate, latency = self.stock.seconds, self.machine.h2d_bytes_per_second, self.machine.latency_seconds
        copies = copies_of(seats, len(seconds), int(latencies * latency * rate))
        if copies is None:
            return None
        step = steady_seconds(seconds, copies, rate, latency)
        if self._least_score(step, sum([stop - start for _, start, stop, _, _ in copies])) >= beat:
            return None
        others = {link: steady_seconds(seconds, copies, rate * link, latency) for link in ERRORS}
        return Draft(self.stock, bundles, seats, tuple(copies), step, others, score(step, others))


def score(step: float, others: Mapping[float, float]) -> float:
    """What a step is worth, the less the better: its seconds as measured, and with the other links."""
    return step + sum(weight * others[link] for link, weight in ERRORS.items())


def steady_seconds(seconds: Sequence[float], copies: Sequence[Copy], rate: float, latency: float) -> float:
    """How long a cycle takes once the cycles have settled; if they do not settle, the mean of the last ones."""
    units = len(seconds)
    work: list[list[tuple[float, int]]] = [[] for _ in seconds]
    for _, start, stop, due, after in copies:
        work[due].append((latency + (stop - start) / rate, after + units))
    ends = [0.0] * (2 * units)  # of the cycle before, then of this one
    link, end, took = 0.0, 0.0, [0.0]
    for _ in range(_CYCLES):
        begun = end
        ends[:units] = ends[units:]
        for unit, lasts in enumerate(seconds):
            waiting = work[unit]
            for copying, after in waiting:
                free = ends[after]
                link = (link if link > free else free) + copying
            if waiting and link > end:
                end = link
            end += lasts
            ends[units + unit] = end
        took.append(end - begun)
        if len(took) > 3 and abs(took[-1] - took[-2]) + abs(took[-2] - took[-3]) <= _SAME * took[-1]:
            return took[-1]
    return sum(took[-4:]) / 4


def ring(units: Sequence[Sequence[int]], sizes: Sequence[int], room: int) -> list[tuple[int, Sequence[int]]] | None:
    """Bundles with their offsets, from the items of each unit; None if a unit does not fit.

    >>> ring([[0], [1, 2], [3]], [4, 3, 2, 4], 9)
    [(0, [0]), (4, [1, 2]), (0, [3])]
    """
    bundles: list[tuple[int, Sequence[int]]] = []
    cursor = 0
    for unit in units:
        nbytes, bundle = sum(map(sizes.__getitem__, unit)), unit
        if nbytes > room:
            return None
        if cursor + nbytes > room:
            ahead, rest = split(unit, sizes, room - cursor)
            rest_bytes = sum(map(sizes.__getitem__, rest))
            if ahead and rest_bytes <= cursor:
                bundles.append((_longest_unused(bundles, sizes, cursor, room, nbytes - rest_bytes), ahead))
                nbytes, bundle = rest_bytes, rest
            cursor = 0
        if bundle:
            bundles.append((cursor, bundle))
        cursor += nbytes
    return bundles


def _longest_unused(
    bundles: Sequence[tuple[int, Sequence[int]]], sizes: Sequence[int], first: int, room: int, nbytes: int
) -> int:
    """Where to put so many bytes between `first` and the end: at `first`, or at the end if that was used longer ago."""
    last = max(first, (room - nbytes) // ALIGNMENT * ALIGNMENT)
    for offset, items in reversed(bundles):
        stop = offset + sum(map(sizes.__getitem__, items))
        if offset < last + nbytes and last < stop:
            return first
        if offset < first + nbytes and first < stop:
            return last
    return first


def split(unit: Sequence[int], sizes: Sequence[int], room: int) -> tuple[list[int], list[int]]:
    """Items of a unit that nearly fill the room, and the rest.

    >>> split([0, 1, 2], [5, 4, 3], 8)
    ([0, 2], [1])
    """
    largest_first = sorted(unit, key=sizes.__getitem__, reverse=True)
    sums = subset_sums(zip(largest_first, map(sizes.__getitem__, largest_first), strict=True), room)
    ahead, rest = list[int](), list[int]()
    for index in unit:
        (ahead if index in sums[max(sums)] else rest).append(index)
    return ahead, rest


def copies_of(seats: Sequence[Seat], units: int, least_bytes: int) -> list[Copy] | None:
    """The copies of a steady cycle in the order in which they are due; None if two seats of one unit overlap.

    A part of fewer than `least_bytes` is copied together with a neighbour. Bytes that no other seat has used since the
    last visit are still there, and are not copied. The cycle before is laid out first, because every copy depends on
    what it left in the region.
    """
    visits = sorted([(first, last, index) for index, seat in enumerate(seats) for first, last in seat.visits])
    region = ByteMap((-2 * units, -1))
    for _, last, index in visits:
        offset, nbytes, _ = seats[index]
        region.replace(offset, offset + nbytes, (last - units, index))
    copies: list[Copy] = []
    for first, last, index in visits:
        offset, nbytes, _ = seats[index]
        for start, stop, after in _joined(region.replace(offset, offset + nbytes, (last, index)), index, least_bytes):
            if after >= first:
                return None
            copies.append(Copy(index, start - offset, stop - offset, first, after))
    return copies


def _joined(parts: Sequence[Part], seat: int, least_bytes: int) -> list[tuple[int, int, int]]:
    """What of a seat must be copied: (start, stop, the unit that must have ended), the earliest first.

    Neighbours become one if the same unit reads them last, or if one of them is small.
    """
    joined: list[tuple[int, int, int]] = []
    for start, stop, (after, owner) in parts:
        if owner == seat:
            continue
        if joined and joined[-1][1] == start:
            before, middle, other = joined[-1]
            if other == after or min(middle - before, stop - start) < least_bytes:
                joined[-1] = before, stop, max(other, after)
                continue
        joined.append((start, stop, after))
    return sorted(joined, key=itemgetter(2))


def to_schedule(draft: Draft) -> Schedule:
    """The schedule of a draft. What stays lies behind the streaming region."""
    stock, trace = draft.stock, draft.stock.trace
    bundles: dict[str, tuple[str, ...]] = {}
    offsets: dict[str, int] = {}
    names: list[str] = []
    sizes: list[int] = []
    weights, cursor = list(map(attrgetter("weights"), stock.items)), 0
    for items, seat in zip(draft.bundles, draft.seats, strict=True):
        names.append(unique(trace.calls[seat.visits[0][0]].name, bundles))
        bundles[names[-1]] = tuple(chain.from_iterable(map(weights.__getitem__, items)))
        sizes.append(span_bytes(bundles[names[-1]], trace))
        offsets[names[-1]], cursor = seat.offset, max(cursor, seat.offset + seat.nbytes)
    steady = _steady(trace, draft.copies, names, sizes)
    streaming = set(chain.from_iterable(draft.bundles))
    for first_reader, items in enumerate(stock.everything.items):
        staying = sorted(set(items) - streaming)
        if staying:
            name = unique(f"{trace.calls[first_reader].name}:stays", bundles)
            bundles[name] = tuple(chain.from_iterable(map(weights.__getitem__, staying)))
            offsets[name] = cursor
            cursor += sum(map(stock.sizes.__getitem__, staying))
    copied = {names[copy.seat] for copy in draft.copies}
    return Schedule(bundles, frozenset(bundles) - copied, steady, offsets, fills_gaps=True, trace=trace)


def _steady(trace: Trace, copies: Sequence[Copy], names: Sequence[str], sizes: Sequence[int]) -> tuple[Task, ...]:
    """Computes in order; behind each one, the copies that it lets go, those of this cycle before those of the next."""
    count = len(trace.calls)
    behind: list[list[Task]] = [[] for _ in trace.calls]
    after = list(map(attrgetter("after"), copies))
    places = list(accumulate(after, max, initial=max(after, default=-1) - count))[1:]
    for next_cycle in (False, True):
        for copy, place in zip(copies, places, strict=True):
            if (place < 0) == next_cycle:
                name, size = names[copy.seat], sizes[copy.seat]
                stop = min(copy.stop, size)  # no copy goes beyond the last weight of its bundle
                whole = (copy.start, stop) == (0, size)
                behind[place % count].append(Task("h2d", name) if whole else Task("h2d", name, copy.start, stop))
    tasks: list[Task] = []
    for call, copied in zip(trace.calls, behind, strict=True):
        tasks += [Task("compute", call.name), *copied]
    return tuple(tasks)
