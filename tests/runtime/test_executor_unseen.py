"""What happens to weights where torch tells nobody: running statistics, memory that moves, processes that fork."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import taskgraph_offload as tgo

from .. import running
from ..left_behind import everything_of
from ..running import (
    DEVICE,
    STRATEGIES,
    Case,
    assert_equal,
    case,
    devices,
    known_plan,
    plainly,
    plan_of,
)


class NormedBetween(running.Normed):
    """A batch norm between the blocks, too."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        mean = self.last.running_mean
        assert mean is not None
        return self.last(super().forward(x) + mean)


@pytest.mark.parametrize("device", devices("cpu", "checked:0", "checked:1", "checked:2"))
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("make", [running.Normed, NormedBetween])
def test_statistics_are_kept_though_the_plan_was_made_for_eval(
    make: Callable[[], nn.Module], strategy: str, device: str
) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 8).to(DEVICE)
    model, plain = make().eval(), make().eval()
    plain.load_state_dict(model.state_dict())
    plan = plan_of(Case(model, {"x": x}), strategy)
    with torch.no_grad(), tgo.Executor(model, plan, device=device):
        for trains in (False, True, True, False):
            with plainly(plain):
                wanted = plain.train(trains)(x)
            assert torch.equal(model.train(trains)(x), wanted)
            for name, tensor in plain.state_dict().items():
                assert torch.equal(tensor, model.state_dict()[name]), name


@pytest.mark.parametrize("strategy", ["resident", "layerwise", "auto"])
def test_other_data_for_a_weight_in_the_middle_of_a_forward_is_refused_and_kept(strategy: str) -> None:
    made = case("chain")
    plain, weight = case("chain"), made.model.blocks[2].up.weight

    def edit(*_: object) -> None:
        weight.data = weight.data * 1.5

    with torch.no_grad(), tgo.Executor(made.model, known_plan("chain", strategy), device=DEVICE):
        made()
        handle = made.model.blocks[1].register_forward_hook(edit)
        with pytest.raises(tgo.ExecutionError, match=r"blocks.2.up.weight' was given other data .* do that between"):
            made()
        handle.remove()
        plain.model.blocks[2].up.weight.mul_(1.5)
        assert torch.equal(weight, plain.model.blocks[2].up.weight)
        assert_equal(made(), plain())


def test_memory_that_is_shared_with_other_processes_is_the_home_from_then_on() -> None:
    made, plain = case("chain"), case("chain")
    with torch.no_grad(), tgo.Executor(made.model, known_plan("chain"), device=DEVICE):
        for one in (made, plain):
            one()
            one.model.share_memory()
        assert_equal(made(), plain())
        for one in (made, plain):
            one.model.blocks[1].up.weight.mul_(2)
        assert_equal(made(), plain())
    assert_equal(made(), plain())


@pytest.mark.parametrize("lazily", [torch.Tensor.conj, lambda z: z.conj().imag])
def test_a_lazy_conjugate_or_negative_is_refused_before_anything_moves(lazily: Any) -> None:
    class Lazy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(lazily(torch.randn(4, 4, dtype=torch.complex64)), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.w.abs()

    model = nn.Sequential(*(Lazy() for _ in range(3)))
    plan, before = plan_of(Case(model, {"input": torch.randn(4, 4)}), "layerwise"), everything_of(model)
    with pytest.raises(tgo.ExecutionError, match=r"'0.w' is a lazy conjugate or negative .*resolve_conj"):
        tgo.Executor(model, plan, device=DEVICE).attach()
    assert everything_of(model) == before


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_a_forked_process_gets_an_error_and_does_not_hang() -> None:
    made = case("chain")
    with torch.no_grad(), tgo.Executor(made.model, known_plan("chain"), device=DEVICE) as run:
        made()
        child = os.fork()
        if not child:
            code = 2
            try:
                made()
            except tgo.ExecutionError as error:
                run.detach()
                code = 0 if "forked" in str(error) else 1
            finally:
                os._exit(code)
        assert os.waitpid(child, 0)[1] == 0
        made()


def test_stats_begin_anew_with_each_attach() -> None:
    made, found = case("chain"), []
    run = tgo.Executor(made.model, known_plan("chain"), device=DEVICE)
    for _ in range(2):
        with run, torch.no_grad():
            made()
        found.append((run.stats.h2d_bytes, run.stats.copies))
    assert found[0] == found[1]
    assert found[0][0] > 0


def test_the_measured_memory_begins_with_the_arena() -> None:
    made, plan = case("chain"), known_plan("chain")
    with torch.no_grad(), tgo.Executor(made.model, plan, device=DEVICE) as run:
        for _ in range(2):
            made()
        timeline = run.timeline()
    first = timeline.memory[0]
    assert (first.seconds, first.nbytes) == (min(span.start for span in timeline.spans), plan.arena_bytes)
