"""Weights that the traced forward did not read: whatever reads them gets them on the device, within the budget."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import taskgraph_offload as tgo
from taskgraph_offload.devices.checked import CheckedDevice

from .. import models
from ..guard import Guard
from ..running import Case, assert_equal, case, plan_of

X = torch.linspace(-1, 1, 8).reshape(2, 4)


class Conditioned(nn.Module):
    """As StableAudio's transformer: another argument of the same forward takes it through a projection."""

    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.Linear(4, 4)
        self.blocks = nn.ModuleList(models.Block(4, 64) for _ in range(4))

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        if condition is not None:
            x = x + self.projection(condition)
        for block in self.blocks:
            x = block(x)
        return x


class Sighted(nn.Module):
    """As a vision-language model: a tower that runs only if there is a picture. Its attention reads raw weights."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.ModuleList(nn.MultiheadAttention(4, 2, batch_first=True) for _ in range(3))
        self.position = nn.Parameter(torch.randn(4))
        self.blocks = nn.ModuleList(models.Block(4, 64) for _ in range(4))

    def forward(self, x: Tensor, picture: Tensor | None = None) -> Tensor:
        if picture is not None:
            seen = picture + self.position
            for layer in self.tower:
                seen = layer(seen, seen, seen)[0]
            x = x + seen.mean(0)
        for block in self.blocks:
            x = block(x)
        return x


class Codec(nn.Module):
    """As a VAE: `decode` is planned, `encode` is called too."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(models.Block(4, 64), nn.BatchNorm1d(4), models.Block(4, 64))
        self.decoder = nn.Sequential(*(models.Block(4, 64) for _ in range(4)))

    def encode(self, x: Tensor) -> Tensor:
        return self.encoder(x)

    def decode(self, x: Tensor) -> Tensor:
        return self.decoder(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x))


KINDS: dict[str, tuple[Callable[[], Case], Callable[[Any], Tensor]]] = {
    "another argument": (lambda: Case(Conditioned(), {"x": X}), lambda model: model(X, condition=X)),
    "a tower": (lambda: Case(Sighted(), {"x": X}), lambda model: model(X, picture=X[None])),
    "another method": (lambda: Case(Codec().eval(), {"x": X}, "decode"), lambda model: model.encode(X)),
    "the whole model": (lambda: Case(Codec().eval(), {"x": X}, "decode"), lambda model: model(X)),
}


def budget_with(plan: tgo.Plan, spare: int) -> tgo.Plan:
    """A plan that leaves some of its budget; for 0 the tight plan itself, so that weights take places in the arena."""
    if not spare:
        return plan
    budget = f"{plan.budget_bytes + spare}B"
    return tgo.Planner.for_trace(plan.trace, budget, strategy="sequential", machine="cpu").plan()


@pytest.mark.parametrize("spare", [0, 2**16])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", KINDS)
def test_what_the_trace_did_not_read_comes_on_demand(kind: str, seed: int, spare: int) -> None:
    torch.manual_seed(0)
    make, other = KINDS[kind]
    made = make()
    plan = budget_with(plan_of(made, "layerwise"), spare)
    with torch.no_grad():
        wanted, wanted_other = made(), other(made.model)
        with tgo.Executor(made.model, plan, device=CheckedDevice(seed)) as run:
            for _ in range(3):
                with Guard(run):
                    assert_equal(made(), wanted)
                loads = run.stats.demand_loads
                with Guard(run):
                    assert_equal([other(made.model)], [wanted_other])
                assert run.stats.demand_loads > loads
        assert run.stats.peak_bytes <= plan.budget_bytes
        assert_equal([other(made.model)], [wanted_other])


def test_a_planned_forward_pays_nothing_for_weights_that_it_does_not_read() -> None:
    made = Case(Conditioned(), {"x": X})
    with torch.no_grad(), tgo.Executor(made.model, plan_of(made), device="cpu") as run:
        for _ in range(3):
            made()
    assert run.stats.demand_loads == run.stats.divergences == 0


def test_a_weight_that_finds_no_room_is_refused_by_name_with_a_budget_that_would_do() -> None:
    torch.manual_seed(0)
    made = Case(Conditioned(), {"x": X})
    made.model.projection = nn.Linear(4, 4)
    made.model.wide = nn.Linear(4, 100_000)  # 1.5 MiB, where the blocks have 2 KiB each
    plan = plan_of(made)
    with torch.no_grad():
        wanted = made()
        with tgo.Executor(made.model, plan, device="cpu") as run:
            with pytest.raises(
                tgo.ExecutionError, match=r"reads weight 'wide.(weight|bias)' .* budget of \"\d+B\""
            ) as error:
                made.model.wide(X)
            with Guard(run):
                assert_equal(made(), wanted)
    enough = int(str(error.value).rpartition('budget of "')[2].rpartition("B")[0])
    plan = tgo.Planner.for_trace(plan.trace, f"{enough}B", strategy="sequential", machine="cpu").plan()
    with torch.no_grad():
        wanted = [made.model.wide(X)]
        with tgo.Executor(made.model, plan, device="cpu") as run, Guard(run):
            assert_equal([made.model.wide(X)], wanted)


def test_unread_weights_of_a_model_on_another_device_leave_it_too() -> None:
    """Their homes are in host memory like all others: `state_dict` and edits see true values."""
    made = Case(Conditioned(), {"x": X})
    before = {name: tensor.clone() for name, tensor in made.model.state_dict().items()}
    with torch.no_grad(), tgo.Executor(made.model, plan_of(made), device="cpu"):
        made.model(X, condition=X)
        made.model.projection.weight.mul_(2)
        edited = made.model(X, condition=X)
        assert torch.equal(made.model.state_dict()["projection.weight"], 2 * before["projection.weight"])
    with torch.no_grad():
        assert torch.equal(made.model(X, condition=X), edited)


@pytest.mark.parametrize("spare", [0, 2**16])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_unread_weights_are_those_of_the_plain_model(kind: str, spare: int) -> None:
    torch.manual_seed(0)
    make, other = KINDS[kind]
    made = make()
    plan = budget_with(plan_of(made, "layerwise"), spare)
    other(made.model).square().sum().backward()
    wanted = {name: weight.grad for name, weight in made.model.named_parameters()}
    made.model.zero_grad()
    with tgo.Executor(made.model, plan, device="cpu"):
        loss = other(made.model).square().sum()
        with torch.no_grad():
            made()
        loss.backward()
    for name, weight in made.model.named_parameters():
        if wanted[name] is None:
            assert weight.grad is None
        else:
            assert torch.equal(weight.grad, wanted[name]), name


def test_an_edit_between_two_reads_of_one_forward_is_seen() -> None:
    class Editing(Conditioned):
        def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
            if condition is None:
                return super().forward(x)
            x = x + self.projection(condition)
            with torch.no_grad():
                self.projection.weight.mul_(2)
            return x + self.projection(condition)

    made = Case(Editing(), {"x": X})
    before = made.model.projection.weight.detach().clone()
    plan = plan_of(made)
    with torch.no_grad():
        wanted = made.model(X, condition=X)
        made.model.projection.weight.copy_(before)
        with tgo.Executor(made.model, plan, device="cpu"):
            assert torch.equal(made.model(X, condition=X), wanted)


def test_checked_refuses_an_operator_that_mixes_a_weight_at_home_with_other_tensors() -> None:
    """A raw read in the code between the blocks, which no module call announces."""

    class Raw(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(models.Block(4, 64, oddities=frozenset({"raw", "empty"})) for _ in range(4))
            self.reads = False

        def forward(self, x: Tensor) -> Tensor:
            last: Any = self.blocks[3]
            if self.reads:
                x = nn.functional.linear(x, last.down.weight[:, :4])
            for block in self.blocks:
                x = block(x)
            return x

    made: Case = Case(Raw(), {"x": X})
    with torch.no_grad(), tgo.Executor(made.model, plan_of(made), device="checked"):
        made()
        made.model.reads = True
        with pytest.raises(
            tgo.ExecutionError, match=r"reads weight 'blocks.3.down.weight' at home: the plan does not know"
        ):
            made()
        made.model.reads = False
        made()


class Wrapper(nn.Module):
    """As a PeftModel: its generate calls the model inside directly."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.base_model = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.base_model(x)

    def generate(self, x: Tensor, steps: int) -> Tensor:
        for _ in range(steps):
            x = self.base_model(x)
        return x


@pytest.mark.parametrize("strategy", ["layerwise", "auto"])
def test_the_inner_model_of_a_wrapper_may_be_called_directly(strategy: str) -> None:
    inner = case("chain").model
    made = Case(Wrapper(Wrapper(inner)), {"x": X})
    plan = plan_of(made, strategy)
    with torch.no_grad():
        wanted = made.model.base_model.generate(X, 4)
        with tgo.Executor(made.model, plan, device="cpu") as run:
            made()
            made()
            with Guard(run):
                assert_equal([made.model.base_model.generate(X, 4)], [wanted])
                assert_equal([made.model.base_model.forward(X)], made())
    assert run.stats.demand_loads == run.stats.divergences == 0
    steady = sum(task.kind != "compute" for task in plan.steady)
    assert run.stats.copies == sum(task.kind != "compute" for task in plan.cold) + 7 * steady
