"""Run PyTorch models whose weights do not fit in fast memory: planned, predicted, proved, executed, drawn.

import taskgraph_offload as tgo
plan = tgo.Planner(model, budget_gb=12, inputs=inputs).plan()
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .errors import BudgetError, ExecutionError, OffloadError, PlanError, SettingsError, TraceError
from .nouns.graph import Task, TaskGraph
from .nouns.machine import Machine
from .nouns.reports import Comparison, Sweep
from .nouns.timeline import Timeline
from .nouns.trace import Trace
from .offload import detach, offload
from .plan.plan import Bound, Plan
from .runtime.executor import Executor
from .runtime.run import Run

if TYPE_CHECKING:
    from . import viz
    from .planner import Planner

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
    "Run",
    "SettingsError",
    "Sweep",
    "Task",
    "TaskGraph",
    "Timeline",
    "Trace",
    "TraceError",
    "detach",
    "offload",
    "viz",
]
__version__ = "0.2.0.dev0"  # the one place: pyproject.toml reads it here


def __getattr__(name: str) -> Any:
    """The planner and the pictures are built on this package, so they are imported when somebody first asks."""
    if name == "Planner":
        return importlib.import_module(".planner", __name__).Planner
    if name == "viz":
        return importlib.import_module(".viz", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
