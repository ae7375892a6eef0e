"""Strategies side by side: rows that can be trusted, tables that can be read, budgets that mean what they say."""

from __future__ import annotations

import pytest
from taskgraph_offload.planner import strategies

import taskgraph_offload as tgo

from ..timelines import MIB, QUICK, planner

COMPARED = {
    "strategy",
    "budget_bytes",
    "step_seconds",
    "cold_seconds",
    "compute_seconds",
    "stall_seconds",
    "overlap",
    "peak_bytes",
    "streamed_bytes",
    "bound_seconds",
    "measured_step_seconds",
    "error",
    "smallest_bytes",
}


def test_every_strategy_is_compared_and_the_fastest_comes_first() -> None:
    rows = planner(8).compare().rows
    assert all(set(row) == COMPARED for row in rows)
    assert {row["strategy"].split()[0] for row in rows} == set(strategies.names())
    steps = [row["step_seconds"] for row in rows if row["error"] is None]
    assert steps == sorted(steps)
    assert all(row["error"] is not None for row in rows[len(steps) :])


def test_a_row_says_what_the_strategys_own_plan_says() -> None:
    (row,) = planner(8).compare([("layerwise", {"prefetch": 2})]).rows
    plan = planner(8, prefetch=2).plan()
    assert row["strategy"] == plan.title == "layerwise prefetch=2"
    assert row["step_seconds"] == pytest.approx(plan.predict(5).step_seconds)
    assert row["step_seconds"] == pytest.approx(row["compute_seconds"] + row["stall_seconds"])
    assert (row["peak_bytes"], row["streamed_bytes"]) == (plan.peak_bytes, plan.streamed_bytes)


def test_what_does_not_fit_says_the_budget_that_would_do() -> None:
    (row,) = planner(8).compare(["resident"]).rows
    assert row["step_seconds"] is None
    (enough,) = planner(8, budget=f"{row['smallest_bytes']}B").compare(["resident"]).rows
    assert enough["error"] is None


def test_an_unknown_strategy_or_option_is_refused() -> None:
    with pytest.raises(tgo.SettingsError, match="3 is no strategy; give a name, or a name with options"):
        planner(8).compare([3])  # type: ignore[list-item]
    with pytest.raises(tgo.SettingsError, match="unknown strategy 'fastest'"):
        planner(8).compare(["fastest"])
    with pytest.raises(tgo.SettingsError, match="no option 'ahead'"):
        planner(8).compare([("layerwise", {"ahead": 2})])


def test_a_sweep_has_a_row_for_each_strategy_and_budget() -> None:
    sweep = planner(8).sweep(["50%", 1, "300MiB"], ["keep", "layerwise"])
    budgets = sorted([380 * MIB, 1024 * MIB, 300 * MIB])
    assert [(row["strategy"], row["budget_bytes"]) for row in sweep.rows] == [
        (name, budget) for name in ("keep", "layerwise") for budget in budgets
    ]


def test_a_sweep_in_steps_begins_where_something_works_and_ends_where_everything_fits() -> None:
    sweep = planner(8).sweep(5, QUICK)
    budgets = sorted({row["budget_bytes"] for row in sweep.rows})
    assert len(budgets) == 5
    first = [row for row in sweep.rows if row["budget_bytes"] == budgets[0]]
    assert any(row["step_seconds"] is not None for row in first)
    with pytest.raises(tgo.BudgetError):
        planner(8, budget=f"{budgets[0] - 1}B", strategy="sequential").plan()
    assert budgets[-1] == 8 * 90 * MIB + 20 * MIB
    assert all(row["step_seconds"] is not None for row in sweep.rows if row["budget_bytes"] == budgets[-1])


@pytest.mark.parametrize("steps", [1, 0, -3, True])
def test_a_sweep_of_no_steps_is_refused(steps: int) -> None:
    with pytest.raises(tgo.SettingsError, match="from 2 on"):
        planner(8).sweep(steps)


def test_the_knee_is_the_least_memory_that_is_nearly_as_fast_as_any() -> None:
    steps = {10: None, 20: 9.0, 30: 1.04, 40: 1.0, 50: 1.0}
    rows = [{"strategy": "a", "budget_bytes": budget, "step_seconds": step} for budget, step in steps.items()]
    knee = tgo.Sweep(rows).knee("a")
    assert knee is not None
    assert knee["budget_bytes"] == 30
    assert tgo.Sweep(rows[:1]).knee("a") is None
    assert tgo.Sweep(rows).knee("b") is None


@pytest.mark.parametrize("budget", ["1MiB", "40%", "100%"])
def test_tables_are_aligned_and_are_markdown(budget: str) -> None:
    for table in (
        planner(8, budget=budget).compare(QUICK).table(),
        planner(8).sweep(["1MiB", budget, "2GiB"], QUICK).table(),
    ):
        lines = table.splitlines()
        assert len({len(line) for line in lines}) == 1
        assert len({line.count("|") for line in lines}) == 1
        assert set(lines[1]) == set("|:-")
        assert "nan" not in table
        assert "inf" not in table


def test_a_table_shows_columns_that_say_something() -> None:
    fits, fails = planner(8, budget="100%").compare(["resident"]), planner(8).compare(["resident"])
    assert "needs" not in fits.table()
    assert "740.0 MiB" in fails.table()
    assert "measured" not in fits.table()
    told = tgo.Comparison([{**row, "measured_step_seconds": 0.0451} for row in fits.rows])
    assert "45.10 ms" in told.table()
