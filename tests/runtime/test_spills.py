"""Activations that leave: only where a budget needs it, as few as that takes, and never one that is missed."""

from __future__ import annotations

import random
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from taskgraph_offload.planner.auto.spills import choose, findable, lowest_peak, with_spills
from taskgraph_offload.planner.bound import least_transients, piece_by_piece
from torch import Tensor

import taskgraph_offload as tgo
from taskgraph_offload.devices.virtual import VirtualDevice, VirtualLane
from taskgraph_offload.nouns.graph import print_tasks
from taskgraph_offload.nouns.trace import INPUT, Activation, Trace

from ..made import lines, plan_of
from ..running import Case, Skips, assert_equal, assert_runs_like, case, devices, known_plan, only_on_the_cpu, spilling
from ..running import plan_of as plan_of_case

LOW, HIGH = 100, 1000


plans = only_on_the_cpu("it plans, and runs nothing")


def made_trace(peaks: dict[str, int], *activations: Activation) -> Trace:
    """One piece for each call, which reads 512 bytes."""
    units = [{"name": n, "seconds": 1e-6, "tensors": [512], "transient_bytes": p} for n, p in peaks.items()]
    return replace(Trace.from_units(units), activations=activations)


UNET = made_trace(
    {"a": LOW, "b": LOW, "c": HIGH, "d": LOW, "e": HIGH, "f": LOW, "g": LOW},
    Activation("big", 600, producer=0, uses=(6,), until=7),
    Activation("small", 300, producer=1, uses=(3, 5), until=6),
    Activation("dying", 500, producer=3, uses=(), until=5),
    Activation("given", 50, producer=INPUT, uses=(0,), until=7),
)


def steady_with(trace: Trace, peak: int) -> list[str] | None:
    spills = choose(trace, findable(trace, trace), peak)
    computes = [tgo.Task("compute", call.name) for call in trace.calls]
    return None if spills is None else lines(print_tasks(with_spills(computes, trace, spills)))


@plans
def test_the_largest_leaves_behind_its_last_use_and_returns_behind_the_last_high_call() -> None:
    assert steady_with(UNET, 400) == lines("""
        compute a
        d2h ~big before compute c
        compute b
        compute c
        compute d
        compute e
        h2d ~big after compute e
        compute f
        compute g
    """)


@plans
def test_more_leave_where_one_is_not_enough_and_what_dies_does_not_return() -> None:
    assert steady_with(UNET, 100) == lines("""
        compute a
        d2h ~big before compute c
        compute b
        d2h ~small before compute c
        compute c
        h2d ~small after compute c
        compute d
        d2h ~dying before compute e
        compute e
        h2d ~big after compute e
        compute f
        compute g
    """)


@plans
def test_nothing_leaves_where_nothing_is_high_and_nothing_helps_beyond_the_lowest_peak() -> None:
    movable = findable(UNET, UNET)
    assert choose(UNET, movable, HIGH) == []
    assert lowest_peak(UNET, movable) == 100
    assert choose(UNET, movable, 99) is None


@plans
@pytest.mark.parametrize("seed", range(30))
def test_any_peak_from_the_lowest_on_is_reached_by_a_plan_that_is_proved(seed: int) -> None:
    draw = random.Random(seed)
    lives = []
    for number in range(6):
        producer, until = sorted(draw.sample(range(-1, 13), 2))
        until = max(until, 1)
        uses = tuple(sorted(draw.sample(range(producer + 1, until), draw.randint(0, (until - producer) // 2))))
        lives.append(Activation(f"x{number}", draw.randint(1, 50) * 512, producer, uses, until))
    here = [sum(x.nbytes for x in lives if x.producer <= k < x.until) for k in range(12)]
    peaks = {f"u{k}": nbytes + draw.randint(0, 20) * 512 for k, nbytes in enumerate(here)}
    trace = made_trace(peaks, *lives)
    with pytest.raises(tgo.BudgetError) as refused:
        plan_of(trace, 1, "auto")
    smallest = refused.value.smallest_bytes
    assert smallest == 512 + lowest_peak(trace, findable(trace, trace))
    for budget in (smallest, smallest + 512, 512 + max(peaks.values())):
        plan = plan_of(trace, budget, "auto")
        assert plan.peak_bytes <= budget
        assert plan.predict(8).step_seconds >= plan.bound.step_seconds * (1 - 1e-9)
    assert not any(task.is_activation for task in plan.steady)
    waiting = [sum(x.nbytes for x in lives if x.producer < k < x.until and k not in x.uses) for k in range(12)]
    assert least_transients(piece_by_piece(trace)) == [p - w for p, w in zip(peaks.values(), waiting, strict=True)]


@pytest.mark.parametrize("device", devices("cpu", "checked:1"))
@pytest.mark.parametrize("name", ["sdxl", "flux", "llama"])
def test_what_leaves_is_found_when_the_model_runs(name: str, device: str) -> None:
    made, plan = case(name), known_plan(name, "auto")
    assert any(task.kind == "d2h" and task.is_activation for task in plan.steady)
    with torch.no_grad():
        wanted = made()
    run = assert_runs_like(made, plan, wanted, device=device)
    assert run.stats.skipped_spills == 0
    assert run.stats.d2h_bytes > 0


class Dropping(Skips):
    """Drops the first activation while the copy that brings it back is under way."""

    drops = False

    def before(self, x: Tensor, skips: list[Tensor]) -> Tensor:
        if self.drops and len(skips) == 2:
            skips[0] = torch.zeros(8, 16)
        return x


class NotingLane(VirtualLane):
    """Notes when an activation is copied back, when its storage goes, and when the compute lane has waited.

    It keeps no reference to what it copies, as a stream of a GPU does not.
    """

    def copy(self, target: Tensor, source: Tensor, label: object) -> None:
        super().copy(target, source, label)
        if self.name == "h2d" and "~" in str(label):
            NOTES.append("copied back")
            weakref.finalize(target.untyped_storage(), NOTES.append, "gone")

    def wait(self, event: Any) -> None:
        super().wait(event)
        if self.name == "compute":
            NOTES.append("waited")


NOTES: list[str] = []


@only_on_the_cpu("a virtual device notes what happens")
def test_a_storage_lives_until_the_compute_lane_has_waited_for_the_copy_that_fills_it() -> None:
    """Or its memory is given to somebody else, and the copy overwrites that."""
    torch.manual_seed(0)
    made = Case(Dropping(), {"x": torch.randn(8, 16)})
    plan = spilling(plan_of_case(made, "resident"), ("~down.0/0", "down.1", "down.2", "up.1"))
    made.model.drops = True
    device = VirtualDevice()
    device.lanes = {name: NotingLane(name, device) for name in device.lanes}
    NOTES.clear()
    with torch.no_grad():
        wanted = made()
        with tgo.Executor(made.model, plan, device=device):
            assert_equal(made(), wanted)
    after = NOTES[NOTES.index("copied back") :]
    assert after.index("waited") < after.index("gone")
