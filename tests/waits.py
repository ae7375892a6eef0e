"""Every place in the executor's code that orders one lane, or the host, behind another; and how to leave one out."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import taskgraph_offload as tgo
from taskgraph_offload.runtime import copies

CORE = Path(tgo.__file__).parent
METHODS = ("wait", "settle", "synchronize")


def waits() -> Iterator[tuple[str, int, int]]:
    """The file, the first and the last line of each."""
    for path in sorted(CORE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            called = node.func
            if not isinstance(called, ast.Attribute) or not ast.unparse(called.value).endswith("lanes"):
                continue
            if called.attr in METHODS:
                yield str(path.relative_to(CORE)), node.lineno, node.end_lineno or node.lineno


def leave_out(monkeypatch: pytest.MonkeyPatch, file: str, first: int, last: int) -> None:
    """Let the executor go on without this one."""
    for method in METHODS:
        monkeypatch.setattr(copies.Lanes, method, _unless_called_from(getattr(copies.Lanes, method), file, first, last))


def text_of(wait: tuple[str, int, int]) -> str:
    """Its lines."""
    file, first, last = wait
    return "\n".join((CORE / file).read_text().splitlines()[first - 1 : last])


def _unless_called_from(method: Any, file: str, first: int, last: int) -> Any:
    def maybe(self: copies.Lanes, *arguments: Any) -> None:
        caller = sys._getframe(1)
        if not (Path(caller.f_code.co_filename) == CORE / file and first <= caller.f_lineno <= last):
            method(self, *arguments)

    return maybe
