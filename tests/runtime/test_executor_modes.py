"""Threads, re-entry, and torch's modes: the outputs of the plain model in each of them, or a clear error."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor

import taskgraph_offload as tgo

from ..guard import Guard
from ..left_behind import attached
from ..running import DEVICE, Case, assert_equal, case, known_plan

STRATEGIES = ["layerwise", "auto"]


@pytest.fixture
def made() -> Case:
    return case("chain")


def test_a_second_thread_is_refused_and_the_first_one_is_right(made: Case) -> None:
    with torch.no_grad():
        wanted = made()
    errors: list[Exception | None] = []

    def try_both(*_: object) -> None:
        for call in (made, lambda: made.model.blocks[4](made.inputs["x"])):
            thread = threading.Thread(target=lambda call=call: errors.append(caught(call)))
            thread.start()
            thread.join()

    with attached(made), torch.no_grad():
        handle = made.model.blocks[1].register_forward_hook(try_both)
        assert_equal(made(), wanted)
        handle.remove()
        assert_equal(made(), wanted)
    assert len(errors) == 2
    assert all(isinstance(error, tgo.ExecutionError) and "in another thread" in str(error) for error in errors)


def caught(call: Any) -> Exception | None:
    try:
        call()
    except Exception as error:
        return error
    return None


def test_reentry_is_refused(made: Case) -> None:
    with torch.no_grad():
        wanted = made()
    with attached(made), torch.no_grad():
        handle = made.model.blocks[1].register_forward_pre_hook(lambda *_: made() and None)
        with pytest.raises(tgo.ExecutionError, match="in this thread, further up"):
            made()
        handle.remove()
        assert_equal(made(), wanted)


def test_nothing_can_be_detached_or_paused_from_within(made: Case) -> None:
    with attached(made) as run:
        for act in (run.detach, run.pause):
            handle = made.model.blocks[1].register_forward_pre_hook(lambda *_, act=act: act())
            with pytest.raises(tgo.ExecutionError, match="while a forward is running"):
                made()
            handle.remove()


MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "grad": torch.enable_grad,
    "autocast": lambda: torch.autocast(DEVICE, dtype=torch.bfloat16),
}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_gives_the_outputs_of_the_plain_model(made: Case, strategy: str, mode: str) -> None:
    def within() -> AbstractContextManager[Any]:
        return MODES[mode]()

    with within():
        wanted = made()
    with attached(made, strategy) as run:
        for _ in range(3):
            with within(), Guard(run):
                assert_equal(made(), wanted)
        with within():
            for _ in range(2):
                assert_equal(made(), wanted)


def test_autocast_keeps_no_casts_of_weights_that_have_left(made: Case) -> None:
    plan = known_plan("chain")
    with tgo.Executor(made.model, plan, device=DEVICE), torch.autocast(DEVICE, dtype=torch.bfloat16):
        before = made()[0].cpu()
        with torch.no_grad():
            made.model.blocks[2].down.weight.mul_(2)
        assert not torch.equal(made()[0].cpu(), before)


def test_a_model_made_in_inference_mode() -> None:
    with torch.inference_mode():
        made = case("chain")
        wanted = made()
        with attached(made) as run, Guard(run):
            for _ in range(2):
                assert_equal(made(), wanted)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("frozen", [True, False])
def test_a_backward_through_weights_that_have_left_is_right(made: Case, strategy: str, frozen: bool) -> None:
    made.model.requires_grad_(not frozen)
    plain = Case(copy.deepcopy(made.model).to(DEVICE), made.inputs)

    def grads(made: Case) -> list[Tensor | None]:
        x = made.inputs["x"] = made.inputs["x"].detach().requires_grad_()
        made()[0].square().sum().backward()
        return [x.grad, *(parameter.grad for parameter in made.model.parameters())]

    with attached(made, strategy):
        got = grads(made)
    made.model.zero_grad()
    for one, other in zip(got, grads(plain), strict=True):
        assert one is other is None or (one is not None and other is not None and torch.equal(one.cpu(), other.cpu()))


def test_a_backward_through_a_weight_that_was_changed_is_refused(made: Case) -> None:
    made.model.requires_grad_(False)
    made.inputs["x"].requires_grad_()
    with tgo.Executor(made.model, known_plan("chain"), device=DEVICE):
        outputs = made()
        made.model.blocks[3].up.weight.mul_(2)
        with pytest.raises(tgo.ExecutionError, match=r"'blocks.3.up.weight' was changed"):
            outputs[0].sum().backward()
