"""A trace is what a real run does: its weights, calls, writes and memory. And tracing leaves nothing behind."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from taskgraph_offload.planner.capture import capture
from torch import Tensor, nn

from taskgraph_offload.errors import SettingsError, TraceError
from taskgraph_offload.nouns.trace import INPUT, Boundary

from ..models import Block, Net
from ..naive_forward import assert_trace_is_what_happens, counted_flops

CACHES: list[Any] = []
ODDITIES = ["functional", "counts", "raw", "empty"]
X = torch.linspace(-1, 1, 12).reshape(3, 4)


@dataclass(frozen=True)
class Plan:
    """A net to be built: blocks of unequal sizes and dtypes, in any order, some sharing or overlapping weights."""

    blocks: list[tuple[int, torch.dtype, frozenset[str]]]
    order: list[int]
    tied: bool
    overlap: int | None
    scaled: bool
    skip: bool

    def build(self, device: str = "cpu") -> Net:
        with torch.device(device):
            blocks = [Block(4, hidden, dtype, oddities) for hidden, dtype, oddities in self.blocks]
            for one, other in combinations(blocks, 2):
                if self.tied and one.up.weight.shape == other.up.weight.shape and one.dtype == other.dtype:
                    other.up.weight = one.up.weight
            if self.overlap is not None:
                _lay_out_in_one_storage([block for block in blocks if block.dtype == torch.float32], self.overlap)
            return Net(blocks, [index % len(blocks) for index in self.order], self.scaled, self.skip)


def _lay_out_in_one_storage(blocks: list[Block], overlap: int) -> None:
    """As safetensors does, or with each weight overlapping the one before."""
    slab, start = torch.rand(sum(block.down.weight.numel() for block in blocks)), 0
    for block in blocks:
        stop = start + block.down.weight.numel()
        block.down.weight = nn.Parameter(slab[start:stop].view(block.down.weight.shape))
        start = stop - overlap


DTYPES = st.sampled_from([torch.float32, torch.float64, torch.bfloat16])
BLOCKS = st.lists(
    st.tuples(st.integers(1, 9), DTYPES, st.frozensets(st.sampled_from(ODDITIES))), min_size=1, max_size=4
)
ORDERS = st.lists(st.integers(0, 3), min_size=1, max_size=5)
OVERLAPS = st.none() | st.integers(0, 2)
PLANS = st.builds(Plan, BLOCKS, ORDERS, st.booleans(), OVERLAPS, st.booleans(), st.booleans())


@settings(max_examples=40)
@given(PLANS)
def test_any_model_is_traced_as_it_runs(plan: Plan) -> None:
    net = plan.build()
    trace = capture(net, X)
    assert trace.source == "fake"
    assert_trace_is_what_happens(net, {"x": X}, trace)
    assert trace.flops == counted_flops(net, {"x": X})


@settings(max_examples=40)
@given(PLANS)
def test_a_weight_is_the_bytes_that_names_share(plan: Plan) -> None:
    net = plan.build()
    named = [*net.named_parameters(remove_duplicate=False), *net.named_buffers(remove_duplicate=False)]
    places = {name: set(range(t.data_ptr(), t.data_ptr() + t.nbytes)) for name, t in named}
    together = {name: {name} for name in places}
    for (one, first), (other, second) in combinations(named, 2):
        if places[one] & places[other] or first is second:
            together[one] |= together[other]
            for name in together[one]:
                together[name] = together[one]
    expected = {frozenset(names): len(set().union(*(places[name] for name in names))) for names in together.values()}
    trace = capture(net, X)
    assert {frozenset([w.name, *w.aliases]): w.nbytes for w in trace.weights.values()} == expected


@settings(max_examples=20)
@given(PLANS)
def test_the_meta_device_and_the_cpu_give_one_trace(plan: Plan) -> None:
    net = plan.build()
    assert capture(plan.build("meta"), X.to("meta")).fingerprint == capture(net, X).fingerprint


def test_pieces_begin_where_weights_are_met_and_activations_last_until_dropped() -> None:
    net = Net([Block(4, 8), Block(4, 2)], [0, 1, 0], scaled=True, skip=True)
    trace = capture(net, X)
    assert [call.name for call in trace.calls] == [
        *(":start", "blocks.0", "blocks.0:after", "blocks.1", "blocks.1:after", "blocks.0#2", "blocks.0#2:after")
    ]
    assert [piece.boundary for piece in trace.calls[5].pieces] == [
        Boundary("blocks.0", "enter", 1),
        Boundary("blocks.0.down", "enter", 1),
    ]
    assert trace.calls[2].boundary == Boundary("blocks.0", "exit", 0)
    assert trace.fixed == {"scale": "read between blocks"}
    assert trace.calls[1].flops == 2 * 3 * 4 * 8 * 2
    skip, *rest = trace.activations
    assert (skip.nbytes, skip.producer, skip.until, skip.uses) == (X.nbytes, INPUT, 10, (0, 9))
    scaled = [a for a in rest if a.name == ":start/0"]
    assert [(a.nbytes, a.producer, a.uses, a.until) for a in scaled] == [(X.nbytes, 0, (1, 2), 3)]
    returned = [a for a in rest if a.until == 10]
    assert [(a.producer, a.nbytes) for a in returned] == [(8, X.nbytes)]


def cached_unless_told(function: Callable[[int], Tensor]) -> Callable[[int], Tensor]:
    cached = functools.lru_cache(function)
    CACHES.append(cached)

    @functools.wraps(function)
    def wrapper(size: int) -> Tensor:
        return cached(size)

    return wrapper


def test_what_a_module_was_called_with_is_gone_before_the_next_operator() -> None:
    net = nn.Sequential(nn.Linear(4, 100), nn.Linear(100, 2), nn.ReLU())
    trace = capture(net, X)
    assert [call.transient_bytes for call in trace.calls] == [
        4 * 3 * (4 + 100),
        4 * 3 * (4 + 100 + 2),
        4 * 3 * (4 + 2 + 2),
    ]


def test_a_plain_tensor_is_there_from_the_start_however_late_it_is_used() -> None:
    class Late(nn.Sequential):
        table: Tensor

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.table[0]

    model = Late(nn.Linear(4, 100), nn.Linear(100, 2))
    plain = [call.transient_bytes for call in capture(nn.Sequential(*model), X).calls]
    model.table = torch.zeros(500, 2)
    trace = capture(model, X)
    assert [call.transient_bytes - model.table.nbytes for call in trace.calls[:2]] == plain
    assert [a.uses for a in trace.activations if a.producer == INPUT and a.nbytes == model.table.nbytes] == [(2,)]


def test_calls_of_confusing_modules_have_names_of_their_own() -> None:
    class Confusing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name in ("x", "x#2", "x:after"):
                self.add_module(name, nn.Linear(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            for name in ("x", "x#2", "x", "x:after"):
                x = self.get_submodule(name)(x) + 1
            return x

    names = [call.name for call in capture(Confusing(), X, blocks=["x*"]).calls]
    assert names[::2] == ["x", "x#2", "x#3", "x:after#2"]
    assert len(set(names)) == len(names) == 8


class Keeper(nn.Module):
    """Keeps things wherever a module can, draws random numbers, and may fail at the end."""

    def __init__(self, fail: bool = False) -> None:
        super().__init__()
        self.layer, self.norm, self.dropout = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)
        self.kept: list[Tensor] = []
        self.table: dict[str, Any] = {"inner": [1]}
        self.fail = fail

    @staticmethod
    @cached_unless_told
    def positions(size: int) -> Tensor:
        return torch.arange(size)

    def forward(self, x: Tensor) -> Tensor:
        y = self.dropout(self.norm(self.layer(x))) + self.positions(4) + torch.rand(4) + random.random()
        self.last = y
        self.kept.append(y)
        self.table["inner"].append(y)
        self.norm.momentum = 0.5
        x.add_(1)
        if self.fail:
            raise RuntimeError("the end")
        return y


def _all_of(model: Keeper) -> Any:
    state = {name: (id(t), t._version, t.detach().clone()) for name, t in model.state_dict(keep_vars=True).items()}
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    modes = [module.training for module in model.modules()]
    kept = (list(model.kept), list(model.table["inner"]), model.norm.momentum, CACHES[0].cache_info().currsize)
    return [(k, i, v, t.tolist()) for k, (i, v, t) in state.items()], attributes, modes, kept, random.getstate()


@pytest.mark.parametrize("fail", [False, True])
def test_tracing_leaves_nothing_behind(fail: bool) -> None:
    model, x = Keeper(fail).train(), X.clone()
    before, number_before = _all_of(model), torch.get_rng_state()
    if fail:
        with pytest.raises(TraceError, match="the end"):
            capture(model, x)
    else:
        trace = capture(model, x)
        assert {w for call in trace.calls for w in call.writes} == {
            *("norm.running_mean", "norm.running_var", "norm.num_batches_tracked")
        }
        assert trace.fixed["norm.running_mean"] == "changed by the forward"
    assert _all_of(model) == before
    assert torch.equal(torch.get_rng_state(), number_before)
    assert torch.equal(x, X)
    assert not torch.nn.modules.module._global_forward_hooks
    assert not torch.nn.modules.module._global_forward_pre_hooks


class Peeks(nn.Module):
    """Looks at data, so that only a real run will do; and changes a buffer and an input on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.seen: Tensor
        self.register_buffer("seen", torch.zeros(5))

    def forward(self, x: Tensor) -> Tensor:
        self.seen[1:3].add_(x.sum())
        x.mul_(2)
        torch.rand(2)
        for layer in self.layers[: 2 if x.sum().item() > 100 else 3]:
            x = layer(x)
        return x[x[:, 0] > 0]


def test_a_forward_that_looks_at_data_is_run_once_for_real_and_undone() -> None:
    model, x, number_before = Peeks(), X.clone(), torch.get_rng_state()
    trace = capture(model, x)
    assert trace.source == "real"
    assert [call.block for call in trace.calls if call.block] == ["layers.0", "layers.1", "layers.2"]
    assert trace.fixed == {"seen": "changed by the forward"}
    assert not model.seen.any()
    assert torch.equal(x, X)
    assert torch.equal(torch.get_rng_state(), number_before)
    assert_trace_is_what_happens(model, {"x": x}, trace)
    with pytest.raises(TraceError, match=r"meta device\. Load them"):
        capture(Peeks().to("meta"), X)
    with pytest.raises(TraceError, match="give real ones"):
        capture(model, X.to("meta"))


def test_a_slab_of_weights_that_is_used_whole_counts_for_each() -> None:
    class Slab(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.slab = torch.rand(32)
            self.a, self.b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
            self.a.weight, self.b.weight = (nn.Parameter(part.view(4, 4)) for part in self.slab.chunk(2))

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x)) * self.slab.mean()

    model = Slab()
    trace = capture(model, X)
    assert set(trace.fixed) == {"a.weight", "b.weight"}
    assert_trace_is_what_happens(model, {"x": X}, trace)


def test_what_cannot_be_traced_says_why() -> None:
    net = Net([Block(4, 8)], [0])
    with pytest.raises(TraceError, match="nothing to offload"):
        capture(nn.ReLU(), X)
    with pytest.raises(TraceError, match=r"Net.forward\(float32\[3, 5\]\) failed.*shape") as caught:
        capture(net, torch.zeros(3, 5))
    assert isinstance(caught.value.__cause__, RuntimeError)
    with pytest.raises(TraceError, match="unexpected keyword argument 'y'"):
        capture(net, {"y": X})
    with pytest.raises(SettingsError, match="no such method"):
        capture(net, X, entry="decode")
    with pytest.raises(SettingsError, match=r"torch\.nn\.Module"):
        capture(lambda x: x, X)  # type: ignore[arg-type]
    net.blocks[0].up.to("meta")
    with pytest.raises(TraceError, match=r"'blocks.0.up.weight' on meta.*model.to\('cpu'\)"):
        capture(net, X)
