"""How much host memory a model takes while a plan is attached, as a share of its weights.

python benchmarks/host_memory.py [GiB of weights, by default 4]
"""

from __future__ import annotations

import resource
import sys
import threading
import time

import torch
from torch import nn

import taskgraph_offload as tgo

WIDTH = 2048  # 16 MiB a layer


def main(gib: float) -> None:
    """Print the peak while attaching and after a forward, as a share of the weights."""
    before = peak_bytes()
    layers = int(gib * 2**30 / (4 * WIDTH * WIDTH))
    model, x = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers))), torch.zeros(1, WIDTH)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    plan = tgo.Planner(model, "20%", inputs=(x,), strategy="layerwise", residents="spread", machine="cpu").plan()
    built = peak_bytes() - before
    start = time.perf_counter()
    run = tgo.Executor(model, plan, device="cpu", lazy=True).attach()
    seconds, attached = time.perf_counter() - start, peak_bytes() - before
    with torch.no_grad():
        model(x)
    ran = peak_bytes() - before - plan.arena_bytes
    run.detach()
    assert threading.active_count() == 1
    detached = peak_bytes() - before - plan.arena_bytes
    print(
        f"weights {weights / 2**30:.2f} GiB, attached in {seconds:.2f} s; peak of the host, as a share of the weights:"
    )
    for name, nbytes in (("built", built), ("attached", attached), ("after a forward", ran), ("detached", detached)):
        print(f"{name}: {nbytes / weights:.3f}")


def peak_bytes() -> int:
    """The most memory that this process ever had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 4.0)
