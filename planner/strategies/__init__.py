"""One file per strategy. A file here is a strategy: no list names them.

A strategy's file has one function, `schedule(problem, **options) -> Schedule`. It orders computes and copies and picks
who stays. It writes no offsets, and never an edge. A file may offer more:

    improve(plan, rival_plan)                a better plan, with the help of other strategies' plans
    step_with(request, budget_bytes, plan)   a quick guess of the step under another budget
    VARIANTS                                 options that are worth a row in every comparison
    DEFAULT = True                           the strategy for whoever names none
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from taskgraph_offload.errors import SettingsError, shown
from taskgraph_offload.plan.plan import Plan

from ..strategy import Request, Schedule, accepts, in_words, options_of

RivalPlan: TypeAlias = Callable[[str, Mapping[str, Any]], Plan | None]  # a strategy's plan here, if it can plan


@dataclass(frozen=True)
class Strategy:
    """What a strategy's file offers."""

    name: str
    schedule: Callable[..., Schedule]
    improve: Callable[[Plan, RivalPlan], Plan] | None
    step_with: Callable[[Request, int, Plan], float] | None
    variants: Sequence[Mapping[str, Any]]
    is_default: bool


def names() -> tuple[str, ...]:
    """The strategies that there are.

    >>> "layerwise" in names()
    True
    """
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_")))


def find(name: str) -> Strategy:
    """A strategy by its name."""
    if name not in names():
        raise SettingsError(f"unknown strategy {shown(name)}; there are {', '.join(names())}")
    file = importlib.import_module(f"{__name__}.{name}")
    return Strategy(
        name,
        file.schedule,
        improve=getattr(file, "improve", None),
        step_with=getattr(file, "step_with", None),
        variants=getattr(file, "VARIANTS", ()),
        is_default=getattr(file, "DEFAULT", False),
    )


def check_options(name: str, options: Mapping[str, Any]) -> None:
    """Raise `SettingsError` for an option that the strategy does not have, or that does not accept its value."""
    known = options_of(find(name).schedule)
    for option, value in options.items():
        if option not in known:
            has = f"it has {', '.join(known)}" if known else "it has none"
            raise SettingsError(f"strategy {name!r} has no option {shown(option)}; {has}")
        if not accepts(known[option], value):
            raise SettingsError(f"option {option!r} of {name} is {in_words(known[option])}, not {shown(value)}")


DEFAULT = next(name for name in names() if find(name).is_default)
