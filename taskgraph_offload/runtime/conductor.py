"""Follows a plan through the forwards of a model. There is one conductor for each arena.

The plan decides when a copy is issued. The arena makes sure that each call finds what it reads.

    boundary     the forward leaves a                 the forward enters b
    host         1. point a's tensors home            3. load what b reads and is missing
                 2. issue the copies that wait        4. let the compute lane wait for b's copies
                    for a                             5. point b's tensors to their seats

This is the planned path. `unplanned` handles what the plan does not expect.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack
from threading import get_ident
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from ..devices.base import Device
from ..nouns.graph import LANES
from ..plan.plan import Plan
from .arena import Arena, Throughout
from .copies import Copier, Lanes, Slots
from .homes import Homes, WeightHome
from .hooks import Given, Inside
from .measured import Log, Ran, remembered
from .needs import Door, Need, Needs, Side, standing_bundles
from .spills import Spills
from .tensors import Pointing, point_home
from .unplanned import Detours, HomeReads, OnDemand


class Conductor:
    """One arena, and the state of the forward that uses it."""

    planned: bool

    def __init__(
        self,
        plan: Plan,
        slots: tuple[Slots, Slots, Slots],
        homes: Homes,
        needs: Needs,
        inside: Inside,
        device: Device[Any],
        log: Log,
    ) -> None:
        self._plan, self._slots_of, self._homes, self._needs, self._device = plan, slots, homes, needs, device
        self._log, self._stats, self.inside, self._doors = log, log.stats, inside, needs.doors
        self._standing_bundles = standing_bundles(plan)
        self.lanes = Lanes(device, {lane: remembered(plan, lane) for lane in LANES})
        self._copier = Copier(device, self.lanes, log)
        self._arena = Arena(plan, homes, device, self.lanes, self._copier)
        self._throughout = Throughout(needs.standing, needs.staying, self._arena, self.lanes, device)
        spills = any(task.is_activation for task in (*plan.cold, *plan.steady))
        self._spills = Spills(plan, device, self.lanes, self._copier) if spills else None
        self._detours = Detours(needs)
        self._on_demand = OnDemand(plan, self._arena, device, needs.standing)
        self._home_reads = HomeReads(homes, needs, self._on_demand, inside)
        self._pointings: dict[Need, Pointing] = {}
        self._peak_of_activations = max(plan.activation_bytes)
        self._moves, self._forward = homes.moves, max((door.forward for door in needs.doors.values()), default=0)
        self._start_over()

    # The planned path: preload, begin, reach (begin_call, end_call, issue), finish.

    def preload(self) -> None:
        """Issue copies of the cold forward before it begins: those that it begins with, then all of what stays.

        What stays comes in the order of first use. From then on it is as between two forwards.
        """
        first, *later = self._slots_of[0]
        residents = {name for name, bundle in self._plan.bundles.items() if bundle.resident}
        staying = [copy for slot in later for copy in slot if copy.task.name in residents]
        changing = {self._plan.bundle_of[weight] for weight in self._needs.changed}  # edits of these are not looked for
        for copy in (*first, *staying):
            if copy.lane == "h2d" and copy.task.name in self._plan.bundles and copy.task.name not in changing:
                self._arena.issue(copy, only_missing=True)
        self._is_preloaded = True

    def begin(self, changed: set[str], planned: bool) -> None:
        """A forward begins. `changed`: the weights whose homes changed since the last one."""
        self._log.begin(cold=self._forwards == 0)
        self.planned = planned
        self._slots = self._slots_of[min(self._forwards, 2)]
        self._next_call = self._next_slot = self._on_demand.peak_bytes = 0
        self._detours.begin()
        self._forward += 1
        self.inside.thread = get_ident()
        if self._homes.moves != self._moves:
            self._pointings.clear()
            self._moves = self._homes.moves
        if changed:
            self._arena.forget(changed)
            self._on_demand.forget(changed)
        if planned:
            self._issue_through(slot=0, serving=0)
        self._throughout.begin()
        if self._doors[""].places["enter"]:
            self.reach("", "enter")

    def reach(self, module: str, side: Side) -> None:
        """The forward enters or leaves a module."""
        door, running = self._doors[module], self.inside.running
        if door.forward != self._forward:
            door.forward, door.depth, door.passed = self._forward, 0, {"enter": 0, "exit": 0}
        door.depth += 1 if side == "enter" else -1
        if self._detours.are_on:
            self._detours.reach(self, door, side)
            return
        index = door.starts[side].get(door.passed[side]) if self.planned else None
        need = self._needs.calls[index] if index is not None and index == self._next_call else None
        here = module if running is None or running.block is None else running.block
        if index is not None and need is not None and need.block in (None, here):
            door.passed[side] += 1
            if running is not None:
                self.end_call()
            if self._next_slot <= index:
                self._issue_through(index, serving=index)
            self._next_call = index + 1
            self.begin_call(need)
        elif running is not None and running.block == module and door.depth <= 0 and index is None:
            door.passed[side] += 1
            self.end_call()
            if self.planned and self._next_slot <= self._next_call:
                self._issue_through(self._next_call, serving=self._next_call)
        else:
            self._detours.reach(self, door, side)

    def begin_call(self, need: Need) -> None:
        """A call begins: make sure that what it reads is on the device, and point its tensors there."""
        if need.name in self._copier.gates:
            self._copier.open_gate(need.name)
        if self._spills is not None:
            self._spills.call_begins(need.name)
        seated = need
        if need.loose is not None:  # seats of its weights overlap: each operator gets its weights on demand
            seated = need.loose
            self._served.enter_context(self._home_reads.on(serves=True))
        pointing = self._pointings.get(seated) or self._pointing_of(seated)
        if edited := pointing.to_seats() - self._dirty:
            self._arena.forget(edited)
        self._arena.seat(seated)
        self._waited, self._begun = self.lanes.start("compute"), self.lanes.latest["compute"] + 1
        self._device.reached(need.name, self._arena.memory, seated.reads, seated.writes)
        self.inside.running, self.inside.seated, self.inside.block = need, seated, need.block

    def end_call(self) -> None:
        """A call has ended: point its tensors home. Later copies may overwrite what it read."""
        need, seated = self.inside.running, self.inside.seated
        if need is None or seated is None:
            return
        if self._spills is not None:
            self._spills.call_ends(need.name)
        surprises = self._pointings[seated].to_homes()
        if seated.statistics:
            surprises |= seated.changed_unseen()
        if surprises := surprises - seated.written:  # the plan has no copies home for these
            self._arena.announce_changes(need, sorted(surprises))
        number = self.lanes.stop("compute")
        self.inside.running = self.inside.seated = self.inside.block = None
        self._copier.ended[need.name] = number
        self._arena.used(seated, number)
        self._dirty |= seated.written
        if surprises:
            self._arena.carry_home(sorted(surprises))
        if need.loose is not None:
            self._served.close()
        if torch.is_autocast_enabled(self._device_type):
            torch.clear_autocast_cache()  # otherwise it keeps a cast copy of every streamed weight
        used = self._arena.memory.nbytes + self._on_demand.peak_bytes + need.activation_bytes
        name, waited, begun = need.name, self._waited, self._begun
        self._log.add(Ran("compute", number, f"compute {name}", name, name, 0, waited, used, begun))

    def _issue_through(self, slot: int, serving: int) -> None:
        """Issue the copies of all slots up to `slot`, except those that serve calls before `serving`."""
        while self._next_slot <= slot:
            for copy in self._slots[self._next_slot]:
                if copy.serves < serving and copy.lane != "d2h":
                    continue
                if self._spills is not None and copy.is_activation:
                    self._spills.issue(copy)
                    continue
                self._arena.issue(copy, only_missing=self._is_preloaded or copy.task.name in self._standing_bundles)
                if copy.lane == "d2h":
                    self._dirty.difference_update(self._plan.bundles[copy.task.name].weights)
            self._next_slot += 1

    def finish(self) -> None:
        """The forward ended without an error."""
        if self.inside.running is not None:
            self.end_call()
        if self.planned:
            last = len(self._plan.trace.calls)
            self._issue_through(last, serving=last)
        if self._dirty:
            self._flush()
        if self._spills is not None:
            self._spills.bring_all_back()
        self._throughout.end()
        if self.planned:
            self._log.end()
            self._forwards += 1
            self._is_preloaded = False
        used = self._device.peak_bytes()  # None if the device cannot tell: then what is known of it
        traced = self._arena.memory.nbytes + self._on_demand.peak_bytes + self._peak_of_activations
        traced += self._device.library_bytes
        self._stats.peak_bytes = max(self._stats.peak_bytes, traced if used is None else used)

    # What `Detours` calls.

    def upcoming(self, door: Door, side: Side) -> int | None:
        """The call that begins if the forward passes this boundary now."""
        return door.starts[side].get(door.passed[side]) if self.planned else None

    def pass_(self, door: Door, side: Side) -> int | None:
        """Count that the forward passed a boundary. Returns the call that begins there."""
        index = self.upcoming(door, side)
        door.passed[side] += 1
        return index

    def follow(self, index: int) -> None:
        """Begin a call of the plan: the next one, a later one (calls were skipped), or an earlier one once more."""
        self.end_call()
        if index != self._next_call:
            self._stats.divergences += 1
            self._flush()
        if index >= self._next_call:
            self._issue_through(index, serving=index)
            self._next_call = index + 1
        self.begin_call(self._needs.calls[index])

    def leave_the_plan_for(self, block: Need) -> None:
        """A block runs where the plan does not expect it."""
        self.end_call()
        self._stats.divergences += 1
        self._flush()
        self.begin_call(block)

    def is_inside(self, module: str) -> bool:
        """Whether a module runs: the forward has entered it more often than left it."""
        door = self._doors[module]
        return door.forward == self._forward and door.depth > 0

    def apart_from_homes(self, output: Any) -> Any:
        """The output of a module, with copies on the device instead of views of weights at home."""
        if torch.is_autocast_enabled(self._device_type):
            torch.clear_autocast_cache()  # it would keep a cast of every weight that comes
        home_of = self._home_reads.home_of
        return tree_map_only(Tensor, lambda tensor: tensor.clone() if home_of(tensor) is not None else tensor, output)

    def on_the_device(self, given: Given) -> Given:
        """The inputs of a forward, with copies of tensors that are on another device. Weights stay where they are.

        So do single numbers on the host, which any operator takes, and containers in which nothing moves.
        """
        device = self._device.device
        for leaf in tree_leaves(given):
            if isinstance(leaf, Tensor) and leaf.device != device:
                return cast(Given, self._moved(given))
        return given

    def _moved(self, given: Any) -> Any:
        device, home_of = self._device.device, self._home_reads.home_of

        def is_elsewhere(leaf: Any) -> bool:
            if not isinstance(leaf, Tensor) or leaf.device == device or leaf.is_meta:
                return False
            return not (leaf.is_cpu and leaf.dim() == 0) and home_of(leaf) is None

        if not any(map(is_elsewhere, tree_leaves(given))):
            return given
        if type(given) in (list, tuple):
            return type(given)(map(self._moved, given))
        if type(given) is dict:
            return {key: self._moved(item) for key, item in given.items()}
        return tree_map_only(Tensor, lambda tensor: tensor.to(device) if is_elsewhere(tensor) else tensor, given)

    def watching(self) -> AbstractContextManager[Any]:
        """A context that watches every operator of a forward, if spills or reads of homes ask for that."""
        stack = ExitStack()
        if self._spills is not None:
            stack.enter_context(self._spills.watching())
        if self._needs.on_demand or self._device.refuses_home_reads:
            stack.enter_context(self._home_reads.on(serves=bool(self._needs.on_demand)))
        stack.callback(self._served.close)  # dispatch modes must end in the reverse order of their start
        return stack

    # After an error, and at the end.

    def abandon(self) -> None:
        """The forward raised, at any point. Wait for all lanes, and forget what the arena holds."""
        try:
            self._flush()
            if self._spills is not None:
                self._spills.bring_all_back()
        finally:
            try:
                self.lanes.synchronize()
            finally:
                point_home(self._throughout.away(self._homes.tensors()))
                self._served.close()
                self._arena.forget_all_but(self._throughout.kept)
                self._copier.gates.clear()
                self._start_over()

    def close(self) -> None:
        """Copy everything home that only the device knows, point all tensors home, and free the arena."""
        try:
            try:
                self._throughout.leave()
            finally:
                self.lanes.synchronize()  # also if a copy could not be issued: the others use this memory and the homes
        finally:
            point_home(self._homes.tensors())
            if self._spills is not None:
                self._spills.close()
            self._arena.close()

    def weight_at(self, address: int) -> tuple[WeightHome, int] | None:
        """The weight that is at this address on the device now, if its home has the same bytes; and where it begins."""
        running = self.inside.seated.tensors if self.inside.seated is not None else ()
        for shown in (*running, *self._throughout.returning):
            start = shown.tensor.data_ptr() - shown.offset
            home = self._homes.weights[shown.weight]
            if start <= address < start + home.memory.nbytes:
                return home, start
        return None

    def _start_over(self) -> None:
        """Let the next forward be a cold one."""
        self._forwards = 0
        self._is_preloaded = False  # True: copies of the cold forward were issued ahead of it
        self.inside.running = self.inside.seated = self.inside.block = None
        self._dirty: set[str] = set()  # weights that changed in their seats, and that no copy carries home yet
        self._served = ExitStack()
        self._device_type = self._arena.memory.device.type
        self._on_demand.forget()

    def _pointing_of(self, need: Need) -> Pointing:
        made = self._pointings[need] = Pointing(need.name, need.tensors)
        return made

    def _flush(self) -> None:
        """Copy changed weights home now, since the plan's own copies home may not be issued any more."""
        if self._dirty:
            self._arena.carry_home(sorted(self._dirty))
            self._dirty.clear()
