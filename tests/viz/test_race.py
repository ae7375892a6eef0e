"""What `benchmarks/race.py` says of a race that was saved."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parent.parent.parent / "benchmarks" / "race.py"
BUDGET = 100 * 2**20


def ran(step: float, peak: int = BUDGET, **more: float) -> dict[str, float]:
    """One run of a racer."""
    usual = dict(setup=1.0, request=4 * step, cold=step, call=0.1, reserved=2 * peak, host=2**28, h2d_bytes=2**27)
    return usual | dict(step=step, peak=peak, d2h_bytes=0, pageable_bytes=0, host_wait_seconds=0.0) | more


def saved(**runs: list[dict]) -> dict:
    """A race of one case."""
    case = dict(model="flux", share=0.5, budget=BUDGET, weights=2 * BUDGET, step=1.0, balance=2.0, card="card")
    case |= dict(torch="2.11.0", rates={"link": 1e9}, runs=runs)
    checks = [
        dict(model="flux", racer="ours", equal=True, difference=0.0),
        dict(model="flux", racer="mmgp", error="no"),
    ]
    return dict(cases=[case], checks=checks, missing={"ramtorch": ["ramtorch"]}, versions={"torch": "2.11.0"})


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, bytes]:
    """The tables, and the picture, of a race that was saved."""
    folder = tmp_path_factory.mktemp("race")
    results = saved(
        ours=[ran(1.3, bound=1.2, predicted=1.2), ran(1.3, bound=1.2, predicted=1.2)],
        rival=[ran(1.22), ran(1.2), ran(1.21)],
        glutton=[ran(1.0, peak=BUDGET + 2**22)],
        broken=[{"error": "RuntimeError: it broke"}],
    )
    (folder / "race.json").write_text(json.dumps(results))
    command = [sys.executable, str(PROGRAM), "--from", str(folder / "race.json"), "--picture", str(folder / "race.png")]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return output, (folder / "race.png").read_bytes()


def row_of(text: str, name: str) -> str:
    return next(line for line in text.splitlines() if line.startswith(name))


def test_a_step_is_compared_with_our_bound_where_that_is_longer_than_the_compute(said):
    assert row_of(said[0], "ours").split()[1:4] == ["1.300", "s", "1.083"]


def test_the_median_of_all_turns_counts_and_the_spread_is_shown(said):
    assert row_of(said[0], "rival").split()[1:5] == ["1.210", "s", "1.008", "0.017"]


def test_the_error_of_the_prediction_is_shown(said):
    assert "-7.7%" in row_of(said[0], "ours")


def test_where_we_are_behind_is_said_but_not_of_a_rival_who_is_over_the_budget(said):
    text, _ = said
    assert "! ours: step 7.4% behind rival" in text
    assert "! ours: 8.3% above the floor" in text
    assert row_of(text, "glutton").endswith("over the budget")
    assert "behind glutton" not in text


def test_who_failed_or_is_not_installed_is_named(said):
    text, _ = said
    assert "broken: failed: RuntimeError: it broke" in text
    assert "ramtorch: not installed: pip install ramtorch" in text
    assert "outputs equal, bit for bit: ours\n  mmgp: failed: no" in text


def test_the_picture_is_drawn(said):
    assert said[1].startswith(b"\x89PNG")


def test_simulated_results_are_called_simulated(said):
    assert "(simulated, torch 2.11.0)" in said[0].splitlines()[0]
