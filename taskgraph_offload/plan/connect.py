"""Draws every edge of a plan, from the byte ranges that its tasks read and write. Nobody else writes an edge.

A plan is a serial program: right when its tasks run one after another. This module keeps only the orders that the
bytes demand, so that the lanes overlap wherever they may:

    arena bytes   [------ seat of a ------)[------ seat of b ------)
                                  [------ seat of c ------)
    program       h2d a, h2d b, compute a, h2d c, compute b, ...
    edges         h2d a     -> compute a    data    it reads what the copy brought
                  compute a -> h2d c        reuse   the copy overwrites bytes that the call read
                  compute a -> h2d c        issue   the strategy asked for it (`after`, `before`)
                  compute a -> compute b    order   a lane is a FIFO

Three kinds of bytes are tracked: the arena, each activation that crosses calls, the home of what is written back.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

import networkx as nx

from ..errors import SettingsError
from ..nouns.graph import Reason, Task, TaskGraph
from ..nouns.ranges import ByteMap

if TYPE_CHECKING:
    from ..nouns.trace import Call
    from .plan import Plan

ARENA = "arena"

Edge: TypeAlias = tuple[str, str, Reason]


@dataclass(frozen=True, slots=True)
class Step:
    """A task of the unrolled plan: its node's name, its cycle, and the call that it is or copies for."""

    node: str
    cycle: int
    task: Task
    call: str


@dataclass(frozen=True, slots=True)
class Access:
    """Bytes `[start, stop)` of a space that a task touches: the arena, an activation, or the home of a bundle."""

    space: str
    start: int
    stop: int
    writes: bool


def connect(plan: Plan, cycles: int = 3) -> TaskGraph:
    """The task graph of a cold cycle and `cycles - 1` steady ones, every edge with its reason."""
    if not isinstance(cycles, int) or cycles < 1:
        raise SettingsError(f"a graph has one cycle or more, not {cycles!r}")
    dag: nx.DiGraph[str] = nx.DiGraph()
    steps = unroll(plan, cycles)
    seconds = {call.name: call.cost(plan.machine) for call in plan.trace.calls}
    for step in steps:
        nbytes = plan.task_bytes(step.task)
        task_seconds = (
            seconds[step.call] if step.task.kind == "compute" else plan.machine.copy_seconds(step.task.kind, nbytes)
        )
        dag.add_node(
            step.node,
            kind=step.task.kind,
            lane=step.task.lane,
            call=step.call,
            cycle=step.cycle,
            task=step.task,
            seconds=task_seconds,
            nbytes=nbytes,
        )
    for edges in (edges_by_bytes(plan, steps), edges_by_gates(steps), edges_by_lane(steps)):
        for before, after, reason in edges:
            if not dag.has_edge(before, after):  # the stronger reasons come first
                dag.add_edge(before, after, reason=reason)
    return TaskGraph(dag, cycles)


def unroll(plan: Plan, cycles: int) -> list[Step]:
    """The serial program over some cycles, each task with a name of its own and the call that it serves."""
    tasks = [(cycle, task) for cycle in range(cycles) for task in (plan.steady if cycle else plan.cold)]
    served, seen, steps = _served_calls(plan, [task for _, task in tasks]), dict[str, int](), list[Step]()
    for (cycle, task), call in zip(tasks, served, strict=True):
        name = f"{cycle}/{task.kind} {task.name}" + ("" if task.stop is None else f" [{task.start}:{task.stop}]")
        seen[name] = seen.get(name, 0) + 1
        steps.append(Step(name if seen[name] == 1 else f"{name} #{seen[name]}", cycle, task, call))
    return steps


def edges_by_bytes(plan: Plan, steps: list[Step]) -> Iterator[Edge]:
    """Read after write is `data`, write after read or write is `reuse` (between lanes: within one it is the order)."""
    spaces: dict[str, ByteMap[_Segment]] = {}
    touched: dict[Task, list[Access]] = {}
    lanes = {step.node: step.task.lane for step in steps}
    for step in steps:
        if step.task not in touched:
            touched[step.task] = accesses(plan, step.task)
        for access in touched[step.task]:
            space = spaces.setdefault(access.space, ByteMap(_Segment(), _Segment.copy))
            if access.writes:
                for _, _, segment in space.replace(access.start, access.stop, _Segment(step.node)):
                    for before in (segment.writer, *segment.readers.values()):
                        if before is not None and lanes[before] != step.task.lane:
                            yield before, step.node, "reuse"
            else:
                for segment in space.fit(access.start, access.stop):
                    if segment.writer is not None and segment.writer != step.node:
                        yield segment.writer, step.node, "data"
                    segment.readers[step.task.lane] = step.node


def edges_by_gates(steps: list[Step]) -> Iterator[Edge]:
    """What strategies ask for: `after` the nearest earlier call of a name, `before` the nearest later one."""
    latest: dict[str, str] = {}
    waiting: dict[str, list[str]] = {}
    for step in steps:
        if step.task.after is not None and step.task.after in latest:
            yield latest[step.task.after], step.node, "issue"
        if step.task.before is not None:
            waiting.setdefault(step.task.before, []).append(step.node)
        if step.task.kind == "compute":
            latest[step.task.name] = step.node
            for copy in waiting.pop(step.task.name, ()):
                yield copy, step.node, "issue"


def edges_by_lane(steps: list[Step]) -> Iterator[Edge]:
    """A lane is a FIFO."""
    latest: dict[str, str] = {}
    for step in steps:
        if step.task.lane in latest:
            yield latest[step.task.lane], step.node, "order"
        latest[step.task.lane] = step.node


def accesses(plan: Plan, task: Task) -> list[Access]:
    """The bytes that a task reads and writes; reads first, so that a call that does both waits as a reader."""
    if task.kind == "compute":
        return _accesses_of_call(plan, plan.calls[task.name])
    if task.is_activation:
        return [Access(task.name, 0, plan.activations[task.name].nbytes, writes=task.kind == "h2d")]
    offset, size = plan.bundles[task.name].offset, plan.sizes[task.name]
    start, stop = task.start, size if task.stop is None else task.stop
    inward = task.kind == "h2d"
    seat = Access(ARENA, offset + start, offset + stop, writes=inward)
    home = Access(f"home of {task.name}", start, stop, writes=not inward)
    return [seat, home] if task.name in plan.written_back else [seat]


def activation_bytes(plan: Plan) -> tuple[int, ...]:
    """For each call: its peak of activations, in either cycle, without those that are away for certain.

    An activation is away from the call `before` which it leaves, to the call `after` which it is brought back.
    """
    first_piece, peaks = 0, list[int]()
    away = [_absences(plan, tasks) for tasks in (plan.cold, plan.steady)]
    for call in plan.trace.calls:
        lives = [[plan.activations[name] for name in cycle.get(call.name, ())] for cycle in away]
        peaks.append(
            max(
                piece.transient_bytes - sum(life.nbytes for life in gone if life.producer < index < life.until)
                for index, piece in enumerate(call.pieces, first_piece)
                for gone in lives
            )
        )
        first_piece += len(call.pieces)
    return tuple(peaks)


def _absences(plan: Plan, tasks: tuple[Task, ...]) -> dict[str, list[str]]:
    """For each call of one cycle: the activations that are away all through it."""
    names = [call.name for call in plan.trace.calls]
    since: dict[str, int] = {}
    found: dict[str, list[str]] = {}
    for task in tasks:
        if task.is_activation and task.kind == "d2h" and task.before is not None:
            since[task.name] = names.index(task.before)
        elif task.is_activation and task.kind == "h2d" and task.name in since:
            start = since.pop(task.name)
            for name in names[start : names.index(task.after) + 1 if task.after is not None else start]:
                found.setdefault(name, []).append(task.name)
    for activation, start in since.items():
        for name in names[start:]:
            found.setdefault(name, []).append(activation)
    return found


def _accesses_of_call(plan: Plan, call: Call) -> list[Access]:
    """Seats of what a call reads, neighbours in one bundle joined; then the activations it uses and makes."""
    found: list[Access] = []
    bundle = ""
    for name in sorted((name for name in call.reads if name in plan.seats), key=plan.seats.__getitem__):
        start, writes = plan.seats[name], name in call.writes
        stop = start + plan.trace.weights[name].nbytes
        if found and bundle == plan.bundle_of[name] and not writes and not found[-1].writes:
            found[-1] = Access(ARENA, found[-1].start, max(found[-1].stop, stop), writes=False)
        else:
            found.append(Access(ARENA, start, stop, writes))
        bundle = plan.bundle_of[name]
    used, made = plan.activations_of[call.name]
    found += [Access(name, 0, plan.activations[name].nbytes, writes=False) for name in used]
    found += [Access(name, 0, plan.activations[name].nbytes, writes=True) for name in made]
    return found


def _served_calls(plan: Plan, tasks: list[Task]) -> list[str]:
    """The call that each task is or copies for: the next that reads what comes, the last that used what goes."""
    passed = [task.name for task in tasks if task.kind == "compute"]
    calls = passed + [task.name for task in plan.steady if task.kind == "compute"]
    readers = _places_of_readers(plan, calls)
    served, place = list[str](), 0  # so many calls are behind
    for task in tasks:
        if task.kind == "compute":
            served.append(task.name)
            place += 1
            continue
        places, back = readers[task.name], int(task.kind == "d2h")
        found = bisect_left(places, place) - back
        index = places[found] if 0 <= found < len(places) else place - back
        served.append(calls[index] if 0 <= index < len(calls) else "")
    return served


def _places_of_readers(plan: Plan, calls: list[str]) -> dict[str, list[int]]:
    """For each bundle and each activation: the places in a list of calls of those that read it."""
    readers: dict[str, list[int]] = {name: [] for name in (*plan.bundles, *plan.activations)}
    for place, name in enumerate(calls):
        bundles = (plan.bundle_of[weight] for weight in plan.calls[name].reads if weight in plan.bundle_of)
        for read in dict.fromkeys((*bundles, *plan.activations_of[name][0])):
            readers[read].append(place)
    return readers


@dataclass(slots=True)
class _Segment:
    """Bytes with one history: who wrote them last, and who has read them since, the latest of each lane."""

    writer: str | None = None
    readers: dict[str, str] = field(default_factory=dict)

    def copy(self) -> _Segment:
        return _Segment(self.writer, dict(self.readers))
