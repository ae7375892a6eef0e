"""The CPU as a device that trusts nobody: for tests.

Every copy and every call is an access to bytes by a lane. Two accesses to the same byte, one of them a write, must be
ordered by events, or an error names both. Copies wait in their lanes and run as late as the events allow, or as early,
as a seed decides; memory that nobody has written, or that a copy is about to overwrite, is poison.

    clock of a lane     how many accesses of each lane are known to be over before whatever it does next
    record              the event takes the lane's clock along
    wait                the lane knows what the event knows
"""

from __future__ import annotations

import ctypes
import random
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy
from torch import Tensor

from ..errors import ExecutionError
from ..nouns.graph import Lane as LaneName
from .base import Range, refuse_closed, refuse_link
from .cpu import HostMemory, bytes_of, copy_bytes, new_pages

POISON = 0xFF  # a NaN in every floating-point type, -1 in every integer

Clock: TypeAlias = dict[str, int]
NOTHING_KNOWN: Mapping[str, int] = {}


@dataclass(frozen=True, slots=True, eq=False)
class Access:
    """Bytes `[start, stop)`, by address, that a lane touches; `number` counts the lane's accesses."""

    lane: str
    number: int
    label: str
    start: int
    stop: int
    writes: bool

    def __str__(self) -> str:
        verb = "writes" if self.writes else "reads"
        return f"{self.label} ({self.lane} lane, its access {self.number}) {verb} [{self.start:#x}, {self.stop:#x})"


class CheckedEvent:
    """A moment in a lane, and what is known to be over then."""

    def __init__(self, device: CheckedDevice) -> None:
        self._device = device
        self.recorded = self.happened = 0
        self.clock: Mapping[str, int] = NOTHING_KNOWN
        self.lane: CheckedLane | None = None
        self.seconds = 0.0

    def seconds_since(self, earlier: CheckedEvent) -> float:
        """The time between two events."""
        if self.happened < self.recorded or earlier.happened < earlier.recorded:
            raise ExecutionError("somebody asks for the time of an event that has not happened")
        return self.seconds - earlier.seconds

    def synchronize(self) -> None:
        """The host waits for the event."""
        self._device.host_waits_for(self)

    def happen(self, number: int) -> None:
        """Everything before it is done."""
        self.happened, self.seconds = number, time.perf_counter()


@dataclass(eq=False)
class CheckedLane:
    """A lane: what it knows, and what it was given and has not done yet."""

    name: str
    device: CheckedDevice
    clock: Clock = field(default_factory=dict)
    waiting: deque[_Deed] = field(default_factory=deque)

    def copy(self, target: Tensor, source: Tensor, label: object) -> None:
        """Check the copy now, run it some time."""
        if target.nbytes != source.nbytes:
            raise ExecutionError(f"{label} copies {source.nbytes} bytes onto {target.nbytes}")
        self.device.touch(self, str(label), source, [(0, source.nbytes)], writes=False)
        self.device.touch(self, str(label), target, [(0, target.nbytes)], writes=True)
        self._give(_Deed(lambda: copy_bytes(target, source), poisons=target))

    def wait(self, event: CheckedEvent) -> None:
        """Know what the event knows; do nothing before it has happened."""
        if not event.recorded:
            raise ExecutionError(f"the {self.name} lane waits for an event that nobody has recorded")
        merge(self.clock, event.clock)
        number = event.recorded
        self._give(_Deed(lambda: None, after=event, after_number=number))

    def record(self, event: CheckedEvent) -> None:
        """The event knows what the lane knows, and happens when the lane gets to it."""
        merge(self.clock, self.device.host)
        event.recorded, event.clock, event.lane = event.recorded + 1, dict(self.clock), self
        number = event.recorded
        self._give(_Deed(lambda: event.happen(number)))

    def step(self) -> bool:
        """Do the next thing, or begin it; false if there is none, or if it must wait for an event."""
        if not self.waiting or not self.waiting[0].is_allowed:
            return False
        deed = self.waiting[0]
        if deed.poisons is not None:  # from here on the target's bytes are anything
            fill(deed.poisons, POISON)
            deed.poisons = None
        else:
            self.waiting.popleft()
            deed.do()
        return True

    def _give(self, deed: _Deed) -> None:
        self.waiting.append(deed)
        if self.name == "compute":  # its operators run when they are called, so everything before them must have
            self.device.finish(self)
        self.device.stir()


@dataclass
class _Deed:
    """Something that a lane was given to do, the event it must wait for, and the bytes that are poison meanwhile."""

    do: Callable[[], None]
    after: CheckedEvent | None = None
    after_number: int = 0
    poisons: Tensor | None = None

    @property
    def is_allowed(self) -> bool:
        return self.after is None or self.after.happened >= self.after_number


class CheckedDevice(HostMemory):
    """The CPU, checked. Runs in the caller's thread; the same seed runs the same way."""

    refuses_home_reads = True

    def __init__(self, seed: int = 0) -> None:
        self.start_over(seed)

    def start_over(self, seed: int) -> None:
        """Be as new, with another seed."""
        self._random, self._is_closed = random.Random(seed), False
        self._haste = self._random.choice((0.0, 0.3, 1.0))  # how willingly copies run before somebody needs them
        names: tuple[LaneName, ...] = ("compute", "h2d", "d2h")
        self.lanes: Mapping[LaneName, CheckedLane] = {name: CheckedLane(name, self) for name in names}
        self.host: Clock = {}  # what the host knows to be over; whatever it issues comes later
        self.accesses: list[Access] = []
        self._memory: list[tuple[Tensor, numpy.ndarray]] = []  # with, for each byte, whether anybody has written it

    def event(self) -> CheckedEvent:
        """A new event."""
        return CheckedEvent(self)

    def allocate(self, nbytes: int) -> Tensor:
        """Poison. Work of the compute lane before this moment may still use the same bytes for something else."""
        memory = bytes_of(new_pages(nbytes), 0, nbytes)
        fill(memory, POISON)
        start, stop = memory.data_ptr(), memory.data_ptr() + nbytes
        self.accesses = [access for access in self.accesses if access.stop <= start or stop <= access.start]
        self.touch(self.lanes["compute"], "what had this memory before", memory, [(0, nbytes)], writes=True)
        self._memory = [(other, written) for other, written in self._memory if other.data_ptr() != start]
        self._memory.append((memory, numpy.zeros(nbytes, dtype=bool)))
        return memory

    def begin(self) -> None:
        """The caller is the compute lane anyway."""
        if self._is_closed:
            refuse_closed()

    def reached(self, label: object, memory: Tensor, reads: Sequence[Range], writes: Sequence[Range]) -> None:
        """Check the bytes of a call."""
        compute = self.lanes["compute"]
        self.touch(compute, str(label), memory, reads, writes=False)
        self.touch(compute, str(label), memory, writes, writes=True)

    def synchronize(self) -> None:
        """Run everything."""
        for lane in self.lanes.values():
            self.finish(lane)
            merge(self.host, lane.clock)

    def close(self) -> None:
        """Whoever still looks at this device's memory sees poison. Nothing may be under way any more."""
        if any(lane.waiting for lane in self.lanes.values()):
            raise ExecutionError("the device is closed while copies are under way")
        self._is_closed = True
        for memory, _ in self._memory:
            fill(memory, POISON)

    def touch(self, lane: CheckedLane, label: str, memory: Tensor, ranges: Sequence[Range], writes: bool) -> None:
        """A lane accesses bytes: refuse what is not ordered, and reads of what was never written."""
        merge(lane.clock, self.host)
        number = lane.clock[lane.name] = lane.clock.get(lane.name, 0) + 1
        for start, stop in ranges:
            base = memory.data_ptr()
            access = Access(lane.name, number, label, base + start, base + stop, writes)
            if start < stop:
                near = [other for other in self.accesses if other.start < access.stop and access.start < other.stop]
                self._refuse_races(lane, access, near)
                self._refuse_poison(access)
                self._remember(access, near)

    def stir(self) -> None:
        """Let copies run ahead of their need, as the seed has it."""
        while self._random.random() < self._haste:
            if not self._random.choice(list(self.lanes.values())).step() and self._haste < 1:
                return
            if self._haste == 1 and not any(lane.step() for lane in self.lanes.values()):
                return

    def finish(self, lane: CheckedLane) -> None:
        """Run all that a lane was given, and of the other lanes only what it waits for."""
        while lane.waiting:
            if not lane.step():
                self._bring_about(lane.waiting[0])

    def host_waits_for(self, event: CheckedEvent) -> None:
        """The host goes on when the event has happened."""
        merge(self.host, event.clock)
        if event.lane is not None:
            self._bring_about(_Deed(lambda: None, after=event, after_number=event.recorded))

    def _bring_about(self, deed: _Deed) -> None:
        """Run lanes until a deed's event has happened."""
        event = deed.after
        assert event is not None
        assert event.lane is not None
        while not deed.is_allowed:
            if not event.lane.step():
                self._bring_about(event.lane.waiting[0])

    def _refuse_races(self, lane: CheckedLane, access: Access, near: Sequence[Access]) -> None:
        for other in near:
            ordered = other.lane == lane.name or lane.clock.get(other.lane, 0) >= other.number
            if not ordered and (access.writes or other.writes):
                raise ExecutionError(f"a race: nothing orders\n  {other}\n  {access}")

    def _refuse_poison(self, access: Access) -> None:
        for memory, written in self._memory:
            start, stop = access.start - memory.data_ptr(), access.stop - memory.data_ptr()
            if 0 <= start < memory.nbytes:
                if access.writes:
                    written[start:stop] = True
                elif not written[start:stop].all():
                    raise ExecutionError(f"poison: nobody has written all of what {access}")

    def _remember(self, access: Access, near: Sequence[Access]) -> None:
        """Forget what can no longer matter: what this access, which is later, covers."""
        for other in near:
            again = other.lane == access.lane and not other.writes
            if (access.writes or again) and access.start <= other.start and other.stop <= access.stop:
                self.accesses.remove(other)
        self.accesses.append(access)


def merge(clock: Clock, other: Mapping[str, int]) -> None:
    """Know what another clock knows."""
    for lane, number in other.items():
        clock[lane] = max(clock.get(lane, 0), number)


def fill(memory: Tensor, value: int) -> None:
    """Every byte the same, unseen by dispatch modes."""
    ctypes.memset(memory.data_ptr(), value, memory.nbytes)


def check(number: str, link_bytes_per_second: float | None) -> None:
    """Any seed will do."""
    refuse_link("checked", link_bytes_per_second)


def create(number: str, link_bytes_per_second: float | None) -> CheckedDevice:
    """Open the checking device with a seed."""
    return CheckedDevice(int(number or 0))
