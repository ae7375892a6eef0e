"""Predicts when every task of a plan runs: the longest path through its graph. Runs nothing, changes nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..nouns.graph import TaskGraph
from ..nouns.timeline import MemoryPoint, Span, Timeline

if TYPE_CHECKING:
    from .plan import Plan


SETTLED = 6  # cycles after which a steady step no longer changes, on every plan that was ever looked at


def simulate(plan: Plan, graph: TaskGraph) -> Timeline:
    """The predicted timeline: each node of the graph starts as soon as all nodes before it have stopped.

    The nodes come in the order of issue, in which all edges point forward.
    """
    spans: list[Span] = []
    stops: dict[str, float] = {}
    for node, data in graph:
        start, last = 0.0, None
        for before in graph.dag.pred[node]:
            if last is None or stops[before] > start:
                start, last = stops[before], before
        stops[node] = stop = start + data["seconds"]
        name, nbytes = data["task"].name, data["nbytes"]
        spans.append(Span(node, name, data["lane"], data["call"], data["cycle"], start, stop, nbytes, last))
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
    peaks = dict(zip(plan.calls, plan.activation_bytes, strict=True))
    points = [MemoryPoint(0.0, plan.arena_bytes)]
    for span in spans:
        if span.lane == "compute":
            points.append(MemoryPoint(span.start, plan.arena_bytes + peaks[span.call]))
    return tuple(points)
