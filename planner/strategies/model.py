"""model: one whole component is on the device at a time. The next one is copied when it is needed; nothing overlaps.

This is `enable_model_cpu_offload` of diffusers and the model-level offload of vLLM-Omni, TeleFuser and FastVideo. They
copy the read-only weights back when a component leaves; so does `writeback`. If there is only one component, it stays.

    h2d      [---- encoder ----]                   [------ transformer ------]
    compute                     [- encoder -]                                 [------ transformer ------]
    d2h                                      [----] (writeback)
"""

from __future__ import annotations

from itertools import groupby

from taskgraph_offload.nouns.graph import Task

from . import Problem, Schedule


def schedule(problem: Problem, *, writeback: bool = False) -> Schedule:
    """Copy a whole component before its first call; the next component takes its place."""
    order = problem.trace.order
    runs = [list(run) for _, run in groupby(range(len(problem.needs)), lambda i: order[i].component)]
    if len(runs) == 1:
        return Schedule(problem.bundles, frozenset(problem.bundles), problem.computes, loads_first=True)
    stays_round = order[0].component == order[-1].component  # the last run goes on in the next cycle's first one
    needs = [_needs(problem, [*run, *runs[0]] if stays_round and run is runs[-1] else run) for run in runs]
    steady: list[Task] = []
    for position, run in enumerate(runs):
        first, last = problem.computes[run[0]].name, problem.computes[run[-1]].name
        previous = problem.computes[runs[position - 1][-1]].name
        if not (stays_round and position == 0):
            steady += [Task("h2d", name, after=previous, before=first) for name in needs[position]]
        steady += [problem.computes[index] for index in run]
        if writeback and not (stays_round and run is runs[-1]):
            leaving = needs[-1] if stays_round and position == 0 else needs[position]
            steady += [Task("d2h", name, after=last) for name in leaving]
    return Schedule(problem.bundles, frozenset(), tuple(steady), loads_first=True)


def _needs(problem: Problem, run: list[int]) -> list[str]:
    """The bundles that a run of calls reads."""
    return list(dict.fromkeys(name for index in run for name in problem.needs[index]))
