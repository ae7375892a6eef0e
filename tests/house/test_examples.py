"""Everything that the README tells a reader to run, run literally; and every example."""

import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from taskgraph_offload.planner import strategies

import taskgraph_offload as tgo
from taskgraph_offload.devices.cpu import CpuDevice
from taskgraph_offload.nouns.budget import readable

from ..made import SLOW_LINK, trace_of
from ..sweeps import mostly_slow

ROOT = Path(__file__).resolve().parents[2]
MIB = 2**20
EXAMPLES = {
    "quickstart": [],
    "compare_strategies": ["--rounds", "1", "--steps", "1", "--out", "."],
    "how_much_memory": ["--steps", "3", "--out", "."],
    "transformers_llama": [],
    "diffusers_flux": ["--steps", "2"],
    "pipelines": ["--pipelines", "sdxl", "--budgets", "6", "8", "--out", "."],
}
NO_EXAMPLE = {"tiny_dit"}  # the model of the examples


def run(command: list[str], folder: Path) -> str:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    result = subprocess.run(command, cwd=folder, env={**os.environ, "PATH": path}, capture_output=True, text=True)
    assert result.returncode == 0, f"{shlex.join(command)}\n{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.mark.parametrize("name", mostly_slow(EXAMPLES, ["quickstart"]))
def test_every_example_runs(name, tmp_path):
    path = ROOT / "examples" / f"{name}.py"
    for library in re.findall("^from (diffusers|transformers) ", path.read_text(), re.MULTILINE):
        importlib.import_module(library)  # the test is skipped where it is not installed
    assert run([sys.executable, str(path), *EXAMPLES[name]], tmp_path)
    if name == "compare_strategies":
        gallery = {path.name for path in (ROOT / "examples" / "gallery").iterdir()}
        assert gallery <= {path.name for path in tmp_path.iterdir()}, "the gallery shows what the demo makes"


@pytest.fixture
def demo(monkeypatch, tmp_path):
    """The demo as a module, on a small model of its kind, for one short round without pictures."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    module = importlib.import_module("compare_strategies")
    monkeypatch.setattr(module, "make", partial(module.make, width=64, layers=4))
    monkeypatch.setattr(module, "draw", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["compare_strategies", "--rounds", "1", "--steps", "1", "--budget", "80%"])
    threads = torch.get_num_threads()
    yield module
    torch.set_num_threads(threads)


def test_the_demo_fails_where_an_output_differs(demo, monkeypatch, capsys):
    """The model gives something else every time."""
    model, inputs = demo.make()
    model.register_forward_hook(lambda model, args, output: output + torch.rand(()))
    monkeypatch.setattr(demo, "make", lambda device: (model, inputs))
    assert demo.main() == 1
    faults = [line for line in capsys.readouterr().out.splitlines() if "differs from the plain model's" in line]
    assert faults[:2] == [f"auto: step {step} differs from the plain model's" for step in (0, 1)]
    assert len(faults) == 2 * len(demo.CHOICES)


def test_the_demo_fails_where_a_peak_is_over_its_budget(demo, monkeypatch, capsys):
    """The device tells that all of the budget was taken, then that a byte more was."""
    model, inputs = demo.make()
    budget = tgo.Planner(model, "80%", inputs=inputs, machine="cpu").budget_bytes
    monkeypatch.setattr(CpuDevice, "peak_bytes", lambda device: budget)
    assert demo.main() == 0
    assert "every budget was kept" in capsys.readouterr().out
    monkeypatch.setattr(CpuDevice, "peak_bytes", lambda device: budget + 1)
    assert demo.main() == 1
    out = capsys.readouterr().out
    assert f"auto: its peak is 1 B over the budget of {readable(budget)}\n" in out
    assert "every budget was kept" not in out


def test_the_demo_shows_the_peaks_that_were_measured(demo, monkeypatch, capsys):
    monkeypatch.setattr(CpuDevice, "peak_bytes", lambda device: 12345)
    assert demo.main() == 0
    out = capsys.readouterr().out
    assert "Measured: `measured step` (the median), its `/ bound`, and `peak` (the arena and the traced" in out
    head, _, *rows = (line.split("|") for line in out.splitlines() if line.startswith("|"))
    peak = [cell.strip() for cell in head].index("peak")
    shown = {row[1].strip(): row[peak].strip() for row in rows}
    assert {shown.pop("model"), shown.pop("resident")} == {"-"}, "they did not run"
    assert set(shown.values()) == {readable(12345)}
    assert len(shown) == len(demo.CHOICES)


def test_the_demo_says_why_a_step_is_below_the_bound(demo, monkeypatch, capsys):
    """Steps seem to take a nanosecond; and seconds."""
    why = "The machine was faster than the rates that the bound was computed from."
    for seconds, is_below in ((1e-9, True), (1e3, False)):
        monkeypatch.setattr(demo, "median", lambda values, seconds=seconds: seconds)
        assert demo.main() == 0
        out = capsys.readouterr().out
        assert "\npredicted rates: compute " in out
        assert "\nmeasured rates: compute " in out
        assert (why in out) == is_below


def test_every_example_is_listed_here():
    assert {path.stem for path in (ROOT / "examples").glob("*.py")} == {*EXAMPLES, *NO_EXAMPLE}


def python_of(page: str) -> list[str]:
    """The blocks of Python that a page shows."""
    blocks = re.findall(r"^```python\n(.*?)^```$", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)
    assert blocks, f"{page} shows no Python"
    return blocks


def executed(blocks: list[str]) -> dict[str, Any]:
    """What blocks leave behind when they run as they stand, one after another."""
    left: dict[str, Any] = {}
    for block in blocks:
        exec(block, left)
    return left


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "docs/how-it-works.md"])
def test_every_block_of_python_runs_as_it_stands(page, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    executed(python_of(page))


def test_the_first_lines_do_what_they_say(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    left = executed(python_of("README.md")[:1])
    assert torch.equal(left["y"], left["model"](**left["inputs"]))
    assert left["run"].plan.streamed_bytes > 0
    assert left["run"].plan.peak_bytes <= 50 * MIB
    assert left["run"].plan.explain() in capsys.readouterr().out


def test_the_single_steps_do_what_they_say(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    left = executed(python_of("README.md"))
    assert torch.equal(left["y"], left["model"](**left["inputs"]))
    assert {path.name for path in tmp_path.iterdir()} == {"plan.yaml", "timeline.png"}


def test_the_strategy_for_contributors_is_one_file_and_no_more(monkeypatch, tmp_path):
    (tmp_path / "first.py").write_text(python_of("CONTRIBUTING.md")[0])
    monkeypatch.setattr(strategies, "__path__", [*strategies.__path__, str(tmp_path)])
    planner = tgo.Planner.for_trace(trace_of([MIB] * 4), "3MiB", strategy="first", machine=SLOW_LINK, keep=2)
    plan = planner.plan()  # proved
    assert [call.name for call in plan.trace.calls if set(call.reads) <= set(plan.residents)] == ["a", "b"]
    assert "first" in [row["strategy"] for row in planner.compare().rows if row["error"] is None]
    with pytest.raises(tgo.SettingsError, match="'keep' of first is a whole number from 0 on, not -1"):
        tgo.Planner.for_trace(plan.trace, "3MiB", strategy="first", keep=-1)


COMMANDS = re.findall(r"^    (taskgraph-offload .*)$", (ROOT / "README.md").read_text(), re.MULTILINE)


def test_the_readme_has_commands():
    assert len(COMMANDS) >= 3


@pytest.mark.parametrize("command", mostly_slow(COMMANDS, COMMANDS[:1]))
def test_every_command_of_the_readme_works(command):
    assert "rtx4090" in run(shlex.split(command), ROOT)


@pytest.mark.slow
def test_the_request_of_the_readme_is_planned_from_a_directory_as_shown(tmp_path):
    known, flux = ROOT / "taskgraph_offload" / "cli" / "known", tmp_path / "FLUX.1-dev"
    clip = {"model_type": "clip_text_model", "hidden_size": 768, "intermediate_size": 3072}
    clip |= {"num_hidden_layers": 12, "num_attention_heads": 12, "max_position_embeddings": 77}
    vae = {"_class_name": "AutoencoderKL", "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2}
    vae |= {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    parts = {
        "text_encoder": ("transformers", "CLIPTextModel", clip),
        "text_encoder_2": ("transformers", "T5EncoderModel", json.loads((known / "t5-xxl.json").read_text())),
        "transformer": ("diffusers", "FluxTransformer2DModel", json.loads((known / "flux1-dev.json").read_text())),
        "vae": ("diffusers", "AutoencoderKL", vae | {"latent_channels": 16, "sample_size": 1024}),
    }
    for name, (_, _, config) in parts.items():
        (flux / name).mkdir(parents=True)
        (flux / name / "config.json").write_text(json.dumps(config))
    index = {name: [library, kind] for name, (library, kind, _) in parts.items()}
    (flux / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline", **index}))
    (block,) = re.findall(
        r"^```\n\$ (taskgraph-offload .*)\n([^`]*)```$", (ROOT / "README.md").read_text(), re.MULTILINE
    )
    said = " ".join(run(shlex.split(block[0]), tmp_path).split())  # lines are wrapped
    for line in block[1].splitlines():
        assert line == "..." or " ".join(line.split()) in said, f"{line}\n{said}"


def test_every_target_of_make_that_the_readme_names_is_there():
    targets = set(re.findall(r"`?make (\w+)`?", (ROOT / "README.md").read_text()))
    assert targets >= {"demo", "test"}
    for target in targets:
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target


PAGES = ["README.md", "CONTRIBUTING.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]


@pytest.mark.parametrize("page", PAGES)
def test_links_and_pictures_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)]*)\)", (ROOT / page).read_text()):
        path, _, section = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), link
        if section:
            heads = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            assert section in [re.sub(r"[^\w -]", "", head).lower().replace(" ", "-") for head in heads], link


def test_the_script_of_the_docs_draws_every_picture_of_theirs(tmp_path):
    run([sys.executable, str(ROOT / "docs" / "draw_pictures.py"), str(tmp_path)], tmp_path)
    drawn = {path.name for path in tmp_path.iterdir()}
    assert drawn == {path.name for path in (ROOT / "docs" / "pictures").iterdir()}
    shown = {name for page in PAGES for name in re.findall(r"\]\(pictures/(.*?)\)", (ROOT / page).read_text())}
    assert shown == drawn
