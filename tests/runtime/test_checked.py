"""The executor on a device that trusts nobody: nothing races, nothing reads poison, and no wait is idle."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch

import taskgraph_offload as tgo
from taskgraph_offload.devices.checked import POISON, CheckedDevice

from .. import running
from ..guard import Guard
from ..running import MODELS, STRATEGIES, assert_equal
from ..scenarios import SCENARIOS
from ..waits import leave_out, waits

SEEDS = [pytest.param(range(5), id="few"), pytest.param(range(5, 200), id="many", marks=pytest.mark.slow)]


@pytest.fixture
def few_garbage_collections() -> Iterator[None]:
    """What is there already is not searched again and again for cycles: half of the time otherwise."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("few_garbage_collections")
@pytest.mark.parametrize("seeds", SEEDS)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", MODELS)
def test_no_seed_finds_a_race(name: str, strategy: str, seeds: range) -> None:
    """A cold and a steady forward with each seed. Which operators meet which bytes is the same with all of them."""
    made, device = running.case(name), CheckedDevice()
    with torch.no_grad():
        wanted = made()
        with tgo.Executor(made.model, running.known_plan(name, strategy), device=device) as run:
            for seed in seeds:
                run.pause()
                device.start_over(seed)
                run.resume()
                for _ in range(2):
                    with Guard(run) if seed == seeds[0] else nullcontext():
                        assert_equal(made(), wanted, f"seed {seed}")


@pytest.mark.parametrize("seeds", SEEDS)
@pytest.mark.parametrize("name", SCENARIOS)
def test_no_seed_finds_a_race_whatever_the_model_does(name: str, seeds: range) -> None:
    for seed in seeds:
        SCENARIOS[name](seed)


@pytest.mark.filterwarnings("ignore:module forward hook with")
@pytest.mark.parametrize(("file", "first", "last"), list(waits()))
def test_without_any_one_wait_a_scenario_fails(
    monkeypatch: pytest.MonkeyPatch, file: str, first: int, last: int
) -> None:
    leave_out(monkeypatch, file, first, last)
    assert any(_fails(scenario, seed) for seed in range(4) for scenario in SCENARIOS.values())


def _fails(scenario: Any, seed: int) -> bool:
    try:
        scenario(seed)
    except (AssertionError, tgo.ExecutionError):
        return True
    return False


@pytest.mark.parametrize("device", ["checked", "cpu", "virtual"])
def test_an_operator_that_reads_a_home_is_refused_and_the_next_forward_is_right(device: str) -> None:
    """A block reads a weight of another one. A user sees it on "checked"; in tests every device of the host does so."""
    made = running.case("chain")
    elsewhere = made.model.blocks[3].down
    with torch.no_grad():
        wanted = made()
        with tgo.Executor(made.model, running.known_plan("chain"), device=device):
            handle = made.model.blocks[1].register_forward_hook(lambda block, args, y: y + elsewhere.weight[:, 0])
            with pytest.raises(tgo.ExecutionError, match=r"aten.add.* reads weight 'blocks.3.down.weight' at home"):
                made()
            handle.remove()
            assert_equal(made(), wanted)
            assert (made.inputs["x"] + elsewhere.weight[:, 0]).isfinite().all()  # no forward runs: anybody may read


def test_a_race_names_both_accesses() -> None:
    device = CheckedDevice()
    memory, home = device.allocate(1024), torch.zeros(512, dtype=torch.uint8)
    ready = device.event()
    device.lanes["compute"].record(ready)
    device.lanes["h2d"].wait(ready)
    device.lanes["h2d"].copy(memory[:512], home, "h2d a")
    with pytest.raises(tgo.ExecutionError, match=r"(?s)nothing orders.*h2d a \(h2d lane.*writes.*call b.*reads"):
        device.reached("call b", memory, [(256, 300)], [])


def test_ordered_accesses_pass() -> None:
    device = CheckedDevice()
    memory, home = device.allocate(512), torch.full((512,), 7, dtype=torch.uint8)
    ready, arrived = device.event(), device.event()
    device.lanes["compute"].record(ready)
    device.lanes["h2d"].wait(ready)
    device.lanes["h2d"].copy(memory, home, "h2d a")
    device.lanes["h2d"].record(arrived)
    device.lanes["compute"].wait(arrived)
    device.reached("call a", memory, [(0, 512)], [])
    assert memory.eq(7).all()


def test_a_wait_for_an_unrecorded_event_is_refused() -> None:
    device = CheckedDevice()
    with pytest.raises(tgo.ExecutionError, match="h2d lane waits for an event that nobody has recorded"):
        device.lanes["h2d"].wait(device.event())


def test_reading_what_nobody_wrote_is_refused() -> None:
    device = CheckedDevice()
    memory = device.allocate(512)
    assert memory.eq(POISON).all()
    with pytest.raises(tgo.ExecutionError, match="poison: nobody has written all of what call a"):
        device.reached("call a", memory, [(0, 8)], [])


def test_some_seeds_delay_copies_and_some_hurry_them() -> None:
    done = []
    for seed in range(20):
        device = CheckedDevice(seed)
        home, memory = torch.zeros(64, dtype=torch.uint8), device.allocate(64)
        ready = device.event()
        device.lanes["compute"].record(ready)
        device.lanes["h2d"].wait(ready)
        device.lanes["h2d"].copy(memory, home, "h2d a")
        done.append(bool(memory.eq(0).all()))
    assert {True, False} == set(done)


def test_a_seed_runs_the_same_way_again() -> None:
    made = running.case("chain")
    runs = []
    for _ in range(2):
        with tgo.Executor(made.model, running.known_plan("chain"), device=CheckedDevice(3)) as run:
            made()
            device = run._device
            assert isinstance(device, CheckedDevice)
            runs.append([(access.lane, access.number, access.label) for access in device.accesses])
    assert runs[0] == runs[1]
