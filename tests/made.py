"""Traces, machines and plans made from plain numbers, for tests that need no model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import taskgraph_offload as tgo

# A machine for mental arithmetic: one byte takes one nanosecond, and a copy has no latency.
SLOW_LINK = tgo.Machine("test", 1e9, 1e9, 0.0, 1e12, 1e12)
CASES = Path(__file__).parent / "cases" / "streaming_cases.json"


def trace_of(
    sizes: Sequence[int], seconds: float | Sequence[float] = 1e-3, transient_bytes: int = 0, tensors: int = 1
) -> tgo.Trace:
    """A trace of units a, b, c, ...: their bytes, split into equal tensors, and their seconds."""
    times = [seconds] * len(sizes) if isinstance(seconds, float) else seconds
    names = [chr(ord("a") + i) if len(sizes) <= 26 else f"block{i}" for i in range(len(sizes))]
    return tgo.Trace.from_units(
        {"name": n, "seconds": t, "tensors": [s // tensors] * tensors, "transient_bytes": transient_bytes}
        for n, s, t in zip(names, sizes, times, strict=True)
    )


def plan_of(trace: tgo.Trace, budget: int | str, strategy: str, **options: Any) -> tgo.Plan:
    """A plan for the test machine. A budget that is a number is in bytes."""
    budget = f"{budget}B" if isinstance(budget, int) else budget
    return tgo.Planner.for_trace(trace, budget, strategy=strategy, machine=SLOW_LINK, **options).plan()


def lines(text: str) -> list[str]:
    """The lines of a text, without indentation and empty ones."""
    return [line.strip() for line in text.splitlines() if line.strip()]


def program_cases() -> list[tuple[str, dict[str, Any]]]:
    """The programs that come with the design, by name."""
    loaded: dict[str, dict[str, Any]] = json.loads(CASES.with_name("program_cases.json").read_text())
    return list(loaded.items())


def cases() -> list[dict[str, Any]]:
    """The streaming cases that come with the design."""
    loaded: list[dict[str, Any]] = json.loads(CASES.read_text())
    return loaded
