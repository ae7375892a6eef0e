"""Attaching and detaching: handles that are lost, plans that are replaced, and memory that is given back."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import taskgraph_offload as tgo
from taskgraph_offload.devices.cpu import CpuDevice
from taskgraph_offload.foreign import refuse_foreign_hooks

from ..left_behind import everything_of
from ..running import DEVICE, Case, Skips, assert_equal, case, known_plan, only_on_the_cpu, plainly, plan_of, spilling

X = torch.linspace(-1, 1, 8).reshape(2, 4).to(DEVICE)


def linears(count: int = 6) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(4, 4) for _ in range(count)))


def outputs_of(model: nn.Module) -> Tensor:
    """What the plain model gives."""
    with plainly(model):
        return model(X)


def test_a_lost_handle_can_be_detached_by_the_model() -> None:
    model = linears()
    before, wanted = everything_of(model), outputs_of(model)
    tgo.offload(model, "90%", inputs=(X,), machine="cpu", device=DEVICE)
    assert torch.equal(model(X), wanted)
    tgo.detach(model)
    assert everything_of(model) == before
    tgo.detach(model)  # does nothing


def test_detach_takes_a_dict_and_a_pipeline() -> None:
    models = {"a": linears(), "b": linears()}
    for target in (models, SimpleNamespace(transformer=models["a"], vae=models["b"], name="pipeline")):
        for model in models.values():
            tgo.offload(model, "90%", inputs=(X,), machine="cpu", device=DEVICE)
        tgo.detach(target)
        for model in models.values():
            tgo.offload(model, "90%", inputs=(X,), machine="cpu", device=DEVICE).detach()
    with pytest.raises(tgo.SettingsError, match="a str holds no model"):
        tgo.detach("model")


def test_offload_on_an_attached_model_replaces_what_was_there() -> None:
    model = linears()
    before, wanted = everything_of(model), outputs_of(model)
    first = tgo.offload(model, "90%", inputs=(X,), machine="cpu", device=DEVICE)
    second = tgo.offload(model, "60%", inputs=(X,), machine="cpu", device=DEVICE)
    assert second.plan.budget_bytes < first.plan.budget_bytes
    assert torch.equal(model(X), wanted)
    assert second.timeline().cycles == 1
    first.detach()  # does nothing any more
    assert torch.equal(model(X), wanted)
    second.detach()
    assert everything_of(model) == before


def test_what_was_attached_stays_if_the_new_plan_fails() -> None:
    model = linears()
    wanted = outputs_of(model)
    run = tgo.offload(model, "90%", inputs=(X,), machine="cpu", device=DEVICE)
    with pytest.raises(tgo.BudgetError):
        tgo.offload(model, "1B", inputs=(X,), machine="cpu", device=DEVICE)
    assert torch.equal(model(X), wanted)
    assert run.timeline().cycles == 1
    run.detach()


def test_a_part_of_an_attached_model_is_not_offloaded_behind_its_back() -> None:
    model = linears()
    with tgo.offload(model, "90%", inputs=(X,), machine="cpu", device=DEVICE):
        with pytest.raises(tgo.ExecutionError, match="this Linear is part of a Sequential that is attached"):
            tgo.offload(model[1], "90%", inputs=(X,), machine="cpu", device=DEVICE)  # type: ignore[index]
        model(X)


def test_a_paused_plan_is_paused_again_if_the_new_one_fails() -> None:
    model = linears()
    run = tgo.offload(model, "90%", inputs=(X,), machine="cpu", device=DEVICE)
    run.pause()
    with pytest.raises(tgo.BudgetError):
        tgo.offload(model, "1B", inputs=(X,), machine="cpu", device=DEVICE)
    assert run.is_paused
    with pytest.raises(tgo.ExecutionError, match="paused"):
        model(X)
    run.detach()


def test_hooks_of_others_that_came_after_planning_are_refused_before_anything_moves() -> None:
    made = case("chain")
    run = tgo.Executor(made.model, known_plan("chain"), device=DEVICE)
    before = everything_of(made.model)
    vars(made.model.blocks[1])["_hf_hook"] = object()  # the mark that accelerate leaves
    with pytest.raises(tgo.SettingsError, match=r"blocks\.1 has offloading hooks of accelerate"):
        run.attach()
    del made.model.blocks[1]._hf_hook
    assert everything_of(made.model) == before
    refuse_foreign_hooks(made.model)


class Locking(CpuDevice):
    """Locks pages, and fails at some of them."""

    def __init__(self, *fails_at: int) -> None:
        super().__init__()
        self.fails_at, self.locked, self.asked = fails_at, set[int](), 0

    def pin(self, home: Tensor) -> None:
        self.asked += 1
        if self.asked in self.fails_at:
            raise tgo.ExecutionError("no more pages can be locked")
        if home.nbytes:
            self.locked.add(home.data_ptr())

    def unpin(self, home: Tensor) -> None:
        if home.nbytes:
            self.locked.remove(home.data_ptr())


@only_on_the_cpu("its device counts locks, and refuses them")
def test_page_locks_are_undone_if_a_later_one_fails() -> None:
    """Also those of spilled activations."""
    torch.manual_seed(0)
    made = Case(Skips(), {"x": torch.randn(8, 16)})
    spills = [("~down.0/0", "down.1", "down.2", "up.1"), ("~down.1/0", "down.2", "down.3", "up.0")]
    plan = spilling(plan_of(made, "sequential"), *spills)
    with torch.no_grad():
        wanted, before = made(), everything_of(made.model)
        device = Locking()
        with tgo.Executor(made.model, plan, device=device):
            assert_equal(made(), wanted)
            count = device.asked
        assert not device.locked
        for fails_at in range(1, count + 1):
            device = Locking(fails_at)
            with pytest.raises(tgo.ExecutionError, match="no more pages"):
                tgo.Executor(made.model, plan, device=device).attach()
            assert not device.locked
            assert everything_of(made.model) == before
        assert_equal(made(), wanted)


@pytest.mark.parametrize("strategy", ["layerwise", "resident"])
def test_memory_that_the_user_gives_to_a_weight_is_locked_as_long_as_it_is_the_home(strategy: str) -> None:
    made, plain, device = case("chain"), case("chain"), Locking()
    weights = [one.model.blocks[1].up.weight for one in (made, plain)]
    with tgo.Executor(made.model, known_plan("chain", strategy), device=device), torch.no_grad():
        made()
        before = set(device.locked)
        for number in (1, 2, 3):
            given = weights[0].data = torch.full((64, 4), number / 4)
            weights[1].data = given.clone()
            assert_equal(made(), plain())
            assert device.locked - before == {given.data_ptr()}
    assert not device.locked
    assert weights[0].data_ptr() == given.data_ptr()


def test_a_copy_is_locked_where_the_memory_that_the_user_gives_cannot_be() -> None:
    made, plain = case("chain"), case("chain")
    weights = [one.model.blocks[1].up.weight for one in (made, plain)]
    with torch.no_grad(), tgo.Executor(made.model, known_plan("chain"), device=(device := Locking())):
        count, before = device.asked, set(device.locked)
        device.fails_at = (count + 1, count + 3, count + 4)
        given = weights[0].data = torch.full((64, 4), 0.25)
        weights[1].data = given
        assert_equal(made(), plain())
        assert device.locked - before == {weights[0].data_ptr()} != {given.data_ptr()}
        weights[0].data = weights[1].data = torch.full((64, 4), 0.5)
        with pytest.raises(tgo.ExecutionError, match="no more pages can be locked"):
            made()
        assert_equal(made(), plain())
    assert not device.locked
    assert_equal(made(), plain())


def test_once_pages_can_be_locked_again_all_memory_that_the_user_gave_is_taken() -> None:
    made, plain = case("chain"), case("chain")
    with torch.no_grad(), tgo.Executor(made.model, known_plan("chain"), device=(device := Locking())):
        for one in (made, plain):
            for number in (1, 3):
                one.model.blocks[number].up.weight = nn.Parameter(torch.full((64, 4), number / 4))
        device.fails_at = tuple(range(device.asked + 2, device.asked + 6))  # the first one can be locked
        for _ in range(2):
            with pytest.raises(tgo.ExecutionError, match="no more pages can be locked"):
                made()
        assert_equal(made(), plain())
    assert_equal(made(), plain())


GROWTH = """
import psutil, torch
import taskgraph_offload as tgo
process = psutil.Process()
model = torch.nn.Sequential(*(torch.nn.Linear(300, 300) for _ in range(600)))  # 206 MiB, in pieces that malloc keeps
x = torch.randn(1, 300)
planner = tgo.Planner(model, "50%", inputs=(x,), strategy="layerwise", machine="cpu", blocks=["*"])
plan = planner.plan()
before = process.memory_info().rss
run = tgo.Executor(model, plan, device="cpu", lazy=True).attach()
print((process.memory_info().rss - before) / plan.trace.weight_bytes)
"""


@only_on_the_cpu("a script that counts the memory of its own process")
@pytest.mark.skipif(sys.platform != "linux", reason="other systems' C libraries have no malloc_trim")
def test_the_memory_that_weights_leave_goes_back_to_the_system() -> None:
    result = subprocess.run([sys.executable, "-c", GROWTH], capture_output=True, text=True, check=True)
    assert float(result.stdout) < 0.3


NOT_COMPILED = """
import sys, torch
import taskgraph_offload as tgo
model, x = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(4))), torch.ones(1, 8)
plan = tgo.Planner(model, "50%", inputs=(x,), machine="cpu").plan()  # fake tensors import a part of the compiler
torch._dynamo.reset = lambda: sys.exit("torch's compiler was reset, and imported for that")
before = set(sys.modules)
with tgo.Executor(model, plan, device="cpu"):
    model(x)
print([name for name in set(sys.modules) - before if name.startswith(("torch._dynamo", "torch._inductor"))])
"""


def test_torchs_compiler_is_not_imported_for_a_model_that_is_not_compiled() -> None:
    result = subprocess.run([sys.executable, "-c", NOT_COMPILED], capture_output=True, text=True)
    assert result.stdout == "[]\n", result.stderr
