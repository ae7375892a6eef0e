"""Who holds which bytes of the arena, and which task of each lane touched them last.

    arena      |------ blocks.3 ------|--- blocks.4 ---|---- (nobody) ----|------ always ------|
    segment      holder blocks.3        blocks.4         None               always
                 arrived  h2d 17        h2d 18           -                  h2d 1
                 used     compute 9     compute 8        compute 8          compute 9

A segment holds its bundle's bytes at the bundle's one seat, so its holder says which bytes they are. Numbers of tasks
count through each lane. This module moves nothing.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import dataclass, replace

Range = tuple[int, int]  # bytes of the arena, half-open


@dataclass(slots=True)
class Segment:
    """Bytes with one history: who they belong to, the copy that brought them, who last read or changed them."""

    holder: str | None = None
    arrived: int = 0
    used: int = 0
    copied_out: int = 0


class SeatTable:
    """The arena cut into segments: segment i is [cuts[i], cuts[i + 1])."""

    def __init__(self, nbytes: int, used: int = 0) -> None:
        self._cuts = [0, nbytes]
        self._segments = [Segment(used=used)]

    def fill(self, start: int, stop: int, holder: str | None, arrived: int) -> Segment:
        """A copy overwrites the bytes; what they went through before is returned, the latest of each lane."""
        if start >= stop:
            return Segment()
        first, last = self._cut(start), self._cut(stop)
        before = self._segments[first:last]
        self._cuts[first + 1 : last] = []
        self._segments[first:last] = [Segment(holder, arrived)]
        return before[0] if len(before) == 1 else _latest(before)

    def over(self, start: int, stop: int) -> list[Segment]:
        """The segments that touch a range."""
        if start >= stop:
            return []
        return self._segments[bisect_right(self._cuts, start) - 1 : bisect_left(self._cuts, stop)]

    def missing(self, start: int, stop: int, holder: str) -> list[Range]:
        """The parts of a range that do not hold a bundle's bytes, neighbours joined."""
        found: list[Range] = []
        index = bisect_right(self._cuts, start) - 1
        while start < stop:
            end = min(stop, self._cuts[index + 1])
            if self._segments[index].holder != holder:
                if found and found[-1][1] == start:
                    found[-1] = found[-1][0], end
                else:
                    found.append((start, end))
            start, index = end, index + 1
        return found

    def forget(self, start: int, stop: int) -> None:
        """The bytes are nobody's any more; a copy that overwrites them still waits for who used them."""
        if start < stop:
            first, last = self._cut(start), self._cut(stop)
            for segment in self._segments[first:last]:
                segment.holder = None

    def holders(self) -> set[str]:
        """The bundles that have any bytes in the arena."""
        return {segment.holder for segment in self._segments if segment.holder is not None}

    def _cut(self, place: int) -> int:
        """The index of the segment that begins here, cut so that one does."""
        index = bisect_right(self._cuts, place)
        if self._cuts[index - 1] == place:
            return index - 1
        self._cuts.insert(index, place)
        self._segments.insert(index, replace(self._segments[index - 1]))
        return index


def _latest(segments: list[Segment]) -> Segment:
    return Segment(
        None,
        max(segment.arrived for segment in segments),
        max(segment.used for segment in segments),
        max(segment.copied_out for segment in segments),
    )
