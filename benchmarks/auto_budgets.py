"""How good `auto` is at each budget, from the smallest that works to one where everything fits, on full-size models.

    python benchmarks/auto_budgets.py [flux] [wan] [sdxl] [llama] [steps]

Each line is a budget. Its plan is proved.

    units       how often the largest block fits into the budget without activations and margin
    step, cold  divided by their bounds
    rise        the step divided by the shortest step of all smaller budgets

The last line of each model has the worst figures. For the step, it also has the worst one from two units up.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from taskgraph_offload.planner.capture import capture

import taskgraph_offload as tgo
from taskgraph_offload.nouns.budget import readable, readable_seconds
from taskgraph_offload.plan.plan import SETTLED
from tests.models import FULL_SIZE

MODELS, STEPS = ("flux", "wan", "sdxl", "llama"), 40
TITLES = ("budget", "units", "seconds", "step", "cold", "rise", "spilled", "planning")


@dataclass(frozen=True)
class Line:
    """The figures of the plan for one budget."""

    budget: int
    units: float
    seconds: float
    step: float
    cold: float
    rise: float
    spilled: int
    planning: float

    def __str__(self) -> str:
        shown = (readable(self.budget), f"{self.units:.2f}", readable_seconds(self.seconds), f"{self.step:.4f}")
        more = (f"{self.cold:.4f}", f"{self.rise:.4f}", readable(self.spilled), f"{self.planning:.2f} s")
        return "".join(f"{text:>12}" for text in (*shown, *more))


def main() -> None:
    """Sweep each model that is named, or all."""
    steps = next((int(word) for word in sys.argv[1:] if word.isdigit()), STEPS)
    for name in [word for word in sys.argv[1:] if word in FULL_SIZE] or MODELS:
        model, inputs = FULL_SIZE[name]()
        print(f"\n{name}\n{''.join(f'{title:>12}' for title in TITLES)}", flush=True)
        sweep(capture(model, inputs), steps)


def sweep(trace: tgo.Trace, steps: int) -> None:
    """Plan and prove at each budget. Print a line for each, then the worst figures."""
    planner, found = tgo.Planner.for_trace(trace, "100%", machine="rtx4090"), list[Line]()
    for budget in planner.budgets(steps, ["auto"]):
        found.append(line_of(trace, budget, min((line.seconds for line in found), default=float("inf"))))
        print(found[-1], flush=True)
    roomy = max((line.step for line in found if line.units >= 2), default=1.0)
    worst = {key: max(getattr(line, key) for line in found) for key in ("step", "cold", "rise", "planning")}
    print(
        "worst:", ", ".join(f"{key} {figure:.4f}" for key, figure in worst.items()), f"; from two units up {roomy:.4f}"
    )


def line_of(trace: tgo.Trace, budget: int, shortest: float) -> Line:
    """Plan within one budget. `shortest`: the shortest step of all smaller budgets."""
    began = time.process_time()
    plan = tgo.Planner.for_trace(trace, f"{budget}B", machine="rtx4090").plan()
    took, timeline = time.process_time() - began, plan.predict(SETTLED)
    plan.verify()
    largest = max(sum(trace.weights[name].nbytes for name in call.reads) for call in trace.calls)
    step, cold = timeline.step_seconds, timeline.cold_seconds
    return Line(
        budget,
        (budget - trace.activation_bytes - plan.margin_bytes) / largest,
        step,
        step / plan.bound.step_seconds,
        cold / plan.bound.cold_seconds,
        step / min(step if shortest == float("inf") else shortest, shortest),
        sum(plan.task_bytes(task) for task in plan.steady if task.kind == "d2h"),
        took,
    )


if __name__ == "__main__":
    main()
