"""What a strategy's options accept: the annotations of its keyword-only parameters, checked, and said in words.

Made of bool, int, float, str, Literal, a `Range` of numbers, and None beside any of them. Knows no strategy.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}


@dataclass(frozen=True, slots=True)
class Range:
    """The numbers from `least` to `most`, both included, as in `Annotated[float, Range(0, 1)]`."""

    least: float
    most: float = math.inf

    def __contains__(self, number: float) -> bool:
        return self.least <= number <= self.most

    def __str__(self) -> str:
        return f"from {self.least} " + ("on" if self.most == math.inf else f"to {self.most}")


def options_of(function: Callable[..., Any]) -> Mapping[str, Any]:
    """What each option accepts, as annotated.

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
    """What an annotation accepts, as an error tells it; None, which is to leave the option out, goes without saying."""
    parts = get_args(annotation)
    if get_origin(annotation) in (Union, UnionType):
        return " or ".join(in_words(part) for part in parts if part is not NoneType)
    if get_origin(annotation) is Annotated:
        plain, *ranges = parts
        return " ".join([in_words(plain), *map(str, ranges)])
    return " or ".join(map(repr, parts)) if parts else _WORDS[annotation]
