"""What can stream, as numbers: items of weights, and the visits that each pays to the device in a cycle.

Weights that the same units read, and that are too small to be worth a decision of their own, are one item. A visit
lasts from the first to the last of neighbouring units that read the item; an item that distant units read comes again:

    units      0    1    2    3    4    5
    item a     [one visit]
    item b          [---]          [---]       two visits, one seat

This module decides nothing: whether an item stays or streams is for others.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from taskgraph_offload.nouns.trace import Trace
from taskgraph_offload.plan.plan import aligned

SMALL_BYTES = 256 << 10
SMALL_SHARE = 1 / 64  # of the unit that reads it: in a small model, small things matter


@dataclass(frozen=True)
class Item:
    """Weights that stay or stream together. `visits` are pairs of units, both included."""

    weights: tuple[str, ...]
    nbytes: int
    visits: tuple[tuple[int, int], ...]

    @property
    def unit(self) -> int:
        """The first unit that reads it."""
        return self.visits[0][0]

    def may_stream(self, largest: int) -> bool:
        """Whether it is of so many bytes at most, and comes once in a cycle."""
        return self.nbytes <= largest and len(self.visits) == 1


@dataclass(frozen=True)
class Units:
    """For each unit: items, the bytes of each, and their sum."""

    items: tuple[tuple[int, ...], ...]
    sizes: tuple[tuple[int, ...], ...]
    nbytes: NDArray[np.float64]

    @property
    def count(self) -> int:
        """How many items there are."""
        return sum(map(len, self.items))

    @property
    def largest(self) -> int:
        """The bytes of the largest item."""
        return max((nbytes for unit in self.sizes for nbytes in unit), default=0)


@dataclass(frozen=True)
class Stock:
    """A trace's streamable items, and the seconds of its units."""

    trace: Trace
    seconds: tuple[float, ...]
    items: tuple[Item, ...]
    _limited: dict[int, Units] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def nbytes(self) -> int:
        """The bytes of all items, each in the arena once."""
        return sum(item.nbytes for item in self.items)

    @cached_property
    def everything(self) -> Units:
        """The units with all their items."""
        return self._units(set(range(len(self.items))))

    @cached_property
    def largest_unit_bytes(self) -> int:
        """The most that is there at once when nothing comes early and nothing stays."""
        needs = [0] * len(self.seconds)
        for item in self.items:
            for first, last in item.visits:
                for unit in range(first, last + 1):
                    needs[unit] += item.nbytes
        return max(needs)

    def up_to(self, largest: int) -> Units:
        """The units as if they had only items of so many bytes at most that no two distant units share."""
        if largest not in self._limited:
            self._limited[largest] = self._units({i for i, item in enumerate(self.items) if item.may_stream(largest)})
        return self._limited[largest]

    def sizes_enough_for(self, nbytes: float) -> list[int]:
        """The sizes, the largest first, such that the items up to this size are so many bytes; of them, see `up_to`."""
        sizes = sorted(item.nbytes for item in self.items if item.may_stream(item.nbytes))
        enough = {size for size, total in zip(sizes, accumulate(sizes), strict=True) if total >= nbytes}
        return sorted(enough, reverse=True)

    def _units(self, chosen: set[int]) -> Units:
        """For each unit: those of the chosen items whose first visit begins there."""
        units: list[list[int]] = [[] for _ in self.seconds]
        for index in sorted(chosen):
            units[self.items[index].unit].append(index)
        sizes = tuple(tuple(self.items[i].nbytes for i in unit) for unit in units)
        return Units(tuple(map(tuple, units)), sizes, np.array([sum(s) for s in sizes], dtype=np.float64))


def take_stock(trace: Trace, seconds: tuple[float, ...]) -> Stock:
    """The items of a trace, those of one unit next to each other."""
    by_visits: dict[tuple[tuple[int, int], ...], list[str]] = {}
    for name, readers in trace.readers.items():
        if name not in trace.fixed:
            by_visits.setdefault(_visits(readers), []).append(name)
    items = [item for visits, names in sorted(by_visits.items()) for item in _items(trace, visits, names)]
    return Stock(trace, seconds, tuple(items))


def _visits(readers: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    visits: list[tuple[int, int]] = []
    for reader in readers:
        if visits and visits[-1][1] >= reader - 1:
            visits[-1] = visits[-1][0], reader
        else:
            visits.append((reader, reader))
    return tuple(visits)


def _items(trace: Trace, visits: tuple[tuple[int, int], ...], names: list[str]) -> list[Item]:
    sizes = {name: aligned(trace.weights[name].nbytes) for name in names}
    small = min(SMALL_BYTES, sum(sizes.values()) * SMALL_SHARE)
    few = tuple(name for name in names if sizes[name] < small)
    items = [Item((name,), sizes[name], visits) for name in names if sizes[name] >= small]
    return items + ([Item(few, sum(sizes[name] for name in few), visits)] if few else [])
