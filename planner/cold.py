"""The cold cycle: the steady order, with whatever that order finds on the device brought before its first use.

    steady     compute a | h2d c | compute b | h2d a | compute c | h2d b
    cold       h2d a | h2d r | h2d b | compute a | h2d c | compute b | h2d a | compute c | h2d b
               ~~~~~~~~~~~~~~~~~~~~~ what a steady cycle has when it begins (r: a resident that a reads)

All copies stay in the order of the calls that wait for them, which is as good as a cold cycle gets, and each is issued
as early as that order lets it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from taskgraph_offload.nouns.graph import Task
from taskgraph_offload.nouns.trace import Trace
from taskgraph_offload.plan.plan import span_bytes

from .schedule import Schedule


def cold_cycle(schedule: Schedule, trace: Trace) -> tuple[Task, ...]:
    """The tasks of the first cycle, when nothing is on the device yet."""
    index_of = {call.name: index for index, call in enumerate(trace.calls)}
    readers = {
        name: sorted({reader for weight in weights for reader in trace.readers[weight]})
        for name, weights in schedule.groups.items()
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
    """For each task of the steady order: the call that waits for the first copy from here on, or none is left."""
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
    """The copies that a steady cycle does without, because the bytes are there when it begins: (first reader, copy)."""
    brought: dict[str, list[tuple[int, int]]] = {name: [] for name in schedule.groups}
    reached = -1
    for task in schedule.steady:
        if task.kind == "compute":
            reached = index_of[task.name]
        elif task.kind == "h2d" and not task.is_activation and reached < readers[task.name][0]:
            size = span_bytes(schedule.groups[task.name], trace)
            brought[task.name].append((task.start, size if task.stop is None else task.stop))
    found: list[tuple[int, Task]] = []
    for name, weights in schedule.groups.items():
        size = span_bytes(weights, trace)
        for start, stop in gaps(brought[name], size):
            whole = Task("h2d", name)
            part = whole if (start, stop) == (0, size) else replace(whole, start=start, stop=stop)
            found.append((readers[name][0], part))
    return found


def gaps(parts: Sequence[tuple[int, int]], size: int) -> list[tuple[int, int]]:
    """What of [0, size) no part covers.

    >>> gaps([(0, 4), (6, 8)], 10)
    [(4, 6), (8, 10)]
    """
    found, cursor = [], 0
    for start, stop in sorted(parts):
        if cursor < start:
            found.append((cursor, start))
        cursor = max(cursor, stop)
    return found + ([(cursor, size)] if cursor < size or size == 0 else [])
