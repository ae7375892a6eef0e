"""Everything that may happen to an executor, on a GPU whose work is late: no output differs, and no two tasks race.

The races are found by the plugin of the simulated GPU, after every test. On a real GPU only outputs are compared.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from .. import running
from ..scenarios import SCENARIOS
from ..simulated_gpu import card
from ..waits import leave_out, text_of, waits

pytestmark = pytest.mark.skipif(running.DEVICE != "cuda", reason="needs TEST_DEVICE=cuda, as `make test-gpu` sets it")

# A kernel that reads an address is ordered by its stream. Python that reads one is not.
ON_A_GPU = {name: scenario for name, scenario in SCENARIOS.items() if name != "spilled_and_read_unseen"}
SEEDS = [pytest.param(range(3), id="few"), pytest.param(range(3, 200), id="many", marks=pytest.mark.slow)]


@pytest.mark.parametrize("seeds", SEEDS)
@pytest.mark.parametrize("name", ON_A_GPU)
def test_no_seed_finds_a_race_whatever_the_model_does(name: str, seeds: range) -> None:
    for seed in seeds:
        ON_A_GPU[name](seed)


def _shows_on_a_card(wait: tuple[str, int, int]) -> bool:
    """Whether bytes race without it. Two waits are for what a card does not see, and `checked` does:

    an activation comes back behind the call that leaves room for it; one that is copied out and stays may be reused.
    """
    return not any(thing in text_of(wait) for thing in ("task.after", "spill.left"))


@pytest.mark.skipif(not card.is_here(), reason="only a simulated GPU finds races")
@pytest.mark.filterwarnings("ignore:module forward hook with")
@pytest.mark.parametrize(("file", "first", "last"), [wait for wait in waits() if _shows_on_a_card(wait)])
def test_without_any_one_wait_a_scenario_fails(
    monkeypatch: pytest.MonkeyPatch, file: str, first: int, last: int
) -> None:
    leave_out(monkeypatch, file, first, last)
    assert any(_fails(scenario, seed) for seed in range(4) for scenario in ON_A_GPU.values())


def _fails(scenario: Callable[[int], None], seed: int) -> bool:
    """Whether a scenario gives other outputs, or tasks race in it."""
    card.watch()
    try:
        scenario(seed)
        torch.cuda.synchronize()
        return bool(card.races())
    except (AssertionError, RuntimeError):
        torch.cuda.synchronize()
        return True
    finally:
        card.watch()  # forgets the races that were looked for
