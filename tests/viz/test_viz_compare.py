"""Pictures of comparisons and sweeps show the rows they are made of, and can be read."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from taskgraph_offload.viz.compare import draw_comparison
from taskgraph_offload.viz.sweep import draw_sweep

import taskgraph_offload as tgo

from ..pictures import assert_legible, texts, widths
from ..timelines import MIB, QUICK, planner


@pytest.fixture(scope="module")
def comparison() -> tgo.Comparison:
    return planner(8).compare(QUICK)


def with_measurements(comparison: tgo.Comparison, factor: float = 1.2) -> tgo.Comparison:
    steps = [row["step_seconds"] for row in comparison.rows]
    measurements = [None if step is None else factor * step for step in steps]
    rows = zip(comparison.rows, measurements, strict=True)
    return tgo.Comparison([{**row, "measured_step_seconds": seconds} for row, seconds in rows])


def test_a_bar_of_a_comparison_is_compute_and_waits(comparison: tgo.Comparison) -> None:
    times, memory = draw_comparison(comparison).axes
    for place, row in enumerate(comparison.rows):
        if row["error"] is None:
            assert widths(times, place) == pytest.approx([row["compute_seconds"] * 1e3, row["stall_seconds"] * 1e3])
            assert widths(memory, place) == pytest.approx([row["peak_bytes"] / MIB])
        else:
            assert widths(times, place) == []
            assert widths(memory, place) == pytest.approx([row["smallest_bytes"] / MIB])


def test_a_comparison_says_what_does_not_fit_and_what_would(comparison: tgo.Comparison) -> None:
    figure = draw_comparison(comparison)
    assert texts(figure).count("needs 740.0 MiB") == sum(row["error"] is not None for row in comparison.rows) > 0


def test_a_comparison_has_the_bound_as_a_line(comparison: tgo.Comparison) -> None:
    times = draw_comparison(comparison).axes[0]
    assert any(
        np.asarray(line.get_xdata())[0] == comparison.rows[0]["bound_seconds"] * 1e3 for line in times.get_lines()
    )


def test_a_comparison_marks_what_was_measured(comparison: tgo.Comparison) -> None:
    times = draw_comparison(with_measurements(comparison)).axes[0]
    marks = sorted(float(np.asarray(line.get_xdata())[0]) for line in times.get_lines() if line.get_marker() == "D")
    steps = sorted(row["step_seconds"] for row in comparison.rows if row["step_seconds"] is not None)
    assert marks == pytest.approx([1.2e3 * step for step in steps])


def test_a_measured_step_below_the_bound_says_why_in_the_picture(comparison: tgo.Comparison) -> None:
    why = "The machine was faster than the rates that the bound was computed from."
    bound, fastest = comparison.rows[0]["bound_seconds"], comparison.rows[0]["step_seconds"]
    for share, is_below in ((0.99, True), (1.01, False)):
        figure = draw_comparison(with_measurements(comparison, share * bound / fastest))
        notes = [text for text in texts(figure) if text.endswith(why)]
        names = ", ".join(row["strategy"] for row in comparison.rows if row["step_seconds"] == fastest)
        assert notes == [f"measured less than the bound: {names}. {why}"] * is_below
        assert_legible(figure)


def test_measured_rates_stand_below_the_predicted_ones(comparison: tgo.Comparison) -> None:
    rates = {"link_bytes_per_second": 25e9, "measured_link_bytes_per_second": 24e9}
    rows = [
        {**row, **rates, "measured_compute_seconds": (1 + place / 10) * comparison.rows[0]["compute_seconds"]}
        for place, row in enumerate(with_measurements(comparison).rows)
    ]
    predicted, measured = (text for text in texts(draw_comparison(tgo.Comparison(rows))) if "rates: " in text)
    least = comparison.rows[0]["compute_seconds"] * 1e3
    steps = sum(row["step_seconds"] is not None for row in comparison.rows)
    assert predicted == f"predicted rates: compute {least:.2f} ms a step, link 25.00 GB/s"
    most = least * (1 + (steps - 1) / 10)
    assert measured == f"measured rates: compute {least:.2f} ms to {most:.2f} ms a step, link 24.00 GB/s"


def test_comparisons_and_sweeps_are_legible(comparison: tgo.Comparison) -> None:
    assert_legible(draw_comparison(comparison))
    assert_legible(draw_comparison(with_measurements(comparison)))
    assert_legible(draw_comparison(planner(8, budget="1MiB").compare(QUICK)))
    assert_legible(draw_sweep(planner(8).sweep(6, QUICK)))


def test_a_sweep_has_a_curve_for_each_strategy_and_the_bound_beneath() -> None:
    sweep = planner(8).sweep(6, QUICK)
    lines = {line.get_gid(): line for line in draw_sweep(sweep).axes[0].get_lines()}
    for index, strategy in enumerate(sweep.strategies):
        works = [row for row in sweep.rows if row["strategy"] == strategy and row["step_seconds"] is not None]
        assert list(np.asarray(lines[f"curve{index}"].get_ydata())) == pytest.approx(
            [row["step_seconds"] * 1e3 for row in works]
        )
    assert list(np.asarray(lines["bound"].get_ydata())) == pytest.approx(
        [row["bound_seconds"] * 1e3 for row in sweep.rows if row["strategy"] == sweep.strategies[0]]
    )


def test_no_two_curves_look_alike_however_many() -> None:
    rows = planner(8).sweep(2, ["keep"]).rows
    sweep = tgo.Sweep([{**row, "strategy": f"number {index}"} for index in range(30) for row in rows])
    figure = draw_sweep(sweep)
    curves = [line for line in figure.axes[0].get_lines() if str(line.get_gid()).startswith("curve")]
    assert len(curves) == len({line.get_color() for line in curves}) == 30
    assert_legible(figure)


def test_no_plan_lies_in_the_field_that_no_schedule_enters() -> None:
    """Nor at budgets between those of the sweep."""
    planned = planner(8)
    lines = {line.get_gid(): line for line in draw_sweep(planned.sweep(4, ["auto"])).axes[0].get_lines()}
    assert lines["bound"].get_drawstyle() == "steps-pre"
    places = np.asarray(lines["bound"].get_xydata()).tolist()
    for number, ((before, _), (after, height)) in enumerate(pairwise(places)):
        for share in (0.02, 0.5):
            budget = f"{int((before + share * (after - before)) * MIB)}B"
            plan = tgo.Planner.for_trace(planned.trace, budget, machine=planned.machine).plan()
            assert plan.settled_seconds * 1e3 >= height * (1 - 1e-9), number


def test_a_sweep_rings_each_knee() -> None:
    sweep = planner(8).sweep(6, QUICK)
    lines = draw_sweep(sweep).axes[0].get_lines()
    rings = {
        tuple(map(float, np.asarray(line.get_xydata())[0]))
        for line in lines
        if line.get_fillstyle() == "none" and len(np.asarray(line.get_xydata()))
    }
    knees = [knee for name in sweep.strategies if (knee := sweep.knee(name))]
    assert rings == {(knee["budget_bytes"] / MIB, knee["step_seconds"] * 1e3) for knee in knees}


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_comparisons_and_sweeps_save_themselves(suffix: str, comparison: tgo.Comparison, tmp_path: Path) -> None:
    comparison.save(tmp_path / f"comparison{suffix}")
    planner(8).sweep(["300MiB", "500MiB"], QUICK).save(tmp_path / f"sweep{suffix}")
    assert all(path.stat().st_size > 1000 for path in tmp_path.iterdir())
    assert len(list(tmp_path.iterdir())) == 2
