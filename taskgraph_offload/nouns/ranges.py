"""A line of bytes that is cut into segments, each with one value. It knows nothing about what the values mean.

cuts      0            100          250                 400
values    |---- a -----|---- b -----|-------- c --------|---- d ----...
replace(150, 300, x)   |-b-|--------- x ---------|--c---|             returns (150, 250, b), (250, 300, c)
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable
from typing import Generic, TypeVar

Value = TypeVar("Value")


class ByteMap(Generic[Value]):
    """Segment i is the bytes `[cuts[i], cuts[i + 1])`; the last segment has no end.

    When a range cuts a segment in two, both parts keep the value. Values that change need `copy`: it makes the value of
    the second part, so that each part then changes alone.

    >>> line = ByteMap("a")
    >>> line.replace(100, 300, "b")
    [(100, 300, 'a')]
    >>> line.over(50, 150)
    [(50, 100, 'a'), (100, 150, 'b')]
    """

    def __init__(self, value: Value, copy: Callable[[Value], Value] | None = None) -> None:
        self._cuts = [0]
        self._values = [value]
        self._copy = copy

    def replace(self, start: int, stop: int, value: Value) -> list[tuple[int, int, Value]]:
        """Make `[start, stop)` one segment with this value; return the parts that were there before."""
        if start >= stop:
            return []
        first, last = self._cut(start), self._cut(stop)
        starts = self._cuts[first:last]
        parts = list(zip(starts, [*starts[1:], stop], self._values[first:last], strict=True))
        self._cuts[first:last] = [start]
        self._values[first:last] = [value]
        return parts

    def over(self, start: int, stop: int) -> list[tuple[int, int, Value]]:
        """Return the parts of `[start, stop)` with their values. Nothing is cut."""
        if start >= stop:
            return []
        first, last = bisect_right(self._cuts, start) - 1, bisect_left(self._cuts, stop)
        starts = [start, *self._cuts[first + 1 : last]]
        return list(zip(starts, [*starts[1:], stop], self._values[first:last], strict=True))

    def fit(self, start: int, stop: int) -> list[Value]:
        """Cut at `start` and at `stop`; return the values between them, which the caller may change."""
        return self._values[self._cut(start) : self._cut(stop)] if start < stop else []

    def _cut(self, place: int) -> int:
        """Return the index of the segment that begins at `place`; cut one there if none does."""
        index = bisect_left(self._cuts, place)
        if index == len(self._cuts) or self._cuts[index] != place:
            value = self._values[index - 1]
            self._cuts.insert(index, place)
            self._values.insert(index, value if self._copy is None else self._copy(value))
        return index
