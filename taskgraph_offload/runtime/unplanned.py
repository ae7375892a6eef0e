"""Serves what the plan does not expect: other blocks, another order, weights that no call of the plan reads.

`Detours` follows a forward that leaves the plan, until it is back. `OnDemand` brings weights that have no seat: to
memory that the budget has to spare, or to a place in the arena that is not in use. `HomeReads` watches operators, and
gives them weights from the device that they would read at home.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

from ..devices.base import Device
from ..errors import ExecutionError
from ..nouns.budget import readable
from ..plan.plan import Plan, aligned
from .arena import Arena
from .homes import Homes, WeightHome
from .hooks import Inside
from .needs import Door, Need, Needs, Range, Side
from .tensors import WeightTensor, edited_weights

if TYPE_CHECKING:
    from .conductor import Conductor


@dataclass(frozen=True, slots=True)
class Visit:
    """A detour that interrupts a call: a module runs without its block, or a block runs inside of another block.

    The call that it interrupts goes on afterwards. A visit ends when the forward leaves the module at `depth`.
    """

    module: str
    depth: int
    interrupted: Need | None


class Detours:
    """Follows a forward off the plan. There are two kinds of detours:

    - a stray: one block that the plan does not expect here, `_stray` by name. It replaces the call that ran;
    - visits: see `Visit`. They can be nested; the innermost is the last one of `_visits`.

    While there is a detour (`are_on`), the conductor passes every boundary to this class.
    """

    def __init__(self, needs: Needs) -> None:
        self._needs = needs
        self.begin()

    def begin(self) -> None:
        """A forward begins, on the plan."""
        self._visits: list[Visit] = []
        self._stray: str | None = None
        self.are_on = False

    def reach(self, conductor: Conductor, door: Door, side: Side) -> None:
        """The forward enters or leaves a module, and the plan does not expect that here."""
        self._step(conductor, door, side)
        self.are_on = bool(self._visits) or self._stray is not None

    def _step(self, conductor: Conductor, door: Door, side: Side) -> None:
        if self._visits and door.module == (visit := self._visits[-1]).module and door.depth < visit.depth:
            self._end_visit(conductor)
            return
        if side == "enter" and self._is_visit(conductor, door):
            self._begin_visit(conductor, door)
            return
        if self._visits:  # boundaries inside of a visit do not matter
            return
        index = conductor.pass_(door, side)
        if self._stray is not None:
            if door.module != self._stray or door.depth > 0:
                return
            self._stray = None
            conductor.end_call()
        if index is not None:
            conductor.follow(index)
        elif (block := self._block_out_of_turn(conductor, door, side)) is not None:
            self._begin_stray(conductor, block)

    def _is_visit(self, conductor: Conductor, door: Door) -> bool:
        """Whether a visit begins: see `Visit`."""
        running = conductor.inside.running
        if door.block is None:
            blocks = self._needs.blocks_of.get(door.module)
            return blocks is not None and conductor.inside.block not in blocks
        if running is None or running.block in (None, door.module):
            return False
        index = None if self.are_on else conductor.upcoming(door, "enter")
        is_part = index is not None and self._needs.calls[index].block == running.block
        return not is_part and not door.block.weights <= running.weights

    def _begin_visit(self, conductor: Conductor, door: Door) -> None:
        """Bring all that the module's block ever reads, until the module ends."""
        self._visits.append(Visit(door.module, door.depth, conductor.inside.running))
        block = self._needs.blocks_of.get(door.module, (door.module,))[0]
        conductor.leave_the_plan_for(self._needs.blocks[block])

    def _end_visit(self, conductor: Conductor) -> None:
        conductor.end_call()
        if (interrupted := self._visits.pop().interrupted) is not None:
            conductor.begin_call(interrupted)

    def _block_out_of_turn(self, conductor: Conductor, door: Door, side: Side) -> Need | None:
        """The block that begins here against the plan, or None.

        None, too, if the forward passes the same boundary again while the call that began there runs: it still runs
        the same call, for example a loop over experts.
        """
        running = conductor.inside.running
        if door.block is not None and running is not None and running.block not in (None, door.module):
            return None  # this block is inside of the one that runs, and the device has what both read
        needs = door.places[side]
        if not conductor.planned and side == "enter" and running is None:
            needs = needs or door.places["exit"]
        if running is not None and running in needs:
            return None
        return next((self._needs.blocks[need.block] for need in needs if need.block is not None), None)

    def _begin_stray(self, conductor: Conductor, block: Need) -> None:
        """Bring all that a block ever reads, until it ends."""
        self._stray = block.name
        conductor.leave_the_plan_for(block)


@dataclass(slots=True)
class Brought:
    """A weight that was brought on demand: to `place` in the arena, or to memory of its own."""

    home: WeightHome
    memory: Tensor
    place: int | None
    held: int = 0  # how many running calls need it


class OnDemand:
    """Brings weights that have no seat, within the budget. Tensors point to them while a call holds them."""

    def __init__(self, plan: Plan, homes: Homes, arena: Arena, device: Device[Any], standing: Need) -> None:
        self._plan, self._homes, self._arena, self._device = plan, homes, arena, device
        self._standing = [(start, stop) for _, start, stop in standing.ranges]
        self._brought: dict[str, Brought] = {}
        self._pointed: list[tuple[WeightTensor, int]] = []
        self._next_place = 0
        self.spare_bytes = max(0, plan.budget_bytes - plan.margin_bytes - plan.peak_bytes)
        self.beside_bytes = self.peak_bytes = 0  # memory outside the arena: now, and the most in this forward

    @contextmanager
    def held(self, weights: Iterable[WeightHome], call: str, seated: Need | None) -> Iterator[bool]:
        """Bring weights and point their tensors there while a call runs. Yields whether there is room for all."""
        found = [self._hold(home, call, seated) for home in weights]
        try:
            yield None not in found
        finally:
            for one in found:
                if one is not None:
                    self._release(one)

    def memory_of(
        self, home: WeightHome, call: str, seated: Need | None, also: Sequence[Range], nbytes: int
    ) -> Brought:
        """Bring a weight for one operator, or raise. The operator reads `nbytes` of weights, some of them at `also`."""
        taken = self._taken(seated, also)
        found = self._find(home, taken) or self._bring(home, call, taken)
        if found is None:
            needed = self._plan.budget_bytes + nbytes
            raise ExecutionError(
                f"{call} reads weight {home.name!r} of {readable(home.memory.nbytes)}, which the traced forward "
                f"did not read there. The budget of {readable(self._plan.budget_bytes)} has no room for it. Plan with "
                f'inputs that make the forward read it, or with a budget of "{needed}B"'
            )
        self._device.reached(call, found.memory, [(0, found.memory.nbytes)], [])
        return found

    def used(self, brought: Brought, changed: bool) -> None:
        """An operator has read a weight. `changed`: it has written it, too."""
        if changed:
            self._arena.carry_home_beside_the_plan(brought.home.name, brought.memory)
        self._arena.used_beside_the_plan(brought.memory, brought.place)
        self._drop_if_free(brought)

    def forget(self, names: Iterable[str] | None = None) -> None:
        """Forget what was brought of these weights, or of all: their homes hold other bytes now."""
        for name in list(self._brought if names is None else names):
            found = self._brought.pop(name, None)
            if found is not None and found.place is None:
                self.beside_bytes -= found.memory.nbytes

    def weight_at(self, address: int) -> tuple[WeightHome, int] | None:
        """The weight on demand that a running call holds at this address, and the address where it begins."""
        for brought in self._brought.values():
            start = brought.memory.data_ptr()
            if brought.held and start <= address < start + brought.memory.nbytes:
                return brought.home, start
        return None

    def point_home(self) -> None:
        """Point all tensors home that still show memory on demand, after a forward that raised."""
        for shown, address in self._pointed:
            if shown.tensor.data_ptr() == address:
                shown.tensor.data = shown.home
        self._pointed.clear()

    def _hold(self, home: WeightHome, call: str, seated: Need | None) -> Brought | None:
        taken = self._taken(seated, ())
        brought = self._find(home, taken) or self._bring(home, call, taken)
        if brought is None:
            return None
        brought.held += 1
        self._device.reached(f"{call}, on demand", brought.memory, [(0, brought.memory.nbytes)], [])
        for shown in home.tensors:
            if shown.is_home:
                shown.note_version()
                shown.tensor.data = shown.view_of(brought.memory)
                self._pointed.append((shown, shown.tensor.data_ptr()))
        return brought

    def _release(self, brought: Brought) -> None:
        brought.held -= 1
        changed = any(shown.counted and shown.tensor._version != shown.version for shown in brought.home.tensors)
        for shown, address in [pair for pair in self._pointed if pair[0].weight == brought.home.name]:
            self._pointed.remove((shown, address))
            shown.note_version()
            if shown.tensor.data_ptr() == address:
                shown.tensor.data = shown.home
        if changed:
            self._device.reached("a change", brought.memory, [], [(0, brought.memory.nbytes)])
        self.used(brought, changed)

    def _find(self, home: WeightHome, taken: Sequence[Range]) -> Brought | None:
        """A weight that was brought before, if its bytes are still there and are not in the way of what runs now."""
        if edited_weights(home.tensors):
            self.forget([home.name])
        found = self._brought.get(home.name)
        if found is None or found.place is None:
            return found
        start, stop = found.place, found.place + found.memory.nbytes
        is_free = found.held or not any(first < stop and start < last for first, last in taken)
        if is_free and self._arena.holds_beside_the_plan(home.name, start, stop - start):
            return found
        del self._brought[home.name]
        return None

    def _taken(self, seated: Need | None, also: Sequence[Range]) -> list[Range]:
        """The bytes of the arena that are in use now."""
        taken = [*self._standing, *also]
        taken += [(start, stop) for _, start, stop in seated.ranges] if seated is not None else []
        for one in self._brought.values():
            if one.held and one.place is not None:
                taken.append((one.place, one.place + aligned(one.memory.nbytes)))
        return taken

    def _bring(self, home: WeightHome, call: str, taken: Sequence[Range]) -> Brought | None:
        nbytes, place = home.memory.nbytes, None
        if self.beside_bytes + nbytes > self.spare_bytes:
            place = self._free_place(aligned(nbytes), taken)
            if place is None:
                return None
        else:
            self.beside_bytes += nbytes
            self.peak_bytes = max(self.peak_bytes, self.beside_bytes)
        memory = self._arena.bring_beside_the_plan(home.name, call, place)
        self._brought[home.name] = Brought(home, memory, place)
        return self._brought[home.name]

    def _drop_if_free(self, brought: Brought) -> None:
        """Free memory outside the arena when no call needs it. Bytes in the arena stay until a copy overwrites them."""
        if brought.place is None and not brought.held and self._brought.pop(brought.home.name, None) is not None:
            self.beside_bytes -= brought.memory.nbytes

    def _free_place(self, nbytes: int, taken: Sequence[Range]) -> int | None:
        """Find free bytes of the arena. Start after the last place found, so that older weights stay longer."""
        gaps, end = [], 0
        for start, stop in [*sorted(taken), (self._plan.arena_bytes, self._plan.arena_bytes)]:
            if start - aligned(end) >= nbytes:
                gaps.append((aligned(end), start))
            end = max(end, stop)
        places = [max(start, self._next_place) for start, stop in gaps if max(start, self._next_place) + nbytes <= stop]
        place = min(places, default=gaps[0][0] if gaps else None)
        if place is not None:
            self._next_place = place + nbytes
        return place


class HomeReads(TorchDispatchMode):
    """Watches operators. One that would read a weight at home gets it from the device, or is refused by name."""

    def __init__(self, homes: Homes, on_demand: OnDemand, inside: Inside) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._on_demand, self._inside, self._homes = on_demand, inside, homes
        self._serves, self._is_on = False, False
        self._where = "the forward"
        self._moves = -1

    @contextmanager
    def on(self, serves: bool, where: str) -> Iterator[None]:
        """Watch all operators; `where` names the module that runs."""
        before = self._serves, self._where, self._is_on
        self._serves, self._where, self._is_on = serves or self._serves, where, True
        try:
            with nullcontext() if before[2] else self:
                yield
        finally:
            self._serves, self._where, self._is_on = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.is_view or func.namespace == "prim" or func in _READS_NO_DATA:
            return func(*args, **kwargs)
        if not self._serves:
            self._refuse_mixture(func, (args, kwargs))
            return func(*args, **kwargs)
        found: dict[str, Brought] = {}
        homes = {self._home_of(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)} - {None}
        nbytes = sum(home.memory.nbytes for home in homes if home is not None)
        args, kwargs = tree_map_only(Tensor, lambda tensor: self._on_device(tensor, found, nbytes), (args, kwargs))
        out = func(*args, **kwargs)
        if found:
            written = _storages_written(func, args, kwargs)
            for brought in found.values():
                self._on_demand.used(brought, brought.memory.untyped_storage()._cdata in written)
            if not written:
                out = tree_map_only(Tensor, lambda tensor: _apart_from(tensor, found.values()), out)
        return out

    def _refuse_mixture(self, func: Any, arguments: Any) -> None:
        """Refuse an operator that reads a weight at home and another tensor that is on the device: a GPU would fail."""
        tensors = [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor) and leaf.dim()]
        homes = [self._home_of(tensor) for tensor in tensors]
        home = next((home for home in homes if home is not None), None)
        if home is not None and None in homes:
            raise ExecutionError(
                f"{func} reads weight {home.name!r} at home, in {self._where}. The plan does not expect this read: "
                "plan with inputs that make the forward read the weight"
            )

    def _on_device(self, tensor: Tensor, found: dict[str, Brought], nbytes: int) -> Tensor:
        """The tensor itself; but if it shows a weight at home, the same view of the weight's bytes on the device."""
        if (home := self._home_of(tensor)) is None:
            return tensor
        if home.name not in found:
            also = [(b.place, b.place + b.memory.nbytes) for b in found.values() if b.place is not None]
            found[home.name] = self._on_demand.memory_of(home, self._where, self._inside.seated, also, nbytes)
        memory, offset = found[home.name].memory, tensor.data_ptr() - home.memory.data_ptr()
        with _disable_current_modes():
            empty = torch.empty(0, dtype=tensor.dtype, device=memory.device)
            view = empty.set_(memory.untyped_storage(), offset // tensor.element_size(), tensor.shape, tensor.stride())
        return view

    def _home_of(self, tensor: Tensor) -> WeightHome | None:
        if tensor.device.type != "cpu" or tensor.layout is not torch.strided or not tensor.numel():
            return None
        if self._homes.moves != self._moves:
            self._list_homes()
        address = tensor.data_ptr()
        place = bisect_right(self._starts, address) - 1
        if place < 0 or address >= self._starts[place] + self._sorted[place].memory.nbytes:
            return None
        return self._sorted[place]

    def _list_homes(self) -> None:
        """Sort all homes by address. Single numbers are left out: operators take these from the host."""
        homes = [home for home in self._homes.weights.values() if home.memory.nbytes and not home.is_number]
        self._sorted = sorted(homes, key=lambda home: home.memory.data_ptr())
        self._starts = [home.memory.data_ptr() for home in self._sorted]
        self._moves = self._homes.moves


_READS_NO_DATA = {
    torch.ops.aten._has_compatible_shallow_copy_type.default,  # asked when `.data` is set
    torch.ops.aten.detach.default,
}


def _storages_written(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> set[int]:
    """The storages that an operator writes to, according to its schema."""
    values = [*zip(func._schema.arguments, args, strict=False)]
    values += [(argument, kwargs[argument.name]) for argument in func._schema.arguments if argument.name in kwargs]
    written = [value for argument, value in values if argument.alias_info is not None and argument.alias_info.is_write]
    return {leaf.untyped_storage()._cdata for leaf in tree_leaves(written) if isinstance(leaf, Tensor)}


def _apart_from(tensor: Tensor, brought: Iterable[Brought]) -> Tensor:
    """The result of an operator, copied if it shows memory that later copies will overwrite."""
    shows = any(tensor.untyped_storage()._cdata == one.memory.untyped_storage()._cdata for one in brought)
    return tensor.clone() if shows else tensor
