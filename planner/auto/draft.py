"""A draft: who streams, where in the region, by which copies, and how fast that is. The search compares drafts.

The arena of every draft looks like this:

    |<---- streaming region: a ring ---->|<------ what stays ------>|
    0                                  room                     capacity
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from math import inf

from taskgraph_offload.nouns.machine import Machine

from .copies import Copy, Seat, copies_of
from .items import Stock
from .rehearse import steady_seconds
from .ring import ring

SLOWER_LINK, FASTER_LINK = 0.6, 1.7  # a machine is never what was measured:
_WEIGHT = 0.1  # what also does well with a slower link, or a faster one, is worth a little
_WORTH_A_COPY = (4, 32)  # latencies: a part that takes less time than this travels with its neighbour
_MANY_COPIES = 0.01  # of the step, in latencies: fewer copies are tried too


@dataclass(frozen=True)
class Draft:
    """A schedule in numbers. `runs` are items next to each other: one seat each."""

    stock: Stock
    runs: tuple[tuple[int, ...], ...]
    seats: tuple[Seat, ...]
    copies: tuple[Copy, ...]
    step_seconds: float
    others: Mapping[float, float]  # the step with a slower and with a faster link
    score: float

    def seconds(self, link: float) -> float:
        """The step with a link so many times as fast as measured: as it is, the slower or the faster one."""
        return self.step_seconds if link == 1.0 else self.others[link]

    @property
    def streaming(self) -> frozenset[int]:
        """The items that do not stay."""
        return frozenset(index for run in self.runs for index in run)


@dataclass(frozen=True)
class Desk:
    """Where drafts are made: what there is, the bytes it must fit into, and the machine."""

    stock: Stock
    capacity: int
    machine: Machine

    def draft(self, streaming: Sequence[Sequence[int]], beat: float = inf) -> Draft | None:
        """Seat what streams of each unit, and time it; None where it does not fit, or cannot beat a score."""
        items = self.stock.items
        streamed = sum(items[index].nbytes for unit in streaming for index in unit)
        room = self.capacity - (self.stock.nbytes - streamed)
        if self._least_score(0.0, streamed) >= beat:
            return None
        placed = ring([[(index, items[index].nbytes) for index in unit] for unit in streaming], room)
        if placed is None:
            return None
        return self._timed([seat for unit in placed for offset, run in unit for seat in self._seats(offset, run)], beat)

    def _seats(self, offset: int, run: Sequence[int]) -> Iterator[tuple[int, tuple[int, ...]]]:
        """A run cut where one item pays other visits than the next."""
        for _, members in groupby(run, key=lambda index: self.stock.items[index].visits):
            part = tuple(members)
            yield offset, part
            offset += sum(self.stock.items[index].nbytes for index in part)

    def everything_streams(self) -> Draft | None:
        """The draft in which nothing stays, the better of two rings: as large as it may be, and as small as it can."""
        small = replace(self, capacity=min(self.capacity, self.stock.largest_unit_bytes))
        drafts = [desk.draft(self.stock.everything.items) for desk in (self, small)]
        return min((draft for draft in drafts if draft is not None), key=lambda draft: draft.score, default=None)

    def _least_score(self, step: float, streamed: int) -> float:
        """A score that no draft falls below with so many bytes, or with such a step."""
        copying = streamed / self.machine.h2d_bytes_per_second
        step = max(step, self._computing, copying)
        return score(step, max(step, copying / SLOWER_LINK), max(self._computing, copying / FASTER_LINK))

    @cached_property
    def _computing(self) -> float:
        return sum(self.stock.seconds)

    def _timed(self, placed: Sequence[tuple[int, tuple[int, ...]]], beat: float) -> Draft | None:
        """The draft with these runs; where latencies matter, with fewer and larger copies if that is better."""
        usual, larger = _WORTH_A_COPY
        draft = self._rehearsed(placed, usual, beat)
        if draft is None or len(draft.copies) * self.machine.latency_seconds <= _MANY_COPIES * draft.step_seconds:
            return draft
        other = self._rehearsed(placed, larger, draft.score)
        return other if other is not None and other.score < draft.score else draft

    def _rehearsed(self, placed: Sequence[tuple[int, tuple[int, ...]]], latencies: int, beat: float) -> Draft | None:
        """Copies follow from the seats; then the cycle is run, also with a slower and a faster link."""
        items, seconds, machine = self.stock.items, self.stock.seconds, self.machine
        rate, latency = machine.h2d_bytes_per_second, machine.latency_seconds
        seats = [Seat(offset, sum(items[i].nbytes for i in run), items[run[0]].visits) for offset, run in placed]
        copies = copies_of(seats, len(seconds), int(latencies * latency * rate))
        if copies is None:
            return None
        step = steady_seconds(seconds, copies, rate, latency)
        if self._least_score(step, sum(copy.stop - copy.start for copy in copies)) >= beat:
            return None
        others = {link: steady_seconds(seconds, copies, rate * link, latency) for link in (SLOWER_LINK, FASTER_LINK)}
        runs = tuple(run for _, run in placed)
        return Draft(self.stock, runs, tuple(seats), tuple(copies), step, others, score(step, *others.values()))


def score(step: float, slower: float, faster: float) -> float:
    """What a step is worth, the less the better: its seconds as measured, and with a slower and a faster link."""
    return step + _WEIGHT * (slower + faster)
