"""Attaches a plan, detaches it, and checks that the model is exactly what it was before."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

import taskgraph_offload as tgo

from .running import DEVICE, Case, known_plan


@contextmanager
def attached(made: Case, strategy: str = "layerwise") -> Iterator[tgo.Executor]:
    """A context in which a plan is attached. At its end, the model must be as it was."""
    before = everything_of(made.model)
    with tgo.Executor(made.model, known_plan("chain", strategy), device=DEVICE) as run:
        yield run
    assert everything_of(made.model) == before


def everything_of(model: nn.Module) -> dict[str, Any]:
    """Everything that must be the same after a model is detached, threads included."""
    found: dict[str, Any] = {"threads": [thread.name for thread in threading.enumerate()]}
    for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]:
        looks = (
            tensor.shape,
            tensor.stride(),
            tensor.dtype,
            tensor.device,
            tensor.requires_grad,
            tensor.is_inference(),
        )
        found[name] = (id(tensor), looks, tensor.detach().flatten().tolist())
    for name, module in model.named_modules():
        found[f"hooks of {name}"] = (len(module._forward_hooks), len(module._forward_pre_hooks), sorted(vars(module)))
    return found
