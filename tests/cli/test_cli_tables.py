"""Tables of the command line in terminals of any width: what goes first, what is shortened, what is never cut."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console

from taskgraph_offload.cli.tables import Column, print_table

Row = tuple[str, str, str]

ROWS = [
    ("layerwise prefetch=2 residents=spread", "123.456 s", "needs 12.00 GiB"),
    ("layerwise prefetch=2 residents=leading", "7.000 s", "264.0 KiB"),
]
COLUMNS: list[Column[Row]] = [
    Column("strategy", lambda row: row[0], words=True),
    Column("step", lambda row: row[1]),
    Column("ratio", lambda row: "1.00", 2),
    Column("peak", lambda row: row[2], 1),
]


def printed(width: int, rows: list[Row] = ROWS, **console: Any) -> list[str]:
    """The lines of the table, the heads first; the first row is marked."""
    file = io.StringIO()
    print_table(Console(file=file, width=width, **console), rows, COLUMNS, lambda row: row is rows[0])
    return file.getvalue().splitlines()


@pytest.mark.parametrize("width", range(20, 100))
def test_figures_are_shown_whole_or_not_at_all(width: int) -> None:
    heads, line, *lines = printed(width)
    assert max(map(len, (heads, line, *lines))) <= width
    for text, (_, step, peak) in zip(lines[:2], ROWS, strict=True):
        shown = [step, *(["1.00"] if "ratio" in heads else []), *([peak] if "peak" in heads else [])]
        assert re.split(" {2,}", text)[-len(shown) :] == shown


def test_what_matters_least_goes_first_and_names_are_shortened_for_what_matters() -> None:
    heads = {width: printed(width)[0].split()[1:] for width in (80, 61, 60, 40)}
    assert heads == {80: ["step", "ratio", "peak"], 61: ["step", "peak"], 60: ["step", "ratio"], 40: ["step"]}
    assert printed(61)[2] == "▸  layerwise pref…esidents=spread  123.456 s  needs 12.00 GiB"
    assert printed(40)[2] == "▸  layerwise pr…idents=spread  123.456 s"


def test_what_is_left_out_is_named() -> None:
    assert printed(61)[-1] == "no room for: ratio; --json has all"
    assert printed(80)[-1].startswith("   layerwise")


@pytest.mark.parametrize("width", range(24, 60))
def test_shortened_names_can_still_be_told_apart(width: int) -> None:
    first, second = (text[3:].split("  ")[0] for text in printed(width)[2:4])
    assert first != second


def test_a_terminal_that_is_too_narrow_for_the_figures_gets_them_all_the_same() -> None:
    assert "123.456 s" in printed(12)[2]


def test_names_take_their_width_in_the_terminal_and_give_it_no_orders() -> None:
    lines = printed(80, [("模型", "1 s", "1 B"), ("a\x1b[31mb\ud800", "22 s", "22 B")])
    assert len({cell_len(text) for text in lines if "─" not in text}) == 1
    assert "a\\x1b[31mb\\ud800" in lines[3]
