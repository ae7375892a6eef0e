"""Follows a plan through the forwards of a model, from the moment the arena is there until it goes.

The plan decides when a copy is issued; the seat table guarantees what is there. Every call is served the same way,
expected or not: what it needs and is missing is loaded on demand, the compute lane waits for it, the model's tensors
point to their seats; and when the call ends, they point home.

    boundary     exit of a                                 enter b
    host         a has ended, its tensors go home,         is what b needs there? wait for it,
                 the copies behind a are issued            tensors to their seats
"""

from __future__ import annotations

from threading import get_ident
from typing import Any

import torch

from ..devices.base import Device
from ..nouns.graph import LANES
from ..plan.plan import Plan
from .agenda import Agenda, Errand
from .arena import Arena
from .boundaries import Side
from .courier import Courier
from .homes import Home, Homes
from .lanes import Lanes
from .lending import Lender
from .log import Entry, Log, remembered
from .members import point_home
from .needs import Need, Needs, standing_bundles
from .pointing import Pointings
from .spills import Spills
from .standing import Standing
from .whereabouts import Visit, Whereabouts


class Conductor:
    """One arena, and the state of the forward that uses it."""

    def __init__(
        self, plan: Plan, agendas: tuple[Agenda, ...], homes: Homes, needs: Needs, device: Device[Any], log: Log
    ) -> None:
        self._plan, self._agendas, self._homes, self._needs, self._device = plan, agendas, homes, needs, device
        self._log, self._stats, self._inside = log, log.stats, needs.inside
        self._standing_bundles = standing_bundles(plan)
        self.lanes = Lanes(device, {lane: remembered(plan, lane) for lane in LANES})
        self._courier = Courier(device, self.lanes, log)
        self._arena = Arena(plan, homes, device, self.lanes, self._courier)
        self._lender = Lender(self._arena, device)
        self._standing = Standing(needs, self._arena, self.lanes, device)
        self._spills = Spills(plan, device, self.lanes, self._courier)
        self.watching = self._spills.watching
        self._where = Whereabouts(plan)
        self._places: dict[tuple[str, Side], list[Need]] = {}  # the calls that ever begin at one side of a module
        for need, call in zip(needs.calls, plan.trace.calls, strict=True):
            self._places.setdefault((call.boundary.module, call.boundary.side), []).append(need)
        self._stray: str | None = None  # the block that runs and was not expected
        self._pointings = Pointings(homes)
        self._start_over()

    def begin(self, changed: set[str], planned: bool) -> None:
        """A forward begins; the homes of some weights are not what they were."""
        self._log.begin(cold=self._forwards == 0)
        self._planned = planned
        self._stray = None
        self._visits: list[Visit] = []
        self._agenda = self._agendas[min(self._forwards, 2)]
        self._next_call = self._next_slot = self._lender.peak_bytes = 0
        self._where.begin(planned)
        self._inside.thread = get_ident()
        self._arena.forget(changed)
        if planned:
            self._issue_through(slot=0, serving=0)
        self._standing.begin()
        self.reach("", "enter")

    def reach(self, module: str, side: Side) -> None:
        """The forward enters or leaves a module."""
        self._where.step(module, side)
        if self._visits and module == (visit := self._visits[-1]).module and self._where.depth(module) < visit.depth:
            self._end_visit()
            return
        if side == "enter" and self._visits_us(module):
            self._begin_visit(module)
            return
        if self._visits:  # what is inside of it is of no interest
            return
        index = self._where.count(module, side)
        if self._stray is not None:  # a block runs that was not expected; what is inside it is of no interest
            if module != self._stray or self.is_inside(module):
                return
            self._stray = None
            self._end_call()
        if index is not None:
            self._follow(index)
        elif (block := self._strays_into(module, side)) is not None:
            self._serve_stray(block)
        elif self._running is not None and self._running.block == module and not self.is_inside(module):
            self._end_call()
            if self._planned:
                self._issue_through(self._next_call, serving=self._next_call)

    def is_inside(self, module: str) -> bool:
        """Whether a module runs: it was entered more often than left."""
        return self._where.depth(module) > 0

    def _visits_us(self, module: str) -> bool:
        """Whether a module runs by itself, or a block inside of another one, where the plan does not say so."""
        if module not in self._needs.blocks:
            return not self._inside.is_served(module)
        running = self._running
        if running is None or running.block in (None, module):
            return False
        index = self._where.start(module, "enter") if not self._visits and self._stray is None else None
        is_part = index is not None and self._needs.calls[index].block == running.block
        return not is_part and not set(self._needs.blocks[module].members) <= set(running.members)

    def finish(self) -> None:
        """The forward ended as it should."""
        self._end_call()
        if self._planned:
            last = len(self._plan.trace.calls)
            self._issue_through(last, serving=last)
        self._flush()
        self._standing.carry_edits_home()
        self._spills.bring_all_back()
        self.lanes.settle("d2h", self._arena.last_home)
        self._standing.end()
        if self._planned:
            self._log.end()
            self._forwards += 1
        self._note_peak()

    def abandon(self) -> None:
        """The forward broke off, perhaps in the middle of anything: wait for all, trust nothing, begin anew."""
        try:
            self._flush()
            self._spills.bring_all_back()
        finally:
            try:
                self.lanes.synchronize()
            finally:
                away = (member for member in self._homes.members() if not self._standing.stays(member))
                point_home(away, self._lender.addresses())
                self._arena.forget_all_but(self._standing.kept)
                self._courier.forget()
                self._start_over()

    def close(self) -> None:
        """Everything goes home; the arena may go."""
        try:
            self._standing.leave()
            self.lanes.synchronize()
        finally:
            point_home(self._homes.members())
            self._spills.close()
            self._arena.close()

    def weight_at(self, address: int) -> tuple[Home, int] | None:
        """The weight whose seat has this address now, if its home holds the same bytes; and where it begins."""
        running = self._running.members if self._running is not None else ()
        for member in (*running, *self._standing.returning):
            start = member.tensor.data_ptr() - member.offset
            home = self._homes.weights[member.weight]
            if start <= address < start + home.memory.nbytes:
                return home, start
        return None

    def _start_over(self) -> None:
        """Whatever comes next is a cold forward."""
        self._forwards = 0
        self._running: Need | None = None
        self._inside.now = None
        self._dirty: set[str] = set()  # weights changed in their seats, and not yet on their way home
        self._lender.forget()

    def _follow(self, index: int) -> None:
        """A call of the plan begins: the next one, or after some that were skipped, or once more."""
        self._end_call()
        if index != self._next_call:
            self._stats.divergences += 1
            self._flush()
        if index >= self._next_call:
            self._issue_through(index, serving=index)
            self._next_call = index + 1
        self._begin_call(self._needs.calls[index])

    def _strays_into(self, module: str, side: Side) -> str | None:
        """The block that runs on in a way that the plan does not know, if it does.

        A place that is passed again while the call that began there still runs is within that call: a loop over
        experts, say.
        """
        if module in self._needs.blocks and self._running is not None and self._running.block not in (None, module):
            return None  # a block inside of another one, which has all that this one reads
        needs = self._places.get((module, side), [])
        if not self._planned and side == "enter" and self._running is None:
            needs = needs or self._places.get((module, "exit"), [])
        if self._running is not None and self._running in needs:
            return None
        return next((need.block for need in needs if need.block is not None), None)

    def _serve_stray(self, block: str) -> None:
        """A block runs that the plan does not know here; until it ends, all that it ever reads is there."""
        self._end_call()
        self._stats.divergences += 1
        self._flush()
        self._stray = block
        self._begin_call(self._needs.blocks[block])

    def _begin_visit(self, module: str) -> None:
        """Until a module ends, all that its block ever reads is there; then what ran before it goes on."""
        self._visits.append(Visit(module, self._where.depth(module), self._running))
        self._end_call()
        self._stats.divergences += 1
        self._flush()
        self._begin_call(self._needs.blocks[self._inside.blocks_of.get(module, (module,))[0]])

    def _end_visit(self) -> None:
        self._end_call()
        if (interrupted := self._visits.pop().interrupted) is not None:
            self._begin_call(interrupted)

    def _issue_through(self, slot: int, serving: int) -> None:
        """Issue the copies of all slots up to one, without those for calls that will not come any more."""
        while self._next_slot <= slot:
            for errand in self._agenda[self._next_slot]:
                if errand.serves >= serving or errand.task.kind == "d2h":
                    self._issue(errand)
            self._next_slot += 1

    def _issue(self, errand: Errand) -> None:
        if errand.task.is_activation:
            self._spills.issue(errand)
            return
        self._arena.issue(errand, only_missing=errand.task.name in self._standing_bundles)
        if errand.task.kind == "d2h":
            self._dirty.difference_update(self._plan.bundles[errand.task.name].weights)

    def _begin_call(self, need: Need) -> None:
        self._courier.open_gates(need.name)
        self._spills.call_begins(need.name)
        pointing = self._pointings.of(need)
        if edited := pointing.edited() - self._dirty:
            self._arena.forget(edited)
        self._arena.seat(need)
        self._device.reached(need.name, self._arena.memory, need.reads, need.writes)
        pointing.go()
        self._lender.lend(need)
        self._waited = self.lanes.waited_for("compute")
        self.lanes.start("compute")
        self._running, self._inside.now = need, need.block

    def _end_call(self) -> None:
        need = self._running
        if need is None:
            return
        self._spills.call_ends(need.name)
        surprises = self._unplanned_changes(need)
        number = self.lanes.stop("compute")
        self._running = self._inside.now = None
        self._courier.call_ended(need.name, number)
        self._arena.used(need, number)
        self._dirty |= need.written
        self._arena.carry_home(surprises)
        self._pointings.of(need).come_back()
        self._lender.take_back(need)
        if torch.is_autocast_enabled(self._arena.memory.device.type):
            torch.clear_autocast_cache()  # it would keep a cast of every weight that passes
        used = self._arena.memory.nbytes + self._lender.peak_bytes + need.activation_bytes
        self._log.add(Entry("compute", number, f"compute {need.name}", need.name, need.name, 0, self._waited, used))

    def _unplanned_changes(self, need: Need) -> list[str]:
        """The weights that the call has changed though the plan does not say so; nobody else will carry them home."""
        surprises = sorted((self._pointings.of(need).edited() | need.changed_unseen()) - need.written)
        self._arena.announce_changes(need, surprises)
        return surprises

    def _note_peak(self) -> None:
        """What the device says, or, where it cannot tell, the arena with the activations that were traced."""
        used = self._device.peak_bytes()
        traced = self._arena.memory.nbytes + self._lender.peak_bytes + max(self._plan.activation_bytes)
        self._stats.peak_bytes = max(self._stats.peak_bytes, traced if used is None else used)

    def _flush(self) -> None:
        """The plan's own copies home are not to be relied on: make them now."""
        if self._dirty:
            self._arena.carry_home(sorted(self._dirty))
            self._dirty.clear()
