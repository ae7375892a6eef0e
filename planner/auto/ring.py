"""Seats and copies of what streams. Numbers only: it never chooses what streams.

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
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import inf
from operator import itemgetter
from typing import NamedTuple

from taskgraph_offload.nouns.ranges import ByteMap

from .stock import Visits

_MOST_SUMS = 256

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
            ahead = fill(unit, sizes, room - cursor)
            ahead_bytes = sum(map(sizes.__getitem__, ahead))
            if ahead and nbytes - ahead_bytes <= cursor:
                bundles.append((cursor, [index for index in unit if index in ahead]))
                nbytes, bundle = nbytes - ahead_bytes, [index for index in unit if index not in ahead]
            cursor = 0
        if bundle:
            bundles.append((cursor, bundle))
        cursor += nbytes
    return bundles


def fill(unit: Sequence[int], sizes: Sequence[int], room: int) -> set[int]:
    """Items of a unit that nearly fill the room.

    >>> sorted(fill([0, 1, 2], [5, 4, 3], 8))
    [0, 2]
    """
    largest_first = sorted([(-sizes[index], place, index) for place, index in enumerate(unit)])
    sums = subset_sums([(index, -size) for size, _, index in largest_first], room)
    return set(sums[max(sums)])


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
