"""What every strategy is: a function of a `Problem` and options that returns a `Schedule`, or raises `Infeasible`.

    schedule(problem: Problem, *, prefetch: Annotated[int, Range(0)] = 1) -> Schedule

A bundle is weights that travel together. The options of a strategy are the keyword-only parameters of its function,
annotated with what they accept: bool, int, float, str, Literal, a `Range` of numbers, and None beside any of them.
This module knows no strategy.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from taskgraph_offload.nouns.graph import ACTIVATION, Task
from taskgraph_offload.nouns.machine import Machine
from taskgraph_offload.nouns.trace import Trace
from taskgraph_offload.plan.plan import aligned, span_bytes

FIXED = "always"  # the bundle of the weights that always stay
_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}


@dataclass(frozen=True)
class Request:
    """Everything that a plan is made from, except the budget."""

    trace: Trace
    machine: Machine
    strategy: str
    options: Mapping[str, Any] = field(default_factory=dict)
    margin_bytes: int = 0

    @property
    def fixed(self) -> tuple[str, ...]:
        """The weights that always stay."""
        return tuple(name for name in self.trace.fixed if name in self.trace.readers)

    @property
    def overhead_bytes(self) -> int:
        """What the budget must hold besides the part of the arena that a strategy fills."""
        return self.trace.activation_bytes + self.margin_bytes + aligned(span_bytes(self.fixed, self.trace))


@dataclass(frozen=True)
class Problem:
    """A trace to schedule within `capacity` bytes of arena, on a machine."""

    trace: Trace
    capacity: int
    machine: Machine

    @cached_property
    def bundles(self) -> Mapping[str, tuple[str, ...]]:
        """Weights with the same readers travel together. A bundle is named after its readers."""
        by_readers: dict[tuple[int, ...], list[str]] = {}
        for name, readers in self.trace.readers.items():
            if name not in self.trace.fixed:
                by_readers.setdefault(readers, []).append(name)
        calls = self.trace.calls
        bundles: dict[str, tuple[str, ...]] = {}
        for readers, names in sorted(by_readers.items()):
            blocks = list(dict.fromkeys(calls[i].block or calls[i].name for i in readers))
            name = blocks[0] if len(blocks) == 1 else f"{blocks[0]}&{blocks[1]}" + "&..." * (len(blocks) > 2)
            bundles[unique(name, bundles)] = tuple(names)
        return bundles

    @cached_property
    def sizes(self) -> Mapping[str, int]:
        """The bytes that each bundle occupies in the arena."""
        return {name: aligned(span_bytes(weights, self.trace)) for name, weights in self.bundles.items()}

    def bytes_of(self, names: Iterable[str]) -> int:
        """The bytes that these bundles occupy together."""
        return sum(self.sizes[name] for name in names)

    @cached_property
    def needs(self) -> tuple[tuple[str, ...], ...]:
        """For each call: the bundles that it reads."""
        bundle_of = {weight: bundle for bundle, weights in self.bundles.items() for weight in weights}
        return tuple(
            tuple(dict.fromkeys(bundle_of[name] for name in call.reads if name in bundle_of))
            for call in self.trace.calls
        )

    @cached_property
    def bundle_readers(self) -> Mapping[str, tuple[int, ...]]:
        """For each bundle: the indices of the calls that read it."""
        readers: dict[str, list[int]] = {name: [] for name in self.bundles}
        for index, names in enumerate(self.needs):
            for name in names:
                readers[name].append(index)
        return {name: tuple(calls) for name, calls in readers.items()}

    @cached_property
    def computes(self) -> tuple[Task, ...]:
        """The calls as tasks, in order."""
        return tuple(Task("compute", call.name) for call in self.trace.calls)


@dataclass(frozen=True)
class Schedule:
    """What a strategy decides: which weights travel together, who stays, and the serial order of a steady cycle.

    `seats` adds the offsets, `cold` the first cycle, `connect` the edges. A strategy whose speed depends on one
    particular placement may give its `offsets`. In the first cycle, residents are copied just before their first
    reader; before the first call if `loads_first`; earlier where the link would wait if `fills_gaps`. `trace` is the
    trace cut finer, if the tasks' calls are parts of blocks. `freed_bytes`: how much lower the peak of activations is
    because some of them leave the device.
    """

    bundles: Mapping[str, tuple[str, ...]]
    residents: frozenset[str]
    steady: tuple[Task, ...]
    offsets: Mapping[str, int] | None = None
    loads_first: bool = False
    fills_gaps: bool = False
    trace: Trace | None = None
    freed_bytes: int = 0

    def with_resident(self, name: str, weights: tuple[str, ...]) -> Schedule:
        """The same schedule with one more bundle, which always stays."""
        return replace(self, bundles={name: weights, **self.bundles}, residents=self.residents | {name})


class Infeasible(Exception):
    """No schedule of this strategy fits: it needs `arena_bytes`, less what activations free when they leave."""

    def __init__(self, arena_bytes: int, freed_bytes: int = 0) -> None:
        super().__init__(f"needs an arena of {arena_bytes} bytes, {freed_bytes} of them free when activations leave")
        self.arena_bytes, self.freed_bytes = arena_bytes, freed_bytes


def unique(name: str, taken: Iterable[str]) -> str:
    """A name for a bundle that no other one has: a number is added where needed; no name looks like an activation's."""
    name = f"_{name}" if name.startswith(ACTIVATION) else name
    names, candidate, number = {*taken, FIXED}, name, 1
    while candidate in names:
        number += 1
        candidate = f"{name}+{number}"
    return candidate


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
    """What an annotation accepts, for an error text. None means that the option is left out, and is not mentioned."""
    parts = get_args(annotation)
    if get_origin(annotation) in (Union, UnionType):
        return " or ".join(in_words(part) for part in parts if part is not NoneType)
    if get_origin(annotation) is Annotated:
        plain, *ranges = parts
        return " ".join([in_words(plain), *map(str, ranges)])
    return " or ".join(map(repr, parts)) if parts else _WORDS[annotation]
