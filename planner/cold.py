"""The cold cycle: the steady order, and before its first use everything that a steady cycle finds on the device.

    steady     compute a | h2d c | compute b | h2d a | compute c | h2d b
    cold       h2d a | h2d r | h2d b | compute a | h2d c | compute b | h2d a | compute c | h2d b
               ~~~~~~~~~~~~~~~~~~~~~ what a steady cycle has when it begins (r: a resident that a reads)

All copies stay in the order of the calls that wait for them, which is as good as a cold cycle gets. Each is issued as
early as that order allows.

Then the gaps are filled: while the link waits for room, it copies a part of a resident, which has bytes of its own.

    before     h2d a | h2d b |  (waits for a's bytes)  | h2d c | h2d r           r stays
    after      h2d a | h2d b |  h2d r[0:4K]            | h2d c | h2d r[4K:]

A part is no larger than its gap, so no copy comes later for that, and the following ones come earlier.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

from taskgraph_offload.nouns.graph import Task
from taskgraph_offload.nouns.trace import Trace
from taskgraph_offload.plan.plan import ALIGNMENT, Plan, span_bytes

from .strategy import Schedule

_ROUNDS = 4  # a part that moves leaves a gap behind; that one closes, and others open
_LEAST_BYTES = 2**20  # of a part


def cold_cycle(schedule: Schedule, trace: Trace) -> tuple[Task, ...]:
    """The tasks of the first cycle, when nothing is on the device yet."""
    index_of = {call.name: index for index, call in enumerate(trace.calls)}
    readers = {
        name: sorted({reader for weight in weights for reader in trace.readers[weight]})
        for name, weights in schedule.bundles.items()
    }
    waiting = sorted(_found_on_the_device(schedule, trace, readers, index_of), key=lambda entry: entry[0])
    if schedule.loads_first:
        return (*(replace(copy, before=trace.calls[0].name) for _, copy in waiting), *schedule.steady)
    order: list[Task] = []
    for task, due in zip(schedule.steady, _next_due(schedule, trace, readers, index_of), strict=True):
        while waiting and waiting[0][0] < due:
            order.append(waiting.pop(0)[1])
        order.append(task)
    return (*order, *(copy for _, copy in waiting))


def _next_due(
    schedule: Schedule, trace: Trace, readers: Mapping[str, Sequence[int]], index_of: Mapping[str, int]
) -> list[int]:
    """For each task of the steady order: the call that waits for the next copy from here on."""
    never, reached = len(trace.calls) + 1, -1
    dues: list[int] = []
    for task in schedule.steady:
        if task.kind == "compute":
            reached = index_of[task.name]
        comes = task.kind == "h2d" and not task.is_activation
        following = (reader for reader in readers[task.name] if reader > reached) if comes else ()
        dues.append(next(iter(following), len(trace.calls)) if comes else never)
    for i in range(len(dues) - 2, -1, -1):
        if dues[i] == never:
            dues[i] = dues[i + 1]
    return dues


def _found_on_the_device(
    schedule: Schedule, trace: Trace, readers: Mapping[str, Sequence[int]], index_of: Mapping[str, int]
) -> list[tuple[int, Task]]:
    """Copies of what is on the device when a steady cycle begins, each with the first call that reads it."""
    brought: dict[str, list[tuple[int, int]]] = {name: [] for name in schedule.bundles}
    reached = -1
    for task in schedule.steady:
        if task.kind == "compute":
            reached = index_of[task.name]
        elif task.kind == "h2d" and not task.is_activation and reached < readers[task.name][0]:
            size = span_bytes(schedule.bundles[task.name], trace)
            brought[task.name].append((task.start, size if task.stop is None else task.stop))
    found: list[tuple[int, Task]] = []
    for name, weights in schedule.bundles.items():
        size = span_bytes(weights, trace)
        for start, stop in uncovered(brought[name], size):
            whole = Task("h2d", name)
            part = whole if (start, stop) == (0, size) else replace(whole, start=start, stop=stop)
            found.append((readers[name][0], part))
    return found


def fill_gaps(plan: Plan) -> Plan:
    """The plan with a faster cold cycle, or the same plan."""
    for _ in range(_ROUNDS):
        filled = replace(plan, cold=_filled(plan))
        if filled.predict(1).cold_seconds >= plan.predict(1).cold_seconds:
            break
        plan = filled
    return plan


def _filled(plan: Plan) -> tuple[Task, ...]:
    """The cold order with its gaps filled by residents; those that are read first come first."""
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


def uncovered(parts: Sequence[tuple[int, int]], size: int) -> list[tuple[int, int]]:
    """The ranges of [0, size) that no part covers.

    >>> uncovered([(0, 4), (6, 8)], 10)
    [(4, 6), (8, 10)]
    """
    found, cursor = [], 0
    for start, stop in sorted(parts):
        if cursor < start:
            found.append((cursor, start))
        cursor = max(cursor, stop)
    return found + ([(cursor, size)] if cursor < size or size == 0 else [])
