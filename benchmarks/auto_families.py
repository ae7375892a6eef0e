"""How good `auto` is on random models, from some families of shapes, with random machines and budgets.

    python benchmarks/auto_families.py [first seed] [how many]

Each line is a seed.

    units       how often the largest block fits into the budget without activations
    step, cold  divided by their bounds
    others      the best step of the other strategies, divided by the step of `auto`: below 1, `auto` is slower
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from taskgraph_offload.planner.strategies.auto import RIVALS

import taskgraph_offload as tgo

OTHERS = (("sequential", {}), ("layerwise", {}), *RIVALS)
MIB = 2**20
Chance = random.Random
Unit = tuple[float, list[float]]  # its compute time, and the sizes of its tensors; `problem` scales both


def equal(chance: Chance) -> list[Unit]:
    """One block, many times, as in a language model."""
    tensors = [chance.lognormvariate(0, 1) for _ in range(chance.randrange(4, 30))]
    return [(1.0, tensors)] * chance.randrange(8, 70)


def unequal(chance: Chance) -> list[Unit]:
    """No two blocks alike, in bytes or in seconds."""
    count, spread = chance.randrange(6, 60), chance.uniform(0.3, 1.2)
    sizes = [[chance.lognormvariate(0, 1) for _ in range(chance.randrange(2, 24))] for _ in range(count)]
    return [(chance.lognormvariate(0, spread), sized) for sized in sizes]


def two_kinds(chance: Chance) -> list[Unit]:
    """Large slow blocks, then small quick ones, as in Flux."""
    large, small = [(1.0, [scale] * chance.randrange(4, 20)) for scale in (2.0, chance.uniform(0.5, 1.5))]
    return [large] * chance.randrange(4, 25) + [(0.4, small[1])] * chance.randrange(8, 45)


def hourglass(chance: Chance) -> list[Unit]:
    """Slow blocks with few weights around quick ones with many, as in a UNet."""
    half = chance.randrange(3, 14)
    weights = [4.0 ** (3 * number / half) for number in range(half)]
    down = [(64 / weight**0.5, [weight / 8] * 8) for weight in weights]
    return [*down, (1.0, [weights[-1] / 8] * 12), *reversed(down)]


def giant(chance: Chance) -> list[Unit]:
    """One block that is as large as many others together: an embedding, a mixture of experts."""
    others = [(1.0, [1.0] * 10) for _ in range(chance.randrange(6, 40))]
    others.insert(chance.randrange(len(others)), (chance.uniform(0.1, 4), [chance.uniform(5, 20)] * 10))
    return others


FAMILIES: tuple[Callable[[Chance], list[Unit]], ...] = (equal, unequal, two_kinds, hourglass, giant)


def problem(seed: int) -> tuple[str, tgo.Trace, tgo.Machine, int]:
    """The problem of a seed: a title, a trace, a machine and a budget in bytes."""
    chance = random.Random(seed)
    family = FAMILIES[seed % len(FAMILIES)]
    units, link = family(chance), chance.choice((6e9, 12e9, 25e9, 55e9))
    machine = tgo.Machine("random", link, link, chance.choice((0.0, 1e-5, 3e-5)), 1e12, 1e12)
    total_bytes = chance.uniform(2, 40) * 2**30
    scale = total_bytes / sum(sum(tensors) for _, tensors in units)
    ratio = chance.choice((0.1, 0.3, 0.6, 1.0, 1.6, 3.0))  # all compute by all transfer
    per_second = sum(seconds for seconds, _ in units) / (ratio * total_bytes / link)
    transient = [int(chance.uniform(0, 400) * MIB) for _ in range(3)]
    trace = tgo.Trace.from_units(_unit(n, unit, scale, per_second, transient) for n, unit in enumerate(units))
    budget = int(chance.uniform(0.06, 0.95) * trace.weight_bytes) + trace.activation_bytes
    title = f"{seed:4} {family.__name__:10}{link / 1e9:4.0f} GB/s, compute {ratio:3.1f},{budget / total_bytes:5.0%}"
    return title, trace, machine, budget


def _unit(number: int, unit: Unit, scale: float, per_second: float, transient: list[int]) -> dict[str, Any]:
    tensors = [max(512, int(tensor * scale)) for tensor in unit[1]]
    seconds = unit[0] / per_second
    parts = [seconds * tensor / sum(tensors) for tensor in tensors]
    transient_bytes = transient[number % len(transient)]
    return {
        "name": f"block.{number}",
        "seconds": seconds,
        "tensors": tensors,
        "tensor_seconds": parts,
        "transient_bytes": transient_bytes,
    }


def main() -> None:
    """Print a line for each seed, then the worst figures."""
    numbers = [int(word) for word in sys.argv[1:] if word.isdigit()]
    first, count = (*numbers, 60)[:2] if numbers else (0, 60)
    roomy, cold, behind = list[float](), list[float](), list[float]()
    print(f"{'seed, family, link, compute, budget':48}{'units':>8}{'step':>9}{'cold':>9}{'others':>9}")
    for seed in range(first, first + count):
        title, trace, machine, budget = problem(seed)
        try:
            plan = tgo.Planner.for_trace(trace, f"{budget}B", machine=machine).plan()
        except tgo.BudgetError as error:
            print(f"{title:48}{f'needs {error.smallest_bytes / budget:.2f} times as much':>35}")
            continue
        timeline, largest = plan.predict(12), max(sum(trace.weights[n].nbytes for n in c.reads) for c in trace.calls)
        units = (budget - trace.activation_bytes) / largest
        step, others = timeline.step_seconds, _others(trace, machine, budget)
        figures = [step / plan.bound.step_seconds, timeline.cold_seconds / plan.bound.cold_seconds]
        figures.append(min(others, default=float("inf")) / step)
        print(f"{title:48}{units:8.2f}{''.join(f'{figure:9.4f}' for figure in figures)}", flush=True)
        roomy += [figures[0]] * (units >= 2)
        cold.append(figures[1])
        behind.append(figures[2])
    print(f"worst step from two units up {max(roomy, default=1):.4f}, cold {max(cold):.4f}, others {min(behind):.4f}")


def _others(trace: tgo.Trace, machine: tgo.Machine, budget: int) -> list[float]:
    found = list[float]()
    for strategy, options in OTHERS:
        with suppress(tgo.BudgetError):
            planner = tgo.Planner.for_trace(trace, f"{budget}B", strategy=strategy, machine=machine, **options)
            found.append(planner.plan().predict(12).step_seconds)
    return found


if __name__ == "__main__":
    main()
