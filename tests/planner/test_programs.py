"""Programs: whole requests planned as one, near the bound, proved, printed and read back."""

from __future__ import annotations

import json
import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from taskgraph_offload.planner.strategies import names as strategy_names
from torch import nn

import taskgraph_offload as tgo
from taskgraph_offload.nouns import program as nouns_program
from taskgraph_offload.nouns.graph import Task
from taskgraph_offload.nouns.program import program_trace, stretches, within
from taskgraph_offload.nouns.trace import Activation
from taskgraph_offload.plan.file import parse_file, print_file

from ..adversary import UNIT, found_by_the_adversary
from ..made import program_cases
from ..sweeps import mostly_slow

PROMISED = 1.02  # times the bound
CASES = {
    f"{name} {budget['budget_bytes'] >> 30}": (case, budget)
    for name, case in program_cases()
    for budget in case["budgets"]
}
QUICK = ("flux-dev-1024 6", "flux-dev-1024 12", "sdxl-1024 6", "sdxl-1024 12")


def planned(case: dict[str, Any], budget: dict[str, Any]) -> tgo.Plan:
    rates = case["link_bytes_per_second"], case["d2h_bytes_per_second"], case["latency_seconds"]
    machine = tgo.Machine("case", *rates, 1e12, 1e12)
    traces = {name: tgo.Trace.from_units(units) for name, units in case["components"].items()}
    phases = [(name, times) for name, times in case["phases"]]
    return tgo.Planner.for_program(traces, phases, f"{budget['budget_bytes']}B", machine=machine).plan()


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in CASES],
)
def test_a_request_is_near_its_bound_and_no_usual_way_is_faster(name: str) -> None:
    case, budget = CASES[name]
    plan = planned(case, budget)
    timeline = plan.predict(requests=2)
    assert plan.bound.request_seconds <= timeline.request_seconds * (1 + 1e-9)
    assert timeline.request_seconds <= PROMISED * budget["bound_request_seconds"]
    assert timeline.cold_seconds <= PROMISED * budget["bound_cold_request_seconds"]
    assert timeline.request_seconds <= min(budget["usual_ways"].values()) * (1 + 1e-3)  # they have no latency
    assert plan.peak_bytes <= plan.budget_bytes


@pytest.mark.parametrize("name", QUICK)
def test_the_bound_of_a_request(name: str) -> None:
    case, budget = CASES[name]
    bound = planned(case, budget).bound
    assert bound.request_seconds == pytest.approx(budget["bound_request_seconds"], rel=1e-6)
    assert bound.cold_request_seconds == pytest.approx(budget["bound_cold_request_seconds"], rel=1e-6)


def made(seed: int) -> tuple[dict[str, tgo.Trace], list[tuple[str, int]]]:
    """Some models, two of which may share weights, and the phases of a request."""
    chance = random.Random(seed)
    traces: dict[str, tgo.Trace] = {}
    for component in "abcd"[: chance.randint(1, 4)]:
        owner = "a" if component == "b" and chance.random() < 0.5 else component
        blocks = len(traces["a"].calls) if owner != component else chance.randint(1, 6)
        sizes = random.Random(f"{seed} {owner}")  # so that a shared weight has one size
        traces[component] = tgo.Trace.from_units(
            {
                "name": f"block{i}",
                "seconds": chance.random() * 1e-5,
                "tensors": {f"{owner}.{i}.{j}": UNIT * sizes.randint(1, 6) for j in range(2)},
                "transient_bytes": UNIT * chance.randint(0, 12),
            }
            for i in range(blocks)
        )
    names = list(traces)
    return traces, [(chance.choice(names), chance.choice((1, 1, 2, 3, 7, 12))) for _ in range(chance.randint(1, 5))]


@pytest.mark.parametrize("seed", mostly_slow(range(60), range(4)))
def test_every_strategy_plans_programs_that_no_order_of_the_lanes_makes_wrong(seed: int) -> None:
    traces, program = made(seed)
    machine = tgo.Machine("test", UNIT * 1e6, UNIT * 1e6, 1e-8, 1e12, 1e12)
    for strategy in strategy_names():
        for budget in ("20%", "45%", "80%", "120%"):
            try:
                plan = tgo.Planner.for_program(traces, program, budget, strategy=strategy, machine=machine).plan()
            except tgo.BudgetError as error:
                enough = f"{error.smallest_bytes}B"
                plan = tgo.Planner.for_program(traces, program, enough, strategy=strategy, machine=machine).plan()
            calls = [task.name for task in plan.steady if task.kind == "compute"]
            assert calls == [call.name for name, times in program for call in plan.trace.calls_of[name] * times]
            assert found_by_the_adversary(plan, plan.graph(3), range(2)) is None
            timeline = plan.predict(requests=4)
            assert timeline.peak_bytes <= plan.budget_bytes
            assert plan.bound.request_seconds <= timeline.request_seconds * (1 + 1e-9)
            assert parse_file(print_file(plan)).steady == plan.steady


@pytest.mark.parametrize("seed", mostly_slow(range(12), range(3)))
def test_auto_is_not_slower_than_any_other_strategy(seed: int) -> None:
    traces, program = made(seed)
    machine = tgo.Machine("test", UNIT * 1e6, UNIT * 1e6, 1e-8, 1e12, 1e12)
    rows = tgo.Planner.for_program(traces, program, "60%", machine=machine).compare().rows
    steps = {row["strategy"]: row["step_seconds"] for row in rows if row["step_seconds"] is not None}
    assert not steps or steps["auto"] <= min(steps.values()) * 1.002


def unets() -> dict[str, tgo.Trace]:
    block = {"seconds": 1e-6, "tensors": [2 * UNIT], "transient_bytes": UNIT}
    return {
        "clip": within("clip", tgo.Trace.from_units([{**block, "name": name} for name in "xy"])),
        "unet": within("unet", tgo.Trace.from_units([{**block, "name": name} for name in "abcdef"])),
    }


def test_equal_iterations_are_printed_once_and_counted() -> None:
    plan = tgo.Planner.for_program(unets(), [("clip", 1), ("unet", 50)], "50%", machine="cpu").plan()
    text = str(plan)
    assert re.search(r"^  4[5-9] times unet:$", text, re.MULTILINE)
    assert len(text.splitlines()) < 200 < len(plan.steady)
    assert sum(stretch.times for stretch in stretches(plan.steady, plan.trace)) == 51
    again = parse_file(print_file(plan))
    assert (again.cold, again.steady, again.trace.fingerprint) == (plan.cold, plan.steady, plan.trace.fingerprint)


def test_any_number_of_iterations_is_proved_like_three() -> None:
    plan = tgo.Planner.for_program(unets(), [("clip", 1), ("unet", 50)], "50%", machine="cpu").plan()
    calls = [index for index, task in enumerate(plan.steady) if task == Task("compute", "unet.c")]
    for index in (calls[0], calls[25], calls[-1]):
        with pytest.raises(tgo.PlanError, match="the trace has the call"):
            replace(plan, steady=plan.steady[:index] + plan.steady[index + 1 :]).verify()
    copies = [index for index, task in enumerate(plan.steady) if task.kind == "h2d"]
    for index in (copies[3], copies[len(copies) // 2], copies[-1]):
        with pytest.raises(tgo.PlanError):
            replace(plan, steady=plan.steady[:index] + plan.steady[index + 1 :]).verify()


def lending() -> tgo.Plan:
    traces = unets()
    decoder = tgo.Trace.from_units([{"name": "d", "seconds": 1e-6, "tensors": [UNIT], "transient_bytes": 9 * UNIT}])
    traces["vae"] = within("vae", decoder)
    return tgo.Planner.for_program(traces, [("clip", 1), ("unet", 4), ("vae", 2)], "45%", machine="cpu").plan()


def test_what_is_lent_is_given_back_and_brought_again() -> None:
    plan = lending()
    assert plan.lent.keys() == {"vae"}
    assert plan.arena_bytes + max(plan.activation_bytes) > plan.budget_bytes  # together they would not fit
    assert plan.peak_bytes <= plan.budget_bytes
    assert "lent to activations" in plan.explain()


@pytest.mark.parametrize("lent", [0, UNIT, 10**6])
def test_a_plan_that_lends_too_little_or_too_much_is_refused(lent: int) -> None:
    with pytest.raises(tgo.PlanError, match=r"over the budget|are lent"):
        replace(lending(), lent={"vae": lent}).verify()


def test_no_copy_comes_into_what_is_lent() -> None:
    plan = lending()
    high = next(b for b in plan.bundles.values() if b.offset + plan.sizes[b.name] > plan.arena_bytes - plan.lent["vae"])
    place = max(
        index for index, task in enumerate(plan.steady) if task.name.startswith("vae") and task.kind == "compute"
    )
    with pytest.raises(tgo.PlanError):
        replace(plan, steady=(*plan.steady[:place], Task("h2d", high.name), *plan.steady[place:])).verify()


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ([], "at least one phase"),
        ([("unet", 0)], "is no phase"),
        ([("unet", True)], "is no phase"),
        ([("unet", 2.5)], "is no phase"),
        (["unet"], "is no phase"),
        ("unet", "is no program"),
        (None, "is no program"),
        (5, "is no program"),
        ([("unet", 10**9)], "more than 1,000,000 iterations"),
        ([("vae", 1)], "there are clip, unet"),
    ],
)
def test_a_program_that_makes_no_sense_is_refused(program: Any, words: str) -> None:
    with pytest.raises(tgo.SettingsError, match=words):
        tgo.Planner.for_program(unets(), program, "50%", machine="cpu")


def test_one_name_is_one_weight_so_it_has_one_size() -> None:
    traces = {
        name: tgo.Trace.from_units([{"name": "x", "seconds": 1.0, "tensors": [size]}])
        for name, size in (("a", 8), ("b", 16))
    }
    with pytest.raises(tgo.SettingsError, match="tell them apart with `within`"):
        program_trace(traces, [("a", 1), ("b", 1)])
    apart = {name: within(name, trace) for name, trace in traces.items()}
    assert program_trace(apart, [("a", 1), ("b", 1)]).weight_bytes == 24


@pytest.mark.parametrize(
    ("line", "edited"),
    [
        ('program: [["clip", 1], ["unet", 50]]', 'program: [["clip", 1], ["unet", 51]]'),
        ('program: [["clip", 1], ["unet", 50]]', 'program: [["clip", 1], ["unet", 1000000000]]'),
        ('program: [["clip", 1], ["unet", 50]]', 'program: [["clip", 1], ["nobody", 50]]'),
        ('program: [["clip", 1], ["unet", 50]]', 'program: [["clip", 1], [["unet"], 50]]'),
        ('program: [["clip", 1], ["unet", 50]]', 'program: [["clip", 1], ["unet", 199999], ["clip", 199999]]'),
        (" times unet:", "000000000 times unet:"),
        (" times unet:", " times nobody times:"),
    ],
)
def test_a_plan_file_that_was_edited_is_refused(line: str, edited: str, tmp_path: Path) -> None:
    plan = tgo.Planner.for_program(unets(), [("clip", 1), ("unet", 50)], "50%", machine="cpu").plan()
    text = print_file(plan)
    assert line in text
    (tmp_path / "plan.yaml").write_text(text.replace(line, edited))
    with pytest.raises(tgo.PlanError):
        tgo.Plan.load(tmp_path / "plan.yaml")


def test_the_page_about_a_program_names_each_phase() -> None:
    page = tgo.Planner.for_program(unets(), [("clip", 1), ("unet", 50)], "50%", machine="cpu").plan().explain()
    assert re.search(r"^clip +once, weights", page, re.MULTILINE)
    assert re.search(r"^unet +50 times, weights", page, re.MULTILINE)
    assert re.search(r"^request +", page, re.MULTILINE)
    assert not re.search(r"\bstep\b", page)


def test_a_trace_of_one_model_is_as_it_was() -> None:
    trace = unets()["unet"]
    assert trace.order is trace.calls
    assert json.loads(json.dumps(trace.program)) == []


class Coder(nn.Module):
    """A model with two methods that run on their own."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(*(nn.Linear(32, 32) for _ in range(3)))
        self.decoder = nn.Sequential(*(nn.Linear(32, 32) for _ in range(3)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.decode(self.encoder(x))

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(self.decoder(z))


MODELS = {"text": nn.Sequential(*(nn.Linear(32, 32) for _ in range(4))), "vae": Coder()}
INPUTS = {"text": (torch.ones(1, 32),), "vae.decode": (torch.ones(2, 32),), "vae": (torch.ones(2, 32),)}


def test_the_models_of_a_pipeline_are_traced_each_with_its_inputs() -> None:
    program = [("text", 3), ("vae.decode", 1)]
    inputs = {name: INPUTS[name] for name, _ in program}
    planner = tgo.Planner(MODELS, "50%", inputs=inputs, program=program, machine="cpu")
    assert planner.trace.program == (("text", 3), ("vae.decode", 1))
    read = set(planner.trace.readers)
    assert {"text.0.weight", "vae.decoder.2.bias"} <= read <= set(planner.trace.weights)
    assert not any(name.startswith("vae.encoder") for name in read)
    plan = planner.plan()
    assert plan.peak_bytes <= plan.budget_bytes
    assert [task.name for task in plan.steady if task.kind == "compute"][:4] == [f"text.{i}" for i in range(4)]


def test_two_methods_of_one_model_share_its_weights() -> None:
    program = [("vae", 1), ("vae.decode", 2)]
    planner = tgo.Planner(MODELS, "50%", inputs={n: INPUTS[n] for n, _ in program}, program=program, machine="cpu")
    decoders = [call.reads for call in planner.trace.calls if "decoder.1" in call.name]
    assert len(decoders) == 2
    assert decoders[0] == decoders[1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "how often does each of text, vae run"),
        ({"program": [("text", 1), ("audio", 1)]}, "'audio'.*there are text, vae"),
        ({"program": [("text", 0)]}, "is no phase"),
        ({"program": []}, "at least one phase"),
        ({"program": [("text", 1)], "inputs": (torch.ones(1, 32),)}, "for each phase"),
        ({"program": [("text", 1)], "inputs": {"vae": ()}}, "the program has text"),
    ],
)
def test_models_without_a_program_that_makes_sense_are_refused(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(tgo.SettingsError, match=words):
        tgo.Planner(MODELS, "50%", machine="cpu", **arguments)
    with pytest.raises(tgo.SettingsError, match="dict of models"):
        tgo.Planner(MODELS["text"], "50%", program=[("text", 1)], machine="cpu")


def test_two_calls_of_one_name_are_refused() -> None:
    def trace(*names: str) -> tgo.Trace:
        return tgo.Trace.from_units([{"name": name, "seconds": 1e-6, "tensors": {f"w {name}": 512}} for name in names])

    traces = {"vae": trace("enc.0", "dec.0"), "vae.enc": trace("0")}
    with pytest.raises(tgo.SettingsError, match=r"two calls of this program would be 'vae\.enc\.0'"):
        tgo.Planner.for_program(traces, [("vae", 1), ("vae.enc", 1)], "50%", machine="cpu")
    plan = tgo.Planner.for_program(unets(), [("clip", 1), ("unet", 2)], "50%", machine="cpu").plan()
    twice = replace(plan.trace, calls=(*plan.trace.calls, plan.trace.calls[0]))
    with pytest.raises(tgo.PlanError, match="the same name"):
        replace(plan, trace=twice).verify()


def test_two_models_with_weights_of_one_name_are_refused() -> None:
    models: dict[str, nn.Module] = {
        "a": nn.Sequential(nn.Sequential(nn.Linear(8, 8))),
        "a.0": nn.Sequential(nn.Linear(8, 8)),
    }
    inputs = {name: (torch.ones(1, 8),) for name in models}
    planner = tgo.Planner(models, "50%", inputs=inputs, program=[("a", 1), ("a.0", 1)], machine="cpu")
    with pytest.raises(tgo.SettingsError, match="both have a weight"):
        planner.plan()


def test_activations_of_a_program_are_refused_since_no_proof_follows_them_over_iterations() -> None:
    plan = tgo.Planner.for_program(unets(), [("unet", 2)], "50%", machine="cpu").plan()
    trace = replace(plan.trace, activations=(Activation("x", UNIT, producer=0, uses=(2,), until=3),))
    with pytest.raises(tgo.PlanError, match="no activations"):
        replace(plan, trace=trace).verify()


@pytest.mark.parametrize("seed", mostly_slow(range(25), [0, 5, 12]))
def test_strategies_plan_long_phases_as_if_no_iteration_were_left_out(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    traces, program = made(seed)
    program = [(name, times if times < 3 else 3 * times) for name, times in program]
    machine = tgo.Machine("test", UNIT * 1e6, UNIT * 1e6, 1e-8, 1e12, 1e12)
    ways: list[tuple[str, dict[str, Any]]] = [(name, {}) for name in strategy_names() if name != "auto"]
    ways += [("layerwise", {"prefetch": 3}), ("layerwise", {"residents": "spread", "prefetch": 2})]
    for strategy, options in ways:
        planner = tgo.Planner.for_program(traces, program, "70%", strategy=strategy, machine=machine, **options)
        try:
            with monkeypatch.context() as patch:
                patch.setattr(nouns_program, "ITERATIONS", 10**6)
                whole = planner.plan()
        except tgo.BudgetError:
            continue
        assert planner.plan().streamed_bytes == whole.streamed_bytes, (strategy, options)


def test_a_weight_without_bytes_is_no_copy_into_what_is_lent() -> None:
    block = {"seconds": 1e-6}
    encoder = [{**block, "name": f"e{i}", "tensors": [2 * UNIT], "transient_bytes": 16 * UNIT} for i in range(3)]
    unet = [{**block, "name": "b0", "tensors": {"empty": 0}}]
    unet += [{**block, "name": f"b{i}", "tensors": [8 * UNIT]} for i in range(1, 6)]
    traces = {"enc": tgo.Trace.from_units(encoder), "unet": tgo.Trace.from_units(unet)}
    for units in range(20, 52, 4):
        plan = tgo.Planner.for_program(traces, [("enc", 1), ("unet", 4)], f"{units * UNIT}B", machine="cpu").plan()
        assert plan.peak_bytes <= plan.budget_bytes


@pytest.mark.parametrize("name", ["pre:fill", "y:", "steady:", "3 times x:", "a b", "~x", 'quo"te', "$\\frac{$"])
def test_any_name_of_a_component_is_printed_read_back_and_drawn(name: str, tmp_path: Path) -> None:
    block = {"seconds": 1e-6, "tensors": {f"w{i}": 2 * UNIT for i in range(3)}}
    units = [{**block, "name": f"b{i}", "tensors": {f"w{i}{j}": 2 * UNIT for j in range(3)}} for i in range(6)]
    wide = [{**unit, "transient_bytes": 8 * UNIT} for unit in units]
    traces = {name: tgo.Trace.from_units(wide), "decode": tgo.Trace.from_units(units)}
    plan = tgo.Planner.for_program(traces, [(name, 1), ("decode", 9)], "30%", machine="cpu").plan()
    plan.save(tmp_path / "plan.yaml")
    again = tgo.Plan.load(tmp_path / "plan.yaml")
    assert (again.bundles, again.lent, again.steady) == (plan.bundles, plan.lent, plan.steady)
    tgo.viz.save_timeline(tmp_path / "request.png", plan.predict())
    assert "\x1b" not in plan.explain()


def test_an_executor_refuses_the_plan_of_a_request() -> None:
    plan = tgo.Planner.for_program(unets(), [("unet", 2)], "50%", machine="cpu").plan()
    with pytest.raises(tgo.SettingsError, match="not run yet"):
        tgo.Executor(nn.Linear(2, 2), plan)
