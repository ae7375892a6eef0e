"""One file per strategy. A file here is a strategy: no list names them.

A strategy's file has one function, `schedule(problem, **options) -> Schedule`. It orders computes and copies and picks
who stays. It writes no offsets, and never an edge. A file may offer more:

    improve(plan, rival_plan)                a better plan, with the help of other strategies' plans
    step_with(request, budget_bytes, plan)   a quick guess of the step under another budget
    VARIANTS                                 options that are worth a row in every comparison
    DEFAULT = True                           the strategy for whoever names none

The options of a strategy are the keyword-only parameters of its function, annotated with what they accept: bool, int,
float, str, Literal, a `Range` of numbers, and None beside any of them.

A bundle is weights that travel together. Every bundle has a seat: the one byte range of the arena that it occupies
whenever it is there. A steady cycle's tasks lie on a circle. A bundle lives there from its copy to its last reader.
Bundles whose lives never meet may share bytes:

    position   0    1    2    3    4    5    6    (then 0 again)
    a          [----------)              [------   from its copy at 5, round the end, to its reader at 1
    b               [-------------)
    c                         [----------)         a and c may share bytes, a and b may not

Residents live all the time. This module knows no strategy.
"""

from __future__ import annotations

import importlib
import inspect
import math
import pkgutil
from bisect import insort
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from operator import attrgetter, itemgetter
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeAlias, Union, get_args, get_origin, get_type_hints

from taskgraph_offload.errors import SettingsError, shown
from taskgraph_offload.nouns.graph import ACTIVATION, Task
from taskgraph_offload.nouns.machine import Machine
from taskgraph_offload.nouns.program import Program
from taskgraph_offload.nouns.trace import Trace
from taskgraph_offload.plan.plan import Plan, aligned, span_bytes

FIXED = "always"  # the bundle of the weights that always stay


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
        return tuple(filter(self.trace.readers.__contains__, self.trace.fixed))

    @property
    def overhead_bytes(self) -> int:
        """What the budget must hold besides the part of the arena that a strategy fills."""
        return self.trace.activation_bytes + self.margin_bytes + aligned(span_bytes(self.fixed, self.trace))


@dataclass(frozen=True)
class Problem:
    """A trace to schedule within `capacity` bytes of arena, on a machine.

    A program's trace is shortened: `program` says how often its phases run in truth.
    """

    trace: Trace
    capacity: int
    machine: Machine
    program: Program = ()

    def room_for(self, component: str) -> int:
        """The bytes of arena that fit beside the activations of a component: `capacity` or more."""
        most = max(call.transient_bytes for call in self.trace.calls_of[component])
        return self.capacity + self.trace.activation_bytes - most

    @cached_property
    def bundles(self) -> Mapping[str, tuple[str, ...]]:
        """Weights with the same readers travel together. A bundle is named after its readers."""
        by_readers: dict[tuple[int, ...], list[str]] = {}
        for name, readers in self.trace.readers.items():
            if name not in self.trace.fixed:
                by_readers.setdefault(readers, []).append(name)
        order = self.trace.order
        bundles: dict[str, tuple[str, ...]] = {}
        for readers, names in sorted(by_readers.items()):
            blocks: dict[str, None] = {}
            for reader in readers:
                blocks[order[reader].block or order[reader].name] = None
            name = "&".join([*blocks][:2]) + "&..." * (len(blocks) > 2)
            bundles[unique(name, bundles)] = tuple(names)
        return bundles

    @cached_property
    def sizes(self) -> Mapping[str, int]:
        """The bytes that each bundle occupies in the arena."""
        return {name: aligned(span_bytes(weights, self.trace)) for name, weights in self.bundles.items()}

    def bytes_of(self, names: Iterable[str]) -> int:
        """The bytes that these bundles occupy together."""
        return sum(map(self.sizes.__getitem__, names))

    @cached_property
    def needs(self) -> Sequence[Sequence[str]]:
        """For each call of the cycle: the bundles that it reads."""
        read = bundles_read(self.bundles, self.trace)
        return [read[call.name] for call in self.trace.order]

    @cached_property
    def computes(self) -> tuple[Task, ...]:
        """The calls of the cycle as tasks, in order."""
        return tuple(Task("compute", call.name) for call in self.trace.order)


@dataclass(frozen=True)
class Schedule:
    """What a strategy decides: which weights travel together, who stays, and the serial order of a steady cycle.

    `place` adds the offsets, `assemble` the first cycle, `connect` the edges. A strategy whose speed depends on one
    particular placement may give its `offsets`. In the first cycle, residents are copied just before their first
    reader; before the first call if `loads_first`; earlier where the link would wait if `fills_gaps`. `trace` is the
    trace cut finer, if the tasks' calls are parts of blocks. `freed_bytes`: how much lower the peak of activations is
    because some of them leave the device. `components`: bundles that only calls of one component read. `lent_bytes`:
    how much larger than the problem's capacity the arena is, because components with many activations have its end.
    """

    bundles: Mapping[str, tuple[str, ...]]
    residents: frozenset[str]
    steady: tuple[Task, ...]
    offsets: Mapping[str, int] | None = None
    loads_first: bool = False
    fills_gaps: bool = False
    trace: Trace | None = None
    freed_bytes: int = 0
    components: Mapping[str, str] = field(default_factory=dict)
    lent_bytes: int = 0

    def with_resident(self, name: str, weights: tuple[str, ...]) -> Schedule:
        """The same schedule with one more bundle, which always stays."""
        return replace(self, bundles={name: weights, **self.bundles}, residents=self.residents | {name})


class Infeasible(Exception):
    """No schedule of this strategy fits: it needs `arena_bytes`, less what activations free when they leave."""

    def __init__(self, arena_bytes: int, freed_bytes: int = 0) -> None:
        super().__init__(f"needs an arena of {arena_bytes} bytes, {freed_bytes} of them free when activations leave")
        self.arena_bytes, self.freed_bytes = arena_bytes, freed_bytes


@dataclass(frozen=True, slots=True)
class Range:
    """The numbers from `least` to `most`, both included, as in `Annotated[float, Range(0, 1)]`."""

    least: float
    most: float = math.inf

    def __contains__(self, number: float) -> bool:
        return self.least <= number <= self.most

    def __str__(self) -> str:
        return f"from {self.least} " + ("on" if self.most == math.inf else f"to {self.most}")


def unique(name: str, taken: Iterable[str]) -> str:
    """A name for a bundle that no other one has: a number is added where needed; no name looks like an activation's."""
    name = f"_{name}" if name.startswith(ACTIVATION) else name
    names, candidate, number = {*taken, FIXED}, name, 1
    while candidate in names:
        number += 1
        candidate = f"{name}+{number}"
    return candidate


def bundles_read(
    bundles: Mapping[str, Sequence[str]], trace: Trace, components: Mapping[str, str] | None = None
) -> dict[str, tuple[str, ...]]:
    """For each call, by its name: the bundles that it reads, each once. Some are for calls of one component only."""
    owners = components or {}
    bundle_of: dict[str | None, dict[str, str]] = {None: {}}
    for bundle, weights in bundles.items():
        bundle_of.setdefault(owners.get(bundle), {}).update(dict.fromkeys(weights, bundle))
    read: dict[str, tuple[str, ...]] = {}
    for component, calls in trace.calls_of.items():
        where = bundle_of[None] if component not in bundle_of else bundle_of[None] | bundle_of[component]
        for call in calls:
            read[call.name] = tuple(dict.fromkeys(where[name] for name in call.reads if name in where))
    return read


@dataclass(frozen=True, slots=True, order=True)
class Life:
    """When a bundle must keep its bytes: half-open arcs of positions on the circle; `arcs=None` means always."""

    name: str
    size: int
    arcs: tuple[tuple[int, int], ...] | None

    def meets(self, other: Life) -> bool:
        """Whether both are on the device at the same time."""
        if self.arcs is None or other.arcs is None:
            return True
        for a, b in self.arcs:
            for c, d in other.arcs:
                if a < d and c < b:
                    return True
        return False


def place(schedule: Schedule, trace: Trace) -> dict[str, int]:
    """An offset for every bundle: residents first, then each of the others at the lowest free place."""
    offsets: dict[str, int] = {}
    streamed: list[Life] = []
    bottom = 0
    for life in lives(schedule, trace):
        if life.arcs is None:
            offsets[life.name], bottom = bottom, bottom + life.size
        else:
            streamed.append(life)
    by_size = _pack(sorted(streamed, key=attrgetter("size"), reverse=True), bottom)
    _, lowest = min(by_size, _pack(streamed, bottom), key=itemgetter(0))
    return offsets | lowest


def arena_bytes(schedule: Schedule, trace: Trace, offsets: Mapping[str, int] | None = None) -> int:
    """The size of the arena that a schedule needs: with these seats, or with those that `place` gives."""
    top = 0
    for name, offset in (place(schedule, trace) if offsets is None else offsets).items():
        top = max(top, offset + aligned(span_bytes(schedule.bundles[name], trace)))
    return top


def lives(schedule: Schedule, trace: Trace) -> list[Life]:
    """The life of each bundle, from the steady order: from each copy to the last reader before the next copy."""
    reads = bundles_read(schedule.bundles, trace, schedule.components)
    events: dict[str, list[tuple[int, bool]]] = {name: [] for name in schedule.bundles}  # (position, is it a copy in?)
    for position, task in enumerate(schedule.steady):
        for name in reads[task.name] if task.kind == "compute" else {task.name} & events.keys():
            events[name].append((position, task.kind == "h2d"))
    found: list[Life] = []
    for name, weights in schedule.bundles.items():
        arcs = _arcs(events[name], len(schedule.steady))
        found.append(Life(name, aligned(span_bytes(weights, trace)), arcs))
    return found


def _arcs(events: list[tuple[int, bool]], count: int) -> tuple[tuple[int, int], ...] | None:
    """Arcs on a circle of `count` positions; one that goes round the end is cut in two. None if nothing is copied."""
    births = [i for i, (_, arrives) in enumerate(events) if arrives and not events[i - 1][1]]
    if not births:
        return None
    arcs: list[tuple[int, int]] = []
    for birth, following in zip(births, [*births[1:], births[0] + len(events)], strict=True):
        start, stop = events[birth][0], events[(following - 1) % len(events)][0] + 1
        arcs += [(start, stop)] if start < stop else [(start, count), (0, stop)]
    return tuple(arcs)


def _pack(lives: Sequence[Life], bottom: int) -> tuple[int, dict[str, int]]:
    """Put each bundle in turn at the lowest place that is free as long as it lives; also return where the last ends."""
    placed: list[tuple[int, Life]] = []
    offsets: dict[str, int] = {}
    top = 0
    for life in lives:
        offset = bottom
        for start, other in placed:
            if life.meets(other):
                if offset + life.size <= start:
                    break
                offset = max(offset, start + other.size)
        insort(placed, (offset, life))
        offsets[life.name], top = offset, max(top, offset + life.size)
    return top, offsets


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

    >>> from taskgraph_offload.planner.strategies import Range
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
