"""What could stream, if bytes were a fluid: for each size of ring, the residency that keeps the best pace.

What streams and the ring that it passes through come as a pair:

    missing  =  all items - capacity
    streamed =  missing + ring
    turns    =  streamed / ring       few: a large ring, much is fetched early and much is streamed
                                      many: a small ring, little is streamed, and just in time

Every item keeps one seat, so a byte of the ring is used a whole number of times in a cycle: where turns are no whole
number, the last one leaves a part of the ring as it is, into which nothing can be fetched early.

Bytes are no fluid: they come in items, and a ring wastes some at its end. So candidates can be had for a slightly
smaller capacity; the bytes that it sets aside pay for that.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..bound.pace import Pace, steady_pace
from ..bound.windows import Cycle
from .fluid import Flow, Numbers
from .items import Units

_SLOWER = (0.0, 0.001, 0.003, 0.006, 0.01, 0.02, 0.04)  # than the best pace of a capacity and a ring
_SMALLEST_RING = 0.4  # in usual items
_RING_STEP = 1.2
_RINGS = 40
_FEW_TURNS = 6  # fewer need not be whole: a larger ring would stream too much


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
    found = []
    for ring in _rings(missing, max(usual * _SMALLEST_RING, units.largest), streamable):
        streamed = missing + ring
        least = max(1.0, streamed / (rate * pace.seconds))  # a pace at which the link carries as much
        slower = [least * (1 + more) for more in _SLOWER if pace.seconds * least * (1 + more) < most_seconds]
        kept = _first_that_keeps([_flow(seconds, pace, more, rate) for more in slower], units.nbytes, streamed, ring)
        if kept is not None:
            found.append(Candidate(kept[0].pace, streamed, kept[1], units))
    return sorted(found, key=lambda candidate: (candidate.pace, candidate.streamed))


def _first_that_keeps(flows: list[Flow], nbytes: Numbers, streamed: float, ring: float) -> tuple[Flow, Numbers] | None:
    """The fastest of some flows, the fastest first, that a residency keeps."""
    found = None
    low, high = 0, len(flows)
    while low < high:
        middle = (low + high) // 2
        residency = flows[middle].residency(nbytes, streamed, ring)
        if residency is None:
            low = middle + 1
        else:
            high, found = middle, (flows[middle], residency)
    return found


def _flow(seconds: tuple[float, ...], pace: Pace, times: float, rate: float) -> Flow:
    longer = times * (1 + 1e-9)
    return Flow.at(pace.seconds * longer, np.array(pace.starts) * longer, np.array(seconds), rate)


def _rings(missing: float, smallest: float, streamable: float) -> list[float]:
    """Sizes from the smallest on, by a constant factor, so that turns are whole; a few turns need not be."""
    wanted = set[float]()
    for ring in (smallest * _RING_STEP**i for i in range(_RINGS)):
        turns = 1 + missing / ring
        wanted |= {missing / (round(turns) - 1)} if turns >= 1.5 else set()
        wanted |= {ring} if turns < _FEW_TURNS else set()
    return sorted(ring for ring in wanted if missing + ring <= streamable)
