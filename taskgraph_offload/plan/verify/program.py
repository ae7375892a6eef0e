"""A plan as its verifier reads it: unrolled, with seats computed again; refusals print the plan around the culprits.

On purpose, it shares no code with what makes plans. It proves nothing itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from textwrap import shorten
from typing import TYPE_CHECKING, NoReturn

from ...errors import PlanError
from ...nouns.graph import ACTIVATION, Task

if TYPE_CHECKING:
    from ...nouns.trace import Activation, Call
    from ..plan import Bundle, Plan

ALIGNMENT = 512  # bytes: where the seat of a weight may begin
CONTEXT = 3  # lines of the plan printed on either side of a culprit


@dataclass(frozen=True, slots=True)
class Step:
    """One task of the unrolled plan; `index` counts in the order in which the host issues them."""

    index: int
    cycle: int
    task: Task

    def __str__(self) -> str:
        return f"{self.cycle}/{self.task}"


@dataclass(frozen=True, slots=True)
class Seat:
    """Where a weight lies in the arena: bytes [start, stop)."""

    weight: str
    bundle: str
    start: int
    stop: int


class Order:
    """For each task: the tasks that have surely ended when it begins, as the bits of a number."""

    def __init__(self, predecessors: Sequence[Sequence[int]]) -> None:
        self.before: list[int] = []
        for direct in predecessors:
            bits = 0
            for index in direct:
                bits |= self.before[index] | 1 << index
            self.before.append(bits)

    def holds(self, first: Step, second: Step) -> bool:
        """Whether `first` has ended when `second` begins."""
        return bool(self.before[second.index] >> first.index & 1)


class Program:
    """The cold cycle of a plan and two steady ones, as one list of steps."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.steps: list[Step] = []
        self.cycles: list[list[Step]] = []
        for cycle, tasks in enumerate((plan.cold, plan.steady, plan.steady)):
            for task in tasks:
                self.steps.append(Step(len(self.steps), cycle, task))
            self.cycles.append(self.steps[-len(tasks) :] if tasks else [])
        self.calls: dict[str, Call] = {}
        self.pieces: dict[str, range] = {}  # by call: the indices of its pieces, counted through all calls
        self.piece_count = 0
        for call in plan.trace.calls:
            self.calls[call.name] = call
            self.pieces[call.name] = range(self.piece_count, self.piece_count + len(call.pieces))
            self.piece_count += len(call.pieces)
        self.activations: dict[str, Activation] = {}  # by the name that tasks use
        for activation in plan.trace.activations:
            self.activations[ACTIVATION + activation.name] = activation

    @cached_property
    def seats(self) -> dict[str, Seat]:
        """By weight. In a bundle, each weight begins at the next aligned byte behind the one before."""
        found = {}
        for bundle in self.plan.bundles.values():
            start = bundle.offset
            for weight in bundle.weights:
                stop = start + self.plan.trace.weights[weight].nbytes
                found[weight] = Seat(weight, bundle.name, start, stop)
                start = stop + -stop % ALIGNMENT
        return found

    @cached_property
    def sizes(self) -> dict[str, int]:
        """By bundle: the bytes from its first to its last."""
        found = {}
        for name, bundle in self.plan.bundles.items():
            found[name] = 0
            for weight in bundle.weights:
                found[name] = max(found[name], self.seats[weight].stop - bundle.offset)
        return found

    def activations_of(self, call: str) -> tuple[list[str], list[str]]:
        """The activations that a call reads and that other calls, or the caller, made; and those that it makes."""
        used, made, inside = list[str](), list[str](), self.pieces[call]
        for name, activation in self.activations.items():
            if activation.producer in inside:
                made.append(name)
            elif not set(inside).isdisjoint(activation.uses):
                used.append(name)
        return used, made

    def refuse(self, why: str, *culprits: Step | Bundle) -> NoReturn:
        """Raise `PlanError`: why, and the plan around the culprits, each marked with an arrow."""
        rows: list[Step | Bundle] = [*self.plan.bundles.values(), *self.steps]
        marked = [place for place, row in enumerate(rows) if row in culprits]
        raise PlanError("\n".join([why, *_around(rows, marked)]))


def _around(rows: Sequence[Step | Bundle], marked: Sequence[int]) -> Iterator[str]:
    """The rows near the marked ones, dots where some are left out."""
    near = sorted({i for m in marked for i in range(m - CONTEXT, m + CONTEXT + 1) if 0 <= i < len(rows)})
    for previous, place in zip([-1, *near], [*near, len(rows)], strict=True):
        if place != previous + 1:
            yield "       ..."
        if place < len(rows):
            row = rows[place]
            text = str(row) if isinstance(row, Step) else f"bundle {row.name} at {row.offset}: {' '.join(row.weights)}"
            yield ("  ---> " if place in marked else "       ") + shorten(text, 100)
