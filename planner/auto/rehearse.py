"""Runs a steady cycle over and over on plain numbers: the same longest path as `simulate`, without names and graphs.

h2d      [--copy--][copy]   [--copy--]       a copy waits for the link, and for the unit whose bytes it overwrites
compute       [--- unit ---][- unit -]       a unit waits for the one before it, and for its own copies
"""

from __future__ import annotations

from collections.abc import Sequence

from .copies import Copy

_CYCLES = 10
_SAME = 1e-9


def steady_seconds(seconds: Sequence[float], copies: Sequence[Copy], rate: float, latency: float) -> float:
    """How long a cycle takes, once the cycles have settled (else: the mean of the last ones)."""
    units = len(seconds)
    work: list[list[tuple[float, int]]] = [[] for _ in seconds]
    for copy in copies:
        work[copy.due].append((latency + (copy.stop - copy.start) / rate, copy.after + units))
    ends = [0.0] * (2 * units)  # of the cycle before, then of this one
    link, end, took = 0.0, 0.0, [0.0]
    for _ in range(_CYCLES):
        begun = end
        ends[:units] = ends[units:]
        for unit, lasts in enumerate(seconds):
            waiting = work[unit]
            for copying, after in waiting:
                free = ends[after]
                link = (link if link > free else free) + copying
            if waiting and link > end:
                end = link
            end += lasts
            ends[units + unit] = end
        took.append(end - begun)
        if len(took) > 3 and abs(took[-1] - took[-2]) + abs(took[-2] - took[-3]) <= _SAME * took[-1]:
            return took[-1]
    return sum(took[-4:]) / 4
