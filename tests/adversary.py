"""Runs a plan's graph on simulated bytes, in the worst orders that the edges allow: it checks the verifier."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from taskgraph_offload.nouns.graph import Task, TaskGraph
from taskgraph_offload.nouns.trace import Call
from taskgraph_offload.plan.plan import Plan

UNIT = 512  # bytes; every size here is a multiple of it


@dataclass(frozen=True)
class Content:
    """What a unit of 512 bytes holds: which unit of which bundle. `version` counts the calls that have changed it."""

    bundle: str
    unit: int
    version: int = 0


class Adversary:
    """Runs a graph on simulated bytes. Each lane is as slow or as fast as the edges allow.

    While a copy runs, the bytes that it writes are garbage (None).
    """

    def __init__(self, plan: Plan, graph: TaskGraph, seed: int) -> None:
        self.plan, self.dag, self.random = plan, graph.dag, random.Random(seed)
        self.arena: list[Content | None] = [None] * (plan.arena_bytes // UNIT + 1)
        spans = {name: range(-(-size // UNIT)) for name, size in plan.sizes.items()}
        self.truth = {name: [Content(name, unit) for unit in units] for name, units in spans.items()}
        self.home: dict[str, list[Content | None]] = {name: list(units) for name, units in self.truth.items()}
        self.made = dict.fromkeys(plan.activations, 0)  # how often each was made: the version that is right
        self.there: dict[str, int | None] = dict.fromkeys(plan.activations, 0)  # the version on the device
        self.kept = dict[str, int | None]()  # the version at home
        self.leaving, self.away = dict[str, str | None](), set[str]()

    def goes_wrong(self) -> str | None:
        """The first node at which a call reads garbage, or memory runs out; None if all goes well."""
        waits = {node: self.dag.in_degree(node) for node in self.dag}
        favour = {lane: self.random.random() ** 3 for lane in ("compute", "h2d", "d2h")}
        ready, running = [node for node in self.dag if not waits[node]], list[str]()
        while ready or running:
            events = [(node, True) for node in ready] + [(node, False) for node in running]
            chances = [favour[self.dag.nodes[node]["lane"]] + 1e-3 for node, _ in events]
            node, begins = self.random.choices(events, chances)[0]
            if begins:
                ready.remove(node)
                running.append(node)
            if not self._is_right(self.dag.nodes[node]["task"], begins) or not self._fits(running):
                return node
            if not begins:
                running.remove(node)
                for after in self.dag.successors(node):
                    waits[after] -= 1
                    ready += [after] * (not waits[after])
        return None

    def _fits(self, running: list[str]) -> bool:
        gone = sum(self.plan.activations[name].nbytes for name in self.away)
        calls = [
            self.plan.calls[self.dag.nodes[n]["task"].name] for n in running if self.dag.nodes[n]["kind"] == "compute"
        ]
        return all(self._room(call) + call.transient_bytes - gone <= self.plan.budget_bytes for call in calls)

    def _room(self, call: Call) -> int:
        return self.plan.arena_bytes - self.plan.lent.get(call.component, 0)

    def _is_right(self, task: Task, begins: bool) -> bool:
        if task.kind == "compute":
            return self._weights_are_right(task.name, begins) and self._activations_are_right(task.name, begins)
        (self._copy_activation if task.is_activation else self._copy)(task, begins)
        return True

    def _weights_are_right(self, name: str, begins: bool) -> bool:
        call = self.plan.calls[name]
        for place in range(self._room(call) // UNIT, self.plan.arena_bytes // UNIT):
            self.arena[place] = None  # an activation
        for weight in call.reads:
            bundle = self.plan.bundles[self.plan.bundles_in[call.component][weight]]
            first = (self.plan.seats_of[bundle.name][weight] - bundle.offset) // UNIT
            for unit in range(first, first + self.plan.trace.weights[weight].nbytes // UNIT):
                place, expected = bundle.offset // UNIT + unit, self.truth[bundle.name][unit]
                if self.arena[place] != expected:
                    return False
                if weight in call.writes and not begins:
                    changed = replace(expected, version=expected.version + 1)
                    self.arena[place] = self.truth[bundle.name][unit] = changed
        return True

    def _activations_are_right(self, name: str, begins: bool) -> bool:
        for gone in [gone for gone, before in self.leaving.items() if begins and before == name]:
            del self.leaving[gone]
            self.there[gone] = None
            self.away.add(gone)
        used, made = self.plan.activations_of[name]
        for activation in made:
            self.made[activation] += not begins
            self.there[activation] = None if begins else self.made[activation]
        return all(self.there[activation] == self.made[activation] for activation in used)

    def _copy(self, task: Task, begins: bool) -> None:
        stop = self.plan.sizes[task.name] if task.stop is None else task.stop
        for unit in range(task.start // UNIT, -(-stop // UNIT)):
            place = self.plan.bundles[task.name].offset // UNIT + unit
            if task.kind == "h2d":
                self.arena[place] = None if begins else self.home[task.name][unit]
            else:
                self.home[task.name][unit] = None if begins else self.arena[place]

    def _copy_activation(self, task: Task, begins: bool) -> None:
        if task.kind == "d2h":
            self.leaving[task.name] = task.before
            self.kept[task.name] = None if begins else self.there[task.name]
        else:
            self.away.discard(task.name)
            self.there[task.name] = None if begins else self.kept[task.name]


def found_by_the_adversary(plan: Plan, graph: TaskGraph, seeds: range) -> str | None:
    return next(filter(None, (Adversary(plan, graph, seed).goes_wrong() for seed in seeds)), None)
