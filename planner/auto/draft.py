"""A draft: which items stream, their seats and copies, and how fast that is. The search compares drafts.

The arena of every draft looks like this:

    |<---- streaming region: a ring ---->|<------ what stays ------>|
    0                                  room                     capacity

`steady_seconds` runs the cycle again and again on plain numbers. It finds the same longest path as `Plan.predict`:

    h2d      [--copy--][copy]   [--copy--]       a copy waits for the link, and for the unit whose bytes it overwrites
    compute       [--- unit ---][- unit -]       a unit waits for the unit before it, and for its own copies

`to_schedule` gives names to what travels together, and puts the tasks of a steady cycle in order. Each copy stands as
early as it may, behind the last unit whose bytes it overwrites. The first copies of the next cycle stand behind the
last units of this one:

    compute a | h2d c | compute b | h2d a | compute c | h2d b        (a and b: for the next cycle)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, chain, groupby
from math import inf

from taskgraph_offload.nouns.graph import Task
from taskgraph_offload.nouns.machine import Machine
from taskgraph_offload.nouns.trace import Trace
from taskgraph_offload.plan.plan import span_bytes

from ..strategy import Schedule, unique
from .ring import Copy, Seat, copies_of, ring
from .stock import Stock

SLOWER_LINK, FASTER_LINK = 0.6, 1.7  # a machine is never what was measured:
_WEIGHT = 0.1  # a draft that is good with a slower or a faster link, too, is worth a little more
_WORTH_A_COPY = (4, 32)  # latencies: a part that takes less time than this travels with its neighbour
_MANY_COPIES = 0.01  # of the step, in latencies: fewer copies are tried too
_CYCLES = 10
_SAME = 1e-9


@dataclass(frozen=True)
class Draft:
    """A schedule in numbers. `bundles` are items next to each other: one seat for each bundle."""

    stock: Stock
    bundles: tuple[tuple[int, ...], ...]
    seats: tuple[Seat, ...]
    copies: tuple[Copy, ...]
    step_seconds: float
    others: Mapping[float, float]  # the step with a slower and with a faster link
    score: float

    def seconds(self, link: float) -> float:
        """The step with a link `link` times as fast as measured: 1.0, or one of `others`."""
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
        drafts = [drafter.draft(self.stock.everything.items) for drafter in (self, small)]
        return min((draft for draft in drafts if draft is not None), key=lambda draft: draft.score, default=None)

    def _least_score(self, step: float, streamed: int) -> float:
        """No draft that streams `streamed` bytes, or has this step, has a lower score."""
        copying = streamed / self.machine.h2d_bytes_per_second
        step = max(step, self._computing, copying)
        return score(step, max(step, copying / SLOWER_LINK), max(self._computing, copying / FASTER_LINK))

    @cached_property
    def _computing(self) -> float:
        return sum(self.stock.seconds)

    def _timed(self, bundles: tuple[tuple[int, ...], ...], seats: tuple[Seat, ...], beat: float) -> Draft | None:
        """The draft with these seats; where latencies matter, with fewer and larger copies if that is better."""
        usual, larger = _WORTH_A_COPY
        draft = self._with_copies(bundles, seats, usual, beat)
        if draft is None or len(draft.copies) * self.machine.latency_seconds <= _MANY_COPIES * draft.step_seconds:
            return draft
        other = self._with_copies(bundles, seats, larger, draft.score)
        return other if other is not None and other.score < draft.score else draft

    def _with_copies(
        self, bundles: tuple[tuple[int, ...], ...], seats: tuple[Seat, ...], latencies: int, beat: float
    ) -> Draft | None:
        """Copies follow from the seats; then the cycle is run, with the link as it is, a slower and a faster one."""
        seconds, rate, latency = self.stock.seconds, self.machine.h2d_bytes_per_second, self.machine.latency_seconds
        copies = copies_of(seats, len(seconds), int(latencies * latency * rate))
        if copies is None:
            return None
        step = steady_seconds(seconds, copies, rate, latency)
        if self._least_score(step, sum([stop - start for _, start, stop, _, _ in copies])) >= beat:
            return None
        others = {link: steady_seconds(seconds, copies, rate * link, latency) for link in (SLOWER_LINK, FASTER_LINK)}
        return Draft(self.stock, bundles, seats, tuple(copies), step, others, score(step, *others.values()))


def score(step: float, slower: float, faster: float) -> float:
    """What a step is worth, the less the better: its seconds as measured, and with a slower and a faster link."""
    return step + _WEIGHT * (slower + faster)


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


def to_schedule(draft: Draft) -> Schedule:
    """The schedule of a draft. What stays lies behind the streaming region."""
    stock, trace = draft.stock, draft.stock.trace
    bundles: dict[str, tuple[str, ...]] = {}
    offsets: dict[str, int] = {}
    names: list[str] = []
    for items, seat in zip(draft.bundles, draft.seats, strict=True):
        names.append(unique(trace.calls[seat.visits[0][0]].name, bundles))
        bundles[names[-1]] = tuple(weight for index in items for weight in stock.items[index].weights)
        offsets[names[-1]] = seat.offset
    steady = _steady(trace, draft.copies, names, [span_bytes(bundles[name], trace) for name in names])
    cursor = max((seat.offset + seat.nbytes for seat in draft.seats), default=0)
    for first_reader, staying in _staying(draft):
        name = unique(f"{trace.calls[first_reader].name}:stays", bundles)
        bundles[name] = tuple(weight for index in staying for weight in stock.items[index].weights)
        offsets[name] = cursor
        cursor += sum(map(stock.sizes.__getitem__, staying))
    copied = {names[copy.seat] for copy in draft.copies}
    return Schedule(bundles, frozenset(bundles) - copied, steady, offsets, fills_gaps=True, trace=trace)


def _staying(draft: Draft) -> Iterator[tuple[int, list[int]]]:
    """The items that stay, by the first unit that reads them."""
    streaming = set(chain.from_iterable(draft.bundles))
    for unit, items in enumerate(draft.stock.everything.items):
        staying = [index for index in items if index not in streaming]
        if staying:
            yield unit, staying


def _steady(trace: Trace, copies: Sequence[Copy], names: Sequence[str], sizes: Sequence[int]) -> tuple[Task, ...]:
    """Computes in order; behind each one, the copies that it lets go, those of this cycle before those of the next."""
    count = len(trace.calls)
    behind: list[list[Task]] = [[] for _ in trace.calls]
    ready = max((copy.after for copy in copies), default=-1) - count
    places = list(accumulate((copy.after for copy in copies), max, initial=ready))[1:]
    for next_cycle in (False, True):
        for copy, place in zip(copies, places, strict=True):
            if (place < 0) == next_cycle:
                behind[place % count].append(_task(copy, names[copy.seat], sizes[copy.seat]))
    return tuple(
        task for call, copied in zip(trace.calls, behind, strict=True) for task in (Task("compute", call.name), *copied)
    )


def _task(copy: Copy, name: str, size: int) -> Task:
    """The task of a copy: no copy goes beyond the last weight of its bundle."""
    stop = min(copy.stop, size)
    return Task("h2d", name) if (copy.start, stop) == (0, size) else Task("h2d", name, copy.start, stop)
