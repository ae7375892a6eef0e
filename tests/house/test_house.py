"""The house: who may import whom (planner -> taskgraph_offload <- viz), and what the front door offers."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import taskgraph_offload

ROOT = Path(__file__).parent.parent.parent
NAME = "taskgraph_offload"
FOLDERS = {"taskgraph_offload": NAME, "planner": f"{NAME}.planner", "viz": f"{NAME}.viz"}  # and the names they install


def modules_of(folder: str) -> dict[str, Path]:
    """Every module below a folder by the name that it is installed under."""
    found = {}
    for path in sorted((ROOT / folder).rglob("*.py")):
        inner = path.relative_to(ROOT / folder).with_suffix("").parts
        found[".".join((FOLDERS[folder], *inner)).removesuffix(".__init__")] = path
    return found


# These sit on top of all three folders: the front door resolves its names lazily, the command line just uses them.
ABOVE = (NAME, f"{NAME}.__main__", f"{NAME}.cli", f"{NAME}.offload")
CORE = [name for name in modules_of("taskgraph_offload") if name not in ABOVE and not name.startswith(f"{NAME}.cli.")]
PLANNER = list(modules_of("planner"))
STRATEGIES = [name for name in PLANNER if name.startswith(f"{NAME}.planner.strategies.")]
VIZ = list(modules_of("viz"))
FILES = {name: path for folder in FOLDERS for name, path in modules_of(folder).items()}

# What the front door fetches from the other two folders; inside the house, nobody goes round by it.
LAZY = {f"{NAME}.Planner", f"{NAME}.offload"}
VERIFIER = [name for name in CORE if name.startswith(f"{NAME}.plan.verify")]


def imports(name: str) -> set[str]:
    """Every module that a module imports anywhere, and every `module.name`: one of the two is what it depends on."""
    package = name if FILES[name].stem == "__init__" else name.rpartition(".")[0]
    return set(_imports(package, ast.parse(FILES[name].read_text(encoding="utf-8"))))


def _imports(package: str, tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = _absolute(package, node)
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def _absolute(package: str, node: ast.ImportFrom) -> str:
    parts = package.split(".")
    above = parts[: len(parts) - node.level + 1] if node.level else []
    return ".".join([*above, *([node.module] if node.module else [])])


def assert_imports_nothing_of(module: str, *forbidden: str) -> None:
    found = {name for name in imports(module) for top in forbidden if name == top or name.startswith(f"{top}.")}
    assert not found, f"{module} must not import {', '.join(sorted(found))}"


def test_the_reader_of_imports_sees_every_form() -> None:
    code = "import a.b\nfrom c import d\ndef f():\n    from . import e\n    from ..g import h\n"
    found = set(_imports("x.planner.parts", ast.parse(code)))
    assert found == {
        "a.b",
        "c",
        "c.d",
        "x.planner.parts",
        "x.planner.parts.e",
        "x.planner.g",
        "x.planner.g.h",
    }


@pytest.mark.parametrize("name", FILES)
def test_nobody_imports_a_second_copy_of_the_planner_or_the_pictures(name: str) -> None:
    assert_imports_nothing_of(name, "planner", "viz")


@pytest.mark.parametrize("name", CORE)
def test_the_core_imports_neither_planner_nor_viz_nor_pictures(name: str) -> None:
    assert_imports_nothing_of(name, f"{NAME}.planner", f"{NAME}.viz", "matplotlib", *LAZY)


@pytest.mark.parametrize("name", PLANNER)
def test_the_planner_imports_no_viz(name: str) -> None:
    assert_imports_nothing_of(name, f"{NAME}.viz", *LAZY)


@pytest.mark.parametrize("name", VIZ)
def test_viz_imports_no_planner(name: str) -> None:
    assert_imports_nothing_of(name, f"{NAME}.planner", *LAZY)


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_strategy_writes_no_edge(name: str) -> None:
    assert_imports_nothing_of(name, f"{NAME}.plan.connect")


@pytest.mark.parametrize("name", [name for name in FILES if name != f"{NAME}.planner.strategies.auto"])
def test_no_other_file_knows_the_strategy_auto(name: str) -> None:
    tree = ast.parse(FILES[name].read_text(encoding="utf-8"))
    assert "auto" not in [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]


@pytest.mark.parametrize("name", VERIFIER)
def test_the_verifier_shares_only_nouns_with_what_it_checks(name: str) -> None:
    allowed = (f"{NAME}.errors.", f"{NAME}.nouns.", f"{NAME}.plan.plan.", *(f"{module}." for module in VERIFIER))
    packages = {f"{NAME}.plan.", f"{NAME}.nouns.", f"{NAME}.errors."}
    house = {other for other in imports(name) if other.startswith(f"{NAME}.")}
    strange = {other for other in house if not f"{other}.".startswith(allowed) and f"{other}." not in packages}
    assert not strange, f"{name} must not import {', '.join(sorted(strange))}"


def test_importing_the_core_loads_neither_planner_nor_viz_nor_pictures() -> None:
    program = f"""
import importlib, sys
for module in {[NAME, *CORE]!r}:
    importlib.import_module(module)
print(sorted({{"{NAME}.planner", "{NAME}.viz", "matplotlib", "planner", "viz"}} & set(sys.modules)))
"""
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.stdout.strip() == "[]", result.stdout + result.stderr


def test_the_package_lists_every_folder() -> None:
    listed = (ROOT / "pyproject.toml").read_text(encoding="utf-8").partition("packages = [")[2].partition("]")[0]
    packages = re.findall(r'"([\w.]+)"', listed)
    folders = {name for name, path in FILES.items() if path.stem == "__init__"}
    assert sorted(packages) == sorted(folders)


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
        "Run",
        "SettingsError",
        "Sweep",
        "Task",
        "TaskGraph",
        "Timeline",
        "Trace",
        "TraceError",
        "detach",
        "offload",
        "viz",
    ]


@pytest.mark.parametrize("name", getattr(taskgraph_offload, "__all__", []))
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(taskgraph_offload, name) is not None
