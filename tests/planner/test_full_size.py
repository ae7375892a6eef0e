"""Every strategy on models at their full size, at every budget: a proved plan that keeps it, or the clear error."""

from functools import cache
from typing import Any

import pytest
from taskgraph_offload.planner import strategies
from taskgraph_offload.planner.capture import capture

import taskgraph_offload as tgo

from ..models import FULL_SIZE
from ..sweeps import mostly_slow

MODELS = ["flux", "wan", "sdxl", "llama", "t5"]
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("layerwise", {"residents": "leading"}),
    ("layerwise", {"residents": "spread", "prefetch": 2}),
]
WAYS: list[tuple[str, dict[str, Any]]] = [(name, {}) for name in strategies.names() if name != "auto"] + VARIANTS


@cache
def trace_of(name: str) -> tgo.Trace:
    model, inputs = FULL_SIZE[name]()
    return capture(model, inputs)


@pytest.mark.parametrize("name", mostly_slow(MODELS, ["t5"]))
def test_every_strategy_at_every_budget(name):
    trace, planned = trace_of(name), 0
    for strategy, options in WAYS:
        for percent in range(10, 101, 10):
            budget = trace.weight_bytes * percent // 100 + trace.activation_bytes
            planner = tgo.Planner.for_trace(
                trace, f"{budget}B", strategy=strategy, machine="rtx4090", margin=0, **options
            )
            try:
                plan = planner.plan()
            except tgo.BudgetError as error:
                assert error.smallest_bytes > budget
                continue
            planned += 1
            plan.verify()
            assert plan.peak_bytes <= budget
            assert plan.predict(8).step_seconds >= plan.bound.step_seconds * (1 - 1e-9)
    assert planned >= 30


@pytest.mark.parametrize("name", mostly_slow(["flux", "wan", "sdxl", "llama"], ["wan"]))
def test_auto_is_near_the_bound_at_every_budget_and_never_slower_with_more(name):
    """Fewer budgets than `benchmarks/auto_budgets.py`, which plans for forty."""
    trace, steps = trace_of(name), []
    largest = max(sum(trace.weights[weight].nbytes for weight in call.reads) for call in trace.calls)
    for budget in tgo.Planner.for_trace(trace, 1, machine="rtx4090").budgets(4, ["auto"]):
        plan = tgo.Planner.for_trace(trace, f"{budget}B", machine="rtx4090").plan()
        steps.append(plan.predict(8).step_seconds)
        assert plan.peak_bytes + plan.margin_bytes <= budget
        assert steps[-1] <= 1.005 * min(steps)
        room = budget - trace.activation_bytes - plan.margin_bytes
        assert room < 2 * largest or steps[-1] <= 1.05 * plan.bound.step_seconds
        assert steps[-1] >= plan.bound.step_seconds * (1 - 1e-9)
    assert not plan.streamed_bytes


@pytest.mark.parametrize("name", mostly_slow(MODELS, ["t5"]))
def test_the_smallest_budget_that_an_error_names_is_enough(name):
    trace = trace_of(name)
    for strategy, options in WAYS:
        with pytest.raises(tgo.BudgetError) as refused:
            tgo.Planner.for_trace(trace, 1e-6, strategy=strategy, machine="rtx4090", **options).plan()
        smallest = refused.value.smallest_bytes
        plan = tgo.Planner.for_trace(trace, f"{smallest}B", strategy=strategy, machine="rtx4090", **options).plan()
        assert plan.peak_bytes + plan.margin_bytes <= smallest
