"""The trace keeps to the rules of the trace event format, and says what the timeline says."""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import taskgraph_offload as tgo

from ..timelines import MIB, measured, predicted

Event = dict[str, Any]

REQUIRED = {
    "M": {"name", "pid", "tid", "args"},
    "X": {"name", "cat", "pid", "tid", "ts", "dur", "args"},
    "s": {"name", "cat", "pid", "tid", "ts", "id"},
    "f": {"name", "cat", "pid", "tid", "ts", "id", "bp"},
    "i": {"name", "pid", "tid", "ts", "s"},
    "C": {"name", "pid", "ts", "args"},
}
TYPES: dict[str, type | tuple[type, ...]] = {
    "name": str,
    "cat": str,
    "pid": int,
    "tid": int,
    "id": int,
    "ts": (int, float),
    "dur": (int, float),
    "args": dict,
}
METADATA = {"process_name", "process_labels", "process_sort_index", "thread_name", "thread_sort_index"}
TIMELINES = {
    "8 blocks": (8, {}),
    "80 blocks, stalled": (80, {"strategy": "sequential"}),
    "some resident": (20, {"residents": "spread"}),
}


def saved(path: Path, *timelines: tgo.Timeline) -> list[Event]:
    tgo.viz.save_trace(path, *timelines)
    content = json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda name: pytest.fail(f"{name} in JSON"))
    events: list[Event] = content["traceEvents"]
    return events


def both(blocks: int, settings: dict[str, Any]) -> tuple[tgo.Timeline, tgo.Timeline]:
    timeline = predicted(blocks, **settings)
    return timeline, measured(timeline)


def of(events: list[Event], phase: str) -> list[Event]:
    return [event for event in events if event["ph"] == phase]


def by_thread(events: list[Event]) -> dict[tuple[int, int], list[Event]]:
    threads = defaultdict(list)
    for event in of(events, "X"):
        threads[event["pid"], event["tid"]].append(event)
    return threads


@pytest.mark.parametrize(("blocks", "settings"), TIMELINES.values(), ids=TIMELINES)
def test_every_event_has_what_its_phase_needs(blocks: int, settings: dict[str, Any], tmp_path: Path) -> None:
    for event in saved(tmp_path / "trace.json", *both(blocks, settings)):
        assert set(event) == REQUIRED[event["ph"]] | {"ph"}
        for field, kind in TYPES.items():
            assert isinstance(event.get(field, kind() if isinstance(kind, type) else 0), kind), event
        assert math.isfinite(event.get("ts", 0))
        assert event.get("dur", 0) >= 0
        assert event["ph"] != "M" or event["name"] in METADATA
        assert event["ph"] != "C" or all(isinstance(value, int | float) for value in event["args"].values())
        assert event["ph"] != "f" or event["bp"] == "e"


@pytest.mark.parametrize(("blocks", "settings"), TIMELINES.values(), ids=TIMELINES)
def test_time_runs_forward_and_slices_of_a_thread_never_overlap(
    blocks: int, settings: dict[str, Any], tmp_path: Path
) -> None:
    events = saved(tmp_path / "trace.json", *both(blocks, settings))
    moments = [event["ts"] for event in events if event["ph"] != "M"]
    assert moments == sorted(moments)
    for slices in by_thread(events).values():
        for before, after in pairwise(slices):
            assert nanoseconds(before["ts"]) + nanoseconds(before["dur"]) <= nanoseconds(after["ts"])


@pytest.mark.parametrize(("blocks", "settings"), TIMELINES.values(), ids=TIMELINES)
def test_an_arrow_goes_from_each_copy_to_the_call_that_waited_for_it(
    blocks: int, settings: dict[str, Any], tmp_path: Path
) -> None:
    timelines = both(blocks, settings)
    events = saved(tmp_path / "trace.json", *timelines)
    starts, ends = ({arrow["id"]: arrow for arrow in of(events, phase)} for phase in "sf")
    assert set(starts) == set(ends)
    assert len(starts) == len(of(events, "s")) == len(of(events, "f"))
    found = Counter(
        (start["pid"], enclosing(events, start)["args"]["task"], enclosing(events, ends[number])["args"]["task"])
        for number, start in starts.items()
        if start["ts"] <= ends[number]["ts"]
    )
    copies = {span.node for span in timelines[0].spans if span.lane != "compute"}
    assert found == Counter(
        (process, span.waited_for, span.node)
        for process, timeline in enumerate(timelines, 1)
        for span in timeline.lane("compute")
        if span.waited_for in copies
    )


def nanoseconds(microseconds: float) -> int:
    return round(microseconds * 1000)


def enclosing(events: list[Event], end: Event) -> Event:
    """The one slice that an end of an arrow lies in, as the format binds it."""
    moment = nanoseconds(end["ts"])
    (found,) = (
        event
        for event in by_thread(events)[end["pid"], end["tid"]]
        if nanoseconds(event["ts"]) <= moment < nanoseconds(event["ts"]) + nanoseconds(event["dur"])
    )
    return found


def test_each_source_is_a_process_and_each_lane_in_use_a_thread_in_order(tmp_path: Path) -> None:
    events = saved(tmp_path / "trace.json", *both(8, {}))
    names = {event["pid"]: event["args"]["name"] for event in of(events, "M") if event["name"] == "process_name"}
    assert names == {1: "predicted: layerwise", 2: "measured: layerwise"}
    for process in names:
        told = [event for event in of(events, "M") if event["pid"] == process and event["name"].startswith("thread")]
        threads = {event["tid"]: event["args"]["name"] for event in told if event["name"] == "thread_name"}
        order = {event["tid"]: event["args"]["sort_index"] for event in told if event["name"] == "thread_sort_index"}
        assert [threads[tid] for tid in sorted(order, key=order.__getitem__)] == ["compute", "H2D copies"]
        assert {tid for pid, tid in by_thread(events) if pid == process} == set(threads)


def test_a_slice_is_a_task_with_its_times_its_bytes_and_its_reason(tmp_path: Path) -> None:
    timeline = predicted(8)
    slices = {event["args"]["task"]: event for event in of(saved(tmp_path / "trace.json", timeline), "X")}
    assert set(slices) == {span.node for span in timeline.spans}
    for span in timeline.spans:
        event = slices[span.node]
        assert event["ts"] == pytest.approx(span.start * 1e6, abs=1e-3)
        assert event["dur"] == pytest.approx(span.seconds * 1e6, abs=2e-3)
        assert event["args"]["call"] == span.call
        assert event["args"].get("bytes", 0) == span.nbytes
        assert event["args"].get("waited_for") == span.waited_for
        assert ("reason" in event["args"]) == (span.waited_for is not None)


def test_counters_show_the_memory_and_the_rate_of_the_link(tmp_path: Path) -> None:
    timeline = predicted(8)
    counters: dict[str, list[float]] = defaultdict(list)
    for event in of(saved(tmp_path / "trace.json", timeline), "C"):
        counters[event["name"]].append(event["args"]["value"])
    assert counters["memory in bytes"] == [point.nbytes for point in timeline.memory]
    rates = counters["h2d link in GB/s"]
    assert max(rates) == pytest.approx(90 * MIB / timeline.lane("h2d")[0].seconds / 1e9, rel=1e-6)
    assert min(rates) == rates[-1] == 0


def test_names_survive_whatever_they_are(tmp_path: Path) -> None:
    names = ['"quoted"', "back\\slash", "line\nbreak", "</script>", "\u2603 \U0001f600", "\x00"]
    units = [{"name": name, "seconds": 0.01, "tensors": [MIB]} for name in names]
    plan = tgo.Planner.for_trace(tgo.Trace.from_units(units), "2MiB", strategy="layerwise", machine="cpu").plan()
    events = saved(tmp_path / "trace.json", plan.predict())
    assert {event["name"] for event in of(events, "X") if event["cat"] == "compute"} == set(names)


def test_only_json_is_written_and_folders_are_made(tmp_path: Path) -> None:
    with pytest.raises(tgo.SettingsError, match=r"\.json"):
        tgo.viz.save_trace(tmp_path / "trace.txt", predicted(8))
    assert not list(tmp_path.iterdir())
    assert saved(tmp_path / "a" / "b" / "trace.json", predicted(8))
