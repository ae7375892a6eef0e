"""What a device must offer to the executor. A device knows bytes, lanes and events; it knows no plan and no model.

A lane is a FIFO. It copies bytes and waits for events of other lanes. In the lane `compute` the model's own operators
run, so the executor only waits and records there. An event is a moment in a lane. It can be recorded again and again; a
wait is for the last record before the wait was issued.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, TypeVar

import torch
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
        """The time from another event to this one. Both must have happened."""
        ...

    def synchronize(self) -> None:
        """Block the caller until the event has happened."""
        ...


class Lane(Protocol[Awaited]):
    """A FIFO of copies. No method blocks the caller, except where the compute lane is the caller's own thread."""

    def copy(self, target: Tensor, source: Tensor, label: object) -> None:
        """Copy bytes. `label` names the copy in error messages."""
        ...

    def wait(self, event: Awaited) -> None:
        """Let all later work of this lane wait until the event has happened."""
        ...

    def record(self, event: Awaited) -> None:
        """Let the event happen when all earlier work of this lane is done."""
        ...


class Device(Protocol[E]):
    """A device: its memory, its three lanes, and page locks for homes in host memory."""

    @property
    def lanes(self) -> Mapping[LaneName, Lane[E]]: ...

    @property
    def device(self) -> torch.device:
        """Where torch has this device's memory."""
        ...

    @property
    def refuses_home_reads(self) -> bool:
        """Whether an operator that reads a weight at home against the plan is an error. For tests."""
        ...

    @property
    def library_bytes(self) -> int:
        """The bytes of fast memory that the device's libraries take when a model runs. Measured once."""
        ...

    def expect(self, machine: Machine, seconds: Mapping[str, float]) -> None:
        """Tell the device the plan's machine and the plan's seconds of each call. For devices that count time."""
        ...

    def event(self) -> E:
        """A new event, not yet recorded."""
        ...

    def allocate(self, nbytes: int) -> Tensor:
        """Allocate fast memory, as bytes, aligned as seats need it."""
        ...

    def window(self, memory: Tensor, start: int, nbytes: int) -> Tensor:
        """Bytes of such memory as a tensor with its own storage, so that copying it does not copy the whole arena."""
        ...

    def pin(self, home: Tensor) -> None:
        """Make host memory ready for fast copies."""
        ...

    def unpin(self, home: Tensor) -> None:
        """Undo `pin`."""
        ...

    def begin(self) -> None:
        """A forward begins: from now on, the compute lane is that of the calling thread."""
        ...

    def reached(self, label: object, memory: Tensor, reads: Sequence[Range], writes: Sequence[Range]) -> None:
        """A call begins in the compute lane and uses these bytes. For devices that check accesses, or count time."""
        ...

    def synchronize(self) -> None:
        """Block the caller until every lane is done. If a lane failed, raise its error, once."""
        ...

    def peak_bytes(self) -> int | None:
        """The most bytes in use besides those in use before `allocate`, or None if the device cannot tell.

        Includes what the device's libraries hold.
        """
        ...

    def close(self) -> None:
        """End the lanes. The device cannot be used any more."""
        ...


def refuse_link(kind: str, link_bytes_per_second: float | None) -> None:
    """Raise if a rate is given for a device whose copies cannot be slowed down."""
    if link_bytes_per_second is not None:
        raise SettingsError(
            f"link_bytes_per_second={link_bytes_per_second!r} with device {kind!r}: "
            "only device='cpu' can slow its copies down to the rate of a link"
        )


def refuse_closed() -> None:
    """Raise because the device is closed. An executor closes its device when it detaches, also one it was given."""
    raise ExecutionError("this device is closed; open another one with open_device(), or give the executor a name")
