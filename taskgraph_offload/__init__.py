"""Run PyTorch models whose weights do not fit in fast memory: planned, predicted, proved, executed, drawn.

import taskgraph_offload as tgo
plan = tgo.Planner(model, budget_gb=12, inputs=inputs).plan()
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .errors import BudgetError, ExecutionError, OffloadError, PlanError, SettingsError, TraceError
from .executor import Executor
from .graph import Task, TaskGraph
from .machine import Machine
from .offload import offload
from .plan import Bound, Plan
from .reports import Comparison, Sweep
from .timeline import Timeline
from .trace import Trace

if TYPE_CHECKING:
    import viz
    from planner import Planner

# The front door: these live in packages that import this one, and are found when first asked for.
_ELSEWHERE = {"Planner": "planner"}

__all__ = [
    "Bound",
    "BudgetError",
    "Comparison",
    "ExecutionError",
    "Executor",
    "Machine",
    "OffloadError",
    "Plan",
    "PlanError",
    "Planner",
    "SettingsError",
    "Sweep",
    "Task",
    "TaskGraph",
    "Timeline",
    "Trace",
    "TraceError",
    "offload",
    "viz",
]


def __getattr__(name: str) -> Any:
    if name == "viz":
        return importlib.import_module("viz")
    if name in _ELSEWHERE:
        return getattr(importlib.import_module(_ELSEWHERE[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
