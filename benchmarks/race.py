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
import os
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from subprocess import DEVNULL, PIPE
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

from benchmarks.race.models import CHAINS, MODELS
from benchmarks.race.overview import FIRST, draw_overview, overview
from benchmarks.race.racers import RACERS
from benchmarks.race.report import draw, tables
from taskgraph_offload.nouns.budget import readable

ROOT = Path(__file__).parent.parent
BALANCES, SHARES = (0.4, 0.9, 2.0), (0.25, 0.5, 0.75)
STEADY = 5  # steps of the second request, which is measured
TRIES = 8  # short runs to tune a knob
OVER, UNDER = 0.01, 0.02  # a peak this much over or under the budget meets it
BEHIND = 1.15  # times the first one's step: a racer so slow runs one turn only
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
    print(f"\n{overview(results)}")
    if asked.picture is not None:
        draw(results, asked.picture)
    if asked.overview is not None:
        draw_overview(results, asked.overview)


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
    parser.add_argument("--json", type=Path, help="where to save the results; what is there already is not run again")
    parser.add_argument("--from", type=Path, dest="from_", metavar="JSON", help="show saved results, race nothing")
    parser.add_argument("--picture", type=Path, help="where to draw the results: .png or .svg")
    parser.add_argument("--overview", type=Path, metavar="PICTURE", help="where to draw all steps at a glance")
    return parser.parse_args()


class Race:
    """All races that were asked for. What is in the file of results already is not done again."""

    def __init__(self, asked: argparse.Namespace) -> None:
        self.asked = asked
        forks = {**os.environ, "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}  # to ask whether there is a GPU leaves it alone
        command = [sys.executable, "-m", "benchmarks.race.one"]
        self.worker = subprocess.Popen(command, cwd=ROOT, env=forks, text=True, stdin=PIPE, stdout=PIPE, stderr=DEVNULL)
        self.missing = {name: missing for name in asked.racers if (missing := RACERS[name].missing())}
        self.racers = [name for name in dict.fromkeys(("resident", *asked.racers)) if name not in self.missing]
        empty: Facts = {"cases": [], "checks": [], "probes": []}
        self.results = json.loads(asked.json.read_text()) if asked.json and asked.json.exists() else empty
        if self.results.setdefault("versions", versions := _versions()) != versions:
            sys.exit(f"{asked.json} has results of other versions; give the name of a new file")
        self.results["missing"] = self.missing

    def run(self) -> Facts:
        """Race all models, balances and shares. Save after each run."""
        for model in self.asked.models:
            racers = [racer for racer in self.racers if model in CHAINS or not RACERS[racer].needs_chain]
            for racer in racers:
                self._check(model, racer)
            probed = self._probe(model)
            for balance in self.asked.balances if probed["rates"] else [None]:
                for share in self.asked.shares:
                    self._race(self._case(probed, balance, share), racers)
        return self.results

    def _check(self, model: str, racer: str) -> None:
        """Compare the outputs of a racer with those of the resident model."""
        key = {"model": model, "racer": racer}
        if _find(self.results["checks"], key) is None:
            found = self._done({"do": "check", **key})
            self.results["checks"].append({**key, **found})
            self._save(f"{model}: {racer}: {found.get('error') or ('same' if found['equal'] else 'OTHER')} outputs")

    def _probe(self, model: str) -> Facts:
        """What the resident model takes, and the rates of the simulated card."""
        job = {"model": model, "size": self.asked.size}
        key = {**job, "wanted": self.asked.step, **self._done({"do": "weigh", **job})}  # as the model is today
        if (probed := _find(self.results["probes"], key)) is None:
            probed = {**key, **self._done({"do": "probe", **job, "wanted": self.asked.step})}
            if "error" in probed:
                sys.exit(f"{model}: {probed['error']}")
            self.results["probes"].append(probed)
        return probed

    def _case(self, probed: Facts, balance: float | None, share: float) -> Facts:
        """One model with one budget. On a simulated card, the link fits the balance."""
        link = probed["link"] or probed["weights"] / (balance * probed["step"])
        rates = probed["rates"] and {**probed["rates"], "link": link}
        key = {**probed, "share": share, "rates": rates}
        if (case := _find(self.results["cases"], key)) is None:
            budget = int(share * probed["weights"] + probed["activations"])
            own = balance or probed["weights"] / link / probed["step"]
            case = {**key, "balance": own, "budget": budget, "knobs": {}, "runs": {}}
            self.results["cases"].append(case)
        return case

    def _race(self, case: Facts, racers: Sequence[str]) -> None:
        """Let all racers run in turns."""
        job = {"do": "race", "model": case["model"], "size": case["size"], "rates": case["rates"]}
        for turn in range(self.asked.turns):
            for racer in racers:
                runs = case["runs"].setdefault(racer, [])
                if len(runs) > turn or (turn > 0 and _is_far_behind(case, racer)):
                    continue
                if (run := self._known(case, racer, turn)) is None:
                    knob = self._knob(racer, job, case)
                    run = self._done({**job, "racer": racer, "knob": knob, "first": FIRST, "steady": STEADY})
                runs.append(run)
                self._save(
                    f"{case['model']} {case['balance']:g} {case['share']:.0%} turn {turn + 1}: {racer}: {_short(run)}"
                )

    def _known(self, case: Facts, racer: str, turn: int) -> Facts | None:
        """What a racer without a knob has done with another budget."""
        same = [
            other["runs"].get(racer, [])
            for other in self.results["cases"]
            if not RACERS[racer].tuned and all(other[key] == case[key] for key in ("model", "size", "rates"))
        ]
        return next((runs[turn] for runs in same if len(runs) > turn), None)

    def _knob(self, racer: str, job: Facts, case: Facts) -> int:
        """The knob of a racer, from its last turn, or from short runs."""
        if racer not in case["knobs"]:
            case["knobs"][racer] = self._tuned(racer, job, case) if RACERS[racer].tuned else 0
        return int(case["knobs"][racer])

    def _tuned(self, racer: str, job: Facts, case: Facts) -> int:
        """The largest knob whose peak meets the budget, up to one block. If there is none, the smallest knob."""
        budget, most, over = case["budget"], 1, 2**62  # `most` meets the budget, `over` does not
        others = [other["knobs"][racer] for other in self.results["cases"] if _alike(other, case, racer)]
        knob = max(others, default=budget if RACERS[racer].knob_is_budget else budget - case["activations"])
        enough = max(UNDER * budget, case["smallest_block"])
        for _ in range(TRIES):
            run = self._done({**job, "racer": racer, "knob": knob, "first": 1, "steady": 2})
            if "error" in run:
                self._save(f"{job['model']}: {racer}: knob {readable(knob)}: {run['error']}")
                over, knob = min(over, knob), (most + min(over, knob)) // 2
                continue
            gap = budget - run["peak"]
            self._save(f"{job['model']}: {racer}: knob {readable(knob)}: {readable(gap)} to spare")
            if gap >= -OVER * budget:
                most = max(most, knob)
            else:
                over = min(over, knob)
            if -OVER * budget <= gap <= enough or over - most <= enough:
                break
            is_closing_in = most < knob + gap < over and not (gap < 0 and most > 1)
            knob = knob + gap if is_closing_in else (most + over) // 2
        return most

    def _done(self, job: Facts) -> Facts:
        """What the worker makes of a job."""
        assert self.worker.stdin is not None
        assert self.worker.stdout is not None
        print(json.dumps(job), file=self.worker.stdin, flush=True)
        found: Facts = json.loads(self.worker.stdout.readline())
        return found

    def _save(self, done: str) -> None:
        print(done, file=sys.stderr, flush=True)
        if self.asked.json is not None:
            self.asked.json.write_text(json.dumps(self.results, indent=1))


def _is_far_behind(case: Facts, racer: str) -> bool:
    """Whether a racer failed in its first turn, or was so slow that it needs no other."""
    runs = {name: runs[0] for name, runs in case["runs"].items() if runs and "error" not in runs[0]}
    steps = [run["step"] for run in runs.values() if run["peak"] <= (1 + OVER) * case["budget"]]
    return racer not in runs or (bool(steps) and runs[racer]["step"] > BEHIND * min(steps))


def _find(found: list[Facts], key: Facts) -> Facts | None:
    """The facts that have all of the key's."""
    return next((facts for facts in found if facts.items() >= key.items()), None)


def _alike(other: Facts, case: Facts, racer: str) -> bool:
    """Whether a racer's knob is known for the same model and budget, on another balance."""
    return racer in other["knobs"] and (other["model"], other["budget"]) == (case["model"], case["budget"])


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
