"""An NVIDIA GPU. The model computes in the caller's current stream; each direction of copies has its own stream.

Events order the streams. The host waits only in `synchronize`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ..errors import ExecutionError, SettingsError
from ..nouns.graph import Lane as LaneName
from ..nouns.machine import Machine
from .base import Range, refuse_link

_PORTABLE = 1  # cudaHostRegisterPortable


class CudaEvent:
    """A moment in a stream."""

    __slots__ = ("moment",)

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self.moment = torch.cuda.Event(enable_timing=True)
        self.moment.record(stream)  # makes CUDA create the event now, not in the middle of a forward

    def seconds_since(self, earlier: CudaEvent) -> float:
        """The time between two events, on the device's clock."""
        return float(earlier.moment.elapsed_time(self.moment)) / 1000

    def synchronize(self) -> None:
        """Block the host until the event has happened."""
        self.moment.synchronize()


class CudaLane:
    """One stream."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self.stream = stream

    def copy(self, target: Tensor, source: Tensor, label: object) -> None:
        """Copy in this stream. Dispatch modes do not see it."""
        with _disable_current_modes(), torch.cuda.stream(self.stream):
            target.copy_(source, non_blocking=True)

    def wait(self, event: CudaEvent) -> None:
        """Let the stream wait for the event. The host does not wait."""
        self.stream.wait_event(event.moment)

    def record(self, event: CudaEvent) -> None:
        """Let the event happen after all earlier work of the stream."""
        event.moment.record(self.stream)


class CallersLane(CudaLane):
    """The stream that the caller computes in. The caller may change it at any time."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(torch.cuda.current_stream(device))
        self._device, self._handover = device, CudaEvent(self.stream)

    def follow(self) -> None:
        """Go on in the caller's current stream, after the work in the stream before."""
        stream = torch.cuda.current_stream(self._device)
        if stream != self.stream:
            super().record(self._handover)
            self.stream = stream
            super().wait(self._handover)

    def wait(self, event: CudaEvent) -> None:
        """Let the caller's stream wait for the event."""
        self.follow()
        super().wait(event)

    def record(self, event: CudaEvent) -> None:
        """Let the event happen after all earlier work in all streams of the caller."""
        self.follow()
        super().record(event)


@dataclass(frozen=True, slots=True)
class _Bytes:
    """A part of device memory. Torch makes a tensor with its own storage from it, and keeps it and its memory alive."""

    memory: Tensor
    start: int
    nbytes: int

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        place = (self.memory.data_ptr() + self.start, False)
        return {"shape": (self.nbytes,), "typestr": "|u1", "data": place, "version": 2}


class CudaDevice:
    """One CUDA device."""

    refuses_home_reads = False  # torch itself refuses tensors on two devices

    def __init__(self, index: int) -> None:
        self.device = torch.device("cuda", index)
        self._compute = CallersLane(self.device)
        copies = [CudaLane(torch.cuda.Stream(self.device)) for _ in range(2)]
        self.lanes: Mapping[LaneName, CudaLane] = {"compute": self._compute, "h2d": copies[0], "d2h": copies[1]}
        self._peak_before = torch.cuda.max_memory_allocated(self.device)

    def expect(self, machine: Machine, seconds: Mapping[str, float]) -> None:
        """Nothing to do: the card runs in real time."""

    def event(self) -> CudaEvent:
        """A new event."""
        return CudaEvent(self._compute.stream)

    def allocate(self, nbytes: int) -> Tensor:
        """Allocate with torch, in the caller's stream. Torch aligns memory to 512 bytes."""
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def window(self, memory: Tensor, start: int, nbytes: int) -> Tensor:
        """Bytes of such memory as a tensor with its own storage."""
        if nbytes == 0:
            return torch.empty(0, dtype=torch.uint8, device=self.device)
        return torch.as_tensor(_Bytes(memory, start, nbytes), device=self.device)

    def pin(self, home: Tensor) -> None:
        """Lock the pages of this memory for every GPU. Torch's own pinned memory is rounded up to powers of two."""
        if home.nbytes:
            with torch.cuda.device(self.device):
                code = torch.cuda.cudart().cudaHostRegister(home.data_ptr(), home.nbytes, _PORTABLE)
                self._check(code, "lock", home.nbytes)

    def unpin(self, home: Tensor) -> None:
        """Unlock the pages."""
        if home.nbytes:
            with torch.cuda.device(self.device):
                self._check(torch.cuda.cudart().cudaHostUnregister(home.data_ptr()), "unlock", home.nbytes)

    def begin(self) -> None:
        """Compute in the caller's stream. Refuse a stream that records a CUDA graph."""
        with torch.cuda.device(self.device):
            is_capturing = torch.cuda.is_current_stream_capturing()
        if is_capturing:
            raise ExecutionError(
                "CUDA graphs are not supported: a graph replays fixed addresses, but the weights of an offloaded model "
                'move. Detach before the capture, and do not compile with mode="reduce-overhead"'
            )
        self._compute.follow()

    def reached(self, label: object, memory: Tensor, reads: Sequence[Range], writes: Sequence[Range]) -> None:
        """Follow the caller, who may have changed the stream within the forward. Checks no accesses."""
        self._compute.follow()

    def synchronize(self) -> None:
        """Block the host until the device has done all work."""
        torch.cuda.synchronize(self.device)

    def peak_bytes(self) -> int | None:
        """The peak of torch's allocator, if it is higher than before this device was opened; else None.

        Torch keeps only one peak. We do not reset it, because it belongs to the user.
        """
        peak = torch.cuda.max_memory_allocated(self.device)
        return peak if peak > self._peak_before else None

    def close(self) -> None:
        """Nothing to end: the streams belong to torch."""

    def _check(self, code: Any, verb: str, nbytes: int) -> None:
        if int(code) != 0:
            self._clear_error()
            raise ExecutionError(
                f"CUDA could not {verb} {nbytes} bytes of host memory ({code}); is there enough free host memory?"
            )

    def _clear_error(self) -> None:
        """Clear CUDA's last error. Otherwise torch raises it after its next kernel."""
        if (get := getattr(torch.cuda.cudart(), "cudaGetLastError", None)) is not None:
            get()
        else:
            with suppress(RuntimeError):
                torch.ones(1, device=self.device)  # a kernel: then torch reads and clears the error


def check(number: str, link_bytes_per_second: float | None) -> None:
    """Raise if torch sees no such GPU."""
    refuse_link("cuda", link_bytes_per_second)
    if not torch.cuda.is_available():
        raise SettingsError("device 'cuda' is not available here; device='cpu' runs every plan anywhere")
    if int(number or 0) >= torch.cuda.device_count():
        raise SettingsError(f"no such device: 'cuda:{number}'; torch sees {torch.cuda.device_count()} of that kind")


def create(number: str, link_bytes_per_second: float | None) -> CudaDevice:
    """Open a GPU by its number, or the current one."""
    return CudaDevice(int(number) if number else torch.cuda.current_device())
