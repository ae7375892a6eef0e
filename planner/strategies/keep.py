"""keep: the first bundles stay, as many as fit. The others are loaded when their call is reached, and freed after it.

This is the VRAM limit of DiffSynth-Studio and the three states of TeleFuser (offload, onload, keep). Nothing overlaps.

    h2d      [--a--]       [--b--]       [--c--]                     (next cycle: only c)
    compute         [--a--]       [--b--]       [--c--]
    stays            a             b             -
"""

from __future__ import annotations

from taskgraph_offload.nouns.graph import Task

from ..strategy import Problem, Schedule


def schedule(problem: Problem) -> Schedule:
    """Keep bundles in the order in which calls need them, as long as the largest demand of the rest still fits."""
    kept: set[str] = set()
    for name in dict.fromkeys(name for needs in problem.needs for name in needs):
        if problem.bytes_of(kept | {name}) + _largest_demand(problem, kept | {name}) <= problem.capacity:
            kept.add(name)
    steady: list[Task] = []
    for index, (compute, needs) in enumerate(zip(problem.computes, problem.needs, strict=True)):
        previous = problem.computes[index - 1].name
        steady += [Task("h2d", name, after=previous) for name in needs if name not in kept]
        steady.append(compute)
    return Schedule(problem.bundles, frozenset(kept), tuple(steady))


def _largest_demand(problem: Problem, kept: set[str]) -> int:
    """The most bytes that one call needs in addition to what is kept."""
    return max(problem.bytes_of(set(needs) - kept) for needs in problem.needs)
