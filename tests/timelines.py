"""Timelines to draw: predicted ones of small plans, and made-up measured ones."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import taskgraph_offload as tgo

MIB = 2**20
QUICK = ("keep", "layerwise", ("layerwise", {"residents": "spread"}), "resident", "sequential")


def planner(blocks: int, budget: str = "40%", strategy: str = "layerwise", **options: Any) -> tgo.Planner:
    """A planner for blocks of 90 MiB. Every third block computes for a short time, and cannot hide the next copy."""
    units = [
        {
            "name": f"transformer_blocks.{i}",
            "seconds": 0.002 if i % 3 == 0 else 0.005,
            "transient_bytes": 20 * MIB,
            "tensors": [30 * MIB, 60 * MIB],
        }
        for i in range(blocks)
    ]
    trace = tgo.Trace.from_units(units)
    return tgo.Planner.for_trace(trace, budget, strategy=strategy, machine="rtx4090", **options)


def predicted(blocks: int, cycles: int = 3, **settings: Any) -> tgo.Timeline:
    return planner(blocks, **settings).plan().predict(cycles)


def measured(timeline: tgo.Timeline, seed: int = 0) -> tgo.Timeline:
    """The same tasks in the same order, each a little longer. Each one waits for the same tasks as before."""
    chance, lanes, ends = random.Random(seed), dict[str, float](), dict[str, float]()
    spans = []
    for span in timeline.spans:
        start = max(lanes.get(span.lane, 0.0), ends.get(span.waited_for or "", 0.0))
        stop = start + span.seconds * chance.uniform(1.0, 1.3)
        lanes[span.lane] = ends[span.node] = stop
        spans.append(replace(span, start=start, stop=stop))
    starts = [0.0, *(span.start for span in spans if span.lane == "compute")]
    memory = tuple(replace(point, seconds=start) for point, start in zip(timeline.memory, starts, strict=True))
    return replace(timeline, source="measured", spans=tuple(spans), memory=memory)
