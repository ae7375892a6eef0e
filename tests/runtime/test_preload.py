"""With `preload`, what stays is copied before the first forward, and edits after these copies still count."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import taskgraph_offload as tgo
from taskgraph_offload.devices.virtual import VirtualDevice

from ..guard import Guard
from ..running import Case, Normed, assert_equal, plan_of
from ..scenarios import Recording, every_second_stays


def copied(device: Recording) -> list[str]:
    """The bundles that were copied to the device, in the order of their copies."""
    lane = [(entry[1], name) for name, entries in device.issued.items() for entry in entries if name.startswith("h2d")]
    return [name.split()[1] for _, name in sorted(lane)]


def test_what_stays_comes_in_the_order_of_first_use_behind_the_first_copies_of_the_plan() -> None:
    made, plan = every_second_stays()
    device, plain = Recording(0), Recording(0)
    with tgo.Executor(made.model, plan, device=plain), torch.no_grad():
        wanted = made()
    with tgo.Executor(made.model, plan, device=device, preload=True) as run, torch.no_grad():
        ahead = copied(device)
        with Guard(run):
            assert_equal(made(), wanted)
    reads = [name for call in plan.trace.calls for name in plan.reads_of[call.name] if name in plan.bundles]
    staying = [name for name in ahead if plan.bundles[name].resident]
    streamed = len(ahead) - len(staying)
    assert set(staying) == {name for name, bundle in plan.bundles.items() if bundle.resident}
    assert staying[1:] == sorted(staying[1:], key=reads.index)  # the first one is read between blocks
    assert ahead[: streamed + 1] == copied(plain)[: streamed + 1]
    assert sorted(copied(device)) == sorted(copied(plain))  # nothing comes twice
    assert not run.stats.demand_loads


def test_after_other_work_the_first_forward_is_like_any_other() -> None:
    made, plan = every_second_stays()
    plan = replace(plan, machine=tgo.Machine("slow link", 1e6, 1e6, 0.0, 1e12, 1e12))
    firsts = []
    for preload in (False, True):
        device = VirtualDevice()
        with tgo.Executor(made.model, plan, device=device, preload=preload) as run, torch.no_grad():
            device.synchronize()  # the other work takes longer than the copies
            for _ in range(4):
                made()
            firsts.append(run.timeline().cold_seconds)
            step = run.timeline().step_seconds
    assert firsts[1] <= step * 1.000001 < firsts[0]


EDITS: dict[str, Callable[[Any], Any]] = {
    "in place": lambda model: model.blocks[4].down.weight.mul_(3),
    "uncounted": lambda model: model.blocks[8].up.weight.data.mul_(3),
    "other data": lambda model: setattr(model.blocks[6].up.weight, "data", torch.full((64, 4), 0.5)),
    "another parameter": lambda model: setattr(model.blocks[3].down, "weight", nn.Parameter(torch.ones(4, 64))),
    "between blocks": lambda model: model.scale.add_(1),
    "all": lambda model: model.load_state_dict({name: 2 * value for name, value in model.state_dict().items()}),
}


@pytest.mark.parametrize("edit", EDITS)
def test_edits_before_the_first_forward_are_seen(edit: str) -> None:
    (made, plan), (plain, _) = every_second_stays(), every_second_stays()
    with tgo.Executor(made.model, plan, device="virtual", preload=True) as run, torch.no_grad():
        for model in (made.model, plain.model):
            EDITS[edit](model)
        for _ in range(2):
            with Guard(run):
                assert_equal(made(), plain())


def test_statistics_that_the_forward_changes_may_be_edited_before_it() -> None:
    torch.manual_seed(0)
    made = Case(Normed().train(), {"x": torch.randn(4, 8)})
    plain = Case(copy.deepcopy(made.model), made.inputs)
    with tgo.Executor(made.model, plan_of(made), device="virtual", preload=True):
        for model in (made.model, plain.model):
            model.layers[2][1].running_mean.fill_(3)
        assert_equal(made(), plain())
    for name, tensor in made.model.state_dict().items():
        assert torch.equal(tensor, plain.model.state_dict()[name]), name


def test_a_detach_before_the_first_forward_leaves_the_model_as_it_was() -> None:
    made, plan = every_second_stays()
    before, threads = (
        {name: tensor.clone() for name, tensor in made.model.state_dict().items()},
        threading.active_count(),
    )
    tgo.offload(made.model, 1, inputs=made.inputs, device="cpu", link_bytes_per_second=1e5, preload=True).detach()
    tgo.Executor(made.model, plan, device="cpu", link_bytes_per_second=1e5, preload=True).attach().detach()
    assert threading.active_count() == threads
    for name, tensor in made.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_lazy_and_preload_exclude_each_other() -> None:
    made, plan = every_second_stays()
    with pytest.raises(tgo.SettingsError, match="drop one"):
        tgo.Executor(made.model, plan, lazy=True, preload=True)
