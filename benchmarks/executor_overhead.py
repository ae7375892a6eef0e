"""How much host time the executor takes for each call: blocks that compute nothing, with few tensors and with many.

On the CPU the copies take no time. On a GPU they do, but the host does not wait for them; a simulated one drops all
work.

python benchmarks/executor_overhead.py
python -m tests.simulated_gpu benchmarks/executor_overhead.py --device cuda
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch import Tensor, nn

import taskgraph_offload as tgo
from taskgraph_offload.devices.cpu import ComputeLane, CpuDevice
from tests.simulated_gpu import card

BLOCKS, TENSORS, FORWARDS = 40, (2, 30), 200


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
    """Some parameters. After tracing, `works` is False, and the block computes nothing."""

    def __init__(self, tensors: int) -> None:
        super().__init__()
        self.weights = nn.ParameterList(torch.randn(256) for _ in range(tensors))
        self.works = True

    def forward(self, x: Tensor) -> Tensor:
        if self.works:
            for weight in self.weights:
                x = x + weight
        return x


def main() -> None:
    """Print the median microseconds per call, for strategies that copy much, little or nothing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    device = parser.parse_args().device
    if card.is_here():
        card.empty_queues(True)
    for tensors in TENSORS:
        print(f"{tensors} tensors in each block")
        measure(tensors, device)


def measure(tensors: int, device: str) -> None:
    """Print what one size of blocks takes."""
    model, x = nn.Sequential(*(Block(tensors) for _ in range(BLOCKS))), torch.zeros(256)
    plans = {name: plan_of(model, x, name) for name in ("resident", "sequential", "layerwise", "auto")}
    for block in model:
        block.works = False
    x = x.to(device)
    with torch.no_grad():
        plain = seconds(lambda: model(x))
        for name, plan in plans.items():
            no_copies: Any = NoCopies() if device == "cpu" else device
            with tgo.Executor(model, plan, device=no_copies) as run:
                attached = seconds(lambda: model(x))
                copies = run.stats.copies / FORWARDS
            calls = len(plan.trace.calls)
            overhead = (attached - plain) / calls * 1e6
            print(f"{name:>12}: {overhead:5.1f} us per call ({calls} calls, {copies:.0f} copies a forward)")


def plan_of(model: nn.Module, x: Tensor, strategy: str) -> tgo.Plan:
    """A plan that streams half of the model, or keeps all of it."""
    budget = "300%" if strategy == "resident" else "50%"
    return tgo.Planner(model, budget, inputs=(x,), strategy=strategy, machine="cpu").plan()


def seconds(forward: Callable[[], object]) -> float:
    """The median time of many forwards: what this thread computes, not what it waits."""
    taken = []
    for _ in range(FORWARDS):
        start = time.thread_time()
        forward()
        taken.append(time.thread_time() - start)
    return median(taken)


if __name__ == "__main__":
    main()
