"""What each call needs on the device, and at which boundaries of modules the calls begin.

This is computed once, when a plan is attached. This module moves nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Container, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import jit, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..nouns.names import above
from ..nouns.trace import Call
from ..nouns.weights import named_tensors
from ..plan.plan import Plan
from .homes import Homes
from .tensors import WeightTensor

Range = tuple[int, int]  # bytes of the arena, half-open
Side = Literal["enter", "exit"]


@dataclass(eq=False)
class Need:
    """What runs between two boundaries, and what it needs on the device.

    `ranges` are bytes of the arena, each with the bundle that they must hold. `statistics` are running statistics, with
    the modules that change them. `loose` is set if seats of these weights overlap, because the plan never wants all of
    them at once: the same call without any seat.
    """

    name: str
    block: str | None
    weights: frozenset[str] = frozenset()
    ranges: tuple[tuple[str, int, int], ...] = ()
    tensors: tuple[WeightTensor, ...] = ()
    written: frozenset[str] = frozenset()
    reads: list[Range] = field(default_factory=list)
    writes: list[Range] = field(default_factory=list)
    activation_bytes: int = 0
    statistics: tuple[tuple[str, nn.Module], ...] = ()
    loose: Need | None = None

    def changed_unseen(self) -> set[str]:
        """The running statistics that batch norms in training have changed. Torch does not count these as edits."""
        return {name for name, module in self.statistics if module.training}


@dataclass(eq=False)
class Door:
    """The two boundaries of one module: which calls begin there, and how often the forward has passed them.

    boundary            enter a    enter a.0    exit a.0    exit a    enter a
    depth of a             1           1           1          0          1
    a's passed enter       1           1           1          1          2        the second call that begins here
    """

    module: str
    starts: Mapping[Side, dict[int, int]]  # how often the side was passed before -> index of the call that begins
    places: Mapping[Side, list[Need]]  # all calls that begin at a side
    block: Need | None = None  # if the module is a block: all that its calls read
    forward: int = 0  # the number of the forward for which `depth` and `passed` count
    depth: int = 0
    passed: dict[Side, int] = field(default_factory=dict)


class Needs:
    """The needs of every call, of every block as a whole, and of the whole forward (`standing`).

    `staying` is the part of `standing` that the forward changes. The device keeps it between forwards.

    `blocks_of` names the blocks of each module. It has the blocks themselves, and modules inside of them with weights
    that come and go. It leaves out modules that the model also holds outside of every block.

    `on_demand` has the modules that hold weights which the plan does not expect there: no call reads the weight, or the
    weight is tied, and this module lies outside of the blocks that read it.

    `statistics` are running statistics, with the modules that change them.
    """

    def __init__(self, model: nn.Module, plan: Plan, homes: Homes) -> None:
        self._plan, self._homes = plan, homes
        self._position = {name: i for bundle in plan.bundles.values() for i, name in enumerate(bundle.weights)}
        self.changed = changed_weights(plan)
        self.statistics = _running_statistics(model, homes)
        self.standing_weights = standing_weights(plan)
        self.standing = self._need("standing", None, self.standing_weights, ())
        staying = [name for name in self.standing_weights if name in self.changed]
        self.staying = self._need("standing", None, staying, ())
        self.calls = [self._need(call.name, call.block, call.reads, call.writes) for call in plan.trace.calls]
        for need, nbytes in zip(self.calls, plan.activation_bytes, strict=True):
            need.activation_bytes = nbytes
        self.blocks = {name: self._of_block(name, calls) for name, calls in _calls_by_block(plan).items()}
        standing = {shown.weight for shown in self.standing.tensors}
        moving = {id(t.tensor) for t in homes.tensors() if t.weight in plan.seats and t.weight not in standing}
        self.blocks_of: dict[str, tuple[str, ...]] = {block: (block,) for block in self.blocks if block}
        self.blocks_of |= _blocks_of_modules(model, self.blocks, moving)
        self.on_demand = self._holders_of_unexpected(model)
        self.entries = _modules_around_all_blocks(model, self.blocks)
        self.doors = self._doors()

    def _doors(self) -> dict[str, Door]:
        """The boundaries of all modules that the executor watches."""
        boundaries = [call.boundary for call in self._plan.trace.calls]
        modules = dict.fromkeys(["", *(b.module for b in boundaries), *self.blocks, *self.blocks_of, *self.on_demand])
        doors = {name: Door(name, _by_side(dict), _by_side(list), self.blocks.get(name)) for name in modules}
        for index, (boundary, need) in enumerate(zip(boundaries, self.calls, strict=True)):
            doors[boundary.module].starts[boundary.side][boundary.occurrence] = index
            doors[boundary.module].places[boundary.side].append(need)
        return doors

    def _holders_of_unexpected(self, model: nn.Module) -> dict[str, None]:
        """Every module above a weight that no call expects there; the root is "". A parent may read it, too."""
        weight_of = {id(shown.tensor): shown.weight for shown in self._homes.tensors()}
        found: dict[str, None] = {}
        for name, tensor in named_tensors(model):
            home = self._homes.weights.get(weight_of.get(id(tensor), ""))
            if home is None or home.is_number or not home.memory.nbytes or home.name in self.standing_weights:
                continue
            path = list(above(name))
            if not any(module in self.blocks and home.name in self.blocks[module].weights for module in path):
                found |= dict.fromkeys(module for module in (*path, "") if can_stand_in(model.get_submodule(module)))
        return found

    def _of_block(self, name: str, calls: list[Call]) -> Need:
        reads = dict.fromkeys(weight for call in calls for weight in call.reads)
        writes = dict.fromkeys(weight for call in calls for weight in call.writes)
        need = self._need(name, name, reads, writes)
        need.activation_bytes = max(self._plan.activation_bytes)
        return need

    def _need(self, name: str, block: str | None, reads: Iterable[str], writes: Iterable[str]) -> Need:
        wanted = [weight for weight in reads if weight in self._plan.seats]
        seated = self._without_collisions(wanted)
        need = Need(name, block, frozenset(wanted), self._ranges(seated))
        pointed = seated if name == "standing" else [w for w in seated if w not in self.standing_weights]
        need.tensors = tuple(shown for weight in pointed for shown in self._homes.weights[weight].tensors)
        need.written = frozenset(writes) - set(self.standing_weights)
        need.reads = [(start, stop) for _, start, stop in need.ranges]
        need.statistics = tuple((weight, self.statistics[weight]) for weight in pointed if weight in self.statistics)
        need.writes = [self._range(weight) for weight in writes if weight in seated]
        if len(seated) < len(wanted):
            need.loose = Need(name, block)
        return need

    def _without_collisions(self, weights: list[str]) -> list[str]:
        """The weights whose seats do not overlap with the one before."""
        seated: list[str] = []
        end = 0
        for weight in sorted(weights, key=self._plan.seats.__getitem__):
            start, stop = self._range(weight)
            if start >= end or start == stop:
                seated.append(weight)
                end = max(end, stop)
        return seated

    def _range(self, weight: str) -> Range:
        start = self._plan.seats[weight]
        return start, start + self._plan.trace.weights[weight].nbytes

    def _ranges(self, weights: list[str]) -> tuple[tuple[str, int, int], ...]:
        """The weights' bytes in the arena. Neighbours in a bundle become one range, with the gap between them."""
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
    """What is on the device for the whole forward: residents that are read between blocks, or that it changes."""
    wanted = {name for call in plan.trace.calls if call.block is None for name in call.reads} | changed_weights(plan)
    return tuple(name for name in plan.residents if name in wanted)


def standing_bundles(plan: Plan) -> frozenset[str]:
    """The bundles with standing weights."""
    return frozenset(plan.bundle_of[name] for name in standing_weights(plan))


def can_stand_in(module: nn.Module) -> bool:
    """Whether the module has a forward that Python calls."""
    return type(module).forward is not nn.Module.forward and not isinstance(module, jit.ScriptModule)


def _running_statistics(model: nn.Module, homes: Homes) -> dict[str, nn.Module]:
    """The weights that batch norms change in training, with the batch norm. Torch does not count these edits."""
    weight_of = {id(shown.tensor): shown.weight for shown in homes.tensors()}
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    kept = [(norm, buffer) for norm in norms for buffer in (norm.running_mean, norm.running_var)]
    return {weight_of[id(buffer)]: norm for norm, buffer in kept if id(buffer) in weight_of}


def _calls_by_block(plan: Plan) -> Mapping[str, list[Call]]:
    found: dict[str, list[Call]] = {}
    for call in plan.trace.calls:
        if call.block is not None:
            found.setdefault(call.block, []).append(call)
    return found


def _by_side(kind: type) -> dict[Side, Any]:
    return {"enter": kind(), "exit": kind()}


def _blocks_of_modules(model: nn.Module, blocks: Collection[str], moving: Container[int]) -> dict[str, tuple[str, ...]]:
    found: dict[nn.Module, list[str]] = {}
    paths: dict[str, nn.Module] = {}
    elsewhere: set[nn.Module] = set()
    for name in [name for name, tensor in named_tensors(model) if id(tensor) in moving]:
        climbed = list(above(name))
        block = next((path for path in climbed if path in blocks), None)
        for path in climbed[: climbed.index(block) if block else len(climbed)]:
            module = paths[path] = model.get_submodule(path)
            if block is None:
                elsewhere.add(module)
            elif block not in found.setdefault(module, []):
                found[module].append(block)
    return {path: tuple(found[module]) for path, module in paths.items() if module in found and module not in elsewhere}


def _modules_around_all_blocks(model: nn.Module, blocks: Collection[str]) -> tuple[str, ...]:
    """The modules below the root that hold all blocks. If the model is a wrapper, users may call these directly."""
    outer = [set(above(block)) for block in blocks if block]
    around = sorted(set.intersection(*outer)) if outer else []
    return tuple(path for path in around if can_stand_in(model.get_submodule(path)))
