"""Commands that must succeed, and commands that must be refused."""

from __future__ import annotations

import pytest

from taskgraph_offload.cli import main


@pytest.fixture
def ask(capsys):
    """Run a command that must succeed, and give what it prints on stdout."""

    def run(*argv):
        code = main([*map(str, argv)])
        said = capsys.readouterr()
        assert code == 0, said.err
        return said.out

    return run


@pytest.fixture
def refused(capsys):
    """Run a command that must be refused, and give the one line it prints."""

    def run(*argv, code=1):
        got: int | str | None
        try:
            got = main([*map(str, argv)])
        except SystemExit as stop:
            got = stop.code
        said = capsys.readouterr()
        assert got == code
        assert said.out == ""
        lines = [line for line in said.err.splitlines() if line != "this module talks"]
        assert len(lines) == 1
        assert lines[0].startswith("error: ")
        return lines[0]

    return run
