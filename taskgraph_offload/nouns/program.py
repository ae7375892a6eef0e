"""Programs: what a whole request of a pipeline needs. Its phases follow each other; each is a component that runs.

    program     ("clip", 1), ("t5", 1), ("transformer", 28), ("vae", 1)
    a request   clip | t5 | transformer | transformer | ... | transformer | vae

A program is a trace whose cycle is a request. So all that is known of one model holds for programs too. One model alone
is a program of one phase, which runs once.

A phase that repeats is planned with fewer iterations (`shortened`). The state after an iteration is the state before
the next one, so one in the middle stands for all that are left out (`lengthened`):

    planned     transformer 0 | transformer 1 | transformer 2 | transformer 3
    meant       transformer 0 | transformer 1 | transformer 2 ... 25 times ... | transformer 27
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Literal, TypeAlias, get_args

from ..errors import SettingsError, shown
from .graph import Task
from .trace import Boundary, Call, Trace, Weight

Program: TypeAlias = tuple[tuple[str, int], ...]  # the components in order, and how often in a row each of them runs
Source: TypeAlias = Literal["symbolic", "units", "fake", "real"]

ITERATIONS = 4  # of a shortened phase, or more; one in the middle stands for all those that are left out
AHEAD = 8  # calls: copies are not issued further ahead, so phases before and after show in the outer iterations only
MOST_CALLS = 1_000_000  # of a request


@dataclass(frozen=True, slots=True)
class Stretch:
    """Tasks of one iteration of a component, and how often they are repeated in a row."""

    component: str
    tasks: tuple[Task, ...]
    times: int = 1


def program_trace(traces: Mapping[str, Trace], program: Sequence[tuple[str, int]]) -> Trace:
    """The trace of a request. `program` has pairs: a component (one of `traces`), and how often it runs in a row.

    The same name in two traces is one weight. `within` tells the weights of different models apart.

    >>> encoder = Trace.from_units([{"name": "layer", "seconds": 1.0, "tensors": [8]}])
    >>> unet = Trace.from_units([{"name": name, "seconds": 1.0, "tensors": [8]} for name in ("down", "up")])
    >>> trace = program_trace({"encoder": encoder, "unet": unet}, [("encoder", 1), ("unet", 2)])
    >>> [call.name for call in trace.order]
    ['encoder.layer', 'unet.down', 'unet.up', 'unet.down', 'unet.up']
    """
    phases = checked_program(program)
    for name, _ in phases:
        if name not in traces:
            raise SettingsError(f"the program runs {shown(name)}, but there are {', '.join(traces)}")
    names = list(dict.fromkeys(name for name, _ in phases))
    if any(traces[name].program for name in names):
        raise SettingsError("a program is made of the traces of single models, not of programs")
    weights: dict[str, Weight] = {}
    owners: dict[str, str] = {}
    calls = tuple(_call_in(name, call) for name in names for call in traces[name].calls)
    seen = set[str]()
    for call in calls:
        if call.name in seen:
            raise SettingsError(f"two calls of this program would be {call.name!r}: give one of {names} another name")
        seen.add(call.name)
    for name in names:
        for weight in traces[name].weights.values():
            if weights.setdefault(weight.name, weight).nbytes != weight.nbytes:
                raise SettingsError(
                    f"weight {weight.name!r} has {weights[weight.name].nbytes} bytes in {owners[weight.name]!r} and "
                    f"{weight.nbytes} in {name!r}; the same name is one weight: tell them apart with `within`"
                )
            owners.setdefault(weight.name, name)
    return Trace(
        weights=weights,
        calls=calls,
        model=", ".join(names),
        entry="a request",
        source=_least_sure(traces[name] for name in names),
        fixed={weight: why for name in names for weight, why in traces[name].fixed.items()},
        program=phases,
    )


def within(component: str, trace: Trace) -> Trace:
    """The trace of a model that is a component: its weights are named after it.

    >>> trace = Trace.from_units([{"name": "layer", "seconds": 1.0, "tensors": {"w": 8}}])
    >>> list(within("encoder", trace).weights)
    ['encoder.w']
    """

    def renamed(names: Iterable[str]) -> tuple[str, ...]:
        return tuple(f"{component}.{name}" for name in names)

    weights = (
        replace(weight, name=f"{component}.{weight.name}", aliases=renamed(weight.aliases))
        for weight in trace.weights.values()
    )
    calls = []
    for call in trace.calls:
        pieces = (replace(piece, reads=renamed(piece.reads), writes=renamed(piece.writes)) for piece in call.pieces)
        calls.append(replace(call, pieces=tuple(pieces)))
    return replace(
        trace,
        weights={weight.name: weight for weight in weights},
        calls=tuple(calls),
        fixed={f"{component}.{name}": why for name, why in trace.fixed.items()},
    )


def shortened(trace: Trace) -> Trace:
    """The trace with fewer iterations of the phases that repeat often."""
    few = {name: ITERATIONS + 2 * (AHEAD // len(calls)) for name, calls in trace.calls_of.items()}
    return replace(trace, program=tuple((name, min(times, few[name])) for name, times in trace.program))


def places_in_short(trace: Trace, short: Trace) -> list[int]:
    """For each call in the order of a trace: the place of the call that stands for it in the shortened one."""
    found, begin = list[int](), 0
    for (component, times), (_, planned) in zip(trace.program, short.program, strict=True):
        calls = len(trace.calls_of[component])
        for index in range(times):
            stands = index if index <= planned // 2 else max(planned // 2, index - (times - planned))
            found += range(begin + stands * calls, begin + (stands + 1) * calls)
        begin += planned * calls
    return found


def lengthened(tasks: Sequence[Task], short: Trace, program: Program) -> tuple[Task, ...]:
    """The tasks of a cycle with as many iterations as the program has, from those of a shortened cycle."""
    iterations = _iterations(tasks, short)
    found: list[Task] = []
    for (_, times), (_, planned) in zip(program, short.program, strict=True):
        for index in range(planned):
            found += next(iterations)[1] * (times - planned + 1 if index == planned // 2 else 1)
    return tuple(found)


def stretches(tasks: Sequence[Task], trace: Trace) -> list[Stretch]:
    """The tasks of a cycle as they are printed: equal iterations in a row are one stretch.

    >>> trace = Trace.from_units([{"name": "layer", "seconds": 1.0, "tensors": {"w": 8}}])
    >>> trace = program_trace({"unet": trace}, [("unet", 3)])
    >>> [(stretch.component, stretch.times) for stretch in stretches([Task("compute", "unet.layer")] * 3, trace)]
    [('unet', 3)]
    """
    runs = groupby(_iterations(tasks, trace))
    return [Stretch(component, run, sum(1 for _ in same)) for (component, run), same in runs]


def _iterations(tasks: Sequence[Task], trace: Trace) -> Iterator[tuple[str, tuple[Task, ...]]]:
    """Each iteration of a component: it begins with its first call. What stands before all calls is the first one's."""
    starts = [index for index, task in enumerate(tasks) if task.kind == "compute"]
    begin, place = 0, 0
    for component, times in trace.program or (("", 1),):
        calls = len(trace.calls_of[component] if trace.program else trace.calls)
        for _ in range(times):
            place += calls
            end = starts[place] if place < len(starts) else len(tasks)
            yield component, tuple(tasks[begin:end])
            begin = end


def checked_program(program: Sequence[tuple[str, int]]) -> Program:
    """The phases of a program; or an error for what is no program."""
    phases: list[tuple[str, int]] = []
    if not isinstance(program, Iterable) or isinstance(program, str):
        raise SettingsError(f"{shown(program)} is no program; give its phases in order: [('unet', 28), ('vae', 1)]")
    for phase in program:
        match phase:
            case (str() as name, int() as times) if times > 0 and not isinstance(times, bool):
                phases.append((name, times))
            case _:
                raise SettingsError(f"{shown(phase)} is no phase; give a component and how often it runs: ('unet', 28)")
    if not phases:
        raise SettingsError("a program needs at least one phase, such as ('unet', 28)")
    if sum(times for _, times in phases) > MOST_CALLS:
        raise SettingsError(f"a request of more than {MOST_CALLS:,} iterations is not planned")
    return tuple(phases)


def _call_in(component: str, call: Call) -> Call:
    """A call of a component as the program knows it."""

    def inside(name: str) -> str:
        return ".".join(filter(None, (component, name)))

    pieces = []
    for piece in call.pieces:
        place = piece.boundary
        pieces.append(replace(piece, boundary=Boundary(inside(place.module), place.side, place.occurrence)))
    block = None if call.block is None else inside(call.block)
    return Call(inside(call.name), block, tuple(pieces), component)


def _least_sure(traces: Iterable[Trace]) -> Source:
    sources: tuple[Source, ...] = get_args(Source)
    return min((trace.source for trace in traces), key=sources.index)
