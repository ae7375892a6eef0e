"""Draws every edge of a plan, from the byte ranges that its tasks read and write. Nobody else writes an edge.

A plan is a serial program: it is right if its tasks run one after another. This module keeps only the order that the
bytes need, so that the lanes overlap as much as they can:

    arena bytes   [------ seat of a ------)[------ seat of b ------)
                                  [------ seat of c ------)
    program       h2d a, h2d b, compute a, h2d c, compute b, ...
    edges         h2d a     -> compute a    data    it reads what the copy brought
                  compute a -> h2d c        reuse   the copy overwrites bytes that the call read
                  compute a -> h2d c        issue   the strategy asked for this order (`after`, `before`)
                  compute a -> compute b    order   a lane is a FIFO

Three kinds of bytes are followed: the arena, activations that live across calls, and homes that are written.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

import networkx as nx

from ..errors import SettingsError
from ..nouns.graph import Lane, Reason, Task, TaskGraph
from ..nouns.ranges import ByteMap

if TYPE_CHECKING:
    from ..nouns.trace import Call
    from .plan import Plan

ARENA = "arena"

Edge: TypeAlias = tuple[str, str, Reason]


@dataclass(frozen=True, slots=True)
class Step:
    """A task of the unrolled plan: its node's name, its cycle and lane, and the call that it is or copies for.

    `iteration`: how often in a row that call's component has run before, in a program.
    """

    node: str
    cycle: int
    task: Task
    lane: Lane
    call: str
    iteration: int


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
    seconds = {}
    for call in plan.trace.calls:
        seconds[call.name] = call.cost(plan.machine)
    for step in steps:
        task, nbytes = step.task, plan.task_bytes(step.task)
        dag.add_node(
            step.node,
            kind=task.kind,
            lane=step.lane,
            call=step.call,
            iteration=step.iteration,
            cycle=step.cycle,
            task=task,
            seconds=seconds[step.call] if step.lane == "compute" else plan.machine.copy_seconds(step.lane, nbytes),
            nbytes=nbytes,
        )
    for before, after, reason in (*edges_by_bytes(plan, steps), *edges_by_gates(steps), *edges_by_lane(steps)):
        if not dag.has_edge(before, after):  # the stronger reasons come first
            dag.add_edge(before, after, reason=reason)
    return TaskGraph(dag)


def unroll(plan: Plan, cycles: int) -> list[Step]:
    """The serial program over some cycles, each task with a name of its own and the call that it serves."""
    calls = iter(_served_calls(plan, [*plan.cold, *plan.steady * (cycles - 1)]))
    seen: dict[str, int] = {}
    steps: list[Step] = []
    for cycle in range(cycles):
        for task in plan.steady if cycle else plan.cold:
            name = f"{cycle}/{task.kind} {task.name}" + ("" if task.stop is None else f" [{task.start}:{task.stop}]")
            seen[name] = seen.get(name, 0) + 1
            node = name if seen[name] == 1 else f"{name} #{seen[name]}"
            steps.append(Step(node, cycle, task, task.lane, *next(calls)))
    return steps


def edges_by_bytes(plan: Plan, steps: list[Step]) -> list[Edge]:
    """Read after write is `data`; write after read or write is `reuse`, but only between lanes: a lane is a FIFO."""
    edges: list[Edge] = []
    spaces: dict[str, ByteMap[_History]] = {}
    touched: dict[Task, list[Access]] = {}
    for step in steps:
        if step.task not in touched:
            touched[step.task] = accesses(plan, step.task)
        for access in touched[step.task]:
            if access.space not in spaces:
                spaces[access.space] = ByteMap(_History(), _History.copy)
            space = spaces[access.space]
            if access.writes:
                for _, _, past in space.replace(access.start, access.stop, _History(step)):
                    for before in (past.writer, *past.readers.values()):
                        if before is not None and before.lane != step.lane:
                            edges.append((before.node, step.node, "reuse"))
            else:
                for past in space.fit(access.start, access.stop):
                    if past.writer is not None and past.writer is not step:
                        edges.append((past.writer.node, step.node, "data"))
                    past.readers[step.lane] = step
    return edges


def edges_by_gates(steps: list[Step]) -> list[Edge]:
    """What strategies ask for: `after` the nearest earlier call of a name, `before` the nearest later one."""
    edges: list[Edge] = []
    latest: dict[str, str] = {}
    waiting: dict[str, list[str]] = {}
    for step in steps:
        if step.task.after is not None and step.task.after in latest:
            edges.append((latest[step.task.after], step.node, "issue"))
        if step.task.before is not None:
            waiting.setdefault(step.task.before, []).append(step.node)
        if step.task.kind == "compute":
            latest[step.task.name] = step.node
            for copy in waiting.pop(step.task.name, ()):
                edges.append((copy, step.node, "issue"))
    return edges


def edges_by_lane(steps: list[Step]) -> list[Edge]:
    """A lane is a FIFO: each task waits for the one before it."""
    edges: list[Edge] = []
    latest: dict[Lane, str] = {}
    for step in steps:
        if step.lane in latest:
            edges.append((latest[step.lane], step.node, "order"))
        latest[step.lane] = step.node
    return edges


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


def _accesses_of_call(plan: Plan, call: Call) -> list[Access]:
    """Seats of what a call reads, neighbours in one bundle joined; what is lent; the activations it uses and makes."""
    found: list[Access] = []
    last, bundle_of = "", plan.bundles_in[call.component]
    seats = sorted((plan.seats_of[bundle_of[name]][name], name) for name in call.reads if name in bundle_of)
    for start, name in seats:
        stop, bundle, writes = start + plan.trace.weights[name].nbytes, bundle_of[name], name in call.writes
        if found and bundle == last and not writes and not found[-1].writes:
            found[-1] = Access(ARENA, found[-1].start, max(found[-1].stop, stop), writes=False)
        else:
            found.append(Access(ARENA, start, stop, writes))
        last = bundle
    if lent := plan.lent.get(call.component):
        found.append(Access(ARENA, plan.arena_bytes - lent, plan.arena_bytes, writes=True))
    for writes, names in zip((False, True), plan.activations_of[call.name], strict=True):
        for name in names:
            found.append(Access(name, 0, plan.activations[name].nbytes, writes))
    return found


def _served_calls(plan: Plan, tasks: list[Task]) -> list[tuple[str, int]]:
    """The call that each task is or copies for, and its iteration: the next that reads what comes, the last that used
    what goes.
    """
    calls: list[str] = []
    readers: dict[str, list[int]] = defaultdict(list)
    for task in (*tasks, *plan.steady):
        if task.kind == "compute":
            for name in plan.reads_of[task.name]:
                readers[name].append(len(calls))
            calls.append(task.name)
    iterations, served, place = plan.trace.iterations, list[tuple[str, int]](), 0  # so many calls are behind
    for task in tasks:
        if task.kind == "compute":
            served.append((task.name, iterations[place % len(iterations)]))
            place += 1
            continue
        places, back = readers[task.name], int(task.kind == "d2h")
        found = bisect_left(places, place) - back
        index = places[found] if 0 <= found < len(places) else place - back
        known = 0 <= index < len(calls)
        served.append((calls[index], iterations[index % len(iterations)]) if known else ("", 0))
    return served


@dataclass(slots=True)
class _History:
    """What happened to some bytes: who wrote them last, and who has read them since, the latest of each lane."""

    writer: Step | None = None
    readers: dict[Lane, Step] = field(default_factory=dict)

    def copy(self) -> _History:
        return _History(self.writer, dict(self.readers))
