"""Pictures of whole requests: what repeats is left out, phases are named, and Perfetto knows whose step it is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from taskgraph_offload.viz import page
from taskgraph_offload.viz.fold import FIRST, LAST, folded
from taskgraph_offload.viz.timeline import draw_timelines
from taskgraph_offload.viz.trace import trace_events

import taskgraph_offload as tgo
from taskgraph_offload.nouns.program import within

TIMES = 40


def timeline(times: int = TIMES, requests: int = 2) -> tgo.Timeline:
    """A request of an encoder, a model that repeats, and a decoder."""
    sizes = {"clip": "ab", "unet": "abcde", "vae": "a"}
    traces = {}
    for name, blocks in sizes.items():
        units = [{"name": block, "seconds": 1e-3, "tensors": [2**20]} for block in blocks]
        traces[name] = within(name, tgo.Trace.from_units(units))
    program = [("clip", 1), ("unet", times), ("vae", 1)]
    return tgo.Planner.for_program(traces, program, "4MiB", machine="rtx4090").plan().predict(requests=requests)


def test_a_fold_keeps_the_first_iterations_and_the_last() -> None:
    whole = timeline()
    shown, phases = folded(whole)
    calls = [span for span in shown.lane("compute", 1) if span.component == "unet"]
    assert [span.iteration for span in calls] == [i for i in (0, 1, TIMES - 1) for _ in range(5)]
    assert [(p.component, p.times, p.left_out) for p in phases[:3]] == [
        ("clip", 1, 0),
        ("unet", TIMES, TIMES - FIRST - LAST),
        ("vae", 1, 0),
    ]
    for before, after in zip(shown.lane("compute"), shown.lane("compute")[1:], strict=False):
        assert before.stop <= after.start + 1e-12


def test_what_is_left_out_is_as_long_as_it_was() -> None:
    whole = timeline()
    shown, phases = folded(whole)
    gone = sum(
        span.seconds
        for span in whole.lane("compute")
        if span.component == "unet" and FIRST <= span.iteration < TIMES - LAST
    )
    assert whole.ends[-1] - shown.ends[-1] >= gone - 1e-12
    assert whole.ends[0] - shown.ends[0] == pytest.approx(whole.ends[-1] / 2 - shown.ends[-1] / 2, rel=0.2)
    assert all(span.seconds >= 0 for span in shown.spans)
    assert max(point.nbytes for point in shown.memory) == whole.peak_bytes
    assert {phase.component for phase in phases} == {"clip", "unet", "vae"}


def test_few_iterations_are_all_shown_and_one_model_is_left_as_it_is() -> None:
    few = timeline(times=FIRST + LAST + 1)
    shown, phases = folded(few)
    assert [span.stop for span in shown.spans] == pytest.approx([span.stop for span in few.spans])
    assert not any(phase.left_out for phase in phases)
    alone = replace(few, of_program=False)
    assert folded(alone) == (alone, [])


def test_the_picture_names_phases_requests_and_how_much_is_left_out(tmp_path: Path) -> None:
    figure = draw_timelines([timeline()])
    texts = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert any(f"unet {page.TIMES} {TIMES}, {TIMES - FIRST - LAST} of them left out" in text for text in texts)
    assert any(text.startswith("cold request") for text in texts)
    assert any(text.startswith("request 1") for text in texts)
    tgo.viz.save_timeline(tmp_path / "request.png", timeline())
    assert (tmp_path / "request.png").stat().st_size > 10_000


def test_perfetto_shows_the_component_and_the_iteration() -> None:
    events = trace_events([timeline()])
    slices = [event for event in events if event["ph"] == "X"]
    assert {event["args"]["component"] for event in slices} == {"clip", "unet", "vae"}
    assert {event["args"]["iteration"] for event in slices} == set(range(TIMES))
    assert {event["name"] for event in events if event["ph"] == "i"} == {"end of the cold request", "end of request 1"}
