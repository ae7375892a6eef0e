"""Predicts when every task of a plan runs: the longest path through its graph. Runs nothing, changes nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import networkx as nx

from ..nouns.graph import TaskGraph
from ..nouns.timeline import MemoryPoint, Span, Timeline

if TYPE_CHECKING:
    from .plan import Plan


SETTLED = 6  # cycles after which a steady step has found its pace, on every plan that was ever looked at


def start_times(dag: nx.DiGraph[str]) -> dict[str, tuple[float, float, str | None]]:
    """When each node starts and stops, each as early as its predecessors allow, and which of them it waited for last.

    The nodes come in an order in which all edges point forward: the order of issue.
    """
    times: dict[str, tuple[float, float, str | None]] = {}
    for node, data in dag.nodes(data=True):
        start, last = 0.0, None
        for before in dag.pred[node]:
            if last is None or times[before][1] > start:
                start, last = times[before][1], before
        times[node] = start, start + data["seconds"], last
    return times


def simulate(plan: Plan, graph: TaskGraph) -> Timeline:
    """The predicted timeline of a plan's graph."""
    times = start_times(graph.dag)
    spans = [
        Span(node, data["task"].name, data["lane"], data["call"], data["cycle"], start, stop, data["nbytes"], last)
        for node, data in graph
        for start, stop, last in (times[node],)
    ]
    return Timeline(
        source="predicted",
        spans=tuple(spans),
        memory=memory_curve(plan, spans),
        budget_bytes=plan.budget_bytes,
        title=plan.title,
        bound_seconds=plan.bound.step_seconds,
    )


def memory_curve(plan: Plan, spans: list[Span]) -> tuple[MemoryPoint, ...]:
    """The arena, which is always there, and the activations of the call that runs."""
    peaks = dict(zip((call.name for call in plan.trace.calls), plan.activation_bytes, strict=True))
    computes = [span for span in spans if span.lane == "compute"]
    running = (MemoryPoint(span.start, plan.arena_bytes + peaks[span.call]) for span in computes)
    return (MemoryPoint(0.0, plan.arena_bytes), *running)
