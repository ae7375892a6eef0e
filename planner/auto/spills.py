r"""Chooses activations that leave the device and come back, so that the weights of each call fit beside the rest.

    activations        ____                  ____
    peak         ~~~~~/~~~~\~~~~~~~~~~~~~~~~/~~~~\~~~~     what must be reached: calls above it are high
                 ____/      \______________/      \___
    ~x       made | - idle - - - - - - - - - - - - - - | used
                  d2h [------- gone --------------] h2d

A call is high if its peak is above what must be reached. An activation leaves after the call that touched it last. It
is gone when the first high call of its idle span begins, and returns after the last high call. Only activations that
the executor can find may leave: at the end of a block it knows all living storages, in the middle of a block it does
not.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from taskgraph_offload.nouns.graph import ACTIVATION, Task
from taskgraph_offload.nouns.trace import INPUT, Activation, Trace
from taskgraph_offload.plan.plan import aligned

from ..bound import first_pieces, idle_spans
from .fluid import cut_finer


@dataclass(frozen=True, slots=True)
class Spill:
    """An activation leaves after the call `behind`, and is gone during the calls [first, stop)."""

    activation: Activation
    behind: int
    first: int
    stop: int
    returns: bool


def cut_for_spills(trace: Trace, most_bytes: int) -> Trace:
    """The finest cut; but a call that makes activations inside stays whole if it reads at most `most_bytes`."""
    where, first = trace.call_of_piece, first_pieces(trace)
    whole = set()
    for activation in trace.activations:
        call = where[activation.producer] if activation.producer != INPUT else -1
        if call >= 0 and activation.producer + 1 != first[call + 1]:
            reads = (name for name in trace.calls[call].reads if name not in trace.fixed)
            if sum(aligned(trace.weights[name].nbytes) for name in reads) <= most_bytes:
                whole.add(trace.calls[call].name)
    return cut_finer(trace, 0, whole)


def findable(trace: Trace, blocks: Trace) -> list[Activation]:
    """The activations that are made at the end of a whole block. `blocks`: the trace before it was cut."""
    ends = {*first_pieces(blocks)} & {*first_pieces(trace)}
    stops = first_pieces(trace)[1:]
    made = (a for a in trace.activations if a.producer != INPUT)
    return [activation for activation in made if stops[trace.call_of_piece[activation.producer]] in ends]


def lowest_peak(trace: Trace, movable: Sequence[Activation]) -> int:
    """The peak of activations if all of these leave whenever they can."""
    return max(_loads(trace, _possible(trace, movable, range(len(trace.calls)))))


def choose(trace: Trace, movable: Sequence[Activation], peak: int) -> list[Spill] | None:
    """Spills that bring the peak down to `peak`, or None. Each step takes the largest one at the highest piece."""
    where, first, loads = trace.call_of_piece, first_pieces(trace), _loads(trace, ())
    high = sorted({where[piece] for piece, nbytes in enumerate(loads) if nbytes > peak})
    candidates, chosen = list(_possible(trace, movable, high)), list[Spill]()
    while (most := max(loads)) > peak:
        piece = loads.index(most)
        useful = [s for s in candidates if s.first <= where[piece] < s.stop and piece < s.activation.until]
        if not useful:
            return None
        chosen.append(max(useful, key=lambda spill: spill.activation.nbytes))
        candidates.remove(chosen[-1])
        _relieve(loads, chosen[-1], first)
    return chosen


def peak_with(trace: Trace, spills: Iterable[Spill]) -> int:
    """The peak of activations with these spills."""
    return max(_loads(trace, spills))


def with_spills(steady: Sequence[Task], trace: Trace, spills: Iterable[Spill]) -> tuple[Task, ...]:
    """The tasks of a cycle, with the copies of the spills right behind their calls."""
    behind: dict[str, list[Task]] = {}
    names = [call.name for call in trace.calls]
    for spill in spills:
        name, last = ACTIVATION + spill.activation.name, names[spill.stop - 1]
        behind.setdefault(names[spill.behind], []).append(Task("d2h", name, before=names[spill.first]))
        if spill.returns:
            behind.setdefault(last, []).append(Task("h2d", name, after=last))
    return tuple(t for task in steady for t in (task, *(behind.get(task.name, ()) if task.kind == "compute" else ())))


def _possible(trace: Trace, movable: Iterable[Activation], high: Sequence[int]) -> Iterator[Spill]:
    """A spill for each idle span of an activation that holds high calls."""
    where = trace.call_of_piece
    for activation in movable:
        for start, stop in idle_spans(activation, where):
            inside = [call for call in high if start <= call < stop]
            if inside:
                used_again = any(where[piece] >= stop for piece in activation.uses) or activation.until == len(where)
                yield Spill(activation, start - 1, inside[0], inside[-1] + 1, used_again)


def _loads(trace: Trace, spills: Iterable[Spill]) -> list[int]:
    """For each piece: its peak of activations, without those that are away."""
    loads = [piece.transient_bytes for call in trace.calls for piece in call.pieces]
    first = first_pieces(trace)
    for spill in spills:
        _relieve(loads, spill, first)
    return loads


def _relieve(loads: list[int], spill: Spill, first: Sequence[int]) -> None:
    """Subtract an activation from the pieces during which it is away. `first`: the first piece of each call."""
    for piece in range(first[spill.first], min(first[spill.stop], spill.activation.until)):
        loads[piece] -= spill.activation.nbytes
