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
from torch._ops import OpOverload
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
from .tensors import edited_weights

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


@dataclass(frozen=True, slots=True)
class Brought:
    """A weight on the device beside the plan: at a `place` in the arena, or in memory of its own."""

    home: WeightHome
    memory: Tensor
    place: int | None


class OnDemand:
    """Brings weights to the device for one operator, within the budget. No tensor of the model points there.

    A place in the arena lasts until another copy overwrites it. Memory beside the arena is freed behind the operator.
    """

    def __init__(self, plan: Plan, arena: Arena, device: Device[Any], standing: Need) -> None:
        self._plan, self._arena, self._device = plan, arena, device
        self._standing = [(start, stop) for _, start, stop in standing.ranges]
        self._in_arena: dict[str, Brought] = {}
        self._next_place = 0
        self._spare_bytes = max(0, plan.budget_bytes - plan.margin_bytes - plan.peak_bytes)
        self.peak_bytes = 0  # beside the arena, in this forward

    def bring(self, homes: Sequence[WeightHome], where: str, seated: Need | None) -> list[Brought]:
        """Bring all weights that one operator reads, while a call runs that has these seats."""
        found: list[Brought] = []
        beside, nbytes = 0, sum(home.memory.nbytes for home in homes)
        taken = [*self._standing, *((start, stop) for _, start, stop in (seated.ranges if seated is not None else ()))]
        for home in homes:
            one = self._find(home, taken)
            if one is None and beside + home.memory.nbytes <= self._spare_bytes:
                beside += home.memory.nbytes
                one = Brought(home, self._arena.bring_beside_the_plan(home.name, where, None), None)
            elif one is None and (place := self._free_place(aligned(home.memory.nbytes), taken)) is not None:
                one = Brought(home, self._arena.bring_beside_the_plan(home.name, where, place), place)
                self._in_arena[home.name] = one
            if one is None:
                raise self._no_room(home, where, nbytes)
            if one.place is not None:
                taken.append((one.place, one.place + aligned(one.memory.nbytes)))
            self._device.reached(where, one.memory, [(0, one.memory.nbytes)], [])
            found.append(one)
        self.peak_bytes = max(self.peak_bytes, beside)
        return found

    def used(self, brought: Brought, changed: bool) -> None:
        """The operator has read a weight, or changed it."""
        if changed:
            self._arena.carry_home_beside_the_plan(brought.home.name, brought.memory)
        self._arena.used_beside_the_plan(brought.memory, brought.place)

    def forget(self, names: Iterable[str] | None = None) -> None:
        """What was brought of these weights, or of all, is no longer what their homes hold."""
        for name in list(self._in_arena if names is None else names):
            self._in_arena.pop(name, None)

    def _no_room(self, home: WeightHome, where: str, nbytes: int) -> ExecutionError:
        budget = self._plan.budget_bytes
        return ExecutionError(
            f"{where} reads weight {home.name!r} of {readable(home.memory.nbytes)}, which the traced forward did not "
            f"read there. The budget of {readable(budget)} has no room for it: plan with inputs that make the forward "
            f'read it, or with a budget of "{budget + nbytes}B"'
        )

    def _find(self, home: WeightHome, taken: Sequence[Range]) -> Brought | None:
        """What was brought before, if its bytes are still there, and nothing that runs now has its seat over them."""
        if edited_weights(home.tensors):
            self.forget([home.name])
        found = self._in_arena.get(home.name)
        if found is None or found.place is None:
            return None
        start, stop = found.place, found.place + found.memory.nbytes
        is_free = not any(first < stop and start < last for first, last in taken)
        if is_free and self._arena.holds_beside_the_plan(home.name, start, stop - start):
            return found
        del self._in_arena[home.name]
        return None

    def _free_place(self, nbytes: int, taken: Sequence[Range]) -> int | None:
        """So many bytes of the arena that are not taken: the ones after the last ones, so that these last."""
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
    """Gives operators that would read a weight at home the weight on the device instead; or refuses them by name."""

    supports_higher_order_operators = True

    def __init__(self, homes: Homes, needs: Needs, on_demand: OnDemand, inside: Inside) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._homes, self._needs, self._on_demand, self._inside = homes, needs, on_demand, inside
        self._serves, self._is_on = False, False
        self._moves = -1

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Let torch compile what it is asked to compile: otherwise it would refuse, or run it uncompiled."""
        return True

    @contextmanager
    def on(self, serves: bool) -> Iterator[None]:
        """Watch all operators."""
        before = self._serves, self._is_on
        self._list_homes()
        try:
            self._serves, self._is_on = serves or self._serves, True
            with nullcontext() if before[1] else self:
                yield
        finally:
            self._serves, self._is_on = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not isinstance(func, OpOverload) or func.is_view or func in _READS_NO_DATA:
            return func(*args, **kwargs)
        for value in args:  # must be quick: few operators read a home
            if isinstance(value, Tensor):
                if value.is_cpu and self._first <= value.data_ptr() < self._last:
                    break
            elif isinstance(value, list | tuple):
                break
        else:
            if not kwargs:
                return func(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        homes = {home: None for tensor in tensors if (home := self.home_of(tensor)) is not None}
        if not homes:
            return func(*args, **kwargs)
        if not self._serves:
            self._refuse_mixture(func, tensors)
            return func(*args, **kwargs)
        return self._serve(func, args, kwargs, list(homes))

    def _serve(self, func: OpOverload, args: Any, kwargs: Any, homes: list[WeightHome]) -> Any:
        """Run an operator on weights that come to the device for it."""
        running = self._inside.running
        where = running.name if running is not None else "a forward"
        brought = self._on_demand.bring(homes, where, self._inside.seated)
        memory = {one.home: one.memory for one in brought}
        args, kwargs = tree_map_only(Tensor, lambda tensor: self._on_device(tensor, memory), (args, kwargs))
        out = func(*args, **kwargs)
        written = _storages_written(func, args, kwargs)
        for one in brought:
            statistics = self._needs.statistics.get(one.home.name)  # a batch norm changes these, and no schema says so
            changed = one.memory.untyped_storage()._cdata in written or (statistics is not None and statistics.training)
            self._on_demand.used(one, changed)
        return out if written else tree_map_only(Tensor, lambda tensor: _apart_from(tensor, brought), out)

    def _refuse_mixture(self, func: OpOverload, tensors: list[Tensor]) -> None:
        """Refuse what a GPU could not do: one operator on a weight at home and on a tensor that is not at home."""
        homes = [self.home_of(tensor) for tensor in tensors if tensor.dim()]
        home = next((home for home in homes if home is not None), None)
        if home is not None and None in homes:
            raise ExecutionError(
                f"{func} reads weight {home.name!r} at home: the plan does not know of this read; plan with inputs "
                "that make the forward read it"
            )

    def _on_device(self, tensor: Tensor, memory: Mapping[WeightHome, Tensor]) -> Tensor:
        """A tensor as it is; or, of a weight at home, the same view of the weight's bytes on the device."""
        if (home := self.home_of(tensor)) is None:
            return tensor
        place = (tensor.data_ptr() - home.memory.data_ptr()) // tensor.element_size()
        with _disable_current_modes():
            empty = torch.empty(0, dtype=tensor.dtype, device=memory[home].device)
            view = empty.set_(memory[home].untyped_storage(), place, tensor.shape, tensor.stride())
            view = view.conj() if tensor.is_conj() else view
            return torch._neg_view(view) if tensor.is_neg() else view

    def home_of(self, tensor: Tensor) -> WeightHome | None:
        """The weight whose home a tensor shows, if it shows one."""
        if not tensor.is_cpu or tensor.layout is not torch.strided or not tensor.numel():
            return None
        self._list_homes()
        address = tensor.data_ptr()
        place = bisect_right(self._starts, address) - 1
        if place < 0 or address >= self._starts[place] + self._sorted[place].memory.nbytes:
            return None
        return self._sorted[place]

    def _list_homes(self) -> None:
        """List all homes by address, without those of single numbers, if that has changed."""
        if self._homes.moves == self._moves:
            return
        homes = [home for home in self._homes.weights.values() if home.memory.nbytes and not home.is_number]
        self._sorted = sorted(homes, key=lambda home: home.memory.data_ptr())
        self._starts = [home.memory.data_ptr() for home in self._sorted]
        self._first = self._starts[0] if homes else 0
        self._last = self._starts[-1] + self._sorted[-1].memory.nbytes if homes else 0
        self._moves = self._homes.moves


_READS_NO_DATA = {
    torch.ops.aten._has_compatible_shallow_copy_type.default,  # asked when `.data` is set
    torch.ops.aten.detach.default,
    torch.ops.prim.device.default,
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
