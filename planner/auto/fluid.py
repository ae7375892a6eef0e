"""Who streams how much, if bytes were a fluid: the residency that a pace needs, as difference constraints.

Given the starts of the units, the bytes streamed in a cycle and the room they pass through, two sums are unknown: the
bytes due when each unit starts, and the bytes copied at each start and each end.

    bytes
      ^                      ___/        copied: never faster than the link,
      |             ____/---/  /         not below what is due,
      |        /---/     _____/          not above what was due one unit before, plus the room
      |   /---/    _____/
      |  /    ____/                      due: grows by no more than the unit's bytes
      +--|----------|-------|----> time
       start      start   start

Each constraint bounds a difference of two sums. So lowering every sum to what the others allow, again and again, ends
in the highest solution below the first guess; or, where there is none, never ends.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Numbers: TypeAlias = NDArray[np.float64]

_SWEEPS = 40


@dataclass(frozen=True)
class Flow:
    """A steady cycle at some pace, as the bytes that the link carries in it.

    `carried` holds two figures for each unit: from the end before it to its start, and from its start to its end.
    """

    pace: float
    carried: Numbers

    @staticmethod
    def at(pace: float, starts: Numbers, seconds: Numbers, rate: float) -> Flow:
        """The flow of units that start at these times, every cycle as long as the pace says."""
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
        due_limits, copied_limits = _limits(nbytes), _limits(self.carried)
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


def _limits(most: Numbers) -> Numbers:
    """How much sums may have grown since the beginning of the cycle before this one."""
    return np.cumsum(np.concatenate((most, most)))


def _settle(sums: Numbers, limits: Numbers, cycle: float) -> Numbers:
    """The highest sums, none above these, that never fall and never grow by more than the limits do, round and round.

    >>> _settle(np.array([5.0, 9.0, 7.0]), _limits(np.array([1.0, 2.0, 3.0])), 6.0).tolist()
    [2.0, 4.0, 7.0]
    """
    count = len(sums)
    twice = np.concatenate((sums - cycle, sums)) - limits
    grown = np.minimum.accumulate(twice)[count:] + limits[count:]
    fallen = np.minimum.accumulate(grown[::-1])[::-1]
    settled: Numbers = np.minimum(fallen, fallen[0] + cycle)
    return settled
