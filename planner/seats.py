"""Gives every bundle of weights its seat: the one byte range of the arena that it occupies whenever it is there.

A steady cycle's tasks lie on a circle. A bundle lives there from its copy to its last reader. Bundles whose lives never
meet may share bytes:

    position   0    1    2    3    4    5    6    (then 0 again)
    a          [----------)              [------   from its copy at 5, round the end, to its reader at 1
    b               [-------------)
    c                         [----------)         a and c may share bytes, a and b may not

Residents live all the time. This module knows orders and sizes, no strategy and no budget.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from taskgraph_offload.nouns.trace import Trace
from taskgraph_offload.plan.plan import aligned, span_bytes

from .strategy import Schedule


@dataclass(frozen=True, slots=True, order=True)
class Life:
    """When a bundle must keep its bytes: half-open arcs of positions on the circle; `arcs=None` means always."""

    name: str
    size: int
    arcs: tuple[tuple[int, int], ...] | None

    def meets(self, other: Life) -> bool:
        """Whether both are on the device at the same time."""
        if self.arcs is None or other.arcs is None:
            return True
        return any(a < d and c < b for a, b in self.arcs for c, d in other.arcs)


def place(schedule: Schedule, trace: Trace) -> dict[str, int]:
    """An offset for every bundle: residents first, then each of the others at the lowest free place."""
    everyone = lives(schedule, trace)
    offsets: dict[str, int] = {}
    bottom = 0
    for life in everyone:
        if life.arcs is None:
            offsets[life.name], bottom = bottom, bottom + life.size
    streamed = [life for life in everyone if life.arcs is not None]
    by_size = _pack(sorted(streamed, key=lambda life: -life.size), bottom)
    by_time = _pack(streamed, bottom)
    return offsets | min(by_size, by_time, key=lambda placed: _top(streamed, placed))


def arena_bytes(schedule: Schedule, trace: Trace, offsets: Mapping[str, int] | None = None) -> int:
    """The size of the arena that a schedule needs: with these seats, or with those that `place` gives."""
    placed = place(schedule, trace) if offsets is None else offsets
    spans = schedule.bundles
    return max((offset + aligned(span_bytes(spans[name], trace)) for name, offset in placed.items()), default=0)


def lives(schedule: Schedule, trace: Trace) -> list[Life]:
    """The life of each bundle, from the steady order: from each copy to the last reader before the next copy."""
    events: dict[str, list[tuple[int, bool]]] = {name: [] for name in schedule.bundles}  # (position, is it a copy in?)
    bundle_of = {weight: name for name, weights in schedule.bundles.items() for weight in weights}
    reads = {call.name: {bundle_of[name] for name in call.reads if name in bundle_of} for call in trace.calls}
    for position, task in enumerate(schedule.steady):
        for name in reads[task.name] if task.kind == "compute" else {task.name} & events.keys():
            events[name].append((position, task.kind == "h2d"))
    count = len(schedule.steady)
    return [
        Life(name, aligned(span_bytes(weights, trace)), _arcs(events[name], count))
        for name, weights in schedule.bundles.items()
    ]


def _arcs(events: list[tuple[int, bool]], count: int) -> tuple[tuple[int, int], ...] | None:
    """Arcs on a circle of `count` positions; one that goes round the end is cut in two. None if nothing is copied."""
    births = [i for i, (_, arrives) in enumerate(events) if arrives and not events[i - 1][1]]
    if not births:
        return None
    arcs: list[tuple[int, int]] = []
    for birth, following in zip(births, [*births[1:], births[0] + len(events)], strict=True):
        start, stop = events[birth][0], events[(following - 1) % len(events)][0] + 1
        arcs += [(start, stop)] if start < stop else [(start, count), (0, stop)]
    return tuple(arcs)


def _pack(lives: Sequence[Life], bottom: int) -> dict[str, int]:
    """Put each bundle in turn at the lowest place that is free as long as it lives."""
    placed: list[tuple[int, Life]] = []
    for life in lives:
        offset = bottom
        for start, other in sorted((start, other) for start, other in placed if life.meets(other)):
            if offset + life.size <= start:
                break
            offset = max(offset, start + other.size)
        placed.append((offset, life))
    return {life.name: offset for offset, life in placed}


def _top(lives: Sequence[Life], placed: Mapping[str, int]) -> int:
    return max((placed[life.name] + life.size for life in lives), default=0)
