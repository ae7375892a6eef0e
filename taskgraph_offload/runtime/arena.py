"""The device memory that holds all seats: what is in it, and every copy of weights into it and out of it.

The plan decides when a copy is issued. This module makes each copy wait for the tasks that used the same bytes before,
so that it overwrites nothing that is in use. It also loads what a call reads and the plan did not bring.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ..devices.base import Device
from ..nouns.graph import Task
from ..plan.plan import Plan, inner_offsets
from .copies import Bytes, Copier, Copy, Lanes
from .homes import Homes
from .needs import Need, Range
from .tensors import WeightTensor, edited_weights, point_home


@dataclass(slots=True)
class Segment:
    """Bytes with one history: the bundle that they hold, and the last task of each lane that touched them.

    `arrived` counts in the lane h2d, `used` in compute, `copied_out` in d2h.
    """

    holder: str | None = None
    arrived: int = 0
    used: int = 0
    copied_out: int = 0


class SeatTable:
    """Which bundle is in which bytes of the arena, and which task of each lane touched them last.

        arena      |------ blocks.3 ------|--- blocks.4 ---|---- (nobody) ----|------ always ------|
        holder       blocks.3               blocks.4         None               always
        arrived      h2d 17                 h2d 18           -                  h2d 1
        used         compute 9              compute 8        compute 8          compute 9

    Segment i is [cuts[i], cuts[i + 1]). A bundle has one seat, so its name says which of its bytes are in a segment.
    """

    def __init__(self, nbytes: int, used: int = 0) -> None:
        self._cuts = [0, nbytes]
        self._segments = [Segment(used=used)]

    def fill(self, start: int, stop: int, holder: str | None, arrived: int) -> Segment:
        """A copy overwrites the bytes. Returns the last task of each lane that touched them before."""
        if start >= stop:
            return Segment()
        first, last = self._cut(start), self._cut(stop)
        before = self._segments[first:last]
        self._cuts[first + 1 : last] = []
        self._segments[first:last] = [Segment(holder, arrived)]
        return before[0] if len(before) == 1 else _latest(before)

    def over(self, start: int, stop: int) -> list[Segment]:
        """The segments that touch a range."""
        if start >= stop:
            return []
        return self._segments[bisect_right(self._cuts, start) - 1 : bisect_left(self._cuts, stop)]

    def missing(self, start: int, stop: int, holder: str) -> list[Range]:
        """The parts of a range that do not hold a bundle's bytes. Neighbours are joined."""
        found: list[Range] = []
        index = bisect_right(self._cuts, start) - 1
        while start < stop:
            end = min(stop, self._cuts[index + 1])
            if self._segments[index].holder != holder:
                if found and found[-1][1] == start:
                    found[-1] = found[-1][0], end
                else:
                    found.append((start, end))
            start, index = end, index + 1
        return found

    def forget(self, start: int, stop: int) -> None:
        """The bytes hold no bundle any more. A copy that overwrites them still waits for the tasks that used them."""
        if start < stop:
            first, last = self._cut(start), self._cut(stop)
            for segment in self._segments[first:last]:
                segment.holder = None

    def _cut(self, place: int) -> int:
        """The index of the segment that begins here. If there is none, cut a segment in two."""
        index = bisect_right(self._cuts, place)
        if self._cuts[index - 1] == place:
            return index - 1
        self._cuts.insert(index, place)
        self._segments.insert(index, replace(self._segments[index - 1]))
        return index


def _latest(segments: list[Segment]) -> Segment:
    return Segment(
        None,
        max(segment.arrived for segment in segments),
        max(segment.used for segment in segments),
        max(segment.copied_out for segment in segments),
    )


class Arena:
    """The memory of all seats, the table of what is in it, and the copies of weights into it and out of it."""

    def __init__(self, plan: Plan, homes: Homes, device: Device[Any], lanes: Lanes, copier: Copier) -> None:
        self._plan, self._homes, self._device, self._lanes, self._copier = plan, homes, device, lanes, copier
        self.memory = device.allocate(plan.arena_bytes)
        self._table = SeatTable(plan.arena_bytes, used=lanes.mark("compute"))
        self._read_home: dict[str, int] = {}  # for each bundle: the last copy from its home
        self._wrote_home: dict[str, int] = {}  # for each bundle: the last copy to its home
        self.last_home = 0  # the last copy to any home
        self._made_pieces: dict[tuple[str, int, int], list[Bytes]] = {}
        self._windows = {
            name: device.window(self.memory, offset, plan.trace.weights[name].nbytes)
            for name, offset in plan.seats.items()
        }
        self._look_at_homes(plan.seats)

    def issue(self, copy: Copy, only_missing: bool) -> None:
        """Issue a copy of the plan. With `only_missing`, copy only the bytes that are not there yet."""
        task = copy.task
        start, stop = task.start, self._plan.sizes[task.name] if task.stop is None else task.stop
        if copy.lane == "d2h":
            if not self._missing(task.name, start, stop):
                self._copy_home(copy, start, stop)
        elif only_missing:
            for first, last in self._missing(task.name, start, stop):
                self._bring(copy, first, last)
        else:
            self._bring(copy, start, stop)

    def seat(self, need: Need) -> None:
        """Load what a call reads and is missing, and let the compute lane wait for all that it reads."""
        arrived = 0
        for bundle, start, stop in need.ranges:
            for segment in self._table.over(start, stop):
                if segment.holder != bundle:
                    self._load_missing(need.name, bundle, start, stop)
                    arrived = self._lanes.latest["h2d"]
                elif segment.arrived > arrived:
                    arrived = segment.arrived
        self._lanes.wait("compute", "h2d", arrived)

    def used(self, need: Need, number: int) -> None:
        """The compute task of this number used what a call needs."""
        for _, start, stop in need.ranges:
            for segment in self._table.over(start, stop):
                segment.used = number

    def bring_beside_the_plan(self, weight: str, call: str, place: int | None) -> Tensor:
        """Copy a weight that has no seat to a place in the arena, or to memory of its own. Returns that memory.

        The compute lane waits for the copy.
        """
        home = self._homes.weights[weight]
        nbytes, copy = home.memory.nbytes, Copy(Task("h2d", weight), f"h2d {weight} on demand", call)
        self._copier.stats.demand_loads += 1
        if place is None:
            memory = self._device.allocate(nbytes)
        else:
            memory = self._device.window(self.memory, place, nbytes)
            before = self._table.fill(place, place + nbytes, beside(weight), self._lanes.latest["h2d"] + 1)
            self._lanes.wait("h2d", "d2h", before.copied_out)
        self._lanes.wait("h2d", "compute", self._lanes.mark("compute"))
        self._lanes.wait("compute", "h2d", self._copier.copy(copy, [(memory, home.memory)]))
        return memory

    def used_beside_the_plan(self, memory: Tensor, place: int | None) -> None:
        """The compute lane has used a weight on demand until now."""
        number = self._lanes.mark("compute")
        if place is not None:
            for segment in self._table.over(place, place + memory.nbytes):
                segment.used = number

    def holds_beside_the_plan(self, weight: str, place: int, nbytes: int) -> bool:
        """Whether the bytes of a weight on demand are still there."""
        return not self._table.missing(place, place + nbytes, beside(weight))

    def carry_home_beside_the_plan(self, weight: str, memory: Tensor) -> None:
        """Copy a weight on demand that was changed to its home, and wait until that is done."""
        self._lanes.wait("d2h", "compute", self._lanes.mark("compute"))
        copy = Copy(Task("d2h", weight), f"d2h {weight} on demand", "")
        self._lanes.settle("d2h", self._copier.copy(copy, [(self._homes.weights[weight].memory, memory)]))

    def carry_home(self, names: Iterable[str]) -> None:
        """Copy weights that a call has changed to their homes."""
        for name in names:
            bundle = self._plan.bundle_of[name]
            start = self._plan.seats[name] - self._plan.bundles[bundle].offset
            stop = start + self._plan.trace.weights[name].nbytes
            task = Task("d2h", bundle, start, stop)
            self._copy_home(Copy(task, str(task), ""), start, stop)

    def announce_changes(self, need: Need, names: Iterable[str]) -> None:
        """Tell a device that checks accesses which weights a call has written, though the plan does not say so."""
        for name in names:
            start = self._plan.seats[name]
            stop = start + self._plan.trace.weights[name].nbytes
            self._device.reached(f"{need.name} changes {name}", self.memory, [], [(start, stop)])

    def forget(self, names: Iterable[str]) -> None:
        """The homes of these weights changed, so their seats hold old bytes."""
        if self._homes.moves != self._moves:
            self._look_at_homes(names)
        for name in names:
            if name in self._plan.seats:
                start = self._plan.seats[name]
                self._table.forget(start, start + self._plan.trace.weights[name].nbytes)

    def forget_all_but(self, kept: Need | None) -> None:
        """Forget what the arena holds, except for what one need reads. No copy may be under way."""
        self._table = SeatTable(self._plan.arena_bytes)
        for bundle, start, stop in kept.ranges if kept else ():
            self._table.fill(start, stop, bundle, arrived=0)

    def close(self) -> None:
        """Drop every view of the memory, so that it is freed at once."""
        for shown in self._homes.tensors():
            shown.seat = shown.home
        self._made_pieces.clear()
        self._windows.clear()

    def _look_at_homes(self, names: Iterable[str]) -> None:
        """Make the views of seats again: these weights may have moved, or other tensors may show them."""
        self._moves = self._homes.moves
        self._made_pieces.clear()
        for name in names:
            if name in self._windows:
                for shown in self._homes.weights[name].tensors:
                    shown.seat = shown.view_of(self._windows[name])

    def _missing(self, bundle: str, start: int, stop: int) -> list[Range]:
        """The parts of a bundle's bytes that are not in their seat, nor on their way."""
        offset = self._plan.bundles[bundle].offset
        parts = self._table.missing(offset + start, offset + stop, bundle)
        return [(first - offset, last - offset) for first, last in parts]

    def _load_missing(self, call: str, bundle: str, start: int, stop: int) -> None:
        """Load the part of a range of the arena that no copy brought in time."""
        offset = self._plan.bundles[bundle].offset
        for first, last in self._missing(bundle, start - offset, stop - offset):
            self._copier.stats.demand_loads += 1
            task = Task("h2d", bundle, first, last)
            self._bring(Copy(task, str(task), call), first, last)

    def _bring(self, copy: Copy, start: int, stop: int) -> None:
        """Copy bytes of a bundle to their seat, after all tasks that touched what is there now."""
        bundle = copy.task.name
        offset = self._plan.bundles[bundle].offset
        before = self._table.fill(offset + start, offset + stop, bundle, self._lanes.latest["h2d"] + 1)
        self._lanes.wait("h2d", "compute", before.used)
        copied_out = max(before.copied_out, self._wrote_home.get(bundle, 0))
        if copied_out:
            self._lanes.wait("h2d", "d2h", copied_out)
        pieces = self._made_pieces.get((bundle, start, stop)) or self._pieces(bundle, start, stop)
        self._read_home[bundle] = self._copier.copy(copy, pieces)

    def _copy_home(self, copy: Copy, start: int, stop: int) -> None:
        """Copy bytes of a bundle from their seat to their home, after the tasks that used the seat or the home."""
        bundle = copy.task.name
        offset = self._plan.bundles[bundle].offset
        segments = self._table.over(offset + start, offset + stop)
        self._lanes.wait("d2h", "compute", max((segment.used for segment in segments), default=0))
        arrived = max((segment.arrived for segment in segments), default=0)
        self._lanes.wait("d2h", "h2d", max(arrived, self._read_home.get(bundle, 0)))
        pieces = [(home, seat) for seat, home in self._pieces(bundle, start, stop)]
        number = self.last_home = self._wrote_home[bundle] = self._copier.copy(copy, pieces)
        for segment in segments:
            segment.copied_out = number

    def _pieces(self, bundle: str, start: int, stop: int) -> list[Bytes]:
        """Bytes of a bundle in their seat and at home: one piece, or several if a weight has moved. Made only once."""
        key = bundle, start, stop
        if key not in self._made_pieces:
            offset = self._plan.bundles[bundle].offset
            offsets = inner_offsets(self._plan.bundles[bundle].weights, self._plan.trace)
            with _disable_current_modes():  # modes that watch the model's operators must not see ours
                seats = self.memory[offset : offset + self._plan.sizes[bundle]]
                self._made_pieces[key] = [
                    (seats[first:last], home) for first, last, home in self._homes.pieces(offsets, start, stop)
                ]
        return self._made_pieces[key]


def beside(weight: str) -> str:
    """The name of a weight on demand in the table. No bundle has such a name."""
    return f"{weight} on demand"


class Throughout:
    """The standing weights: those that are read between blocks, or that the forward changes.

    between forwards                            while a forward runs
    tensors point home;                         tensors point to seats
    those of changed weights, to their seats
    """

    def __init__(self, need: Need, staying: Need, arena: Arena, lanes: Lanes, device: Device[Any]) -> None:
        self._need, self._kept, self._arena, self._lanes, self._device = need, staying, arena, lanes, device
        self._changed = {shown.weight for shown in staying.tensors}
        self._staying = set(staying.tensors)
        self.returning = [shown for shown in need.tensors if shown not in self._staying]
        self._is_seated = False  # True once a forward began: from then on, the device has the changed weights

    def begin(self) -> None:
        """A forward begins: seat the weights and point their tensors there."""
        self._arena.seat(self._need)
        for shown in self._need.tensors:
            shown.tensor.data = shown.seat
        self._is_seated = True

    def end(self) -> None:
        """A forward has ended: point the tensors home. Wait for the copies home."""
        if self.returning:
            self._carry_edits_home()
        self._lanes.settle("d2h", self._arena.last_home)
        if self._need.ranges:
            self._device.reached("between blocks", self._arena.memory, self._need.reads, [])
            self._arena.used(self._need, self._lanes.mark("compute"))
        if self.returning:
            point_home(self.returning)

    def _carry_edits_home(self) -> None:
        """Copy home what a hook of the user has edited on the device."""
        if names := sorted((edited_weights(self.returning) | self._need.changed_unseen()) - self._changed):
            self._arena.announce_changes(self._need, names)
            self._arena.used(self._need, self._lanes.mark("compute"))
            self._arena.carry_home(names)

    def away(self, tensors: Iterable[WeightTensor]) -> Iterator[WeightTensor]:
        """Those of the tensors that point home between forwards."""
        return (shown for shown in tensors if not (self._is_seated and shown in self._staying))

    @property
    def kept(self) -> Need | None:
        """The weights that the forward changes: only the device has their true values."""
        return self._kept if self._is_seated else None

    def leave(self) -> None:
        """After the last forward: copy home the weights whose true values only the device has."""
        if self._is_seated:
            self._arena.carry_home(dict.fromkeys(shown.weight for shown in self._kept.tensors))
            self._is_seated = False
