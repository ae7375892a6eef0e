"""Writes timelines as trace events, the JSON that ui.perfetto.dev and chrome://tracing open. Draws nothing.

A process for each timeline, a thread for each lane, an arrow from each copy to the call that waited for it, and
counters of memory and link use below. Times are counted in whole nanoseconds, so that spans that touch never overlap,
and written in microseconds, which is what the format wants.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from typing import Any, Final, TypeAlias

from taskgraph_offload.nouns.budget import readable
from taskgraph_offload.nouns.graph import LANES, Lane
from taskgraph_offload.nouns.names import spoken
from taskgraph_offload.nouns.timeline import Span, Timeline

from .output import suffix_of, write

Event: TypeAlias = dict[str, Any]

THREAD_NAMES: Final[Mapping[Lane, str]] = {"compute": "compute", "h2d": "H2D copies", "d2h": "D2H copies"}

# Why the task of one lane waits for one of another.
REASONS: Final[Mapping[tuple[Lane, Lane], str]] = {
    ("h2d", "compute"): "the copy brings what the call reads",
    ("d2h", "compute"): "the call needs the room that the copy frees",
    ("compute", "h2d"): "the copy overwrites what the call read, or was not to begin earlier",
    ("compute", "d2h"): "the copy saves what the call made",
    ("d2h", "h2d"): "the copy needs what the other one saves or frees",
    ("h2d", "d2h"): "the copy needs what the other one brings",
}


def save_trace(path: str | os.PathLike[str], *timelines: Timeline) -> None:
    """Write timelines as one trace; the name must end in .json.

    >>> import tempfile, taskgraph_offload as tgo
    >>> trace = tgo.Trace.from_units([{"name": n, "seconds": 1e-3, "tensors": [2**20]} for n in "abcd"])
    >>> plan = tgo.Planner.for_trace(trace, "2MiB", strategy="layerwise", machine="cpu").plan()
    >>> save_trace(f"{tempfile.mkdtemp()}/trace.json", plan.predict())
    """
    suffix_of(path, (".json",))
    content = {"traceEvents": trace_events(timelines), "displayTimeUnit": "ms"}
    text = json.dumps(content, allow_nan=False, separators=(",", ":"))
    write(path, lambda half: half.write_text(text, encoding="utf-8"))


def trace_events(timelines: Sequence[Timeline]) -> list[Event]:
    """All events: names first, then everything in the order of time, a slice before what hangs on it."""
    names, events, arrows = list[Event](), list[Event](), count(1)
    for process, timeline in enumerate(timelines, 1):
        spans = {span.node: span for span in timeline.spans}
        names += _names(process, timeline)
        events += [_slice(process, span, spans.get(span.waited_for or "")) for span in timeline.spans]
        events += _arrows(process, timeline, spans, arrows)
        events += _step_ends(process, timeline)
        events += _counters(process, timeline)
    return names + sorted(events, key=lambda event: float(event["ts"]))


def _names(process: int, timeline: Timeline) -> Iterator[Event]:
    """What processes and threads are called, and in which order they stand."""
    title = f"{timeline.source}: {timeline.title}" if timeline.title else timeline.source
    for name, args in (
        ("process_name", {"name": title}),
        ("process_labels", {"labels": f"budget {readable(timeline.budget_bytes)}"}),
        ("process_sort_index", {"sort_index": process}),
    ):
        yield {"ph": "M", "pid": process, "tid": 0, "name": name, "args": args}
    for lane in LANES:
        if timeline.lane(lane):
            place = {"ph": "M", "pid": process, "tid": _thread(process, lane)}
            yield {**place, "name": "thread_name", "args": {"name": THREAD_NAMES[lane]}}
            yield {**place, "name": "thread_sort_index", "args": {"sort_index": LANES.index(lane)}}


def _slice(process: int, span: Span, cause: Span | None) -> Event:
    start, stop = _nanoseconds(span.start), _nanoseconds(span.stop)
    return {
        "ph": "X",
        "pid": process,
        "tid": _thread(process, span.lane),
        "name": spoken(span.name if span.lane == "compute" else f"{span.lane} {span.name}"),
        "cat": span.lane,
        "ts": start / 1000,
        "dur": (stop - start) / 1000,
        "args": _arguments(span, cause),
    }


def _arguments(span: Span, cause: Span | None) -> dict[str, Any]:
    """What a click on a slice shows."""
    arguments: dict[str, Any] = {"task": span.node, "call": span.call, "cycle": span.cycle}
    if span.lane != "compute":
        arguments["bytes"] = span.nbytes
    if span.waited_for is not None:
        arguments["waited_for"] = span.waited_for
    if cause is not None:
        arguments["reason"] = REASONS.get((cause.lane, span.lane), "its lane was busy")
    return arguments


def _arrows(process: int, timeline: Timeline, spans: Mapping[str, Span], numbers: Iterator[int]) -> Iterator[Event]:
    """From the last nanosecond of each copy to the first one of the call that waited for it."""
    for call in timeline.lane("compute"):
        copy = spans.get(call.waited_for or "")
        if copy is None or copy.lane == "compute":
            continue
        arrow = {"pid": process, "name": "waited for", "cat": "wait", "id": next(numbers)}
        leaves = max(_nanoseconds(copy.start), _nanoseconds(copy.stop) - 1)
        yield {**arrow, "ph": "s", "tid": _thread(process, copy.lane), "ts": leaves / 1000}
        yield {**arrow, "ph": "f", "bp": "e", "tid": _thread(process, "compute"), "ts": _nanoseconds(call.start) / 1000}


def _step_ends(process: int, timeline: Timeline) -> Iterator[Event]:
    for cycle, end in enumerate(timeline.ends):
        number = cycle if timeline.starts_cold else cycle + 1
        name = f"end of step {number}" if number else "end of the cold step"
        yield {
            "ph": "i",
            "s": "p",
            "pid": process,
            "tid": _thread(process, "compute"),
            "name": name,
            "ts": _nanoseconds(end) / 1000,
        }


def _counters(process: int, timeline: Timeline) -> Iterator[Event]:
    """The bytes on the device; and for each lane that copies, how fast it does."""
    memory = {_nanoseconds(point.seconds): float(point.nbytes) for point in timeline.memory}
    curves = {"memory in bytes": memory}
    for lane in LANES[1:]:
        if timeline.lane(lane):
            curves[f"{lane} link in GB/s"] = _link_use(timeline.lane(lane))
    for name, curve in curves.items():
        for moment, value in curve.items():
            yield {"ph": "C", "pid": process, "name": name, "ts": moment / 1000, "args": {"value": value}}


def _link_use(copies: Sequence[Span]) -> dict[int, float]:
    """The rate of a link over time: what each copy achieves, and zero behind it until the next one begins."""
    curve: dict[int, float] = {}
    for copy in copies:
        start, stop = _nanoseconds(copy.start), _nanoseconds(copy.stop)
        if stop > start:
            curve[start] = copy.nbytes / (stop - start)
            curve[stop] = 0.0
    return curve


def _thread(process: int, lane: Lane) -> int:
    """The number of a lane's thread: no other thread has it, nor any process (whose main thread it would be)."""
    return 1000 * process + LANES.index(lane)


def _nanoseconds(seconds: float) -> int:
    return round(seconds * 1e9)
