"""What a run measures: every task of the plan, when it ran, and how that compares with the prediction.

Time is virtual here (`devices/virtual.py`), so it is exact, and the same on a machine with other work.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import taskgraph_offload as tgo
from taskgraph_offload.devices.virtual import VirtualDevice
from taskgraph_offload.runtime.needs import standing_bundles

from ..running import DEVICE, MODELS, STRATEGIES, Case, case, known_plan, only_on_the_cpu
from ..sweeps import mostly_slow

BLOCK_BYTES = 1 << 20
BLOCK_SECONDS = 0.010
LINK = BLOCK_BYTES / BLOCK_SECONDS
QUICK = ("chain", "llama", "flux", "whisper")  # the others take as long as all of these, and show the same


class OneWeight(nn.Module):
    """A block of a megabyte, which copies as long as it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(512, 512))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.weight[0, 0]


virtual = only_on_the_cpu("its time is virtual")


@pytest.fixture(scope="module")
def blocks() -> Case:
    return Case(nn.Sequential(*(OneWeight() for _ in range(8))), {"input": torch.zeros(1)})


def planner_for(made: Case, budget: str, strategy: str) -> tgo.Planner:
    machine = tgo.Machine("paced", LINK, LINK, 0.0, 1e12, 1e12)
    return tgo.Planner(made.model, budget, inputs=made.inputs, strategy=strategy, machine=machine)


def measured(made: Case, plan: tgo.Plan, device: VirtualDevice | str, forwards: int = 5) -> tgo.Timeline:
    with tgo.Executor(made.model, plan, device=device) as run, torch.no_grad():
        for _ in range(forwards):
            made()
        return run.timeline()


def paced(plan: tgo.Plan) -> VirtualDevice:
    """Every call takes ten milliseconds, whatever the planner has guessed."""
    return VirtualDevice(seconds=dict.fromkeys((call.name for call in plan.trace.calls), BLOCK_SECONDS))


@virtual
def test_layerwise_hides_copies_behind_compute(blocks: Case) -> None:
    plan = planner_for(blocks, "2.5MiB", "layerwise").plan()
    timeline = measured(blocks, plan, paced(plan))
    assert timeline.step_seconds == pytest.approx(8 * BLOCK_SECONDS)
    assert (timeline.overlap, timeline.stall_seconds) == (pytest.approx(1), pytest.approx(0))


@virtual
def test_sequential_hides_nothing(blocks: Case) -> None:
    plan = planner_for(blocks, "2.5MiB", "sequential").plan()
    timeline = measured(blocks, plan, paced(plan))
    assert timeline.step_seconds == pytest.approx(2 * 8 * BLOCK_SECONDS)
    assert (timeline.overlap, timeline.stall_seconds) == (pytest.approx(0), pytest.approx(8 * BLOCK_SECONDS))


@virtual
@pytest.mark.parametrize("strategy", ["layerwise", "sequential", "auto"])
def test_the_prediction_is_right_once_calibrated(blocks: Case, strategy: str) -> None:
    """The planner has guessed wrong: the calls, the rate of the link and its latency."""
    planner = planner_for(blocks, "5.5MiB", strategy)
    truth = tgo.Machine("truth", 0.7 * LINK, LINK, 1e-4, 1e12, 1e12)
    guess = planner.plan()
    seconds = {call.name: BLOCK_SECONDS * (1 + 0.1 * i) for i, call in enumerate(guess.trace.calls)}
    plan = planner.calibrate(measured(blocks, guess, VirtualDevice(truth, seconds))).plan()
    happened = measured(blocks, plan, VirtualDevice(truth, seconds))
    assert plan.predict(5).step_seconds == pytest.approx(happened.step_seconds, rel=1e-6)
    assert guess.predict(5).step_seconds != pytest.approx(happened.step_seconds, rel=0.1)


def as_issued(plan: tgo.Plan) -> tgo.Plan:
    """The plan as the executor follows it, which is stricter than its graph in four things.

    - What the forward needs throughout comes before everything else, and the first call waits for it.
    - A copy of an activation waits for all calls that are listed before it.
    - The call that an activation comes back for waits for it, even if it does not read it.
    - If no such call is left in the forward, the first call of the next forward waits for it.
    """
    standing, first = standing_bundles(plan), plan.trace.calls[0].name
    serves = {(data["cycle"], data["task"]): data["call"] for _, data in plan.graph(2)}

    def gated(cycle: int, tasks: tuple[tgo.Task, ...]) -> list[tgo.Task]:
        found, latest = list[tgo.Task](), None
        for place, task in enumerate(tasks):
            latest = task.name if task.kind == "compute" else latest
            before = task.before
            if task.is_activation and task.kind == "h2d":
                is_left = tgo.Task("compute", serves[cycle, task]) in tasks[place:]
                before = serves[cycle, task] if is_left else first
            found.append(replace(task, after=latest, before=before) if task.is_activation else task)
        return found

    cold = gated(0, plan.cold)
    throughout = [replace(task, before=first) for task in reversed(cold) if task.name in standing]
    others = [task for task in cold if task.name not in standing]
    return replace(plan, cold=(*throughout, *others), steady=tuple(gated(1, plan.steady)))


@virtual
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", mostly_slow(MODELS, QUICK))
def test_every_task_runs_when_it_was_predicted(name: str, strategy: str) -> None:
    made, plan = case(name), known_plan(name, strategy)
    timeline, predicted = measured(made, plan, "virtual", forwards=4), as_issued(plan).predict(4)
    times = {span.node: (span.start, span.stop) for span in timeline.spans}
    assert set(times) == {span.node for span in predicted.spans}
    for span in predicted.spans:
        assert times[span.node] == pytest.approx((span.start, span.stop), abs=1e-9), span.node
    if not any(task.is_activation for task in plan.steady):
        assert timeline.step_seconds == pytest.approx(plan.predict(4).step_seconds, abs=1e-9)


@virtual
@pytest.mark.parametrize("strategy", ["resident", "layerwise", "sequential"])
def test_a_plan_is_followed_as_it_stands_where_nothing_is_needed_throughout(blocks: Case, strategy: str) -> None:
    plan = planner_for(blocks, "9MiB" if strategy == "resident" else "3.5MiB", strategy).plan()
    timeline = measured(blocks, plan, "virtual")
    assert [(s.node, s.start, s.stop, s.nbytes) for s in sorted(timeline.spans, key=lambda span: span.node)] == [
        (s.node, pytest.approx(s.start, abs=1e-9), pytest.approx(s.stop, abs=1e-9), s.nbytes)
        for s in sorted(plan.predict(5).spans, key=lambda span: span.node)
    ]
    assert timeline.cold_seconds == pytest.approx(plan.predict(5).cold_seconds, abs=1e-9)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_measured_timeline_has_the_tasks_of_the_plan(strategy: str) -> None:
    made, plan = case("chain"), known_plan("chain", strategy)
    with tgo.Executor(made.model, plan, device=DEVICE) as run, torch.no_grad():
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


@virtual
def test_no_task_begins_before_what_it_waits_for_and_stalls_have_a_cause(blocks: Case) -> None:
    plan = planner_for(blocks, "2.5MiB", "sequential").plan()
    timeline = measured(blocks, plan, paced(plan), forwards=3)
    starts = {span.node: span.start for span in timeline.spans}
    ends = {span.node: span.stop for span in timeline.spans}
    for before, after in plan.graph(3).dag.edges:
        assert ends[before] <= starts[after] + 1e-9, f"{after} began before {before} had ended"
    stalls = timeline.stalls(1)
    assert len(stalls) == 8
    assert all(stall.cause is not None and "h2d" in stall.cause for stall in stalls)


def test_the_last_five_forwards_are_kept() -> None:
    made = case("chain")
    with tgo.Executor(made.model, known_plan("chain"), device=DEVICE) as run, torch.no_grad():
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
    with tgo.Executor(made.model, plan, device=DEVICE) as run, torch.no_grad():
        for _ in range(3):
            made()
    assert run.stats.divergences == run.stats.demand_loads == run.stats.skipped_spills == 0
    copies = [task for tasks in (plan.cold, plan.steady, plan.steady) for task in tasks if task.kind == "h2d"]
    assert run.stats.h2d_bytes == sum(plan.task_bytes(task) for task in copies)
    assert run.stats.copies == len(copies)
    assert run.stats.d2h_bytes == 0


def test_a_forward_that_broke_off_is_not_in_the_timeline() -> None:
    made = case("chain")
    with tgo.Executor(made.model, known_plan("chain"), device=DEVICE) as run, torch.no_grad():
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
