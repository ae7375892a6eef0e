"""From fractions to whole items: what streams of each unit, so that the sum along the cycle follows what was asked.

    asked        3.0   6.0   9.0   12.0        bytes streamed, summed along the cycle
    unit's sums  0 4 8 in any unit
    chosen       4     4     8     12          each unit takes the sum that brings the total nearest

The error of one unit is passed on to the next, so that it never grows beyond half an item. Where few items stream, half
an item is much: then `trim` exchanges items, wherever in the cycle they are, until the sum is as asked.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

_MOST_SUMS = 256
_MOST_EXCHANGES = 6
_CLOSE = 0.001


@lru_cache(maxsize=4096)
def subset_sums(sizes: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    """Sums that subsets of some sizes have, in order, and for each the positions of one such subset.

    >>> subset_sums((2, 3))
    ((0, 2, 3, 5), ((), (0,), (1,), (0, 1)))
    """
    found: dict[int, tuple[int, ...]] = {0: ()}
    for position, nbytes in enumerate(sizes):
        if not nbytes:
            continue
        for total, chosen in list(found.items()):
            found.setdefault(total + nbytes, (*chosen, position))
        found = _thinned(found)
    sums = tuple(sorted(found))
    return sums, tuple(found[total] for total in sums)


def _thinned(found: dict[int, tuple[int, ...]]) -> dict[int, tuple[int, ...]]:
    """No more sums than are useful: evenly spread, the smallest and the largest kept."""
    if len(found) <= _MOST_SUMS:
        return found
    sums = sorted(found)
    step = (len(sums) - 1) / (_MOST_SUMS - 1)
    return {sums[round(i * step)]: found[sums[round(i * step)]] for i in range(_MOST_SUMS)}


def round_to_items(
    asked: Sequence[float], sizes: Sequence[tuple[int, ...]], bias: float = 0.5
) -> list[tuple[int, ...]]:
    """For each unit: the positions of the sizes that stream. `bias`: how far between two sums the upper one begins."""
    chosen: list[tuple[int, ...]] = []
    missing = 0.0
    for want, unit_sizes in zip(asked, sizes, strict=True):
        sums, subsets = subset_sums(unit_sizes)
        missing += want
        upper = min(bisect_left(sums, missing), len(sums) - 1)
        lower = max(upper - 1, 0)
        place = upper if missing - sums[lower] >= bias * (sums[upper] - sums[lower]) else lower
        chosen.append(subsets[place])
        missing -= sums[place]
    return chosen


def trim(chosen: Sequence[tuple[int, ...]], sizes: Sequence[tuple[int, ...]], least: float) -> list[tuple[int, ...]]:
    """What is chosen; or, where that is not enough or noticeably too much, with a few items exchanged for others.

    >>> trim([(0,), (0,)], [(4,), (5,), (3,)], 6)
    [(0,), (), (0,)]
    """
    places = [(unit, position) for unit, unit_sizes in enumerate(sizes) for position in range(len(unit_sizes))]
    nbytes = np.array([0, *(sizes[unit][position] for unit, position in places)], dtype=np.float64)
    inside = np.array([False, *(unit < len(chosen) and position in chosen[unit] for unit, position in places)])
    for _ in range(_MOST_EXCHANGES):
        over = nbytes[inside].sum() - least
        leaving, coming = (np.concatenate(([0], np.flatnonzero(side))) for side in (inside, ~inside))
        coming = coming[np.argsort(nbytes[coming], kind="stable")]
        best = np.searchsorted(nbytes[coming], nbytes[leaving] - over)
        fits = best < len(coming)
        if not fits.any():
            break
        leaving, partner = leaving[fits], coming[best[fits]]
        left = over - nbytes[leaving] + nbytes[partner]
        which = int(np.argmin(left))
        if 0 <= over <= max(left[which], least * _CLOSE):
            break
        inside[leaving[which]], inside[partner[which]] = False, True
    found: list[list[int]] = [[] for _ in sizes]
    for (unit, position), chooses in zip(places, inside[1:], strict=True):
        if chooses:
            found[unit].append(position)
    return [tuple(unit) for unit in found]
