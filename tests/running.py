"""Models to run offloaded, tight plans for them, and checks of a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

import taskgraph_offload as tgo

from . import models
from .guard import Guard, tensors

STRATEGIES: dict[str, dict[str, Any]] = {
    "resident": {},
    "model": {},
    "sequential": {},
    "layerwise": {},
    "spread": {"strategy": "layerwise", "prefetch": 2, "residents": "spread"},
    "keep": {},
    "auto": {},
}


class Lstm(nn.Module):
    """A bidirectional LSTM of two layers: the module also keeps its weights in a list of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent = nn.LSTM(8, 8, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Sequential(*(nn.Linear(16, 16) for _ in range(3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.recurrent(x)[0])


class Normed(nn.Module):
    """BatchNorm in training: its forward changes buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)) for _ in range(4)))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Skips(nn.Module):
    """A small UNet: the way up reads activations that the way down made."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList(models.Block(16, 48) for _ in range(4))
        self.middle = models.Block(16, 48)
        self.up = nn.ModuleList(nn.Linear(32, 16) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for block in self.down:
            x = block(x)
            skips.append(x)
        x = self.middle(x)
        for block in self.up:
            x = block(torch.cat([self.before(x, skips), skips.pop()], -1))
        return x

    def before(self, x: Tensor, skips: list[Tensor]) -> Tensor:
        """The input of a block on the way up, beside its skip."""
        return x


@dataclass
class Case:
    """A model with the keyword inputs of one forward, and the method that takes them."""

    model: Any
    inputs: dict[str, Any]
    entry: str = "forward"

    def __call__(self) -> list[Tensor]:
        """Run it."""
        return tensors((self.model if self.entry == "forward" else getattr(self.model, self.entry))(**self.inputs))


def chain(blocks: int = 5, width: int = 4, **options: Any) -> Case:
    """Equal blocks, one after another."""
    net = models.Net([models.Block(width, 64) for _ in range(blocks)], range(blocks), scaled=True, **options)
    return Case(net, {"x": torch.randn(2, width)})


MODELS: dict[str, Callable[[], Case]] = {
    "flux": lambda: Case(*models.flux()),
    "wan": lambda: Case(*models.wan()),
    "sd3": lambda: Case(*models.sd3()),
    "sdxl": lambda: Case(*models.sdxl()),
    "llama": lambda: Case(*models.llama(tied=True)),
    "t5": lambda: Case(*models.t5()),
    "whisper": lambda: Case(*models.whisper()),
    "vit": lambda: Case(*models.vit()),
    "mixtral": lambda: Case(*models.mixtral()),
    "albert": lambda: Case(*models.albert()),
    "vae decoder": lambda: Case(*models.vae(), entry="decode"),
    "lstm": lambda: Case(Lstm().eval(), {"x": torch.randn(2, 3, 8)}),
    "chain": chain,
}


def case(name: str) -> Case:
    """A model of `MODELS`. Its weights and inputs are the same every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        made = MODELS[name]()
        made.inputs = {key: _random(value) for key, value in made.inputs.items()}
    return made


def plan_of(made: Case, strategy: str = "layerwise", room: float = 1.0) -> tgo.Plan:
    """A plan in the smallest budget that works for the strategy, times `room`."""
    return tight(trace_of(made), strategy, room)


@cache
def known_plan(name: str, strategy: str = "layerwise") -> tgo.Plan:
    """The tight plan of a model of `MODELS`."""
    return tight(_known_trace(name), strategy, 1.0)


@cache
def _known_trace(name: str) -> tgo.Trace:
    return trace_of(case(name))


def trace_of(made: Case) -> tgo.Trace:
    """The trace of the model's forward."""
    return tgo.Planner(made.model, 1, inputs=made.inputs, entry=made.entry, machine="cpu").trace


def tight(trace: tgo.Trace, strategy: str, room: float = 1.0) -> tgo.Plan:
    """The same as `plan_of`, for a trace."""
    options, budget = {"strategy": strategy, **STRATEGIES[strategy]}, 1
    while True:
        try:
            return tgo.Planner.for_trace(trace, f"{budget}B", machine="cpu", **options).plan()
        except tgo.BudgetError as error:
            budget = int(max(error.smallest_bytes, budget * 1.1) * (room if budget == 1 else 1))


def spilling(plan: tgo.Plan, *spills: tuple[str, str, str, str]) -> tgo.Plan:
    """The plan with spilled activations. Each spill is (name, behind, before, after), the last three of them calls:

    the activation is copied out when `behind` has ended, is gone when `before` begins, and comes back after `after`.
    """

    def with_spills(tasks: tuple[tgo.Task, ...]) -> tuple[tgo.Task, ...]:
        found: list[tgo.Task] = []
        for task in tasks:
            found.append(task)
            for name, behind, before, after in spills:
                if task == tgo.Task("compute", behind):
                    found.append(tgo.Task("d2h", name, before=before))
                if task == tgo.Task("compute", after):
                    found.append(tgo.Task("h2d", name, after=after))
        return tuple(found)

    changed = replace(plan, cold=with_spills(plan.cold), steady=with_spills(plan.steady))
    changed.verify()
    return changed


def assert_runs_like(
    made: Case, plan: tgo.Plan, wanted: list[Tensor], forwards: int = 3, device: str = "cpu"
) -> tgo.Executor:
    """Assert that forwards of the attached model give exactly the plain outputs, and that no operator reads a home."""
    with tgo.Executor(made.model, plan, device=device) as run, torch.no_grad():
        for number in range(forwards):
            with Guard(run, made.inputs) as guard:
                assert_equal(made(), wanted, f"{device}, forward {number}")
        used = plan.arena_bytes + guard.peak_bytes
        assert used <= plan.budget_bytes, f"{used} bytes used, {plan.budget_bytes} allowed"
    return run


def assert_equal(got: list[Tensor], wanted: list[Tensor], where: str = "") -> None:
    """Assert that all tensors are equal bit for bit."""
    assert len(got) == len(wanted), where
    for one, other in zip(got, wanted, strict=True):
        assert one.dtype == other.dtype, where
        assert torch.equal(one, other), f"{where}: not the plain model's output"


def _random(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return torch.randn_like(value)
    return {key: _random(item) for key, item in value.items()} if isinstance(value, dict) else value
