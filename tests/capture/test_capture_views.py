"""Weights that are shown before they are read, that a forward returns, or that it did not read this time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import taskgraph_offload as tgo

from ..guard import Guard
from ..running import STRATEGIES, Case, assert_equal, plan_of, trace_of


class Adding(nn.Module):
    """Reads what it is handed."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        return self.linear(x) + positions


class Between(nn.Module):
    """A view that is made between blocks, and read inside of them."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Adding() for _ in range(4))
        self.positions = nn.Parameter(torch.randn(16, 64))

    def forward(self, x: Tensor) -> Tensor:
        positions = self.positions[: x.shape[0]]
        for block in self.blocks:
            x = block(x, positions)
        return x


class Making(Adding):
    """Hands a view of its own weight on."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(16, 64))

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Any:
        return self.linear(x), self.table[: x.shape[0]]


class Within(nn.Module):
    """A view that is made in one block, and read in the others."""

    def __init__(self) -> None:
        super().__init__()
        self.first = Making()
        self.blocks = nn.ModuleList(Adding() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x, positions = self.first(x)
        for block in self.blocks:
            x = block(x, positions)
        return x


class Gaining(nn.Module):
    """A view that is made at the start, and read behind inner modules, where the block may be cut."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.gain = nn.Linear(64, 256), nn.Linear(256, 64), nn.Parameter(torch.randn(1, 64))

    def forward(self, x: Tensor) -> Tensor:
        gain = self.gain[0]
        return x + self.down(torch.relu(self.up(x))) * gain


class Returning(nn.Module):
    """Its outputs are views of its blocks' weights."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Making() for _ in range(5))

    def forward(self, x: Tensor) -> Any:
        tables = []
        for block in self.blocks:
            x, table = block(x)
            tables.append(table)
        return x, tables


MODELS = {
    "between": Between,
    "within": Within,
    "gaining": lambda: nn.Sequential(*(Gaining() for _ in range(4))),
    "returning": Returning,
}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", MODELS)
def test_what_is_shown_is_on_the_device_then_and_later(name: str, strategy: str) -> None:
    torch.manual_seed(0)
    model, x = MODELS[name](), torch.randn(2, 64)
    made = Case(model, {"input" if name == "gaining" else "x": x})
    with torch.no_grad():
        wanted = made()
        with tgo.Executor(model, plan_of(made, strategy), device="cpu") as run:
            outputs = []
            for _ in range(3):
                with Guard(run):
                    outputs.append(made())
            for found in outputs:
                assert_equal(found, wanted)
            assert run.stats.divergences == 0


def test_a_weight_that_is_returned_always_stays() -> None:
    trace = trace_of(Case(Returning(), {"x": torch.randn(2, 64)}))
    assert {name for name in trace.weights if name.endswith("table")} <= set(trace.fixed)


class Experts(nn.Module):
    """Looks at its input to find which of its experts to ask."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(4, 4), nn.ModuleList(nn.Linear(4, 4) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.experts[int(self.router(x).sum(0).argmax().item())](x)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_experts_that_were_not_asked_are_there_when_they_are(strategy: str) -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(*(Experts() for _ in range(5)))
    plan = plan_of(Case(model, {"input": torch.randn(2, 4)}), strategy)
    assert set(plan.seats) == {name for name, _ in model.named_parameters()}
    inputs = [torch.randn(2, 4) * 5 for _ in range(6)]
    asked = set[int]()
    with torch.no_grad():
        wanted = [model(x) for x in inputs]
        for block in model:
            for expert in block.experts:
                expert.register_forward_pre_hook(lambda module, args: asked.add(id(module)))
        with tgo.Executor(model, plan, device="cpu") as run:
            for x, output in zip(inputs, wanted, strict=True):
                with Guard(run):
                    assert torch.equal(model(x), output)
    assert len(asked) > 5  # others than in the traced forward


def test_only_blocks_take_what_was_not_read() -> None:
    """What belongs to no block would have to stay for ever, so it is not taken."""
    model: Any = nn.Sequential(*(Experts() for _ in range(3)))
    model.head = nn.Linear(4, 4)
    model.forward = lambda input: nn.Sequential.forward(nn.Sequential(*list(model)[:3]), input)
    trace = tgo.Planner(model, 1, inputs=(torch.randn(2, 4),), machine="cpu").trace
    assert trace.source == "real"
    assert set(trace.weights) - set(trace.readers) == {"head.weight", "head.bias"}
