"""Makes a whole plan from a request and a budget: schedule, seats, cold cycle, bound; proves it at the end."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

from taskgraph_offload.errors import BudgetError
from taskgraph_offload.nouns.budget import readable
from taskgraph_offload.plan.plan import Bound, Bundle, Plan, aligned, span_bytes

from . import strategies
from .bound.bounds import bound
from .cold import cold_cycle, fill_gaps
from .seats import arena_bytes, place
from .strategy import FIXED, Infeasible, Problem, Request, Schedule


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
    return fill_gaps(plan) if schedule.fills_gaps else plan


def smallest_budget(request: Request) -> int:
    """The smallest budget that works for a strategy."""
    try:
        _fit(request, -1 - request.trace.activation_bytes)
    except Infeasible as infeasible:
        return infeasible.arena_bytes - infeasible.freed_bytes + request.overhead_bytes
    raise AssertionError("nothing fits in less than no memory")


def _fit(request: Request, capacity: int) -> tuple[Schedule, Mapping[str, int]]:
    """The strategy's schedule and the seats of its bundles, within `capacity` bytes of arena; or `Infeasible`."""
    problem = Problem(request.trace, capacity, request.machine)
    if problem.bundles:
        schedule = strategies.find(request.strategy).schedule(problem, **request.options)
    else:  # nothing can stream: there is nothing to decide
        schedule = Schedule({}, frozenset(), problem.computes)
    trace = schedule.trace or request.trace
    offsets = schedule.offsets or place(schedule, trace)
    needed = arena_bytes(schedule, trace, offsets)
    if needed > capacity + schedule.freed_bytes:
        raise Infeasible(needed)
    return schedule, offsets


def _assemble(request: Request, budget_bytes: int, schedule: Schedule, offsets: Mapping[str, int]) -> Plan:
    """The plan of a schedule: the fixed weights are at the bottom of the arena, the rest above them."""
    trace, fixed = schedule.trace or request.trace, request.fixed
    bottom = aligned(span_bytes(fixed, trace))
    whole = schedule.with_resident(FIXED, fixed) if fixed else schedule
    seats = {name: offset + bottom for name, offset in offsets.items()} | ({FIXED: 0} if fixed else {})
    bundles = {
        name: Bundle(name, weights, seats[name], name in whole.residents) for name, weights in whole.bundles.items()
    }
    return Plan(
        trace=trace,
        machine=request.machine,
        strategy=request.strategy,
        options=dict(request.options),
        budget_bytes=budget_bytes,
        margin_bytes=request.margin_bytes,
        arena_bytes=arena_bytes(whole, trace, seats),
        bundles=bundles,
        cold=cold_cycle(whole, trace),
        steady=whole.steady,
        bound=Bound(0.0, 0.0, 0.0, 0.0),
    )


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
