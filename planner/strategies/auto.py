"""auto: the best plan that is found for the budget, near the bound that no schedule beats. The default.

A fixed part of the weights stays. The rest streams through a ring of bytes: each copy starts as soon as the bytes that
it overwrites have been read. The first weights of the next cycle are copied during this one:

    h2d      [-c-][---e---][-a-][---b---][-c-][---e---]      d stays; a, b, c and e share the ring
    compute     [-a-][-b-][--c--][-d-][--e--][-a-][-b-]

The search begins with whole blocks as units. Where more can be gained, it goes on with blocks cut finer, which need
less room. The parts in `planner.auto`: `fluid` (what can stream, and how much of each unit), `draft` (seats, copies and
how fast), `spills` (activations that leave).

`auto` is never slower than the strategies it replaces. Where a plan stays above the bound, `improve` tries them too.
They are seldom faster. If one is, its tasks become the plan of `auto`, so no user needs to try them by hand.

The search tries candidates of a fluid, rounded to whole items, for smaller and smaller items, and for a little less
than the true capacity. The best draft so far spares it all candidates that could not beat it. Everything else is
bounded by counts. Nothing looks at a clock, so a plan is the same every time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import product
from math import inf
from typing import Any

from taskgraph_offload.nouns.machine import Machine
from taskgraph_offload.nouns.progress import report
from taskgraph_offload.nouns.trace import Trace
from taskgraph_offload.plan.plan import Plan

from ..auto import program
from ..auto.draft import ERRORS, Draft, Drafter, score, to_schedule
from ..auto.fluid import Candidate, Chosen, Streamable, candidates, cut_finer, patterns, roundings, take_stock
from ..auto.spills import choose, cut_for_spills, findable, lowest_peak, peak_with, with_spills
from ..bound import Cycle, bound, steady_pace
from . import Infeasible, Problem, Request, Schedule, arena_bytes, layerwise, resident, sequential

DEFAULT = True

_CUTS = (4, 16, 64)  # a call is cut where a part reads the largest call's bytes divided by this
_MOST_UNITS = 800
_FINER_MUST_GAIN = 0.002  # of the step: more units mean more hooks and more events
_CLOSE = 1.002  # times the bound: no rival could do noticeably better
RIVALS: tuple[tuple[str, Mapping[str, Any]], ...] = (
    ("keep", {}),
    *(("layerwise", options) for options in layerwise.VARIANTS),
    ("layerwise", {"residents": "spread", "prefetch": 2}),
)


def schedule(problem: Problem) -> Schedule:
    """Keep everything if it fits; else stream; where that does not fit, let activations leave too."""
    if problem.program:
        return _of_program(problem)
    whole = _drafter(problem, problem.trace)
    if whole.stock.nbytes <= problem.capacity:
        return resident.schedule(problem)
    try:
        return _streaming(problem, whole)
    except Infeasible as infeasible:
        return _spilling(problem, infeasible.arena_bytes)


def improve(plan: Plan, rival_plan: Callable[[str, Mapping[str, Any]], Plan | None]) -> Plan:
    """The plan; or, if it is above the bound, a rival that is faster and has a better score, called `auto` too."""
    best, least = plan, inf
    if plan.settled_seconds <= plan.bound.step_seconds * _CLOSE:
        return plan
    for strategy, options in RIVALS:
        rival = rival_plan(strategy, options)
        if rival is not None and _link_seconds(rival) < best.settled_seconds > rival.settled_seconds:
            least = min(least, _score(best))
            if (its := _score(rival)) < least:
                best, least = rival, its
    return best if best is plan else replace(best, strategy=plan.strategy, options=plan.options, bound=plan.bound)


def step_with(request: Request, budget_bytes: int, plan: Plan) -> float:
    """The step under another budget, guessed from the bound, since planning takes seconds.

    Where compute is the bound, the guess is the bound. Elsewhere it is as far above the bound as this plan is.
    """
    step = bound(request.trace, budget_bytes - request.margin_bytes, request.machine).step_seconds
    if step > sum(call.cost(request.machine) for call in request.trace.order) * (1 + 1e-9):
        step *= plan.settled_seconds / plan.bound.step_seconds
    return step


def _link_seconds(plan: Plan) -> float:
    """How long the link takes for a step: no step is shorter."""
    return plan.streamed_bytes / plan.machine.h2d_bytes_per_second


def _score(plan: Plan) -> float:
    if plan.trace.program:  # predicting many requests takes long
        return plan.settled_seconds
    others = {link: plan.predict(plan.settled, _with_link(plan.machine, link)).step_seconds for link in ERRORS}
    return score(plan.settled_seconds, others)


def _with_link(machine: Machine, times: float) -> Machine:
    return replace(machine, h2d_bytes_per_second=machine.h2d_bytes_per_second * times)


def _of_program(problem: Problem) -> Schedule:
    """Keep everything if it fits; else the phases share the arena, each with the best draft for it alone."""
    if problem.bytes_of(problem.bundles) <= problem.capacity:
        return resident.schedule(problem)
    found = program.schedule(problem, lambda phase: _best_draft(phase, _drafter(phase, phase.trace)))
    return found or _one_after_another(problem)


def _streaming(problem: Problem, whole: Drafter) -> Schedule:
    """Stream, or where no ring is large enough, copy each part just before it is needed."""
    best = _best_draft(problem, whole)
    return to_schedule(best) if best is not None else _one_after_another(problem)


def _best_draft(problem: Problem, whole: Drafter) -> Draft | None:
    """Search at whole blocks, then at finer units."""
    if _drafter(problem, cut_finer(problem.trace, 0)).stock.largest_unit_bytes > problem.capacity:
        return None
    best: Draft | None = None
    for drafter in (whole, *_finer(problem, whole)):
        if best is None or _may_gain(drafter, best):
            best = _better(best, search(drafter, drafter.everything_streams()))
    return best


def _spilling(problem: Problem, needed: int) -> Schedule:
    """Stream through the smallest possible arena; activations leave until it fits."""
    trace, peak = cut_for_spills(problem.trace, needed), problem.trace.activation_bytes
    movable, cut = findable(trace, problem.trace), replace(problem, trace=trace)
    needed = arena_bytes(sequential.schedule(cut), cut.trace)
    spills = choose(trace, movable, peak + problem.capacity - needed)
    if spills is None:
        raise Infeasible(needed, peak - lowest_peak(trace, movable))
    found = _at(replace(cut, capacity=needed))
    steady = with_spills(found.steady, trace, spills)
    return replace(found, steady=steady, trace=trace, freed_bytes=peak - peak_with(trace, spills))


def _at(problem: Problem) -> Schedule:
    """The best schedule for these units, without a finer cut."""
    drafter = _drafter(problem, problem.trace)
    best = search(drafter, drafter.everything_streams())
    return to_schedule(best) if best is not None else _without_gates(sequential.schedule(problem))


def _may_gain(drafter: Drafter, best: Draft) -> bool:
    """Whether a search with these units is worth its time: they are few enough, and their best pace is faster."""
    return len(drafter.stock.seconds) <= _MOST_UNITS and pace_of(drafter) < best.step_seconds * (1 - _FINER_MUST_GAIN)


def _better(best: Draft | None, finer: Draft | None) -> Draft | None:
    if best is None or finer is None:
        return best or finer
    return finer if finer.score < best.score * (1 - _FINER_MUST_GAIN) else best


def _finer(problem: Problem, whole: Drafter) -> Iterator[Drafter]:
    """The same problem with smaller and smaller units; at last every piece is a unit."""
    largest, before = whole.stock.largest_unit_bytes, len(problem.trace.calls)
    for least_bytes in (*map(largest.__floordiv__, _CUTS), 0):
        trace = cut_finer(problem.trace, least_bytes)
        if before < len(trace.calls):
            before = len(trace.calls)
            yield _drafter(problem, trace)


def _drafter(problem: Problem, trace: Trace) -> Drafter:
    seconds = tuple(call.cost(problem.machine) for call in trace.calls)
    return Drafter(take_stock(trace, seconds), problem.capacity, problem.machine)


def _one_after_another(problem: Problem) -> Schedule:
    """The schedule that needs the least memory: every piece is a unit, and its weights are copied just before it."""
    finest = replace(problem, trace=cut_finer(problem.trace, 0))
    found = sequential.schedule(finest)
    needed = arena_bytes(found, finest.trace)
    if needed > problem.capacity:
        raise Infeasible(needed)
    return replace(_without_gates(found), trace=finest.trace)


def _without_gates(schedule: Schedule) -> Schedule:
    return replace(schedule, steady=tuple(replace(task, after=None) for task in schedule.steady))


_SET_ASIDE = (0.0, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0)  # of the capacity, in usual items: what the ring may waste
_MOST_LIMITS = 7  # to an item's bytes
_ENOUGH = 1.02  # times what is missing: less than that cannot stream through any ring
_MOST_DRAFTS = 8  # for one limit and one share that is set aside
_LEAST_DRAFTS = 12
_LINKS = {1.0: 0.4, 1.1: 0.4, 1.7: 0.2, 0.6: 0.1}  # rates of the link, and the part of the drafts made for each
_EFFORT = 22_000  # units and items in all drafts together
_MANY_LATENCIES = 0.01  # of the pace: then streaming few units wholly may be better than all a little


def search(drafter: Drafter, best: Draft | None = None) -> Draft | None:
    """The best draft that is found, or the one to beat."""
    drafts = max(_LEAST_DRAFTS, _EFFORT // (len(drafter.stock.seconds) + len(drafter.stock.items)))
    rivals = _Search(drafter, best)
    for link, part in _LINKS.items():
        rivals.try_drafts(link, int(drafts * part))
    rivals.try_patterns()
    return rivals.best


def pace_of(drafter: Drafter) -> float:
    """Seconds of a step that no draft beats, where no two units share an item."""
    stock = drafter.stock
    cycle = Cycle(stock.seconds, stock.everything.nbytes.tolist(), [drafter.capacity] * len(stock.seconds))
    return steady_pace(cycle, drafter.machine.h2d_bytes_per_second).seconds


class _Search:
    """The best draft so far, and which choices were tried already: none of those can be better."""

    def __init__(self, drafter: Drafter, best: Draft | None) -> None:
        self.best = best
        self._drafter, self._stock = drafter, drafter.stock
        self._missing = self._stock.nbytes - drafter.capacity
        self._tried = set[Chosen]()

    def try_drafts(self, link: float, most: int) -> None:
        """Try candidates, `most` of them at most, that would be good with a link `link` times as fast."""
        tried = 0
        for streamable, share in product(self._smaller_and_smaller_items(), _SET_ASIDE):
            if tried == most:
                break
            for candidate in self._candidates(streamable, share, link)[:_MOST_DRAFTS]:
                if tried < most and (self.best is None or candidate.pace < self.best.seconds(link)):
                    self._try(candidate)
                    tried += 1
                    report("drafts", tried, most)
        report("drafts", most, most)

    def _smaller_and_smaller_items(self) -> Iterator[Streamable]:
        """What may stream: everything, then only items smaller than before, as long as that is enough.

        A ring is at least as large as its largest item, so where small items are enough, large ones should stay. What
        distant units share is copied more than once, so it stays where the rest is enough.
        """
        stock = self._stock
        if stock.up_to(stock.nbytes).nbytes.sum() < self._missing * _ENOUGH:
            yield stock.everything
        enough = stock.limits_that_leave(self._missing * _ENOUGH)
        if enough:
            smaller = (enough[-1] / enough[0]) ** (1 / _MOST_LIMITS)
            limit = float(enough[0])
            for nbytes in enough:
                if nbytes <= limit:
                    yield stock.up_to(nbytes)
                    limit = nbytes * smaller

    def _candidates(self, streamable: Streamable, share: float, link: float) -> list[Candidate]:
        """The candidates when a share of a usual item is set aside."""
        usual = max(float(streamable.nbytes.sum()) / streamable.count, self._missing / len(streamable.items))
        most = inf if self.best is None else self.best.seconds(link)
        rate = link * self._drafter.machine.h2d_bytes_per_second
        return candidates(streamable, self._stock.seconds, rate, self._missing + share * usual, usual, most)

    def _try(self, candidate: Candidate) -> None:
        """Draft all choices of a candidate, and keep what is better than the best."""
        latencies = self._drafter.machine.latency_seconds * len(candidate.streamable.items)
        for streaming in roundings(candidate, by_units=latencies > _MANY_LATENCIES * candidate.pace):
            self._try_choice(streaming)

    def try_patterns(self) -> None:
        """Try what is good where all units are alike."""
        for streaming in patterns(self._stock, self._missing):
            self._try_choice(streaming)

    def _try_choice(self, streaming: Chosen) -> None:
        if streaming not in self._tried:
            self._tried.add(streaming)
            draft = self._drafter.draft(streaming, inf if self.best is None else self.best.score)
            if draft is not None and (self.best is None or draft.score < self.best.score):
                self.best = draft
