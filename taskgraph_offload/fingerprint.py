"""Whether a model is the one that a trace was made from: names, shapes, dtypes and ties of all its weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .errors import PlanError

if TYPE_CHECKING:
    import torch

    from .trace import Trace


def check_model(trace: Trace, model: torch.nn.Module) -> None:
    """Raise `PlanError` naming the first weight in which the model differs from the trace."""
    given: dict[str, torch.Tensor] = dict(model.named_parameters(remove_duplicate=False))
    given.update(model.named_buffers(remove_duplicate=False))
    expected = {name: weight for weight in trace.weights.values() for name in (weight.name, *weight.aliases)}
    advice = "make a plan for this model: Planner(model, ...).plan()"
    for name in expected:
        if name not in given:
            raise PlanError(f"the plan's weight {name!r} is not in this {type(model).__name__}; {advice}")
    for name, tensor in given.items():
        if name not in expected:
            raise PlanError(f"the model's weight {name!r} is not in the plan; {advice}")
        weight = expected[name]
        dtype, shape = str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)
        if name == weight.name and (dtype, shape) != (weight.dtype, weight.shape):
            raise PlanError(
                f"weight {name!r} is {dtype} {shape} in the model, {weight.dtype} {weight.shape} in the plan; {advice}"
            )
        if extent_bytes(tensor) > weight.nbytes:
            raise PlanError(
                f"weight {name!r} spans {extent_bytes(tensor)} bytes, {weight.nbytes} in the plan; {advice}"
            )
        if name != weight.name and tensor.untyped_storage()._cdata != given[weight.name].untyped_storage()._cdata:
            raise PlanError(f"weight {name!r} is no longer tied to {weight.name!r}, as it is in the plan; {advice}")


def extent_bytes(tensor: torch.Tensor) -> int:
    """The bytes from a tensor's first element to its last one."""
    if tensor.numel() == 0:
        return 0
    last = sum((size - 1) * abs(stride) for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()
