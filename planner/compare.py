"""Plans one model with several strategies, or under several budgets, and shows the predictions side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Any, TypeAlias

from taskgraph_offload.errors import BudgetError, SettingsError
from taskgraph_offload.nouns.progress import reported
from taskgraph_offload.nouns.reports import Comparison, Sweep
from taskgraph_offload.plan.plan import Plan, title_of

from . import strategies
from .assemble import make_plan, smallest_budget
from .bound import bound
from .strategies import Request

Choice: TypeAlias = str | tuple[str, Mapping[str, Any]]  # a strategy's name, or its name and options

# The columns that a comparison takes from a plan, and the columns that a sweep keeps.
PROMISES = (
    "step_seconds",
    "cold_seconds",
    "compute_seconds",
    "stall_seconds",
    "overlap",
    "peak_bytes",
    "streamed_bytes",
)
SWEPT = ("strategy", "budget_bytes", "step_seconds", "bound_seconds", "peak_bytes")


def compare(request: Request, budget_bytes: int, choices: Sequence[Choice] | None = None) -> Comparison:
    """Plan with each strategy under one budget: the fastest first, those that do not fit last."""
    rows = (_compared(asked, budget_bytes) for asked in reported("strategies", _requests(request, choices)))
    ranked = sorted(rows, key=lambda row: (row["step_seconds"] is None, row["step_seconds"] or 0.0))
    return Comparison(ranked, request.trace.cycle)


def sweep(request: Request, budgets: Sequence[int], choices: Sequence[Choice] | None = None) -> Sweep:
    """Plan with each strategy under each budget."""
    rows = list(product(_requests(request, choices), sorted(set(budgets))))
    return Sweep([_swept(asked, budget) for asked, budget in reported("plans", rows)], request.trace.cycle)


def budgets_between(request: Request, steps: int, choices: Sequence[Choice] | None = None) -> list[int]:
    """Budgets at equal distances, from the smallest one that any strategy can work with to where everything fits."""
    if isinstance(steps, bool) or steps < 2:
        raise SettingsError(f"a sweep takes a list of budgets, or a number of steps from 2 on, not {steps!r}")
    least = min(smallest_budget(asked) for asked in _requests(request, choices))
    most = max(least, smallest_budget(replace(request, strategy="resident", options={})))
    return [least + (most - least) * step // (steps - 1) for step in range(steps)]


def everything() -> tuple[Choice, ...]:
    """All strategies, and the variants that are worth comparing."""
    variants = [(name, options) for name in strategies.names() for options in strategies.find(name).variants]
    return (*strategies.names(), *variants)


def _requests(request: Request, choices: Sequence[Choice] | None) -> list[Request]:
    """The same request for each strategy; by default, for all."""
    asked = everything() if choices is None else choices
    pairs = [_pair(choice) for choice in asked]
    for name, options in pairs:
        strategies.check_options(name, options)
    return [replace(request, strategy=name, options=options) for name, options in pairs]


def _pair(choice: Any) -> tuple[str, Mapping[str, Any]]:
    match choice:
        case str():
            return choice, {}
        case (str() as name, Mapping() as options):
            return name, options
    raise SettingsError(
        f"{choice!r} is no strategy; give a name, or a name with options: ('layerwise', {{'ratio': 0.5}})"
    )


def _compared(request: Request, budget_bytes: int) -> dict[str, Any]:
    row: dict[str, Any] = {
        "strategy": title_of(request.strategy, request.options),
        "budget_bytes": budget_bytes,
        **dict.fromkeys(PROMISES),
        "bound_seconds": _bound_seconds(request, budget_bytes),
        "measured_step_seconds": None,
        "error": None,
        "smallest_bytes": None,
    }
    try:
        return row | _promises(make_plan(request, budget_bytes))
    except BudgetError as error:
        return row | {"error": str(error), "smallest_bytes": error.smallest_bytes}


def _promises(plan: Plan) -> dict[str, Any]:
    return plan.predict(plan.settled).figures() | {"streamed_bytes": plan.streamed_bytes}


def _swept(request: Request, budget_bytes: int) -> dict[str, Any]:
    row = _compared(request, budget_bytes)
    return {key: row[key] for key in SWEPT}


def _bound_seconds(request: Request, budget_bytes: int) -> float:
    return bound(request.trace, budget_bytes - request.margin_bytes, request.machine).step_seconds
