"""Weights that the traced forward did not read: whatever reads them gets them on the device, within the budget."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import taskgraph_offload as tgo

from .. import models
from ..guard import Guard
from ..running import (
    DEVICE,
    Case,
    assert_equal,
    assert_within_budget,
    case,
    devices,
    fails_on_a_gpu,
    only_on_the_cpu,
    plainly,
    plan_of,
)

X = torch.linspace(-1, 1, 8).reshape(2, 4).to(DEVICE)


class Conditioned(nn.Module):
    """As StableAudio's transformer: another argument of the same forward takes it through a projection."""

    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.Linear(4, 4)
        self.blocks = nn.ModuleList(models.Block(4, 64) for _ in range(4))

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        if condition is not None:
            x = x + self.projection(condition)
        for block in self.blocks:
            x = block(x)
        return x


class Sighted(nn.Module):
    """As a vision-language model: a tower that runs only if there is a picture. Its attention reads raw weights."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.ModuleList(nn.MultiheadAttention(4, 2, batch_first=True) for _ in range(3))
        self.position = nn.Parameter(torch.randn(4))
        self.blocks = nn.ModuleList(models.Block(4, 64) for _ in range(4))

    def forward(self, x: Tensor, picture: Tensor | None = None) -> Tensor:
        if picture is not None:
            seen = picture + self.position
            for layer in self.tower:
                seen = layer(seen, seen, seen)[0]
            x = x + seen.mean(0)
        for block in self.blocks:
            x = block(x)
        return x


class Codec(nn.Module):
    """As a VAE: `decode` is planned, `encode` is called too."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(models.Block(4, 64), nn.BatchNorm1d(4), models.Block(4, 64))
        self.decoder = nn.Sequential(*(models.Block(4, 64) for _ in range(4)))

    def encode(self, x: Tensor) -> Tensor:
        return self.encoder(x)

    def decode(self, x: Tensor) -> Tensor:
        return self.decoder(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x))


KINDS: dict[str, tuple[Callable[[], Case], Callable[[Any], Tensor]]] = {
    "another argument": (lambda: Case(Conditioned(), {"x": X}), lambda model: model(X, condition=X)),
    "a tower": (lambda: Case(Sighted(), {"x": X}), lambda model: model(X, picture=X[None])),
    "another method": (lambda: Case(Codec().eval(), {"x": X}, "decode"), lambda model: model.encode(X)),
    "the whole model": (lambda: Case(Codec().eval(), {"x": X}, "decode"), lambda model: model(X)),
}


class Odd(nn.Module):
    """A branch of one kind, which runs only if it is asked to, before four blocks."""

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(models.Block(4, 64) for _ in range(4))
        self.branch, self.spectrum = branch, nn.Parameter(torch.randn(4, dtype=torch.complex64))

    def forward(self, x: Tensor, asks: bool = False, conjugate: bool = False) -> Tensor:
        extra = self.branch(x) if asks else 0
        if conjugate:
            extra = extra + (x * self.spectrum.conj()).imag
        for block in self.blocks:
            x = block(x)
        return x + extra


class Position(nn.Module):
    """Returns a view of its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(16, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.table[: len(x)]


class Calling(nn.Module):
    """Owns a weight, and calls a block that is planned elsewhere in between."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.weight, self.block = nn.Parameter(torch.randn(4, 4)), block

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.block(x * self.weight.mean()), self.weight)


def odd(kind: str) -> Case:
    torch.manual_seed(0)
    norm = nn.utils.weight_norm(nn.Linear(4, 4))  # its hook reads weights before its forward does
    tower = nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), 2).eval()
    branches: dict[str, nn.Module] = {
        "a view of a weight": Position(),
        "batch norm in training": nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)),
        "weight norm": nn.Sequential(norm),
        "a fast path": nn.Sequential(nn.Unflatten(0, (1, -1)), tower, nn.Flatten(0, 1)),
    }
    if kind == "a planned block inside":
        model = Odd(nn.Identity())
        model.branch = Calling(model.blocks[2])
    else:
        model = Odd(branches[kind])
    return Case(model, {"x": X})


@pytest.mark.parametrize("device", devices("cpu", "checked:1", "checked:2"))
@pytest.mark.parametrize(
    "kind", ["a view of a weight", "batch norm in training", "weight norm", "a fast path", "a planned block inside"]
)
def test_branches_that_read_weights_in_odd_ways(kind: str, device: str) -> None:
    made = odd(kind)
    plan = budget_with(plan_of(made, "layerwise"), 2**16 if kind == "a fast path" else 0)  # one operator reads it all
    with torch.no_grad():
        before = {name: tensor.clone() for name, tensor in made.model.state_dict().items()}
        with plainly(made.model):
            wanted = [made.model(X, asks=True) for _ in range(3)] + [made.model(X, conjugate=True), made.model(X)]
        after = {name: tensor.clone() for name, tensor in made.model.state_dict().items()}
        made.model.load_state_dict(before)
        with tgo.Executor(made.model, plan, device=device) as run:
            got = [made.model(X, asks=True) for _ in range(3)] + [made.model(X, conjugate=True), made.model(X)]
            assert_equal(got, wanted)
        assert_within_budget(run)
    for name, tensor in made.model.state_dict().items():
        assert torch.equal(tensor, after[name]), name


def small(**sizes: Any) -> dict[str, Any]:
    return sizes


def oobleck() -> Any:
    from diffusers import AutoencoderOobleck

    sizes = small(encoder_hidden_size=8, decoder_channels=8, downsampling_ratios=[2, 2], channel_multiples=[1, 2])
    return AutoencoderOobleck(**sizes, decoder_input_channels=4, audio_channels=1)


def vq() -> Any:
    from diffusers import VQModel

    return VQModel(block_out_channels=(8,), norm_num_groups=4, num_vq_embeddings=16, latent_channels=4)


def kl() -> Any:
    return case("vae decoder").model


AUTOENCODERS: dict[str, tuple[Callable[[], Any], Any, str, Any, str]] = {  # what is planned, and what is called, too
    "AutoencoderOobleck": (oobleck, torch.ones(1, 4, 4), "decode", torch.ones(1, 1, 16), "encode"),
    "VQModel": (vq, torch.ones(1, 3, 8, 8), "encode", torch.ones(1, 4, 8, 8), "decode"),
    "AutoencoderKL": (kl, torch.ones(1, 4, 8, 8), "decode", torch.ones(1, 3, 16, 16), "encode"),
}


VQ = pytest.param("VQModel", marks=fails_on_a_gpu("cdist looks at devices before any mode can bring the weight"))


@pytest.mark.parametrize("device", devices("cpu", "checked:1"))
@pytest.mark.parametrize("name", ["AutoencoderOobleck", VQ, "AutoencoderKL"])
def test_the_other_method_of_an_autoencoder_runs_beside_the_planned_one(name: str, device: str) -> None:
    make, given, entry, other, method = AUTOENCODERS[name]
    given, other = given.to(DEVICE), other.to(DEVICE)
    torch.manual_seed(0)
    model = make().eval()

    def call(method: str, x: Tensor) -> Tensor:
        found = getattr(model, method)(x, return_dict=False)[0]
        return found.mean if hasattr(found, "mean") and not isinstance(found, Tensor) else found

    plan = tgo.Planner(model, "60%", inputs=(given,), entry=entry, machine="cpu", strategy="layerwise").plan()
    with torch.no_grad():
        with plainly(model):
            wanted = call(entry, given), call(method, other)
        with tgo.Executor(model, plan, device=device) as run:
            for _ in range(2):
                assert_equal([call(entry, given), call(method, other)], list(wanted))
        assert run.stats.demand_loads
        assert_within_budget(run)


@fails_on_a_gpu("within a module that nobody planned, weight.device says that weights are at home")
@pytest.mark.parametrize("device", devices("checked:1"))
def test_a_tied_weight_may_be_read_where_the_plan_does_not_expect_it(device: str) -> None:
    """BART's decoder is planned with the encoder's output; then the encoder runs, too, and shares the embedding."""
    from transformers import BartConfig, BartModel

    torch.manual_seed(0)
    sizes = small(d_model=16, encoder_ffn_dim=32, decoder_ffn_dim=32, vocab_size=64, max_position_embeddings=32)
    layers = small(encoder_layers=2, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2)
    model: Any = BartModel(BartConfig(**sizes, **layers)).eval()
    tokens, seen = torch.ones(1, 5, dtype=torch.long, device=DEVICE), (torch.randn(1, 5, 16).to(DEVICE),)
    decoding = {"decoder_input_ids": tokens, "encoder_outputs": seen, "use_cache": False}
    whole = {"input_ids": tokens, "decoder_input_ids": tokens, "use_cache": False}
    plan = tgo.Planner(model, "60%", inputs=decoding, machine="cpu", strategy="layerwise").plan()
    with torch.no_grad():
        with plainly(model):
            wanted = model(**decoding)[0], model(**whole)[0]
        with tgo.Executor(model, plan, device=device):
            for _ in range(2):
                assert_equal([model(**decoding)[0], model(**whole)[0]], list(wanted))


def test_an_interrupt_anywhere_in_a_branch_that_nobody_planned_loses_no_weight() -> None:
    """Ctrl-C at every 7th line of our own code."""
    made = odd("batch norm in training")
    made.model.eval()
    with torch.no_grad():
        with plainly(made.model):
            wanted = made.model(X, asks=True)
        before = {name: tensor.clone() for name, tensor in made.model.state_dict().items()}
        with tgo.Executor(made.model, plan_of(made, "layerwise"), device=DEVICE):
            for line in range(0, 4000, 7):
                if not interrupted(lambda: made.model(X, asks=True), line):
                    break
                assert_equal([made.model(X, asks=True)], [wanted])
            assert line > 300
            for name, tensor in made.model.state_dict().items():
                assert torch.equal(tensor, before[name]), name


def interrupted(call: Callable[[], Any], line: int) -> bool:
    """Raise at the n-th line that unplanned, arena and copies run; whether there is such a line."""
    left = line

    def trace(frame: Any, event: str, _: Any) -> Any:
        nonlocal left
        if not frame.f_code.co_filename.endswith(("runtime/unplanned.py", "runtime/arena.py", "runtime/copies.py")):
            return None
        if event == "line":
            left -= 1
            if left == -1:
                raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(None)
    return False


def budget_with(plan: tgo.Plan, spare: int) -> tgo.Plan:
    """A plan that leaves some of its budget; for 0 the tight plan itself, so that weights take places in the arena."""
    if not spare:
        return plan
    budget = f"{plan.budget_bytes + spare}B"
    return tgo.Planner.for_trace(plan.trace, budget, strategy="sequential", machine="cpu").plan()


@pytest.mark.parametrize("spare", [0, 2**16])
@pytest.mark.parametrize("device", devices("checked:0", "checked:1", "checked:2"))
@pytest.mark.parametrize("kind", KINDS)
def test_what_the_trace_did_not_read_comes_on_demand(kind: str, device: str, spare: int) -> None:
    torch.manual_seed(0)
    make, other = KINDS[kind]
    made = make()
    plan = budget_with(plan_of(made, "layerwise"), spare)
    with torch.no_grad():
        with plainly(made.model):
            wanted, wanted_other = made(), other(made.model)
        with tgo.Executor(made.model, plan, device=device) as run:
            for _ in range(3):
                with Guard(run):
                    assert_equal(made(), wanted)
                loads = run.stats.demand_loads
                with Guard(run):
                    assert_equal([other(made.model)], [wanted_other])
                assert run.stats.demand_loads > loads
        assert_within_budget(run)
        with plainly(made.model):
            assert_equal([other(made.model)], [wanted_other])


def test_a_planned_forward_pays_nothing_for_weights_that_it_does_not_read() -> None:
    made = Case(Conditioned(), {"x": X})
    with torch.no_grad(), tgo.Executor(made.model, plan_of(made), device=DEVICE) as run:
        for _ in range(3):
            made()
    assert run.stats.demand_loads == run.stats.divergences == 0


def test_a_weight_that_finds_no_room_is_refused_by_name_with_a_budget_that_would_do() -> None:
    torch.manual_seed(0)
    made = Case(Conditioned(), {"x": X})
    made.model.projection = nn.Linear(4, 4)
    made.model.wide = nn.Linear(4, 100_000)  # 1.5 MiB, where the blocks have 2 KiB each
    plan = plan_of(made)
    with torch.no_grad():
        wanted = made()
        with tgo.Executor(made.model, plan, device=DEVICE) as run:
            with pytest.raises(
                tgo.ExecutionError, match=r"reads weight 'wide.(weight|bias)' .* budget of \"\d+B\""
            ) as error:
                made.model.wide(X)
            with Guard(run):
                assert_equal(made(), wanted)
    enough = int(str(error.value).rpartition('budget of "')[2].rpartition("B")[0])
    plan = tgo.Planner.for_trace(plan.trace, f"{enough}B", strategy="sequential", machine="cpu").plan()
    with torch.no_grad():
        with plainly(made.model):
            wanted = [made.model.wide(X)]
        with tgo.Executor(made.model, plan, device=DEVICE) as run, Guard(run):
            assert_equal([made.model.wide(X)], wanted)


def test_unread_weights_of_a_model_on_another_device_leave_it_too() -> None:
    """Their homes are in host memory like all others: `state_dict` and edits see true values."""
    made = Case(Conditioned(), {"x": X})
    before = {name: tensor.clone() for name, tensor in made.model.state_dict().items()}
    with torch.no_grad(), tgo.Executor(made.model, plan_of(made), device=DEVICE):
        made.model(X, condition=X)
        made.model.projection.weight.mul_(2)
        edited = made.model(X, condition=X)
        assert torch.equal(made.model.state_dict()["projection.weight"], 2 * before["projection.weight"])
    with torch.no_grad(), plainly(made.model):
        assert torch.equal(made.model(X, condition=X), edited)


@only_on_the_cpu("on a GPU, weights that nobody planned get no gradients; plans are for inference")
@pytest.mark.parametrize("spare", [0, 2**16])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_unread_weights_are_those_of_the_plain_model(kind: str, spare: int) -> None:
    torch.manual_seed(0)
    make, other = KINDS[kind]
    made = make()
    plan = budget_with(plan_of(made, "layerwise"), spare)
    twin = copy.deepcopy(made.model).to(DEVICE)
    other(twin).square().sum().backward()
    wanted = {name: weight.grad for name, weight in twin.named_parameters()}
    with tgo.Executor(made.model, plan, device=DEVICE):
        loss = other(made.model).square().sum()
        with torch.no_grad():
            made()
        loss.backward()
    for name, weight in made.model.named_parameters():
        if wanted[name] is None:
            assert weight.grad is None
        else:
            assert torch.equal(weight.grad, wanted[name].cpu()), name


def test_an_edit_between_two_reads_of_one_forward_is_seen() -> None:
    class Editing(Conditioned):
        def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
            if condition is None:
                return super().forward(x)
            x = x + self.projection(condition)
            with torch.no_grad():
                self.projection.weight.mul_(2)
            return x + self.projection(condition)

    made = Case(Editing(), {"x": X})
    before = made.model.projection.weight.detach().clone()
    plan = plan_of(made)
    with torch.no_grad():
        with plainly(made.model):
            wanted = made.model(X, condition=X)
        made.model.projection.weight.copy_(before)
        with tgo.Executor(made.model, plan, device=DEVICE):
            assert torch.equal(made.model(X, condition=X), wanted)


@only_on_the_cpu("a device refuses what a GPU cannot do by itself")
def test_checked_refuses_an_operator_that_mixes_a_weight_at_home_with_other_tensors() -> None:
    """A raw read in the code between the blocks, which no module call announces."""

    class Raw(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(models.Block(4, 64, oddities=frozenset({"raw", "empty"})) for _ in range(4))
            self.reads = False

        def forward(self, x: Tensor) -> Tensor:
            last: Any = self.blocks[3]
            if self.reads:
                x = nn.functional.linear(x, last.down.weight[:, :4])
            for block in self.blocks:
                x = block(x)
            return x

    made: Case = Case(Raw(), {"x": X})
    with torch.no_grad(), tgo.Executor(made.model, plan_of(made), device="checked"):
        made()
        made.model.reads = True
        with pytest.raises(
            tgo.ExecutionError, match=r"reads weight 'blocks.3.down.weight' at home: the plan does not know"
        ):
            made()
        made.model.reads = False
        made()


class Wrapper(nn.Module):
    """As a PeftModel: its generate calls the model inside directly."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.base_model = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.base_model(x)

    def generate(self, x: Tensor, steps: int) -> Tensor:
        for _ in range(steps):
            x = self.base_model(x)
        return x


@pytest.mark.parametrize("strategy", ["layerwise", "auto"])
def test_the_inner_model_of_a_wrapper_may_be_called_directly(strategy: str) -> None:
    inner = case("chain").model
    made = Case(Wrapper(Wrapper(inner)), {"x": X})
    plan = plan_of(made, strategy)
    with torch.no_grad():
        with plainly(made.model):
            wanted = made.model.base_model.generate(X, 4)
        with tgo.Executor(made.model, plan, device=DEVICE) as run:
            made()
            made()
            with Guard(run):
                assert_equal([made.model.base_model.generate(X, 4)], [wanted])
                assert_equal([made.model.base_model.forward(X)], made())
    assert run.stats.demand_loads == run.stats.divergences == 0
    steady = sum(task.kind != "compute" for task in plan.steady)
    assert run.stats.copies == sum(task.kind != "compute" for task in plan.cold) + 7 * steady
