"""Writes timelines as trace events, the JSON that ui.perfetto.dev and chrome://tracing open. Draws nothing.

Each timeline is a process, each lane a thread. An arrow goes from each copy to the call that waited for it. Counters
show the memory and the rate of each link. Times are rounded to nanoseconds, so that spans that touch never overlap, and
written in microseconds, as the format wants.
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

from .page import suffix_of, write

Event: TypeAlias = dict[str, Any]

# Why the task of the second lane waits for one of the first.
REASONS: Final[Mapping[tuple[Lane, Lane], str]] = {
    ("h2d", "compute"): "the copy brings what the call reads",
    ("d2h", "compute"): "the call needs the room that the copy frees",
    ("compute", "h2d"): "the copy overwrites what the call read, or the plan lets it begin only now",
    ("compute", "d2h"): "the copy saves what the call made",
    ("d2h", "h2d"): "the copy needs what the other copy saves or frees",
    ("h2d", "d2h"): "the copy needs what the other copy brings",
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
    """All events: names first, then the others in the order of time. A slice comes before the arrows at it."""
    names, events, arrows = list[Event](), list[Event](), count(1)
    for process, timeline in enumerate(timelines, 1):
        spans = {span.node: span for span in timeline.spans}
        names += _names(process, timeline)
        causes = (spans.get(span.waited_for or "") for span in timeline.spans)
        pairs = zip(timeline.spans, causes, strict=True)
        events += [_slice(process, span, cause, timeline.of_program) for span, cause in pairs]
        events += _arrows(process, timeline, spans, arrows)
        events += _step_ends(process, timeline)
        events += _counters(process, timeline)
    return names + sorted(events, key=lambda event: float(event["ts"]))


def _names(process: int, timeline: Timeline) -> Iterator[Event]:
    """The names of the process and its threads, and their order on the page."""
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
            yield {**place, "name": "thread_name", "args": {"name": _thread_name(lane)}}
            yield {**place, "name": "thread_sort_index", "args": {"sort_index": LANES.index(lane)}}


def _slice(process: int, span: Span, cause: Span | None, of_program: bool) -> Event:
    start, stop = _nanoseconds(span.start), _nanoseconds(span.stop)
    return {
        "ph": "X",
        "pid": process,
        "tid": _thread(process, span.lane),
        "name": spoken(span.name if span.lane == "compute" else f"{span.lane} {span.name}"),
        "cat": span.lane,
        "ts": start / 1000,
        "dur": (stop - start) / 1000,
        "args": _arguments(span, cause, of_program),
    }


def _arguments(span: Span, cause: Span | None, of_program: bool) -> dict[str, Any]:
    """The details that a click on a slice shows."""
    arguments: dict[str, Any] = {"task": span.node, "call": span.call, "cycle": span.cycle}
    if of_program:
        arguments |= {"component": span.component, "iteration": span.iteration}
    if span.lane != "compute":
        arguments["bytes"] = span.nbytes
    if span.waited_for is not None:
        arguments["waited_for"] = span.waited_for
    if cause is not None:
        arguments["reason"] = REASONS.get((cause.lane, span.lane), "its lane was busy")
    return arguments


def _arrows(process: int, timeline: Timeline, spans: Mapping[str, Span], numbers: Iterator[int]) -> Iterator[Event]:
    """Arrows from the last nanosecond of each copy to the first nanosecond of the call that waited for it."""
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
        what = "request" if timeline.of_program else "step"
        name = f"end of {what} {number}" if number else f"end of the cold {what}"
        yield {
            "ph": "i",
            "s": "p",
            "pid": process,
            "tid": _thread(process, "compute"),
            "name": name,
            "ts": _nanoseconds(end) / 1000,
        }


def _counters(process: int, timeline: Timeline) -> Iterator[Event]:
    """The bytes on the device, and the rate of each link in use."""
    memory = {_nanoseconds(point.seconds): float(point.nbytes) for point in timeline.memory}
    curves = {"memory in bytes": memory}
    for lane in LANES[1:]:
        if timeline.lane(lane):
            curves[f"{lane} link in GB/s"] = _link_use(timeline.lane(lane))
    for name, curve in curves.items():
        for moment, value in curve.items():
            yield {"ph": "C", "pid": process, "name": name, "ts": moment / 1000, "args": {"value": value}}


def _link_use(copies: Sequence[Span]) -> dict[int, float]:
    """The rate of a link over time: the rate of each copy while it runs, zero between copies."""
    curve: dict[int, float] = {}
    for copy in copies:
        start, stop = _nanoseconds(copy.start), _nanoseconds(copy.stop)
        if stop > start:
            curve[start] = copy.nbytes / (stop - start)
            curve[stop] = 0.0
    return curve


def _thread_name(lane: Lane) -> str:
    return lane if lane == "compute" else f"{lane.upper()} copies"


def _thread(process: int, lane: Lane) -> int:
    """The number of a lane's thread. It differs from all process numbers, since those mean a main thread."""
    return 1000 * process + LANES.index(lane)


def _nanoseconds(seconds: float) -> int:
    return round(seconds * 1e9)
