"""Calibration: what was measured replaces what was guessed, and a replan must earn its place."""

from dataclasses import replace
from typing import Any

import pytest

import taskgraph_offload as tgo

from ..made import SLOW_LINK, trace_of

BYTES = 1_000_448


def test_a_wrong_guess_is_mended_by_what_was_measured():
    """Costs and link were guessed wrong; after calibration the prediction is what happened."""
    guess = trace_of([BYTES] * 8, 1e-3)
    truth = trace_of([BYTES] * 8, [2e-3 + i * 1e-4 for i in range(8)])
    slower = tgo.Machine("truth", 4e8, 4e8, 5e-5, 1e12, 1e12)
    planner = tgo.Planner.for_trace(guess, "4MiB", strategy="layerwise", machine=SLOW_LINK)
    plan = planner.plan()
    happened = replace(plan, trace=truth, machine=slower).predict(5)
    measured = replace(happened, source="measured")
    calibrated = planner.calibrate(measured)
    assert calibrated.plan().predict(5).step_seconds == pytest.approx(happened.step_seconds, rel=1e-6)
    assert calibrated.machine.h2d_bytes_per_second == pytest.approx(4e8, rel=0.2)
    assert plan.predict(5).step_seconds != pytest.approx(happened.step_seconds, rel=0.1)


SECONDS = [1e-3 + i * 1e-4 for i in range(8)]


def calibrated(happens):
    """The seconds of the calls, after six cycles in which something happens to each call."""
    plan = tgo.Planner.for_trace(trace_of([BYTES] * 8, SECONDS), "4MiB", strategy="layerwise", machine=SLOW_LINK).plan()
    timeline = plan.predict(6)
    spans = (happens(span) if span.lane == "compute" else span for span in timeline.spans)
    measured = replace(timeline, source="measured", spans=tuple(span for span in spans if span is not None))
    guess = tgo.Planner.for_trace(trace_of([BYTES] * 8, 5e-3), "4MiB", strategy="layerwise", machine=SLOW_LINK)
    return [call.cost(SLOW_LINK) for call in guess.calibrate(measured).trace.calls]


def test_what_else_the_machine_does_makes_no_prediction_longer():
    """A quarter more for every call in four of five steady cycles. The cold cycle is not one of them."""
    more = {0: -0.5, 3: 0.0}
    assert calibrated(
        lambda span: replace(span, stop=span.stop + more.get(span.cycle, 0.25) * span.seconds)
    ) == pytest.approx(SECONDS)


def test_the_link_is_as_fast_as_in_its_quickest_cycle():
    """Copies took half as long again in five of six cycles."""
    plan = tgo.Planner.for_trace(trace_of([BYTES] * 8, SECONDS), "4MiB", strategy="layerwise", machine=SLOW_LINK).plan()
    timeline = plan.predict(6)
    spans = (
        replace(span, stop=span.stop + 0.5 * span.seconds) if span.lane == "h2d" and span.cycle != 2 else span
        for span in timeline.spans
    )
    measured = replace(timeline, source="measured", spans=tuple(spans))
    guess = tgo.Planner.for_trace(plan.trace, "4MiB", strategy="layerwise", machine=replace(SLOW_LINK, name="guess"))
    calibrated = guess.calibrate(measured).machine.h2d_bytes_per_second
    assert calibrated == pytest.approx(SLOW_LINK.h2d_bytes_per_second, rel=1e-6)


def test_a_cycle_that_skips_calls_is_not_the_quickest():
    """As step caches do, here in four of five steady cycles."""
    assert calibrated(lambda span: span if span.cycle == 4 or span.call in "abc" else None) == pytest.approx(SECONDS)


@pytest.mark.parametrize("strategy", ["auto", "layerwise"])
def test_a_run_that_was_cut_elsewhere_is_understood(strategy):
    """What `auto` planned has parts of blocks as calls, and what was measured has whole blocks; or the reverse."""
    units: list[dict[str, Any]] = [
        {"name": f"b{i}", "seconds": 4e-3, "tensors": [2**19] * 8, "tensor_seconds": [1] * 8} for i in range(8)
    ]
    truth = [{**unit, "seconds": 6e-3 + 1e-3 * i} for i, unit in enumerate(units)]
    planner = tgo.Planner.for_trace(tgo.Trace.from_units(units), "9MiB", strategy=strategy, machine=SLOW_LINK)
    plan = planner.plan()
    assert (len(plan.trace.calls) > 8) == (strategy == "auto")
    other = "layerwise" if strategy == "auto" else "auto"
    there = tgo.Planner.for_trace(tgo.Trace.from_units(truth), "12MiB", strategy=other, machine=SLOW_LINK).plan()
    calibrated = planner.calibrate(replace(there.predict(5), source="measured"))
    assert [call.cost(SLOW_LINK) for call in calibrated.trace.calls] == pytest.approx([u["seconds"] for u in truth])
    parts = calibrated.plan().trace.calls
    assert sum(call.cost(SLOW_LINK) for call in parts) == pytest.approx(sum(u["seconds"] for u in truth))


def test_the_old_plan_stays_where_a_new_one_predicts_no_better():
    planner = tgo.Planner.for_trace(trace_of([BYTES] * 8, 1e-3), "4MiB", strategy="layerwise", machine=SLOW_LINK)
    plan = planner.plan()
    again = planner.calibrate(replace(plan.predict(4), source="measured")).plan()
    assert (again.steady, again.bundles) == (plan.steady, plan.bundles)


def test_a_timeline_of_another_model_is_refused():
    planner = tgo.Planner.for_trace(trace_of([BYTES] * 3), "9MiB", strategy="sequential", machine=SLOW_LINK)
    other = tgo.Trace.from_units([{"name": "else", "seconds": 1.0, "tensors": [8]}])
    timeline = tgo.Planner.for_trace(other, "1MiB", strategy="sequential", machine=SLOW_LINK).plan().predict()
    with pytest.raises(tgo.SettingsError, match="another model"):
        planner.calibrate(timeline)
