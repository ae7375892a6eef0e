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

from collections.abc import Container, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from taskgraph_offload.nouns.trace import Call, Piece, Trace
from taskgraph_offload.plan.plan import aligned

SMALL_BYTES = 256 << 10
SMALL_SHARE = 1 / 64  # of the unit that reads it: in a small model, small weights matter

Visits = tuple[tuple[int, int], ...]  # (first unit, last unit) of each, both included


class Item(NamedTuple):
    """Weights that stay or stream together."""

    weights: tuple[str, ...]
    nbytes: int
    visits: Visits

    def may_stream(self, largest: int) -> bool:
        """Whether the item has at most `largest` bytes and is copied only once per cycle."""
        return self.nbytes <= largest and len(self.visits) == 1


@dataclass(frozen=True)
class Streamable:
    """The items that may stream. For each unit: the items whose first visit begins there, their sizes, their sum."""

    items: tuple[tuple[int, ...], ...]
    sizes: tuple[tuple[int, ...], ...]
    nbytes: NDArray[np.float64]

    @cached_property
    def count(self) -> int:
        """How many items there are."""
        return sum(map(len, self.items))

    @cached_property
    def largest(self) -> int:
        """The bytes of the largest item."""
        return max((max(sizes) for sizes in self.sizes if sizes), default=0)


@dataclass(frozen=True)
class Stock:
    """The items of a trace, and the seconds of its units."""

    trace: Trace
    seconds: tuple[float, ...]
    items: tuple[Item, ...]
    _up_to: dict[int, Streamable] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def sizes(self) -> list[int]:
        """The bytes of each item."""
        return [item.nbytes for item in self.items]

    @cached_property
    def visits(self) -> list[Visits]:
        """The visits of each item."""
        return [item.visits for item in self.items]

    @cached_property
    def nbytes(self) -> int:
        """The bytes of all items together."""
        return sum(self.sizes)

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
            self._up_to[largest] = self._streamable([i for i, it in enumerate(self.items) if it.may_stream(largest)])
        return self._up_to[largest]

    def limits_that_leave(self, nbytes: float) -> list[int]:
        """Every limit with which items of at least `nbytes` together may stream (see `up_to`), the largest first."""
        sizes = sorted(item.nbytes for item in self.items if len(item.visits) == 1)
        enough = {size for size, total in zip(sizes, accumulate(sizes), strict=True) if total >= nbytes}
        return sorted(enough, reverse=True)

    def _streamable(self, chosen: range | list[int]) -> Streamable:
        items: list[list[int]] = [[] for _ in self.seconds]
        for index in chosen:
            items[self.visits[index][0][0]].append(index)
        sizes = tuple([tuple(map(self.sizes.__getitem__, unit)) for unit in items])
        return Streamable(tuple(map(tuple, items)), sizes, np.array(list(map(sum, sizes)), dtype=np.float64))


def take_stock(trace: Trace, seconds: tuple[float, ...]) -> Stock:
    """The items of a trace; the items of one unit stand next to each other."""
    by_visits: dict[Visits, list[str]] = {}
    for name, readers in trace.readers.items():
        if name not in trace.fixed:
            by_visits.setdefault(_visits(readers), []).append(name)
    items = [item for visits, names in sorted(by_visits.items()) for item in _items(trace, visits, names)]
    return Stock(trace, seconds, tuple(items))


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
    small = [name for name in names if sizes[name] < limit]
    items = [Item((name,), sizes[name], visits) for name in names if sizes[name] >= limit]
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
    last_reading = max((i for i, piece in enumerate(call.pieces) if piece.reads), default=0)
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
