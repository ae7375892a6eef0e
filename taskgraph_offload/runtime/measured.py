"""Keeps what ran in the last forwards, as a measured `Timeline`, and the totals.

Each task is noted with its number in its lane. The device is asked for times only when a timeline is made.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from ..nouns.graph import LANES, Lane
from ..nouns.timeline import MemoryPoint, Span, Timeline
from ..plan.plan import Plan

if TYPE_CHECKING:
    from .copies import Lanes

KEPT_FORWARDS = 5

TaskNumber = tuple[Lane, int]  # a task that ran: its lane, and its number there


@dataclass
class Stats:
    """Totals since the plan was attached. `skipped_spills`: activations that stayed because they were not found.

    `peak_bytes` is measured on CUDA: the most that this process had in use on the GPU until the last forward ended,
    without what was in use before the arena came, with what CUDA's libraries hold. Torch does not count memory on the
    CPU, and hides ours on CUDA below a higher peak from before (`torch.cuda.reset_peak_memory_stats` ends that). In
    both cases it is the arena, weights on demand, libraries and the activations of the trace, also if inputs have other
    shapes.
    """

    h2d_bytes: int = 0
    d2h_bytes: int = 0
    copies: int = 0
    demand_loads: int = 0
    divergences: int = 0
    skipped_spills: int = 0
    peak_bytes: int = 0


class Ran(NamedTuple):
    """A task that ran: its number in its lane, and the tasks that it waited for.

    `begun` is the number under which it began, if its lane was marked while it ran.
    """

    lane: Lane
    number: int
    node: str
    name: str
    call: str
    nbytes: int
    waited: tuple[TaskNumber, ...]
    used_bytes: int = 0
    begun: int | None = None


@dataclass
class Forward:
    """The tasks of one forward, in the order in which they were issued."""

    cold: bool
    tasks: list[Ran] = field(default_factory=list)


class Log:
    """The last forwards, oldest first, and the totals of all."""

    def __init__(self, stats: Stats) -> None:
        self.stats = stats
        self.forwards: deque[Forward] = deque(maxlen=KEPT_FORWARDS)
        self.begin(cold=True)

    def begin(self, cold: bool) -> None:
        """Begin a forward. Forget the one before, if it has not ended."""
        self._current = Forward(cold)
        self.add = self._current.tasks.append

    def end(self) -> None:
        """Keep the forward: it ended without an error."""
        self.forwards.append(self._current)

    def timeline(self, plan: Plan, lanes: Lanes) -> Timeline:
        """The kept forwards as spans, in seconds from the start of the first one of them."""
        for lane in LANES:
            lanes.settle(lane, lanes.latest[lane])
        forwards = [forward for forward in self.forwards if any(e.lane == "compute" for e in forward.tasks)]
        while forwards and any(lanes.moments(e.lane, e.begun or e.number) is None for e in forwards[0].tasks):
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
    """The bytes in use over time: the arena at first, and from each call on what that call uses."""
    begin = min((span.start for span, _ in spans), default=0.0)
    used = (MemoryPoint(span.start, nbytes) for span, nbytes in spans if span.lane == "compute")
    return (MemoryPoint(begin, plan.arena_bytes), *used)


def _spans(forwards: list[Forward], lanes: Lanes) -> list[tuple[Span, int]]:
    """The tasks as spans, with the bytes in use. Cycles count from the first forward that is kept."""
    tasks = [(cycle, ran) for cycle, forward in enumerate(forwards) for ran in forward.tasks]
    times = _times([ran for _, ran in tasks], lanes)
    nodes, ends, seen = dict[TaskNumber, str](), dict[Lane, float](), Counter[str]()
    found: list[tuple[Span, int]] = []
    for cycle, ran in tasks:
        task = ran.lane, ran.number
        node = f"{cycle}/{ran.node}"
        seen[node] += 1
        nodes[task] = node if seen[node] == 1 else f"{node} #{seen[node]}"
        cause = _cause(ran, times, ends.get(ran.lane, 0.0))
        waited_for = nodes.get(cause) if cause else None
        start, stop = times[task]
        span = Span(nodes[task], ran.name, ran.lane, ran.call, cycle, start, stop, ran.nbytes, waited_for)
        found.append((span, ran.used_bytes))
        ends[ran.lane] = stop
    return found


def _times(tasks: list[Ran], lanes: Lanes) -> dict[TaskNumber, tuple[float, float]]:
    """When each task began and ended, in seconds since the first one began."""
    events = {}
    for ran in tasks:
        first = lanes.moments(ran.lane, ran.number if ran.begun is None else ran.begun)
        last = lanes.moments(ran.lane, ran.number)
        if first is not None and last is not None:
            events[ran.lane, ran.number] = first.start, last.stop
    if not events:
        return {}
    origin = next(iter(events.values()))[0]
    times = {key: (start.seconds_since(origin), stop.seconds_since(origin)) for key, (start, stop) in events.items()}
    zero = min(start for start, _ in times.values())
    return {key: (start - zero, stop - zero) for key, (start, stop) in times.items()}


def _cause(ran: Ran, times: dict[TaskNumber, tuple[float, float]], free: float) -> TaskNumber | None:
    """The task that this one waited for longest, if its lane was free earlier (`free`)."""
    waited = [(times[task][1], task) for task in ran.waited if task in times]
    end, task = max(waited, default=(0.0, None))
    return task if end > free else None


def remembered(plan: Plan, lane: Lane) -> int:
    """How many events to keep for a lane: those of the kept forwards and of the current one, and 32 spare."""
    cold, steady = (sum(task.lane == lane for task in tasks) for tasks in (plan.cold, plan.steady))
    return cold + (KEPT_FORWARDS + 1) * (steady + 1) + 32
