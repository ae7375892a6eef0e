"""Runs one small diffusion transformer with every strategy, in less memory than its weights need.

Uses the GPU if there is one; else the CPU, with copies slowed down so that they take as long as on a slow link. Plans
with each strategy, runs the plans, compares every output bit by bit with the plain model's, and draws it all into out/.

    python examples/compare_strategies.py [--budget 40%] [--steps 4] [--rounds 2] [--out out]
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tiny_dit import make

import taskgraph_offload as tgo
from taskgraph_offload.nouns.budget import readable

CHOICES: list[tuple[str, dict[str, Any]]] = [
    ("auto", {}),
    ("layerwise", {"residents": "spread"}),
    ("layerwise", {"residents": "leading"}),
    ("layerwise", {}),
    ("keep", {}),
    ("sequential", {}),
]
NEED_ALL = ["model", "resident"]  # these need memory for all weights: they are compared, but do not run
CALIBRATED_ON = 8  # steady steps; the quickest one counts
PEAK = {  # what a measured peak is
    "cuda": "all GPU memory that torch took",
    "cpu": "the arena and the traced activations: torch does not count a CPU's memory",
}
HARD = 1.2  # on the CPU: copying all weights takes this many times as long as computing a step


@dataclass
class Trial:
    """One strategy: its plan, the seconds of its steps, its highest peak, its last timeline, and what went wrong."""

    plan: tgo.Plan
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    timeline: tgo.Timeline | None = None
    faults: list[str] = field(default_factory=list)


def main() -> int:
    """Compare. The exit status is 1 if an output differs or a peak is over the budget."""
    given = arguments()
    out = Path(given.out)
    out.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(max(1, torch.get_num_threads() // 2))  # on a CPU, copies need cores too
    model, inputs = make(device)
    with torch.inference_mode():
        expected = model(*inputs)
        model.cpu()  # from here on, nobody may hold all weights on the device
        trials, planner = plan_all(model, inputs, given.budget, device)
        for number in range(given.rounds):  # in turns, so that other work on the machine slows down all
            for title, trial in trials.items():
                print(f"\rround {number + 1} of {given.rounds}: {title:<30}", end="", file=sys.stderr, flush=True)
                run(trial, model, inputs, expected, given.steps, device, link_of(planner.machine, device))
        print("\r" + " " * 60 + "\r", end="", file=sys.stderr)
    comparison = compared(trials, planner)
    print(comparison.table())
    print(f"Measured: `measured step` (the median), its `/ bound`, and `peak` ({PEAK[device]}).")
    print("Predicted: all other columns.")
    print("\n".join(comparison.notes()), end="\n\n")
    draw(comparison, trials, planner, out)
    faults = [f"{title}: {fault}" for title, trial in trials.items() for fault in trial.faults]
    print("\n".join(faults) or "every output is bit-identical to the plain model's, and every budget was kept")
    return 1 if faults else 0


def plan_all(model: torch.nn.Module, inputs: Any, budget: str, device: str) -> tuple[dict[str, Trial], tgo.Planner]:
    """A plan for each strategy, from the times of the quickest of some first steps on this machine."""
    machine = machine_at_hand(model, inputs, device)
    guess = tgo.Planner(model, budget, inputs=inputs, machine=machine)
    with tgo.Executor(model, guess.plan(), device=device, link_bytes_per_second=link_of(machine, device)) as executor:
        for _ in range(1 + CALIBRATED_ON):
            model(*inputs)
        planner = guess.calibrate(executor.timeline())
    trials = {}
    for name, options in CHOICES:
        plan = tgo.Planner.for_trace(planner.trace, budget, strategy=name, machine=machine, **options).plan()
        trials[plan.title] = Trial(plan)
    return trials, tgo.Planner.for_trace(planner.trace, budget, machine=machine)


def machine_at_hand(model: torch.nn.Module, inputs: Any, device: str) -> tgo.Machine:
    """The measured GPU; or this CPU with a slow link: copying all weights takes `HARD` times a step."""
    if device == "cuda":
        return tgo.Machine.measure("cuda")
    seconds = min(timed(model, inputs)[1] for _ in range(4))
    link = sum(weight.nbytes for weight in model.parameters()) / (HARD * seconds)
    return tgo.Machine("cpu behind a slow link", link, link, 1e-4, 1e11, 1e10)


def link_of(machine: tgo.Machine, device: str) -> float | None:
    """The rate that copies on the CPU are slowed down to. A real link is not slowed down."""
    return machine.h2d_bytes_per_second if device == "cpu" else None


def run(
    trial: Trial, model: torch.nn.Module, inputs: Any, expected: Any, steps: int, device: str, link: float | None
) -> None:
    """Run a plan for a cold step and some steady ones. Check all outputs and the peak."""
    with tgo.Executor(model, trial.plan, device=device, link_bytes_per_second=link) as executor:
        for step in range(steps + 1):
            output, seconds = timed(model, inputs)
            if not torch.equal(output, expected):
                trial.faults.append(f"step {step} differs from the plain model's")
            if step:
                trial.seconds.append(seconds)
        trial.timeline = executor.timeline()
    trial.peak_bytes = max(trial.peak_bytes, executor.stats.peak_bytes)
    if (over := executor.stats.peak_bytes - trial.plan.budget_bytes) > 0:
        trial.faults.append(f"its peak is {readable(over)} over the budget of {readable(trial.plan.budget_bytes)}")


def timed(model: torch.nn.Module, inputs: Any) -> tuple[Any, float]:
    """The output of a step, and how long it took, on the GPU too."""
    begin = time.perf_counter()
    output = model(*inputs)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return output, time.perf_counter() - begin


def compared(trials: dict[str, Trial], planner: tgo.Planner) -> tgo.Comparison:
    """A row for each strategy: what its plan predicts, and what was measured."""
    rows = planner.compare([*CHOICES, *NEED_ALL]).rows
    link = {"link_bytes_per_second": planner.machine.h2d_bytes_per_second}
    return tgo.Comparison([{**row, **link, **measured(trials.get(row["strategy"]))} for row in rows])


def measured(trial: Trial | None) -> dict[str, Any]:
    """The measured figures of a strategy's row; none if it did not run."""
    if trial is None:
        return {"peak_bytes": None}
    assert trial.timeline is not None
    steps = range(1, trial.timeline.cycles)
    computes = [sum(span.seconds for span in trial.timeline.lane("compute", step)) for step in steps]
    return {
        "measured_step_seconds": median(trial.seconds),
        "measured_compute_seconds": median(computes),
        "measured_link_bytes_per_second": trial.timeline.bytes_per_second("h2d"),
        "peak_bytes": trial.peak_bytes,
    }


def draw(comparison: tgo.Comparison, trials: dict[str, Trial], planner: tgo.Planner, out: Path) -> None:
    """Save the pictures and the traces."""
    comparison.save(out / "comparison.png")
    planner.sweep(12, ["auto", "keep", "sequential", *CHOICES[1:3]]).save(out / "sweep.png")
    for title, trial in trials.items():
        assert trial.timeline is not None
        name = title.replace(" residents=", "-")
        tgo.viz.save_timeline(out / f"timeline-{name}.png", trial.plan.predict(), trial.timeline)
        tgo.viz.save_trace(out / f"trace-{name}.json", trial.plan.predict(), trial.timeline)
    print(f"pictures and Perfetto traces are in {out}/")


def arguments() -> argparse.Namespace:
    """The arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", default="40%", help="memory: 40%% of the weights, 80MiB, ...")
    parser.add_argument("--steps", type=int, default=4, help="steady steps in each round")
    parser.add_argument("--rounds", type=int, default=2, help="how often each strategy runs")
    parser.add_argument("--out", default="out", help="folder for pictures and traces")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
