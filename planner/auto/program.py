"""Ways to seat a program: several models that take turns in one arena.

What each phase reads has its seats, and the seats of different phases overlap:

    bytes         [------- ring -------)[---------- what stays of the transformer ----------)
    clip, t5      [ every layer in turn )
    transformer   [ blocks in turn -----)[ blocks 3, 7, 11 ... ------------------------------)
    vae           [ every layer in turn )[............................[ its activations ....)

A model that runs once passes through the ring, and what stays of the model that repeats is never copied again. A
larger ring can hold more of the next phase ahead of time, but overlaps what stays, which must then come again.
Activations that are larger in one phase than in others have the end of the arena for that time.

All of this is tried, and timed with `Request`. Nothing here decides how one model streams: `search` does.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain, groupby
from operator import attrgetter

from taskgraph_offload.nouns.machine import Machine
from taskgraph_offload.nouns.trace import Trace
from taskgraph_offload.plan.plan import ALIGNMENT

from ..strategies import Problem, Schedule
from .draft import WORTH_A_COPY, Draft, ring
from .fluid import Item, Stock, cut_finer, take_stock
from .request import Part, Request

_CUTS = (4, 16, 64)  # what runs once is cut where a part reads the largest call's bytes divided by this
_RINGS = (0.25, 0.5, 1.0)  # of the room, for what runs once
_WIDER = (1.0, 1.5, 2.0, 3.0)  # times the ring of a model: the ring of another one with the same weights

Search = Callable[[Problem], Draft | None]
Layout = tuple[Trace, list[Part]]  # the trace as it is cut, and a seat for everything


def schedule(problem: Problem, search: Search) -> Schedule | None:
    """The best schedule that is found for a program; `search` finds the best draft for one model alone."""
    best: Request | None = None
    rooms = {name: problem.room_for(name) // ALIGNMENT * ALIGNMENT for name in problem.trace.calls_of}
    for trace, parts in _Layouts(problem, search):
        for latencies in WORTH_A_COPY:
            request = Request(trace, problem.program, problem.machine, tuple(parts), rooms, latencies)
            if request.works and (best is None or request.score < best.score):
                best = request
    return None if best is None else best.to_schedule(problem)


class _Layouts:
    """Ways to seat all weights of a program. Models that share weights are a group; one of them decides for it."""

    def __init__(self, problem: Problem, search: Search) -> None:
        self._problem, self._search, self._trace = problem, search, problem.trace
        self._times: dict[str, int] = defaultdict(int)
        for name, times in problem.program:
            self._times[name] += times
        self._groups = self._grouped()
        self._drafts: dict[tuple[str, int], Draft | None] = {}

    def __iter__(self) -> Iterator[Layout]:
        """Each way: the trace as it is cut, and its parts."""
        repeated = [group for group in self._groups if self._times[group[0]] > 1]
        sizes = [self._stock(group).nbytes for group in repeated]
        for count in range(len(repeated), -1, -1):
            staying, others = repeated[:count], [group for group in self._groups if group not in repeated[:count]]
            ceiling = min(map(self._room, chain.from_iterable(staying)), default=self._room(self._groups[0][0]))
            for most in sorted({ceiling, min(ceiling, self._problem.capacity // ALIGNMENT * ALIGNMENT)}):
                room = most - sum(sizes[:count])
                top = list(_stacked([self._stock(group) for group in staying], room))
                if room < 0:
                    continue
                if count == len(repeated):
                    yield from self._passing(self._trace, others, room, top)
                    yield from self._apart(others, room, top)
                    continue
                for alone in {1, len(repeated) - count}:
                    yield from self._together(others[:alone], others[alone:], room, top)

    def _together(
        self, own: Sequence[Sequence[str]], passing: Sequence[Sequence[str]], room: int, top: list[Part]
    ) -> Iterator[Layout]:
        """The first groups have rings and residents of their own in the same bytes; the others pass through a ring."""
        for wider in _WIDER if any(len(group) > 1 for group in own) else _WIDER[:1]:
            trace, parts = self._trace, list(top)
            for group in own:
                found = self._own(group, room, wider)
                if found is None:
                    return
                cut, more = found
                trace = _with_calls(trace, cut)
                parts += more
            yield from self._passing(trace, passing, room, parts)

    def _own(self, group: Sequence[str], room: int, wider: float) -> tuple[list[Trace], list[Part]] | None:
        """The best seats for a group alone, and its models as they are cut for them.

        The rings of the others in the group are `wider` times as large as the one of the first.
        """
        lead = self._alone(group[0])
        stock = self._stock(group)
        if stock.nbytes <= room:
            return [self._alone(name) for name in group], list(_stacked([stock], room - stock.nbytes))
        room = min(room, self._room(group[0]))
        key = group[0], room
        if key not in self._drafts:
            self._drafts[key] = self._search(replace(self._problem, trace=lead, capacity=room, program=()))
        draft = self._drafts[key]
        if draft is None:
            return None
        cuts = [draft.stock.trace, *(_cut_alike(self._alone(name), lead, draft.stock.trace) for name in group[1:])]
        passing = max((seat.offset + seat.nbytes for seat in draft.seats), default=0)
        shared = int(passing * max(_WIDER)) if len(group) > 1 else 0
        parts = list(_parts_of(draft, shared, self._problem.capacity, room))
        for name, cut in zip(group[1:], cuts[1:], strict=True):
            if wider > 1 or any(part.stop > self._room(name) for part in parts):
                parts += self._ring_for(cut, parts, int(passing * wider))
        return cuts, parts

    def _ring_for(self, trace: Trace, parts: Sequence[Part], passing: int) -> Iterator[Part]:
        """Seats for a model that shares its weights with another one, but has less room or another pace.

        Through its ring passes what does so for the other one, what has seats there, and what it cannot reach.
        """
        component = trace.calls[0].component
        room = self._room(component)
        reached = set(chain.from_iterable(p.weights for p in parts if p.offset >= passing and p.stop <= room))
        stock = _stock_of(trace, reached, self._problem.machine)
        nbytes = min(room, max(passing, stock.largest_unit_bytes))
        for part in _seated(ring(stock.everything.items, stock.sizes, nbytes) or (), stock):
            yield part._replace(component=component)

    def _passing(
        self, trace: Trace, groups: Sequence[Sequence[str]], room: int, seated: list[Part]
    ) -> Iterator[Layout]:
        """All that is not seated passes through a ring: a few sizes of it."""
        done = set(chain.from_iterable(part.weights for part in seated))
        names = [name for name in self._trace.calls_of if any(name in group for group in groups)]
        names += [name for name in self._trace.calls_of if name not in names and self._has_more(name, done)]
        once = replace(trace, calls=tuple(chain.from_iterable(trace.calls_of[name] for name in names)), program=())
        if not once.calls:
            yield trace, seated
            return
        whole = _stock_of(once, done, self._problem.machine)
        for divisor in (0, *_CUTS, once.weight_bytes):
            cut = cut_finer(once, whole.largest_unit_bytes // divisor) if divisor else once
            stock = _stock_of(cut, done, self._problem.machine)
            if stock.largest_unit_bytes * 2 <= room:
                break
        if not stock.items or stock.largest_unit_bytes > room:
            return
        room = min(room, *map(self._room, names))
        for nbytes in sorted({min(room, 2 * stock.largest_unit_bytes), *(int(room * share) for share in _RINGS)}):
            placed = ring(stock.everything.items, stock.sizes, nbytes)
            if placed is not None:
                yield _with_calls(trace, [cut]), [*seated, *_seated(placed, stock)]

    def _apart(self, groups: Sequence[Sequence[str]], room: int, seated: list[Part]) -> Iterator[Layout]:
        """What runs once is a model of its own, between long calls that need nothing."""
        names = set(chain.from_iterable(groups))
        calls = []
        for name, times in self._problem.program:
            for call in self._trace.calls_of[name]:
                seconds = call.cost(self._problem.machine) * times
                pieces = tuple(
                    replace(piece, reads=(), writes=(), seconds=seconds / len(call.pieces)) for piece in call.pieces
                )
                calls.append(call if name in names else replace(call, pieces=pieces))
        if not names or len(set(map(attrgetter("name"), calls))) < len(calls):
            return
        room = min(room, *map(self._room, names))
        between = replace(self._trace, calls=tuple(calls), program=())
        draft = self._search(replace(self._problem, trace=between, capacity=room, program=()))
        if draft is not None:
            mine = [call for call in draft.stock.trace.calls if call.component in names]
            cut = replace(draft.stock.trace, calls=tuple(mine))
            yield _with_calls(self._trace, [cut]), [*seated, *_parts_of(draft, 0, room, room)]

    def _grouped(self) -> list[list[str]]:
        """Components that share weights, the one that runs most often first; groups that run most often first."""
        groups: list[tuple[set[str], list[str]]] = []
        for name, calls in self._trace.calls_of.items():
            weights = set(chain.from_iterable(call.reads for call in calls)) - set(self._trace.fixed)
            names = [name]
            for other in [group for group in groups if group[0] & weights]:
                groups.remove(other)
                weights, names = weights | other[0], other[1] + names
            groups.append((weights, names))
        ranked = [sorted(names, key=lambda name: -self._times[name]) for _, names in groups]
        return sorted(ranked, key=lambda names: (-self._times[names[0]], -self._stock(names).nbytes))

    def _room(self, name: str) -> int:
        return self._problem.room_for(name) // ALIGNMENT * ALIGNMENT

    def _alone(self, name: str) -> Trace:
        return replace(self._trace, calls=self._trace.calls_of[name], program=())

    def _stock(self, group: Sequence[str]) -> Stock:
        return _stock_of(self._alone(group[0]), set(), self._problem.machine)

    def _has_more(self, name: str, done: set[str]) -> bool:
        read = set(chain.from_iterable(call.reads for call in self._trace.calls_of[name]))
        return not done.isdisjoint(read) and not read <= done | set(self._trace.fixed)


def _stock_of(trace: Trace, without: set[str], machine: Machine) -> Stock:
    """The items of a trace, except some weights."""
    fixed = {**trace.fixed, **dict.fromkeys(without, "has its seat")}
    return take_stock(replace(trace, fixed=fixed), tuple(call.cost(machine) for call in trace.calls))


def _stacked(stocks: Iterable[Stock], bottom: int) -> Iterator[Part]:
    """All items of some stocks above each other; those that are read last are lowest."""
    for stock in stocks:
        for item in sorted(stock.items, key=lambda item: -item.visits[0][0]):
            yield Part(item.weights, bottom, item.nbytes)
            bottom += item.nbytes


def _parts_of(draft: Draft, first: int, reach: int, room: int) -> Iterator[Part]:
    """The seats of a draft, and what stays above them, as high as there is room.

    Others use bytes before `first` and beyond `reach`.
    """
    items = draft.stock.items
    for chosen, seat in zip(draft.bundles, draft.seats, strict=True):
        yield Part(tuple(chain.from_iterable(items[i].weights for i in chosen)), seat.offset, seat.nbytes)
    streaming = set(chain.from_iterable(draft.bundles))
    staying = [item for i, item in enumerate(items) if i not in streaming]
    yield from _standing(staying, first, reach, room)


def _standing(staying: Sequence[Item], first: int, reach: int, room: int) -> Iterator[Part]:
    """What stays, in the highest bytes: where others are, the smallest items; elsewhere those of a unit together."""
    top, rest = room, sorted(staying, key=attrgetter("nbytes"))
    bottom = room - sum(item.nbytes for item in staying)
    while rest and top > reach:
        top -= rest[0].nbytes
        yield Part(rest[0].weights, top, rest.pop(0).nbytes)
    while rest and bottom < first:
        yield Part(rest[0].weights, bottom, rest[0].nbytes)
        bottom += rest.pop(0).nbytes
    for _, items in groupby(sorted(rest, key=attrgetter("visits")), attrgetter("visits")):
        together = list(items)
        top -= (nbytes := sum(item.nbytes for item in together))
        yield Part(tuple(chain.from_iterable(item.weights for item in together)), top, nbytes)


def _seated(placed: Sequence[tuple[int, Sequence[int]]], stock: Stock) -> Iterator[Part]:
    """The parts of a ring."""
    for offset, chosen in placed:
        for _, neighbours in groupby(chosen, stock.visits.__getitem__):
            items = [stock.items[index] for index in neighbours]
            nbytes = sum(item.nbytes for item in items)
            yield Part(tuple(chain.from_iterable(item.weights for item in items)), offset, nbytes)
            offset += nbytes


def _with_calls(trace: Trace, cuts: Sequence[Trace]) -> Trace:
    """The trace with the calls of some components as they are cut."""
    calls = dict(trace.calls_of)
    for cut in cuts:
        calls |= cut.calls_of
    return replace(trace, calls=tuple(chain.from_iterable(calls.values())))


def _cut_alike(trace: Trace, lead: Trace, cut: Trace) -> Trace:
    """A trace cut as finely as another one was."""
    if len(cut.calls) == len(lead.calls):
        return trace
    largest = max(sum(lead.weights[name].nbytes for name in call.reads) for call in lead.calls)
    for least in (*map(largest.__floordiv__, _CUTS), 0):
        if len(cut_finer(lead, least).calls) == len(cut.calls):
            return cut_finer(trace, least)
    return cut_finer(trace, 0)
