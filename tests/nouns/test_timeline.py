"""What a timeline says about itself: steps, stalls and their cause, how much of the copying compute hid."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskgraph_offload.nouns.graph import Lane
from taskgraph_offload.nouns.timeline import Span, Timeline, intersection, length, union

from ..made import plan_of, trace_of

BYTES = 1_000_448  # 1.000448 ms on the test link, a multiple of 512


def timeline(*spans: tuple[str, Lane, float, float]) -> Timeline:
    return Timeline("measured", tuple(Span(f"0/{n}", n, lane, n, 0, a, b) for n, lane, a, b in spans), (), 0)


def test_overlap_is_the_share_of_the_copying_that_compute_hides():
    made = timeline(("a", "compute", 0, 4), ("x", "h2d", 3, 5), ("b", "compute", 5, 6))
    assert made.overlap == pytest.approx(0.5)
    assert made.stall_seconds == pytest.approx(1)
    assert [(stall.call, stall.seconds) for stall in made.stalls()] == [("b", 1)]


def test_a_stall_names_the_copy_that_caused_it():
    predicted = plan_of(trace_of([BYTES] * 4, 1e-4), 2 * BYTES, "layerwise").predict()
    worst = predicted.stalls()[0]
    assert worst.cause == f"2/h2d {worst.call}" or worst.cause == f"1/h2d {worst.call}"
    assert worst.seconds <= BYTES / 1e9


def test_steps_add_up_to_the_whole():
    predicted = plan_of(trace_of([BYTES] * 4, 1e-3), 2 * BYTES, "sequential").predict(4)
    windows = [predicted.window(cycle) for cycle in range(4)]
    assert windows[0][1] == windows[1][0]
    assert predicted.cold_seconds == pytest.approx(windows[0][1])
    assert predicted.step_seconds == pytest.approx(predicted.compute_seconds + predicted.stall_seconds)


def test_memory_never_passes_the_budget():
    plan = plan_of(trace_of([BYTES] * 4, 1e-3, transient_bytes=4096), 3 * BYTES, "layerwise")
    assert plan.predict().peak_bytes == plan.peak_bytes <= plan.budget_bytes


intervals = st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)).map(sorted).map(tuple), max_size=8)


@given(intervals, intervals)
def test_interval_arithmetic_against_counting_every_second(first, second):
    def seconds(spans):
        return {t for a, b in spans for t in range(a, b)}

    shared = intersection(union(first), union(second))
    assert length(shared) == len(seconds(first) & seconds(second))
    assert length(union(first)) == len(seconds(first))


def test_a_step_below_the_bound_says_so() -> None:
    """A run on a link faster than the plan's beats the plan's bound; a step at the bound does not, rounding or not."""

    def measured(step: float) -> Timeline:
        spans = (Span("0/compute a", "a", "compute", "a", 0, 0.0, step),)
        return Timeline("measured", spans, (), 0, bound_seconds=1.0, starts_cold=False)

    assert measured(0.9).beats_its_bound
    assert not measured(1.0 - 1e-9).beats_its_bound
    assert not measured(1.1).beats_its_bound
