"""The executor on a GPU: the same outputs as the plain model there, in less memory. Skipped where there is none."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import taskgraph_offload as tgo

from .. import running
from ..running import STRATEGIES, Case, assert_equal, case, known_plan, plan_of, spilling
from ..simulated_gpu import card

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")

MIB = 1 << 20
ROWS = 128 if card.is_here() else 4096


def on_the_gpu(made: Case) -> tuple[Case, list[Tensor]]:
    """The model where it was, its inputs on the GPU, and what a copy of it gives there."""
    inputs = {key: _to_gpu(value) for key, value in made.inputs.items()}
    with torch.no_grad():
        wanted = Case(copy.deepcopy(made.model).cuda(), inputs, made.entry)()
    return Case(made.model, inputs, made.entry), wanted


def _to_gpu(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _to_gpu(item) for key, item in value.items()}
    return value.cuda() if isinstance(value, Tensor) else value


def simulated_machine() -> tgo.Machine:
    """Give the simulated card rates that let it copy a large block while it computes one."""
    flops, memory, link, latency = 100e9, 20e9, 2e9, 10e-6
    card.set_rates(flops=flops, memory=memory, link=link, latency=latency)
    return tgo.Machine("simulated", link, link, latency, flops, memory)


@pytest.mark.parametrize("name", ["chain", "flux", "sdxl", "llama", "t5", "whisper", "lstm"])
def test_every_strategy_gives_the_outputs_of_the_plain_model(name: str) -> None:
    made, wanted = on_the_gpu(case(name))
    for strategy in STRATEGIES:
        with tgo.Executor(made.model, known_plan(name, strategy), device="cuda") as run, torch.no_grad():
            for number in range(4):
                assert_equal(made(), wanted, f"{strategy}, forward {number}")
        assert (run.stats.divergences, run.stats.demand_loads) == (0, 0), strategy
        assert run.timeline().cycles == 4
        assert all(parameter.device.type == "cpu" for parameter in made.model.parameters())


def test_large_blocks_stream_while_others_compute_and_stay_within_the_budget() -> None:
    blocks = [nn.Sequential(nn.Linear(2048, 2048, bias=False), nn.GELU()) for _ in range(16)]  # 16 MiB each
    made, wanted = on_the_gpu(Case(nn.Sequential(*blocks), {"input": torch.randn(ROWS, 2048)}))
    machine = simulated_machine() if card.is_here() else None
    options: dict[str, Any] = dict(strategy="layerwise", prefetch=2, margin="8MiB")
    plan = tgo.Planner(made.model, "200MiB", inputs=made.inputs, machine=machine, **options).plan()
    torch.cuda.synchronize()
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() - 32 * MIB  # the inputs are part of the budget
    with tgo.Executor(made.model, plan, device="cuda") as run, torch.no_grad():
        for _ in range(20):
            assert_equal(made(), wanted)
        assert torch.cuda.max_memory_allocated() - before <= plan.budget_bytes
        assert run.timeline().overlap > 0.5
    gc.collect()
    assert torch.cuda.memory_allocated() <= before + 64 * MIB


def test_blocks_in_any_order_errors_and_edits() -> None:
    made, _ = on_the_gpu(case("chain"))
    twin = copy.deepcopy(made.model).cuda()
    with tgo.Executor(made.model, known_plan("chain"), device="cuda"), torch.no_grad():
        for order in [(0, 1, 2, 3, 4), (4, 1), (0, 0, 3), (0, 1, 2, 3, 4)]:
            made.model.order = twin.order = order
            made.model.blocks[0].up.weight.mul_(1.5)
            twin.blocks[0].up.weight.mul_(1.5)
            assert_equal(made(), Case(twin, made.inputs)())


def test_statistics_that_the_forward_changes() -> None:
    torch.manual_seed(0)
    plain = Case(running.Normed().train(), {"x": torch.randn(4, 8)})
    plan = plan_of(plain)
    made, _ = on_the_gpu(plain)
    twin = copy.deepcopy(made.model).cuda()
    with tgo.Executor(made.model, plan, device="cuda"), torch.no_grad():
        for _ in range(3):
            assert_equal(made(), Case(twin, made.inputs)())
    for name, tensor in made.model.state_dict().items():
        assert torch.equal(tensor, twin.state_dict()[name].cpu()), name


def test_skips_that_leave_come_back() -> None:
    torch.manual_seed(0)
    plain = Case(running.Skips(), {"x": torch.randn(64, 16)})
    plan = spilling(plan_of(plain, "sequential"), ("~down.0/0", "down.1", "down.2", "up.1"))
    made, wanted = on_the_gpu(plain)
    with tgo.Executor(made.model, plan, device="cuda") as run, torch.no_grad():
        for _ in range(4):
            assert_equal(made(), wanted)
    assert run.stats.skipped_spills == 0
    assert run.stats.d2h_bytes == 4 * 64 * 16 * 4


def test_a_backward_through_weights_that_have_left() -> None:
    made, _ = on_the_gpu(case("chain"))
    made.model.requires_grad_(False)
    twin = copy.deepcopy(made.model).cuda()
    grads = []
    for model in (made.model, twin):
        x = made.inputs["x"].clone().requires_grad_()
        if model is made.model:
            with tgo.Executor(model, known_plan("chain"), device="cuda"):
                model(x).square().sum().backward()
        else:
            model(x).square().sum().backward()
        grads.append(x.grad)
    assert torch.equal(*grads)


GENERATE: dict[str, dict[str, Any]] = {
    "llama": dict(max_new_tokens=6, do_sample=False, use_cache=True, pad_token_id=0),
    "whisper": dict(max_new_tokens=4, do_sample=False, language=None, task=None),
}


@pytest.mark.parametrize("name", GENERATE)
def test_the_same_tokens_are_generated(name: str) -> None:
    plain = case(name)
    plan = plan_of(plain)
    made, _ = on_the_gpu(plain)
    first = made.inputs["input_features" if name == "whisper" else "input_ids"]
    wanted = copy.deepcopy(made.model).cuda().generate(first, **GENERATE[name])
    with tgo.Executor(made.model, plan, device="cuda"):
        for _ in range(2):
            assert torch.equal(made.model.generate(first, **GENERATE[name]), wanted)


def test_the_caller_may_change_its_stream_between_and_within_forwards() -> None:
    made, wanted = on_the_gpu(case("chain"))
    streams = [torch.cuda.Stream() for _ in range(3)]
    torch.cuda.synchronize()

    def enter(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        streams[0].wait_stream(torch.cuda.current_stream())
        torch.cuda.set_stream(streams[0])

    with tgo.Executor(made.model, known_plan("chain"), device="cuda"), torch.no_grad():
        for number in range(12):
            stream = streams[1 + number % 2]
            with torch.cuda.stream(stream):
                handle = made.model.blocks[2].register_forward_pre_hook(enter)
                outputs = made()
                handle.remove()
                torch.cuda.current_stream().synchronize()
            assert_equal(outputs, wanted, f"forward {number}")


def test_a_capture_is_refused_and_the_peak_is_the_users() -> None:
    made, wanted = on_the_gpu(case("chain"))
    torch.empty(64 * MIB, dtype=torch.uint8, device="cuda")
    peak = torch.cuda.max_memory_allocated()
    with tgo.Executor(made.model, known_plan("chain"), device="cuda"), torch.no_grad():
        assert torch.cuda.max_memory_allocated() == peak
        with (
            pytest.raises(tgo.ExecutionError, match="CUDA graphs are not supported"),
            torch.cuda.graph(torch.cuda.CUDAGraph()),
        ):
            made()
        assert_equal(made(), wanted)


@pytest.mark.xfail(reason="copies of the weights may be under way, and nothing makes the edit wait for them")
def test_an_edit_of_a_weight_does_not_reach_the_forward_before_it() -> None:
    """The host is back before the forward has run. On a plain model, the edit would wait for it in the stream."""
    made, wanted = on_the_gpu(case("chain"))
    with tgo.Executor(made.model, known_plan("chain"), device="cuda"), torch.no_grad():
        assert_equal(made(), wanted)
        _keep_busy()
        outputs = made()
        made.model.blocks[4].up.weight.mul_(2)
        assert_equal(outputs, wanted)


def _keep_busy() -> None:
    """Let the caller's stream compute for a while."""
    if card.is_here():
        card.set_rates(flops=1e9)
        card.cost(flops=5e8, nbytes=0)
    else:
        torch.cuda._sleep(10**9)
