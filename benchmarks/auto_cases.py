"""How good `auto` is on the streaming cases, against the bound, a prototype and other policies; and how long it plans.

    python benchmarks/auto_cases.py [a part of a case's name]

Each line is a case and a budget. Each column is the steady step after eight cycles (for `cold bound`, the cold cycle),
divided by the figure in its title; less is better. `policies` is the best policy that a device can run; `ideal` is the
better one of two policies with an ideal allocator. `seconds` is the time of planning.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import taskgraph_offload as tgo

CASES = Path(__file__).parent.parent / "tests" / "cases" / "streaming_cases.json"
IDEAL = ("frac", "belady")
TITLES = ("bound", "block bound", "prototype", "policies", "ideal", "cold bound")


def main() -> None:
    """Plan every case and budget whose name fits, and print a line for each."""
    wanted = sys.argv[1] if len(sys.argv) > 1 else ""
    lines = [
        _line(case, budget)
        for case in json.loads(CASES.read_text())
        if wanted in case["name"]
        for budget in case["budgets"]
    ]
    worst = [max(line[i] for line in lines) for i in range(len(TITLES) + 1)]
    print(f"{'worst':24}{''.join(f'{figure:12.4f}' for figure in worst[:-1])}{worst[-1]:10.2f}")


def _line(case: dict[str, Any], budget: dict[str, Any]) -> list[float]:
    """Plan once and print. Returns the ratios in the order of the titles, then the seconds of planning."""
    link = case["link_bytes_per_second"]
    machine = tgo.Machine(case["name"], link, link, case["latency_seconds"], 1e12, 1e12)
    trace = tgo.Trace.from_units(case["units"])
    began = time.process_time()
    plan = tgo.Planner.for_trace(trace, f"{budget['budget_bytes']}B", machine=machine).plan()
    took = time.process_time() - began
    timeline, others = plan.predict(8), {name: step for name, step in budget["policies"].items() if step}
    against = (
        plan.bound.step_seconds,
        budget["bound_step_seconds"],
        budget["prototype_step_seconds"],
        min(step for name, step in others.items() if name not in IDEAL),
        min(step for name, step in others.items() if name in IDEAL),
    )
    ratios = [timeline.step_seconds / other for other in against]
    ratios.append(timeline.cold_seconds / budget["bound_cold_seconds"])
    title = f"{case['name']:20}{budget['fraction']:4.1f}"
    print(f"{title}{''.join(f'{ratio:12.4f}' for ratio in ratios)}{took:10.2f}", flush=True)
    return [*ratios, took]


if __name__ == "__main__":
    print(f"{'':24}{''.join(f'{title:>12}' for title in TITLES)}{'seconds':>10}")
    main()
