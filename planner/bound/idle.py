"""When an activation only waits: it has been made, it is not dead, and no unit touches it.

    units      0    1    2    3    4    5    6    7
    ~x         made           used      used      dead
    idle            [1, 3)         [4,5)     [6,7)

Only then can it be away, so what a unit needs besides weights is at least its peak without all that only waits. A unit
is a run of pieces: a piece, a call. This module decides nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise

from taskgraph_offload.nouns.trace import INPUT, Activation, Trace


def idle_spans(activation: Activation, unit_of_piece: Sequence[int]) -> Iterator[tuple[int, int]]:
    """The units [first, stop) through which an activation only waits.

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
    """For each unit: its peak of activations when all that only waits is away."""
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
