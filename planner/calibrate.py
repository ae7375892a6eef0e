"""Replaces estimates by measurements: each call's seconds, the link's rate and latency, from a measured timeline."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from taskgraph_offload.errors import SettingsError
from taskgraph_offload.nouns.graph import Lane
from taskgraph_offload.nouns.machine import Machine
from taskgraph_offload.nouns.timeline import Span, Timeline
from taskgraph_offload.nouns.trace import Call, Trace


def measured_trace(cuts: Sequence[Trace], machine: Machine, timeline: Timeline) -> Trace:
    """The trace whose calls were measured, out of `cuts`, with their measured seconds.

    Within a call, pieces keep their estimated shares. A call that was measured in parts (`blocks.3/0`, `blocks.3/1`)
    took the sum of its parts. A call that was not measured keeps its estimate, scaled like the measured calls.
    """
    trace = max(cuts, key=lambda trace: _measured_calls(trace, timeline))
    measured = measured_seconds(timeline, {call.name for call in trace.calls})
    if not measured:
        raise SettingsError("this timeline is of another model: none of its calls is in the trace; give run.timeline()")
    estimated = {call.name: call.cost(machine) for call in trace.calls}
    guessed = sum(estimated[name] for name in measured)
    scale = sum(measured.values()) / guessed if guessed > 0 else 1.0
    calls = (
        _with_seconds(call, machine, measured.get(call.name, estimated[call.name] * scale)) for call in trace.calls
    )
    return replace(trace, calls=tuple(calls))


def with_seconds_of(trace: Trace, measured: Trace) -> Trace:
    """The trace with the seconds of another trace, which has the same pieces but other calls."""
    pieces = (piece for call in measured.calls for piece in call.pieces)
    calls = (
        replace(call, pieces=tuple(replace(piece, seconds=next(pieces).seconds) for piece in call.pieces))
        for call in trace.calls
    )
    return replace(trace, calls=tuple(calls))


def _measured_calls(trace: Trace, timeline: Timeline) -> int:
    """How many calls of the timeline are whole calls of this trace."""
    names = {call.name for call in trace.calls}
    return sum(span.call in names for span in timeline.lane("compute"))


def measured_machine(machine: Machine, timeline: Timeline) -> Machine:
    """The machine with the link as it was in its quickest cycle. A lane keeps its rate if nothing was copied on it."""
    h2d, latency = _link(_quickest_copies(timeline, "h2d"), machine.h2d_bytes_per_second, machine.latency_seconds)
    d2h, _ = _link(_quickest_copies(timeline, "d2h"), machine.d2h_bytes_per_second, machine.latency_seconds)
    return replace(machine, h2d_bytes_per_second=h2d, d2h_bytes_per_second=d2h, latency_seconds=latency)


def _quickest_copies(timeline: Timeline, lane: Lane) -> Sequence[Span]:
    """The copies of the cycle in which the link was fastest. A slower rate would make the bound too high."""
    cycles = (timeline.lane(lane, cycle) for cycle in range(timeline.cycles))
    return max(cycles, key=_bytes_per_second, default=())


def _bytes_per_second(copies: Sequence[Span]) -> float:
    seconds = sum(copy.seconds for copy in copies)
    return sum(copy.nbytes for copy in copies) / seconds if seconds > 0 else 0.0


def measured_seconds(timeline: Timeline, names: set[str]) -> dict[str, float]:
    """The seconds of each call in the fastest of the cycles that skipped the fewest calls.

    The fastest, because other work on the machine only makes a cycle longer. One cycle for all calls, because the best
    time of each call would add up to a step that no cycle reaches. The cold cycle counts only if there is no other.
    """
    cycles = range(1 if timeline.starts_cold and timeline.cycles > 1 else 0, timeline.cycles)
    measured = [_seconds_of_cycle(timeline, cycle, names) for cycle in cycles]
    return min(measured, key=lambda seconds: (-len(seconds), sum(seconds.values())), default={})


def _seconds_of_cycle(timeline: Timeline, cycle: int, names: set[str]) -> dict[str, float]:
    """The seconds of each call in one cycle. Parts of a call are added up."""
    taken: dict[str, float] = {}
    for span in timeline.lane("compute", cycle):
        name = span.call if span.call in names else span.call.rpartition("/")[0]
        if name in names:
            taken[name] = taken.get(name, 0.0) + span.seconds
    return taken


def _with_seconds(call: Call, machine: Machine, seconds: float) -> Call:
    estimates = [piece.cost(machine) for piece in call.pieces]
    whole = sum(estimates)
    shares = [part / whole for part in estimates] if whole > 0 else [1 / len(estimates)] * len(estimates)
    pieces = (replace(p, seconds=seconds * share) for p, share in zip(call.pieces, shares, strict=True))
    return replace(call, pieces=tuple(pieces))


def _link(spans: Iterable[Span], rate: float, latency: float) -> tuple[float, float]:
    """Rate and latency of a lane: a least-squares line through (bytes, seconds), if that gives possible values."""
    copies = [(span.nbytes, span.seconds) for span in spans if span.nbytes and span.seconds > 0]
    if not copies:
        return rate, latency
    mean_bytes = sum(nbytes for nbytes, _ in copies) / len(copies)
    mean_seconds = sum(seconds for _, seconds in copies) / len(copies)
    spread = sum((nbytes - mean_bytes) ** 2 for nbytes, _ in copies)
    shared = sum((nbytes - mean_bytes) * (seconds - mean_seconds) for nbytes, seconds in copies)
    if spread > 0 and shared > 0:
        constant = mean_seconds - shared / spread * mean_bytes
        if 0 <= constant <= min(seconds for _, seconds in copies):
            return spread / shared, constant
    usable = mean_seconds - latency if mean_seconds > 2 * latency else mean_seconds
    return mean_bytes / usable, latency
