"""The house: who may import whom (planner -> taskgraph_offload <- viz), and what the front door offers."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import taskgraph_offload

ROOT = Path(__file__).parent.parent

# These sit on top of all three packages: the front door resolves its names lazily, the command line just uses them.
ABOVE = ("taskgraph_offload/__init__.py", "taskgraph_offload/__main__.py", "taskgraph_offload/cli/")
CORE = sorted(
    str(path.relative_to(ROOT))
    for path in (ROOT / "taskgraph_offload").rglob("*.py")
    if not str(path.relative_to(ROOT)).startswith(ABOVE)
)
PLANNER = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "planner").rglob("*.py"))
STRATEGIES = [path for path in PLANNER if path.startswith("planner/strategies/")]
VIZ = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "viz").rglob("*.py"))

# What the front door fetches from the other two packages; inside the house, nobody goes round by it.
LAZY = {"taskgraph_offload.Planner", "taskgraph_offload.offload", "taskgraph_offload.viz"}


def imports(path: str) -> set[str]:
    """Every module that a file imports anywhere, and every `module.name`: one of the two is what it depends on."""
    return set(_imports(path, ast.parse((ROOT / path).read_text(encoding="utf-8"))))


def _imports(path: str, tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = _absolute(path, node)
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def _absolute(path: str, node: ast.ImportFrom) -> str:
    above = Path(path).parts[: -node.level] if node.level else ()
    return ".".join([*above, *([node.module] if node.module else [])])


VERIFIER = ("verify", "proof", "proof.program", "proof.race", "proof.room")


def assert_imports_nothing_of(path: str, *forbidden: str) -> None:
    found = {name for name in imports(path) for top in forbidden if name == top or name.startswith(f"{top}.")}
    assert not found, f"{path} must not import {', '.join(sorted(found))}"


def test_the_reader_of_imports_sees_every_form() -> None:
    code = "import a.b\nfrom c import d\ndef f():\n    from . import e\n    from ..g import h\n"
    found = set(_imports("planner/strategies/x.py", ast.parse(code)))
    assert found == {"a.b", "c", "c.d", "planner.strategies", "planner.strategies.e", "planner.g", "planner.g.h"}


@pytest.mark.parametrize("path", CORE)
def test_the_core_imports_neither_planner_nor_viz_nor_pictures(path: str) -> None:
    assert_imports_nothing_of(path, "planner", "viz", "matplotlib", *LAZY)


@pytest.mark.parametrize("path", PLANNER)
def test_the_planner_imports_no_viz(path: str) -> None:
    assert_imports_nothing_of(path, "viz", *LAZY)


@pytest.mark.parametrize("path", VIZ)
def test_viz_imports_no_planner(path: str) -> None:
    assert_imports_nothing_of(path, "planner", *LAZY)


@pytest.mark.parametrize("path", STRATEGIES)
def test_a_strategy_writes_no_edge(path: str) -> None:
    assert_imports_nothing_of(path, "taskgraph_offload.connect")


@pytest.mark.parametrize("name", VERIFIER)
def test_the_verifier_shares_only_nouns_with_what_it_checks(name: str) -> None:
    path = "taskgraph_offload/" + {"proof": "proof/__init__"}.get(name, name).replace(".", "/") + ".py"
    nouns = tuple(f"taskgraph_offload.{noun}." for noun in ("errors", "graph", "plan", "trace", *VERIFIER))
    house = {other for other in imports(path) if other.startswith(("taskgraph_offload.", "planner"))}
    strange = {other for other in house if not f"{other}.".startswith(nouns)}
    assert not strange, f"{path} must not import {', '.join(sorted(strange))}"


def test_importing_the_core_loads_neither_planner_nor_viz_nor_pictures() -> None:
    modules = [path.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for path in CORE]
    program = f"""
import importlib, sys
for module in ["taskgraph_offload", *{modules!r}]:
    importlib.import_module(module)
print(sorted({{"planner", "viz", "matplotlib"}} & set(sys.modules)))
"""
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.stdout.strip() == "[]", result.stdout + result.stderr


def test_the_front_door_offers_exactly_the_public_names() -> None:
    assert taskgraph_offload.__all__ == [
        "Bound",
        "BudgetError",
        "Comparison",
        "ExecutionError",
        "Executor",
        "Machine",
        "OffloadError",
        "Plan",
        "PlanError",
        "Planner",
        "SettingsError",
        "Sweep",
        "Task",
        "TaskGraph",
        "Timeline",
        "Trace",
        "TraceError",
        "offload",
        "viz",
    ]


@pytest.mark.parametrize("name", getattr(taskgraph_offload, "__all__", []))
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(taskgraph_offload, name) is not None
