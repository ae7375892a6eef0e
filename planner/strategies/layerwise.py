"""layerwise: every block streams, and its copy is issued a few blocks ahead. Some blocks may stay.

This is the layerwise offload of vLLM-Omni, FastVideo and SGLang, the async offload of TeleFuser and the group offload
of diffusers; it wraps: the last blocks of a step prefetch the first ones of the next.

    h2d      [--b--][--c--]       [--d--]      (prefetch=1: a block's copy is issued when the block before it starts,
    compute         [----b----][----c----]      and at most two blocks are there at a time)

`ratio` is the share of blocks that stream, as TeleFuser's offload_ratio; without it and with `residents` given, as
many blocks stay as fit beside `prefetch + 1` buffers of the largest block that streams. `residents` says which:
"leading" ones (vLLM-Omni, TeleFuser), where a copy is issued when the block `prefetch` before it starts; or "spread"
evenly (SGLang's stride, RamTorch's pin, vLLM's groups), where it is issued when a buffer is free.

Two details cost a little. Real systems have them, so they are here too:
- a weight has one seat: if the number of blocks is no multiple of the number of buffers, the first copies of a step
  wait one block longer;
- weights that several blocks share stay.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

from taskgraph_offload.nouns.graph import Task

from . import Infeasible, Problem, Range, Schedule, arena_bytes

Residents = Literal["leading", "spread"]

VARIANTS = ({"residents": "leading"}, {"residents": "spread"})


def schedule(
    problem: Problem,
    *,
    prefetch: Annotated[int, Range(0)] = 1,
    ratio: Annotated[float, Range(0, 1)] | None = None,
    residents: Residents | None = None,
) -> Schedule:
    """Stream blocks, with copies `prefetch` blocks ahead. `ratio` or the budget decides how many stay."""
    own = _own_bundles(problem)
    blocks, names = list(own), [call.name for call in problem.trace.order]
    distinct = list(dict.fromkeys(names[block] for block in blocks))  # in a program, blocks come again
    smallest: list[int] = []
    for count in _counts(len(distinct), ratio, residents):
        kept = {distinct[i] for i in choose(range(len(distinct)), count, residents or "leading")}
        streaming = [block for block in blocks if names[block] not in kept]
        if residents and ratio is None and count and not _fits(problem, own, streaming, prefetch):
            continue
        gates = _gates(blocks, streaming, prefetch, len(problem.computes), residents)
        for wraps in (True, False):
            candidate = _order(problem, own, dict(zip(streaming, gates, strict=True)), wraps)
            needed = arena_bytes(candidate, problem.trace)
            if needed <= problem.capacity:
                return candidate
            smallest.append(needed)
    raise Infeasible(min(smallest))


def _own_bundles(problem: Problem) -> dict[int, list[str]]:
    """The blocks that can stream: for each call of the cycle with bundles that no other call reads, those bundles."""
    own: dict[int, list[str]] = {}
    trace = problem.trace
    for index, needs in enumerate(problem.needs):
        for name in needs:
            readers = trace.readers[problem.bundles[name][0]]
            if len({trace.order[reader].name for reader in readers}) == 1:
                own.setdefault(index, []).append(name)
    return own


def choose(blocks: Sequence[int], count: int, residents: Residents) -> set[int]:
    """The blocks that stay: the first `count`, or all but as many evenly spread ones that stream.

    >>> sorted(choose(range(8), 3, "spread"))
    [0, 2, 5]
    """
    if residents == "leading":
        return set(blocks[:count])
    total, streaming = len(blocks), len(blocks) - count
    return {block for i, block in enumerate(blocks) if (i + 1) * streaming // total == i * streaming // total}


def _counts(total: int, ratio: float | None, residents: Residents | None) -> Sequence[int]:
    """How many blocks may stay, the best first."""
    if ratio is not None:
        return [int(total * (1 - ratio) + 1e-9)]
    return range(total, -1, -1) if residents else [0]


def _fits(problem: Problem, own: Mapping[int, list[str]], streaming: Sequence[int], prefetch: int) -> bool:
    """Whether what stays fits beside `prefetch + 1` buffers of the largest block that streams."""
    streamed = [problem.bytes_of(own[index]) for index in streaming]
    leaving = problem.bytes_of(dict.fromkeys(name for index in streaming for name in own[index]))
    buffers = min(prefetch + 1, len(streaming)) * max(streamed, default=0)
    return sum(problem.sizes.values()) - leaving + buffers <= problem.capacity


def _gates(
    blocks: Sequence[int], streaming: Sequence[int], prefetch: int, calls: int, residents: Residents | None
) -> list[int]:
    """For each streaming block: the call after which its copy is issued, its gate; negative: of the cycle before.

    For "spread", it is the last call that used the same buffer: the streaming block `prefetch + 1` earlier. Otherwise,
    it is the call just before the block `prefetch` earlier.
    """
    spread = residents == "spread"
    order = streaming if spread else blocks
    ahead = min(prefetch + 1, len(order)) if spread else min(prefetch, len(order) - 1)
    chosen, gates = set(streaming), list[int]()
    for position, block in enumerate(order):
        if block in chosen:
            gate = order[position - ahead] if spread else order[position - ahead] - 1
            gates.append(gate - calls if position < ahead else gate)
    return gates


def _order(problem: Problem, own: Mapping[int, list[str]], gates: Mapping[int, int], wraps: bool) -> Schedule:
    """Place each copy after the call it waits for; `wraps` prefetches the first blocks of the next step.

    `gates` has the gate of each block that streams. A negative gate is a call of the cycle before. With `wraps`, that
    copy stands behind the same call of this cycle, for the next one; else it stands before the first call.
    """
    computes, count = problem.computes, len(problem.computes)
    behind: dict[int, list[Task]] = {}
    staying = set(problem.bundles)
    for index, gate in gates.items():
        if gate < 0:
            gate = gate + count if wraps and gate + count > index else -1
        for name in own[index]:
            behind.setdefault(gate, []).append(Task("h2d", name, after=computes[gate].name))
        staying.difference_update(own[index])
    steady = list(behind.get(-1, ()))
    for index, compute in enumerate(computes):
        steady += [compute, *behind.get(index, ())]
    return Schedule(problem.bundles, frozenset(staying), tuple(steady))
