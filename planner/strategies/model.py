"""model: one whole component on the device at a time. Components are swapped, blocking, when the next one is needed.

This is `enable_model_cpu_offload` of diffusers and the model-level offload of vLLM-Omni, TeleFuser and FastVideo. They
copy the read-only weights back when a component leaves; `writeback` does so too. A model of one component stays once
it has come, as it does there.

    h2d      [---- encoder ----]                   [------ transformer ------]
    compute                     [- encoder -]                                 [------ transformer ------]
    d2h                                      [----] (writeback)
"""

from __future__ import annotations

from itertools import groupby

from taskgraph_offload.errors import SettingsError
from taskgraph_offload.graph import Task

from ..problem import Problem
from ..schedule import Schedule


def schedule(problem: Problem, *, writeback: bool = False) -> Schedule:
    """Bring a component whole when its first call comes, drop it when the next component's does."""
    if not isinstance(writeback, bool):
        raise SettingsError(f"writeback is True or False, not {writeback!r}")
    runs = [list(run) for _, run in groupby(range(len(problem.needs)), lambda i: problem.trace.calls[i].component)]
    if len(runs) == 1:
        return Schedule(problem.groups, frozenset(problem.groups), problem.computes, loads_first=True)
    needs = [list(dict.fromkeys(name for index in run for name in problem.needs[index])) for run in runs]
    steady: list[Task] = []
    for position, run in enumerate(runs):
        first, previous = problem.computes[run[0]], problem.computes[runs[position - 1][-1]]
        steady += [Task("h2d", name, after=previous.name, before=first.name) for name in needs[position]]
        steady += [problem.computes[index] for index in run]
        if writeback:
            steady += [Task("d2h", name, after=problem.computes[run[-1]].name) for name in needs[position]]
    return Schedule(problem.groups, frozenset(), tuple(steady), loads_first=True)
