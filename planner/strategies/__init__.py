"""One file per strategy. A file here is a strategy: no list names them.

A strategy's file has one function, `schedule(problem, **options) -> Schedule`. It orders computes and copies and picks
who stays. It writes no offsets, and never an edge. A file may offer more:

    improve(plan, rival_plan)                a better plan, with the help of other strategies' plans
    step_with(request, budget_bytes, plan)   a quick guess of the step under another budget
    VARIANTS                                 options that are worth a row in every comparison
    DEFAULT = True                           the strategy for whoever names none

The options of a strategy are the keyword-only parameters of its function, annotated with what they accept: bool, int,
float, str, Literal, a `Range` of numbers, and None beside any of them.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeAlias, Union, get_args, get_origin, get_type_hints

from taskgraph_offload.errors import SettingsError, shown
from taskgraph_offload.plan.plan import Plan

from ..strategy import Request, Schedule

_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}

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


def options_of(function: Callable[..., Any]) -> Mapping[str, Any]:
    """What each option accepts, as annotated.

    >>> from taskgraph_offload.planner.strategy import Range
    >>> def schedule(problem: object, *, prefetch: Annotated[int, Range(0)] = 1) -> None: ...
    >>> {name: in_words(accepted) for name, accepted in options_of(schedule).items()}
    {'prefetch': 'a whole number from 0 on'}
    """
    hints = get_type_hints(function, include_extras=True)
    parameters = inspect.signature(function).parameters.values()
    return {each.name: hints[each.name] for each in parameters if each.kind is each.KEYWORD_ONLY}


def accepts(annotation: Any, value: object) -> bool:
    """Whether a value is what the annotation says; true and false are no numbers.

    >>> accepts(float | None, 1), accepts(float | None, True), accepts(Literal["leading", "spread"], "some")
    (True, False, False)
    """
    parts = get_args(annotation)
    if get_origin(annotation) in (Union, UnionType):
        return any(accepts(part, value) for part in parts)
    if get_origin(annotation) is Annotated:
        plain, *ranges = parts
        return accepts(plain, value) and all(value in numbers for numbers in ranges)
    if get_origin(annotation) is Literal:
        return value in parts
    if isinstance(value, bool):
        return annotation is bool
    return isinstance(value, int | float if annotation is float else annotation)


def in_words(annotation: Any) -> str:
    """What an annotation accepts, for an error text. None means that the option is left out, and is not mentioned."""
    parts = get_args(annotation)
    if get_origin(annotation) in (Union, UnionType):
        return " or ".join(in_words(part) for part in parts if part is not NoneType)
    if get_origin(annotation) is Annotated:
        plain, *ranges = parts
        return " ".join([in_words(plain), *map(str, ranges)])
    return " or ".join(map(repr, parts)) if parts else _WORDS[annotation]


DEFAULT = next(name for name in names() if find(name).is_default)
