"""Races this library against others: the same model, inputs and steps, at the same peak of device memory.

    python -m tests.simulated_gpu benchmarks/race.py [--models flux wan] [--balances 0.9 2] [--shares 0.5] [--turns 3]
    python benchmarks/race.py --size 30                           on a real GPU
    python benchmarks/race.py --from race.json --picture race.png

On a simulated GPU all results are simulated: the host code of each library and the CUDA code of torch are real; kernels
and copies take the time that rates say. This leaves out how fast real kernels are, copies that slow kernels down,
jitter, and the time that locking pages takes.

    balance     the time that the link takes for all weights, over the compute time of a step; a real GPU has its own
    share       the budget: this share of the weights, and the activations on top
    floor       what no racer can beat: the resident step, or this library's bound if that is longer

Each racer has one knob at most, the budget or the bytes that stay. Short runs set it so that the peak of allocated
memory meets the budget. Then the racers run in turns, each in a process of its own, one at a time.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

from benchmarks.race.models import CHAINS, MODELS
from benchmarks.race.racers import RACERS
from benchmarks.race.report import draw, tables
from taskgraph_offload.nouns.budget import readable

ROOT = Path(__file__).parent.parent
BALANCES, SHARES = (0.4, 0.9, 2.0), (0.25, 0.5, 0.75)
FIRST, STEADY = 4, 5  # steps of the first request, and of the second one, which is measured
TRIES = 5  # short runs to tune a knob
OVER, UNDER = 0.01, 0.02  # a peak this much over or under the budget meets it
LIMIT = 600  # seconds that one process may take
Facts = dict[str, Any]


def main() -> None:
    """Race, or show an earlier race."""
    asked = arguments()
    if asked.from_ is not None:
        results = json.loads(asked.from_.read_text())
    elif torch.cuda.is_available():
        results = Race(asked).run()
    else:
        sys.exit("no GPU here; on a simulated one: python -m tests.simulated_gpu benchmarks/race.py")
    print(tables(results))
    if asked.picture is not None:
        draw(results, asked.picture)


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=[*MODELS])
    parser.add_argument("--balances", nargs="+", type=float, default=BALANCES)
    parser.add_argument("--shares", nargs="+", type=float, default=SHARES)
    parser.add_argument("--racers", nargs="+", choices=RACERS, default=[*RACERS])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--size", type=float, default=1.0, help="of the models; 1 is a few hundred MB")
    parser.add_argument("--step", type=float, default=0.8, help="seconds of a resident step on the simulated card")
    parser.add_argument("--json", type=Path, help="where to save the results")
    parser.add_argument("--from", type=Path, dest="from_", metavar="JSON", help="show saved results, race nothing")
    parser.add_argument("--picture", type=Path, help="where to draw the results: .png or .svg")
    return parser.parse_args()


class Race:
    """All races that were asked for, and their results so far."""

    def __init__(self, asked: argparse.Namespace) -> None:
        self.asked = asked
        self.missing = {name: missing for name in asked.racers if (missing := RACERS[name].missing())}
        self.racers = [name for name in dict.fromkeys(("resident", *asked.racers)) if name not in self.missing]
        self.results: Facts = {"versions": _versions(), "missing": self.missing, "cases": [], "checks": []}

    def run(self) -> Facts:
        """Race all models, balances and shares. Save after each run."""
        for model in self.asked.models:
            self._check(model)
            probed = _process({"do": "probe", "model": model, "size": self.asked.size, "step": self.asked.step})
            if "error" in probed:
                sys.exit(f"{model}: {probed['error']}")
            knobs: dict[tuple[str, float], int] = {}
            for balance in self.asked.balances if probed["rates"] else [None]:
                for share in self.asked.shares:
                    self._race(model, share, _card(probed, balance), knobs)
        return self.results

    def _check(self, model: str) -> None:
        """Compare the outputs of all racers with those of the resident model."""
        for racer in self.racers:
            if _can_run(racer, model):
                found = _process({"do": "check", "model": model, "racer": racer})
                self.results["checks"].append({"model": model, "racer": racer, **found})
                self._save(f"{model}: {racer}: {found.get('error') or ('same' if found['equal'] else 'OTHER')} outputs")

    def _race(self, model: str, share: float, card: Facts, knobs: dict[tuple[str, float], int]) -> None:
        """Let all racers run in turns. `knobs` are those that are known from other balances."""
        budget = int(share * card["weights"] + card["activations"])
        case: Facts = {"model": model, "share": share, "budget": budget, **card, "runs": {}}
        self.results["cases"].append(case)
        racers = [racer for racer in self.racers if _can_run(racer, model)]
        job = {"do": "race", "model": model, "size": self.asked.size, "rates": card["rates"]}
        for turn in range(self.asked.turns):
            for racer in racers:
                knob = knobs.get((racer, share)) or self._tuned(racer, job, case)
                run = _process({**job, "racer": racer, "knob": knob, "first": FIRST, "steady": STEADY})
                if RACERS[racer].tuned and turn == 0 and run.get("peak", 0) > (1 + OVER) * budget:
                    knob = self._tuned(racer, job, case)  # that of another balance does not do here
                    run = _process({**job, "racer": racer, "knob": knob, "first": FIRST, "steady": STEADY})
                knobs[racer, share] = knob
                case["runs"].setdefault(racer, []).append({"knob": knob, **run})
                self._save(f"{model} {card['balance']:g} {share:.0%} turn {turn + 1}: {racer}: {_short(run)}")

    def _tuned(self, racer: str, job: Facts, case: Facts) -> int:
        """The largest knob whose peak meets the budget, up to one block. If there is none, the smallest knob."""
        budget, most, over = case["budget"], 1, 2**62  # `most` meets the budget, `over` does not
        knob = budget if RACERS[racer].knob_is_budget else budget - case["activations"]
        enough = max(UNDER * budget, case["smallest_block"])
        for _ in range(TRIES if RACERS[racer].tuned else 0):
            run = _process({**job, "racer": racer, "knob": knob, "first": 1, "steady": 2})
            if "error" in run:
                self._save(f"{job['model']}: {racer}: knob {readable(knob)}: {run['error']}")
                break
            gap = budget - run["peak"]
            self._save(f"{job['model']}: {racer}: knob {readable(knob)}: {readable(gap)} to spare")
            if gap >= -OVER * budget:
                most = max(most, knob)
            else:
                over = min(over, knob)
            if -OVER * budget <= gap <= enough or over - most <= enough:
                break
            knob = knob + gap if most < knob + gap < over else (most + over) // 2
        return most

    def _save(self, done: str) -> None:
        print(done, file=sys.stderr, flush=True)
        if self.asked.json is not None:
            self.asked.json.write_text(json.dumps(self.results, indent=1))


def _card(probed: Facts, balance: float | None) -> Facts:
    """What is known of the card and the model. On a simulated card, with a link for this balance."""
    if balance is None:
        return {**probed, "balance": probed["weights"] / probed["link"] / probed["step"]}
    link = probed["weights"] / (balance * probed["step"])
    return {**probed, "balance": balance, "link": link, "rates": {**probed["rates"], "link": link}}


def _process(job: Facts) -> Facts:
    """Do a job in a process of its own. A job that fails gives its error."""
    command = [sys.executable, "-m", "benchmarks.race.one", json.dumps(job)]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT)
        found: Facts = json.loads(done.stdout.strip().splitlines()[-1])
        return found
    except subprocess.TimeoutExpired:
        return {"error": f"took more than {LIMIT} s"}
    except (ValueError, IndexError):
        return {"error": (done.stderr.strip().splitlines() or [f"ended with {done.returncode}"])[-1][:300]}


def _can_run(racer: str, model: str) -> bool:
    return model in CHAINS or not RACERS[racer].needs_chain


def _short(run: Facts) -> str:
    return run.get("error") or f"step {run['step']:.3f} s, peak {readable(run['peak'])}"


def _versions() -> dict[str, str]:
    """The versions of all libraries that take part."""
    found = {}
    for package in ("torch", "transformers", *{p for racer in RACERS.values() for p in racer.packages.values()}):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    main()
