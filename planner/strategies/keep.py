"""keep: the first bundles stay, as many as fit. The others are loaded when their call is reached, and freed after it.

This is the VRAM limit of DiffSynth-Studio and the three states of TeleFuser (offload, onload, keep). Nothing overlaps.

    h2d      [--a--]       [--b--]       [--c--]                     (next cycle: only c)
    compute         [--a--]       [--b--]       [--c--]
    stays            a             b             -
"""

from __future__ import annotations

from itertools import chain

from taskgraph_offload.nouns.graph import Task

from . import Problem, Schedule


def schedule(problem: Problem) -> Schedule:
    """Keep bundles in the order in which calls need them, as long as the largest demand of the rest still fits."""
    kept: set[str] = set()
    for name in dict.fromkeys(chain.from_iterable(problem.needs)):
        more = kept | {name}
        largest_demand = max(problem.bytes_of(set(needs) - more) for needs in problem.needs)
        if problem.bytes_of(more) + largest_demand <= problem.capacity:
            kept = more
    steady: list[Task] = []
    for index, (compute, needs) in enumerate(zip(problem.computes, problem.needs, strict=True)):
        for name in needs:
            if name not in kept:
                steady.append(Task("h2d", name, after=problem.computes[index - 1].name))
        steady.append(compute)
    return Schedule(problem.bundles, frozenset(kept), tuple(steady))
