"""What `--json` prints: one object for each command, whose keys stay as they are. Bytes and seconds, no text forms.

Every object begins with `command`. The keys that end in `_seconds` and `_bytes` are numbers, or null where a plan has
no such figure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..nouns.machine import Machine
from ..nouns.reports import Comparison, Sweep
from ..nouns.trace import Trace
from ..plan.plan import Plan
from ..plan.simulate import SETTLED

Document = Mapping[str, Any]


@dataclass(frozen=True)
class Circumstances:
    """Which model, where, and in words with which inputs."""

    trace: Trace
    machine: Machine
    inputs: str


def of_circumstances(about: Circumstances) -> Document:
    """What `compare` and `sweep` begin with."""
    return {"model": about.trace.model, "inputs": about.inputs, "machine": about.machine.to_dict()}


def of_plan(plan: Plan) -> Document:
    """`plan`: what was decided, and what it promises."""
    weights = plan.trace.weights
    return {
        "model": plan.trace.model,
        "trace": plan.trace.source,
        "machine": plan.machine.to_dict(),
        "strategy": plan.strategy,
        "options": dict(plan.options),
        "budget_bytes": plan.budget_bytes,
        "arena_bytes": plan.arena_bytes,
        "activation_bytes": max(plan.activation_bytes),
        "margin_bytes": plan.margin_bytes,
        "peak_bytes": plan.peak_bytes,
        "weight_bytes": plan.trace.weight_bytes,
        "resident_bytes": sum(weights[name].nbytes for name in plan.residents),
        "streamed_bytes": plan.streamed_bytes,
        "predicted": plan.predict(SETTLED).figures(),
        "bound": {name: getattr(plan.bound, name) for name in plan.bound.__slots__},
        "outlook": None if plan.outlook is None else asdict(plan.outlook),
    }


def of_tasks(plan: Plan) -> Sequence[Document]:
    """The tasks of a steady step, in the order of issue."""
    return [
        {"kind": task.kind, "name": task.name, "nbytes": plan.task_bytes(task), "text": str(task)}
        for task in plan.tasks
    ]


def of_comparison(comparison: Comparison) -> Document:
    """`compare`: a row for each strategy, the fastest first; `error` says why one has no figures."""
    return {"rows": [dict(row) for row in comparison.rows]}


def of_sweep(sweep: Sweep) -> Document:
    """`sweep`: a row for each strategy and budget; `enough_bytes` is where more memory buys nearly nothing."""
    knees = {name: sweep.knee(name) for name in sweep.strategies}
    enough = {name: None if knee is None else knee["budget_bytes"] for name, knee in knees.items()}
    return {"rows": [dict(row) for row in sweep.rows], "enough_bytes": enough}
