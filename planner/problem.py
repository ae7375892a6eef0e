"""What a strategy is given: a trace, the bytes it may use, a machine; and the trace seen as groups of weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from taskgraph_offload.nouns.graph import ACTIVATION, Task
from taskgraph_offload.nouns.machine import Machine
from taskgraph_offload.nouns.trace import Trace
from taskgraph_offload.plan.plan import aligned, span_bytes

from .schedule import Schedule
from .seats import arena_bytes, place

FIXED = "always"  # the bundle of the weights that always stay


@dataclass(frozen=True)
class Problem:
    """A trace to schedule within `capacity` bytes of arena, on a machine."""

    trace: Trace
    capacity: int
    machine: Machine

    @cached_property
    def groups(self) -> Mapping[str, tuple[str, ...]]:
        """The weights by who reads them: weights with the same readers travel together, named after their readers."""
        by_readers: dict[tuple[int, ...], list[str]] = {}
        for name, readers in self.trace.readers.items():
            if name not in self.trace.fixed:
                by_readers.setdefault(readers, []).append(name)
        calls = self.trace.calls
        groups: dict[str, tuple[str, ...]] = {}
        for readers, names in sorted(by_readers.items()):
            blocks = list(dict.fromkeys(calls[i].block or calls[i].name for i in readers))
            name = blocks[0] if len(blocks) == 1 else f"{blocks[0]}&{blocks[1]}" + "&..." * (len(blocks) > 2)
            groups[unique(name, groups)] = tuple(names)
        return groups

    @cached_property
    def sizes(self) -> Mapping[str, int]:
        """The bytes that each group occupies in the arena."""
        return {name: aligned(span_bytes(weights, self.trace)) for name, weights in self.groups.items()}

    def bytes_of(self, names: Iterable[str]) -> int:
        """The bytes that some groups occupy together."""
        return sum(self.sizes[name] for name in names)

    def arena_bytes(self, schedule: Schedule) -> int:
        """The arena that a schedule needs, beside what always stays."""
        return arena_bytes(place(schedule, self.trace), schedule.groups, self.trace)

    @cached_property
    def needs(self) -> tuple[tuple[str, ...], ...]:
        """For each call: the groups that it reads."""
        group_of = {weight: group for group, weights in self.groups.items() for weight in weights}
        return tuple(
            tuple(dict.fromkeys(group_of[name] for name in call.reads if name in group_of)) for call in self.trace.calls
        )

    @cached_property
    def group_readers(self) -> Mapping[str, tuple[int, ...]]:
        """For each group: the indices of the calls that read it."""
        readers: dict[str, list[int]] = {name: [] for name in self.groups}
        for index, names in enumerate(self.needs):
            for name in names:
                readers[name].append(index)
        return {name: tuple(calls) for name, calls in readers.items()}

    @cached_property
    def computes(self) -> tuple[Task, ...]:
        """The calls as tasks, in order."""
        return tuple(Task("compute", call.name) for call in self.trace.calls)


def unique(name: str, taken: Iterable[str]) -> str:
    """The name, or the name with a number that makes it new; no bundle goes by the mark of activations."""
    name = f"_{name}" if name.startswith(ACTIVATION) else name
    names, candidate, number = {*taken, FIXED}, name, 1
    while candidate in names:
        number += 1
        candidate = f"{name}+{number}"
    return candidate
