"""What a run measures: every task of the plan, when it ran, and how that compares with the prediction."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from statistics import median

import pytest
import torch
from torch import Tensor, nn

import taskgraph_offload as tgo

from ..running import STRATEGIES, Case, case, known_plan

BLOCK_BYTES = 1 << 20
BLOCK_SECONDS = 0.010
LINK = BLOCK_BYTES / BLOCK_SECONDS


class Timed(nn.Module):
    """A block of a megabyte that takes ten milliseconds on any machine, however busy: its compute is to sleep."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(512, 512))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.weight[0, 0]
        time.sleep(BLOCK_SECONDS)
        return x


@pytest.fixture(scope="module")
def timed() -> Case:
    return Case(nn.Sequential(*(Timed() for _ in range(8))), {"input": torch.zeros(1)})


def planner_for(made: Case, budget: str, strategy: str) -> tgo.Planner:
    machine = tgo.Machine("paced", LINK, LINK, 0.0, 1e12, 1e12)
    return tgo.Planner(made.model, budget, inputs=made.inputs, strategy=strategy, machine=machine)


def measured(made: Case, plan: tgo.Plan, forwards: int = 5) -> tgo.Timeline:
    with tgo.Executor(made.model, plan, device="cpu", link_bytes_per_second=LINK) as run, torch.no_grad():
        for _ in range(forwards):
            made()
        return run.timeline()


def median_step(timeline: tgo.Timeline) -> float:
    windows = [timeline.window(number) for number in range(2, timeline.cycles)]
    return median(stop - start for start, stop in windows)


def on_some_try(happens: Callable[[], bool], tries: int = 8) -> bool:
    """Machines are shared and noisy: what the lanes can do shows when they are left alone, on one of several tries."""
    return any(happens() for _ in range(tries))


def test_layerwise_hides_copies_behind_compute(timed: Case) -> None:
    plan = planner_for(timed, "2.5MiB", "layerwise").plan()
    compute = transfer = 8 * BLOCK_SECONDS

    def hides() -> bool:
        timeline = measured(timed, plan)
        return median_step(timeline) <= 1.10 * max(compute, transfer) + BLOCK_BYTES / LINK and timeline.overlap > 0.7

    assert on_some_try(hides)


def test_sequential_hides_nothing(timed: Case) -> None:
    timeline = measured(timed, planner_for(timed, "2.5MiB", "sequential").plan())
    assert median_step(timeline) >= 0.95 * 2 * 8 * BLOCK_SECONDS  # other load only makes it longer
    assert timeline.overlap < 0.1


@pytest.mark.parametrize("strategy", ["layerwise", "sequential", "auto"])
def test_the_prediction_is_right_once_calibrated(timed: Case, strategy: str) -> None:
    planner = planner_for(timed, "5.5MiB", strategy)

    def is_right() -> bool:
        plan = planner.calibrate(measured(timed, planner.plan())).plan()
        return plan.predict().step_seconds == pytest.approx(median_step(measured(timed, plan)), rel=0.10)

    assert on_some_try(is_right)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_measured_timeline_has_the_tasks_of_the_plan(strategy: str) -> None:
    made, plan = case("chain"), known_plan("chain", strategy)
    with tgo.Executor(made.model, plan, device="cpu") as run, torch.no_grad():
        for _ in range(3):
            made()
        timeline = run.timeline()
    predicted = plan.predict()
    assert (timeline.source, timeline.cycles, timeline.starts_cold) == ("measured", 3, True)
    spans = {span.node: span for span in timeline.spans}
    assert {node: span.nbytes for node, span in spans.items()} == {s.node: s.nbytes for s in predicted.spans}
    for lane in ("compute", "h2d", "d2h"):
        in_order = timeline.lane(lane)
        assert all(one.stop <= other.start + 1e-9 for one, other in itertools.pairwise(in_order))
    assert all(span.start <= span.stop for span in timeline.spans)
    assert [span.call for span in timeline.lane("compute", 1)] == [call.name for call in plan.trace.calls]


def test_copies_come_before_their_calls_and_stalls_have_a_cause(timed: Case) -> None:
    plan = planner_for(timed, "2.5MiB", "sequential").plan()
    timeline = measured(timed, plan, forwards=3)
    ends = {span.node: span.stop for span in timeline.spans}
    for before, after in plan.graph(3).dag.edges:
        start = next(span.start for span in timeline.spans if span.node == after)
        assert ends[before] <= start + 1e-4, f"{after} began before {before} had ended"
    causes = [stall.cause for stall in timeline.stalls(1)[:8]]
    assert all(cause is not None and "h2d" in cause for cause in causes), causes


def test_the_last_five_forwards_are_kept() -> None:
    made = case("chain")
    with tgo.Executor(made.model, known_plan("chain"), device="cpu") as run, torch.no_grad():
        with pytest.raises(tgo.ExecutionError, match="no forward has run"):
            run.timeline()
        for _ in range(9):
            made()
        timeline = run.timeline()
    assert (timeline.cycles, timeline.starts_cold) == (5, False)
    assert run.timeline() == timeline
    assert timeline.peak_bytes == known_plan("chain").peak_bytes


def test_the_totals_are_those_of_the_plan() -> None:
    made, plan = case("chain"), known_plan("chain")
    with tgo.Executor(made.model, plan, device="cpu") as run, torch.no_grad():
        for _ in range(3):
            made()
    assert run.stats.divergences == run.stats.demand_loads == run.stats.skipped_spills == 0
    copies = [task for tasks in (plan.cold, plan.steady, plan.steady) for task in tasks if task.kind == "h2d"]
    assert run.stats.h2d_bytes == sum(plan.task_bytes(task) for task in copies)
    assert run.stats.copies == len(copies)
    assert run.stats.d2h_bytes == 0


def test_a_forward_that_broke_off_is_not_in_the_timeline() -> None:
    made = case("chain")
    with tgo.Executor(made.model, known_plan("chain"), device="cpu") as run, torch.no_grad():
        made()
        handle = made.model.blocks[2].register_forward_pre_hook(running_into_trouble)
        with pytest.raises(ZeroDivisionError):
            made()
        handle.remove()
        made()
        assert run.timeline().cycles == 2
        assert len(run.timeline().lane("compute", 1)) == len(known_plan("chain").trace.calls)


def running_into_trouble(*_: object) -> None:
    raise ZeroDivisionError
