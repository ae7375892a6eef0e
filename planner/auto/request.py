"""How long a request takes when every weight of a program has its seat, and the schedule that follows from the seats.

Seats of different phases overlap. Bytes that another phase has used are copied again, all others are still there. So
the copies follow from the seats. A phase's copies are the same in all iterations but the first, so two lists will do:

    enter      the copies of a request in which each phase runs once
    repeat     the copies of an iteration that follows another one of its component

The request is run on plain numbers (`Request.seconds`). Once the iterations of a phase take the same time, the rest of
them is not run but added.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, chain
from operator import attrgetter
from typing import NamedTuple

from taskgraph_offload.nouns.graph import Task
from taskgraph_offload.nouns.machine import Machine
from taskgraph_offload.nouns.program import Program
from taskgraph_offload.nouns.trace import Call, Trace
from taskgraph_offload.plan.plan import span_bytes

from ..strategies import Problem, Schedule, unique
from .draft import ERRORS, Copy, Seat, copies_of, score
from .fluid import visits_of

_REQUESTS = 6  # that are run until two in a row take the same time
_SAME = 1e-9

Waiting = Sequence[Sequence[tuple[float, int]]]  # for each unit: how long each of its copies takes, and what it awaits


class Part(NamedTuple):
    """Weights that travel together, and their bytes in the arena; for one component alone, or for all others."""

    weights: tuple[str, ...]
    offset: int
    nbytes: int
    component: str | None = None

    @property
    def stop(self) -> int:
        return self.offset + self.nbytes


class Phase(NamedTuple):
    """A component that runs `times` in a row. `begin` counts the units before it, if each phase runs once."""

    name: str
    times: int
    begin: int
    units: int


@dataclass(frozen=True)
class Request:
    """A program with a seat for every part: which copies that means, and how long a request takes."""

    trace: Trace  # cut as finely as it is planned
    program: Program
    machine: Machine
    parts: tuple[Part, ...]
    rooms: Mapping[str, int]  # for each component: the bytes that its activations leave
    latencies: int  # a part that takes less time than so many travels with its neighbour

    @cached_property
    def phases(self) -> tuple[Phase, ...]:
        """The phases, in order."""
        sizes = [len(self.trace.calls_of[name]) for name, _ in self.program]
        begins = accumulate(sizes, initial=0)
        return tuple(Phase(name, times, *of) for (name, times), *of in zip(self.program, begins, sizes, strict=False))

    @cached_property
    def units(self) -> int:
        """The units of all phases, if each runs once."""
        return sum(phase.units for phase in self.phases)

    @cached_property
    def works(self) -> bool:
        """Whether what a unit reads fits at the same time."""
        for component, calls in self.trace.calls_of.items():
            read = {self.part_of[component].get(name) for call in calls for name in call.reads}
            if any(part is not None and self.parts[part].stop > self.rooms[component] for part in read):
                return False
        return self.entering is not None and all(copies is not None for copies in self.repeating.values())

    @cached_property
    def entering(self) -> list[Copy] | None:
        """The copies of a request in which each phase runs once."""
        once = replace(self.trace, program=tuple((name, 1) for name, _ in self.program))
        return self._copies(once.order, self._lent())

    @cached_property
    def repeating(self) -> Mapping[str, list[Copy] | None]:
        """The copies of an iteration that follows another one of its component."""
        found: dict[str, list[Copy] | None] = {}
        for name in {phase.name for phase in self.phases if phase.times > 1}:
            found[name] = self._copies(self.trace.calls_of[name], [])
        return found

    @cached_property
    def part_of(self) -> Mapping[str, Mapping[str, int]]:
        """For each component: the part in which its calls read each weight."""
        found: dict[str, dict[str, int]] = {}
        for component in self.trace.calls_of:
            found[component] = {}
            for own in (None, component):
                for index, part in enumerate(self.parts):
                    if part.component == own:
                        found[component] |= dict.fromkeys(part.weights, index)
        return found

    def _copies(self, calls: Sequence[Call], lent: Sequence[Seat]) -> list[Copy] | None:
        """The copies of a cycle of these calls. What is lent is a seat, too, which nothing is copied to."""
        readers: dict[int, list[int]] = defaultdict(list)
        for place, call in enumerate(calls):
            part_of = self.part_of[call.component]
            for index in {part_of[weight] for weight in call.reads if weight in part_of}:
                readers[index].append(place)
        which = sorted(readers)  # of two copies for one call, the part that comes first is copied first
        seats = [Seat(self.parts[i].offset, self.parts[i].nbytes, visits_of(readers[i])) for i in which]
        small = int(self.latencies * self.machine.latency_seconds * self.machine.h2d_bytes_per_second)
        copies = copies_of([*seats, *lent], len(calls), small)
        if copies is None:
            return None
        return [copy._replace(seat=which[copy.seat]) for copy in copies if copy.seat < len(which)]

    @cached_property
    def arena_bytes(self) -> int:
        """Where the last part ends."""
        return max(part.stop for part in self.parts)

    def _lent(self) -> list[Seat]:
        """The end of the arena, for each component whose activations need it."""
        arena, visits = self.arena_bytes, dict[str, list[tuple[int, int]]]()
        for phase in self.phases:
            if self.rooms[phase.name] < arena:
                visits.setdefault(phase.name, []).append((phase.begin, phase.begin + phase.units - 1))
        return [Seat(self.rooms[name], arena - self.rooms[name], tuple(when)) for name, when in visits.items()]

    @cached_property
    def score(self) -> float:
        """What a request is worth, the less the better: its seconds as measured, and with other links."""
        return score(self.seconds(1.0), {link: self.seconds(link) for link in ERRORS})

    def seconds(self, link: float) -> float:
        """How long a request takes that follows others, with a link so many times as fast."""
        costs = {call.name: call.cost(self.machine) for call in self.trace.calls}
        seconds = {name: [costs[call.name] for call in calls] for name, calls in self.trace.calls_of.items()}
        run = _Run(self.machine.h2d_bytes_per_second * link, self.machine.latency_seconds, self.units)
        entering = run.waiting(self.entering or (), self.units)
        repeating = {name: run.waiting(copies or (), len(seconds[name])) for name, copies in self.repeating.items()}
        took = 0.0
        for _ in range(_REQUESTS):
            begun, before = run.end, took
            run.next_request()
            for name, times, begin, units in self.phases:
                run.enter(seconds[name], entering[begin : begin + units], begin)
                run.repeat(seconds[name], repeating.get(name, ()), begin, times - 1)
            took = run.end - begun
            if abs(took - before) <= _SAME * took:
                break
        return took

    def to_schedule(self, problem: Problem) -> Schedule:
        """The schedule of the shortened program."""
        short = problem.trace.program
        trace = replace(self.trace, program=short)
        readers, bundles, names = trace.readers, dict[str, tuple[str, ...]](), list[str]()
        copies = self.entering or []
        streams = {copy.seat for copy in chain(copies, *(found or () for found in self.repeating.values()))}
        for index, part in enumerate(self.parts):
            first = min(readers[weight][0] for weight in part.weights)
            name = trace.order[first].name if index in streams else f"{trace.order[first].name}:stays"
            names.append(unique(name, bundles))
            bundles[names[-1]] = part.weights
        sizes = [span_bytes(part.weights, trace) for part in self.parts]
        places, steady = self._places(short, copies), list[Task]()
        behind: dict[int, list[Task]] = defaultdict(list)
        count = len(trace.order)
        for next_request in (False, True):
            for copy, place in places:
                if (place < 0) == next_request:
                    stop = min(copy.stop, sizes[copy.seat])  # no copy goes beyond the last weight of its bundle
                    whole = (copy.start, stop) == (0, sizes[copy.seat])
                    name = names[copy.seat]
                    behind[place % count].append(Task("h2d", name) if whole else Task("h2d", name, copy.start, stop))
        for index, call in enumerate(trace.order):
            steady += [Task("compute", call.name), *behind[index]]
        return Schedule(
            bundles=bundles,
            residents=frozenset(name for index, name in enumerate(names) if index not in streams),
            steady=tuple(steady),
            offsets=dict(zip(names, map(attrgetter("offset"), self.parts), strict=True)),
            fills_gaps=True,
            trace=trace,
            components={name: of.component for name, of in zip(names, self.parts, strict=True) if of.component},
            lent_bytes=max(0, self.arena_bytes - problem.capacity),
        )

    def _places(self, short: Program, entering: Sequence[Copy]) -> list[tuple[Copy, int]]:
        """Each copy of a shortened request, and the call behind which it is issued; negative: of the request before."""
        last, first, count = dict[int, int](), list[int](), 0  # by unit: its place in the last iteration, in the first
        for phase, (_, times) in zip(self.phases, short, strict=True):
            for unit in range(phase.units):
                first.append(count + unit)
                last[phase.begin + unit] = count + (times - 1) * phase.units + unit
            count += times * phase.units
        found: list[tuple[Copy, int]] = []
        waiting: dict[int, list[Copy]] = defaultdict(list)
        for copy in entering:
            waiting[copy.due].append(copy)
        for phase, (_, times) in zip(self.phases, short, strict=True):
            for unit in range(phase.begin, phase.begin + phase.units):
                for copy in waiting[unit]:
                    if copy.after >= phase.begin:
                        after = first[copy.after]
                    else:
                        after = last[copy.after % self.units] - (count if copy.after < 0 else 0)
                    found.append((copy, after))
            for iteration in range(1, times):
                begin = first[phase.begin] + iteration * phase.units
                found += [(copy, begin + copy.after) for copy in self.repeating[phase.name] or ()]
        latest = max((place for _, place in found), default=-1)
        in_turn = list(accumulate((place for _, place in found), max, initial=latest - count))[1:]
        return [(copy, place) for (copy, _), place in zip(found, in_turn, strict=True)]


class _Run:
    """Requests on plain numbers: when the link is free, when the last unit ended, and when each unit ended last."""

    def __init__(self, rate: float, latency: float, units: int) -> None:
        self._rate, self._latency, self._units = rate, latency, units
        self._ends = [0.0] * (2 * units)  # of the request before, then of this one
        self._link = self.end = 0.0

    def waiting(self, copies: Iterable[Copy], units: int) -> list[list[tuple[float, int]]]:
        """The copies by the unit that waits for them; `after` counts from the beginning of the cycle before."""
        found: list[list[tuple[float, int]]] = [[] for _ in range(units)]
        for _, start, stop, due, after in copies:
            found[due].append((self._latency + (stop - start) / self._rate, after + units))
        return found

    def next_request(self) -> None:
        """What was this request is the one before."""
        self._ends[: self._units] = self._ends[self._units :]

    def enter(self, seconds: Sequence[float], waiting: Waiting, begin: int) -> None:
        """The first iteration of a phase, whose first unit has this number."""
        self._iterate(seconds, waiting, self._ends, begin + self._units)

    def repeat(self, seconds: Sequence[float], waiting: Waiting, begin: int, times: int) -> None:
        """More iterations of the phase. Once they take the same time, the rest is not run but added."""
        units, first = len(seconds), self._units + begin
        ends = self._ends[first : first + units] * 2
        before, ahead = 0.0, 0.0
        while times:
            begun = self.end
            ends[:units] = ends[units:]
            self._iterate(seconds, waiting, ends, units)
            times -= 1
            took, now = self.end - begun, self._link - self.end
            if abs(took - before) + abs(now - ahead) <= _SAME * took and times > 1:
                skipped = took * (times - 1)
                ends = [end + skipped for end in ends]
                self._link, self.end, times = self._link + skipped, self.end + skipped, 1
            before, ahead = took, now
        self._ends[first : first + units] = ends[units:]

    def _iterate(self, seconds: Sequence[float], waiting: Waiting, ends: list[float], first: int) -> None:
        link, end = self._link, self.end
        for unit, lasts in enumerate(seconds):
            copies = waiting[unit]
            for copying, after in copies:
                free = ends[after]
                link = (link if link > free else free) + copying
            if copies and link > end:
                end = link
            end += lasts
            ends[first + unit] = end
        self._link, self.end = link, end
