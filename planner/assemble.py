"""Makes a whole plan from a request and a budget: schedule, seats, cold cycle, bound; proves it at the end.

The cold cycle is the steady order, and before its first use everything that a steady cycle finds on the device:

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

from bisect import bisect_right
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import pairwise
from operator import itemgetter
from typing import Any

from taskgraph_offload.errors import BudgetError
from taskgraph_offload.nouns.budget import readable
from taskgraph_offload.nouns.graph import Task
from taskgraph_offload.nouns.program import Program, lengthened, shortened
from taskgraph_offload.nouns.trace import Trace
from taskgraph_offload.plan.plan import ALIGNMENT, Bound, Bundle, Plan, aligned, span_bytes

from . import strategies
from .bound import bound
from .strategies import FIXED, Infeasible, Problem, Request, Schedule, arena_bytes, bundles_read, place

_ROUNDS = 4  # a part that moves leaves a gap behind; that one closes, and others open
_LEAST_BYTES = 2**20  # of a part


def make_plan(request: Request, budget_bytes: int) -> Plan:
    """Plan within a budget and prove the plan, or raise `BudgetError`."""
    least = bound(request.trace, budget_bytes - request.margin_bytes, request.machine)
    plan = replace(unproved_plan(request, budget_bytes), bound=least)
    improve = strategies.find(request.strategy).improve
    if improve is not None:
        plan = improve(plan, partial(_rival_plan, request, budget_bytes))
    plan.verify()
    return plan


def _rival_plan(request: Request, budget_bytes: int, strategy: str, options: Mapping[str, Any]) -> Plan | None:
    """The plan of another strategy, if it can plan within the budget."""
    with suppress(BudgetError):
        return unproved_plan(replace(request, strategy=strategy, options=options), budget_bytes)
    return None


def unproved_plan(request: Request, budget_bytes: int) -> Plan:
    """A plan that is not yet proved, and without its bound; or `BudgetError`."""
    try:
        schedule, offsets = _fit(request, budget_bytes - request.overhead_bytes)
    except Infeasible as infeasible:
        raise _too_small(request, budget_bytes, infeasible) from None
    plan = _assemble(request, budget_bytes, schedule, offsets)
    plan = fill_gaps(plan) if schedule.fills_gaps else plan
    return _lengthened(plan, request.trace.program)


def _lengthened(plan: Plan, program: Program) -> Plan:
    """The plan of the whole program, from one of the shortened program."""
    if plan.trace.program == program:
        return plan
    return replace(
        plan,
        trace=replace(plan.trace, program=program),
        cold=lengthened(plan.cold, plan.trace, program),
        steady=lengthened(plan.steady, plan.trace, program),
    )


def smallest_budget(request: Request) -> int:
    """The smallest budget that works for a strategy."""
    try:
        _fit(request, -1 - request.trace.activation_bytes)
    except Infeasible as infeasible:
        return infeasible.arena_bytes - infeasible.freed_bytes + request.overhead_bytes
    raise AssertionError("nothing fits in less than no memory")


def _fit(request: Request, capacity: int) -> tuple[Schedule, Mapping[str, int]]:
    """The strategy's schedule and the seats of its bundles, within `capacity` bytes of arena; or `Infeasible`."""
    problem = Problem(shortened(request.trace), capacity, request.machine, request.trace.program)
    if problem.bundles:
        schedule = strategies.find(request.strategy).schedule(problem, **request.options)
    else:  # nothing can stream: there is nothing to decide
        schedule = Schedule({}, frozenset(), problem.computes)
    trace = schedule.trace or problem.trace
    offsets = schedule.offsets or place(schedule, trace)
    needed = arena_bytes(schedule, trace, offsets)
    if needed > capacity + schedule.freed_bytes + schedule.lent_bytes:
        raise Infeasible(needed)
    return schedule, offsets


def _assemble(request: Request, budget_bytes: int, schedule: Schedule, offsets: Mapping[str, int]) -> Plan:
    """The plan of a schedule: the fixed weights are at the bottom of the arena, the rest above them."""
    trace, fixed = schedule.trace or shortened(request.trace), request.fixed
    bottom = aligned(span_bytes(fixed, trace))
    whole = schedule.with_resident(FIXED, fixed) if fixed else schedule
    bundles: dict[str, Bundle] = {}
    for name, weights in whole.bundles.items():
        seat = bottom + offsets[name] if name in offsets else 0
        bundles[name] = Bundle(name, weights, seat, name in whole.residents, whole.components.get(name))
    arena = bottom + arena_bytes(schedule, trace, offsets)
    return Plan(
        trace=trace,
        machine=request.machine,
        strategy=request.strategy,
        options=dict(request.options),
        budget_bytes=budget_bytes,
        margin_bytes=request.margin_bytes,
        arena_bytes=arena,
        bundles=bundles,
        cold=cold_cycle(whole, trace),
        steady=whole.steady,
        bound=Bound(0.0, 0.0, 0.0, 0.0),
        lent=_lent(trace, budget_bytes - request.margin_bytes - arena) if trace.program else {},
    )


def _lent(trace: Trace, beside: int) -> dict[str, int]:
    """The bytes that components need for activations, where these do not fit beside the arena."""
    found = {}
    for component, calls in trace.calls_of.items():
        over = max(call.transient_bytes for call in calls) - beside
        if over > 0:
            found[component] = aligned(over)
    return found


def _too_small(request: Request, budget_bytes: int, infeasible: Infeasible) -> BudgetError:
    """The error that says what would do: for this strategy, and for the least demanding one."""
    smallest = infeasible.arena_bytes - infeasible.freed_bytes + request.overhead_bytes
    least, name = min((smallest_budget(_with(request, name)), name) for name in strategies.names())
    trace, fixed = request.trace, aligned(span_bytes(request.fixed, request.trace))
    activations = trace.activation_bytes - infeasible.freed_bytes
    parts = {"activations": activations, "always resident": fixed, "margin": request.margin_bytes}
    holds = [f"{what} {readable(nbytes)}" for what, nbytes in parts.items() if nbytes]
    holds.append(f"what {request.strategy} must hold at once {readable(infeasible.arena_bytes)}")
    message = (
        f"a budget of {budget_bytes} bytes ({readable(budget_bytes)}) is too small for strategy {request.strategy!r}: "
        f'the smallest that works is "{smallest}B" ({readable(smallest)}: {", ".join(holds)})'
    )
    if least < smallest:
        message += f'; strategy {name!r} would do with "{least}B" ({readable(least)})'
    return BudgetError(message, smallest)


def _with(request: Request, strategy: str) -> Request:
    same = strategy == request.strategy
    return Request(request.trace, request.machine, strategy, request.options if same else {}, request.margin_bytes)


def cold_cycle(schedule: Schedule, trace: Trace) -> tuple[Task, ...]:
    """The tasks of the first cycle, when nothing is on the device yet."""
    readers: dict[str, list[int]] = {name: [] for name in schedule.bundles}
    read = bundles_read(schedule.bundles, trace, schedule.components)
    for index, call in enumerate(trace.order):
        for name in read[call.name]:
            readers[name].append(index)
    dues, brought = _dues_and_brought(schedule, trace, readers)
    found: list[tuple[int, Task]] = []  # copies of what a steady cycle finds on the device, each with its first reader
    for name, weights in schedule.bundles.items():
        size = span_bytes(weights, trace)
        for start, stop in uncovered(brought.get(name, ()), size):
            copy = Task("h2d", name) if (start, stop) == (0, size) else Task("h2d", name, start=start, stop=stop)
            found.append((readers[name][0], copy))
    waiting = deque(sorted(found, key=itemgetter(0)))
    if schedule.loads_first:
        return (*(replace(copy, before=trace.order[0].name) for _, copy in waiting), *schedule.steady)
    order: list[Task] = []
    for task, due in zip(schedule.steady, dues, strict=True):
        while waiting and waiting[0][0] < due:
            order.append(waiting.popleft()[1])
        order.append(task)
    return (*order, *map(itemgetter(1), waiting))


def _dues_and_brought(
    schedule: Schedule, trace: Trace, readers: Mapping[str, Sequence[int]]
) -> tuple[list[int], dict[str, list[tuple[int, int]]]]:
    """For each task of the steady order: the call that waits for the next copy from here on.

    And for each bundle: the byte ranges that the steady order copies before the first call that reads the bundle.
    """
    never, reached = len(trace.order) + 1, -1
    dues: list[int] = []
    brought: dict[str, list[tuple[int, int]]] = {}
    for task in schedule.steady:
        due = never
        if task.kind == "compute":
            reached += 1
        elif task.kind == "h2d" and not task.is_activation:
            following = bisect_right(readers[task.name], reached)
            due = (*readers[task.name], len(trace.order))[following]
            if following == 0:
                stop = span_bytes(schedule.bundles[task.name], trace) if task.stop is None else task.stop
                brought.setdefault(task.name, []).append((task.start, stop))
        dues.append(due)
    for i in range(len(dues) - 2, -1, -1):
        if dues[i] == never:
            dues[i] = dues[i + 1]
    return dues, brought


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
    slots: list[list[Task]] = []
    staying: deque[int] = deque()
    for task in plan.cold:
        if task.kind == "h2d":
            if not task.is_activation and plan.bundles[task.name].resident:
                staying.append(len(slots))
            slots.append([task])
    machine = plan.machine
    for number, (before, span) in enumerate(pairwise(plan.predict(1).lane("h2d")), 1):
        gap = span.start - before.stop
        while staying and staying[0] <= number:
            staying.popleft()
        while staying:
            carried = int((gap - machine.latency_seconds) * machine.h2d_bytes_per_second)
            if carried < _LEAST_BYTES:
                break
            part, rest = _cut(plan, slots[staying[0]].pop(), carried // ALIGNMENT * ALIGNMENT)
            slots[number - 1].append(part)
            gap -= machine.copy_seconds("h2d", plan.task_bytes(part))
            if rest is not None:
                slots[staying[0]].append(rest)
            else:
                staying.popleft()
    order: list[Task] = []
    following = iter(slots)
    for task in plan.cold:
        order += next(following) if task.kind == "h2d" else [task]
    return tuple(order)


def _cut(plan: Plan, copy: Task, nbytes: int) -> tuple[Task, Task | None]:
    """The first bytes of a copy, and the rest if there is one."""
    stop = plan.sizes[copy.name] if copy.stop is None else copy.stop
    if copy.start + nbytes >= stop:
        return copy, None
    middle = copy.start + nbytes
    return replace(copy, start=copy.start, stop=middle), replace(copy, start=middle, stop=stop)
