"""Pictures show what happened: every task once, every long wait with its cause, and nothing written over anything."""

from __future__ import annotations

import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_rgba_array
from matplotlib.figure import Figure
from taskgraph_offload.viz.callouts import cause
from taskgraph_offload.viz.compare import draw_comparison
from taskgraph_offload.viz.sweep import draw_sweep
from taskgraph_offload.viz.timeline import draw_timelines

import taskgraph_offload as tgo
from taskgraph_offload.nouns.timeline import Span

from ..pictures import assert_legible, bars, texts
from ..timelines import MIB, QUICK, measured, planner, predicted

SVG = "{http://www.w3.org/2000/svg}"


TIMELINES = {
    "8 blocks": (8, {}),
    "80 blocks": (80, {}),
    "8 blocks, stalled": (8, {"strategy": "sequential"}),
    "80 blocks, stalled": (80, {"strategy": "sequential"}),
    "80 blocks, some resident": (80, {"residents": "spread"}),
    "resident": (8, {"strategy": "resident", "budget": "100%"}),
}


@pytest.mark.parametrize(("blocks", "settings"), TIMELINES.values(), ids=TIMELINES)
def test_no_text_covers_another(blocks: int, settings: dict[str, Any]) -> None:
    timeline = predicted(blocks, **settings)
    assert_legible(draw_timelines([timeline, measured(timeline)]))


@pytest.mark.parametrize("blocks", [8, 80])
def test_every_task_is_one_bar_in_its_lane(blocks: int, tmp_path: Path) -> None:
    timeline = predicted(blocks)
    tgo.viz.save_timeline(tmp_path / "timeline.svg", timeline, measured(timeline))
    groups = {group.get("id"): group for group in ElementTree.parse(tmp_path / "timeline.svg").iter(f"{SVG}g")}
    for index in (0, 1):
        for lane in ("compute", "h2d"):
            drawn = [*groups[f"timeline{index}-{lane}"].findall(f".//{SVG}path")]
            assert len(drawn) == len(timeline.lane(lane))
    assert "timeline0-d2h" not in groups


def test_a_lane_is_shown_only_when_it_is_used() -> None:
    units = [{"name": n, "seconds": 0.01, "tensors": [MIB], "component": n} for n in ("encoder", "decoder")]
    plan = tgo.Planner.for_trace(
        tgo.Trace.from_units(units), "1MiB", strategy="model", machine="rtx4090", writeback=True
    ).plan()
    assert "D2H" in texts(draw_timelines([plan.predict()]))
    assert "D2H" not in texts(draw_timelines([predicted(8)]))


@pytest.mark.parametrize("strategy", ["sequential", "layerwise"])
def test_the_longest_wait_of_a_step_names_the_copy_that_caused_it(strategy: str) -> None:
    timeline = measured(predicted(8, strategy=strategy))
    written = texts(draw_timelines([timeline]))
    for cycle in range(timeline.cycles):
        stall = timeline.stalls(cycle)[0]
        assert stall.cause is not None
        copy = stall.cause.split("/")[1]
        assert any(text.startswith(f"{stall.seconds * 1e3:.2f} ms for {copy}") for text in written)


def test_a_wait_whose_cause_was_not_noted_names_the_copy_that_came_meanwhile() -> None:
    timeline = predicted(8)
    stall = timeline.stalls()[0]
    assert stall.cause is not None
    assert cause(timeline, replace(stall, cause=None)) == stall.cause.split("/")[1]


def test_a_wait_for_no_copy_is_for_the_host_and_what_runs_first_is_named_in_words() -> None:
    units = [{"name": name, "seconds": 0.01, "tensors": [MIB]} for name in (":start", "a", "b")]
    trace = tgo.Trace.from_units(units)
    timeline = tgo.Planner.for_trace(trace, "3MiB", strategy="resident", machine="cpu").plan().predict()
    spans = [
        replace(span, start=span.start + 0.004, waited_for=None) if span.node == "1/compute :start" else span
        for span in timeline.spans
    ]
    written = texts(draw_timelines([replace(timeline, source="measured", spans=tuple(spans))]))
    assert "4.00 ms for the host" in written
    assert any(text.endswith("for h2d before the first block") for text in written)
    assert "before the first block" in written, "in the legend"
    assert not any(":start" in text for text in written)


def test_every_wait_is_marked() -> None:
    timeline = predicted(80, strategy="sequential")
    marks = bars(draw_timelines([timeline]), "timeline0-waits")
    assert len(marks.get_paths()) == sum(len(timeline.stalls(cycle)) for cycle in range(timeline.cycles))


def test_a_block_has_one_colour_in_all_lanes_and_sources() -> None:
    timeline = predicted(8)
    figure = draw_timelines([timeline, measured(timeline)])
    seen: dict[str, set[tuple[float, ...]]] = {}
    for index in (0, 1):
        for lane in ("compute", "h2d"):
            colours = to_rgba_array(bars(figure, f"timeline{index}-{lane}").get_facecolor())
            for span, colour in zip(timeline.lane(lane), colours, strict=True):
                seen.setdefault(span.call, set()).add(tuple(map(float, colour)))
    assert all(len(colours) == 1 for colours in seen.values())
    assert len(set.union(*seen.values())) == len(seen) == 8


def test_bars_carry_names_where_there_is_room() -> None:
    assert {str(block) for block in range(8)} <= set(texts(draw_timelines([predicted(8)])))
    assert "42" not in texts(draw_timelines([predicted(80)]))


def test_the_head_says_strategy_step_bound_and_overlap() -> None:
    timeline = predicted(8)
    written = "\n".join(texts(draw_timelines([timeline])))
    assert "layerwise" in written
    assert f"step {timeline.step_seconds * 1e3:.2f} ms" in written
    assert f"{timeline.step_seconds / timeline.bound_seconds:.2f} \N{MULTIPLICATION SIGN} bound" in written
    assert f"overlap {timeline.overlap:.0%}" in written


def test_timelines_of_several_plans_say_which_is_which() -> None:
    figure = draw_timelines([predicted(8), predicted(8, strategy="sequential")])
    assert {"layerwise, predicted", "sequential, predicted"} <= set(texts(figure))
    assert_legible(figure)


def test_steps_are_named_and_the_budget_is_a_line() -> None:
    timeline = predicted(8)
    figure = draw_timelines([timeline])
    written = texts(figure)
    for name in ("cold step", "step 1", "step 2"):
        assert any(text.startswith(name) for text in written)
    assert "budget 308.0 MiB" in written
    levels = [np.asarray(line.get_ydata()) for line in figure.axes[1].get_lines()]
    assert any(all(value == timeline.budget_bytes / MIB for value in level) for level in levels)


def test_predicted_and_measured_share_one_time_axis_and_measured_says_how_far_off_it_is() -> None:
    timeline = predicted(8)
    real = measured(timeline)
    figure = draw_timelines([timeline, real])
    assert len({axes.get_xlim() for axes in figure.axes}) == 1
    off = f"{real.step_seconds / timeline.step_seconds - 1:+.1%} against predicted"
    assert any(off in text for text in texts(figure))


def test_the_rates_of_prediction_and_measurement_stand_side_by_side() -> None:
    """Of the last step: its compute, and the bytes of its copies by the seconds that the link took for them."""
    timeline = predicted(8)
    real = measured(timeline)
    (line,) = [text for text in texts(draw_timelines([timeline, real])) if "rates" in text]
    for shown in (timeline, real):
        copies = shown.lane("h2d", shown.cycles - 1)
        rate = sum(copy.nbytes for copy in copies) / sum(copy.seconds for copy in copies) / 1e9
        compute = f"compute {shown.compute_seconds * 1e3:.2f} ms a step"
        assert f"{shown.source} rates: {compute}, H2D {rate:.2f} GB/s" in line


WHY = "less than the bound: the machine was faster than the rates that the bound was computed from."


def test_a_measured_step_below_the_bound_says_why() -> None:
    """Also where only a step before the last one is below it."""
    timeline = predicted(8)
    bound = timeline.bound_seconds
    for factor, is_below in ((1.02, True), (1 + 1e-9, False), (0.999, False)):
        real = replace(timeline, source="measured", bound_seconds=factor * timeline.step_seconds)
        figure = draw_timelines([replace(timeline, bound_seconds=bound), real])
        assert any(text.endswith(WHY) for text in texts(figure)) == is_below
        assert_legible(figure)
    slow_at_the_end = replace(real, bound_seconds=1.02 * timeline.step_seconds, spans=longer_at_the_end(real))
    assert slow_at_the_end.step_seconds > slow_at_the_end.bound_seconds
    assert any(text.endswith(WHY) for text in texts(draw_timelines([slow_at_the_end])))


def longer_at_the_end(timeline: tgo.Timeline) -> tuple[Span, ...]:
    """The spans, the last call a tenth of a step longer."""
    last = timeline.lane("compute")[-1]
    more = replace(last, stop=last.stop + 0.1 * timeline.step_seconds)
    return tuple(more if span.node == last.node else span for span in timeline.spans)


def test_a_prediction_and_a_cold_step_are_never_said_to_be_below_the_bound() -> None:
    timeline = replace(predicted(8), bound_seconds=99.0)
    cold = replace(predicted(8, cycles=1), source="measured", bound_seconds=99.0)
    assert not any(text.endswith(WHY) for text in texts(draw_timelines([timeline, cold])))


def test_a_cold_step_is_compared_with_a_cold_step() -> None:
    """And with no bound, which is that of a steady one."""
    timeline = predicted(8)
    real = measured(predicted(8, cycles=1))
    (head,) = [text for text in texts(draw_timelines([timeline, real])) if "against predicted" in text]
    assert head.startswith("cold step")
    assert "bound" not in head
    assert f"{real.step_seconds / timeline.cold_seconds - 1:+.1%} against predicted" in head


def test_of_a_long_run_the_first_steps_are_drawn() -> None:
    timeline = predicted(8, cycles=20)
    figure = draw_timelines([timeline])
    assert figure.axes[0].get_xlim()[1] < timeline.ends[3]
    assert any("first 3 of 20 steps shown, figures of the last" in text for text in texts(figure))


def test_a_warm_run_stands_below_the_steady_steps_of_the_cold_one() -> None:
    timeline = predicted(8)
    warm = replace(measured(timeline), starts_cold=False)
    marks = bars(draw_timelines([timeline, warm]), "timeline1-compute").get_paths()
    assert min(np.asarray(path.vertices)[:, 0].min() for path in marks) >= timeline.ends[0]


def planner_of(names: Sequence[str]) -> tgo.Planner:
    units = [{"name": name, "seconds": 0.01, "tensors": [MIB]} for name in names]
    return tgo.Planner.for_trace(tgo.Trace.from_units(units), "2MiB", strategy="layerwise", machine="cpu")


def test_names_are_shown_as_they_are(tmp_path: Path) -> None:
    names = ["$x^{", "<b>&amp;</b>", "--> end", "\\frac", "two words", "a" * 200]
    tgo.viz.save_timeline(tmp_path / "timeline.svg", planner_of(names).plan().predict())
    assert ElementTree.parse(tmp_path / "timeline.svg").getroot().tag == f"{SVG}svg"


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("a\x1b[31mb", "a\\x1b[31mb"),
        ("a\ud800b", "a\\ud800b"),
        ("a\x00\tb", "a\\x00\\tb"),
        ("a\uffff", "a\\uffff"),
        ("a\u202eb", "a\\u202eb"),
        ("\u6a21\u578b 3", "\u25a1\u25a1 3"),
    ],
)
def test_what_cannot_be_drawn_neither_breaks_a_picture_nor_warns(name: str, shown: str, tmp_path: Path) -> None:
    timeline = replace(planner_of([name, "b"]).plan().predict(), title=name)
    rows = [{**row, "strategy": name} for row in planner(8).compare(["keep"]).rows]
    comparison, sweep = tgo.Comparison(rows), tgo.Sweep(rows)
    for figure in (draw_timelines([timeline]), draw_comparison(comparison), draw_sweep(sweep)):
        assert any(shown in text for text in texts(figure))
    tgo.viz.save_timeline(tmp_path / "timeline.svg", timeline)
    for suffix in ("png", "svg"):
        comparison.save(tmp_path / f"comparison.{suffix}")
        sweep.save(tmp_path / f"sweep.{suffix}")
    for path in tmp_path.glob("*.svg"):
        assert ElementTree.parse(path).getroot().tag == f"{SVG}svg"


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_the_same_picture_is_the_same_file(suffix: str, tmp_path: Path) -> None:
    timeline, comparison, sweep = predicted(8), planner(8).compare(QUICK), planner(8).sweep(3, QUICK)
    for folder in (tmp_path / "one", tmp_path / "other"):
        tgo.viz.save_timeline(folder / f"timeline.{suffix}", timeline)
        comparison.save(folder / f"comparison.{suffix}")
        sweep.save(folder / f"sweep.{suffix}")
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "other" / path.name).read_bytes()


@pytest.mark.parametrize("name", ["timeline.png", "TIMELINE.PNG", "timeline.svg"])
def test_the_suffix_says_the_format_and_folders_are_made(name: str, tmp_path: Path) -> None:
    target = tmp_path / "new" / "folder" / name
    tgo.viz.save_timeline(target, predicted(8))
    assert target.read_bytes().startswith(b"\x89PNG" if name.lower().endswith("png") else b"<?xml")
    assert [path.name for path in target.parent.iterdir()] == [name]


@pytest.mark.parametrize("name", ["timeline.pdf", "timeline", "timeline.png.txt"])
def test_another_suffix_is_refused_with_the_accepted_ones(name: str, tmp_path: Path) -> None:
    with pytest.raises(tgo.SettingsError, match=r"\.png or \.svg"):
        tgo.viz.save_timeline(tmp_path / name, predicted(8))
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_old_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "timeline.svg"
    target.write_text("old")

    def fail(self: Figure, path: Path, **_: object) -> None:
        Path(path).write_text("half")
        raise OSError("disk full")

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(tgo.SettingsError, match=r"timeline\.svg': disk full"):
        tgo.viz.save_timeline(target, predicted(8))
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("timeline.svg", "old")]


@pytest.mark.parametrize("name", ["folder.svg", "file/timeline.svg"])
def test_a_place_where_no_file_can_be_is_refused_by_its_own_name(name: str, tmp_path: Path) -> None:
    (tmp_path / "folder.svg").mkdir()
    (tmp_path / "file").write_text("old")
    with pytest.raises(tgo.SettingsError) as caught:
        tgo.viz.save_timeline(tmp_path / name, predicted(8))
    assert str(caught.value).startswith(f"cannot write '{tmp_path / name}': ")
    assert not list(tmp_path.rglob(".*"))


def test_nothing_to_draw_is_said_plainly() -> None:
    with pytest.raises(tgo.SettingsError, match="no timeline"):
        draw_timelines([])
    with pytest.raises(tgo.SettingsError, match="measured timeline has no calls"):
        draw_timelines([replace(predicted(8), source="measured", spans=())])
    with pytest.raises(tgo.SettingsError, match="no rows"):
        draw_comparison(tgo.Comparison([]))
    with pytest.raises(tgo.SettingsError, match="no strategy fits"):
        draw_sweep(planner(8).sweep(["1MiB"], QUICK))


def test_pictures_leave_the_users_pyplot_alone() -> None:
    program = (
        "import sys, taskgraph_offload as tgo; tgo.viz.save_timeline; "
        "print(sorted({'matplotlib.pyplot', 'taskgraph_offload.planner'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.stdout.strip() == "[]", result.stderr


def test_a_trace_without_costs_can_still_be_drawn() -> None:
    trace = tgo.Trace.from_units([{"name": name, "seconds": 0, "tensors": []} for name in "ab"])
    timeline = tgo.Planner.for_trace(trace, 1, strategy="resident", machine="cpu").plan().predict()
    assert_legible(draw_timelines([timeline]))
