"""sequential: load, compute, free, one call after another. Nothing overlaps.

This is `enable_sequential_cpu_offload` of diffusers and `cpu_offload` of accelerate, made
faster in two ways: a call's weights are one copy (they copy each tensor on its own, from pageable memory), and calls
are blocks (they hook leaf modules). A block that is called twice in a row is loaded twice, as in those libraries.

    h2d      [--a--]       [--b--]       [--c--]
    compute         [--a--]       [--b--]       [--c--]
"""

from __future__ import annotations

from taskgraph_offload.nouns.graph import Task

from . import Problem, Schedule


def schedule(problem: Problem) -> Schedule:
    """Copy the weights of each call when the call before it has ended."""
    computes = problem.computes
    steady: list[Task] = []
    for index, (compute, needs) in enumerate(zip(computes, problem.needs, strict=True)):
        steady += [Task("h2d", name, after=computes[index - 1].name) for name in needs]
        steady.append(compute)
    return Schedule(problem.bundles, frozenset(), tuple(steady))
