"""How much host time the executor takes for each call: blocks of 30 tensors, copies that take no time.

python benchmarks/executor_overhead.py
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

import taskgraph_offload as tgo
from taskgraph_offload.devices.cpu import ComputeLane, CpuDevice

BLOCKS, TENSORS, FORWARDS = 40, 30, 200


class NoLane(ComputeLane):
    """A lane that copies nothing."""

    def copy(self, target: Tensor, source: Tensor, label: object) -> None:
        """Nothing to do."""


class NoCopies(CpuDevice):
    """A device whose copies take no time, so that only the executor's own time is measured."""

    def __init__(self) -> None:
        super().__init__()
        self.lanes = {"compute": ComputeLane(), "h2d": NoLane(), "d2h": NoLane()}


class Block(nn.Module):
    """Thirty parameters. After tracing, `works` is False, and the block computes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList(torch.randn(256) for _ in range(TENSORS))
        self.works = True

    def forward(self, x: Tensor) -> Tensor:
        if self.works:
            for weight in self.weights:
                x = x + weight
        return x


def main() -> None:
    """Print the median microseconds per call, for strategies that copy much, little or nothing."""
    model, x = nn.Sequential(*(Block() for _ in range(BLOCKS))), torch.zeros(256)
    plans = {name: plan_of(model, x, name) for name in ("resident", "sequential", "layerwise", "auto")}
    for block in model:
        block.works = False
    with torch.no_grad():
        plain = seconds(lambda: model(x))
        for name, plan in plans.items():
            device: Any = NoCopies()
            with tgo.Executor(model, plan, device=device) as run:
                attached = seconds(lambda: model(x))
                copies = run.stats.copies / FORWARDS
            calls = len(plan.trace.calls)
            overhead = (attached - plain) / calls * 1e6
            print(f"{name:>10}: {overhead:5.1f} us per call ({calls} calls, {copies:.0f} copies a forward)")


def plan_of(model: nn.Module, x: Tensor, strategy: str) -> tgo.Plan:
    """A plan that streams half of the model, or keeps all of it."""
    budget = "300%" if strategy == "resident" else "50%"
    return tgo.Planner(model, budget, inputs=(x,), strategy=strategy, machine="cpu").plan()


def seconds(forward: Callable[[], object]) -> float:
    """The median time of many forwards."""
    taken = []
    for _ in range(FORWARDS):
        start = time.perf_counter()
        forward()
        taken.append(time.perf_counter() - start)
    return median(taken)


if __name__ == "__main__":
    main()
