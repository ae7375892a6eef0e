"""`auto` never loses to what it replaces: where it stays above the bound, the other strategies may do better.

They seldom do. Then their plan is the plan of `auto`, so that nobody need try them by hand.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from math import inf
from typing import Any

from taskgraph_offload.nouns.machine import Machine
from taskgraph_offload.plan.plan import Plan
from taskgraph_offload.plan.simulate import SETTLED

from .draft import FASTER_LINK, SLOWER_LINK, score

Variant = tuple[str, Mapping[str, Any]]  # a strategy's name, and options

VARIANTS: tuple[Variant, ...] = (("layerwise", {"residents": "leading"}), ("layerwise", {"residents": "spread"}))
RIVALS: tuple[Variant, ...] = (("keep", {}), *VARIANTS, ("layerwise", {"residents": "spread", "prefetch": 2}))
CLOSE = 1.002  # times the bound: no rival could do noticeably better


def best_of(plan: Plan, rivals: Iterable[Plan]) -> Plan:
    """The plan, or a rival that is faster and has the better score, under the plan's name."""
    best, least = plan, inf
    for rival in rivals:
        if _copying(rival) < best.settled_seconds and rival.settled_seconds < best.settled_seconds:
            least = min(least, _score(best))
            if (its := _score(rival)) < least:
                best, least = rival, its
    return best if best is plan else replace(best, strategy=plan.strategy, options=plan.options, bound=plan.bound)


def _copying(plan: Plan) -> float:
    """How long the link takes for a step: no step is shorter."""
    return plan.streamed_bytes / plan.machine.h2d_bytes_per_second


def _score(plan: Plan) -> float:
    others = (plan.predict(SETTLED, _link(plan, times)).step_seconds for times in (SLOWER_LINK, FASTER_LINK))
    return score(plan.settled_seconds, *others)


def _link(plan: Plan, times: float) -> Machine:
    machine = plan.machine
    return replace(machine, h2d_bytes_per_second=machine.h2d_bytes_per_second * times)
