"""Calls of CUDA that fail: the error says so, no weight is harmed, nothing stays locked, and the next run is right.

Only a simulated GPU fails on purpose.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from contextlib import suppress

import pytest
import torch
from torch import Tensor, nn

import taskgraph_offload as tgo

from .. import running
from ..running import Case, assert_equal, known_plan, plan_of, spilling
from ..simulated_gpu import card

pytestmark = pytest.mark.skipif(
    not card.is_here(), reason="needs the simulated GPU: a real one does not fail on purpose"
)

FUNCTIONS = [
    *("cudaMalloc", "cudaHostRegister", "cudaHostUnregister", "cudaMemcpyAsync", "cudaLaunchKernel"),
    *("cudaEventCreateWithFlags", "cudaEventRecord", "cudaEventSynchronize", "cudaStreamWaitEvent"),
    *("cudaDeviceSynchronize", "cudaStreamSynchronize"),
]
TRIES = 5  # of the uses of one function, evenly spaced


def streamed() -> tuple[Case, tgo.Plan]:
    """Weights come and go."""
    return running.case("chain"), known_plan("chain")


def spilled() -> tuple[Case, tgo.Plan]:
    """Activations, too."""
    torch.manual_seed(0)
    made = Case(running.Skips(), {"x": torch.randn(64, 16)})
    return made, spilling(plan_of(made, "sequential"), ("~down.0/0", "down.1", "down.2", "up.1"))


def changed() -> tuple[Case, tgo.Plan]:
    """The forward changes weights: they are copied home at the end."""
    torch.manual_seed(0)
    made = Case(running.Normed().train(), {"x": torch.randn(4, 8)})
    return made, plan_of(made)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("scene", [streamed, spilled, changed])
def test_a_call_that_fails_harms_nothing(scene: Callable[[], tuple[Case, tgo.Plan]], function: str) -> None:
    made, plan = scene()
    made.inputs = {key: value.cuda() for key, value in made.inputs.items()}
    before = {name: tensor.clone() for name, tensor in made.model.state_dict().items()}
    pristine = copy.deepcopy(made.model)
    wanted = outputs_of(made, plan)
    after = {name: tensor.clone() for name, tensor in made.model.state_dict().items()}
    made.model.load_state_dict(before)
    locked, first = card.counts().locked_bytes, card.uses(function)
    outputs_of(made, plan)
    made.model.load_state_dict(before)
    uses = card.uses(function) - first
    for nth in sorted({1 + step * uses // TRIES for step in range(TRIES)} if uses else ()):
        where = f"{function}, use {nth} of {uses}"
        card.fail(function, nth)
        with suppress(tgo.OffloadError, RuntimeError):  # some are not needed, and fail nothing
            outputs_of(made, plan)
        card.fail(function, 0)
        if function == "cudaDeviceSynchronize":
            torch.cuda.synchronize()  # nobody else can wait for the card
        tgo.detach(made.model)
        gc.collect()
        assert_unharmed(made.model, pristine, [before, after], where)
        if function == "cudaHostUnregister":
            card.unlock_all()  # pages that CUDA does not unlock stay locked: nobody can help that
        assert card.counts().locked_bytes == locked, f"{where}: pages stay locked"
        made.model.load_state_dict(before)
        assert_equal(outputs_of(made, plan), wanted, where)
        made.model.load_state_dict(before)


def outputs_of(made: Case, plan: tgo.Plan) -> list[Tensor]:
    """What two forwards give, from attaching to detaching."""
    with tgo.Executor(made.model, plan, device="cuda"), torch.no_grad():
        made()
        return [tensor.clone() for tensor in made()]


def assert_unharmed(model: nn.Module, pristine: nn.Module, states: list[dict[str, Tensor]], where: str) -> None:
    """Every weight is on the host and holds what it held, or what the forwards that ran have made of it."""
    allowed = {name: [state[name] for state in states] for name in states[0]}
    for name, tensor in model.state_dict().items():
        assert tensor.device.type == "cpu", f"{where}: {name}"
        if all(torch.equal(state, allowed[name][0]) for state in allowed[name]):
            assert torch.equal(tensor, allowed[name][0]), f"{where}: {name} was changed"
        assert tensor.isfinite().all(), f"{where}: {name}"
