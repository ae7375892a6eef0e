"""The cold cycle's link does not wait for room while what stays is still to come."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from taskgraph_offload.planner.assemble import fill_gaps

import taskgraph_offload as tgo

from ..made import SLOW_LINK

MIB = 2**20


def waiting_plan(resident: int = 4) -> tgo.Plan:
    """A computes for long, then b comes to the same bytes; r, which c reads, would come last."""
    seconds, sizes = [0.050, 0.001, 0.001], {"a": 8 * MIB, "b": 8 * MIB, "c": resident * MIB}
    trace = tgo.Trace.from_units(
        {"name": name, "seconds": s, "tensors": [nbytes]}
        for s, (name, nbytes) in zip(seconds, sizes.items(), strict=True)
    )
    plan = tgo.Planner.for_trace(trace, "100%", strategy="resident", machine=SLOW_LINK).plan()
    seats = {"a": 0, "b": 0, "c": 8 * MIB}
    bundles = {
        name: replace(bundle, offset=seats[name[0]], resident=name[0] == "c") for name, bundle in plan.bundles.items()
    }
    bring = {name[0]: tgo.Task("h2d", name) for name in bundles}
    compute = [tgo.Task("compute", name) for name in "abc"]
    cold = (bring["a"], compute[0], bring["b"], bring["c"], compute[1], compute[2])
    steady = (bring["a"], compute[0], bring["b"], compute[1], compute[2])
    made = replace(plan, bundles=bundles, arena_bytes=(8 + resident) * MIB, cold=cold, steady=steady)
    made.verify()
    return made


def test_what_stays_comes_while_the_link_would_wait() -> None:
    plan = waiting_plan()
    filled = fill_gaps(plan)
    filled.verify()
    assert [str(task).split(".")[0] for task in filled.cold[:3]] == ["h2d a", "h2d c", "compute a"]
    assert filled.predict(1).cold_seconds == pytest.approx(
        plan.predict(1).cold_seconds - 4 * MIB / 1e9 + 0.001
    )  # b's compute is not hidden any more


def test_only_what_fits_the_gap_comes_early() -> None:
    plan = waiting_plan(resident=60)
    filled = fill_gaps(plan)
    filled.verify()
    first, rest = [task for task in filled.cold if task.name.startswith("c") and task.kind == "h2d"]
    gap = 0.050  # while a runs
    assert (first.start, rest.stop, first.stop) == (0, 60 * MIB, rest.start)
    assert gap - 512 / 1e9 < (first.stop or 0) / 1e9 <= gap
    starts = {
        span.node: span.start for plan in (plan, filled) for span in plan.predict(1).spans if "h2d b" in span.node
    }
    assert list(starts.values()) == pytest.approx([8 * MIB / 1e9 + 0.050])


def test_without_a_gap_nothing_changes() -> None:
    plan = waiting_plan()
    quick = replace(plan, machine=replace(SLOW_LINK, h2d_bytes_per_second=1e15))
    assert fill_gaps(fill_gaps(quick)).cold == fill_gaps(quick).cold
    without = replace(plan, cold=plan.steady, bundles={n: replace(b, resident=False) for n, b in plan.bundles.items()})
    assert fill_gaps(without).cold is without.cold


def test_auto_fills_them() -> None:
    trace = tgo.Trace.from_units(
        {"name": f"b{i}", "seconds": 0.1 if i < 4 else 0.001, "tensors": [MIB] * 32} for i in range(16)
    )
    plan = tgo.Planner.for_trace(trace, "40%", machine=SLOW_LINK).plan()
    spans = plan.predict(1).lane("h2d")
    stays = [span.stop for span in spans if plan.bundles[span.name].resident]
    waits = [after.start - before.stop for before, after in pairwise(spans) if after.start < stays[-1]]
    assert max(waits) * 1e9 < 2 * MIB
