"""Offloaded models give exactly the outputs of the plain ones, within the budget, and touch no home."""

from __future__ import annotations

import copy
import gc
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from taskgraph_offload.planner.capture import capture
from torch import nn
from torch._subclasses import FakeTensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import taskgraph_offload as tgo

from .. import running
from ..guard import Guard
from ..running import (
    DEVICE,
    MODELS,
    STRATEGIES,
    Case,
    assert_equal,
    assert_runs_like,
    assert_within_budget,
    case,
    devices,
    only_on_the_cpu,
    plainly,
    plan_of,
    spilling,
)


@pytest.mark.parametrize("name", MODELS)
def test_every_strategy_gives_the_outputs_of_the_plain_model(name: str) -> None:
    made = case(name)
    with torch.no_grad():
        wanted = made()
    for strategy in STRATEGIES:
        plan = running.known_plan(name, strategy)
        run = assert_runs_like(made, plan, wanted)
        assert (run.stats.divergences, run.stats.demand_loads) == (0, 0), strategy
        assert_within_budget(run)
        assert_equal(made_without_grad(made), wanted, "after detach")


def made_without_grad(made: Case) -> list[torch.Tensor]:
    with torch.no_grad():
        return made()


class Grouped(nn.Module):
    """Attention as in transformers: with grouped keys when it runs, with repeated ones and a mask when it is traced."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.out = nn.Linear(16, 16), nn.Linear(16, 8), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key = (made(x).unflatten(-1, (-1, 4)).transpose(1, 2) for made in (self.query, self.key))
        if isinstance(x, FakeTensor):
            key = key[:, :, None].expand(-1, -1, 2, -1, -1).reshape(query.shape)
            mask = torch.ones(query.shape[2], query.shape[2], dtype=torch.bool).tril()
            found = scaled_dot_product_attention(query, key, key, attn_mask=mask)
        else:
            found = all_scores(query, key, key, is_causal=True, enable_gqa=True)
        return self.out(found.transpose(1, 2).flatten(2))


def all_scores(*args: Any, **options: Any) -> torch.Tensor:
    """Attention as older versions of torch compute grouped keys on the CPU."""
    with sdpa_kernel(SDPBackend.MATH):
        return scaled_dot_product_attention(*args, **options)


@only_on_the_cpu("a GPU has other kernels for attention")
def test_attention_that_is_fused_only_while_it_is_traced_stays_in_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("taskgraph_offload.planner.capture.recorder.scaled_dot_product_attention", all_scores)
    made = Case(Grouped(), {"x": torch.randn(1, 64, 16)})
    with torch.no_grad():
        assert_runs_like(made, plan_of(made, "sequential"), made())
    on_cpu, on_gpu = (capture(made.model, made.inputs, on_cpu=on_cpu) for on_cpu in (True, False))
    assert on_cpu.activation_bytes > on_gpu.activation_bytes + 4 * 64 * 64 * 4, "all scores of four heads"
    cpu = tgo.Machine.preset("cpu")
    assert [call.cost(cpu) for call in on_cpu.calls] == [call.cost(cpu) for call in on_gpu.calls]


@pytest.mark.parametrize("strategy", ["layerwise", "auto"])
def test_a_llama_generates_the_same_tokens(strategy: str) -> None:
    made = case("llama")
    ids = torch.arange(5, device=DEVICE).reshape(1, 5)
    arguments = dict(max_new_tokens=6, do_sample=False, use_cache=True, pad_token_id=0)
    with plainly(made.model):
        wanted = made.model.generate(ids, **arguments)
    with tgo.Executor(made.model, plan_of(made, strategy), device=DEVICE) as run, Guard(run):
        assert torch.equal(made.model.generate(ids, **arguments), wanted)


def test_a_whisper_generates_the_same_tokens() -> None:
    made = case("whisper")
    arguments = dict(max_new_tokens=4, do_sample=False, language=None, task=None)
    features = made.inputs["input_features"]
    with plainly(made.model):
        wanted = made.model.generate(features, **arguments)
    with tgo.Executor(made.model, plan_of(made), device=DEVICE) as run, Guard(run):
        assert torch.equal(made.model.generate(features, **arguments), wanted)


@pytest.mark.parametrize("strategy", ["sequential", "layerwise", "auto"])
def test_batch_norm_in_training_keeps_the_statistics_of_the_plain_model(strategy: str) -> None:
    torch.manual_seed(0)
    made = Case(running.Normed().train(), {"input": torch.randn(4, 8)})
    made.inputs = {"x": made.inputs["input"]}
    plain = Case(copy.deepcopy(made.model), made.inputs)
    with tgo.Executor(made.model, plan_of(made, strategy), device=DEVICE) as run, torch.no_grad():
        for _ in range(3):
            with Guard(run):
                assert_equal(made(), plain())
            assert_same_state(made.model, plain.model)
    assert_same_state(made.model, plain.model)


def assert_same_state(model: nn.Module, plain: nn.Module) -> None:
    wanted = plain.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, wanted[name]), name


@pytest.mark.parametrize("device", devices("cpu", "checked:1", "checked:2", "checked:3"))
def test_skips_that_leave_the_device_come_back_as_they_were(device: str) -> None:
    torch.manual_seed(0)
    made = Case(running.Skips(), {"x": torch.randn(64, 16)})
    wanted = made_without_grad(made)
    plan = plan_of(made, "sequential")
    spills = [("~down.0/0", "down.1", "down.2", "up.1"), ("~down.1/0", "down.2", "down.3", "up.0")]
    assert {name for name, *_ in spills} <= set(plan.activations), list(plan.activations)
    smaller = spilling(plan, *spills)
    run = assert_runs_like(made, smaller, wanted, device=device)
    assert run.stats.skipped_spills == 0
    assert run.stats.d2h_bytes == 3 * sum(plan.activations[name].nbytes for name, *_ in spills)


def test_spilling_makes_room() -> None:
    torch.manual_seed(0)
    made = Case(running.Skips(), {"x": torch.randn(64, 16)})
    plan = plan_of(made, "sequential")
    spills = [(f"~down.{i}/0", f"down.{i + 1}", f"down.{i + 2}", "middle") for i in range(2)]
    peaks = []
    for chosen in (plan, spilling(plan, *spills)):
        with tgo.Executor(made.model, chosen, device=DEVICE) as run, torch.no_grad(), Guard(run, made.inputs) as guard:
            made()
        peaks.append(guard.peak_bytes)
    assert peaks[1] <= peaks[0] - plan.activations["~down.0/0"].nbytes


def test_the_guard_bites() -> None:
    made = case("chain")
    with tgo.Executor(made.model, plan_of(made), device=DEVICE) as run, torch.no_grad():
        with Guard(run):
            made()
        with pytest.raises(AssertionError, match=r"touches the home of blocks\.2"), Guard(run):
            made.model.blocks[2].up.weight.sum()


def test_one_call_plans_and_attaches() -> None:
    made = case("chain")
    wanted = made_without_grad(made)
    run = tgo.offload(made.model, "60%", inputs=made.inputs, strategy="layerwise", machine="cpu", device=DEVICE)
    assert_equal(made_without_grad(made), wanted)
    run.detach()
    assert run.plan.strategy == "layerwise"
    assert run.stats.copies > 0


def test_executors_take_turns() -> None:
    first, second = case("chain"), case("vit")
    wanted = [made_without_grad(made) for made in (first, second)]
    runs = [tgo.Executor(made.model, plan_of(made), device=DEVICE, lazy=True).attach() for made in (first, second)]
    for _ in range(2):
        for made, run, outputs in zip((first, second), runs, wanted, strict=True):
            run.resume()
            assert_equal(made_without_grad(made), outputs)
            run.pause()
            with pytest.raises(tgo.ExecutionError, match="paused"):
                made()
    for run in runs:
        run.detach()


def test_a_pause_frees_the_memory_at_once() -> None:
    made = case("chain")
    gc.collect()
    gc.disable()
    try:
        with tgo.Executor(made.model, plan_of(made), device=DEVICE) as run:
            made_without_grad(made)
            assert run._conductor is not None
            memory = weakref.ref(run._conductor._arena.memory)
            run.pause()
            assert memory() is None
    finally:
        gc.enable()


def test_a_lazy_executor_takes_memory_at_the_first_forward() -> None:
    made = case("chain")
    with tgo.Executor(made.model, plan_of(made), device=DEVICE, lazy=True) as run:
        assert run._conductor is None
        made()
        assert run._conductor is not None


@only_on_the_cpu("a script that counts the memory of its own process")
def test_the_host_holds_one_copy_of_the_weights() -> None:
    program = Path(__file__).parent.parent.parent / "benchmarks" / "host_memory.py"
    printed = subprocess.run([sys.executable, program, "1"], capture_output=True, text=True, check=True).stdout
    shares = {line.split(": ")[0]: float(line.split(": ")[1]) for line in printed.splitlines()[1:]}
    assert shares["attached"] < 1.15, printed
    assert shares["after a forward"] < 1.15, printed
