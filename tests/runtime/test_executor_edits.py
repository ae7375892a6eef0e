"""Weights replaced, edited and converted while a plan is attached: never a value lost, never one that is not there."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import taskgraph_offload as tgo

from ..guard import Guard
from ..running import DEVICE, Case, assert_equal, case, devices, known_plan, plainly, plan_of

STRATEGIES = ["resident", "layerwise", "sequential"]
OTHER = "blocks.1.down.weight"


@contextmanager
def attached(made: Case, strategy: str = "layerwise", **options: Any) -> Iterator[tgo.Executor]:
    """Under a plan, without gradients; every forward is guarded."""
    with tgo.Executor(made.model, known_plan("chain", strategy), device=DEVICE, **options) as run, torch.no_grad():
        yield run


def assert_steps_like_plain(strategy: str, *steps: Callable[[Any], object]) -> None:
    """After each edit the outputs are the plain model's; after `detach` too."""
    made, plain = case("chain"), case("chain")
    with attached(made, strategy) as run:
        made()
        for number, step in enumerate(steps):
            step(made.model)
            step(plain.model)
            with Guard(run):
                assert_equal(made(), plain(), f"edit {number}")
    with torch.no_grad():
        assert_equal(made(), plain(), "detached")
    for name, tensor in made.model.state_dict().items():
        assert torch.equal(tensor, plain.model.state_dict()[name]), name


class Swap:
    """Gives a model other weights and the old ones again; each model its own old ones."""

    def __init__(self, away: Callable[[Any], Any], back: Callable[[nn.Module, Any], None]) -> None:
        self._away, self._back = away, back
        self._kept: dict[int, Any] = {}

    def away(self, model: Any) -> None:
        self._kept[id(model)] = self._away(model)

    def back(self, model: Any) -> None:
        self._back(model, self._kept[id(model)])


def _one_away(model: Any) -> Any:
    old = model.blocks[1].down.weight
    model.blocks[1].down.weight = nn.Parameter(torch.zeros_like(old))
    return old


def _one_back(model: Any, old: Any) -> None:
    model.blocks[1].down.weight = old


def _data_away(model: Any) -> Any:
    old = {name: parameter.data for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.data = torch.full(parameter.shape, 0.5)
    return old


def _data_back(model: Any, old: Any) -> None:
    for name, parameter in model.named_parameters():
        parameter.data = old[name]


def _state_away(model: Any) -> Any:
    old = model.state_dict()
    model.load_state_dict({name: torch.full_like(tensor, 0.25) for name, tensor in old.items()}, assign=True)
    return old


def _state_back(model: Any, old: Any) -> None:
    model.load_state_dict(old, assign=True)


SWAPS = {
    "parameter": (_one_away, _one_back),
    "data": (_data_away, _data_back),
    "load and assign": (_state_away, _state_back),
}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", SWAPS)
def test_weights_that_were_swapped_and_swapped_back_are_the_old_ones(kind: str, strategy: str) -> None:
    swap = Swap(*SWAPS[kind])
    assert_steps_like_plain(strategy, swap.away, swap.back, swap.away, swap.back)
    assert_steps_like_plain(strategy, swap.away, swap.back, swap.away)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_functional_call_leaves_the_weights_and_its_own_tensors_alone(strategy: str) -> None:
    made, plain, other = case("chain"), case("chain"), torch.ones(4, 64, device=DEVICE)
    given = {OTHER: other.reshape(made.model.get_parameter(OTHER).shape)}
    with torch.no_grad(), plainly(plain.model):
        wanted, normal = torch.func.functional_call(plain.model, given, (), plain.inputs), plain()
    with attached(made, strategy):
        made()
        for _ in range(2):
            assert torch.equal(torch.func.functional_call(made.model, given, (), made.inputs), wanted)
            assert_equal(made(), normal)
        torch.func.functional_call(made.model, given, (), made.inputs)
    assert (other == 1).all()
    with torch.no_grad():
        assert_equal(made(), normal)


def test_what_a_caller_gave_stays_tied_to_the_weight() -> None:
    memory: dict[int, Tensor] = {}

    def give(model: Any) -> None:
        memory[id(model)] = torch.full((64 * 4 + 3,), 0.125)
        weight = model.blocks[1].down.weight
        weight.data = memory[id(model)][3:].view(weight.shape)

    assert_steps_like_plain("resident", give, lambda model: memory[id(model)].mul_(2))


class Stateful(nn.Module):
    """A buffer that each forward replaces, and returns."""

    state: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))
        self.register_buffer("state", torch.zeros(2, 4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.state = self.layers[0](x) + self.state * 0.5
        return self.layers(self.state), self.state


def test_a_buffer_that_each_forward_replaces_is_the_callers_to_keep() -> None:
    torch.manual_seed(0)
    made = Case(Stateful(), {"x": torch.randn(2, 4)})
    plain = Case(copy.deepcopy(made.model), made.inputs)
    plan = plan_of(made)
    made.model.state = torch.zeros(2, 4)
    with torch.no_grad():
        wanted = [plain() for _ in range(4)]
        with tgo.Executor(made.model, plan, device=DEVICE):
            got = [made() for _ in range(4)]
        for one, other in zip(got, wanted, strict=True):
            assert_equal(one, other)
        assert_equal(made(), plain())


def test_other_data_under_a_weight_with_an_alias_is_refused_until_it_is_mended() -> None:
    made = Case(nn.Sequential(*(nn.Linear(8, 8) for _ in range(4))), {"input": torch.ones(1, 8)})
    made.model[1].shown = {"rows": [made.model[1].weight.detach()[:2]]}
    with torch.no_grad(), tgo.Executor(made.model, plan_of(made), device=DEVICE):
        wanted, old = made(), made.model[1].weight.data
        made.model[1].weight.data = torch.zeros(8, 8)
        with pytest.raises(tgo.ExecutionError, match=r"'1.weight' is shown in several places.* detach, and plan again"):
            made()
        made.model[1].weight.data = old
        assert_equal(made(), wanted)
        made.model[1].weight.data = torch.zeros(8, 8)
    assert (made.model[1].weight == 0).all()


def test_a_view_of_a_weight_in_a_dict_still_shows_it() -> None:
    made = Case(nn.Sequential(*(nn.Linear(8, 8) for _ in range(4))), {"input": torch.ones(1, 8)})
    made.model[1].shown = {"rows": [made.model[1].weight.detach()[:2]]}
    with torch.no_grad(), tgo.Executor(made.model, plan_of(made), device=DEVICE):
        made()
        made.model[1].weight.fill_(3)
        assert (made.model[1].shown["rows"][0] == 3).all()
    made.model[1].weight.data.fill_(4)
    assert (made.model[1].shown["rows"][0] == 4).all()


CONVERSIONS: dict[str, Callable[[Any], object]] = {
    "half": lambda model: model.half(),
    "double": lambda model: model.double(),
    "channels last": lambda model: model.to(memory_format=torch.channels_last),
    "other data": lambda model: setattr(model[1].weight, "data", torch.zeros_like(model[1].weight)),
    "transposed": lambda model: setattr(model[1].weight, "data", model[1].weight.data.transpose(0, 1)),
    "pruned": lambda model: setattr(model[1].weight, "data", model[1].weight.data[:2]),
}


@pytest.mark.parametrize("before", ["forward", "no forward", "pause", "lazy"])
@pytest.mark.parametrize("conversion", CONVERSIONS)
def test_a_model_that_is_converted_and_then_detached_keeps_what_it_was_given(conversion: str, before: str) -> None:
    torch.manual_seed(0)
    made = Case(nn.Sequential(*(nn.Conv2d(4, 4, 3) for _ in range(4))), {"input": torch.randn(1, 4, 12, 12)})
    plain, convert, threads = copy.deepcopy(made.model), CONVERSIONS[conversion], threading.active_count()
    run = tgo.Executor(made.model, plan_of(made), device=DEVICE, lazy=before == "lazy").attach()
    with torch.no_grad():
        if before in ("forward", "pause"):
            made()
        if before == "pause":
            run.pause()
        convert(made.model)
        convert(plain)
    run.detach()
    assert threading.active_count() == threads
    for name, tensor in made.model.state_dict().items():
        wanted = plain.state_dict()[name]
        assert (tensor.dtype, tensor.shape, tensor.stride()) == (wanted.dtype, wanted.shape, wanted.stride()), name
        assert torch.equal(tensor, wanted), name


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_edits_after_the_last_forward_and_during_a_pause_count(strategy: str) -> None:
    made, plain = case("chain"), case("chain")

    def edit(model: Any) -> None:
        model.blocks[2].up.weight.data = torch.full((64, 4), 0.5)
        model.blocks[0].down.weight.mul_(3)

    with attached(made, strategy) as run:
        made()
        run.pause()
        for model in (made.model, plain.model):
            edit(model)
        run.resume()
        assert_equal(made(), plain())
        run.pause()
        for model in (made.model, plain.model):
            model.blocks[1].up.weight.zero_()
    with torch.no_grad():
        assert_equal(made(), plain())


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", ["blocks.1.up.weight", "blocks.4.up.weight", "scale"])
@pytest.mark.parametrize("device", devices("cpu", "checked"))
def test_a_hook_that_edits_a_weight_during_a_forward_is_heard(name: str, strategy: str, device: str) -> None:
    made, plain = case("chain"), case("chain")

    def edits(model: Any) -> Callable[..., None]:
        def edit(*_: Any) -> None:
            model.get_parameter(name).mul_(0.9)

        return edit

    handle = plain.model.blocks[0].register_forward_hook(edits(plain.model))
    with tgo.Executor(made.model, known_plan("chain", strategy), device=device), torch.no_grad():
        made()
        with torch.no_grad():
            own = made.model.blocks[0].register_forward_hook(edits(made.model))
            for _ in range(3):
                assert_equal(made(), plain())
        own.remove()
        handle.remove()
        assert_equal(made(), plain())
    with torch.no_grad():
        assert_equal(made(), plain())


def test_a_forward_may_give_a_weight_other_data() -> None:
    class Normalising(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            self.weight.data = self.weight.data * 1.5
            return super().forward(x)

    torch.manual_seed(0)
    made = Case(nn.Sequential(*(Normalising(8, 8) for _ in range(4))), {"input": torch.ones(1, 8)})
    plan = plan_of(made)
    plain = Case(copy.deepcopy(made.model), made.inputs)
    with torch.no_grad():
        with tgo.Executor(made.model, plan, device=DEVICE):
            for _ in range(3):
                assert_equal(made(), plain())
        assert_equal(made(), plain())


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_edit_of_one_row_through_data_is_seen(strategy: str) -> None:
    def edit(row: int) -> Callable[[Any], object]:
        return lambda model: model.blocks[3].up.weight.data[row].fill_(9)

    assert_steps_like_plain(strategy, edit(7), edit(33), edit(62))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_weights_that_are_said_to_have_changed_are_loaded_anew(strategy: str) -> None:
    made, plain = case("chain"), case("chain")
    with attached(made, strategy) as run:
        made()
        for model in (made.model, plain.model):
            for block in model.blocks:
                block.up.weight.data.view(-1)[::7] += 0.5
        run.weights_changed()
        assert_equal(made(), plain())
