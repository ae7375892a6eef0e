"""What can stream, as numbers: the units of a trace, and the items of weights that they read. Decides nothing.

A unit is a call: a whole block, or a part of one where `cut_finer` cuts the block. An item is weights that stay or
stream together: one large weight, or all small weights that the same units read. A visit is one stay of an item on the
device: it lasts from the first to the last of the neighbouring units that read the item. An item that distant units
read is copied again for each visit:

    units      0    1    2    3    4    5
    item a     [one visit]
    item b          [---]          [---]       two visits, one seat
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from math import inf
from operator import attrgetter
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from taskgraph_offload.nouns.trace import Call, Piece, Trace
from taskgraph_offload.plan.plan import aligned

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
            by_visits.setdefault(_visits(readers), []).append(name)
    items: list[Item] = []
    for visits, names in sorted(by_visits.items()):
        items += _items(trace, visits, names)
    sizes = list(map(attrgetter("nbytes"), items))
    return Stock(trace, seconds, tuple(items), sizes, list(map(attrgetter("visits"), items)), sum(sizes), sum(seconds))


def _visits(readers: tuple[int, ...]) -> Visits:
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
