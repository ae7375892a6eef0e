"""The cold cycle's link never waits for room while something that has room is still to come.

    before     h2d a | h2d b |  (waits for a's bytes)  | h2d c | h2d r           r stays: it has bytes of its own
    after      h2d a | h2d b |  h2d r[0:4K]            | h2d c | h2d r[4K:]

A part of what stays comes in the gap before a copy that waits, and no more of it than the gap holds: so nothing comes
later for that, and what follows comes earlier.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

from taskgraph_offload.nouns.graph import Task
from taskgraph_offload.plan.plan import ALIGNMENT, Plan

_ROUNDS = 4  # what moves leaves a gap behind, which closes, and others open
_LEAST_BYTES = 2**20  # of a part


def fill_gaps(plan: Plan) -> Plan:
    """The plan with a cold cycle that is quicker, or the same plan."""
    for _ in range(_ROUNDS):
        filled = replace(plan, cold=_filled(plan))
        if filled.predict(1).cold_seconds >= plan.predict(1).cold_seconds:
            break
        plan = filled
    return plan


def _filled(plan: Plan) -> tuple[Task, ...]:
    """The cold order with its gaps filled by what stays, the first to be read first."""
    copies = [task for task in plan.cold if task.kind == "h2d"]
    slots = [[copy] for copy in copies]
    staying = deque(number for number, copy in enumerate(copies) if _stays(plan, copy))
    for number, gap in _gaps(plan):
        while staying and staying[0] <= number:
            staying.popleft()
        while staying and (nbytes := _bytes_within(plan, gap)) >= _LEAST_BYTES:
            part, rest = _cut(plan, slots[staying[0]].pop(), nbytes)
            slots[number - 1].append(part)
            gap -= plan.machine.copy_seconds("h2d", plan.task_bytes(part))
            if rest is not None:
                slots[staying[0]].append(rest)
            else:
                staying.popleft()
    following = iter(slots)
    return tuple(part for task in plan.cold for part in (next(following) if task.kind == "h2d" else [task]))


def _gaps(plan: Plan) -> Iterator[tuple[int, float]]:
    """Copies before which the link waits: the number of each, and for how long."""
    spans = plan.predict(1).lane("h2d")
    for number, (before, span) in enumerate(pairwise(spans), 1):
        if before.stop < span.start:
            yield number, span.start - before.stop


def _stays(plan: Plan, copy: Task) -> bool:
    return not copy.is_activation and plan.bundles[copy.name].resident


def _bytes_within(plan: Plan, seconds: float) -> int:
    """How much the link carries in so many seconds, in whole seats."""
    carried = (seconds - plan.machine.latency_seconds) * plan.machine.h2d_bytes_per_second
    return max(0, int(carried) // ALIGNMENT * ALIGNMENT)


def _cut(plan: Plan, copy: Task, nbytes: int) -> tuple[Task, Task | None]:
    """The first bytes of a copy, and the rest if there is one."""
    stop = plan.sizes[copy.name] if copy.stop is None else copy.stop
    if copy.start + nbytes >= stop:
        return copy, None
    middle = copy.start + nbytes
    return replace(copy, start=copy.start, stop=middle), replace(copy, start=middle, stop=stop)
