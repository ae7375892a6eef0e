"""How good `auto` is if the machine is not what was measured: compute, link, or both are 30% slower or faster.

    python benchmarks/auto_robustness.py [a part of a case's name]

Each line is a case and a budget. Each column is a true machine: its link and its compute, as shares of those that the
plan was made for. A figure is the step of our plan on the true machine, divided by the step of a plan that was made for
the true machine. 1 is no loss.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import mean

import taskgraph_offload as tgo

CASES = Path(__file__).parent.parent / "tests" / "cases" / "streaming_cases.json"
FRACTIONS = (0.1, 0.3, 0.5, 0.7)
TRUTHS = [(link, compute) for link, compute in product((0.7, 1.0, 1.3), repeat=2) if (link, compute) != (1.0, 1.0)]


def main() -> None:
    """Print a line for each case and budget whose name fits, then the mean and the worst loss."""
    wanted, found = sys.argv[1] if len(sys.argv) > 1 else "", list[float]()
    titles = (f"{link}, {compute}" for link, compute in TRUTHS)
    print(f"{'link, compute':24}{''.join(f'{title:>10}' for title in titles)}")
    for name, trace, machine, budget in problems():
        if wanted in name:
            ratios = losses(trace, machine, budget)
            print(f"{name:24}{''.join(f'{ratio:10.4f}' for ratio in ratios)}", flush=True)
            found += ratios
    print(f"mean {mean(found):.4f}, worst {max(found):.4f}, of {len(found)}")


def problems() -> Iterator[tuple[str, tgo.Trace, tgo.Machine, int]]:
    """The cases at some budgets: name, trace, machine, bytes."""
    for case in json.loads(CASES.read_text()):
        link = case["link_bytes_per_second"]
        machine = tgo.Machine(case["name"], link, link, case["latency_seconds"], 1e12, 1e12)
        for budget in case["budgets"]:
            if budget["fraction"] in FRACTIONS:
                title = f"{case['name']} {budget['fraction']}"
                yield title, tgo.Trace.from_units(case["units"]), machine, budget["budget_bytes"]


def losses(trace: tgo.Trace, machine: tgo.Machine, budget: int) -> list[float]:
    """For each true machine: the step of the plan for the wrong machine, divided by the step of the right plan."""
    planned = tgo.Planner.for_trace(trace, f"{budget}B", machine=machine).plan()
    ratios = []
    for link, compute in TRUTHS:
        true = replace(machine, h2d_bytes_per_second=machine.h2d_bytes_per_second * link)
        right = tgo.Planner.for_trace(at_speed(trace, compute), f"{budget}B", machine=true).plan()
        moved = replace(planned, trace=at_speed(planned.trace, compute), machine=true)
        ratios.append(moved.predict(8).step_seconds / right.predict(8).step_seconds)
    return ratios


def at_speed(trace: tgo.Trace, compute: float) -> tgo.Trace:
    """The same trace with calls that run `compute` times as fast."""
    calls = (
        replace(call, pieces=tuple(replace(p, seconds=(p.seconds or 0.0) / compute) for p in call.pieces))
        for call in trace.calls
    )
    return replace(trace, calls=tuple(calls))


if __name__ == "__main__":
    main()
