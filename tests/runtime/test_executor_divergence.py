"""Whatever a forward does that the plan did not expect: right outputs or a clear error, and the next forward right."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

import taskgraph_offload as tgo
from taskgraph_offload.runtime.conductor import Conductor
from taskgraph_offload.runtime.needs import Side

from .. import running
from ..guard import Guard
from ..left_behind import attached, everything_of
from ..running import DEVICE, Case, assert_equal, case, known_plan, plainly

STRATEGIES = ["layerwise", "auto"]


@pytest.fixture
def made() -> Case:
    return case("chain")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_blocks_may_be_skipped_repeated_and_called_in_any_order(made: Case, strategy: str) -> None:
    chance = random.Random(0)
    with torch.no_grad(), attached(made, strategy) as run:
        for _ in range(25):
            made.model.order = chance.choices(range(5), k=chance.randrange(8))
            with Guard(run):
                outputs = made()
            run.pause()  # and as a plain model, from homes
            assert_equal(outputs, plain(made))
            run.resume()
        assert run.stats.divergences > 0
        assert run.stats.demand_loads > 0


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_after_a_divergence_the_plan_resumes(made: Case, strategy: str) -> None:
    with torch.no_grad():
        wanted = made()
        with attached(made, strategy) as run:
            made()
            made.model.order = [3, 0]
            made()
            made.model.order = range(5)
            made()
            divergences, loads, copies = run.stats.divergences, run.stats.demand_loads, run.stats.copies
            for _ in range(3):
                with Guard(run):
                    assert_equal(made(), wanted)
            steady = sum(task.kind != "compute" for task in run.plan.steady)
            assert (run.stats.divergences, run.stats.demand_loads) == (divergences, loads)
            assert run.stats.copies == copies + 3 * steady


def plain(made: Case) -> list[torch.Tensor]:
    """The same forward on a copy that knows no executor."""
    twin = running.case("chain")
    twin.model.load_state_dict(made.model.state_dict())
    twin.model.order = made.model.order
    return Case(twin.model, made.inputs)()


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_in_any_block_leaves_the_model_fit_for_the_next_forward(
    made: Case, strategy: str, error: type[BaseException]
) -> None:
    with torch.no_grad():
        wanted = made()
        with attached(made, strategy) as run:
            for block in made.model.blocks:
                for register in (block.register_forward_pre_hook, block.down.register_forward_hook):
                    handle = register(raising(error))
                    with pytest.raises(error, match="in a block"):
                        made()
                    handle.remove()
                    assert_all_home(run)
                    with Guard(run):
                        assert_equal(made(), wanted)


def raising(error: type[BaseException]) -> Any:
    def hook(*_: object) -> None:
        raise error("in a block")

    return hook


def assert_all_home(run: tgo.Executor) -> None:
    assert run._homes is not None
    for member in run._homes.tensors():
        assert member.tensor.data_ptr() == member.home.data_ptr(), member.weight


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_interrupt_at_any_boundary_leaves_the_model_fit(
    made: Case, strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Right before the executor hears of a boundary, and right after it has served it."""
    with torch.no_grad():
        wanted = made()
        for first in (True, False):
            for number in range(11):
                with attached(made, strategy) as run:
                    made()
                    with monkeypatch.context() as patch:
                        patch.setattr(Conductor, "reach", interrupting(number, first))
                        with pytest.raises(KeyboardInterrupt):
                            made()
                    assert_all_home(run)
                    with Guard(run):
                        assert_equal(made(), wanted)


def interrupting(number: int, first: bool) -> Any:
    reach, left = Conductor.reach, [number]

    def interrupted(self: Conductor, module: str, side: Side) -> None:
        left[0] -= 1
        if left[0] < 0 and first:
            raise KeyboardInterrupt
        reach(self, module, side)
        if left[0] < 0:
            raise KeyboardInterrupt

    return interrupted


def test_an_error_inside_the_context_detaches(made: Case) -> None:
    def work() -> None:
        with attached(made):
            handle = made.model.blocks[2].register_forward_pre_hook(raising(KeyboardInterrupt))
            try:
                made()
            finally:
                handle.remove()

    with pytest.raises(KeyboardInterrupt):
        work()
    assert not made.model.blocks[2]._forward_hooks


def test_a_block_may_be_called_by_itself(made: Case) -> None:
    x = made.inputs["x"]
    with torch.no_grad():
        with plainly(made.model):
            wanted, alone = made(), made.model.blocks[3](x)
        with attached(made) as run:
            for _ in range(2):
                with Guard(run):
                    assert torch.equal(made.model.blocks[3](x), alone)
                    assert_equal(made(), wanted)
            handle = made.model.blocks[3].register_forward_pre_hook(raising(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                made.model.blocks[3](x)
            handle.remove()
            with Guard(run):
                assert torch.equal(made.model.blocks[3](x), alone)
                assert_equal(made(), wanted)


def test_another_method_of_the_model_is_served_too() -> None:
    made, image = case("vae decoder"), torch.randn(1, 3, 16, 16).to(DEVICE)
    with torch.no_grad():
        with plainly(made.model):
            wanted, decoded = made.model(image).sample, made()
        with tgo.Executor(made.model, known_plan("vae decoder"), device=DEVICE) as run:
            for _ in range(2):
                with Guard(run):
                    assert torch.equal(made.model(image).sample, wanted)
                    assert_equal(made(), decoded)


def test_two_executors_on_one_model_are_refused(made: Case) -> None:
    with attached(made):
        with pytest.raises(tgo.ExecutionError, match="attached already"):
            tgo.Executor(made.model, known_plan("chain"), device=DEVICE).attach()
        with torch.no_grad():
            made()


def test_a_plan_for_another_model_is_refused_and_leaves_no_trace() -> None:
    made = case("vit")
    before = everything_of(made.model)
    with pytest.raises(tgo.PlanError):
        tgo.Executor(made.model, known_plan("chain"), device=DEVICE).attach()
    assert everything_of(made.model) == before


def test_an_executor_can_be_attached_again(made: Case) -> None:
    run = tgo.Executor(made.model, known_plan("chain"), device=DEVICE)
    with torch.no_grad():
        wanted = made()
        for _ in range(2):
            with run:
                assert_equal(made(), wanted)
            assert_equal(made(), wanted)
    with pytest.raises(tgo.ExecutionError, match="not attached"):
        run.pause()
