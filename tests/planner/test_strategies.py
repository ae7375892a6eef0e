"""Each strategy's order as text, and its predicted time against the closed form that the textbooks give."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from taskgraph_offload.planner import strategies

import taskgraph_offload as tgo
from taskgraph_offload.nouns.graph import print_tasks

from ..made import SLOW_LINK, cases, lines, plan_of, trace_of

COPY, COMPUTE = 2e-3, 3e-3  # seconds, for blocks of 2,000,000 bytes on a link of 1e9 bytes a second
BYTES = 1_999_872  # a multiple of 512 near 2,000,000


def steady(plan: tgo.Plan) -> list[str]:
    return print_tasks(plan.steady).splitlines()


def test_sequential_loads_when_the_call_before_has_ended():
    plan = plan_of(trace_of([512, 1024]), 1024, "sequential")
    assert steady(plan) == lines("""
        h2d a after compute b
        compute a
        h2d b after compute a
        compute b
    """)
    assert plan.arena_bytes == 1024


def test_layerwise_issues_a_copy_when_the_block_before_starts():
    plan = plan_of(trace_of([512] * 4), 1024, "layerwise")
    assert steady(plan) == lines("""
        compute a
        h2d c after compute a
        compute b
        h2d d after compute b
        compute c
        h2d a after compute c
        compute d
        h2d b after compute d
    """)
    assert print_tasks(plan.cold).splitlines()[:3] == ["h2d a", "h2d b", "compute a"]


def test_layerwise_keeps_leading_or_spread_blocks():
    trace = trace_of([512] * 8)
    leading = plan_of(trace, 512 * 5, "layerwise", residents="leading")
    spread = plan_of(trace, 512 * 5, "layerwise", residents="spread")
    assert leading.residents == ("a.0", "b.0", "c.0")
    assert spread.residents == ("a.0", "c.0", "f.0")
    assert leading.peak_bytes <= 512 * 5
    by_ratio = plan_of(trace, 512 * 8, "layerwise", ratio=0.5)
    assert by_ratio.residents == ("a.0", "b.0", "c.0", "d.0")


def test_keep_holds_what_comes_first():
    plan = plan_of(trace_of([512] * 4), 512 * 3, "keep")
    assert plan.residents == ("a.0", "b.0")
    assert steady(plan) == lines("""
        compute a
        compute b
        h2d c after compute b
        compute c
        h2d d after compute c
        compute d
    """)


def units_of_two_components() -> tgo.Trace:
    return tgo.Trace.from_units(
        {"name": n, "seconds": COMPUTE, "tensors": [BYTES], "component": c}
        for n, c in [("e0", "encoder"), ("e1", "encoder"), ("t0", "transformer"), ("t1", "transformer")]
    )


def test_model_swaps_whole_components():
    plan = plan_of(units_of_two_components(), 2 * BYTES, "model")
    assert steady(plan) == lines("""
        h2d e0 after compute t1 before compute e0
        h2d e1 after compute t1 before compute e0
        compute e0
        compute e1
        h2d t0 after compute e1 before compute t0
        h2d t1 after compute e1 before compute t0
        compute t0
        compute t1
    """)
    assert plan.predict().step_seconds == pytest.approx(4 * BYTES / 1e9 + 4 * COMPUTE)


def test_model_with_writeback_pays_both_ways():
    plan = plan_of(units_of_two_components(), 2 * BYTES, "model", writeback=True)
    assert sum(task.kind == "d2h" for task in plan.tasks) == 4
    # the copies home overlap the copies in only where the seats are apart: never here, but for the lanes' own overlap
    assert plan.predict().step_seconds > plan_of(units_of_two_components(), 2 * BYTES, "model").predict().step_seconds


def test_model_keeps_a_component_that_ends_one_cycle_and_begins_the_next():
    """a, b, a: the second a goes on as the first one of the next cycle, so each step swaps twice, not three times."""
    trace = tgo.Trace.from_units(
        {"name": n, "seconds": COMPUTE, "tensors": {f"{n}.0": BYTES}, "component": n} for n in ("a", "b", "a")
    )
    plan = plan_of(trace, BYTES, "model")
    assert [task.name for task in plan.tasks if task.kind == "h2d"] == ["b", "a"]
    assert plan.predict(6).step_seconds == pytest.approx(2 * BYTES / 1e9 + 3 * COMPUTE)


def test_model_of_one_component_is_loaded_whole_before_it_starts_and_stays():
    timeline = plan_of(trace_of([BYTES] * 4, COMPUTE), 4 * BYTES, "model").predict()
    assert timeline.cold_seconds == pytest.approx(4 * BYTES / 1e9 + 4 * COMPUTE)
    assert timeline.step_seconds == pytest.approx(4 * COMPUTE)


@given(st.lists(st.tuples(st.integers(1, 10**7), st.floats(1e-6, 1e-2)), min_size=1, max_size=12))
def test_sequential_takes_all_copies_and_all_computes(blocks):
    trace = trace_of([nbytes for nbytes, _ in blocks], [seconds for _, seconds in blocks])
    timeline = plan_of(trace, "1GiB", "sequential").predict()
    expected = sum(nbytes / 1e9 + seconds for nbytes, seconds in blocks)
    assert timeline.step_seconds == pytest.approx(expected)
    assert timeline.cold_seconds == pytest.approx(expected)
    assert timeline.overlap == pytest.approx(0.0)


@given(st.lists(st.tuples(st.integers(1, 10**7), st.floats(1e-6, 1e-2)), min_size=1, max_size=12))
def test_resident_takes_all_computes(blocks):
    trace = trace_of([nbytes for nbytes, _ in blocks], [seconds for _, seconds in blocks])
    timeline = plan_of(trace, "1GiB", "resident").predict()
    assert timeline.step_seconds == pytest.approx(sum(seconds for _, seconds in blocks))
    assert timeline.stall_seconds == pytest.approx(0.0, abs=1e-12)


@given(st.integers(2, 20).map(lambda half: 2 * half), st.floats(1e-4, 1e-2))
def test_layerwise_of_equal_blocks_is_the_textbook_pipeline(count, seconds):
    """Two buffers, depth one: the slower lane sets the pace; the cold cycle adds one copy, or one compute."""
    timeline = plan_of(trace_of([BYTES] * count, seconds), 2 * BYTES, "layerwise", prefetch=1).predict(6)
    copy = BYTES / 1e9
    assert timeline.step_seconds == pytest.approx(count * max(copy, seconds))
    assert timeline.cold_seconds == pytest.approx(copy + (count - 1) * max(copy, seconds) + seconds)


def test_layerwise_with_an_odd_number_of_blocks_waits_at_the_wrap_only_without_a_third_buffer():
    trace = trace_of([BYTES] * 5, COMPUTE)
    tight = plan_of(trace, 2 * BYTES, "layerwise").predict(6).step_seconds
    roomy = plan_of(trace, 3 * BYTES, "layerwise").predict(6).step_seconds
    assert roomy == pytest.approx(5 * COMPUTE)
    assert tight == pytest.approx(5 * COMPUTE + BYTES / 1e9)


def test_without_prefetch_nothing_overlaps():
    trace = trace_of([BYTES] * 4, COMPUTE)
    timeline = plan_of(trace, "1GiB", "layerwise", prefetch=0).predict()
    assert timeline.step_seconds == pytest.approx(4 * (BYTES / 1e9 + COMPUTE))


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 3), st.integers(0, 2000)), min_size=1, max_size=10),
    st.sampled_from([n for n in strategies.names() if n != "auto"]),
    st.integers(0, 3),
    st.floats(0.05, 1.2),
)
def test_every_plan_is_proved_and_keeps_the_budget_whatever_the_shapes(blocks, strategy, prefetch, share):
    """Blocks of any size, empty ones, weights that several calls share: a proved plan, or the clear error."""
    units = [
        {"name": f"u{i}", "seconds": 1e-6, "transient_bytes": act, "tensors": {f"w{i}": size, f"shared{tie}": 700}}
        for i, (size, tie, act) in enumerate(blocks)
    ]
    trace = tgo.Trace.from_units(units)
    budget = int(share * trace.weight_bytes) + trace.activation_bytes
    options = {"prefetch": prefetch} if strategy == "layerwise" else {}
    try:
        plan = plan_of(trace, max(1, budget), strategy, **options)
    except tgo.BudgetError as error:
        assert error.smallest_bytes > budget
        plan = plan_of(trace, error.smallest_bytes, strategy, **options)
        assert plan.peak_bytes == error.smallest_bytes
    assert plan.peak_bytes <= plan.budget_bytes
    assert plan.predict().step_seconds >= plan.bound.step_seconds * (1 - 1e-9)


@pytest.mark.parametrize("case", range(8))
def test_the_cases_figures_are_reproduced(case):
    """Within 2% of what another implementation of the same policies got."""
    given_case = cases()[case]
    trace = tgo.Trace.from_units(given_case["units"])
    link = given_case["link_bytes_per_second"]
    machine = tgo.Machine("case", link, link, given_case["latency_seconds"], 1e12, 1e12)
    compared: list[tuple[str, str, dict[str, Any]]] = [
        ("seq", "sequential", {}),
        ("lw1w", "layerwise", {"prefetch": 1}),
        ("prefix", "layerwise", {"residents": "leading"}),
        ("even", "layerwise", {"residents": "spread"}),
    ]
    for budget in given_case["budgets"]:
        for key, strategy, options in compared:
            expected = budget["policies"][key]
            if expected is None:
                continue
            planner = tgo.Planner.for_trace(
                trace, f"{budget['budget_bytes']}B", strategy=strategy, machine=machine, **options
            )
            assert planner.plan().predict(8).step_seconds == pytest.approx(expected, rel=0.02), (key, budget)


@pytest.mark.parametrize("case", range(8))
def test_the_cases_figures_of_the_best_depth_are_reproduced(case):
    """`lwk`: as deep as buffers of the largest block fit, or half of that, whichever is better."""
    given_case = cases()[case]
    trace = tgo.Trace.from_units(given_case["units"])
    link = given_case["link_bytes_per_second"]
    machine = tgo.Machine("case", link, link, given_case["latency_seconds"], 1e12, 1e12)
    largest = max(sum(unit["tensors"]) for unit in given_case["units"])
    for budget in given_case["budgets"]:
        depth = min((budget["budget_bytes"] - trace.activation_bytes) // largest - 1, len(trace.calls) - 1)
        assert (depth < 1) == (budget["policies"]["lwk"] is None)
        steps = []
        for prefetch in {depth, depth // 2} - {0, -1}:
            options = {"strategy": "layerwise", "machine": machine, "prefetch": prefetch}
            planner = tgo.Planner.for_trace(trace, f"{budget['budget_bytes']}B", **options)
            steps.append(planner.plan().predict(8).step_seconds)
        assert not steps or min(steps) == pytest.approx(budget["policies"]["lwk"], rel=0.02), budget["fraction"]


@pytest.mark.parametrize("strategy", strategies.names())
def test_where_nothing_can_stream_every_strategy_keeps_all_or_says_what_would_do(strategy):
    trace = trace_of([512] * 2)
    fixed = tgo.Trace(trace.weights, trace.calls, fixed={name: "changed by the forward" for name in trace.weights})
    with pytest.raises(tgo.BudgetError) as refused:
        plan_of(fixed, 1, strategy)
    plan = plan_of(fixed, refused.value.smallest_bytes, strategy)
    assert len(plan.residents) == 2


def test_machines_are_compared_on_the_same_plan():
    plan = plan_of(trace_of([BYTES] * 4, COMPUTE), 2 * BYTES, "layerwise")
    slower = tgo.Machine("slower", SLOW_LINK.h2d_bytes_per_second / 10, 1e9, 0.0, 1e12, 1e12)
    assert plan.predict(6, machine=slower).step_seconds == pytest.approx(4 * BYTES / 1e8)
