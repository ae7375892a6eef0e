"""Models to run offloaded, tight plans for them, and checks of a run."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import taskgraph_offload as tgo
from taskgraph_offload.devices import open_device
from taskgraph_offload.runtime.executor import attached_to

from . import models
from .guard import Guard, tensors
from .simulated_gpu import card

DEVICE = os.environ.get("TEST_DEVICE", "cpu")  # where offloaded models run, and plain ones beside them: "cpu" or "cuda"

ROUNDED = 16 << 10  # what rounding each tensor up to 512 bytes adds on a GPU, for the small models here

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

    def __post_init__(self) -> None:
        self.inputs = on(DEVICE, self.inputs)

    def __call__(self) -> list[Tensor]:
        """Run it where it is attached, or as a plain model on `DEVICE`."""
        with plainly(self.model):
            return tensors((self.model if self.entry == "forward" else getattr(self.model, self.entry))(**self.inputs))


def only_on_the_cpu(reason: str) -> pytest.MarkDecorator:
    """A test of something that only the CPU has, or that does not depend on the device."""
    return pytest.mark.skipif(DEVICE != "cpu", reason=f"only on the CPU: {reason}")


def assert_within_budget(run: tgo.Executor | tgo.Run) -> None:
    """Assert that the peak is no higher than the budget.

    A GPU's libraries take more than these models, and come on top; torch rounds each tensor up to 512 bytes there.
    """
    besides = 0 if DEVICE == "cpu" else open_device(DEVICE).library_bytes + ROUNDED
    budget = run.budget_bytes if isinstance(run, tgo.Run) else run.plan.budget_bytes
    assert run.stats.peak_bytes <= budget + besides


def fails_on_a_gpu(reason: str) -> pytest.MarkDecorator:
    """A test of something that is known to fail on a GPU. As soon as it passes there, this mark must go."""
    return pytest.mark.xfail(DEVICE != "cpu", reason=f"fails on a GPU: {reason}")


def not_simulated(reason: str) -> pytest.MarkDecorator:
    """A test of something that the simulated GPU cannot do."""
    return pytest.mark.skipif(DEVICE != "cpu" and card.is_here(), reason=f"not on the simulated GPU: {reason}")


def devices(*on_the_cpu: str) -> list[str]:
    """These, or, where `DEVICE` is a GPU, that."""
    return list(on_the_cpu) if DEVICE == "cpu" else [DEVICE]


@contextmanager
def plainly(model: nn.Module) -> Iterator[None]:
    """Within it, a model that is not attached is on `DEVICE`; after it, where it was, with its new values."""
    if DEVICE == "cpu" or attached_to(model):
        yield
        return
    with torch.inference_mode(False):
        away = _move(model)
    try:
        yield
    finally:
        with torch.inference_mode(False):
            _move_back(model, away)


def _move(model: nn.Module) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Move each storage once, so that views of it stay so. Returns tensors, their data here and their data there."""
    away, storages = list[tuple[Tensor, Tensor, Tensor]](), dict[int, Tensor]()
    for tensor in _tensors_of(model, "cpu"):
        home, storage = tensor.data, tensor.untyped_storage()
        if storage._cdata not in storages:
            storages[storage._cdata] = torch.empty(0, dtype=torch.uint8).set_(storage).to(DEVICE)
        there = torch.empty(0, dtype=tensor.dtype, device=DEVICE)
        there.set_(storages[storage._cdata].untyped_storage(), home.storage_offset(), home.shape, home.stride())
        tensor.data = there
        away.append((tensor, home, there))
    return away


def _move_back(model: nn.Module, away: list[tuple[Tensor, Tensor, Tensor]]) -> None:
    """Other data that the forward has given to a tensor is kept, and moves too."""
    for tensor, home, there in away:
        if tensor.data_ptr() == there.data_ptr():
            home.copy_(there)
            tensor.data = home
    for tensor in _tensors_of(model, DEVICE) if away else ():
        tensor.data = tensor.data.cpu()


def _tensors_of(model: nn.Module, device: str) -> list[Tensor]:
    return [tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.device.type == device]


def on(device: str, value: Any) -> Any:
    """The inputs of a forward on a device."""
    if isinstance(value, dict):
        return {key: on(device, item) for key, item in value.items()}
    return value.to(device) if isinstance(value, Tensor) else value


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
    made: Case, plan: tgo.Plan, wanted: list[Tensor], forwards: int = 3, device: str = DEVICE
) -> tgo.Executor:
    """Assert that forwards of the attached model give exactly the plain outputs, and that no operator reads a home."""
    with tgo.Executor(made.model, plan, device=device) as run, torch.no_grad():
        for number in range(forwards):
            with Guard(run, made.inputs) as guard:
                assert_equal(made(), wanted, f"{device}, forward {number}")
        used = plan.arena_bytes + guard.peak_bytes
        # The plan is one for the CPU, without a margin for what a GPU's operators take besides: a little, for LSTMs.
        allowed = plan.budget_bytes + (0 if DEVICE == "cpu" else 1024)
        assert used <= allowed, f"{used} bytes used, {plan.budget_bytes} allowed"
    return run


def assert_equal(got: list[Tensor], wanted: list[Tensor], where: str = "") -> None:
    """Assert that all tensors are equal bit for bit."""
    assert len(got) == len(wanted), where
    for one, other in zip(got, wanted, strict=True):
        assert one.dtype == other.dtype, where
        assert torch.equal(one.cpu(), other.cpu()), f"{where}: not the plain model's output"


def _random(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return torch.randn_like(value)
    return {key: _random(item) for key, item in value.items()} if isinstance(value, dict) else value
