"""A plan file is never authority: what was edited, or is for another model, is refused by name; nothing is lost."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import taskgraph_offload as tgo
from taskgraph_offload.nouns.trace import Weight
from taskgraph_offload.plan.file import parse_file, print_file

from ..made import cases, plan_of, trace_of

PLANS: dict[str, dict[str, Any]] = {
    "sequential": {},
    "layerwise": {"residents": "spread"},
    "keep": {},
    "resident": {},
    "model": {"writeback": True},
}


@pytest.mark.parametrize("strategy", PLANS)
def test_a_saved_plan_loads_as_it_was(strategy, tmp_path):
    plan = plan_of(trace_of([512 * n for n in range(1, 8)], tensors=2), "1GiB", strategy, **PLANS[strategy])
    plan.save(tmp_path / "plan.yaml")
    assert tgo.Plan.load(tmp_path / "plan.yaml") == plan
    assert [path.name for path in tmp_path.iterdir()] == ["plan.yaml"]


def test_the_bytes_of_a_plan_file_depend_on_the_plan_alone():
    made = [print_file(plan_of(trace_of([512] * 5), 2048, "layerwise", residents="spread")) for _ in range(2)]
    assert made[0] == made[1]


EDITS = [
    (r"bundle c at 0", "bundle c at 100", "aligned|512"),
    (r"bundle c at 0", "bundle c at 512", "b.*c|c.*b"),
    (r"bundle c at 0", "bundle c at 1048576", "arena"),
    (r"arena 1024", "arena 512", "arena"),
    (r"budget 1024", "budget 1023", "budget"),
    (r"bundle a at 0:", "bundle a at 0 resident:", "resident"),
    (r"bundle a at 0: a.0", "bundle a at 0: b.0", "b.0|a.0"),
    (r"bundle a at 0: a.0", "bundle a at 0: zz", "zz"),
    (r"  h2d d after compute b\n", "", "d"),
    (r"  compute b\n", "", "compute b|call"),
    (r"after compute a", "after compute zz", "zz"),
    (r"  compute c\n(    h2d a after compute c\n)", r"\1    compute c\n", "compute c"),
    (r"h2d c after compute a", "h2d c [0:256]", "c"),
    (r"strategy layerwise", "strategi layerwise", "strategi"),
    (r"cold:", "warm:", "warm"),
    (r"\"a.0\"\]", '"b.0"]', "fingerprint|edited"),
    (r"fingerprint: .*", "fingerprint: 0", "fingerprint"),
    (r"taskgraph_offload: 1", "taskgraph_offload: 99", "version"),
    (r"taskgraph_offload: 1", "taskgraph_offload: 1\nextra: 1", "extra"),
    (r'"step_seconds": [^,]*', '"step_seconds": 99.0', "bound"),
    (r'"step_seconds": [^,]*', '"step_seconds": -1', "step_seconds"),
    (r'"step_seconds": [^,]*', '"step_seconds": .nan', "step_seconds"),
    (r'"latency_seconds": [^,]*', '"latency_seconds": x', "latency_seconds"),
    (r'"enter", 0', '"sideways", 0', "sideways"),
    (r'"enter", 0', '"enter", 7', "fingerprint"),
]


@pytest.mark.parametrize(
    ("pattern", "replacement", "names"), EDITS, ids=[edit[1].strip()[:30] or edit[0] for edit in EDITS]
)
def test_an_edited_plan_is_refused_with_what_is_wrong(pattern, replacement, names, tmp_path):
    text = print_file(plan_of(trace_of([512] * 4), 1024, "layerwise"))
    edited, count = re.subn(pattern, replacement, text, count=0)
    assert count, "the edit must hit"
    (tmp_path / "plan.yaml").write_text(edited)
    with pytest.raises(tgo.PlanError, match=names) as refused:
        tgo.Plan.load(tmp_path / "plan.yaml")
    assert "plan.yaml" in str(refused.value)


# The same, by one who also writes a fitting fingerprint: what makes no sense must still be refused.
TAMPERED = [
    (r'\["a.0", 512', '["a.0", -512', "nbytes"),
    (r'\["a.0", 512', '["a.0", "512"', "nbytes"),
    (r'\["a.0", 512', '["b.0", 512', "twice"),
    (r'\[\["a", "enter", 0\], \["a.0"\]', '[["a", "enter", 0], [["a.0"]]', "reads"),
    (r'\[\["a", "enter", 0\], \["a.0"\]', '[["a", "enter", 0], ["zz"]', "zz"),
    (r"0, 0.001\]", "-5, 0.001]", "transient_bytes"),
    (r"0.001\]", ".inf]", "seconds"),
    (r'"a", "a", ""', '"b", "a", ""', "twice"),
    (r"source: .*", "source: [1]", "source"),
    (r"calls:[^$]*activations", "calls: []\n  activations", "no call"),
]


@pytest.mark.parametrize(("pattern", "replacement", "names"), TAMPERED, ids=[edit[1][:30] for edit in TAMPERED])
def test_a_tampered_trace_is_refused_even_with_a_fitting_fingerprint(pattern, replacement, names, monkeypatch):
    text = print_file(plan_of(trace_of([512] * 4), 1024, "layerwise"))
    edited, count = re.subn(pattern, replacement, text)
    assert count, "the edit must hit"
    (fingerprint,) = re.findall(r'fingerprint: "(\w+)"', text)
    monkeypatch.setattr(tgo.Trace, "fingerprint", fingerprint)
    with pytest.raises(tgo.PlanError, match=names):
        parse_file(edited)


@settings(max_examples=60)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), min_size=1, max_size=4))
def test_any_names_survive_the_file(names):
    """Spaces, quotes, line ends, control characters, emoji, marks that mean something in the text form."""
    trace = tgo.Trace.from_units({"name": n, "seconds": 1e-3, "tensors": {f"{n} w": 512}} for n in names)
    plan = plan_of(trace, "1MiB", "sequential")
    assert parse_file(print_file(plan)) == plan


def test_a_plan_is_saved_through_a_link_and_into_a_new_folder(tmp_path):
    plan = plan_of(trace_of([512] * 2), 1024, "sequential")
    (tmp_path / "link.yaml").symlink_to(tmp_path / "new" / "plan.yaml")
    plan.save(tmp_path / "link.yaml")
    assert (tmp_path / "link.yaml").is_symlink()
    assert tgo.Plan.load(tmp_path / "new" / "plan.yaml") == plan
    (tmp_path / "file").write_text("")
    with pytest.raises(tgo.PlanError, match=r"cannot be written to .*file/plan"):
        plan.save(tmp_path / "file" / "plan.yaml")


def small_model(width: int = 8, names: tuple[str, ...] = ("first", "second")) -> Any:
    model = torch.nn.Module()
    for name in names:
        model.add_module(name, torch.nn.Linear(width, width))
    return model


def traced_by_hand(model: torch.nn.Module) -> tgo.Trace:
    trace = tgo.Trace.from_units(
        [{"name": n, "seconds": 1e-3, "tensors": {f"{n}.weight": 256}} for n in ("first", "second")]
    )
    weights = {
        name: Weight(name, tensor.nbytes, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
        for name, tensor in model.named_parameters()
    }
    return tgo.Trace(weights, trace.calls)


@pytest.mark.parametrize(
    ("other", "names"),
    [
        (lambda: small_model(9), "first.weight"),
        (lambda: small_model(8, ("first",)), "second.weight"),
        (lambda: small_model(8, ("first", "second", "third")), "third.weight"),
        (lambda: small_model().half(), "float16"),
    ],
)
def test_a_plan_for_another_model_is_refused_with_the_weight_that_differs(other, names, tmp_path):
    model = small_model()
    plan = plan_of(traced_by_hand(model), "1MiB", "sequential")
    plan.save(tmp_path / "plan.yaml")
    assert tgo.Plan.load(tmp_path / "plan.yaml", model) == plan
    with pytest.raises(tgo.PlanError, match=names):
        tgo.Plan.load(tmp_path / "plan.yaml", other())


def test_a_tie_that_was_cut_is_another_model(tmp_path):
    model = small_model()
    model.second.weight = model.first.weight
    plan = plan_of(tied_trace(model), "1MiB", "sequential")
    plan.save(tmp_path / "plan.yaml")
    tgo.Plan.load(tmp_path / "plan.yaml", model)
    model.second.weight = torch.nn.Parameter(model.first.weight.detach().clone())
    with pytest.raises(tgo.PlanError, match=r"first\.weight.*tied to second\.weight in the plan"):
        tgo.Plan.load(tmp_path / "plan.yaml", model)


def test_a_tie_that_was_made_is_another_model(tmp_path):
    model = small_model()
    plan_of(traced_by_hand(model), "1MiB", "sequential").save(tmp_path / "plan.yaml")
    model.second.weight = model.first.weight
    with pytest.raises(tgo.PlanError, match=r"first\.weight.*tied to second\.weight in the model"):
        tgo.Plan.load(tmp_path / "plan.yaml", model)


def test_two_halves_of_one_storage_are_no_tie(tmp_path):
    model = small_model()
    model.second.weight = model.first.weight
    plan_of(tied_trace(model), "1MiB", "sequential").save(tmp_path / "plan.yaml")
    slab = torch.zeros(16, 8)
    model.first.weight, model.second.weight = torch.nn.Parameter(slab[:8]), torch.nn.Parameter(slab[8:])
    with pytest.raises(tgo.PlanError, match=r"first\.weight"):
        tgo.Plan.load(tmp_path / "plan.yaml", model)


def tied_trace(model: torch.nn.Module) -> tgo.Trace:
    units = [{"name": n, "seconds": 1e-3, "tensors": {"first.weight": 256}} for n in ("first", "second")]
    weights = {
        "first.weight": Weight("first.weight", 256, "float32", (8, 8), ("second.weight",)),
        **{n: Weight(n, 32, "float32", (8,)) for n in ("first.bias", "second.bias")},
    }
    return tgo.Trace(weights, tgo.Trace.from_units(units).calls)


@settings(max_examples=150)
@given(st.data())
def test_a_mangled_file_gives_this_librarys_error_or_a_plan_that_is_proved(data):
    text = print_file(plan_of(trace_of([512, 1024, 512]), "4KiB", "layerwise"))
    start = data.draw(st.integers(0, len(text) - 1))
    stop = data.draw(st.integers(start, min(len(text), start + 40)))
    mangled = text[:start] + data.draw(st.text(max_size=20)) + text[stop:]
    try:
        parse_file(mangled).verify()
    except tgo.OffloadError as error:
        assert str(error)


def test_a_plan_of_sixty_blocks_is_made_saved_and_loaded(tmp_path):
    trace = trace_of([30 * 2**20] * 60, 1e-3, tensors=30)
    plan = plan_of(trace, "600MiB", "layerwise", residents="spread")
    plan.save(tmp_path / "plan.yaml")
    assert tgo.Plan.load(tmp_path / "plan.yaml") == plan


def test_a_file_that_is_no_plan_is_refused(tmp_path):
    for name, text in {"empty": "", "list": "[1, 2]", "bomb": "a: &a [x]\nb: [*a, *a]", "binary": "\x00\x01"}.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(tgo.PlanError, match=name):
            tgo.Plan.load(tmp_path / name)
    with pytest.raises(tgo.PlanError, match="missing"):
        tgo.Plan.load(Path(tmp_path) / "missing")


def test_a_real_case_survives_the_file(tmp_path):
    trace = tgo.Trace.from_units(cases()[0]["units"])
    plan = tgo.Planner.for_trace(trace, "30%", strategy="layerwise", machine="rtx4090").plan()
    plan.save(tmp_path / "plan.yaml")
    assert tgo.Plan.load(tmp_path / "plan.yaml").predict().step_seconds == plan.predict().step_seconds
