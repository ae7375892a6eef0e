"""The command line: what a person without GPU or weights learns from it, what scripts read, how it refuses."""

import importlib
import json
import os
import re
import subprocess
import sys
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import pytest

import taskgraph_offload as tgo
from taskgraph_offload.cli import main
from taskgraph_offload.cli import progress as drawing
from taskgraph_offload.cli.arguments import COMMANDS, EXAMPLES, parser
from taskgraph_offload.cli.models import KNOWN, from_name, known_names, known_trace
from taskgraph_offload.nouns.progress import report

from ..conftest import MISSING, skipping_without_models
from .make_known import traced
from .pages import facts

TOY = """\
import torch

print("this module talks")


def build():
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(128, 128) for _ in range(8)))
    return model, (torch.ones(4, 128),)


def without_inputs():
    return build()[0]


def wrong_inputs():
    return build()[0], (torch.ones(4, 64),)


class Odd(torch.nn.Module):
    def __init__(self):
        super().__init__()
        for number in range(4):
            self.add_module(f"{number}\\x1b]0;title\\x07", torch.nn.Linear(128, 128))

    def forward(self, x):
        for part in self.children():
            x = part(x)
        return x


Odd.__name__ = "Odd\\x1b[31m"


def odd():
    return Odd(), (torch.ones(4, 128),)


class Scaled(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList(torch.nn.Linear(128, 128) for _ in range(4))
        self.scale = torch.nn.Parameter(torch.ones(128))

    def forward(self, x):
        x = (x * self.scale).sin()
        for block in self.blocks:
            x = block(x)
        return x


def with_a_start():
    return Scaled(), (torch.ones(4, 128),)


def broken():
    raise RuntimeError("not today\\nnor tomorrow")


def number():
    return 7
"""
FIGURES = {"step_seconds", "cold_seconds", "compute_seconds", "stall_seconds", "overlap", "peak_bytes"}
PLAN_KEYS = {
    *("command", "model", "program", "trace", "machine", "strategy", "options", "budget_bytes", "arena_bytes"),
    *("activation_bytes", "margin_bytes", "peak_bytes", "weight_bytes", "resident_bytes", "streamed_bytes"),
    *("predicted", "bound", "outlook"),
}


@pytest.fixture(autouse=True)
def _in_a_folder_with_a_model(tmp_path, monkeypatch):
    (tmp_path / "toy_models.py").write_text(TOY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "toy_models", raising=False)
    monkeypatch.setenv("COLUMNS", "80")


@pytest.fixture(autouse=True)
def commands_are_skipped_without_models(monkeypatch):
    """Skip a test whose command needs a missing library. The command itself would turn the error into a message."""
    if MISSING:
        skipping = contextmanager(skipping_without_models)()
        monkeypatch.setattr("taskgraph_offload.cli.models.library", skipping(importlib.import_module))


# Without weights


def test_a_person_without_gpu_and_weights_learns_how_a_14b_model_would_run(ask):
    text = ask("plan", "wan2.1-14b", "--budget", "12GiB", "--machine", "rtx4090")
    said = facts(text)
    assert said["plan"] == "WanTransformer3DModel, auto, on rtx4090"
    assert said["inputs"] == "batch 1, frames 81, height 480, width 832, tokens 512"
    assert said["budget"].startswith("12.00 GiB: arena ")
    assert "26.6" in said["streamed"], "GiB: 14 billion parameters, two bytes each"
    assert re.match(r"19\.\d+ s predicted \(1\.0", said["step"])
    assert said["bound by"].startswith("compute")
    assert max(map(len, text.splitlines())) <= 80
    assert [line[:12].strip() for line in text.splitlines()[-3:]] == ["compute", "h2d", ""]


@pytest.mark.slow
def test_configurations_of_both_libraries_are_traced_at_their_full_size(ask):
    sizes = {"flux1-dev": (11.9e9, "FluxTransformer2DModel"), "llama3-70b": (70.5e9, "LlamaForCausalLM")}
    for name, (parameters, model) in sizes.items():
        out = ask("plan", "--config", KNOWN / f"{name}.json", "--budget", "30%", "--strategy", "keep", "--json")
        answer = json.loads(out)
        assert (answer["model"], answer["trace"]) == (model, "fake")
        assert answer["weight_bytes"] == pytest.approx(2 * parameters, rel=0.01)


# Models that come with the package


def test_every_known_model_is_listed_and_can_be_planned(ask):
    rows = {row["name"]: row for row in json.loads(ask("models", "--json"))["rows"]}
    assert {"flux1-dev", "wan2.1-14b", "sdxl", "llama3-70b", "t5-xxl"} <= set(rows)
    parameters = {"flux1-dev": 11.9e9, "wan2.1-14b": 14.3e9, "sdxl": 2.57e9, "llama3-70b": 70.6e9, "t5-xxl": 4.76e9}
    for name, number in parameters.items():
        assert rows[name]["weight_bytes"] == pytest.approx(2 * number, rel=0.01)
        assert name in ask("models")
        plan = json.loads(ask("plan", name, "--budget", "50%", "--strategy", "keep", "--machine", "rtx4090", "--json"))
        assert (plan["model"], plan["inputs"]) == (rows[name]["model"], rows[name]["inputs"])


def test_a_known_model_needs_neither_diffusers_nor_transformers_but_other_sizes_do(ask, refused, monkeypatch):
    for library in ("diffusers", "transformers"):
        monkeypatch.setitem(sys.modules, library, None)
    plan = ("plan", "flux1-dev", "--budget", "50%", "--strategy", "keep", "--machine", "rtx4090")
    ask(*plan)
    line = refused(*plan, "--height", 512)
    assert line.startswith("error: flux1-dev: this needs diffusers: pip install 'taskgraph-offload[models]'")


def test_a_known_model_is_traced_anew_for_other_sizes_and_settings(ask):
    plan = ("plan", "t5-xxl", "--budget", "50%", "--strategy", "keep", "--machine", "rtx4090", "--json")
    usual, short = json.loads(ask(*plan)), json.loads(ask(*plan, "--tokens", 64))
    assert (usual["inputs"], short["inputs"]) == ("batch 1, tokens 512", "batch 1, tokens 64")
    assert short["activation_bytes"] < usual["activation_bytes"]
    Path("offload.yaml").write_text("blocks: [encoder.block.*.layer.*]\n")
    ask(*plan, "--settings", "offload.yaml", "--save", "plan.yaml")
    calls = tgo.Plan.load("plan.yaml").trace.calls
    assert {call.block for call in calls} >= {"encoder.block.0.layer.0", "encoder.block.0.layer.1"}


@pytest.mark.parametrize(
    "name", [name if name == "t5-xxl" else pytest.param(name, marks=pytest.mark.slow) for name in known_names()]
)
def test_the_trace_of_a_known_model_is_that_of_its_configuration(name):
    assert known_trace(name) == traced(name), "make them anew: python -m tests.cli.make_known"


def test_the_plan_of_a_known_model_fits_the_real_model(ask):
    ask("plan", "t5-xxl", "--budget", "50%", "--strategy", "keep", "--machine", "rtx4090", "--save", "plan.yaml")
    model = from_name("t5-xxl", {}).model
    assert tgo.Plan.load("plan.yaml", model).trace.model == "T5EncoderModel"


def test_the_traces_are_small():
    assert sum(path.stat().st_size for path in KNOWN.iterdir()) < 100_000


# Configurations


SMALL = {
    "sd3": {
        "_class_name": "SD3Transformer2DModel", "num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2,
        "joint_attention_dim": 12, "caption_projection_dim": 16, "pooled_projection_dim": 10, "in_channels": 4,
    },
    "qwen image": {
        "_class_name": "QwenImageTransformer2DModel", "num_layers": 2, "attention_head_dim": 16, "in_channels": 16,
        "num_attention_heads": 2, "joint_attention_dim": 24, "axes_dims_rope": [4, 6, 6],
    },
    "wan from a picture": {
        "_class_name": "WanTransformer3DModel", "num_attention_heads": 2, "attention_head_dim": 12, "text_dim": 16,
        "ffn_dim": 32, "num_layers": 2, "freq_dim": 16, "image_dim": 20, "added_kv_proj_dim": 24,
    },
    "sdxl": {
        "_class_name": "UNet2DConditionModel", "block_out_channels": [8, 16], "attention_head_dim": [1, 2],
        "cross_attention_dim": 12, "projection_class_embeddings_input_dim": 32, "addition_time_embed_dim": 4,
        "norm_num_groups": 4, "sample_size": 8, "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"], "addition_embed_type": "text_time",
    },
    "t5": {
        "architectures": ["T5ForConditionalGeneration"], "model_type": "t5", "vocab_size": 64, "d_model": 32,
        "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
    },
    "clip": {
        "architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "hidden_size": 16,
        "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    },
    "vit": {
        "model_type": "vit", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 32, "image_size": 32, "patch_size": 4,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", SMALL)
def test_well_known_architectures_come_with_inputs(ask, name):
    Path("config.json").write_text(json.dumps(SMALL[name]))
    answer = json.loads(ask("plan", "--config", "config.json", "--budget", "150%", "--machine", "rtx4090", "--json"))
    assert answer["trace"] == "fake", "traced with shapes"
    assert answer["inputs"].startswith("batch ")


def test_the_sizes_of_inputs_can_be_changed(ask, refused):
    Path("config.json").write_text(json.dumps(SMALL["sd3"]))
    plan = ("plan", "--config", "config.json", "--budget", "150%", "--json")
    usual = json.loads(ask(*plan))
    small = json.loads(ask(*plan, "--batch", 1, "--height", 256, "--width", 256))
    assert small["inputs"] == "batch 1, height 256, width 256, tokens 333"
    assert small["activation_bytes"] < usual["activation_bytes"] / 8
    assert "--frames is not a size of SD3Transformer2DModel" in refused(*plan, "--frames", 5)


def test_a_model_that_is_not_known_is_refused_with_what_would_do(refused):
    model = {"_class_name": "PriorTransformer", "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8}
    Path("config.json").write_text(json.dumps(model))
    assert "give a module:factory that returns (model, inputs)" in refused(
        "plan", "--config", "config.json", "--budget", 1
    )


def test_costs_of_a_model_without_inputs_are_said_to_be_guesses(ask):
    said = facts(ask("plan", "toy_models:without_inputs", "--budget", "50%"))
    assert "without shapes" in said["inputs"]
    assert "guesses" in said["careful"]
    assert "inputs=" not in said["careful"]
    assert "guesses" in ask("compare", "toy_models:without_inputs", "--budget", "50%", "--strategies", "keep")


# Each command


def test_plan_writes_what_show_reads(ask):
    files = ("--save", "plan.yaml", "--timeline", "plan.svg", "--trace", "plan.json")
    planned = json.loads(
        ask("plan", "toy_models:build", "--budget", "50%", "--strategy", "layerwise", "--json", *files)
    )
    assert set(planned) == {*PLAN_KEYS, "inputs"}
    assert set(planned["predicted"]) == FIGURES
    assert json.loads(Path("plan.json").read_text())["traceEvents"]
    assert Path("plan.svg").read_text().lstrip().startswith("<?xml")
    shown = json.loads(ask("show", "plan.yaml", "--model", "toy_models:build", "--json"))
    assert set(shown) == {*PLAN_KEYS, "verified", "tasks"}
    assert {**shown, "command": "plan", "inputs": planned["inputs"], "verified": 0, "tasks": 0} == {
        **planned,
        "verified": 0,
        "tasks": 0,
    }
    assert [task["text"] for task in shown["tasks"]] == [str(task) for task in tgo.Plan.load("plan.yaml").tasks]


def test_show_has_a_page_a_grid_and_a_text(ask):
    ask("plan", "toy_models:build", "--budget", "50%", "--strategy", "layerwise", "--save", "plan.yaml")
    plan = tgo.Plan.load("plan.yaml")
    assert "Proved" in ask("show", "plan.yaml")
    assert ask("show", "plan.yaml", "--text") == str(plan)
    grid = ask("show", "plan.yaml", "--grid").splitlines()
    assert [line[3:].split()[0] for line in grid[2:]] == [call.name for call in plan.trace.calls]
    assert grid[0].split() == ["call", "begins", "takes", "waits", "on", "device", "copied", "meanwhile"]


def test_compare_marks_the_fastest_and_says_what_the_others_need(ask):
    command = ("compare", "toy_models:build", "--budget", "300KiB", "--machine", "rtx4090")
    rows = json.loads(ask(*command, "--json"))["rows"]
    assert {row["strategy"] for row in rows} >= {"auto", "keep", "sequential", "layerwise residents=spread"}
    marked = [line for line in ask(*command).splitlines() if line.startswith("▸")]
    assert len(marked) == 1
    assert marked[0].split()[1] == rows[0]["strategy"].split()[0]
    assert re.search(r"resident +-.* needs 5\d\d\.\d KiB", ask(*command))
    some = json.loads(ask(*command, "--strategies", "keep", "layerwise prefetch=2 residents=spread", "--json"))["rows"]
    assert {row["strategy"] for row in some} == {"keep", "layerwise prefetch=2 residents=spread"}


def test_where_no_strategy_works_the_table_says_what_each_needs_and_the_exit_code_that_it_failed(capsys):
    command = ["compare", "toy_models:build", "--budget", "1KiB", "--machine", "rtx4090"]
    assert main(command) == 1
    page, error = capsys.readouterr()
    assert len(re.findall(r"needs +\d+\.\d KiB", page)) == 8
    assert "▸" not in page
    assert re.search(r'error: .* the smallest that works is "\d+B" \(70\.8 KiB\), with auto\n', error)
    assert main([*command, "--json"]) == 1
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert main([*command[:3], f"{min(row['smallest_bytes'] for row in rows)}B", *command[4:]]) == 0
    assert main(["sweep", "toy_models:build", "--budgets", "1KiB", "--machine", "rtx4090"]) == 1
    assert "no strategy fits into any of these budgets" in capsys.readouterr().err


def test_sweep_marks_how_much_memory_is_enough(ask):
    command = ("sweep", "toy_models:build", "--machine", "rtx4090", "--strategies", "keep", "sequential")
    answer = json.loads(ask(*command, "--points", 4, "--json"))
    assert len(answer["rows"]) == 2 * 4
    table = ask(*command, "--points", 4, "--picture", "sweep.svg").splitlines()
    marked = next(line for line in table if line.startswith("▸"))
    assert table[-1].startswith(marked[1:].strip().split("  ")[0])
    assert Path("sweep.svg").stat().st_size > 1000
    listed = json.loads(ask(*command, "--budgets", "300KiB", "50%", "--json"))
    assert {row["budget_bytes"] for row in listed["rows"]} >= {300 * 2**10}


def test_run_measures_what_was_predicted(ask):
    command = ("run", "toy_models:build", "--budget", "50%", "--strategy", "layerwise", "--device", "cpu", "--steps", 3)
    answer = json.loads(ask(*command, "--machine", "cpu", "--json", "--timeline", "run.svg"))
    assert set(answer) == {*PLAN_KEYS, "inputs", "device", "measured", "stats"}
    assert set(answer["measured"]) == FIGURES
    assert answer["stats"]["divergences"] == 0
    assert answer["stats"]["peak_bytes"] <= answer["budget_bytes"]
    assert answer["measured"]["step_seconds"] > 0
    assert "measured" in Path("run.svg").read_text()
    page = ask(*command, "--link", "0.5")
    assert re.search(r"▸ +step +\S+ .?s +\S+ .?s +\d", page)


@pytest.mark.parametrize("device", ["cuda:99", "foo", "cpu:3"])
def test_a_device_that_is_not_there_is_refused_before_anything_is_built(refused, device):
    line = refused("run", "flux1-dev", "--budget", "60%", "--machine", "rtx4090", "--device", device)
    assert "device" in line
    assert device.partition(":")[0] in line


def test_a_slower_link_is_predicted_too(ask):
    """Whether the machine is measured or named."""
    command = ("run", "toy_models:build", "--budget", "50%", "--strategy", "layerwise", "--device", "cpu", "--steps", 3)
    found = json.loads(ask(*command, "--machine", "cpu", "--link", "0.001", "--json"))
    moved = found["stats"]["h2d_bytes"] / 3
    assert found["predicted"]["step_seconds"] > 0.8 * moved / 1e6


def test_a_configuration_runs_with_random_weights_where_they_fit(ask, refused):
    Path("config.json").write_text(json.dumps(SMALL["t5"]))
    run = ("run", "--budget", "80%", "--device", "cpu", "--machine", "cpu")
    answer = json.loads(ask(*run, "--config", "config.json", "--steps", 2, "--tokens", 8, "--json"))
    assert answer["inputs"] == "batch 1, tokens 8"
    big = json.loads((KNOWN / "llama3-70b.json").read_text()) | {"num_hidden_layers": 2000}
    Path("big.json").write_text(json.dumps(big))
    assert "of RAM of this machine" in refused(*run, "--config", "big.json")


def test_settings_say_what_is_not_typed(ask):
    Path("offload.yaml").write_text("budget: 50%\nstrategy: layerwise\noptions: {prefetch: 2}\nmachine: a100\n")
    command = ("plan", "toy_models:build", "--settings", "offload.yaml", "--json")
    answer = json.loads(ask(*command))
    assert (answer["strategy"], answer["options"], answer["machine"]["name"]) == ("layerwise", {"prefetch": 2}, "a100")
    typed = json.loads(ask(*command, "--option", "residents=spread", "--machine", "h100", "--budget", "60%"))
    assert typed["options"] == {"prefetch": 2, "residents": "spread"}
    assert typed["machine"]["name"] == "h100"
    assert typed["budget_bytes"] > answer["budget_bytes"]
    assert json.loads(ask(*command, "--strategy", "keep"))["options"] == {}


# Refusals


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("plan toy_models:absent --budget 1", "has no 'absent'"),
        ("plan absent_models:build --budget 1", "cannot import 'absent_models'"),
        ("plan toy_models:broken --budget 1", "toy_models:broken raised RuntimeError: not today"),
        ("plan toy_models:number --budget 1", "returned int '7'; it must return a model"),
        ("plan toy_models --budget 1", "write module:factory"),
        ("plan toy_models:build --budget 12apples", "cannot read the budget '12apples'"),
        ("plan toy_models:build --budget 1KiB", "the smallest that works is"),
        ("plan toy_models:build --budget 1 --machine rtx", "unknown machine 'rtx'"),
        ("plan toy_models:build --budget 1 --strategy best", "unknown strategy 'best'"),
        ("plan toy_models:build --budget 1 --option depth=2", "has no option 'depth'"),
        ("plan toy_models:build --budget 1 --save no/plan.yaml", "there is no folder no; make it"),
        ("plan toy_models:build --budget 1 --save .", "--save .: this is a folder; give the name of a file in it"),
        ("plan toy_models:build --budget 1 --timeline plan.txt", "the name must end in .png or .svg"),
        ("plan toy_models:build --budget 1 --trace plan.txt", "the name must end in .json"),
        ("plan toy_models:build --budget 1 --save s.png --timeline ./s.png", "--save and --timeline name one file"),
        ("plan toy_models:build --save o.yaml --settings o.yaml", "--settings and --save name one file"),
        ("plan toy_models:build --budget 1 --settings none.yaml", "settings file none.yaml: there is no such file"),
        ("plan --config none.json --budget 1", "none.json: No such file or directory"),
        ("plan --config toy_models.py --budget 1", "is not JSON"),
        ("show none.yaml", "none.yaml"),
        ("show toy_models.py", "toy_models.py: not a readable plan file"),
        ("run toy_models:without_inputs --budget 50% --device cpu --machine cpu", "comes without inputs"),
        ("run toy_models:build --budget 50% --device tpu --machine cpu", "tpu"),
    ],
)
def test_a_refusal_is_one_line(refused, command, says):
    assert says in refused(*command.split())


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (
            "plan toy_models:wrong_inputs --budget 1",
            "Give a module:factory that returns (model, inputs), with inputs that",
        ),
        ("run toy_models:build --budget 50% --device cuda --machine cpu --link 4", "--link"),
    ],
)
def test_a_refusal_names_what_can_be_typed_not_what_can_be_called(refused, command, says):
    line = refused(*command.split())
    assert says in line
    assert not re.search(r"\b(inputs|device|link_bytes_per_second)=", line)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ([1], "a configuration must be a JSON object"),
        ({}, "neither '_class_name' (diffusers) nor 'model_type' (transformers)"),
        ({"_class_name": "DDIMScheduler"}, "has no model 'DDIMScheduler'"),
        ({"_class_name": "FluxTransformer2DModel", "num_layers": "many"}, "cannot be built: TypeError"),
        ({"model_type": "none_such"}, "has no model_type 'none_such'"),
        ({"model_type": "llama", "architectures": ["OwnLlama"]}, "has no model 'OwnLlama'"),
    ],
)
def test_a_configuration_that_makes_no_sense_is_one_line(refused, fields, says):
    Path("config.json").write_text(json.dumps(fields))
    assert says in refused("plan", "--config", "config.json", "--budget", 1)


@pytest.mark.parametrize(
    "command",
    [
        "",
        "frobnicate",
        "plan",
        "plan toy_models:build",
        "plan toy_models:build --config config.json --budget 1",
        "plan toy_models:build --budget 1 --option prefetch",
        "plan toy_models:build --budget 1 --height 64",
        "plan --config config.json --budget 1 --height -64",
        "sweep toy_models:build --points 1",
        "sweep toy_models:build --points 101",
        "run toy_models:build --budget 1 --link fast",
        "show",
    ],
)
def test_wrong_usage_is_one_line_and_points_to_the_help(refused, command):
    assert "--help)" in refused(*command.split(), code=2)


def test_a_traceback_is_there_for_who_asks():
    with pytest.raises(tgo.SettingsError) as caught:
        main(["plan", "toy_models:broken", "--budget", "1", "--traceback"])
    assert isinstance(caught.value.__cause__, RuntimeError)


# For people, and for scripts


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_help_explains_shows_examples_and_fits_the_terminal(capsys, command):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"] if command else ["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "examples:" in text
    assert "exit codes:" in text
    assert max(map(len, text.splitlines())) <= 80
    assert ("keys of --json:" in text) == bool(command)


def test_the_examples_in_the_help_can_be_parsed():
    shown = "\n".join([EXAMPLES, *(command.examples for command in COMMANDS.values())]).replace("\\\n", "")
    commands = re.findall(r"^ +taskgraph-offload (.+)$", shown, re.MULTILINE)
    assert len(commands) > 12
    for command in commands:
        words = [quoted or plain for quoted, plain in re.findall(r'"([^"]+)"|(\S+)', command.partition("|")[0])]
        model = getattr(parser().parse_args(words), "model", None)
        assert model is None or ":" in model or model.startswith("./") or model in known_names()


def test_the_version_is_the_one_of_the_package(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"taskgraph-offload {tgo.__version__}\n"
    assert version("taskgraph-offload") == tgo.__version__


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_tables_fit_the_terminal(ask, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    ask("plan", "toy_models:build", "--budget", "50%", "--save", "plan.yaml")
    pages = [
        ask("compare", "toy_models:build", "--budget", "50%"),
        ask("show", "plan.yaml"),
        ask("show", "plan.yaml", "--grid"),
        ask("sweep", "toy_models:build", "--points", 3, "--strategies", "keep", "sequential"),
        ask("run", "toy_models:build", "--budget", "50%", "--device", "cpu", "--machine", "cpu", "--steps", 2),
    ]
    for page in pages:
        assert max(map(len, page.splitlines())) <= width
        assert "…" not in page
    assert len(re.findall(r" \d+\.\d\d ms", pages[0])) >= 6, "the step of each strategy that works"


def test_no_name_gives_the_terminal_orders(ask, refused):
    ask("plan", "toy_models:odd", "--budget", "50%", "--machine", "rtx4090", "--save", "plan.yaml")
    pages = [
        ask("plan", "toy_models:odd", "--budget", "50%", "--machine", "rtx4090"),
        ask("compare", "toy_models:odd", "--budget", "50%", "--machine", "rtx4090", "--strategies", "keep"),
        *(ask("show", "plan.yaml", *view) for view in ([], ["--grid"], ["--text"])),
    ]
    assert all(page.replace("\n", "").isprintable() for page in pages)
    assert "Odd\\x1b[31m" in pages[0]
    assert "\\x1b]0;title" in pages[3]
    assert "'toy\\x1b[31m'" in refused("plan", "toy\x1b[31m:build", "--budget", 1)
    assert "--\\x1b[31m" in refused("show", "plan.yaml", "--\x1b[31m", code=2)


def test_what_runs_before_the_first_block_is_said_in_words(ask):
    files = ("--save", "plan.yaml", "--trace", "plan.json")
    pages = [
        ask("plan", "toy_models:with_a_start", "--budget", "150%", "--strategy", "sequential", *files),
        ask("show", "plan.yaml", "--grid"),
    ]
    assert pages[1].splitlines()[2].startswith("   before the first block  ")
    assert not any(":start" in page for page in pages)
    events = json.loads(Path("plan.json").read_text())["traceEvents"]
    assert "before the first block" in {event["name"] for event in events}


def test_json_is_alone_on_stdout_whatever_the_model_prints():
    command = [sys.executable, "-m", "taskgraph_offload", "plan", "toy_models:build", "--budget", "50%", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert json.loads(done.stdout)["command"] == "plan"
    assert done.stderr.strip() == "this module talks", "no progress where nobody waits"


def test_a_terminal_without_unicode_gets_plain_characters():
    command = [sys.executable, "-m", "taskgraph_offload", "compare", "toy_models:build", "--budget", "300KiB"]
    environment = {"PYTHONIOENCODING": "ascii", "COLUMNS": "80", "PATH": ""}
    done = subprocess.run(command, capture_output=True, env=environment, check=False)
    assert done.returncode == 0
    assert done.stdout.isascii()
    assert b"?" not in done.stdout
    assert any(line.startswith(b"> ") for line in done.stdout.splitlines())


@pytest.mark.parametrize(("patience", "drawn"), [(0.0, True), (1e6, False)])
def test_progress_is_drawn_on_a_terminal_once_the_work_has_taken_long(monkeypatch, patience, drawn):
    """The terminal's own orders apart, work that is done at once leaves no trace."""
    monkeypatch.setattr(drawing, "PATIENCE", patience)
    written = on_a_terminal(monkeypatch, "planning", 2)
    assert ("planning" in written and "1/2" in written) == drawn
    assert drawn or re.sub(r"\x1b\[[\d?]*[a-zA-Z]|\s", "", written) == ""


def test_progress_says_nothing_in_a_pipe(capfd):
    with drawing.show_progress():
        report("planning", 0, 2)
        report("planning", 2, 2)
    assert capfd.readouterr() == ("", "")


def on_a_terminal(monkeypatch, what: str, steps: int) -> str:
    """What is written to stderr when that is a terminal, while steps are reported."""
    theirs, ours = os.openpty()
    with os.fdopen(ours, "w") as terminal, os.fdopen(theirs, "rb", buffering=0) as reader:
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setattr(sys, "stderr", terminal)
        with drawing.show_progress() as bars:
            assert bars is not None
            for done in range(steps + 1):
                report(what, done, steps)
                bars.refresh()
        terminal.flush()
        return reader.read(2**16).decode()


def test_the_strip_is_dark_where_a_lane_works():
    from taskgraph_offload.cli.answers import step_strip

    units = [{"name": name, "seconds": 1e-3, "tensors": [2**20]} for name in "abcd"]
    machine = tgo.Machine("even", 2**20 / 1e-3, 2**20 / 1e-3, 0.0, 1.0, 1.0)  # each copy takes as long as a call
    trace = tgo.Trace.from_units(units)
    plan = tgo.Planner.for_trace(trace, "1MiB", strategy="sequential", machine=machine).plan()
    compute, h2d, scale = (line.plain for line in step_strip(plan.predict(), 12 + 40 + 1))
    assert compute[12:].count("█") == 20
    assert all((above == "█") != (below == "█") for above, below in zip(compute[12:], h2d[12:], strict=True))
    assert scale.endswith("8.00 ms")
