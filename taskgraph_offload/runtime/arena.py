"""The arena: what is in it, and every copy into it and out of it, each behind whoever touched the same bytes before.

Issues what it is told to; never decides what comes when.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ..devices.base import Device
from ..nouns.graph import Task
from ..plan.plan import Plan
from .agenda import Errand
from .courier import Courier, Piece
from .homes import Home, Homes
from .lanes import Lanes
from .needs import Need
from .seating import SeatTable


class Arena:
    """The device memory that holds all seats."""

    def __init__(self, plan: Plan, homes: Homes, device: Device[Any], lanes: Lanes, courier: Courier) -> None:
        self._plan, self._homes, self._device, self._lanes = plan, homes, device, lanes
        self._courier = courier
        self.memory = device.allocate(plan.arena_bytes)
        self._table = SeatTable(plan.arena_bytes, used=lanes.mark("compute"))
        self._read_home: dict[str, int] = {}  # for each bundle: the last copy from its home
        self._wrote_home: dict[str, int] = {}  # and the last one to it
        self.last_home = 0  # the last copy to any home
        self._made_pieces: dict[tuple[str, int, int], list[Piece]] = {}
        self._windows = {
            name: device.window(self.memory, offset, plan.trace.weights[name].nbytes)
            for name, offset in plan.seats.items()
        }
        self._look_at_homes(plan.seats)

    def issue(self, errand: Errand, only_missing: bool) -> None:
        """Issue a copy of the plan; `only_missing`: of what is not there yet."""
        task = errand.task
        start, stop = task.start, self._plan.sizes[task.name] if task.stop is None else task.stop
        if task.kind == "d2h":
            if not self._missing(task.name, start, stop):
                self._copy_home(errand, start, stop)
        elif only_missing:
            for first, last in self._missing(task.name, start, stop):
                self._bring(errand, first, last)
        else:
            self._bring(errand, start, stop)

    def seat(self, need: Need) -> None:
        """Let the compute lane have all that a need reads: load what is missing, wait for what is on its way."""
        arrived = 0
        for bundle, start, stop in need.ranges:
            segments = self._table.over(start, stop)
            if any(segment.holder != bundle for segment in segments):
                self._load_missing(need, bundle, start, stop)
                segments = self._table.over(start, stop)
            for segment in segments:
                if segment.arrived > arrived:
                    arrived = segment.arrived
        self._lanes.wait("compute", "h2d", arrived)

    def lend(self, home: Home, need: Need) -> Tensor:
        """Memory beside the arena with a weight in it, for as long as the caller keeps it."""
        memory = self._device.allocate(home.memory.nbytes)
        self._lanes.wait("h2d", "compute", self._lanes.mark("compute"))
        self._courier.stats.demand_loads += 1
        errand = Errand(Task("h2d", home.name), f"h2d {home.name} beside the arena", need.name)
        self._lanes.wait("compute", "h2d", self._courier.copy(errand, (memory, home.memory)))
        return memory

    def used(self, need: Need, number: int) -> None:
        """A call that has the number in the compute lane has read and changed what it needed."""
        for _, start, stop in need.ranges:
            for segment in self._table.over(start, stop):
                segment.used = number

    def carry_home(self, names: Iterable[str]) -> None:
        """Copy weights that a call has changed to their homes."""
        for name in names:
            bundle = self._plan.bundle_of[name]
            start = self._plan.seats[name] - self._plan.bundles[bundle].offset
            stop = start + self._plan.trace.weights[name].nbytes
            task = Task("d2h", bundle, start, stop)
            self._copy_home(Errand(task, str(task), ""), start, stop)

    def announce_changes(self, need: Need, names: Iterable[str]) -> None:
        """Tell a device that checks what a call has written besides what it said."""
        for name in names:
            start = self._plan.seats[name]
            stop = start + self._plan.trace.weights[name].nbytes
            self._device.reached(f"{need.name} changes {name}", self.memory, [], [(start, stop)])

    def forget(self, names: Iterable[str]) -> None:
        """The seats of these weights no longer hold what their homes do."""
        if self._homes.moves != self._moves:
            self._look_at_homes(names)
        for name in names:
            start = self._plan.seats[name]
            self._table.forget(start, start + self._plan.trace.weights[name].nbytes)

    def forget_all_but(self, kept: Need | None) -> None:
        """Nothing is there any more, and nothing on its way, except for what a need reads."""
        self._table = SeatTable(self._plan.arena_bytes)
        for bundle, start, stop in kept.ranges if kept else ():
            self._table.fill(start, stop, bundle, arrived=0)

    def close(self) -> None:
        """Nobody looks at the memory any more, so that it is free at once."""
        for member in self._homes.members():
            member.seat = member.home
        self._made_pieces.clear()
        self._windows.clear()

    def _look_at_homes(self, names: Iterable[str]) -> None:
        """These weights may have moved, or be shown by other tensors."""
        self._moves = self._homes.moves
        self._made_pieces.clear()
        for name in names:
            for member in self._homes.weights[name].members:
                member.seat = member.view_of(self._windows[name])

    def _missing(self, bundle: str, start: int, stop: int) -> list[tuple[int, int]]:
        """The parts of a bundle's bytes that are not in their seat, nor on their way."""
        offset = self._plan.bundles[bundle].offset
        parts = self._table.missing(offset + start, offset + stop, bundle)
        return [(first - offset, last - offset) for first, last in parts]

    def _load_missing(self, need: Need, bundle: str, start: int, stop: int) -> None:
        """Bring what nobody has brought in time."""
        offset = self._plan.bundles[bundle].offset
        for first, last in self._missing(bundle, start - offset, stop - offset):
            self._courier.stats.demand_loads += 1
            task = Task("h2d", bundle, first, last)
            self._bring(Errand(task, str(task), need.name), first, last)

    def _bring(self, errand: Errand, start: int, stop: int) -> None:
        """Copy bytes of a bundle to their seat, behind all who touched what lies there now."""
        bundle = errand.task.name
        offset = self._plan.bundles[bundle].offset
        before = self._table.fill(offset + start, offset + stop, bundle, self._lanes.latest["h2d"] + 1)
        self._lanes.wait("h2d", "compute", before.used)
        self._lanes.wait("h2d", "d2h", max(before.copied_out, self._wrote_home.get(bundle, 0)))
        self._read_home[bundle] = self._courier.copy(errand, *self._pieces(bundle, start, stop))

    def _copy_home(self, errand: Errand, start: int, stop: int) -> None:
        """Copy bytes of a bundle from their seat to their home, behind who changed the one and who read the other."""
        bundle = errand.task.name
        offset = self._plan.bundles[bundle].offset
        segments = self._table.over(offset + start, offset + stop)
        self._lanes.wait("d2h", "compute", max((segment.used for segment in segments), default=0))
        arrived = max((segment.arrived for segment in segments), default=0)
        self._lanes.wait("d2h", "h2d", max(arrived, self._read_home.get(bundle, 0)))
        pieces = [(home, seat) for seat, home in self._pieces(bundle, start, stop)]
        number = self.last_home = self._wrote_home[bundle] = self._courier.copy(errand, *pieces)
        for segment in segments:
            segment.copied_out = number

    def _pieces(self, bundle: str, start: int, stop: int) -> list[Piece]:
        """Bytes of a bundle in their seat and at home, in one piece unless a weight has moved; made once."""
        key = bundle, start, stop
        if key not in self._made_pieces:
            offset = self._plan.bundles[bundle].offset
            with _disable_current_modes():  # what the model's own operators are watched by is not for these
                seats = self.memory[offset : offset + self._plan.sizes[bundle]]
                self._made_pieces[key] = [
                    (seats[first:last], home) for first, last, home in self._homes.pieces(bundle, start, stop)
                ]
        return self._made_pieces[key]
