"""The CPU as a device that checks every access to its memory. For tests.

Every copy and every call is an access to bytes by a lane. If two lanes access the same byte, and one of them writes,
events must order the two; if not, an error names both. A seed decides whether copies run as early as the events
allow, or as late. Memory that was never written, or that a copy is about to overwrite, holds poison.

    clock of a lane     for each lane: how many of its accesses are certainly over before this lane's next one
    record              the event takes over the lane's clock
    wait                the lane adds the event's clock to its own
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
    """A lane reads or writes the bytes `[start, stop)`, by address. `number` counts the lane's accesses."""

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
    """A moment in a lane, and the accesses that are certainly over then."""

    def __init__(self, device: CheckedDevice) -> None:
        self._device = device
        self.recorded = self.happened = 0
        self.clock: Mapping[str, int] = NOTHING_KNOWN
        self.lane: CheckedLane | None = None
        self.seconds = 0.0

    def seconds_since(self, earlier: CheckedEvent) -> float:
        """The time between two events."""
        if self.happened < self.recorded or earlier.happened < earlier.recorded:
            raise ExecutionError("this event has not happened yet, so it has no time")
        return self.seconds - earlier.seconds

    def synchronize(self) -> None:
        """The host waits for the event."""
        self._device.host_waits_for(self)

    def happen(self, number: int) -> None:
        """Happen: all earlier work of the lane is done."""
        self.happened, self.seconds = number, time.perf_counter()


@dataclass(eq=False)
class CheckedLane:
    """A lane: its clock, and the work that it has not done yet."""

    name: str
    device: CheckedDevice
    clock: Clock = field(default_factory=dict)
    waiting: deque[_Deed] = field(default_factory=deque)

    def copy(self, target: Tensor, source: Tensor, label: object) -> None:
        """Check the copy now, run it later."""
        if target.nbytes != source.nbytes:
            raise ExecutionError(f"{label} copies {source.nbytes} bytes to {target.nbytes} bytes")
        self.device.touch(self, str(label), source, [(0, source.nbytes)], writes=False)
        self.device.touch(self, str(label), target, [(0, target.nbytes)], writes=True)
        self._give(_Deed(lambda: copy_bytes(target, source), poisons=target))

    def wait(self, event: CheckedEvent) -> None:
        """Add the event's clock to this lane's, and do nothing before the event has happened."""
        if not event.recorded:
            raise ExecutionError(f"the {self.name} lane waits for an event that nobody has recorded")
        merge(self.clock, event.clock)
        number = event.recorded
        self._give(_Deed(lambda: None, after=event, after_number=number))

    def record(self, event: CheckedEvent) -> None:
        """Give the event this lane's clock. It happens when all earlier work of the lane is done."""
        merge(self.clock, self.device.host)
        event.recorded, event.clock, event.lane = event.recorded + 1, dict(self.clock), self
        number = event.recorded
        self._give(_Deed(lambda: event.happen(number)))

    def step(self) -> bool:
        """Do, or begin, the lane's next work. Returns False if there is none, or if it must wait for an event."""
        if not self.waiting or not self.waiting[0].is_allowed:
            return False
        deed = self.waiting[0]
        if deed.poisons is not None:  # the copy begins: from here on, the target may hold anything
            fill(deed.poisons, POISON)
            deed.poisons = None
        else:
            self.waiting.popleft()
            deed.do()
        return True

    def _give(self, deed: _Deed) -> None:
        self.waiting.append(deed)
        if self.name == "compute":  # the model's operators run at once, so all work before them must be done now
            self.device.finish(self)
        self.device.stir()


@dataclass
class _Deed:
    """Work of a lane, the event that it must wait for, and the bytes to poison when it begins."""

    do: Callable[[], None]
    after: CheckedEvent | None = None
    after_number: int = 0
    poisons: Tensor | None = None

    @property
    def is_allowed(self) -> bool:
        return self.after is None or self.after.happened >= self.after_number


class CheckedDevice(HostMemory):
    """The CPU, checked. Everything runs in the caller's thread. The same seed always gives the same order."""

    refuses_home_reads = True

    def __init__(self, seed: int = 0) -> None:
        self.start_over(seed)

    def start_over(self, seed: int) -> None:
        """Become a new device with another seed."""
        self._random, self._is_closed = random.Random(seed), False
        self._haste = self._random.choice((0.0, 0.3, 1.0))  # how often copies run before a lane waits for them
        names: tuple[LaneName, ...] = ("compute", "h2d", "d2h")
        self.lanes: Mapping[LaneName, CheckedLane] = {name: CheckedLane(name, self) for name in names}
        self.host: Clock = {}  # what is certainly over for the host, and so for all that it issues later
        self.accesses: list[Access] = []
        self._memory: list[tuple[Tensor, numpy.ndarray]] = []  # and for each byte, whether it was ever written

    def event(self) -> CheckedEvent:
        """A new event."""
        return CheckedEvent(self)

    def allocate(self, nbytes: int) -> Tensor:
        """New memory full of poison. The compute lane may have used it before, so later copies must wait for that."""
        memory = bytes_of(new_pages(nbytes), 0, nbytes)
        fill(memory, POISON)
        start, stop = memory.data_ptr(), memory.data_ptr() + nbytes
        self.accesses = [access for access in self.accesses if access.stop <= start or stop <= access.start]
        self.touch(self.lanes["compute"], "what had this memory before", memory, [(0, nbytes)], writes=True)
        self._memory = [(other, written) for other, written in self._memory if other.data_ptr() != start]
        self._memory.append((memory, numpy.zeros(nbytes, dtype=bool)))
        return memory

    def begin(self) -> None:
        """Refuse if the device is closed. The compute lane is always the caller."""
        if self._is_closed:
            refuse_closed()

    def reached(self, label: object, memory: Tensor, reads: Sequence[Range], writes: Sequence[Range]) -> None:
        """Check the bytes of a call."""
        compute = self.lanes["compute"]
        self.touch(compute, str(label), memory, reads, writes=False)
        self.touch(compute, str(label), memory, writes, writes=True)

    def synchronize(self) -> None:
        """Do all work of all lanes."""
        for lane in self.lanes.values():
            self.finish(lane)
            merge(self.host, lane.clock)

    def close(self) -> None:
        """Fill all memory with poison, so that a tensor that still shows it is found out. Raise if copies wait."""
        if any(lane.waiting for lane in self.lanes.values()):
            raise ExecutionError("the device is closed while copies are under way")
        self._is_closed = True
        for memory, _ in self._memory:
            fill(memory, POISON)

    def touch(self, lane: CheckedLane, label: str, memory: Tensor, ranges: Sequence[Range], writes: bool) -> None:
        """A lane accesses bytes. Raise if no event orders this, or if it reads bytes that were never written."""
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
        """Run some copies before a lane waits for them, as the seed decides."""
        while self._random.random() < self._haste:
            if not self._random.choice(list(self.lanes.values())).step() and self._haste < 1:
                return
            if self._haste == 1 and not any(lane.step() for lane in self.lanes.values()):
                return

    def finish(self, lane: CheckedLane) -> None:
        """Do all work of a lane, and of the other lanes only what it waits for."""
        while lane.waiting:
            if not lane.step():
                self._bring_about(lane.waiting[0])

    def host_waits_for(self, event: CheckedEvent) -> None:
        """Block the host until the event has happened."""
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
        """Remember an access. Forget older ones that it covers: what is ordered after it is ordered after them, too."""
        for other in near:
            again = other.lane == access.lane and not other.writes
            if (access.writes or again) and access.start <= other.start and other.stop <= access.stop:
                self.accesses.remove(other)
        self.accesses.append(access)


def merge(clock: Clock, other: Mapping[str, int]) -> None:
    """Add to a clock what another one knows."""
    for lane, number in other.items():
        clock[lane] = max(clock.get(lane, 0), number)


def fill(memory: Tensor, value: int) -> None:
    """Set every byte to a value. Dispatch modes do not see this."""
    ctypes.memset(memory.data_ptr(), value, memory.nbytes)


def check(number: str, link_bytes_per_second: float | None) -> None:
    """Every number is a seed. There is no rate."""
    refuse_link("checked", link_bytes_per_second)


def create(number: str, link_bytes_per_second: float | None) -> CheckedDevice:
    """Open the checking device with a seed."""
    return CheckedDevice(int(number or 0))
