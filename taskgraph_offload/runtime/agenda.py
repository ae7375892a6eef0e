"""When the host issues each copy of a plan: as soon as every call that the copy waits for has been issued.

    forward  |          0          |          1          |
    call     |  0     1     2      |  0     1     2      |
    slot      0     1     2     3   0     1     2     3

A copy that waits for call 1 is issued in slot 2 of that forward; one that waits for nothing as late as that, in slot 0
of the forward that lists it, and not before: what a step fetches for the next one, the plan lists at its end. Reads the
plan's graph; issues nothing. Activations leave and come back where the plan lists them, as their memory is given and
taken at that moment.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..nouns.graph import Task
from ..plan.plan import Plan
from .needs import standing_bundles


@dataclass(frozen=True, slots=True)
class Errand:
    """A copy to issue: its task, its node's name without the cycle, and the call that it serves.

    `serves` is that call's index, counted from the first call of the forward that issues the copy.
    """

    task: Task
    node: str
    call: str
    serves: int = 0


Agenda = tuple[tuple[Errand, ...], ...]  # for each slot of a forward: what is issued there, in this order


def agendas(plan: Plan) -> tuple[Agenda, ...]:
    """What to issue in the cold forward, in the one after it, and in every later one.

    What stands throughout comes first of all.
    """
    calls = {call.name: index for index, call in enumerate(plan.trace.calls)}
    first, count = standing_bundles(plan), len(calls)
    slots: list[list[list[Errand]]] = [[[] for _ in range(count + 1)] for _ in range(3)]
    for node, data, last_call, reached in _copies_behind_calls(plan, calls):
        begin = data["cycle"] * count
        serves = calls[data["call"]] + (count if begin + calls[data["call"]] <= reached else 0)
        errand = Errand(data["task"], node.partition("/")[2], data["call"], serves)
        if errand.task.name in first:
            slots[0][0].insert(0, errand)
        else:
            slots[data["cycle"]][max(last_call - begin, -1) + 1].append(errand)
    return tuple(tuple(map(tuple, forward)) for forward in slots)


def _copies_behind_calls(plan: Plan, calls: Mapping[str, int]) -> list[tuple[str, dict[str, Any], int, int]]:
    """Each copy of three cycles with the last call that it waits for, and the last one listed before it.

    Calls are counted through the cycles. A copy waits for what its lane waits for before it: a lane is a FIFO.
    """
    graph = plan.graph(3)
    found: list[tuple[str, dict[str, Any], int, int]] = []
    waits_for: dict[str, int] = {}
    reached = -1
    for node, data in graph:
        if data["kind"] == "compute":
            reached = waits_for[node] = data["cycle"] * len(calls) + calls[data["task"].name]
            continue
        last = max((waits_for[before] for before in graph.dag.pred[node]), default=-1)
        waits_for[node] = max(last, reached) if data["task"].is_activation else last
        found.append((node, data, waits_for[node], reached))
    return found
