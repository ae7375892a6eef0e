"""What could stream, if bytes were a fluid: for each size of ring, the residency that keeps the best pace.

Every item keeps one seat, so a byte of the ring is used a whole number of times in a cycle. What streams and the ring
that it passes through therefore come as a pair, one for each number of turns:

    missing  =  all items - capacity
    ring     =  missing / (turns - 1)         few turns: a large ring, much is fetched early and much is streamed
    streamed =  ring * turns                  many turns: a small ring, little is streamed, and just in time

Bytes are no fluid: they come in items, and a ring wastes some at its end. So candidates can be had for a slightly
smaller capacity; the bytes that it sets aside pay for that.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .fluid import Flow, Numbers
from .items import Units
from .pace import Pace, steady_pace
from .windows import Cycle

_SLOWER = (0.0, 0.001, 0.003, 0.006, 0.01, 0.02, 0.04)  # than the best pace of a capacity
_SMALLEST_RING = 0.4  # in usual items
_RING_STEP = 1.2
_RINGS = 40


@dataclass(frozen=True)
class Candidate:
    """Bytes of each unit that would stream, and the pace that they would keep if they were a fluid."""

    pace: float
    streamed: float
    residency: Numbers
    units: Units


def candidates(
    units: Units, seconds: tuple[float, ...], rate: float, missing: float, usual: float, most_seconds: float
) -> list[Candidate]:
    """Every ring that can work when so many bytes cannot stay, at the best pace it can keep; the fastest first."""
    streamable = float(units.nbytes.sum())
    if missing >= streamable:
        return []
    pace = steady_pace(Cycle(seconds, units.nbytes.tolist(), [streamable - missing] * len(seconds)), rate)
    flows = [_flow(seconds, pace, slower, rate) for slower in _SLOWER if pace.seconds * (1 + slower) < most_seconds]
    found = []
    for turns in _turns(missing, max(usual * _SMALLEST_RING, units.largest), streamable):
        streamed = missing * turns / (turns - 1)
        kept = _first_that_keeps(flows, units.nbytes, streamed, streamed / turns)
        if kept is not None:
            found.append(Candidate(kept[0].pace, streamed, kept[1], units))
    return sorted(found, key=lambda candidate: (candidate.pace, candidate.streamed))


def _first_that_keeps(flows: list[Flow], nbytes: Numbers, streamed: float, room: float) -> tuple[Flow, Numbers] | None:
    """The fastest of some flows, the fastest first, that a residency keeps."""
    found = None
    low, high = 0, len(flows)
    while low < high:
        middle = (low + high) // 2
        residency = flows[middle].residency(nbytes, streamed, room)
        if residency is None:
            low = middle + 1
        else:
            high, found = middle, (flows[middle], residency)
    return found


def _flow(seconds: tuple[float, ...], pace: Pace, slower: float, rate: float) -> Flow:
    longer = (1 + slower) * (1 + 1e-9)
    return Flow.at(pace.seconds * longer, np.array(pace.starts) * longer, np.array(seconds), rate)


def _turns(missing: float, smallest_ring: float, most_streamed: float) -> list[int]:
    """Numbers of turns from 2 on, so that the rings differ by a constant factor and no more streams than there is."""
    wanted = {1 + round(missing / (smallest_ring * _RING_STEP**i)) for i in range(_RINGS)}
    return sorted(turns for turns in wanted if turns >= 2 and missing * turns <= most_streamed * (turns - 1))
