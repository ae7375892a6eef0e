"""What each call, and each block as a whole, needs on the device: ranges of the arena, and tensors to point there.

Works it out once, when a plan is attached. Moves nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..nouns.trace import Call
from ..plan.plan import Plan
from .homes import Home, Homes
from .inside import Inside
from .members import Member
from .seating import Range


@dataclass(eq=False)
class Need:
    """What runs between two boundaries, and what it needs there.

    `ranges` are bytes of the arena with the bundle that must hold them. `beside` are weights whose seats collide with
    others of the same need: nobody planned that all of them are there at once, so they get memory of their own.
    `unseen` are running statistics, with the modules that change them.
    """

    name: str
    block: str | None
    ranges: tuple[tuple[str, int, int], ...] = ()
    members: tuple[Member, ...] = ()
    written: frozenset[str] = frozenset()
    beside: tuple[Home, ...] = ()
    reads: list[Range] = field(default_factory=list)
    writes: list[Range] = field(default_factory=list)
    activation_bytes: int = 0
    unseen: tuple[tuple[str, nn.Module], ...] = ()

    def changed_unseen(self) -> set[str]:
        """The running statistics that batch norms in training have changed, which torch does not count as edits."""
        return {name for name, module in self.unseen if module.training}


class Needs:
    """The needs of every call, of every block as a whole, and of the forward throughout (`standing`).

    `inside` says which modules lie in which blocks; one by itself needs all that its block does.

    `staying` is the part of `standing` that the forward changes: between forwards too, the device has the true values.
    """

    def __init__(self, model: nn.Module, plan: Plan, homes: Homes) -> None:
        self._plan, self._homes = plan, homes
        self._position = {name: i for bundle in plan.bundles.values() for i, name in enumerate(bundle.weights)}
        self.changed = changed_weights(plan)
        self._statistics = _running_statistics(model, homes)
        self.standing_weights = standing_weights(plan)
        self.standing = self._need("standing", None, self.standing_weights, ())
        staying = [name for name in self.standing_weights if name in self.changed]
        self.staying = self._need("standing", None, staying, ())
        self.calls = [self._need(call.name, call.block, call.reads, call.writes) for call in plan.trace.calls]
        for need, nbytes in zip(self.calls, plan.activation_bytes, strict=True):
            need.activation_bytes = nbytes
        self.blocks = {name: self._of_block(name, calls) for name, calls in _calls_by_block(plan).items()}
        standing = set(self.standing.members)
        moving = [member.tensor for member in homes.members() if member not in standing]
        self.inside = Inside(model, self.blocks, moving)

    def _of_block(self, name: str, calls: list[Call]) -> Need:
        reads = dict.fromkeys(weight for call in calls for weight in call.reads)
        writes = dict.fromkeys(weight for call in calls for weight in call.writes)
        need = self._need(name, name, reads, writes)
        need.activation_bytes = max(self._plan.activation_bytes)
        return need

    def _need(self, name: str, block: str | None, reads: Iterable[str], writes: Iterable[str]) -> Need:
        wanted = [weight for weight in reads if weight in self._plan.seats]
        seated, beside = self._without_collisions(wanted)
        need = Need(name, block, self._ranges(seated), beside=tuple(self._homes.weights[weight] for weight in beside))
        pointed = seated if name == "standing" else [w for w in seated if w not in self.standing_weights]
        need.members = tuple(member for weight in pointed for member in self._homes.weights[weight].members)
        need.written = frozenset(writes) - set(self.standing_weights)
        need.reads = [(start, stop) for _, start, stop in need.ranges]
        need.unseen = tuple((weight, self._statistics[weight]) for weight in pointed if weight in self._statistics)
        need.writes = [self._range(weight) for weight in writes if weight in seated]
        return need

    def _without_collisions(self, weights: list[str]) -> tuple[list[str], list[str]]:
        """The weights whose seats are apart, and the others."""
        seated: list[str] = []
        beside: list[str] = []
        end = 0
        for weight in sorted(weights, key=self._plan.seats.__getitem__):
            start, stop = self._range(weight)
            if start >= end or start == stop:
                seated.append(weight)
                end = max(end, stop)
            else:
                beside.append(weight)
        return seated, beside

    def _range(self, weight: str) -> Range:
        start = self._plan.seats[weight]
        return start, start + self._plan.trace.weights[weight].nbytes

    def _ranges(self, weights: list[str]) -> tuple[tuple[str, int, int], ...]:
        """The weights' bytes, neighbours in one bundle joined, with the gap between them if one copy brings both."""
        found: list[tuple[str, int, int]] = []
        last = -2
        for weight in weights:
            bundle, (start, stop) = self._plan.bundle_of[weight], self._range(weight)
            if found and found[-1][0] == bundle and self._position[weight] == last + 1:
                found[-1] = (bundle, found[-1][1], stop)
            else:
                found.append((bundle, start, stop))
            last = self._position[weight]
        return tuple(found)


def changed_weights(plan: Plan) -> frozenset[str]:
    """The weights that the forward changes."""
    return frozenset(name for call in plan.trace.calls for name in call.writes if name in plan.seats)


def standing_weights(plan: Plan) -> tuple[str, ...]:
    """What is on the device throughout: residents that are read between blocks, or that the forward changes."""
    wanted = {name for call in plan.trace.calls if call.block is None for name in call.reads} | changed_weights(plan)
    return tuple(name for name in plan.residents if name in wanted)


def standing_bundles(plan: Plan) -> frozenset[str]:
    """The bundles with weights that are there throughout."""
    return frozenset(plan.bundle_of[name] for name in standing_weights(plan))


def _running_statistics(model: nn.Module, homes: Homes) -> dict[str, nn.Module]:
    """The weights that batch norms change when they train, without a trace in the tensors' versions."""
    weight_of = {id(member.tensor): member.weight for member in homes.members()}
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    kept = [(norm, buffer) for norm in norms for buffer in (norm.running_mean, norm.running_var)]
    return {weight_of[id(buffer)]: norm for norm, buffer in kept if id(buffer) in weight_of}


def _calls_by_block(plan: Plan) -> Mapping[str, list[Call]]:
    found: dict[str, list[Call]] = {}
    for call in plan.trace.calls:
        if call.block is not None:
            found.setdefault(call.block, []).append(call)
    return found
