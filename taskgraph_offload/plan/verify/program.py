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
        cycles = (plan.cold, plan.steady, plan.steady)
        numbered = enumerate((cycle, task) for cycle, tasks in enumerate(cycles) for task in tasks)
        self.steps = [Step(index, cycle, task) for index, (cycle, task) in numbered]
        self.cycles = [[step for step in self.steps if step.cycle == cycle] for cycle in range(len(cycles))]

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
        stops = {bundle.name: bundle.offset for bundle in self.plan.bundles.values()}
        for seat in self.seats.values():
            stops[seat.bundle] = max(stops[seat.bundle], seat.stop)
        return {name: stop - self.plan.bundles[name].offset for name, stop in stops.items()}

    @cached_property
    def calls(self) -> dict[str, Call]:
        return {call.name: call for call in self.plan.trace.calls}

    @cached_property
    def pieces(self) -> dict[str, range]:
        """By call: the indices of its pieces, counted through all calls."""
        found, count = dict[str, range](), 0
        for name, call in self.calls.items():
            found[name] = range(count, count + len(call.pieces))
            count += len(call.pieces)
        return found

    @cached_property
    def piece_count(self) -> int:
        return sum(map(len, self.pieces.values()))

    @cached_property
    def activations(self) -> dict[str, Activation]:
        """By the name that tasks use."""
        return {ACTIVATION + activation.name: activation for activation in self.plan.trace.activations}

    def made_by(self, call: str) -> list[str]:
        """The activations that a call makes."""
        return [name for name, activation in self.activations.items() if activation.producer in self.pieces[call]]

    def used_by(self, call: str) -> list[str]:
        """The activations that a call reads and that other calls, or the caller, made."""
        inside = self.pieces[call]
        return [
            name
            for name, activation in self.activations.items()
            if activation.producer not in inside and any(piece in inside for piece in activation.uses)
        ]

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
