"""The time that no schedule beats, for a trace, a budget and a machine; and the budget from which nothing stalls.

Each trace has two bounds: one for its calls as units (whole blocks stream) and one for its pieces, the finest cut.
Weights that always stay take room and never stream. A weight that several units read counts once in each window. The
latency of copies is left out. No plan is needed.

Just before a unit ends, the device holds at most `room` bytes of weights, the unit's own weights among them. When a
later unit starts, everything that the units from the first to that one read has been on the device. What did not fit
was copied in between:

    compute   --[--- i ---]-----[ i+1 ]---- ... ----[ j-1 ]--[--- j ---]--
                          |<------ bytes of i..j beyond the room ----->|     at the link's rate

    start of j  >=  end of i  +  link * (bytes that i..j read, each weight once  -  room while i computes)

for every window of no more than one cycle, besides one unit after the other.

A steady cycle takes at best the largest mean of a circuit through all these constraints between starts:

    unit 0 ---> unit 1 ---> unit 2 ---> unit 3 ---> (unit 0 of the next cycle)      one unit after the other
       \\__________________________________/^                                        windows that bytes must pass

A circuit that goes once round the cycle and adds up to 3 seconds makes every cycle last 3 seconds. One that goes round
twice and adds up to 7 seconds makes it 3.5.

An activation is idle while it only waits: it was made, it is still needed, and no unit touches it.

    units      0    1    2    3    4    5    6    7
    ~x         made           used      used      dead
    idle            [1, 3)         [4,5)     [6,7)

An activation can be away only while it is idle. So a unit needs at least its peak without all idle activations, and the
bound takes that.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from math import inf
from operator import add, attrgetter, neg
from typing import NamedTuple

from taskgraph_offload.nouns.machine import Machine
from taskgraph_offload.nouns.program import places_in_short, shortened
from taskgraph_offload.nouns.trace import INPUT, Activation, Call, Trace
from taskgraph_offload.plan.plan import Bound

_TOLERANCE = 1e-10
_PATIENCE = 16  # rounds that only move starts: paths can go round many cycles, and matter no more
_FEW_ROUNDS = 2  # of these where a good policy is known


def bound(trace: Trace, budget_bytes: int, machine: Machine) -> Bound:
    """Seconds that no schedule beats, for a steady and for the cold cycle.

    >>> trace = Trace.from_units([{"name": name, "seconds": 1e-3, "tensors": [2**30]} for name in "abcd"])
    >>> round(bound(trace, 2 * 2**30, Machine.preset("rtx4090")).step_seconds, 3)
    0.116
    """
    step, cold = _seconds(trace, budget_bytes, machine)
    fine = piece_by_piece(trace)
    if len(fine.calls) == len(trace.calls):
        return Bound(step, cold, step, cold)
    return Bound(*_seconds(fine, budget_bytes, machine), step, cold)


def _seconds(trace: Trace, budget_bytes: int, machine: Machine) -> tuple[float, float]:
    """A steady and a cold cycle of these calls."""
    rate, cycle = machine.h2d_bytes_per_second, _cycle(trace, budget_bytes, machine)
    short = shortened(trace)
    if short.program == trace.program:
        return steady_pace(cycle, rate).seconds, _cold_seconds(cycle, rate)
    policy = steady_pace(_cycle(short, budget_bytes, machine), rate).policy
    return _pace_from(cycle, rate, _lengthened(policy, short, trace, cycle), _FEW_ROUNDS).seconds, _cold_seconds(
        cycle, rate
    )


def smallest_budget_without_stall(trace: Trace, machine: Machine) -> int:
    """The smallest budget with which copies never delay a step, at the finest cut, with no activation away.

    >>> trace = Trace.from_units([{"name": name, "seconds": 1.0, "tensors": [2**30]} for name in "abcd"])
    >>> smallest_budget_without_stall(trace, Machine.preset("rtx4090")) == 2 * 2**30
    True
    """
    fine = piece_by_piece(trace)
    cycle, transients = _cycle(fine, 0, machine), list(map(attrgetter("transient_bytes"), fine.order))
    room = _room_without_stall(cycle, machine.h2d_bytes_per_second, transients)
    return max(0, int(-(-room // 1))) + sum(cycle.fixed)


def piece_by_piece(trace: Trace) -> Trace:
    """The same trace with every piece as a call of its own."""
    calls: list[Call] = []
    for call in trace.calls:
        for index, piece in enumerate(call.pieces):
            calls.append(Call(f"{call.name}/{index}", call.block, (piece,), call.component))
    return replace(trace, calls=tuple(calls))


def _cycle(trace: Trace, budget_bytes: int, machine: Machine) -> Cycle:
    """The calls as numbers. Fixed weights are subtracted from the budget; reads of the same weight are matched."""
    order, count = trace.order, len(trace.order)
    least = dict(zip(map(attrgetter("name"), trace.calls), least_transients(trace), strict=True))
    last = {name: readers[-1] - count for name, readers in trace.readers.items()}
    repeats: dict[int, dict[int, int]] = {}
    seconds, sizes, fixed = list[float](), [0] * count, [0] * count
    costs = {call.name: call.cost(machine) for call in trace.calls}
    for index, call in enumerate(order):
        seconds.append(costs[call.name])
        for name in call.reads:
            nbytes, ago = trace.weights[name].nbytes, index - last[name]
            if name not in trace.fixed:
                sizes[index] += nbytes
                if ago < count:
                    again = repeats.setdefault(index, {})
                    again[ago] = again.get(ago, 0) + nbytes
            elif last[name] < 0:
                fixed[index] += nbytes
            last[name] = index
    left = budget_bytes - sum(fixed)
    gaps = {index: list(again.items()) for index, again in repeats.items()}
    return Cycle(seconds, sizes, [left - least[call.name] for call in order], gaps, fixed)


def idle_spans(activation: Activation, call_of_piece: Sequence[int]) -> Iterator[tuple[int, int]]:
    """The calls [first, stop) during which an activation is idle.

    >>> list(idle_spans(Activation("x", 4, producer=0, uses=(3,), until=5), range(6)))
    [(1, 3), (4, 5)]
    """
    made = INPUT if activation.producer == INPUT else call_of_piece[activation.producer]
    touched = sorted({made, *map(call_of_piece.__getitem__, activation.uses)})
    dead = call_of_piece[activation.until - 1] + 1
    for before, after in pairwise([*touched, dead]):
        if before + 1 < after:
            yield before + 1, after


def least_transients(trace: Trace) -> list[int]:
    """For each call: its peak of activations when all idle ones are away."""
    first = first_pieces(trace)
    changes = [0] * (first[-1] + 1)
    for activation in trace.activations:
        for start, stop in idle_spans(activation, trace.call_of_piece):
            changes[first[start]] += activation.nbytes
            changes[max(first[start], min(first[stop], activation.until))] -= activation.nbytes
    waiting = accumulate(changes)
    least = [0] * len(trace.calls)
    for index, call in enumerate(trace.calls):
        for piece in call.pieces:
            least[index] = max(least[index], piece.transient_bytes - next(waiting))
    return least


def first_pieces(trace: Trace) -> list[int]:
    """For each call: its first piece; at last, the number of pieces."""
    return list(accumulate(map(len, map(attrgetter("pieces"), trace.calls)), initial=0))


class Cycle:
    """Units in the order in which they compute: seconds, bytes read, and the room for weights while each computes.

    `repeats` says which of a unit's bytes were read before: (how many units ago, bytes). All else was last read by the
    same unit a cycle ago. `fixed` are bytes that come with a unit in the first cycle and stay.

    `own` are the bytes of each unit that no other unit read within the last cycle. `total` are the bytes of a whole
    cycle, each once: the gaps between reads of the same bytes add up to a cycle.
    """

    def __init__(
        self,
        seconds: Sequence[float],
        nbytes: Sequence[float],
        room: Sequence[float],
        repeats: Mapping[int, Sequence[tuple[int, int]]] | None = None,
        fixed: Sequence[int] = (),
    ) -> None:
        self.seconds, self.nbytes, self.room = seconds, nbytes, room
        self.repeats, self.fixed = repeats or {}, fixed
        self.own, again = list(nbytes), 0
        for unit, many in self.repeats.items():
            for gap, repeated in many:
                self.own[unit] -= repeated
                again += repeated * gap
        self.total = sum(self.own) + again / len(seconds)


class Windows:
    """The best window that ends at each unit in turn: a sliding maximum over the windows' first units.

    A first unit that begins earlier and gives less than a later one never wins again, so the values in the queue fall:

        first units     3       5       6     7    <- the next one drops those before it that give no more
        values         9.1  >  7.0  >  6.5 > 2.2
    """

    def __init__(self, cycle: Cycle, rate: float) -> None:
        self._cycle, self._rate, self._count = cycle, rate, len(cycle.seconds)
        self._queue: deque[list[float]] = deque()  # [value, first unit]
        self._copied = 0.0  # seconds

    def latest(self, unit: int) -> tuple[float, int]:
        """The earliest start that the windows ending at this unit allow, and the first unit of the one that decides."""
        k, queue = unit % self._count, self._queue
        while queue and queue[0][1] <= unit - self._count:
            queue.popleft()
        for gap, nbytes in self._cycle.repeats.get(k, ()):
            self._raise_after(unit - gap, nbytes / self._rate)
        self._copied += self._cycle.own[k] / self._rate
        return (self._copied + queue[0][0], int(queue[0][1])) if queue else (0.0, unit - 1)

    def begin(self, unit: int, end: float) -> None:
        """Add the windows that begin with this unit."""
        k, queue = unit % self._count, self._queue
        value = end + (self._cycle.nbytes[k] - self._cycle.room[k]) / self._rate - self._copied
        while queue and queue[-1][0] <= value:
            queue.pop()
        queue.append([value, unit])

    def _raise_after(self, unit: int, seconds: float) -> None:
        """Bytes last read by `unit` are new to the windows that begin after it."""
        later = [entry for entry in self._queue if entry[1] > unit]
        for entry in later:
            entry[0] += seconds
        while later and len(self._queue) > len(later) and self._queue[-len(later) - 1][0] <= later[0][0]:
            del self._queue[-len(later) - 1]


def _cold_seconds(cycle: Cycle, rate: float) -> float:
    """The shortest first cycle, which starts with an empty device."""
    windows, end, arrived = Windows(cycle, rate), 0.0, 0.0
    for k, seconds in enumerate(cycle.seconds):
        new = cycle.nbytes[k] + cycle.fixed[k]
        for gap, nbytes in cycle.repeats.get(k, ()):
            new -= nbytes if gap <= k else 0
        arrived += new / rate
        start, _ = windows.latest(k)
        end = max(end, start, arrived) + seconds
        windows.begin(k, end)
    return end


def _room_without_stall(cycle: Cycle, rate: float, more: Sequence[int]) -> float:
    """The smallest room with which no copy delays a compute. `more`: bytes that each unit needs in addition."""
    ends = list(accumulate(cycle.seconds))
    windows, count = Windows(Cycle(cycle.seconds, cycle.nbytes, list(map(neg, more)), cycle.repeats), rate), len(ends)
    most: float = max(map(add, cycle.nbytes, more))
    for unit in range(2 * count):
        end = ends[unit % count] + unit // count * ends[-1]
        late, _ = windows.latest(unit)
        if unit:
            most = max(most, (late - (end - cycle.seconds[unit % count])) * rate)
        windows.begin(unit, end)
    return most


class _Edge(NamedTuple):
    """A unit starts so many seconds after another one does; after that of the cycle before, if `origin` is negative."""

    origin: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Pace:
    """The seconds of a steady cycle, starts of its units that keep all constraints, and the one that decides each."""

    seconds: float
    starts: tuple[float, ...]
    policy: tuple[_Edge, ...]


def steady_pace(cycle: Cycle, rate: float) -> Pace:
    """The largest mean of a circuit of constraints, by policy iteration: every round is O(units), and few are needed.

    A policy says for each unit which constraint decides its start. Following it back ends in a circuit, whose mean is
    a pace that no schedule beats; starts at that pace show which units another constraint would delay.
    """
    return _pace_from(cycle, rate, _first_policy(cycle, rate), _PATIENCE)


def _pace_from(cycle: Cycle, rate: float, edges: list[_Edge], most: int) -> Pace:
    """The pace from some policy on. Each round's is a bound; `most` rounds in a row may gain nothing."""
    pace, patience = _follow(cycle, edges), most
    while patience:
        changed = False
        for k, (start, edge) in enumerate(_deciding(cycle, rate, pace)):
            if start > pace.starts[k] + _TOLERANCE * pace.seconds:
                edges[k], changed = edge, True
        if not changed:
            break
        slower = _follow(cycle, edges)
        patience = patience - 1 if slower.seconds <= pace.seconds * (1 + _TOLERANCE) else most
        pace = slower
    return pace


def _lengthened(policy: Sequence[_Edge], short: Trace, trace: Trace, cycle: Cycle) -> list[_Edge]:
    """The policy of a shortened program for the whole one: each constraint as many units apart.

    It holds there if it is over the same units. Where it is not, the unit waits for the one before it.
    """
    names, few = list(map(attrgetter("name"), trace.order)), list(map(attrgetter("name"), short.order))
    count, edges = len(names), list[_Edge]()
    for unit, place in enumerate(places_in_short(trace, short)):
        origin, seconds = policy[place]
        apart = place - origin
        same = apart < len(few) and all(names[(unit - i) % count] == few[place - i] for i in range(1, apart + 1))
        edges.append(_Edge(unit - apart, seconds) if same else _Edge(unit - 1, cycle.seconds[unit - 1]))
    return edges


def _first_policy(cycle: Cycle, rate: float) -> list[_Edge]:
    """Each unit after the unit before it, or each at the end of the window of all units: the slower of the two."""
    count = len(cycle.seconds)
    chained: list[_Edge] = []
    longest: list[_Edge] = []
    for unit in range(count):
        first = (unit + 1) % count
        chained.append(_Edge(unit - 1, cycle.seconds[unit - 1]))
        longest.append(_Edge(unit + 1 - count, cycle.seconds[first] + (cycle.total - cycle.room[first]) / rate))
    return longest if count > 1 and _slowest_circuit(longest)[0] > _slowest_circuit(chained)[0] else chained


def _deciding(cycle: Cycle, rate: float, pace: Pace) -> Iterator[tuple[float, _Edge]]:
    """For each unit: the earliest start that those before it allow, and the constraint that decides it."""
    windows, count = Windows(cycle, rate), len(cycle.seconds)
    starts = [start - pace.seconds for start in pace.starts] + list(pace.starts)
    for unit in range(2 * count):
        late, origin = windows.latest(unit)
        if unit >= count:
            chained = starts[unit - 1] + cycle.seconds[unit - count - 1]
            if late <= chained:
                late, origin = chained, unit - 1
            yield late, _Edge(origin - count, late - starts[origin])
            starts[unit] = max(starts[unit], late)
        windows.begin(unit, starts[unit] + cycle.seconds[unit % count])


def _follow(cycle: Cycle, edges: list[_Edge]) -> Pace:
    """The pace of a policy's slowest circuit, and its starts. A unit that leads elsewhere is chained instead."""
    count = len(edges)
    seconds, root = _slowest_circuit(edges)
    starts: dict[int, float] = {root: 0.0}
    for first in (*range(root + 1, count), *range(root)):
        path: dict[int, None] = {}  # from the unit back to one whose start is known, or to where the path meets itself
        unit = first
        while unit not in starts and unit not in path:
            path[unit] = None
            unit = edges[unit].origin % count
        if path and unit not in starts:
            edges[first], path = _Edge(first - 1, cycle.seconds[first - 1]), {first: None}
        for unit in reversed(path):
            origin, after = edges[unit]
            starts[unit] = starts[origin % count] + after - (seconds if origin < 0 else 0.0)
    return Pace(seconds, tuple(map(starts.__getitem__, range(count))), tuple(edges))


def _slowest_circuit(edges: Sequence[_Edge]) -> tuple[float, int]:
    """The slowest circuit of a policy: its mean seconds for one cycle, and one of its units."""
    count = len(edges)
    slowest = (-inf, 0)
    reached_from = [-1] * count
    for first in range(count):
        path: list[int] = []
        unit = first
        while reached_from[unit] < 0:
            reached_from[unit] = first
            path.append(unit)
            unit = edges[unit].origin % count
        if path and reached_from[unit] == first:
            seconds, turns = 0.0, 0
            for k in path[path.index(unit) :]:
                seconds += edges[k].seconds
                turns += edges[k].origin < 0
            slowest = max(slowest, (seconds / turns, unit))
    return slowest
