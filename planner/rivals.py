"""`auto` never loses to what it replaces: where it stays above the bound, the other strategies may do better.

They seldom do. Then their plan is the plan of `auto`, so that nobody need try them by hand.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from math import inf
from typing import Any

from taskgraph_offload.machine import Machine
from taskgraph_offload.plan import Plan
from taskgraph_offload.simulate import SETTLED

from .draft import FASTER_LINK, SLOWER_LINK, score

RIVALS: tuple[tuple[str, Mapping[str, Any]], ...] = (
    ("keep", {}),
    ("layerwise", {"residents": "leading"}),
    ("layerwise", {"residents": "spread"}),
    ("layerwise", {"residents": "spread", "prefetch": 2}),
)
CLOSE = 1.002  # times the bound: no rival could do noticeably better


def best_of(plan: Plan, rivals: Iterable[Plan]) -> Plan:
    """The plan, or a rival that is faster and has the better score, under the plan's name."""
    best, step, least = plan, _step(plan), inf
    for rival in rivals:
        if (faster := _step(rival)) < step:
            least = min(least, _score(best, step))
            if (its := _score(rival, faster)) < least:
                best, step, least = rival, faster, its
    return replace(best, strategy=plan.strategy, options=plan.options)


def _score(plan: Plan, step: float) -> float:
    return score(step, _step(plan, _link(plan, SLOWER_LINK)), _step(plan, _link(plan, FASTER_LINK)))


def _step(plan: Plan, machine: Machine | None = None) -> float:
    return plan.predict(SETTLED, machine).step_seconds


def _link(plan: Plan, times: float) -> Machine:
    machine = plan.machine
    return replace(machine, h2d_bytes_per_second=machine.h2d_bytes_per_second * times)
