"""`offload` without inputs: models that are planned by what they are called with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import taskgraph_offload as tgo
from taskgraph_offload.runtime.hooks import Hooks

from .. import models
from ..running import DEVICE, assert_within_budget, plainly


def blocks(count: int = 6) -> nn.Sequential:
    layers = (nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)) for _ in range(count))
    return nn.Sequential(*layers).eval().requires_grad_(False)


def two() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {"one": blocks(), "other": blocks()}


def x(rows: int = 8) -> Tensor:
    return torch.randn(rows, 32, generator=torch.Generator().manual_seed(rows))


def both(given: dict[str, nn.Module], rows: int = 8) -> Tensor:
    found: Tensor = given["other"](given["one"](x(rows).to(DEVICE)))
    return found


TARGETS: dict[str, Callable[[dict[str, nn.Module]], Any]] = {
    "a dict": lambda given: {**given, "scheduler": None},
    "an object": lambda given: SimpleNamespace(**given, steps=3),
    "components": lambda given: SimpleNamespace(components={**given, "tokenizer": "words"}),
}


@pytest.mark.parametrize("kind", TARGETS)
def test_any_holder_of_models_is_a_target(kind: str) -> None:
    given = two()
    target = TARGETS[kind](given)
    with plainly(given["one"]), plainly(given["other"]):
        wanted = both(given)
    run = tgo.offload(target, "50%", device=DEVICE)
    assert torch.equal(both(given), wanted)
    assert run.program == (("one", "forward", 1), ("other", "forward", 1))
    tgo.detach(target)
    assert not any("forward" in vars(model) for model in given.values())


def test_a_model_that_is_part_of_another_one_is_no_component() -> None:
    outer = blocks()
    with tgo.offload({"outer": outer, "inner": outer[2], "again": outer}, "50%", device=DEVICE) as run:
        assert list(run.components) == ["outer"]


@pytest.mark.parametrize("target", [{}, {"scheduler": None}, object(), 3, "model"])
def test_a_target_without_models_is_refused(target: Any) -> None:
    with pytest.raises(tgo.SettingsError, match="holds no model"):
        tgo.offload(target, 12, device=DEVICE)


@pytest.mark.parametrize("arguments", [{"strategy": "none"}, {"prefetsch": 2}, {"device": "tpu"}])
def test_a_wrong_argument_is_refused_before_anything_changes(arguments: dict[str, Any]) -> None:
    given = two()
    with pytest.raises(tgo.SettingsError):
        tgo.offload(given, "50%", **{"device": DEVICE, **arguments})
    assert not any("forward" in vars(model) for model in given.values())
    with pytest.raises(tgo.SettingsError, match="inputs= is for one model"):
        tgo.offload(given, "50%", inputs=(x(),), device=DEVICE)


def test_a_larger_call_is_traced_anew_and_gets_room_and_no_home_moves() -> None:
    model = blocks()
    with plainly(model):
        wanted = {rows: model(x(rows).to(DEVICE)) for rows in (8, 200, 9, 4000, 8)}
    with tgo.offload(model, "40%", device=DEVICE) as run:
        homes, plans, budgets = set[int](), list[tgo.Plan](), list[int]()
        for rows, value in wanted.items():
            assert torch.equal(model(x(rows).to(DEVICE)), value), rows
            homes.add(hash(tuple(p.data_ptr() for p in model.parameters())))
            plans.append(run.plan)
            budgets.append(run.stats.peak_bytes)
    assert len(homes) == 1
    small, larger, nearly_small, largest, small_again = plans if len(plans) == 5 else (*plans, plans[-1])
    assert small.peak_bytes < larger.peak_bytes < largest.peak_bytes
    assert nearly_small is larger, "what has room is kept"
    assert small_again is largest


def test_a_call_beyond_the_budget_is_refused_before_it_runs_and_names_the_number() -> None:
    model = blocks()
    budget = sum(p.nbytes for p in model.parameters()) // 2
    with plainly(model):
        wanted = model(x().to(DEVICE))
    with tgo.offload(model, f"{budget}B", device=DEVICE, machine="cpu") as run:
        assert torch.equal(model(x().to(DEVICE)), wanted)
        with pytest.raises(tgo.BudgetError, match=r"Sequential\.forward: ") as refused:
            model(x(100_000).to(DEVICE))
        assert refused.value.smallest_bytes > budget
        assert torch.equal(model(x().to(DEVICE)), wanted), "nothing is lost"
        run.replan(f"{refused.value.smallest_bytes}B")
        assert model(x(100_000).to(DEVICE)).shape == (100_000, 32)


def test_models_share_the_budget_and_keep_memory_that_nobody_needs() -> None:
    given = two()
    with tgo.offload(given, "60%", device=DEVICE, machine="cpu") as run:
        both(given)
        held = {name: component.arena_bytes for name, component in run.components.items()}
        assert held["other"], "the one that ran last"
        assert sum(held.values()) <= run.budget_bytes
    with tgo.offload(given, "200%", device=DEVICE, machine="cpu") as run:
        both(given)
        before = run.stats.h2d_bytes
        both(given)
        assert run.stats.h2d_bytes == before, "everything stays where there is room"


class Stops(nn.Module):
    """Raises in the middle of a forward, when it is told to."""

    def __init__(self, error: type[BaseException]) -> None:
        super().__init__()
        self.first, self.then, self.error, self.raises = blocks(), blocks(), error, False

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.raises:
            raise self.error("stop")
        found: Tensor = self.then(x)
        return found


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_in_a_phase_leaves_the_others_and_itself_usable(error: type[BaseException]) -> None:
    torch.manual_seed(0)
    stops = Stops(error).eval().requires_grad_(False)
    given = {"one": blocks(), "other": stops}
    with plainly(given["one"]), plainly(stops):
        wanted = both(given)
    with tgo.offload(given, "40%", device=DEVICE):
        assert torch.equal(both(given), wanted)
        stops.raises = True
        with pytest.raises(error, match="stop"):
            both(given)
        stops.raises = False
        assert torch.equal(both(given), wanted)
    assert torch.equal(_plain(given), wanted)


def _plain(given: dict[str, nn.Module]) -> Tensor:
    with plainly(given["one"]), plainly(given["other"]):
        return both(given)


def test_an_error_in_the_very_first_call_leaves_the_model_as_it_was() -> None:
    model = blocks()
    with tgo.offload(model, "40%", device=DEVICE):
        with pytest.raises(tgo.TraceError, match=r"Sequential\.forward: "):
            model(torch.zeros(8, 31))
        model(x().to(DEVICE))
    with tgo.offload(model, "40%", device=DEVICE), pytest.raises(tgo.TraceError):
        model("text")
    assert "forward" not in vars(model)


def test_another_offload_replaces_a_run() -> None:
    given = two()
    first = tgo.offload(given, "60%", device=DEVICE)
    wanted = both(given)
    second = tgo.offload(given, "40%", device=DEVICE)
    assert torch.equal(both(given), wanted)
    assert not any(executor.is_attached for executor in first.executors.values())
    with pytest.raises(tgo.ExecutionError, match="part of one and other that is attached"):
        tgo.offload(given["one"], "40%", device=DEVICE)
    tgo.detach(given["one"])
    assert not any(executor.is_attached for executor in second.executors.values()), "a run is detached as a whole"


def test_an_error_keeps_what_was_attached() -> None:
    model = blocks()
    run = tgo.offload(model, "60%", device=DEVICE)
    wanted = model(x().to(DEVICE))
    with pytest.raises(tgo.BudgetError):
        tgo.offload(model, "1B", inputs=(x(),), device=DEVICE)
    assert torch.equal(model(x().to(DEVICE)), wanted)
    assert run.executors[""].is_attached
    other = tgo.offload(model, "60%", inputs=(x(),), device=DEVICE)
    assert torch.equal(model(x().to(DEVICE)), wanted)
    assert not run.executors[""].is_attached
    assert other.plan.strategy == "auto"
    tgo.detach(model)


def test_a_run_can_pause_and_says_what_it_did() -> None:
    given = two()
    run = tgo.offload(given, "60%", device=DEVICE)
    with pytest.raises(tgo.ExecutionError, match="nothing has run yet"):
        _ = run.plan
    assert "not called yet" in run.explain()
    with run.request():
        wanted = both(given)
    run.pause()
    with pytest.raises(tgo.ExecutionError, match=r"one\.forward: this run is paused"):
        both(given)
    run.resume()
    with run.request():
        assert torch.equal(both(given), wanted)
        both(given, rows=3)
    assert run.program == (("one", "forward", 1), ("other", "forward", 1)) * 2
    assert [line for line in run.explain().splitlines() if line in given] == ["one", "other"]
    assert run.timeline().source == "measured"
    run.detach()


def test_edits_between_requests_count_whatever_plan_follows() -> None:
    model: Any = blocks()
    with tgo.offload(model, "40%", device=DEVICE):
        model(x().to(DEVICE))
        with torch.no_grad():
            model[1][0].weight.mul_(1.5)
            model[3][2].bias.data = model[3][2].bias.data + 1
            model[4][0].weight = nn.Parameter(model[4][0].weight * 0.5, requires_grad=False)
        found = model(x(300).to(DEVICE))
    with plainly(model):
        assert torch.equal(found, model(x(300).to(DEVICE)))


def test_other_methods_that_are_called_are_planned_too() -> None:
    model, _ = models.vae()
    latents = torch.randn(1, model.config.latent_channels, 8, 8).to(DEVICE)
    image = torch.randn(1, 3, 32, 32).to(DEVICE)
    with plainly(model), torch.no_grad():
        wanted = model.decode(latents).sample, model.encode(image).latent_dist.mean
    with tgo.offload(model, "60%", device=DEVICE) as run, torch.no_grad():
        for _ in range(2):
            assert torch.equal(model.decode(latents).sample, wanted[0])
            assert torch.equal(model.encode(image).latent_dist.mean, wanted[1])
        assert run.stats.demand_loads == run.stats.divergences == 0
        assert [entry for _, entry, _ in run.program] == ["decode", "encode"] * 2


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"cache_implementation": "static"}], ids=str)
def test_generate_with_prompts_of_any_length(options: dict[str, Any]) -> None:
    model, _ = models.llama()
    prompts = {
        (batch, length): torch.randint(3, 50, (batch, length), generator=torch.Generator().manual_seed(length))
        for batch, length in ((1, 5), (2, 40), (1, 5))
    }

    def generated(tokens: Tensor) -> Tensor:
        tokens = tokens.to(DEVICE)
        with torch.no_grad():
            found: Tensor = model.generate(
                tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=6, do_sample=False, **options
            )
        return found

    with plainly(model):
        wanted = {key: generated(tokens) for key, tokens in prompts.items()}
    with tgo.offload(model, "50%", device=DEVICE) as run:
        for key, tokens in prompts.items():
            assert torch.equal(generated(tokens), wanted[key])
        assert_within_budget(run)


def test_each_component_can_have_its_own_strategy_or_be_left_alone() -> None:
    given = two() | {"third": blocks()}
    components = {"one": {"strategy": "layerwise", "prefetch": 2}}
    with tgo.offload(given, "60%", components=components, exclude=["third"], device=DEVICE) as run:
        both(given)
        assert {name: plan.strategy for name, plan in run.plans.items()} == {"one": "layerwise", "other": "auto"}
        assert "forward" not in vars(given["third"])
    with pytest.raises(tgo.SettingsError, match="components=: no component 'vae'; there are one, other, third"):
        tgo.offload(given, "60%", components={"vae": {}}, device=DEVICE)
    with pytest.raises(tgo.SettingsError, match="exclude=: no component 'vae'"):
        tgo.offload(given, "60%", exclude=["vae"], device=DEVICE)
    with pytest.raises(tgo.SettingsError, match="unknown strategy 'none'"):
        tgo.offload(given, "60%", components={"one": {"strategy": "none"}}, device=DEVICE)


def test_a_settings_file_has_the_budget_and_what_each_component_wants(tmp_path: Path) -> None:
    file = tmp_path / "offload.yaml"
    file.write_text("budget: 60%\nmachine: cpu\ncomponents:\n  one: {strategy: sequential}\n")
    given = two()
    with tgo.offload(given, settings=file, device=DEVICE) as run:
        both(given)
        assert {name: plan.strategy for name, plan in run.plans.items()} == {"one": "sequential", "other": "auto"}
        budget = run.budget_bytes
    with tgo.offload(given, "30%", settings=file, strategy="keep", device=DEVICE) as run:
        both(given)
        assert {plan.strategy for plan in run.plans.values()} == {"keep"}, "what is given in the call comes first"
        assert run.budget_bytes < budget
    file.write_text("components:\n  vae: {strategy: sequential}\n")
    with pytest.raises(tgo.SettingsError, match=r"offload.yaml: no component 'vae'; there are one, other"):
        tgo.offload(given, 12, settings=file, device=DEVICE)
    with pytest.raises(tgo.SettingsError, match="how much memory"):
        tgo.offload(given, device=DEVICE)


def test_another_shape_of_the_same_size_is_traced_anew() -> None:
    torch.manual_seed(0)
    model = nn.MultiheadAttention(32, 4, batch_first=True).eval().requires_grad_(False)
    many, long = torch.randn(64, 16, 32).to(DEVICE), torch.randn(1, 1024, 32).to(DEVICE)
    with tgo.offload({"attention": model}, "100%", device=DEVICE, machine="cpu") as run:
        model(many, many, many)
        before = run.plan.trace.activation_bytes
        model(long, long, long)
        assert run.plan.trace.activation_bytes > 2 * before


def test_a_wrapper_that_a_user_puts_on_a_method_runs_once() -> None:
    model: Any = blocks()
    with plainly(model):
        wanted = 2 * model(x().to(DEVICE))
    run = tgo.offload(model, "50%", device=DEVICE)
    inner = model.forward
    model.forward = lambda *args, **kwargs: 2 * inner(*args, **kwargs)
    for _ in range(2):
        assert torch.equal(model(x().to(DEVICE)), wanted)
    assert torch.equal(model(x(300).to(DEVICE))[:8].cpu(), model(x(300)[:8].to(DEVICE)).cpu())
    run.detach()


def test_a_component_that_calls_another_one_is_refused_by_name() -> None:
    class Outer(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.own, self.held = blocks(), [inner]

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.own(self.held[0](x))
            return found

    inner = blocks()
    given = {"outer": Outer(inner).eval(), "inner": inner}
    with tgo.offload(given, "60%", device=DEVICE):
        with pytest.raises(tgo.TraceError, match=r"outer.forward calls inner.forward, another component"):
            given["outer"](x().to(DEVICE))
        assert inner(x().to(DEVICE)).shape == (8, 32)


def test_models_without_weights_and_methods_that_read_none_just_run() -> None:
    class Texts(nn.Sequential):
        def decode(self, tokens: list[int]) -> str:
            return " ".join(map(str, tokens))

    texts = Texts(nn.Linear(32, 32)).eval()
    given = {"upsample": nn.Upsample(scale_factor=2), "texts": texts}
    with tgo.offload(given, "100%", device=DEVICE) as run:
        assert given["upsample"](torch.ones(1, 1, 4, 4)).shape == (1, 1, 8, 8)
        assert texts.decode([1, 2]) == "1 2"
        texts(x().to(DEVICE))
        assert list(run.plans) == ["texts"]


def test_modules_that_come_and_go_are_homes_of_another_model() -> None:
    model: Any = blocks()
    with tgo.offload(model, "50%", device=DEVICE) as run:
        model(x().to(DEVICE))
        with torch.no_grad():
            model[2] = nn.Sequential(model[2], nn.Linear(32, 32))
        run.replan("60%")
        found = model(x().to(DEVICE))
    with plainly(model):
        assert torch.equal(found, model(x().to(DEVICE)))


def test_a_part_that_is_called_alone_takes_the_device_back() -> None:
    given = two()
    with tgo.offload(given, "40%", device=DEVICE):
        both(given)
        part: Any = given["one"]
        alone = part[2](x().to(DEVICE))
        assert torch.equal(alone, part[2](x().to(DEVICE)))
    with plainly(part):
        assert torch.equal(alone, part[2](x().to(DEVICE)))


@pytest.mark.parametrize("after", range(3))
def test_an_interrupt_while_hooks_change_is_mended_by_the_next_call(
    monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    model: Any = blocks()
    with plainly(model):
        wanted = model(x(300).to(DEVICE))
    with tgo.offload(model, "50%", device=DEVICE) as run:
        model(x().to(DEVICE))
        left, watch = [after], Hooks.wrap_inside

        def interrupted(self: Hooks, *args: Any) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            watch(self, *args)

        with monkeypatch.context() as patch:
            patch.setattr(Hooks, "wrap_inside", interrupted)
            for _ in range(2):
                try:
                    model(x(300).to(DEVICE))
                except KeyboardInterrupt:
                    break
        assert torch.equal(model(x(300).to(DEVICE)), wanted)
        assert run.stats.peak_bytes
