"""From seats to copies: which bytes of the streaming region each copy brings, and which unit must have ended before.

A visit's seat may overlap those of several earlier visits, which are released at different times. It is copied in as
many parts as there are releases, the earliest first: finer parts would gain nothing, fewer would wait.

    region bytes     [-- unit 4's --)[---- unit 5's ----)
    unit 9's seat          [-----------------)
    its copies             [ after 4 )[after 5)

Every seat is somebody's seat in every cycle, so a steady cycle's copies follow from the cycle before it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Seat:
    """Bytes `[offset, offset + nbytes)` of the streaming region, and the visits paid to it."""

    offset: int
    nbytes: int
    visits: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Copy:
    """Bytes `[start, stop)` of a seat for the unit `due`, once the unit `after` has ended (negative: a cycle ago)."""

    seat: int
    start: int
    stop: int
    due: int
    after: int


def copies_of(seats: Sequence[Seat], units: int, least_bytes: int) -> list[Copy] | None:
    """The copies of a steady cycle in the order in which they are due; None if two seats of one unit overlap.

    A part below `least_bytes` travels with a neighbour. Bytes that nobody else used since are still there.
    """
    line = _Line(max((seat.offset + seat.nbytes for seat in seats), default=0), units)
    visits = sorted((first, last, index) for index, seat in enumerate(seats) for first, last in seat.visits)
    copies: list[Copy] = []
    for cycle in (-1, 0):
        for first, last, index in visits:
            seat, due = seats[index], first + cycle * units
            parts = line.take(seat.offset, seat.offset + seat.nbytes, last + cycle * units, index)
            if any(part.after >= due for part in parts):
                return None
            if cycle == 0:
                copies += [
                    Copy(index, part.start - seat.offset, part.stop - seat.offset, due, part.after)
                    for part in _join([part for part in parts if part.owner != index], least_bytes)
                ]
    return copies


def _join(parts: Sequence[_Part], least_bytes: int) -> list[_Part]:
    """Neighbours that are released together, or that are too small to travel alone, as one; the earliest first."""
    joined: list[_Part] = []
    for part in parts:
        before = joined[-1] if joined else None
        if before and before.stop == part.start and (before.after == part.after or _small(before, part, least_bytes)):
            joined[-1] = _Part(before.start, part.stop, max(before.after, part.after), part.owner)
        else:
            joined.append(part)
    return sorted(joined, key=lambda part: part.after)


def _small(one: _Part, other: _Part, least_bytes: int) -> bool:
    return min(one.stop - one.start, other.stop - other.start) < least_bytes


@dataclass(frozen=True, slots=True)
class _Part:
    """Bytes `[start, stop)` of the region, whose they were, and the unit that read them last."""

    start: int
    stop: int
    after: int
    owner: int


class _Line:
    """Bytes with their last reader: segment i is [cuts[i], cuts[i + 1])."""

    def __init__(self, nbytes: int, units: int) -> None:
        self._cuts = [0, nbytes]
        self._last = [(-2 * units, -1)]

    def take(self, start: int, stop: int, reader: int, owner: int) -> list[_Part]:
        """Give [start, stop) to a new owner: what it was made of before."""
        first, end = self._cut(start), self._cut(stop)
        inner = self._cuts[first : end + 1]
        parts = [_Part(a, b, *last) for a, b, last in zip(inner, inner[1:], self._last[first:end], strict=False)]
        self._cuts[first : end + 1] = [start, stop]
        self._last[first:end] = [(reader, owner)]
        return parts

    def _cut(self, place: int) -> int:
        """Where in the list of cuts this place is, cut now if it was not."""
        index = bisect_left(self._cuts, place)
        if self._cuts[index] != place:
            self._cuts.insert(index, place)
            self._last.insert(index, self._last[index - 1])
        return index
