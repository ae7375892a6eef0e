"""Weights seen from outside while a plan is attached: they read as on the plain model, and edits of them count."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import taskgraph_offload as tgo

from .. import models, running
from ..guard import Guard
from ..running import DEVICE, STRATEGIES, Case, assert_equal, case, known_plan, plan_of

Edit = Callable[[Any], Any]


@pytest.fixture(params=["resident", "layerwise", "auto"])
def attached(request: pytest.FixtureRequest) -> Iterator[Case]:
    """A chain under a plan, after two forwards: residents are there, the first blocks fetched ahead."""
    made = case("chain")
    with tgo.Executor(made.model, known_plan("chain", request.param), device=DEVICE), torch.no_grad():
        made()
        made()
        yield made


def assert_like_plain(made: Case, edit: Edit) -> None:
    """After an edit, and after one more forward, the model is as a plain one that was edited the same."""
    plain = case("chain")
    for _ in range(2):
        with torch.no_grad():
            edit(made.model)
            edit(plain.model)
            assert_equal(made(), plain())
    for name, tensor in made.model.state_dict().items():
        assert torch.equal(tensor.cpu(), plain.model.state_dict()[name].cpu()), name


def test_weights_read_as_on_the_plain_model(attached: Case) -> None:
    plain = case("chain").model
    assert [name for name, _ in attached.model.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert_same_weights(attached.model, plain)
    assert_same_weights(copy.deepcopy(attached.model), plain)


def assert_same_weights(model: Any, plain: nn.Module) -> None:
    wanted = plain.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, wanted[name]), name
        assert tensor.stride() == wanted[name].stride(), name


def _edit_in_place(model: Any) -> None:
    for parameter in model.parameters():
        parameter.mul_(1.25)


def _edit_data(model: Any) -> None:
    for parameter in model.parameters():
        parameter.data += 0.5


def _replace_data(model: Any) -> None:
    for block in model.blocks:
        block.down.weight.data = block.down.weight.data * 0.75
        block.up.bias.data = torch.ones(block.up.bias.shape)


def _replace_parameters(model: Any) -> None:
    for block in model.blocks:
        block.down.weight = nn.Parameter(block.down.weight.detach() * 1.5)


def _edit_one_late(model: Any) -> None:
    model.blocks[4].up.weight[0, 0] = 3.0


def _edit_one_early(model: Any) -> None:
    model.blocks[0].down.weight[0, 0] = 3.0
    model.scale[1] = 2.0


def _load(model: Any) -> None:
    model.load_state_dict({name: tensor * 2 + 1 for name, tensor in case("chain").model.state_dict().items()})


def _load_and_assign(model: Any) -> None:
    state = {name: tensor * 2 + 1 for name, tensor in case("chain").model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def _merge_low_rank(model: Any) -> None:
    """As peft merges: through `.data`."""
    for block in model.blocks:
        left, right = torch.linspace(-1, 1, 64).reshape(64, 1), torch.ones(1, 4)
        block.up.weight.data += 0.1 * left @ right


class Adapted(nn.Module):
    """A layer with a low-rank addition beside it."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer, self.down, self.up = layer, nn.Linear(4, 2, bias=False), nn.Linear(2, 64, bias=False)
        nn.init.ones_(self.down.weight)
        nn.init.constant_(self.up.weight, 0.25)
        self.down.to(DEVICE), self.up.to(DEVICE)  # nobody has planned them, so they are the user's to move

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.up(self.down(x))


def _add_adapters(model: Any) -> None:
    for block in model.blocks:
        if isinstance(block.up, nn.Linear):
            block.up = Adapted(block.up)


EDITS = [
    *(_edit_in_place, _edit_data, _replace_data, _replace_parameters, _edit_one_late, _edit_one_early),
    *(_load, _load_and_assign, _merge_low_rank, _add_adapters),
]


@pytest.mark.parametrize("edit", EDITS)
def test_edits_between_forwards_count(attached: Case, edit: Edit) -> None:
    assert_like_plain(attached, edit)


def test_a_copy_of_an_attached_model_is_a_plain_model(attached: Case) -> None:
    wanted = attached()
    stream = io.BytesIO()
    torch.save(attached.model, stream)
    stream.seek(0)
    copies = [
        copy.deepcopy(attached.model),
        pickle.loads(pickle.dumps(attached.model)),
        torch.load(stream, weights_only=False),
    ]
    for twin in copies:
        assert_equal(Case(twin, attached.inputs)(), wanted)
        for parameter in twin.parameters():
            parameter.zero_()
    assert_equal(attached(), wanted)


def test_saving_one_weight_saves_no_more_than_it(attached: Case) -> None:
    stream = io.BytesIO()
    torch.save(attached.model.blocks[1].down.weight, stream)
    assert stream.tell() < 4096


def test_a_weight_of_another_kind_is_refused(attached: Case) -> None:
    attached.model.blocks[1].half()
    with pytest.raises(tgo.ExecutionError, match=r"'blocks.1.*' was torch.float32 .* detach, and plan again"):
        attached()
    attached.model.blocks[1].float()


def test_the_signature_of_the_forward_is_still_the_models_own(attached: Case) -> None:
    import inspect

    assert list(inspect.signature(attached.model.forward).parameters) == ["x"]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_tied_weights_stay_tied_and_travel_once(strategy: str) -> None:
    made = case("llama")
    embedding, head = made.model.model.embed_tokens.weight, made.model.lm_head.weight
    assert embedding is head
    plan = known_plan("llama", strategy)
    with tgo.Executor(made.model, plan, device=DEVICE), torch.no_grad():
        made()
        embedding.mul_(2)
        outputs = made()
        assert made.model.lm_head.weight is made.model.model.embed_tokens.weight
    assert made.model.lm_head.weight is made.model.model.embed_tokens.weight is embedding
    with torch.no_grad():
        assert_equal(made(), outputs)
    assert sum(name.endswith(("embed_tokens.weight", "lm_head.weight")) for name in plan.seats) == 1


class Views(nn.Module):
    """Weights that are views of one storage, with strides of their own; and a plain attribute that shows one."""

    def __init__(self) -> None:
        super().__init__()
        whole = torch.randn(8, 16)
        self.top: Tensor
        self.bottom: Tensor
        self.register_buffer("top", whole[:5])
        self.register_buffer("bottom", whole[3:].t())
        self.columns = nn.Parameter(torch.randn(16, 8).t())
        self.alias = self.columns.detach()[:4]
        self.head = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = x @ self.top.t() @ self.top @ self.bottom @ self.bottom.t()
        return self.head(x @ self.columns.t() + (self.alias.sum() if self.alias.sum() > 0 else 0))


class Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Views(), nn.Linear(8, 16), Views(), nn.Linear(8, 16), Views()])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize("strategy", ["resident", "sequential", "layerwise"])
def test_views_of_one_storage_keep_their_strides_and_their_ties(strategy: str) -> None:
    torch.manual_seed(0)
    made = Case(Wrapped(), {"x": torch.randn(2, 16)})
    with torch.no_grad():
        wanted = made()
    strides = {name: tensor.stride() for name, tensor in made.model.state_dict().items()}
    with tgo.Executor(made.model, plan_of(made, strategy), device=DEVICE) as run, torch.no_grad():
        for _ in range(2):
            with Guard(run):
                assert_equal(made(), wanted)
        made.model.blocks[0].top[4, 0] = 9.0
        assert made.model.blocks[0].bottom[0, 1] == 9.0
    assert {name: tensor.stride() for name, tensor in made.model.state_dict().items()} == strides
    with torch.no_grad():
        made.model.blocks[0].top[3, 0] = 7.0
        made.model.blocks[0].columns[0, 0] = 5.0
    assert made.model.blocks[0].bottom[0, 0] == 7.0
    assert made.model.blocks[0].alias[0, 0] == 5.0


@pytest.mark.parametrize("oddity", ["raw", "empty", "functional", "counts"])
def test_odd_weights_are_right(oddity: str) -> None:
    torch.manual_seed(0)
    blocks = [
        models.Block(4, 32, oddities=frozenset({oddity}), dtype=dtype) for dtype in (torch.float32, torch.bfloat16) * 2
    ]
    made = Case(models.Net(blocks, [0, 1, 2, 3, 1]), {"x": torch.randn(2, 4)})
    twin = copy.deepcopy(made.model)
    with tgo.Executor(made.model, plan_of(made), device=DEVICE) as run, torch.no_grad():
        for _ in range(3):
            with Guard(run):
                assert_equal(made(), Case(twin, made.inputs)())
    for name, tensor in [*made.model.named_parameters(), *made.model.named_buffers()]:
        assert torch.equal(tensor, dict([*twin.named_parameters(), *twin.named_buffers()])[name]), name


def test_weights_that_nobody_reads_go_home_and_come_back_with_the_same_value() -> None:
    made = running.chain()
    made.model.unread = nn.Parameter(torch.randn(100))
    unread, value = made.model.unread, made.model.unread.detach().clone()
    with tgo.Executor(made.model, plan_of(made), device=DEVICE):
        made()
        assert torch.equal(made.model.unread, value)
        assert torch.equal(made.model.state_dict()["unread"], value)
    assert made.model.unread is unread
    assert torch.equal(unread, value)
