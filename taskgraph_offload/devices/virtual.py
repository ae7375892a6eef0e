"""A simulated machine. It runs every plan for real, on the CPU, but it counts time instead of measuring it.

Each lane has a clock. The lane's work moves the clock on by the seconds that the machine would take:

    copy        adds latency + bytes / rate
    reached     a call begins in the compute lane: adds the seconds of that call
    wait        sets the clock to the time of the event, if that is later
    record      adds nothing: the event takes the time of the clock

                0         1         2         3         4   seconds
    h2d         [-- a ----|-- b ---------)
    compute               [-- a --)      [-- b --)          b waits: compute's clock goes on to the end of copy b

Bytes are copied at once, in the caller's thread, so the outputs are those of the plain model. The measured timeline is
exact: it does not depend on this computer, or on what else runs on it. The host takes no time, as in a prediction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from ..errors import SettingsError
from ..nouns.graph import LANES
from ..nouns.graph import Lane as LaneName
from ..nouns.machine import Machine
from .base import Range, refuse_closed, refuse_link
from .cpu import HostMemory, bytes_of, copy_bytes, new_pages


@dataclass(eq=False, slots=True)
class VirtualEvent:
    """A moment in a lane."""

    seconds: float = 0.0

    def seconds_since(self, earlier: VirtualEvent) -> float:
        """The time between two events."""
        return self.seconds - earlier.seconds

    def synchronize(self) -> None:
        """Nothing to wait for: everything that was issued is done."""


@dataclass(eq=False, slots=True)
class VirtualLane:
    """A lane that copies at once, and counts the seconds that the copy would take. The compute lane counts none."""

    name: LaneName
    device: VirtualDevice
    clock: float = 0.0

    def copy(self, target: Tensor, source: Tensor, label: object) -> None:
        """Copy the bytes, and move the clock on by the link's seconds."""
        copy_bytes(target, source)
        if self.name != "compute":
            self.clock += self.device.machine.copy_seconds(self.name, target.nbytes)

    def wait(self, event: VirtualEvent) -> None:
        """Move the clock on to the time of the event."""
        self.clock = max(self.clock, event.seconds)

    def record(self, event: VirtualEvent) -> None:
        """Let the event happen at the time of the clock."""
        event.seconds = self.clock


class VirtualDevice(HostMemory):
    """A simulated machine. By default it is the plan's machine, and each call takes the plan's seconds.

    `machine` sets another one; `seconds` sets the time of single calls, by name.

    >>> import torch, taskgraph_offload as tgo
    >>> model, x = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(8))), torch.ones(1, 64)
    >>> plan = tgo.Planner(model, "50%", inputs=(x,), machine="rtx4090").plan()
    >>> with tgo.Executor(model, plan, device=VirtualDevice()) as run:
    ...     y = model(model(model(x)))
    >>> abs(run.timeline().step_seconds - plan.predict().step_seconds) < 1e-9
    True
    """

    def __init__(self, machine: Machine | str | None = None, seconds: Mapping[str, float] | None = None) -> None:
        self._machine_given = None if machine is None else Machine.of(machine)
        self._seconds_given = dict(seconds or {})
        self.machine, self._seconds = self._machine_given or Machine.preset("cpu"), self._seconds_given
        self.lanes: Mapping[LaneName, VirtualLane] = {name: VirtualLane(name, self) for name in LANES}
        self._is_closed = False

    def expect(self, machine: Machine, seconds: Mapping[str, float]) -> None:
        """Become the plan's machine, except for the arguments that were given."""
        self.machine = self._machine_given or machine
        self._seconds = {**seconds, **self._seconds_given}

    def event(self) -> VirtualEvent:
        """A new event."""
        return VirtualEvent()

    def allocate(self, nbytes: int) -> Tensor:
        """Memory of exactly this size."""
        return bytes_of(new_pages(nbytes), 0, nbytes)

    def begin(self) -> None:
        """Refuse if the device is closed. The compute lane is always the caller."""
        if self._is_closed:
            refuse_closed()

    def reached(self, label: object, memory: Tensor, reads: Sequence[Range], writes: Sequence[Range]) -> None:
        """A call begins: move the compute lane's clock on to its end."""
        self.lanes["compute"].clock += self._seconds.get(str(label), 0.0)

    def synchronize(self) -> None:
        """Set all clocks to the latest one: later work comes after all earlier work."""
        now = max(lane.clock for lane in self.lanes.values())
        for lane in self.lanes.values():
            lane.clock = now

    def close(self) -> None:
        """Close. There is nothing to end."""
        self._is_closed = True


def check(number: str, link_bytes_per_second: float | None) -> None:
    """Raise if there is a number or a rate. To set another machine, make a `VirtualDevice`."""
    refuse_link("virtual", link_bytes_per_second)
    if number:
        raise SettingsError(f"no such device: 'virtual:{number}'; there is one 'virtual'")


def create(number: str, link_bytes_per_second: float | None) -> VirtualDevice:
    """Open a device that simulates the plan's machine."""
    return VirtualDevice()
