"""How long a steady cycle takes at best: the largest mean of a circuit through all constraints between starts.

    unit 0 ---> unit 1 ---> unit 2 ---> unit 3 ---> (unit 0 of the next cycle)      one unit after the other
       \\__________________________________/^                                        windows that bytes must pass

A circuit that winds once round the cycle and adds up to 3 seconds makes every cycle last 3 seconds; one that winds
twice and adds up to 7 makes it 3.5. This module knows numbers only: no trace, no plan.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass

from .windows import Cycle, Windows

_TOLERANCE = 1e-10
_PATIENCE = 16  # rounds that only move starts: paths can wind round many cycles, and matter no more


@dataclass(frozen=True, slots=True)
class Pace:
    """The seconds of a steady cycle, and starts of its units that keep all constraints at that pace."""

    seconds: float
    starts: tuple[float, ...]


def steady_pace(cycle: Cycle, rate: float) -> Pace:
    """The largest mean of a circuit of constraints, by policy iteration: every round is O(units), and few are needed.

    A policy says for each unit which constraint decides its start. Following it back ends in a circuit, whose mean is
    a pace that no schedule beats; starts at that pace show which units another constraint would delay.
    """
    units = range(len(cycle.seconds))
    chains, windows = [_chain(cycle, k) for k in units], [_longest_window(cycle, rate, k) for k in units]
    edges = max(chains, windows, key=lambda policy: max(_circuits(policy)))
    pace, patience = _follow(cycle, edges), _PATIENCE
    while patience:
        changed = False
        for k, (start, edge) in enumerate(_deciding(cycle, rate, pace)):
            if start > pace.starts[k] + _TOLERANCE * pace.seconds:
                edges[k], changed = edge, True
        if not changed:
            break
        slower = _follow(cycle, edges)
        patience = patience - 1 if slower.seconds <= pace.seconds * (1 + _TOLERANCE) else _PATIENCE
        pace = slower
    return pace


@dataclass(frozen=True, slots=True)
class _Edge:
    """A unit starts so many seconds after another one does; after that of the cycle before, if `origin` is negative."""

    origin: int
    seconds: float


def _chain(cycle: Cycle, k: int) -> _Edge:
    """One unit after the other."""
    return _Edge(k - 1, cycle.seconds[k - 1])


def _longest_window(cycle: Cycle, rate: float, k: int) -> _Edge:
    """The window of all units that ends at this one; for a single unit, just the unit again."""
    count = len(cycle.seconds)
    first = (k + 1) % count
    seconds = cycle.seconds[first] + (cycle.total - cycle.room[first]) / rate
    return _Edge(k + 1 - count, seconds) if count > 1 else _chain(cycle, k)


def _deciding(cycle: Cycle, rate: float, pace: Pace) -> Iterator[tuple[float, _Edge]]:
    """For each unit: the earliest start that those before it allow, and the constraint that decides it."""
    windows, count = Windows(cycle, rate), len(cycle.seconds)
    starts = [start - pace.seconds for start in pace.starts] + list(pace.starts)
    for unit in range(2 * count):
        late, origin = windows.latest(unit)
        if unit >= count:
            chained = starts[unit - 1] + cycle.seconds[unit - count - 1]
            if late <= chained:
                late, origin = chained, unit - 1
            yield late, _Edge(origin - count, late - starts[origin])
            starts[unit] = max(starts[unit], late)
        windows.begin(unit, starts[unit] + cycle.seconds[unit % count])


def _follow(cycle: Cycle, edges: list[_Edge]) -> Pace:
    """The pace of a policy's slowest circuit, and the starts that follow; a unit led elsewhere is chained instead."""
    count = len(edges)
    seconds, root = max(_circuits(edges))
    starts: dict[int, float] = {root: 0.0}
    for k in ((root + i) % count for i in range(1, count)):
        path = _path(edges, k, starts)
        if path and edges[path[-1]].origin % count not in starts:
            edges[k], path = _chain(cycle, k), [k]
        for unit in reversed(path):
            edge = edges[unit]
            starts[unit] = starts[edge.origin % count] + edge.seconds - (seconds if edge.origin < 0 else 0.0)
    return Pace(seconds, tuple(starts[k] for k in range(count)))


def _path(edges: Sequence[_Edge], unit: int, known: Container[int]) -> list[int]:
    """From a unit back to one whose origin is known, or to where the path would bite its tail."""
    path: dict[int, None] = {}
    while unit not in known and unit not in path:
        path[unit] = None
        unit = edges[unit].origin % len(edges)
    return list(path)


def _circuits(edges: Sequence[_Edge]) -> Iterator[tuple[float, int]]:
    """Each circuit of a policy: its mean seconds for one cycle, and one of its units."""
    seen: set[int] = set()
    for first in range(len(edges)):
        path = _path(edges, first, seen)
        seen.update(path)
        last = edges[path[-1]].origin % len(edges) if path else -1
        if last in path:
            circuit = [edges[unit] for unit in path[path.index(last) :]]
            yield sum(e.seconds for e in circuit) / sum(e.origin < 0 for e in circuit), last
