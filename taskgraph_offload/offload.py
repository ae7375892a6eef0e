"""The front door: `offload` plans and attaches in one call, `detach` detaches without a handle."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from .errors import ExecutionError, SettingsError
from .runtime.executor import Executor, attached_to


def offload(model: nn.Module, budget_gb: float | str, **arguments: Any) -> Executor:
    """Plan for a budget and attach the plan; `arguments` are those of `Planner` and of `Executor`.

    If a plan is attached to the model already, the new one replaces it. If there is an error, the old plan stays.

    >>> import torch
    >>> model, x = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(8))), torch.ones(1, 64)
    >>> run = offload(model, "50%", inputs=(x,), device="cpu")
    >>> y = model(x)
    >>> run.detach()
    """
    import taskgraph_offload as tgo

    names = ("device", "link_bytes_per_second", "lazy", "preload")
    ours = {key: arguments.pop(key) for key in names if key in arguments}
    if str(ours.get("device", "")).startswith(("cpu", "checked")):
        arguments.setdefault("machine", "cpu")
    before = _replaceable(model) if isinstance(model, nn.Module) else {}
    for executor in before:
        executor.detach()
    try:
        return Executor(model, tgo.Planner(model, budget_gb, **arguments).plan(), **ours).attach()
    except BaseException:
        for executor, is_paused in before.items():
            executor.attach()
            if is_paused:
                executor.pause()
        raise


def _replaceable(model: nn.Module) -> dict[Executor, bool]:
    """What is attached to a model or to parts of it, and whether it is paused. It must not be more than the model."""
    parts = set(model.modules())
    found = attached_to(model)
    for executor in found:
        if executor.model not in parts:
            raise ExecutionError(
                f"this {type(model).__name__} is part of a {type(executor.model).__name__} that is attached: detach "
                "that model first, with taskgraph_offload.detach(model)"
            )
    return {executor: executor.is_paused for executor in found}


def detach(target: Any) -> None:
    """Detach every plan from a model, from the models in a dict, or from the components of a pipeline.

    This needs no handle from `offload`. It does nothing if nothing is attached.

    >>> import torch
    >>> model, x = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(8))), torch.ones(1, 64)
    >>> _ = offload(model, "50%", inputs=(x,), device="cpu")
    >>> detach(model)
    """
    models = _models_of(target)
    if not models:
        raise SettingsError(f"a {type(target).__name__} holds no model; give a torch.nn.Module, a dict or a pipeline")
    for model in models:
        for executor in attached_to(model):
            executor.detach()


def _models_of(target: Any) -> list[nn.Module]:
    if isinstance(target, nn.Module):
        return [target]
    held = target.values() if isinstance(target, Mapping) else getattr(target, "__dict__", {}).values()
    return [value for value in held if isinstance(value, nn.Module)]
