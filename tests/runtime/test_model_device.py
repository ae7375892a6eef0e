"""Where things are, as the code of the user and of other libraries sees it while a plan is attached."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

import taskgraph_offload as tgo
from taskgraph_offload.devices.cpu import CpuDevice

from ..left_behind import everything_of
from ..running import Case, plan_of

CPU, META = torch.device("cpu"), torch.device("meta")
X = torch.ones(1, 4)


class Elsewhere(CpuDevice):
    """Says that its memory is on another device than the host's."""

    device = META


class WithDevice(nn.Module):
    """Says where its weights are, as models of other libraries do."""

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device


class Part(WithDevice):
    """Keeps the inputs of its last call, and computes something else."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        self.given = args, kwargs
        return self.linear(X)


class Whole(WithDevice):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = Part(), Part(), nn.Linear(4, 4)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        self.given = args, kwargs
        return self.third(self.first() + self.second())


class Other(Whole):
    """Answers by a property of its own."""

    @property
    def device(self) -> torch.device:
        return torch.empty_like(self.third.weight, device="cpu").device


@pytest.fixture
def model() -> Whole:
    return Whole()


def attached(model: nn.Module) -> tgo.Executor:
    plan = plan_of(Case(model, {"x": X}))
    return tgo.Executor(model, plan, device=Elsewhere())


@pytest.mark.parametrize("kind", [Whole, Other])
def test_an_attached_model_says_where_it_runs_and_no_other_one_does(kind: type[Whole]) -> None:
    model, twin, classes = kind(), kind(), [dict(vars(one)) for one in (WithDevice, Part, Whole, Other)]
    before = everything_of(model)
    with attached(model):
        assert (model.device, model.first.device, model.second.device) == (META, META, META)
        assert type(model) is kind
        assert model.third.weight.device == next(model.parameters()).device == CPU
        assert [one.device for one in (twin, twin.first, copy.deepcopy(model), Whole(), Other(), Part())] == [CPU] * 6
        assert pickle.loads(pickle.dumps(model)).device == CPU
    assert [dict(vars(one)) for one in (WithDevice, Part, Whole, Other)] == classes
    assert model.device == CPU
    assert everything_of(model) == before


@pytest.mark.parametrize("first_leaves_first", [True, False])
def test_models_of_one_class_and_of_its_subclass_answer_each_for_itself(first_leaves_first: bool) -> None:
    models = [Whole(), Other(), Whole()]
    classes = [dict(vars(one)) for one in (WithDevice, Part, Whole, Other)]
    runs = [attached(model).attach() for model in models]
    assert [model.device for model in models] == [META] * 3
    order = [0, 1, 2] if first_leaves_first else [2, 1, 0]
    for count, place in enumerate(order, 1):
        runs[place].detach()
        assert [model.device == CPU for model in models] == [one in order[:count] for one in range(3)]
    assert [dict(vars(one)) for one in (WithDevice, Part, Whole, Other)] == classes


def test_a_model_that_cannot_be_attached_answers_as_before(model: Whole) -> None:
    class Full(Elsewhere):
        def allocate(self, nbytes: int) -> Tensor:
            raise MemoryError

    with pytest.raises(MemoryError):
        tgo.Executor(model, plan_of(Case(model, {"x": X})), device=Full()).attach()
    assert model.device == CPU
    assert "device" not in vars(Whole)


def test_inputs_come_to_the_device_wherever_they_are_in_the_arguments(model: Whole) -> None:
    pair: dict[str, Any] = {"pair": (X, 1), "encoder": BaseModelOutput(last_hidden_state=X)}
    with torch.no_grad(), attached(model):
        model(X, [X, "text"], deep=pair, there=X.to(META), weight=model.third.weight, none=None)
        (first, several), rest = model.given
        moved = [first, several[0], rest["deep"]["pair"][0], rest["deep"]["encoder"].last_hidden_state, rest["there"]]
        assert [tensor.device for tensor in moved] == [META] * 5
        assert rest["weight"] is model.third.weight
        assert isinstance(rest["deep"]["encoder"], BaseModelOutput)
        assert (several[1], rest["deep"]["pair"][1], rest["none"]) == ("text", 1, None)
    assert pair["pair"][0] is X  # the caller's own dict is as it was


@pytest.mark.parametrize("call", ["module", "method"])
def test_inputs_of_a_module_that_is_called_alone_come_to_the_device(model: Whole, call: str) -> None:
    with torch.no_grad(), attached(model):
        for one in (model, model.second):
            (one if call == "module" else one.forward)(X, scale=X)
            assert [one.given[0][0].device, one.given[1]["scale"].device] == [META, META]


def test_containers_of_the_caller_are_handed_on_if_nothing_in_them_must_move(model: Whole) -> None:
    cache: list[Tensor] = [X.to(META)]
    with torch.no_grad(), attached(model):
        for one in (model, model.second):
            one(cache, cache=cache)
            assert one.given[0][0] is one.given[1]["cache"] is cache


def test_the_forward_can_write_into_containers_of_the_caller_beside_inputs_that_move(model: Whole) -> None:
    cache: dict[str, Tensor] = {}
    nested: dict[str, Any] = {"x": X, "kept": [X.to(META)]}
    number = torch.tensor(0.5)
    with torch.no_grad(), attached(model):
        model(X, cache, nested=nested, number=number)
        args, kwargs = model.given
        assert args[1] is cache
        assert kwargs["nested"]["kept"] is nested["kept"]
        assert (args[0].device, kwargs["nested"]["x"].device, kwargs["number"]) == (META, META, number)


def test_a_compiled_block_may_ask(model: Whole) -> None:
    class Asking(Part):
        def forward(self, *args: Any, **kwargs: Any) -> Tensor:
            self.asked = self.device
            return self.linear(X)

    model.second = Asking()
    with torch.no_grad(), attached(model):
        model.second.compile(backend="eager")
        model(X)
        assert model.second.asked == META
    torch._dynamo.reset()
