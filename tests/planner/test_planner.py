"""The planner's manners: budgets as people write them, one clear error for bad input, a model left as it was."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from taskgraph_offload.planner import strategies

import taskgraph_offload as tgo
from taskgraph_offload.nouns.budget import parse_budget

from ..made import SLOW_LINK, plan_of, trace_of

MIB = 2**20


def model_of(count: int = 6, width: int = 64) -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(*(torch.nn.Linear(width, width) for _ in range(count)))


INPUTS = (torch.ones(2, 64),)


@pytest.mark.parametrize(
    ("written", "nbytes"),
    [
        (1, 2**30),
        (0.5, 2**29),
        ("12GiB", 12 * 2**30),
        ("800MiB", 800 * MIB),
        ("123456B", 123456),
        ("1.5 gib", 3 * 2**29),
    ],
)
def test_budgets_as_people_write_them(written, nbytes):
    assert parse_budget(written).nbytes == nbytes


def test_a_share_of_the_weights_leaves_activations_on_top():
    trace = trace_of([1000] * 10, transient_bytes=77)
    planner = tgo.Planner.for_trace(trace, "30%", strategy="sequential", machine=SLOW_LINK)
    assert planner.budget_bytes == 3072 + 77  # every weight has a seat of a multiple of 512 bytes


@pytest.mark.parametrize(
    "budget", [0, -1, float("nan"), float("inf"), 10**400, "", "12 apples", "-3GiB", "9" * 400, "0%", True, None, [1]]
)
def test_a_budget_that_is_none_is_one_clear_error(budget):
    with pytest.raises(tgo.SettingsError, match="budget"):
        tgo.Planner(model_of(), budget, inputs=INPUTS)


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"strategy": "fastest"}, "fastest.*layerwise"),
        ({"strategy": "sequential", "prefetch": 2}, "prefetch"),
        ({"strategy": "layerwise", "prefetsh": 2}, "prefetsh.*prefetch"),
        ({"strategy": "layerwise", "prefetch": -1}, "prefetch"),
        ({"strategy": "layerwise", "ratio": 2.0}, "ratio"),
        ({"strategy": "layerwise", "residents": "some"}, "residents"),
        ({"strategy": "model", "writeback": 1}, "writeback"),
        ({"machine": "rtx9999"}, "rtx9999.*rtx4090"),
        ({"strategy": "sequential", "margin": "much"}, "margin"),
        ({"strategy": "sequential", "margin": -1}, "margin -1"),
    ],
)
def test_settings_that_make_no_sense_are_named(settings, names):
    with pytest.raises(tgo.SettingsError, match=names):
        tgo.Planner(model_of(), 1, inputs=INPUTS, **settings).plan()


def test_bad_inputs_leave_the_model_as_it_was():
    model = model_of()
    before, keys = copy.deepcopy(model.state_dict()), [id(p) for p in model.parameters()]
    with pytest.raises(tgo.TraceError, match="inputs"):
        tgo.Planner(model, 1, inputs=(torch.ones(2, 63),), strategy="sequential").plan()
    with pytest.raises(tgo.OffloadError):
        tgo.Planner(torch.nn.ReLU(), 1, inputs=INPUTS, strategy="sequential").plan()
    assert [id(p) for p in model.parameters()] == keys
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_weights_on_two_devices_are_refused():
    model: Any = model_of()
    model[3].to("meta")
    with pytest.raises(tgo.OffloadError, match=r"cpu.*meta|meta.*cpu"):
        tgo.Planner(model, 1, inputs=INPUTS, strategy="sequential").plan()


@pytest.mark.parametrize("strategy", [name for name in strategies.names()])
def test_a_budget_too_small_says_what_would_do_for_this_strategy_and_for_the_best(strategy):
    trace = trace_of([MIB, 2 * MIB, MIB], transient_bytes=1000)
    with pytest.raises(tgo.BudgetError) as refused:
        plan_of(trace, 5000, strategy)
    smallest = refused.value.smallest_bytes
    assert f'"{smallest}B"' in str(refused.value)
    plan = plan_of(trace, smallest, strategy)
    assert plan.peak_bytes <= smallest
    with pytest.raises(tgo.BudgetError):
        plan_of(trace, smallest - 512, strategy)
    if strategy == "resident":
        assert "would do with" in str(refused.value)


def test_all_of_the_weights_is_enough_to_keep_them():
    for sizes in ([100] * 7, [64 * 64 * 4, 64 * 4] * 4):
        trace = trace_of(sizes, transient_bytes=77)
        plan = plan_of(trace, "100%", "resident")
        assert len(plan.residents) == len(sizes)


UNITS = [
    (None, "list of dicts"),
    (3, "list of dicts"),
    ([], "at least one"),
    ([5], "no dict"),
    ([{"name": "a", "seconds": 1}], "tensors"),
    ([{"name": "a", "seconds": "x", "tensors": []}], "seconds"),
    ([{"name": "a", "seconds": float("nan"), "tensors": []}], "seconds"),
    ([{"name": "a", "seconds": 1, "tensors": 5}], "tensors"),
    ([{"name": "a", "seconds": 1, "tensors": ["x"]}], "tensor"),
    ([{"name": "a", "seconds": 1, "tensors": [1.5]}], "whole number"),
    ([{"name": "a", "seconds": 1, "tensors": [-1]}], "tensor"),
    ([{"name": "a", "seconds": 1, "tensors": [1], "tensor_seconds": [-1]}], "tensor_seconds"),
    ([{"name": "a", "seconds": 1, "tensors": [1], "tensor_seconds": [1, 1]}], "2 tensor_seconds for 1"),
    ([{"name": "a", "seconds": 1, "tensors": [1], "speed": 2}], "speed"),
    ([{"name": n, "seconds": 1, "tensors": {"w": s}} for n, s in (("a", 1), ("b", 2))], "elsewhere"),
]


@pytest.mark.parametrize(("units", "names"), UNITS)
def test_units_that_make_no_sense_are_named(units, names):
    with pytest.raises(tgo.SettingsError, match=names):
        tgo.Trace.from_units(units)


def test_a_margin_is_left_free():
    trace = trace_of([MIB] * 4)
    plan = tgo.Planner.for_trace(trace, "3MiB", strategy="keep", machine=SLOW_LINK, margin="1MiB").plan()
    assert plan.peak_bytes <= 2 * MIB
    assert "margin 1.0 MiB" in plan.explain()


def test_a_captured_model_is_planned_explained_saved_and_loaded(tmp_path):
    model = model_of(8, 256)
    planner = tgo.Planner(model, "600KiB", inputs=(torch.ones(4, 256),), strategy="layerwise", machine="rtx4090")
    plan = planner.plan()
    assert plan.margin_bytes > 0, "a GPU's allocator wants its share"
    assert plan.peak_bytes + plan.margin_bytes <= plan.budget_bytes
    plan.save(tmp_path / "plan.yaml")
    assert tgo.Plan.load(tmp_path / "plan.yaml", model) == plan


def test_a_card_keeps_what_its_libraries_take_free_unless_a_margin_is_given(tmp_path):
    def plan(libraries, budget, **options):
        machine = replace(SLOW_LINK, library_bytes=libraries)
        return tgo.Planner(model_of(8, 64), budget, inputs=(torch.ones(4, 64),), machine=machine, **options).plan()

    taken = 20 << 10
    without, kept = plan(0, "60KiB"), plan(taken, f"{(60 << 10) + taken}B")
    assert kept.margin_bytes == without.margin_bytes + taken
    assert (kept.arena_bytes, kept.residents) == (without.arena_bytes, without.residents)
    assert plan(taken, "50%").budget_bytes == plan(0, "50%").budget_bytes + taken
    assert plan(taken, "60KiB", margin=0).margin_bytes == 0
    assert plan(MIB, "60KiB").margin_bytes == without.margin_bytes, "a toy"
    with pytest.raises(tgo.BudgetError, match=r"margin 20\.\d KiB"):
        plan(taken, "30KiB")
    kept.save(tmp_path / "plan.yaml")
    assert tgo.Plan.load(tmp_path / "plan.yaml") == kept
    without.save(tmp_path / "plan.yaml")
    assert "library_bytes" not in (tmp_path / "plan.yaml").read_text()


def test_explain_says_who_stays_what_streams_what_binds_and_what_more_would_buy():
    trace = trace_of([MIB] * 8, 1e-4)
    text = plan_of(trace, 4 * MIB, "layerwise", residents="leading").explain()
    assert "a, b" in text  # who stays
    assert "6.0 MiB per step in 6 copies" in text
    assert "longest before c" in text
    assert "the link" in plan_of(trace, 4 * MIB, "layerwise", residents="spread").explain()
    assert "1 GiB more" in text
    compute_bound = plan_of(trace_of([MIB] * 8, 1.0), 4 * MIB, "layerwise").explain()
    assert "bound by    compute" in compute_bound
    stalled = plan_of(trace_of([MIB] * 8, 1e-3), 4 * MIB, "sequential").explain()
    assert "stalls: compute waits" in stalled
    assert "longest before a: " in stalled


def test_planning_twice_gives_the_same_plan():
    trace = trace_of([MIB, 3 * MIB, 2 * MIB] * 3)
    assert str(plan_of(trace, "50%", "layerwise")) == str(plan_of(trace, "50%", "layerwise"))
