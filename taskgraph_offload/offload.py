"""Plan and attach in one call."""

from __future__ import annotations

from typing import Any

from torch import nn

from .runtime.executor import Executor


def offload(model: nn.Module, budget_gb: float | str, **arguments: Any) -> Executor:
    """Plan for a budget and attach the plan; `arguments` are those of `Planner` and of `Executor`.

    >>> import torch
    >>> model, x = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(8))), torch.ones(1, 64)
    >>> run = offload(model, "50%", inputs=(x,), device="cpu")
    >>> y = model(x)
    >>> run.detach()
    """
    import taskgraph_offload as tgo

    ours = {key: arguments.pop(key) for key in ("device", "link_bytes_per_second", "lazy") if key in arguments}
    if str(ours.get("device", "")).startswith(("cpu", "checked")):
        arguments.setdefault("machine", "cpu")
    return Executor(model, tgo.Planner(model, budget_gb, **arguments).plan(), **ours).attach()
