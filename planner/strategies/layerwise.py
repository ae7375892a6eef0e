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

from collections.abc import Sequence
from typing import Annotated, Literal

from taskgraph_offload.nouns.graph import Task

from ..seats import arena_bytes
from ..strategy import Infeasible, Problem, Range, Schedule

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
    blocks = [index for index in range(len(problem.needs)) if _streamed_by(problem, index)]
    smallest: list[int] = []
    for count in _counts(len(blocks), ratio, residents):
        staying = choose(blocks, count, residents or "leading")
        streaming = [index for index in blocks if index not in staying]
        if residents and ratio is None and count and not _fits(problem, streaming, prefetch):
            continue
        gates = _when_a_buffer_is_free if residents == "spread" else _when_an_earlier_block_starts
        for wraps in (True, False):
            candidate = _order(problem, streaming, gates(blocks, streaming, prefetch, len(problem.computes)), wraps)
            needed = arena_bytes(candidate, problem.trace)
            if needed <= problem.capacity:
                return candidate
            smallest.append(needed)
    raise Infeasible(min(smallest))


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


def _fits(problem: Problem, streaming: Sequence[int], prefetch: int) -> bool:
    """Whether what stays fits beside `prefetch + 1` buffers of the largest block that streams."""
    streamed = {name for index in streaming for name in _streamed_by(problem, index)}
    buffer = max((problem.bytes_of(_streamed_by(problem, index)) for index in streaming), default=0)
    buffers = min(prefetch + 1, len(streaming))
    return problem.bytes_of(set(problem.bundles) - streamed) + buffers * buffer <= problem.capacity


def _streamed_by(problem: Problem, index: int) -> list[str]:
    """The bundles that only this call reads."""
    return [name for name in problem.needs[index] if len(problem.bundle_readers[name]) == 1]


def _when_an_earlier_block_starts(
    blocks: Sequence[int], streaming: Sequence[int], prefetch: int, calls: int
) -> list[int]:
    """For each streaming block: the call after which its copy is issued; negative for a call of the cycle before."""
    total, position = len(blocks), {block: i for i, block in enumerate(blocks)}
    earlier = [position[block] - min(prefetch, total - 1) for block in streaming]
    return [blocks[i % total] - 1 - (calls if i < 0 else 0) for i in earlier]


def _when_a_buffer_is_free(blocks: Sequence[int], streaming: Sequence[int], prefetch: int, calls: int) -> list[int]:
    """The same, after the call that last used the buffer: the streaming block `prefetch + 1` earlier."""
    total = len(streaming)
    earlier = [i - min(prefetch + 1, total) for i in range(total)]
    return [streaming[i % total] - (calls if i < 0 else 0) for i in earlier]


def _order(problem: Problem, streaming: Sequence[int], gates: Sequence[int], wraps: bool) -> Schedule:
    """Place each copy after the call it waits for, its gate; `wraps` prefetches the first blocks of the next step.

    A negative gate is a call of the cycle before. With `wraps`, that copy stands behind the same call of this cycle,
    for the next one; else it stands before the first call.
    """
    computes, count = problem.computes, len(problem.computes)
    behind: dict[int, list[Task]] = {}
    for index, gate in zip(streaming, gates, strict=True):
        if gate < 0:
            gate = gate + count if wraps and gate + count > index else -1
        copies = [Task("h2d", name, after=computes[gate].name) for name in _streamed_by(problem, index)]
        behind.setdefault(gate, []).extend(copies)
    steady = list(behind.get(-1, ()))
    for index, compute in enumerate(computes):
        steady += [compute, *behind.get(index, ())]
    streamed = {name for index in streaming for name in _streamed_by(problem, index)}
    return Schedule(problem.bundles, frozenset(set(problem.bundles) - streamed), tuple(steady))
