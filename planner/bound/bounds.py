"""The time that no schedule beats, for a trace, a budget and a machine; and the budget from which nothing stalls.

Each trace has two bounds: one for its calls as units (whole blocks stream) and one for its pieces, the finest cut.
Weights that always stay take room and never stream. A weight that several units read counts once in each window. The
latency of copies is left out. Only reads numbers off a trace: the argument is in `windows`.

An activation is idle while it only waits: it was made, it is still needed, and no unit touches it.

    units      0    1    2    3    4    5    6    7
    ~x         made           used      used      dead
    idle            [1, 3)         [4,5)     [6,7)

An activation can be away only while it is idle. So a unit needs at least its peak without all idle activations, and the
bound takes that.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise

from taskgraph_offload.nouns.machine import Machine
from taskgraph_offload.nouns.trace import INPUT, Activation, Trace
from taskgraph_offload.plan.plan import Bound

from .windows import Cycle, cold_seconds, room_without_stall, steady_pace

Units = Sequence[tuple[tuple[str, ...], float, int]]  # of each unit: what it reads, its seconds, its transient bytes


def bound(trace: Trace, budget_bytes: int, machine: Machine) -> Bound:
    """Seconds that no schedule beats, for a steady and for the cold cycle.

    >>> trace = Trace.from_units([{"name": name, "seconds": 1e-3, "tensors": [2**30]} for name in "abcd"])
    >>> round(bound(trace, 2 * 2**30, Machine.preset("rtx4090")).step_seconds, 3)
    0.116
    """
    rate = machine.h2d_bytes_per_second
    fine, blocks = (_pieces(trace, machine), _calls(trace, machine))
    return Bound(
        step_seconds=_steady(trace, fine, budget_bytes, rate),
        cold_seconds=_cold(trace, fine, budget_bytes, rate),
        block_step_seconds=_steady(trace, blocks, budget_bytes, rate),
        block_cold_seconds=_cold(trace, blocks, budget_bytes, rate),
    )


def smallest_budget_without_stall(trace: Trace, machine: Machine) -> int:
    """The smallest budget with which copies never delay a step, at the finest cut, with no activation away.

    >>> trace = Trace.from_units([{"name": name, "seconds": 1.0, "tensors": [2**30]} for name in "abcd"])
    >>> smallest_budget_without_stall(trace, Machine.preset("rtx4090")) == 2 * 2**30
    True
    """
    transients = [piece.transient_bytes for call in trace.calls for piece in call.pieces]
    cycle = _cycle(trace, _pieces(trace, machine), 0)
    room = room_without_stall(cycle, machine.h2d_bytes_per_second, transients)
    return max(0, int(-(-room // 1))) + _fixed_bytes(trace)


def _steady(trace: Trace, units: Units, budget_bytes: int, rate: float) -> float:
    return steady_pace(_cycle(trace, units, budget_bytes), rate).seconds


def _cold(trace: Trace, units: Units, budget_bytes: int, rate: float) -> float:
    seen: set[str] = set()
    fixed = []
    for reads, _, _ in units:
        new = {name for name in reads if name in trace.fixed} - seen
        seen |= new
        fixed.append(float(sum(trace.weights[name].nbytes for name in new)))
    return cold_seconds(_cycle(trace, units, budget_bytes), rate, fixed)


def _cycle(trace: Trace, units: Units, budget_bytes: int) -> Cycle:
    """The units as numbers. Fixed weights are subtracted from the budget; reads of the same weight are matched."""
    budget = budget_bytes - _fixed_bytes(trace)
    last: dict[str, int] = {}
    for index, (reads, _, _) in enumerate(units):
        last.update((name, index - len(units)) for name in reads)
    repeats: dict[int, list[tuple[int, float]]] = {}
    sizes = []
    for index, (reads, _, _) in enumerate(units):
        moving = [(name, float(trace.weights[name].nbytes)) for name in reads if name not in trace.fixed]
        sizes.append(sum(nbytes for _, nbytes in moving))
        for name, nbytes in moving:
            if index - last[name] < len(units):
                repeats.setdefault(index, []).append((index - last[name], nbytes))
            last[name] = index
    return Cycle([unit[1] for unit in units], sizes, [float(budget - unit[2]) for unit in units], repeats)


def _fixed_bytes(trace: Trace) -> int:
    return sum(trace.weights[name].nbytes for name in trace.fixed if name in trace.readers)


def _calls(trace: Trace, machine: Machine) -> Units:
    transients = least_transients(trace, trace.call_of_piece)
    return [(call.reads, call.cost(machine), least) for call, least in zip(trace.calls, transients, strict=True)]


def _pieces(trace: Trace, machine: Machine) -> Units:
    pieces = [piece for call in trace.calls for piece in call.pieces]
    transients = least_transients(trace, range(len(pieces)))
    reads = (tuple(dict.fromkeys((*piece.reads, *piece.writes))) for piece in pieces)
    return [(names, p.cost(machine), least) for names, p, least in zip(reads, pieces, transients, strict=True)]


def idle_spans(activation: Activation, unit_of_piece: Sequence[int]) -> Iterator[tuple[int, int]]:
    """The units [first, stop) during which an activation is idle.

    >>> list(idle_spans(Activation("x", 4, producer=0, uses=(3,), until=5), range(6)))
    [(1, 3), (4, 5)]
    """
    made = INPUT if activation.producer == INPUT else unit_of_piece[activation.producer]
    touched = sorted({made, *(unit_of_piece[piece] for piece in activation.uses)})
    dead = unit_of_piece[activation.until - 1] + 1
    for before, after in pairwise([*touched, dead]):
        if before + 1 < after:
            yield before + 1, after


def least_transients(trace: Trace, unit_of_piece: Sequence[int]) -> list[int]:
    """For each unit: its peak of activations when all idle ones are away."""
    pieces = [piece for call in trace.calls for piece in call.pieces]
    first = first_pieces(unit_of_piece)
    changes = [0] * (len(pieces) + 1)
    for activation in trace.activations:
        for start, stop in idle_spans(activation, unit_of_piece):
            changes[first[start]] += activation.nbytes
            changes[max(first[start], min(first[stop], activation.until))] -= activation.nbytes
    least = [0] * (len(first) - 1)
    for unit, piece, waiting in zip(unit_of_piece, pieces, accumulate(changes), strict=False):
        least[unit] = max(least[unit], piece.transient_bytes - waiting)
    return least


def first_pieces(unit_of_piece: Sequence[int]) -> list[int]:
    """For each unit: its first piece; at last, the number of pieces."""
    found: list[int] = []
    for piece, unit in enumerate(unit_of_piece):
        if unit == len(found):
            found.append(piece)
    return [*found, len(unit_of_piece)]
