"""The bound: what the cases state, what an exact linear program says, and what no plan ever beats."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from scipy.optimize import linprog
from taskgraph_offload.planner.bound import bound, smallest_budget_without_stall

import taskgraph_offload as tgo
from taskgraph_offload.nouns.trace import Activation
from taskgraph_offload.plan.plan import Bound, Bundle

from ..made import SLOW_LINK, cases, trace_of

RATE = SLOW_LINK.h2d_bytes_per_second


def machine_of(case: dict[str, Any]) -> tgo.Machine:
    link = case["link_bytes_per_second"]
    return tgo.Machine(case["name"], link, link, case["latency_seconds"], 1e12, 1e12)


def random_units(seed: int, count: int) -> list[dict[str, Any]]:
    """Units with all sorts of proportions, in bytes and seconds that suit the test machine."""
    draw = random.Random(seed)
    return [
        {
            "name": f"u{i}",
            "seconds": draw.choice([0.0, 1e-3, 5e-3]) * draw.random(),
            "tensors": [draw.randrange(1, 3_000_000) for _ in range(draw.randrange(0, 4))],
            "transient_bytes": draw.randrange(0, 1_000_000),
        }
        for i in range(count)
    ]


def exact_step_seconds(trace: tgo.Trace, budget: int) -> float:
    """The least period in which every window has the time that its bytes need: HiGHS on all windows, one by one.

    Variables: a start for each unit, and the period. For all i < j <= i + n: j starts so many seconds after i.
    """
    calls, count = trace.calls, len(trace.calls)
    rows, limits = [], []
    for i, first in enumerate(calls):
        seen, computes = set(first.reads), first.cost(SLOW_LINK)
        for j in range(i + 1, i + count + 1):
            seconds, last = computes, calls[j % count]
            if j < i + count:
                seen |= set(last.reads)
                beyond = sum(trace.weights[name].nbytes for name in seen) - (budget - first.transient_bytes)
                seconds = max(computes, first.cost(SLOW_LINK) + beyond / RATE)
            row = np.zeros(count + 1)
            row[i] += 1
            row[j % count] -= 1
            row[count] -= j // count
            rows.append(row)
            limits.append(-seconds)
            computes += last.cost(SLOW_LINK)
    solved = linprog([0.0] * count + [1.0], A_ub=np.array(rows), b_ub=limits, bounds=[(None, None)] * (count + 1))
    assert solved.status == 0, solved.message
    return float(solved.x[count])


def step_seconds_of_whole_blocks(trace: tgo.Trace, room: int, streams: set[int]) -> float | None:
    """The step when some blocks stream, each copied as soon as the bytes of those read before leave room for it."""
    sizes = [sum(trace.weights[name].nbytes for name in call.reads) for call in trace.calls]
    order, count = sorted(streams), len(sizes)
    region = room - sum(size for index, size in enumerate(sizes) if index not in streams)
    if any(sizes[index] > region for index in order) or region < 0:
        return None
    ends: dict[int, float] = {}
    link, end, copied, queue = 0.0, 0.0, 0, list[int]()
    for unit in range(12 * count):
        if unit % count in streams:
            copied, free = copied + sizes[unit % count], 0.0
            while copied > region:
                copied -= sizes[queue[0] % count]
                free = ends[queue.pop(0)]
            link = max(link, free) + sizes[unit % count] / RATE
            queue.append(unit)
            end = max(end, link)
        end = ends[unit] = end + trace.calls[unit % count].cost(SLOW_LINK)
    return (ends[12 * count - 1] - ends[6 * count - 1]) / 6


@pytest.mark.parametrize("case", cases(), ids=lambda case: str(case["name"]))
def test_the_bound_is_what_the_cases_state(case: dict[str, Any]) -> None:
    trace, machine = tgo.Trace.from_units(case["units"]), machine_of(case)
    for budget in case["budgets"]:
        found = bound(trace, budget["budget_bytes"], machine)
        assert found.block_step_seconds == pytest.approx(budget["bound_step_seconds"], rel=1e-6)
        assert found.block_cold_seconds == pytest.approx(budget["bound_cold_seconds"], rel=1e-6)
        assert found.step_seconds <= found.block_step_seconds * (1 + 1e-9)
        assert found.cold_seconds <= found.block_cold_seconds * (1 + 1e-9)


@pytest.mark.parametrize("seed", range(40))
def test_the_bound_equals_the_linear_program_over_all_windows(seed: int) -> None:
    draw = random.Random(seed)
    trace = tgo.Trace.from_units(random_units(seed, draw.choice([1, 2, 3, 5, 9, 20])))
    budget = int(trace.activation_bytes + draw.uniform(0.1, 1.1) * trace.weight_bytes)
    assert bound(trace, budget, SLOW_LINK).block_step_seconds == pytest.approx(
        exact_step_seconds(trace, budget), rel=1e-9, abs=1e-12
    )


@pytest.mark.parametrize("seed", range(40))
def test_weights_that_several_units_read_count_once_in_each_window(seed: int) -> None:
    draw = random.Random(seed)
    sizes = {f"w{i}": draw.randrange(1, 2_000_000) for i in range(8)}
    units = [
        {
            "name": f"u{i}",
            "seconds": 2e-3 * draw.random(),
            "tensors": {name: sizes[name] for name in draw.sample(sorted(sizes), draw.randrange(0, 4))},
            "transient_bytes": draw.randrange(0, 100_000),
        }
        for i in range(draw.choice([2, 4, 7, 12]))
    ]
    trace = tgo.Trace.from_units(units)
    budget = int(trace.activation_bytes + draw.uniform(0.1, 1.0) * trace.weight_bytes)
    assert bound(trace, budget, SLOW_LINK).block_step_seconds == pytest.approx(
        exact_step_seconds(trace, budget), rel=1e-9, abs=1e-12
    )


def test_a_whole_model_that_runs_twice_a_cycle_needs_twice_the_bytes() -> None:
    units = [{"name": name, "seconds": 0.0, "tensors": {name: 1_000_000}} for name in "abcdefghij"]
    once, twice = tgo.Trace.from_units(units), tgo.Trace.from_units(units + units)
    least = bound(once, 3_000_000, SLOW_LINK).step_seconds
    assert bound(twice, 3_000_000, SLOW_LINK).step_seconds == pytest.approx(2 * least)


def test_what_always_stays_takes_room_and_comes_once() -> None:
    streaming = trace_of([1_000_000] * 6, seconds=0.0)
    fixed = tgo.Trace.from_units(
        [{"name": "a", "seconds": 0.0, "tensors": {"a": 1_000_000, "stays": 500_000}}]
        + [{"name": name, "seconds": 0.0, "tensors": {name: 1_000_000}} for name in "bcdef"]
    )
    fixed = type(fixed)(fixed.weights, fixed.calls, fixed=dict.fromkeys(["stays"], "said so"))
    without, with_it = bound(streaming, 2_000_000, SLOW_LINK), bound(fixed, 2_500_000, SLOW_LINK)
    assert with_it.step_seconds == pytest.approx(without.step_seconds)
    assert with_it.cold_seconds == pytest.approx(without.cold_seconds + 0.5e-3)


@pytest.mark.parametrize("seed", range(10))
def test_no_choice_of_whole_blocks_beats_the_bound(seed: int) -> None:
    draw = random.Random(seed)
    trace = trace_of([draw.randrange(1, 1_000_000) for _ in range(6)], [1e-3 * draw.random() for _ in range(6)])
    room = int(trace.weight_bytes * draw.uniform(0.4, 0.95))
    least = bound(trace, room, SLOW_LINK).step_seconds
    choices = [set(chosen) for size in range(7) for chosen in combinations(range(6), size)]
    steps = [step_seconds_of_whole_blocks(trace, room, chosen) for chosen in choices]
    possible = [step for step in steps if step is not None]
    assert possible
    assert min(possible) >= least * (1 - 1e-9)


@pytest.mark.parametrize("seed", range(20))
def test_no_plan_beats_the_bound(seed: int) -> None:
    trace = tgo.Trace.from_units(random_units(seed, 6))
    for strategy in ("auto", "sequential", "layerwise", "keep"):
        planner = tgo.Planner.for_trace(trace, "60%", strategy=strategy, machine=SLOW_LINK)
        try:
            plan = planner.plan()
        except tgo.BudgetError:
            continue
        timeline = plan.predict(8)
        assert timeline.step_seconds >= plan.bound.step_seconds * (1 - 1e-9)
        assert timeline.cold_seconds >= plan.bound.cold_seconds * (1 - 1e-9)


def waiting_trace() -> tgo.Trace:
    """s makes an activation that waits all through five rounds of p and q, for e."""
    transients = {"s": 1024_000, "p": 2048_000, "q": 2048_000, "e": 1024_000}
    trace = tgo.Trace.from_units(
        {"name": name, "seconds": 1e-6, "tensors": {name: 1024_000}, "transient_bytes": transients[name]}
        for name in ["s", *"pq" * 5, "e"]
    )
    return replace(trace, activations=(Activation("s/0", 1024_000, producer=0, uses=(11,), until=12),))


def test_no_plan_that_lets_an_activation_leave_beats_the_bound() -> None:
    trace, budget = waiting_trace(), 3072_000
    bundles = {name: Bundle(name, (name,), offset) for name, offset in zip("spqe", (0, 0, 1024_000, 0), strict=True)}
    tasks = [
        task
        for call in trace.calls
        for task in ([tgo.Task("h2d", call.name)] if call.name in bundles else []) + [tgo.Task("compute", call.name)]
    ]
    tasks[2:2], tasks[-2:-2] = [tgo.Task("d2h", "~s/0", before="p")], [tgo.Task("h2d", "~s/0", after="q#5")]
    program = tuple(tasks)
    plan = tgo.Plan(trace, SLOW_LINK, "hand", {}, budget, 0, 2048_000, bundles, program, program, Bound(0, 0, 0, 0))
    plan.verify()
    timeline, least = plan.predict(8), bound(trace, budget, SLOW_LINK)
    assert timeline.step_seconds >= max(least.step_seconds, least.block_step_seconds) * (1 - 1e-9)
    assert timeline.cold_seconds >= max(least.cold_seconds, least.block_cold_seconds) * (1 - 1e-9)
    assert timeline.step_seconds < bound(replace(trace, activations=()), budget, SLOW_LINK).step_seconds


@pytest.mark.parametrize("case", cases(), ids=lambda case: str(case["name"]))
def test_from_the_smallest_budget_without_stall_on_the_bound_is_the_compute(case: dict[str, Any]) -> None:
    trace, machine = tgo.Trace.from_units(case["units"]), machine_of(case)
    computes = sum(call.cost(machine) for call in trace.calls)
    enough = smallest_budget_without_stall(trace, machine)
    assert bound(trace, enough, machine).step_seconds == pytest.approx(computes, rel=1e-9)
    assert bound(trace, int(enough * 0.99), machine).step_seconds > computes * (1 + 1e-6)
