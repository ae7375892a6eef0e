"""What ran in the last forwards, as a measured `Timeline`; and the running totals.

Remembers which task had which number in its lane, and asks for the times only when somebody looks.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field
from typing import NamedTuple

from ..nouns.graph import LANES, Lane
from ..nouns.timeline import MemoryPoint, Span, Timeline
from ..plan.plan import Plan
from .lanes import Lanes, Waited

KEPT_FORWARDS = 5


@dataclass
class Stats:
    """Totals since the plan was attached. `skipped_spills`: activations that stayed because they could not be found.

    `peak_bytes` is measured on CUDA. Torch does not count memory on the CPU: there it is the arena with the activations
    that were traced, whatever shapes the forwards had.
    """

    h2d_bytes: int = 0
    d2h_bytes: int = 0
    copies: int = 0
    demand_loads: int = 0
    divergences: int = 0
    skipped_spills: int = 0
    peak_bytes: int = 0


class Entry(NamedTuple):
    """A task that ran: its number in its lane, and what it waited for."""

    lane: Lane
    number: int
    node: str
    name: str
    call: str
    nbytes: int
    waited: tuple[Waited, ...]
    used_bytes: int = 0


@dataclass
class Forward:
    """The tasks of one forward, in the order in which they were issued."""

    cold: bool
    entries: list[Entry] = field(default_factory=list)


class Log:
    """The forwards that are kept, oldest first, and the totals of all."""

    def __init__(self, stats: Stats) -> None:
        self.stats = stats
        self.forwards: deque[Forward] = deque(maxlen=KEPT_FORWARDS)
        self.begin(cold=True)

    def begin(self, cold: bool) -> None:
        """A forward begins; one that has not ended is forgotten."""
        self._current = Forward(cold)
        self.add = self._current.entries.append

    def end(self) -> None:
        """The forward ended as it should, and is kept."""
        self.forwards.append(self._current)

    def timeline(self, plan: Plan, lanes: Lanes) -> Timeline:
        """The kept forwards as spans, in seconds from the start of the first one of them."""
        for lane in LANES:
            lanes.settle(lane, lanes.latest[lane])
        forwards = [forward for forward in self.forwards if any(e.lane == "compute" for e in forward.entries)]
        while forwards and any(lanes.moments(e.lane, e.number) is None for e in forwards[0].entries):
            forwards.pop(0)
        spans = _spans(forwards, lanes)
        return Timeline(
            source="measured",
            spans=tuple(span for span, _ in spans),
            memory=_memory(plan, spans),
            budget_bytes=plan.budget_bytes,
            title=plan.title,
            bound_seconds=plan.bound.step_seconds,
            starts_cold=bool(forwards) and forwards[0].cold,
        )


def _memory(plan: Plan, spans: list[tuple[Span, int]]) -> tuple[MemoryPoint, ...]:
    """The arena, from the first moment on, and what the calls use besides."""
    begin = min((span.start for span, _ in spans), default=0.0)
    used = (MemoryPoint(span.start, nbytes) for span, nbytes in spans if span.lane == "compute")
    return (MemoryPoint(begin, plan.arena_bytes), *used)


def _spans(forwards: list[Forward], lanes: Lanes) -> list[tuple[Span, int]]:
    """Entries with their times, and the bytes in use; the cycles counted from the first one that is kept."""
    entries = [(cycle, entry) for cycle, forward in enumerate(forwards) for entry in forward.entries]
    times = _times([entry for _, entry in entries], lanes)
    nodes, ends, seen = dict[Waited, str](), dict[Lane, float](), Counter[str]()
    found: list[tuple[Span, int]] = []
    for cycle, entry in entries:
        task = entry.lane, entry.number
        node = f"{cycle}/{entry.node}"
        seen[node] += 1
        nodes[task] = node if seen[node] == 1 else f"{node} #{seen[node]}"
        cause = _cause(entry, times, ends.get(entry.lane, 0.0))
        waited_for = nodes.get(cause) if cause else None
        start, stop = times[task]
        span = Span(nodes[task], entry.name, entry.lane, entry.call, cycle, start, stop, entry.nbytes, waited_for)
        found.append((span, entry.used_bytes))
        ends[entry.lane] = stop
    return found


def _times(entries: list[Entry], lanes: Lanes) -> dict[Waited, tuple[float, float]]:
    """When each task began and ended, in seconds from the first moment of all."""
    moments = {(e.lane, e.number): lanes.moments(e.lane, e.number) for e in entries}
    found = [(key, pair) for key, pair in moments.items() if pair is not None]
    if not found:
        return {}
    origin = found[0][1].start
    times = {key: (p.start.seconds_since(origin), p.stop.seconds_since(origin)) for key, p in found}
    zero = min(start for start, _ in times.values())
    return {key: (start - zero, stop - zero) for key, (start, stop) in times.items()}


def _cause(entry: Entry, times: dict[Waited, tuple[float, float]], free: float) -> Waited | None:
    """What the task waited for last, if its lane was free before that."""
    waited = [(times[task][1], task) for task in entry.waited if task in times]
    end, task = max(waited, default=(0.0, None))
    return task if end > free else None


def remembered(plan: Plan, lane: Lane) -> int:
    """As many tasks as the forwards that are kept have in a lane, the one that runs, and some that nobody planned."""
    cold, steady = (sum(task.lane == lane for task in tasks) for tasks in (plan.cold, plan.steady))
    return cold + (KEPT_FORWARDS + 1) * (steady + 1) + 32
