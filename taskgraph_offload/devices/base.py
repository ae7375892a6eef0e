"""What the executor asks of a device, and nothing else. A device knows bytes, lanes and events; no plan and no model.

A lane is a FIFO: it copies, and waits for events of other lanes. `compute` is the lane of whoever calls the model: its
work is the model's own operators, so it only waits and records. An event is a moment in a lane; it can be recorded
again, and a wait means the moment that was the latest when the wait was issued.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, TypeVar

from torch import Tensor

from ..errors import ExecutionError, SettingsError
from ..nouns.graph import Lane as LaneName
from ..nouns.machine import Machine

E = TypeVar("E")
Awaited = TypeVar("Awaited", contravariant=True)

Range = tuple[int, int]  # bytes of the memory that `allocate` gave, half-open


class Event(Protocol):
    """A moment in a lane."""

    def seconds_since(self: E, earlier: E) -> float:
        """The time from another event to this one; both must have happened."""
        ...

    def synchronize(self) -> None:
        """Block the caller until the event has happened."""
        ...


class Lane(Protocol[Awaited]):
    """A FIFO of copies. Nothing here blocks the caller, except on devices whose compute lane is the caller itself."""

    def copy(self, target: Tensor, source: Tensor, label: object) -> None:
        """Copy bytes; `label` is for whoever reports on it."""
        ...

    def wait(self, event: Awaited) -> None:
        """Whatever this lane is given from now on begins when the event has happened."""
        ...

    def record(self, event: Awaited) -> None:
        """The event happens when all that this lane was given so far is done."""
        ...


class Device(Protocol[E]):
    """A device: its memory, its three lanes, and what homes on its host need."""

    @property
    def lanes(self) -> Mapping[LaneName, Lane[E]]: ...

    @property
    def refuses_home_reads(self) -> bool:
        """Whether an operator that reads a weight at home, unknown to the plan, is an error by name. For tests."""
        ...

    def expect(self, machine: Machine, seconds: Mapping[str, float]) -> None:
        """The machine and the seconds of each call that the plan assumes. For devices that count time."""
        ...

    def event(self) -> E:
        """A new event, not yet recorded."""
        ...

    def allocate(self, nbytes: int) -> Tensor:
        """Fast memory as bytes, aligned to what a seat needs."""
        ...

    def window(self, memory: Tensor, start: int, nbytes: int) -> Tensor:
        """Bytes of such memory as a tensor with a storage of its own, so that who copies it copies no more."""
        ...

    def pin(self, home: Tensor) -> None:
        """Make host memory ready for fast copies."""
        ...

    def unpin(self, home: Tensor) -> None:
        """Undo `pin`."""
        ...

    def begin(self) -> None:
        """A forward begins: from now on the compute lane is the caller's."""
        ...

    def reached(self, label: object, memory: Tensor, reads: Sequence[Range], writes: Sequence[Range]) -> None:
        """The compute lane begins a call that touches these bytes. For devices that check, or that count time."""
        ...

    def synchronize(self) -> None:
        """Block the caller until every lane is done; raise what went wrong in one of them since, once."""
        ...

    def peak_bytes(self) -> int | None:
        """The most bytes in use since the device was opened, if it can tell."""
        ...

    def close(self) -> None:
        """End the lanes; nothing may be issued any more."""
        ...


def refuse_link(kind: str, link_bytes_per_second: float | None) -> None:
    """A device whose copies cannot be slowed refuses a rate."""
    if link_bytes_per_second is not None:
        raise SettingsError(
            f"link_bytes_per_second={link_bytes_per_second!r} with device {kind!r}; "
            "it is for device='cpu', which then copies as slowly as a real link"
        )


def refuse_closed() -> None:
    """A device that was closed does nothing any more: an executor closes the one that it was given when it detaches."""
    raise ExecutionError("this device is closed; open another one with open_device(), or give its name")
