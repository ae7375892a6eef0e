"""From a draft to a schedule: names for what travels together, and the serial order of a steady cycle.

Each copy stands as early as it may, behind the last unit whose bytes it overwrites; the first copies of the next cycle
stand behind the last units of this one:

    compute a | h2d c | compute b | h2d a | compute c | h2d b        (a and b: for the next cycle)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate

from taskgraph_offload.nouns.graph import Task
from taskgraph_offload.nouns.trace import Trace
from taskgraph_offload.plan.plan import span_bytes

from ..problem import unique
from ..schedule import Schedule
from .copies import Copy
from .draft import Draft


def to_schedule(draft: Draft) -> Schedule:
    """The schedule that a draft stands for; what stays lies behind the streaming region."""
    stock, trace = draft.stock, draft.stock.trace
    groups: dict[str, tuple[str, ...]] = {}
    offsets: dict[str, int] = {}
    names: list[str] = []
    for run, seat in zip(draft.runs, draft.seats, strict=True):
        names.append(unique(trace.calls[seat.visits[0][0]].name, groups))
        groups[names[-1]] = tuple(weight for index in run for weight in stock.items[index].weights)
        offsets[names[-1]] = seat.offset
    residents = _residents(draft, groups)
    cursor = max((seat.offset + seat.nbytes for seat in draft.seats), default=0)
    for name, (weights, nbytes) in residents.items():
        groups[name], offsets[name], cursor = weights, cursor, cursor + nbytes
    copied = {names[copy.seat] for copy in draft.copies}
    steady = _steady(trace, draft.copies, names, groups)
    return Schedule(groups, frozenset(groups) - copied, steady, offsets, fills_gaps=True, trace=trace)


def _residents(draft: Draft, taken: Mapping[str, object]) -> dict[str, tuple[tuple[str, ...], int]]:
    """What stays: one group for each unit that is the first to read it."""
    stock, streaming = draft.stock, draft.streaming
    residents: dict[str, tuple[tuple[str, ...], int]] = {}
    for unit, members in enumerate(stock.everything.items):
        staying = [stock.items[index] for index in members if index not in streaming]
        if staying:
            name = unique(f"{stock.trace.calls[unit].name}:stays", (*taken, *residents))
            weights = tuple(weight for item in staying for weight in item.weights)
            residents[name] = weights, sum(item.nbytes for item in staying)
    return residents


def _steady(
    trace: Trace, copies: Sequence[Copy], names: Sequence[str], groups: Mapping[str, tuple[str, ...]]
) -> tuple[Task, ...]:
    """Computes in order; behind each, the copies that it lets go, this cycle's before the next one's."""
    count = len(trace.calls)
    behind: list[list[Task]] = [[] for _ in trace.calls]
    spans = {name: span_bytes(groups[name], trace) for name in names}
    ready = max((copy.after for copy in copies), default=-1) - count
    places = list(accumulate((copy.after for copy in copies), max, initial=ready))[1:]
    for next_cycle in (False, True):
        for copy, place in zip(copies, places, strict=True):
            if (place < 0) == next_cycle:
                behind[place % count].append(_task(copy, names[copy.seat], spans[names[copy.seat]]))
    return tuple(task for call, copied in zip(trace.calls, behind, strict=True) for task in _call(call.name, copied))


def _call(name: str, copied: Sequence[Task]) -> tuple[Task, ...]:
    return (Task("compute", name), *copied)


def _task(copy: Copy, name: str, span: int) -> Task:
    stop = min(copy.stop, span)
    return Task("h2d", name) if (copy.start, stop) == (0, span) else Task("h2d", name, copy.start, stop)
