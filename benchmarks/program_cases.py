"""How good `auto` is for whole requests: on programs of real pipelines, against their bounds and the usual ways.

    python benchmarks/program_cases.py [a part of a program's name]

Each line is a program and a budget. `request` and `cold` are predicted seconds, divided by the bound; `usual` is the
fastest of the ways that other systems have, in times of ours; `seconds` is the time of planning.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import taskgraph_offload as tgo

CASES = Path(__file__).parent.parent / "tests" / "cases" / "program_cases.json"
TITLES = ("request s", "request", "cold", "usual", "seconds")


def main() -> None:
    """Plan every program and budget whose name fits, and print a line for each."""
    wanted = sys.argv[1] if len(sys.argv) > 1 else ""
    print(f"{'program':18}{'GiB':>6}{''.join(f'{title:>11}' for title in TITLES)}")
    lines = [
        _line(name, case, budget)
        for name, case in json.loads(CASES.read_text()).items()
        if wanted in name
        for budget in case["budgets"]
    ]
    if lines:
        slowest, least = max(line[3] for line in lines), min(line[2] for line in lines)
        worst = (
            f"{max(line[0] for line in lines):11.4f}{max(line[1] for line in lines):11.4f}{least:11.3f}{slowest:11.2f}"
        )
        print(f"{'worst':24}{'':11}{worst}")


def _line(name: str, case: dict[str, Any], budget: dict[str, Any]) -> tuple[float, float, float, float]:
    """Plan once and print. Returns the ratios, and the seconds of planning."""
    rates = case["link_bytes_per_second"], case["d2h_bytes_per_second"], case["latency_seconds"]
    machine = tgo.Machine(name, *rates, 1e12, 1e12)
    traces = {component: tgo.Trace.from_units(units) for component, units in case["components"].items()}
    began = time.process_time()
    phases = [(component, times) for component, times in case["phases"]]
    plan = tgo.Planner.for_program(traces, phases, f"{budget['budget_bytes']}B", machine=machine).plan()
    took = time.process_time() - began
    timeline = plan.predict(requests=2)
    request = timeline.request_seconds / budget["bound_request_seconds"]
    cold = timeline.cold_seconds / budget["bound_cold_request_seconds"]
    usual = min(budget["usual_ways"].values()) / timeline.request_seconds
    figures = f"{timeline.request_seconds:11.3f}{request:11.4f}{cold:11.4f}{usual:11.3f}{took:11.2f}"
    print(f"{name:18}{budget['budget_bytes'] / 2**30:6.0f}{figures}", flush=True)
    return request, cold, usual, took


if __name__ == "__main__":
    main()
