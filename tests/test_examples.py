"""Everything that the README tells a reader to run, run literally; and every example."""

import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import taskgraph_offload as tgo

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = {
    "quickstart": [],
    "compare_strategies": ["--rounds", "1", "--steps", "1", "--out", "."],
    "how_much_memory": ["--steps", "3", "--out", "."],
    "transformers_llama": [],
    "diffusers_flux": ["--steps", "2"],
}
NO_EXAMPLE = {"tiny_dit"}  # the model of the examples


def run(command: list[str], folder: Path) -> str:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    result = subprocess.run(command, cwd=folder, env={**os.environ, "PATH": path}, capture_output=True, text=True)
    assert result.returncode == 0, f"{shlex.join(command)}\n{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_example_runs(name, tmp_path):
    assert run([sys.executable, str(ROOT / "examples" / f"{name}.py"), *EXAMPLES[name]], tmp_path)
    if name == "compare_strategies":
        gallery = {path.name for path in (ROOT / "examples" / "gallery").iterdir()}
        assert gallery <= {path.name for path in tmp_path.iterdir()}, "the gallery shows what the demo makes"


def test_the_demo_fails_where_an_output_differs(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    demo = importlib.import_module("compare_strategies")
    model, inputs = importlib.import_module("tiny_dit").make(width=64, layers=2)
    plan = tgo.Planner(model, "60%", inputs=inputs, strategy="sequential", machine="cpu").plan()
    with torch.inference_mode():
        expected = model(*inputs)
        right, wrong = demo.Trial(plan), demo.Trial(plan)
        demo.run(right, model, inputs, expected, 1, "cpu", None)
        demo.run(wrong, model, inputs, expected + 1, 1, "cpu", None)
        assert (right.faults, len(wrong.faults)) == ([], 2)
    report = {"auto": wrong}
    monkeypatch.setattr(sys, "argv", ["compare_strategies", "--rounds", "0", "--out", "out"])
    monkeypatch.setattr(demo, "plan_all", lambda *_: (report, None))
    monkeypatch.setattr(demo, "report", lambda *_: None)
    assert demo.main() == 1
    report["auto"] = right
    assert demo.main() == 0


def test_every_example_is_listed_here():
    assert {path.stem for path in (ROOT / "examples").glob("*.py")} == {*EXAMPLES, *NO_EXAMPLE}


COMMANDS = re.findall(r"^    (taskgraph-offload .*)$", (ROOT / "README.md").read_text(), re.MULTILINE)


def test_the_readme_has_commands():
    assert len(COMMANDS) >= 3


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_of_the_readme_works(command):
    assert "rtx4090" in run(shlex.split(command), ROOT)


def test_every_target_of_make_that_the_readme_names_is_there():
    targets = set(re.findall(r"`?make (\w+)`?", (ROOT / "README.md").read_text()))
    assert targets >= {"demo", "test"}
    for target in targets:
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target


def test_the_pictures_of_the_readme_are_there():
    pictures = re.findall(r"!\[.*\]\((.*)\)", (ROOT / "README.md").read_text())
    assert pictures
    assert all((ROOT / picture).is_file() for picture in pictures)
