"""What can stream, as numbers: the units of a trace, and the items of weights that they read; and how much of it does.

A unit is a call: a whole block, or a part of one where `cut_finer` cuts the block. An item is weights that stay or
stream together: one large weight, or all small weights that the same units read. A visit is one stay of an item on the
device: it lasts from the first to the last of the neighbouring units that read the item. An item that distant units
read is copied again for each visit:

    units      0    1    2    3    4    5
    item a     [one visit]
    item b          [---]          [---]       two visits, one seat

How many bytes of each unit stream: first as if bytes were a fluid, then in whole items.

1. Candidates. What streams and the ring that it passes through come as a pair:

       missing  =  all items - capacity
       streamed =  missing + ring
       turns    =  streamed / ring       few: a large ring, much is fetched early and much is streamed
                                         many: a small ring, little is streamed, and just in time

   An item has one seat, so each byte of the ring is used a whole number of times in a cycle. Where the number of turns
   is no whole number, the last turn leaves a part of the ring unused. So whole numbers of turns are tried, too.

2. Flow. For each candidate: what must stream of each unit to keep a given pace. Given are the starts of the units, the
   bytes streamed in a cycle and the room that they pass through. Two sums are unknown: the bytes due when each unit
   starts, and the bytes copied at each start and each end.

       bytes
         ^                      ___/        copied: never faster than the link,
         |             ____/---/  /         not below what is due,
         |        /---/     _____/          not above what was due one unit before, plus the room
         |   /---/    _____/
         |  /    ____/                      due: grows by no more than the unit's bytes
         +--|----------|-------|----> time
          start      start   start

   Each constraint bounds a difference of two sums. So each sum is lowered to what the others allow, again and again.
   This ends in the highest solution below the first guess; if there is no solution, it never ends.

3. Rounding. Each unit streams the items whose sum brings the total nearest to what was asked:

       asked        3.0   6.0   9.0   12.0        bytes streamed, summed along the cycle
       unit's sums  0 4 8 in any unit
       chosen       4     4     8     12

   The error of one unit is passed on to the next one, so it never grows beyond half an item. Where few items stream,
   half an item is much. Then `trim` exchanges items of any units until the total is as asked.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from itertools import accumulate, chain, pairwise
from math import inf
from operator import attrgetter
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from taskgraph_offload.nouns.trace import Call, Piece, Trace
from taskgraph_offload.plan.plan import aligned

from ..bound import Cycle, steady_pace

_MOST_SUMS = 256
SMALL_BYTES = 256 << 10
SMALL_SHARE = 1 / 64  # of the unit that reads it: in a small model, small weights matter

Visits = tuple[tuple[int, int], ...]  # (first unit, last unit) of each, both included


class Item(NamedTuple):
    """Weights that stay or stream together."""

    weights: tuple[str, ...]
    nbytes: int
    visits: Visits


@dataclass(frozen=True)
class Streamable:
    """The items that may stream. For each unit: the items whose first visit begins there, their sizes, their sum.

    `count` is how many items there are, and `largest` the bytes of the largest one.
    """

    items: tuple[tuple[int, ...], ...]
    sizes: tuple[tuple[int, ...], ...]
    nbytes: NDArray[np.float64]
    count: int
    largest: int


@dataclass(frozen=True)
class Stock:
    """The items of a trace, and the seconds of its units. `sizes` and `visits` are those of each item."""

    trace: Trace
    seconds: tuple[float, ...]
    items: tuple[Item, ...]
    sizes: list[int]
    visits: list[Visits]
    nbytes: int
    compute_seconds: float
    _up_to: dict[int, Streamable] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def everything(self) -> Streamable:
        """All items may stream."""
        return self._streamable(range(len(self.items)))

    @cached_property
    def largest_unit_bytes(self) -> int:
        """The bytes that the most demanding unit reads: no arena can be smaller."""
        needs = [0] * len(self.seconds)
        for item in self.items:
            for first, last in item.visits:
                for unit in range(first, last + 1):
                    needs[unit] += item.nbytes
        return max(needs)

    def up_to(self, largest: int) -> Streamable:
        """Only items of at most `largest` bytes that are copied once per cycle may stream."""
        if largest not in self._up_to:
            once = [i for i, item in enumerate(self.items) if item.nbytes <= largest and len(item.visits) == 1]
            self._up_to[largest] = self._streamable(once)
        return self._up_to[largest]

    def limits_that_leave(self, nbytes: float) -> list[int]:
        """Every limit with which items of at least `nbytes` together may stream (see `up_to`), the largest first."""
        sizes = sorted(item.nbytes for item in self.items if len(item.visits) == 1)
        first = bisect_left(list(accumulate(sizes)), nbytes)
        return sorted(set(sizes[first:]), reverse=True)

    def _streamable(self, chosen: range | list[int]) -> Streamable:
        items: list[list[int]] = [[] for _ in self.seconds]
        for index in chosen:
            items[self.visits[index][0][0]].append(index)
        sizes = tuple([tuple(map(self.sizes.__getitem__, unit)) for unit in items])
        nbytes = np.array(list(map(sum, sizes)), dtype=np.float64)
        largest = max(map(self.sizes.__getitem__, chosen), default=0)
        return Streamable(tuple(map(tuple, items)), sizes, nbytes, len(chosen), largest)


def subset_sums(sizes: Iterable[tuple[int, int]], room: float = inf) -> dict[int, tuple[int, ...]]:
    """Sums of subsets of some sizes, given as (name, bytes), and for each sum the names of one such subset.

    There are 256 of them at most. Within a room: the first ones that are found. Without one: sums that are evenly
    spread, the smallest and the largest among them.

    >>> subset_sums([(7, 2), (8, 3)])
    {0: (), 2: (7,), 3: (8,), 5: (7, 8)}
    """
    found: dict[int, tuple[int, ...]] = {0: ()}
    for name, nbytes in sizes:
        for total, chosen in list(found.items()):
            if room == inf or (total + nbytes <= room and len(found) < _MOST_SUMS):
                found.setdefault(total + nbytes, (*chosen, name))
        if len(found) > _MOST_SUMS:
            totals = sorted(found)
            step = (len(totals) - 1) / (_MOST_SUMS - 1)
            found = {totals[round(i * step)]: found[totals[round(i * step)]] for i in range(_MOST_SUMS)}
    return found


def take_stock(trace: Trace, seconds: tuple[float, ...]) -> Stock:
    """The items of a trace; the items of one unit stand next to each other."""
    by_visits: dict[Visits, list[str]] = {}
    for name, readers in trace.readers.items():
        if name not in trace.fixed:
            by_visits.setdefault(visits_of(readers), []).append(name)
    items: list[Item] = []
    for visits, names in sorted(by_visits.items()):
        items += _items(trace, visits, names)
    sizes = list(map(attrgetter("nbytes"), items))
    return Stock(trace, seconds, tuple(items), sizes, list(map(attrgetter("visits"), items)), sum(sizes), sum(seconds))


def visits_of(readers: Sequence[int]) -> Visits:
    """One visit for neighbouring readers.

    >>> visits_of([0, 1, 4])
    ((0, 1), (4, 4))
    """
    visits: list[tuple[int, int]] = []
    for reader in readers:
        if visits and visits[-1][1] >= reader - 1:
            visits[-1] = visits[-1][0], reader
        else:
            visits.append((reader, reader))
    return tuple(visits)


def _items(trace: Trace, visits: Visits, names: list[str]) -> list[Item]:
    """One item for each large weight, and one for all small weights together."""
    sizes = {name: aligned(trace.weights[name].nbytes) for name in names}
    limit = min(SMALL_BYTES, sum(sizes.values()) * SMALL_SHARE)
    items: list[Item] = []
    small: list[str] = []
    for name, nbytes in sizes.items():
        if nbytes < limit:
            small.append(name)
        else:
            items.append(Item((name,), nbytes, visits))
    return items + ([Item(tuple(small), sum(map(sizes.__getitem__, small)), visits)] if small else [])


def cut_finer(trace: Trace, least_bytes: int, whole: Container[str] = ()) -> Trace:
    """The same trace with smaller units: calls are cut into parts that each read `least_bytes` or more that can stream.

        call      blocks.3 [ norm | q | k | v | out | norm | up   | down ]       pieces
        finer     blocks.3/0 [ norm  q  k  v ]  /1 [ out  norm  up ]  /2 [ down ]

    Smaller units need less room: the weights of the first part can be overwritten while the second part computes. No
    weight, no piece and no cost changes. The calls that `whole` names are not cut.

    >>> unit = {"name": "a", "seconds": 1.0, "tensors": [4, 4, 4], "tensor_seconds": [1, 1, 2]}
    >>> [call.name for call in cut_finer(Trace.from_units([unit]), 8).calls]
    ['a/0', 'a/1']
    """
    calls: list[Call] = []
    for call in trace.calls:
        parts = [] if call.name in whole else list(_parts(trace, call, least_bytes))
        if len(parts) > 1:
            calls += [replace(call, name=f"{call.name}/{i}", pieces=tuple(part)) for i, part in enumerate(parts)]
        else:
            calls.append(call)
    return replace(trace, calls=tuple(calls))


def _parts(trace: Trace, call: Call, least_bytes: int) -> Iterator[list[Piece]]:
    """The pieces of each part; a part ends only where a later piece reads a weight."""
    last_reading = 0
    for index, piece in enumerate(call.pieces):
        last_reading = index if piece.reads else last_reading
    part: list[Piece] = []
    read: set[str] = set()
    nbytes = 0
    for index, piece in enumerate(call.pieces):
        part.append(piece)
        for name in (*piece.reads, *piece.writes):
            if name not in read and name not in trace.fixed:
                read.add(name)
                nbytes += trace.weights[name].nbytes
        if index < last_reading and nbytes >= least_bytes:
            yield part
            part, read, nbytes = [], set(), 0
    if part:
        yield part


Numbers: TypeAlias = NDArray[np.float64]
Chosen: TypeAlias = tuple[tuple[int, ...], ...]  # for each unit: the items that stream

_SLOWER = (0.0, 0.001, 0.003, 0.006, 0.01, 0.02, 0.04)  # than the best pace of a capacity and a ring
_SMALLEST_RING = 0.4  # in usual items
_RING_STEP = 1.2
_RINGS = 40
_FEW_TURNS = 6  # fewer need not be whole: a larger ring would stream too much
_SWEEPS = 40
_MOST_EXCHANGES = 6
_CLOSE = 0.001


@dataclass(frozen=True)
class Candidate:
    """Bytes of each unit that would stream, and the pace that they would keep if they were a fluid."""

    pace: float
    streamed: float
    residency: Numbers
    streamable: Streamable


def candidates(
    streamable: Streamable, seconds: tuple[float, ...], rate: float, missing: float, usual: float, most_seconds: float
) -> list[Candidate]:
    """For each ring that works when `missing` bytes cannot stay: the best pace it can keep; the fastest first.

    `usual` are the bytes of a usual item. Paces of `most_seconds` or more are left out.
    """
    total = float(streamable.nbytes.sum())
    if missing >= total:
        return []
    pace = steady_pace(Cycle(seconds, streamable.nbytes.tolist(), [total - missing] * len(seconds)), rate)
    starts, lasting = np.array(pace.starts), np.array(seconds)
    found = []
    for ring in _rings(missing, max(usual * _SMALLEST_RING, streamable.largest), total):
        streamed = missing + ring
        least = max(1.0, streamed / (rate * pace.seconds))  # a pace at which the link carries as much
        low, high = 0, bisect_left([pace.seconds * least * (1 + more) for more in _SLOWER], most_seconds)
        best: Candidate | None = None
        while low < high:  # the fastest pace that a residency keeps
            middle = (low + high) // 2
            longer = least * (1 + _SLOWER[middle]) * (1 + 1e-9)
            flow = Flow.at(pace.seconds * longer, starts * longer, lasting, rate)
            residency = flow.residency(streamable.nbytes, streamed, ring)
            if residency is None:
                low = middle + 1
            else:
                high, best = middle, Candidate(flow.pace, streamed, residency, streamable)
        if best is not None:
            found.append(best)
    return sorted(found, key=attrgetter("pace", "streamed"))


def _rings(missing: float, smallest: float, total: float) -> list[float]:
    """Sizes from the smallest on, by a constant factor, with whole turns; a few turns need not be whole."""
    wanted = set[float]()
    for i in range(_RINGS):
        ring = smallest * _RING_STEP**i
        turns = 1 + missing / ring
        if turns >= 1.5:
            wanted.add(missing / (round(turns) - 1))
        if turns < _FEW_TURNS:
            wanted.add(ring)
    return sorted([ring for ring in wanted if missing + ring <= total])


@dataclass(frozen=True)
class Flow:
    """A steady cycle at some pace, as the bytes that the link carries in it.

    `carried` holds two figures for each unit: from the end before it to its start, and from its start to its end.
    """

    pace: float
    carried: Numbers

    @staticmethod
    def at(pace: float, starts: Numbers, seconds: Numbers, rate: float) -> Flow:
        """The flow of units that start at these times, in cycles of `pace` seconds."""
        ends = starts + seconds
        before = np.concatenate(([ends[-1] - pace], ends[:-1]))
        carried = np.empty(2 * len(starts))
        carried[0::2], carried[1::2] = np.maximum(starts - before, 0.0) * rate, seconds * rate
        return Flow(pace, carried)

    def residency(self, nbytes: Numbers, streamed: float, room: float) -> Numbers | None:
        """What streams of each unit's bytes, near the same share of each; None if no residency keeps the pace."""
        if streamed > self.carried.sum() * (1 + 1e-9):
            return None
        due = np.cumsum(nbytes * (streamed / nbytes.sum()))
        copied = np.repeat(due + room, 2)
        due_limits, copied_limits = np.cumsum(np.tile(nbytes, 2)), np.cumsum(np.tile(self.carried, 2))
        close = 1e-9 * (streamed + room)
        before = due.sum()
        for _ in range(_SWEEPS):
            copied = _settle(copied, copied_limits, streamed)
            due = _settle(np.minimum(due, copied[0::2]), due_limits, streamed)
            copied[1] = min(copied[1], due[-1] - streamed + room)
            copied[3::2] = np.minimum(copied[3::2], due[:-1] + room)
            after = due.sum()
            if before - after <= close and bool((due <= _settle(copied, copied_limits, streamed)[0::2] + close).all()):
                return np.clip(np.diff(due, prepend=due[-1] - streamed), 0.0, nbytes)
            before = after
        return None


def _settle(sums: Numbers, limits: Numbers, cycle: float) -> Numbers:
    """The highest sums, none above the given ones, that never fall and never grow by more than the limits do.

    They go round: the sums of the next cycle are these plus `cycle`. `limits` says how much sums may have grown since
    the beginning of the cycle before this one.

    >>> _settle(np.array([5.0, 9.0, 7.0]), np.cumsum([1.0, 2.0, 3.0, 1.0, 2.0, 3.0]), 6.0).tolist()
    [2.0, 4.0, 7.0]
    """
    count = len(sums)
    twice = np.concatenate((sums - cycle, sums)) - limits
    grown = np.minimum.accumulate(twice)[count:] + limits[count:]
    fallen = np.minimum.accumulate(grown[::-1])[::-1]
    settled: Numbers = np.minimum(fallen, fallen[0] + cycle)
    return settled


def roundings(candidate: Candidate, by_units: bool) -> list[Chosen]:
    """For each unit, the items that stream: with optimised and with equal shares, each also trimmed.

    With `by_units`, also choices that stream or keep units as a whole.
    """
    streamable = candidate.streamable
    items, sizes = streamable.items, streamable.sizes
    equal = streamable.nbytes * (candidate.streamed / streamable.nbytes.sum())
    found: list[Chosen] = []
    for asked in (candidate.residency.tolist(), equal.tolist()):
        rounded = round_to_items(asked, sizes)
        for chosen in (rounded, trim(rounded, sizes, candidate.streamed)):
            found.append(tuple([tuple(map(unit.__getitem__, some)) for unit, some in zip(items, chosen, strict=True)]))
        if by_units:
            whole = round_to_items(asked, list(zip(map(int, streamable.nbytes), strict=True)))
            found.append(tuple([unit if some else () for unit, some in zip(items, whole, strict=True)]))
    return found


_ALIKE = 8  # so many units with the same items are a pattern


def patterns(stock: Stock, missing: int) -> Iterator[Chosen]:
    """Choices in which the same items of evenly spread units stream, for models that are many times the same block.

    The ring holds what streams of a unit, and one item of the next unit: while a unit computes, the link brings that. A
    few more units stream one item, so that the ring has this size.
    """
    alike: dict[tuple[int, ...], list[int]] = {}
    for unit, sizes in enumerate(stock.everything.sizes):
        alike.setdefault(tuple(sorted(sizes)), []).append(unit)
    sizes, units = max(alike.items(), key=lambda found: sum(found[0]) * len(found[1]))
    if len(units) < _ALIKE:
        return
    for streamed, chosen in subset_sums(enumerate(sizes)).items():
        for ahead in {sizes[place] for place in chosen}:
            count, rest = divmod(missing + streamed + ahead, streamed)
            more = -(-rest // ahead)
            if count > 0 and count + more <= len(units):
                yield _pattern(stock, units, [sizes[place] for place in chosen], count, ahead, more)


def _pattern(stock: Stock, units: Sequence[int], sizes: Sequence[int], count: int, ahead: int, more: int) -> Chosen:
    """Items of these sizes in `count` evenly spread units, and one of `ahead` bytes in `more` of the others."""
    total = len(units)
    whole = {unit for i, unit in enumerate(units) if (i + 1) * count // total != i * count // total}
    others = [unit for unit in units if unit not in whole]
    single = {others[i * len(others) // more] for i in range(more)} if more else set[int]()
    found: list[tuple[int, ...]] = []
    for unit, items in enumerate(stock.everything.items):
        wanted = Counter(sizes if unit in whole else [ahead] if unit in single else ())
        taken = []
        for item in items:
            if wanted[stock.sizes[item]] > 0:
                wanted[stock.sizes[item]] -= 1
                taken.append(item)
        found.append(tuple(taken))
    return tuple(found)


@lru_cache(maxsize=4096)
def _sums_of(sizes: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    """Sums of subsets of a unit's items, in order, and for each sum the positions of the items."""
    ordered = sorted(subset_sums(enumerate(sizes)).items())
    sums, subsets = zip(*ordered, strict=True)
    return sums, subsets


def round_to_items(asked: Sequence[float], sizes: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """For each unit: the positions of the items that stream, from the bytes that were asked for."""
    chosen: list[tuple[int, ...]] = []
    missing = 0.0
    for want, unit_sizes in zip(asked, sizes, strict=True):
        sums, subsets = _sums_of(unit_sizes)
        missing += want
        upper = min(bisect_left(sums, missing), len(sums) - 1)
        lower = max(upper - 1, 0)
        place = upper if missing - sums[lower] >= 0.5 * (sums[upper] - sums[lower]) else lower
        chosen.append(subsets[place])
        missing -= sums[place]
    return chosen


def trim(chosen: Sequence[tuple[int, ...]], sizes: Sequence[tuple[int, ...]], least: float) -> list[tuple[int, ...]]:
    """The same choice; if it is less than `least` bytes or noticeably more, with a few items exchanged for others.

    >>> trim([(0,), (0,)], [(4,), (5,), (3,)], 6)
    [(0,), (), (0,)]
    """
    begins = list(accumulate(map(len, sizes), initial=1))  # position 0 stands for "no item"
    nbytes = np.array([0, *chain.from_iterable(sizes)], dtype=np.float64)
    inside = np.zeros(len(nbytes), dtype=bool)
    inside[[begin + i for begin, some in zip(begins, chosen, strict=False) for i in some]] = True
    for _ in range(_MOST_EXCHANGES):
        over = nbytes[inside].sum() - least
        leaving, coming = np.append(0, np.flatnonzero(inside)), np.append(0, np.flatnonzero(~inside))
        coming = coming[np.argsort(nbytes[coming], kind="stable")]
        best = np.searchsorted(nbytes[coming], nbytes[leaving] - over)
        fits = best < len(coming)
        if not fits.any():
            break
        leaving, partner = leaving[fits], coming[best[fits]]
        left = over - nbytes[leaving] + nbytes[partner]
        which = int(np.argmin(left))
        if 0 <= over <= max(left[which], least * _CLOSE):
            break
        inside[leaving[which]], inside[partner[which]] = False, True
    return [tuple(np.flatnonzero(inside[begin:end]).tolist()) for begin, end in pairwise(begins)]
