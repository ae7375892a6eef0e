"""The plan: what a strategy decided for a trace and a budget. It is decided once, then printed, saved, proved and run.

A plan holds facts only: which weights travel together, the seat of each, and the order of tasks in the cold cycle and
in a steady one. `connect` derives every edge from these facts, and `Plan.predict` finds the times from the edges.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ..nouns.graph import ACTIVATION, Task, TaskGraph
from ..nouns.machine import Machine
from ..nouns.timeline import MemoryPoint, Span, Timeline
from ..nouns.trace import INPUT, Activation, Call, Trace
from .connect import connect
from .verify import verify

if TYPE_CHECKING:
    import torch

ALIGNMENT = 512  # bytes: seats begin at multiples of it, as in a GPU's own allocator
SETTLED = 6  # cycles after which a steady step no longer changes, on every plan that was ever looked at
SETTLED_REQUESTS = 2  # the same for programs


@dataclass(frozen=True, slots=True)
class Bundle:
    """Weights that travel together. They are neighbours at home and on the device, so one copy moves them all.

    If it has a `component`, only calls of that one read the weights here. Others read them in another bundle.
    """

    name: str
    weights: tuple[str, ...]
    offset: int
    resident: bool = False
    component: str | None = None


@dataclass(frozen=True, slots=True)
class Bound:
    """Seconds that no schedule beats on this trace, budget and machine: at the finest cut, and with whole blocks.

    All zeros where nobody computed it. A step of a program is a request.
    """

    step_seconds: float
    cold_seconds: float
    block_step_seconds: float
    block_cold_seconds: float

    @property
    def request_seconds(self) -> float:
        """No request that follows others is shorter."""
        return self.step_seconds

    @property
    def cold_request_seconds(self) -> float:
        """No first request is shorter."""
        return self.cold_seconds


@dataclass(frozen=True, slots=True)
class Outlook:
    """What other budgets would do: every schedule stalls below `no_stall_bytes`; the step with one GiB more."""

    no_stall_bytes: int
    one_more_gib_step_seconds: float


@dataclass(frozen=True)
class Plan:
    """A decided schedule. `cold` and `steady` are serial programs: they are right if tasks run one after another.

    `lent` has the bytes at the end of the arena that a component's calls use for their activations.

    >>> import taskgraph_offload as tgo
    >>> trace = tgo.Trace.from_units([{"name": n, "seconds": 1e-3, "tensors": [2**20]} for n in "abcd"])
    >>> plan = tgo.Planner.for_trace(trace, "2MiB", strategy="layerwise", machine="cpu").plan()
    >>> print(*plan.tasks[:3], sep=", ")
    compute a, h2d c after compute a, compute b
    """

    trace: Trace
    machine: Machine
    strategy: str
    options: Mapping[str, Any]
    budget_bytes: int
    margin_bytes: int
    arena_bytes: int
    bundles: Mapping[str, Bundle]
    cold: tuple[Task, ...]
    steady: tuple[Task, ...]
    bound: Bound
    outlook: Outlook | None = None
    lent: Mapping[str, int] = field(default_factory=dict)

    @property
    def tasks(self) -> tuple[Task, ...]:
        """The tasks of a steady cycle, in the order in which the host issues them."""
        return self.steady

    @cached_property
    def residents(self) -> tuple[str, ...]:
        """The weights that come once and stay."""
        found: list[str] = []
        for bundle in self.bundles.values():
            if bundle.resident:
                found += bundle.weights
        return tuple(found)

    @cached_property
    def seats(self) -> Mapping[str, int]:
        """The offset in the arena of each weight that is ever on the device; the first one, if it has several."""
        found: dict[str, int] = {}
        for seats in self.seats_of.values():
            for weight, offset in seats.items():
                found.setdefault(weight, offset)
        return found

    @cached_property
    def seats_of(self) -> Mapping[str, Mapping[str, int]]:
        """For each bundle: the offset in the arena of each of its weights."""
        found = {}
        for name, bundle in self.bundles.items():
            inner = inner_offsets(bundle.weights, self.trace)
            found[name] = {weight: bundle.offset + offset for weight, offset in inner.items()}
        return found

    @cached_property
    def sizes(self) -> Mapping[str, int]:
        """The bytes that each bundle spans, the gaps between its weights included."""
        found = {}
        for name, bundle in self.bundles.items():
            found[name] = span_bytes(bundle.weights, self.trace)
        return found

    @property
    def streamed_bytes(self) -> int:
        """Bytes copied to the device in a steady cycle."""
        nbytes = 0
        for task in self.steady:
            if task.kind == "h2d":
                nbytes += self.task_bytes(task)
        return nbytes

    def task_bytes(self, task: Task) -> int:
        """The bytes that a copy moves; 0 for a call."""
        if task.kind == "compute":
            return 0
        if task.stop is not None:
            return task.stop - task.start
        return self.sizes[task.name] if task.name in self.sizes else self.activations[task.name].nbytes

    @cached_property
    def calls(self) -> Mapping[str, Call]:
        """The trace's calls by name."""
        found = {}
        for call in self.trace.calls:
            found[call.name] = call
        return found

    @cached_property
    def bundle_of(self) -> Mapping[str, str]:
        """The bundle that each weight travels in; the first one, if there are several."""
        found: dict[str, str] = {}
        for bundle in self.bundles.values():
            for weight in bundle.weights:
                found.setdefault(weight, bundle.name)
        return found

    @cached_property
    def bundles_in(self) -> Mapping[str, Mapping[str, str]]:
        """For each component: the bundle in which its calls read each weight."""
        found: dict[str, dict[str, str]] = {}
        for component in {call.component for call in self.trace.calls}:
            found[component] = {}
            for own in (None, component):
                for bundle in self.bundles.values():
                    if bundle.component == own:
                        found[component] |= dict.fromkeys(bundle.weights, bundle.name)
        return found

    @cached_property
    def written_back(self) -> frozenset[str]:
        """The bundles and activations that are ever copied home."""
        found = set()
        for task in (*self.cold, *self.steady):
            if task.kind == "d2h":
                found.add(task.name)
        return frozenset(found)

    @cached_property
    def activations(self) -> Mapping[str, Activation]:
        """The trace's activations by the names that tasks use."""
        found = {}
        for activation in self.trace.activations:
            found[ACTIVATION + activation.name] = activation
        return found

    @cached_property
    def activations_of(self) -> Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]]:
        """For each call: the activations that it uses, and those that it makes."""
        where = self.trace.call_of_piece
        used: dict[int, dict[str, None]] = defaultdict(dict)
        made: dict[int, list[str]] = defaultdict(list)
        for name, activation in self.activations.items():
            if activation.producer != INPUT:
                made[where[activation.producer]].append(name)
            for piece in activation.uses:
                if activation.producer == INPUT or where[piece] != where[activation.producer]:
                    used[where[piece]][name] = None
        found: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {}
        for index, call in enumerate(self.trace.calls):
            found[call.name] = tuple(used[index]), tuple(made[index])
        return found

    @cached_property
    def reads_of(self) -> Mapping[str, tuple[str, ...]]:
        """For each call: the bundles and the activations that it reads."""
        found = {}
        for name, call in self.calls.items():
            bundles, bundle_of = dict[str, None](), self.bundles_in[call.component]
            for weight in call.reads:
                if weight in bundle_of:
                    bundles[bundle_of[weight]] = None
            found[name] = (*bundles, *self.activations_of[name][0])
        return found

    @cached_property
    def activation_bytes(self) -> tuple[int, ...]:
        """For each call: its peak of activations, the higher of both cycles, without those that are surely away."""
        peaks, first_piece = list[int](), 0
        cold, steady = self._absences(self.cold), self._absences(self.steady)
        for call in self.trace.calls:
            in_cold = self._peak_without(cold.get(call.name, ()), call, first_piece)
            peaks.append(max(in_cold, self._peak_without(steady.get(call.name, ()), call, first_piece)))
            first_piece += len(call.pieces)
        return tuple(peaks)

    def _absences(self, tasks: tuple[Task, ...]) -> dict[str, list[str]]:
        """For each call of one cycle: the activations that are away all through it.

        An activation is away from the call `before` which it leaves, to the call `after` which it is brought back.
        """
        names = list(self.calls)
        since: dict[str, int] = {}
        found: dict[str, list[str]] = defaultdict(list)
        for task in tasks:
            if not task.is_activation:
                continue
            if task.kind == "d2h" and task.before is not None:
                since[task.name] = names.index(task.before)
            elif task.kind == "h2d" and task.name in since:
                start = since.pop(task.name)
                for name in names[start : names.index(task.after) + 1 if task.after is not None else start]:
                    found[name].append(task.name)
        for activation, start in since.items():
            for name in names[start:]:
                found[name].append(activation)
        return found

    def _peak_without(self, away: Iterable[str], call: Call, first_piece: int) -> int:
        """The peak of activations in a call whose first piece has this index, without some that are away."""
        if not away:
            return call.transient_bytes
        peaks = []
        for index, piece in enumerate(call.pieces, first_piece):
            nbytes = piece.transient_bytes
            for name in away:
                life = self.activations[name]
                if life.producer < index < life.until:
                    nbytes -= life.nbytes
            peaks.append(nbytes)
        return max(peaks)

    @property
    def peak_bytes(self) -> int:
        """The most that the device ever holds: the arena and activations, as far as these do not share bytes."""
        return max(self.used_bytes.values())

    @cached_property
    def used_bytes(self) -> Mapping[str, int]:
        """For each call: the arena, without what is lent, and the activations."""
        found = {}
        for call, activations in zip(self.trace.calls, self.activation_bytes, strict=True):
            found[call.name] = self.arena_bytes - self.lent.get(call.component, 0) + activations
        return found

    @property
    def title(self) -> str:
        """The strategy with its options, as pictures and tables name it."""
        return title_of(self.strategy, self.options)

    def graph(self, cycles: int = 3) -> TaskGraph:
        """The explicit task graph: one cold cycle, then steady ones."""
        return connect(self, cycles)

    @property
    def settled(self) -> int:
        """After so many cycles, a steady step no longer changes."""
        return SETTLED_REQUESTS if self.trace.program else SETTLED

    @cached_property
    def settled_seconds(self) -> float:
        """The predicted step, after enough cycles that it no longer changes."""
        return self.predict(self.settled).step_seconds

    def predict(
        self, cycles: int = 3, machine: Machine | str | None = None, *, requests: int | None = None
    ) -> Timeline:
        """The predicted timeline; of the same plan on another machine, if one is given. A cycle is a request.

        Each node of the graph starts as soon as all nodes before it have stopped: this is the longest path. The nodes
        come in the order of issue, in which all edges point forward. Memory is the arena, which is always there, and
        the activations of the call that runs.
        """
        plan = self if machine is None else replace(self, machine=Machine.of(machine))
        dag = connect(plan, cycles if requests is None else requests).dag
        spans: list[Span] = []
        memory = [MemoryPoint(0.0, plan.arena_bytes)]
        stops: dict[str, float] = {}
        for node, data in dag.nodes.items():
            start, last = 0.0, None
            for before in dag.pred[node]:
                if last is None or stops[before] > start:
                    start, last = stops[before], before
            stops[node] = stop = start + data["seconds"]
            name, call, nbytes = data["task"].name, data["call"], data["nbytes"]
            where = plan.calls[call].component if call else "", data["iteration"]
            spans.append(Span(node, name, data["lane"], call, data["cycle"], start, stop, nbytes, last, *where))
            if data["kind"] == "compute":
                memory.append(MemoryPoint(start, plan.used_bytes[call]))
        return Timeline(
            source="predicted",
            spans=tuple(spans),
            memory=tuple(memory),
            budget_bytes=plan.budget_bytes,
            title=plan.title,
            bound_seconds=plan.bound.step_seconds,
            of_program=bool(plan.trace.program),
        )

    def verify(self) -> None:
        """Prove the plan safe, or raise `PlanError` naming what is wrong."""
        verify(self)

    def explain(self) -> str:
        """Say what is resident, what streams, what bounds the step, what another budget would do."""
        from .explain import explain

        return explain(self)

    def __str__(self) -> str:
        from .text import print_plan

        return print_plan(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan to a file that people can read."""
        from .file import save

        save(self, path)

    @staticmethod
    def load(path: str | os.PathLike[str], model: torch.nn.Module | None = None) -> Plan:
        """Read a plan and prove it again; with a model, also check that the plan was made for it."""
        from .file import load

        return load(path, model)


def title_of(strategy: str, options: Mapping[str, Any]) -> str:
    """Give a strategy with its options in one line.

    >>> title_of("layerwise", {"prefetch": 1})
    'layerwise prefetch=1'
    """
    return " ".join([strategy, *map("{}={}".format, options.keys(), options.values())])


def inner_offsets(weights: tuple[str, ...], trace: Trace) -> dict[str, int]:
    """Where each weight of a bundle begins, from the bundle's first byte."""
    offsets, stop = {}, 0
    for name in weights:
        offsets[name] = start = stop + -stop % ALIGNMENT
        stop = start + trace.weights[name].nbytes
    return offsets


def span_bytes(weights: tuple[str, ...], trace: Trace) -> int:
    """The bytes from the first byte of a bundle to its last one."""
    stop = 0
    for name in weights:
        stop += -stop % ALIGNMENT + trace.weights[name].nbytes
    return stop


def aligned(nbytes: int) -> int:
    """Round up to where a seat may begin.

    >>> aligned(1), aligned(512)
    (512, 512)
    """
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
