"""A machine that is not here: it runs every plan for real, on the CPU, but it counts time instead of measuring it.

Each lane has a clock. What the lane does moves its clock on, by the seconds that the machine would take:

    copy        by latency + bytes / rate
    reached     the compute lane comes to a call: by the seconds of that call
    wait        to the time of the event, if that is later
    record      not at all: the event takes the time of the clock

                0         1         2         3         4   seconds
    h2d         [-- a ----|-- b ---------)
    compute               [-- a --)      [-- b --)          b waits: compute's clock goes on to the end of copy b

Bytes are copied at once, in the caller's thread, so outputs are those of the plain model. The measured timeline is
exact: it does not depend on this computer or on what else runs on it. The host takes no time, as in a prediction.
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
        """Nothing to wait for: whatever was issued is done."""


@dataclass(eq=False, slots=True)
class VirtualLane:
    """A lane that copies at once, and counts what the copy would take. The compute lane copies in no time."""

    name: LaneName
    device: VirtualDevice
    clock: float = 0.0

    def copy(self, target: Tensor, source: Tensor, label: object) -> None:
        """Copy the bytes; the clock goes on by what the link takes."""
        copy_bytes(target, source)
        if self.name != "compute":
            self.clock += self.device.machine.copy_seconds(self.name, target.nbytes)

    def wait(self, event: VirtualEvent) -> None:
        """The clock goes on to the event."""
        self.clock = max(self.clock, event.seconds)

    def record(self, event: VirtualEvent) -> None:
        """The event happens now."""
        event.seconds = self.clock


class VirtualDevice(HostMemory):
    """A machine of any rates. By default it is what the plan was made for, and each call takes what the plan says.

    `seconds` are for calls, by name, that take another time than planned.

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
        """Be the machine of the plan, except for what was given."""
        self.machine = self._machine_given or machine
        self._seconds = {**seconds, **self._seconds_given}

    def event(self) -> VirtualEvent:
        """A new event."""
        return VirtualEvent()

    def allocate(self, nbytes: int) -> Tensor:
        """Memory of exactly this size."""
        return bytes_of(new_pages(nbytes), 0, nbytes)

    def begin(self) -> None:
        """The caller is the compute lane anyway."""
        if self._is_closed:
            refuse_closed()

    def reached(self, label: object, memory: Tensor, reads: Sequence[Range], writes: Sequence[Range]) -> None:
        """A call begins; the compute lane's clock goes on to its end."""
        self.lanes["compute"].clock += self._seconds.get(str(label), 0.0)

    def synchronize(self) -> None:
        """Whatever comes next comes after all that any lane has done."""
        now = max(lane.clock for lane in self.lanes.values())
        for lane in self.lanes.values():
            lane.clock = now

    def close(self) -> None:
        """Nothing is under way."""
        self._is_closed = True


def check(number: str, link_bytes_per_second: float | None) -> None:
    """Its machine is the plan's; another one is given to `VirtualDevice`."""
    refuse_link("virtual", link_bytes_per_second)
    if number:
        raise SettingsError(f"no such device: 'virtual:{number}'; there is one 'virtual'")


def create(number: str, link_bytes_per_second: float | None) -> VirtualDevice:
    """Open a device that is the machine of the plan."""
    return VirtualDevice()
