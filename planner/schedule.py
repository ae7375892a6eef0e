"""What a strategy gives back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from taskgraph_offload.nouns.graph import Task
from taskgraph_offload.nouns.trace import Trace


@dataclass(frozen=True)
class Schedule:
    """What a strategy decides: which weights travel together, who stays, and the serial order of a steady cycle.

    Offsets follow in `seats`, the first cycle in `cold`, edges in `connect`. A strategy whose speed depends on one
    particular placement may give its `offsets`. `loads_first`: what stays comes before the first call, not with its
    first reader; `fills_gaps`: it comes earlier where the link would wait. `trace`: the trace cut finer, where the
    tasks' calls are parts of blocks. `freed_bytes`: what the peak of activations is lower by, because some leave.
    """

    groups: Mapping[str, tuple[str, ...]]
    residents: frozenset[str]
    steady: tuple[Task, ...]
    offsets: Mapping[str, int] | None = None
    loads_first: bool = False
    fills_gaps: bool = False
    trace: Trace | None = None
    freed_bytes: int = 0

    def with_resident(self, name: str, weights: tuple[str, ...]) -> Schedule:
        """The same schedule with one more group, which always stays."""
        return replace(self, groups={name: weights, **self.groups}, residents=self.residents | {name})


class Infeasible(Exception):
    """No schedule of this strategy fits; it needs `arena_bytes`, of which activations that leave can free some."""

    def __init__(self, arena_bytes: int, freed_bytes: int = 0) -> None:
        super().__init__(f"needs an arena of {arena_bytes} bytes, {freed_bytes} of them free when activations leave")
        self.arena_bytes, self.freed_bytes = arena_bytes, freed_bytes
