"""Proves, byte by byte, that no two tasks race and that every task finds what it expects.

It cuts every line of bytes wherever the range of a task begins or ends, and checks each segment alone:

    tasks        h2d a, h2d b     [------ a ------)[------ b ------)
                 h2d c                      [------ c ------)
    segments                      [---------|------|--------|------)
    who touches                    h2d a     h2d a  h2d b    h2d b
                                   compute a h2d c  h2d c    compute b
                                             ...
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from ...nouns.graph import Task
from .program import Order, Program, Step

ARENA = "the arena"


@dataclass(frozen=True, slots=True)
class Touch:
    """Bytes [start, stop) of a line of bytes that a task reads or writes, and the bundle that it expects there."""

    line: str
    start: int
    stop: int
    writes: bool
    bundle: str = ""


Access: TypeAlias = tuple[Step, Touch]


def prove_bytes(program: Program, order: Order) -> None:
    """Every two accesses of a byte are ordered unless both read, and every read finds the right bytes."""
    lines: dict[str, list[Access]] = {}
    touches: dict[Task, list[Touch]] = {}
    for step in program.steps:
        if step.task not in touches:
            touches[step.task] = list(touches_of(program, step.task))
        for touch in touches[step.task]:
            lines.setdefault(touch.line, []).append((step, touch))
    for line, accesses in lines.items():
        for start, stop, found in segments(accesses):
            where = f"bytes [{start}:{stop}] of {line}"
            prove_ordered(program, order, where, found)
            if line == ARENA:
                prove_contents(program, where, start, found)


def touches_of(program: Program, task: Task) -> Iterator[Touch]:
    """What a task reads and writes."""
    if task.kind == "compute":
        yield from _touches_of_call(program, task.name)
        return
    arrives, home = task.kind == "h2d", f"the home of {task.name}"
    if task.is_activation:
        nbytes = program.activations[task.name].nbytes
        yield Touch(task.name, 0, nbytes, writes=arrives)
        yield Touch(home, 0, nbytes, writes=not arrives)
    else:
        offset = program.plan.bundles[task.name].offset
        start, stop = task.start, program.sizes[task.name] if task.stop is None else task.stop
        yield Touch(ARENA, offset + start, offset + stop, arrives, task.name)
        yield Touch(home, start, stop, writes=not arrives)


def _touches_of_call(program: Program, call: str) -> Iterator[Touch]:
    """Join neighbouring seats of one bundle that the call uses in the same way."""
    written = set(program.calls[call].writes)
    joined: Touch | None = None
    for seat in sorted((program.seats[name] for name in program.calls[call].reads), key=lambda seat: seat.start):
        touch = Touch(ARENA, seat.start, seat.stop, seat.weight in written, seat.bundle)
        if joined and (joined.stop, joined.writes, joined.bundle) == (touch.start, touch.writes, touch.bundle):
            joined = Touch(ARENA, joined.start, touch.stop, touch.writes, touch.bundle)
            continue
        if joined:
            yield joined
        joined = touch
    if joined:
        yield joined
    for name in program.used_by(call):
        yield Touch(name, 0, program.activations[name].nbytes, writes=False)
    for name in program.made_by(call):
        yield Touch(name, 0, program.activations[name].nbytes, writes=True)


def segments(accesses: Sequence[Access]) -> Iterator[tuple[int, int, Sequence[Access]]]:
    """Ranges with the same accesses for all their bytes, in the order of issue; of equal ranges only the last."""
    cuts = sorted({place for _, touch in accesses for place in (touch.start, touch.stop)})
    found: list[list[int]] = [[] for _ in cuts]
    for number, (_, touch) in enumerate(accesses):
        for place in range(bisect_left(cuts, touch.start), bisect_left(cuts, touch.stop)):
            found[place].append(number)
    alike = {tuple(numbers): place for place, numbers in enumerate(found) if numbers}
    for numbers, place in alike.items():
        yield cuts[place], cuts[place + 1], [accesses[number] for number in numbers]


def prove_ordered(program: Program, order: Order, where: str, accesses: Sequence[Access]) -> None:
    """When a write begins, all earlier accesses have ended; when a read begins, all earlier writes have ended."""
    touched = written = 0  # the bits of tasks, as in `Order`
    for step, touch in accesses:
        racing = (touched if touch.writes else written) & ~order.before[step.index]
        if racing:
            other = program.steps[racing.bit_length() - 1]
            program.refuse(f"{other} and {step} race on {where}: no path of edges orders them", other, step)
        touched |= 1 << step.index
        if touch.writes:
            written |= 1 << step.index


def prove_contents(program: Program, where: str, place: int, accesses: Sequence[Access]) -> None:
    """Replay some bytes of the arena: which copy brought them, and which call has changed them since."""
    brought: Step | None = None
    changed: Step | None = None
    for step, touch in accesses:
        if touch.writes and step.task.kind == "h2d":
            prove_expendable(program, where, step, brought, changed)
            brought, changed = step, None
            continue
        wanted = f"{step} reads {_content(program, touch.bundle, place)} from {where}"
        if brought is None:
            program.refuse(f"{wanted}: nothing has brought it", step)
        if brought.task.name != touch.bundle:
            program.refuse(f"{wanted}, but {brought} has overwritten them", brought, step)
        if step.task.kind == "d2h":
            changed = None
        elif touch.writes:
            changed = step


def prove_expendable(program: Program, where: str, copy: Step, brought: Step | None, changed: Step | None) -> None:
    """A copy never overwrites a resident, nor bytes that changed since they were last copied home."""
    if changed is not None:
        program.refuse(f"{copy} overwrites {where}, which {changed} changed and no d2h copied home", changed, copy)
    if brought is not None and brought.task.name != copy.task.name and program.plan.bundles[brought.task.name].resident:
        program.refuse(f"{copy} overwrites {where}, which {brought} brought to stay: it is resident", brought, copy)


def _content(program: Program, bundle: str, place: int) -> str:
    """What a bundle has at a place of the arena."""
    for weight in program.plan.bundles[bundle].weights:
        if program.seats[weight].start <= place < program.seats[weight].stop:
            return f"weight {weight!r}"
    return f"the gap between weights of {bundle!r}"
