"""What a plan says of itself: what binds it, by which window, how far from the bound, and what would close that."""

from __future__ import annotations

from dataclasses import replace

import pytest

import taskgraph_offload as tgo

from ..made import SLOW_LINK, plan_of, trace_of

MIB = 2**20


def said(plan: tgo.Plan) -> dict[str, str]:
    """The lines of the page by their labels."""
    return {line[:12].strip(): line[12:] for line in plan.explain().splitlines()}


def trace_named(*names: str) -> tgo.Trace:
    return tgo.Trace.from_units([{"name": name, "seconds": 1e-3, "tensors": [MIB]} for name in names])


def test_a_stall_names_the_window_in_which_the_link_cannot_keep_up() -> None:
    found = said(plan_of(trace_of([MIB] * 8, 1e-3), 4 * MIB, "sequential"))
    assert "longest before a: 1.05 ms; from the end of h on" in found["bound by"]
    assert (
        "from the end of h on, the link brings 1.0 MiB in 1.05 ms, and compute has work for 0.0 us" in found["bound by"]
    )


def test_a_window_that_opens_where_no_block_has_run_yet_is_said_in_words() -> None:
    units = [{"name": name, "seconds": 1e-3, "tensors": [MIB] * (name != ":start")} for name in (":start", *"abcd")]
    found = said(plan_of(tgo.Trace.from_units(units), 2 * MIB, "sequential"))
    assert "from the first block on, the link brings 1.0 MiB" in found["bound by"]
    assert "before the first block" in said(plan_of(trace_named(":start", "b"), 2 * MIB, "resident"))["resident"]


def test_a_page_gives_the_terminal_no_orders() -> None:
    page = plan_of(trace_named("a\x1b[31m", "b\ud800"), 2 * MIB, "resident").explain()
    assert page.replace("\n", "").isprintable()
    assert "a\\x1b[31m, b\\ud800" in page


def test_a_window_reaches_back_over_all_copies_that_wait_for_one_another() -> None:
    seconds = [1e-4, 1e-4, 1e-4, 4e-3, 1e-4, 1e-4]
    found = said(plan_of(trace_of([MIB] * 6, seconds), 3 * MIB, "layerwise", prefetch=2))
    assert "from the end of d on, the link brings" in found["bound by"]


@pytest.mark.parametrize(
    ("seconds", "budget", "strategy", "words"),
    [
        (1.0, 4 * MIB, "auto", "none: only faster compute"),
        (1e-5, 4 * MIB, "auto", "weights stream through 640.0 KiB, so each step copies as much more"),
        (1e-5, 8 * MIB, "auto", "none: only faster compute"),
        (1e-5, 4 * MIB, "layerwise", "Planner.compare() shows whether another strategy comes closer"),
    ],
)
def test_the_gap_and_what_would_close_it(seconds: float, budget: int, strategy: str, words: str) -> None:
    assert words in said(plan_of(trace_of([MIB] * 8, seconds, tensors=8), budget, strategy))["gap"]


def test_one_gib_more_that_fits_everything_ends_all_waiting() -> None:
    machine = replace(SLOW_LINK, latency_seconds=1e-5)
    trace = trace_of([512 * MIB] * 8, 4e-3, tensors=8)
    plan = tgo.Planner.for_trace(trace, "3.2GiB", machine=machine).plan()
    assert plan.predict(6).step_seconds > 1.01 * plan.bound.step_seconds
    assert said(plan)["1 GiB more"].startswith("a step of about 32.00 ms, ")


def test_room_that_activations_leave_unused_is_said() -> None:
    units = [
        {"name": f"b{i}", "seconds": 1e-4, "tensors": [MIB] * 4, "transient_bytes": 12 * MIB if i == 3 else 0}
        for i in range(8)
    ]
    plan = plan_of(tgo.Trace.from_units(units), 24 * MIB, "auto")
    assert "beside the highest activations all the time, though they fall to 0 B" in said(plan)["gap"]


def test_the_page_names_blocks_and_never_what_travels_together() -> None:
    """Names of bundles, as `b:stays`, mean nothing to a reader of the page."""
    plan = plan_of(trace_of([MIB] * 8, 1e-5, tensors=8), 5 * MIB, "auto")
    blocks = {call.block for call in plan.trace.calls}
    for label in ("resident", "streamed"):
        named = said(plan)[label].rpartition(": for ")[2].partition(" and ")[0].split(", ")
        assert set(named) <= blocks, label
    assert {task.name for task in plan.steady if task.kind == "h2d"} - blocks  # the plan has such names


def test_the_gap_names_the_latency_where_it_is_part_of_it() -> None:
    machine = replace(SLOW_LINK, latency_seconds=2e-4)
    trace = trace_of([MIB] * 8, 1e-5, tensors=8)
    plan = tgo.Planner.for_trace(trace, f"{4 * MIB}B", strategy="layerwise", machine=machine).plan()
    assert "1.60 ms of it the latency of copies" in said(plan)["gap"]


def test_a_gpu_without_memory_of_its_own_is_said() -> None:
    plan = plan_of(trace_of([MIB] * 8), 4 * MIB, "layerwise")
    assert "careful" not in said(plan)
    shared = replace(plan, machine=replace(plan.machine, name="Orin (measured, memory shared with the CPU)"))
    assert "offloading cannot help" in said(shared)["careful"]
