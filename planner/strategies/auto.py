"""auto: the best plan that is found for the budget, near the bound that no schedule beats. The default.

A fixed part of the weights stays and the rest streams through a ring of bytes, copied as soon as the bytes it
overwrites have been read, the next cycle's first weights already during this one:

    h2d      [-c-][---e---][-a-][---b---][-c-][---e---]      d stays; a, b, c and e share the ring
    compute     [-a-][-b-][--c--][-d-][--e--][-a-][-b-]

First with whole blocks as units; then, if that leaves anything to gain, with blocks cut finer, which need less room.
The parts: `items` (what can stream), `search` (who streams), `ring` (where), `copies` (when), `rehearse` (how fast).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from taskgraph_offload.nouns.trace import Trace

from ..auto.draft import Desk, Draft
from ..auto.items import take_stock
from ..auto.search import pace_of, search
from ..auto.serial import to_schedule
from ..auto.spills import choose, cut_for_spills, findable, lowest_peak, peak_with, with_spills
from ..auto.units import cut_finer
from ..problem import Problem
from ..schedule import Infeasible, Schedule
from . import resident, sequential

_CUTS = (4, 16, 64)  # a call is cut where a run of pieces reads the largest call's bytes divided by this
_MOST_UNITS = 800
_FINER_MUST_GAIN = 0.002  # of the step: more units mean more hooks and more events


def schedule(problem: Problem) -> Schedule:
    """Keep everything if it fits; else stream; where that does not fit, let activations leave too."""
    if _desk(problem, problem.trace).stock.nbytes <= problem.capacity:
        return resident.schedule(problem)
    try:
        return _streaming(problem)
    except Infeasible as infeasible:
        return _spilling(problem, infeasible.arena_bytes)


def _streaming(problem: Problem) -> Schedule:
    """Search at whole blocks, then at finer units."""
    whole = _desk(problem, problem.trace)
    if _desk(problem, cut_finer(problem.trace, 0)).stock.largest_unit_bytes > problem.capacity:
        return _one_after_another(problem)
    best: Draft | None = None
    for desk in (whole, *_finer(problem, whole)):
        if best is None or _may_gain(desk, best):
            best = _better(best, search(desk, desk.everything_streams()))
    return to_schedule(best) if best is not None else _one_after_another(problem)


def _spilling(problem: Problem, needed: int) -> Schedule:
    """Stream in no more bytes than it takes; of the activations, as much leaves as these bytes need."""
    trace, peak = cut_for_spills(problem.trace, needed), problem.trace.activation_bytes
    movable, cut = findable(trace, problem.trace), replace(problem, trace=trace)
    needed = cut.arena_bytes(sequential.schedule(cut))
    spills = choose(trace, movable, peak + problem.capacity - needed)
    if spills is None:
        raise Infeasible(needed, peak - lowest_peak(trace, movable))
    found = _at(replace(cut, capacity=needed))
    steady = with_spills(found.steady, trace, spills)
    return replace(found, steady=steady, trace=trace, freed_bytes=peak - peak_with(trace, spills))


def _at(problem: Problem) -> Schedule:
    """The best for these units and no others."""
    desk = _desk(problem, problem.trace)
    best = search(desk, desk.everything_streams())
    return to_schedule(best) if best is not None else _without_gates(sequential.schedule(problem))


def _may_gain(desk: Desk, best: Draft) -> bool:
    """Whether these units are few enough, and could be faster if all went well."""
    return len(desk.stock.seconds) <= _MOST_UNITS and pace_of(desk) < best.step_seconds * (1 - _FINER_MUST_GAIN)


def _better(best: Draft | None, finer: Draft | None) -> Draft | None:
    if best is None or finer is None:
        return best or finer
    return finer if finer.score < best.score * (1 - _FINER_MUST_GAIN) else best


def _finer(problem: Problem, whole: Desk) -> Iterator[Desk]:
    """The same problem in more and more, smaller and smaller units; at last every piece is one."""
    largest, before = whole.stock.largest_unit_bytes, len(problem.trace.calls)
    for least_bytes in (*(largest // parts for parts in _CUTS), 0):
        trace = cut_finer(problem.trace, least_bytes)
        if before < len(trace.calls):
            before = len(trace.calls)
            yield _desk(problem, trace)


def _desk(problem: Problem, trace: Trace) -> Desk:
    seconds = tuple(call.cost(problem.machine) for call in trace.calls)
    return Desk(take_stock(trace, seconds), problem.capacity, problem.machine)


def _one_after_another(problem: Problem) -> Schedule:
    """What needs the least: every piece is a unit, and its weights come when it is their turn."""
    finest = replace(problem, trace=cut_finer(problem.trace, 0))
    found = sequential.schedule(finest)
    needed = finest.arena_bytes(found)
    if needed > problem.capacity:
        raise Infeasible(needed)
    return replace(_without_gates(found), trace=finest.trace)


def _without_gates(schedule: Schedule) -> Schedule:
    return replace(schedule, steady=tuple(replace(task, after=None) for task in schedule.steady))
