"""Cuts a trace finer: a call becomes several, each a run of its pieces that reads enough bytes to be worth a copy.

    call      blocks.3 [ norm | q | k | v | out | norm | up   | down ]       pieces
    finer     blocks.3/0 [ norm  q  k  v ]  /1 [ out  norm  up ]  /2 [ down ]

Finer units need less room: what the first part has read can be overwritten while the second one computes. Only cuts:
no weight, no piece and no cost changes.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import replace

from taskgraph_offload.nouns.trace import Call, Piece, Trace


def cut_finer(trace: Trace, least_bytes: int, whole: Container[str] = ()) -> Trace:
    """The same trace, each call cut wherever a run of pieces reads `least_bytes` or more that can stream.

    The calls named by `whole` stay as they are.

    >>> unit = {"name": "a", "seconds": 1.0, "tensors": [4, 4, 4], "tensor_seconds": [1, 1, 2]}
    >>> [call.name for call in cut_finer(Trace.from_units([unit]), 8).calls]
    ['a/0', 'a/1']
    """
    parts = ((call,) if call.name in whole else _parts(trace, call, least_bytes) for call in trace.calls)
    return replace(trace, calls=tuple(part for some in parts for part in some))


def _parts(trace: Trace, call: Call, least_bytes: int) -> Iterator[Call]:
    runs = list(_runs(trace, call, least_bytes))
    if len(runs) == 1:
        yield call
        return
    for index, run in enumerate(runs):
        yield replace(call, name=f"{call.name}/{index}", pieces=tuple(run))


def _runs(trace: Trace, call: Call, least_bytes: int) -> Iterator[list[Piece]]:
    run: list[Piece] = []
    reads: set[str] = set()
    for index, piece in enumerate(call.pieces):
        run.append(piece)
        reads |= {name for name in (*piece.reads, *piece.writes) if name not in trace.fixed}
        following = call.pieces[index + 1 :]
        if sum(trace.weights[name].nbytes for name in reads) >= least_bytes and any(p.reads for p in following):
            yield run
            run, reads = [], set()
    if run:
        yield run
