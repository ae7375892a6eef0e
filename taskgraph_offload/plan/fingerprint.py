"""Whether a model is the one that a trace was made from: the names, shapes, dtypes, bytes and ties of its weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..errors import PlanError
from ..nouns.weights import group_by_bytes, named_tensors

if TYPE_CHECKING:
    from torch import nn

    from ..nouns.trace import Trace, Weight

ADVICE = "make a plan for this model: Planner(model, ...).plan()"


def check_model(trace: Trace, model: nn.Module) -> None:
    """Raise `PlanError` naming the first weight in which the model differs from the trace.

    What the forward does with its weights cannot be seen from here: a call that the plan did not expect is served when
    it comes.
    """
    given = {group.weight.name: group.weight for group in group_by_bytes(list(named_tensors(model)))}
    for name, expected in trace.weights.items():
        if name not in given:
            raise PlanError(f"the plan's weight {name!r} is {_where(name, given, type(model).__name__)}; {ADVICE}")
        if given[name] != expected:
            raise PlanError(
                f"weight {name!r} is {_said(given[name])} in the model, {_said(expected)} in the plan; {ADVICE}"
            )
    for name in given:
        if name not in trace.weights:
            raise PlanError(f"the model's weight {name!r} is {_where(name, trace.weights, 'the plan')}; {ADVICE}")


def _where(name: str, weights: Mapping[str, Weight], place: str) -> str:
    """In what way a weight of that name is missing somewhere: tied to another one, or not there at all."""
    tied = next((weight.name for weight in weights.values() if name in weight.aliases), None)
    return f"not in {place}" if tied is None else f"tied to {tied!r} in {place}"


def _said(weight: Weight) -> str:
    tied = f", tied to {', '.join(weight.aliases)}" if weight.aliases else ""
    return f"{weight.dtype} {weight.shape} of {weight.nbytes} bytes{tied}"
