"""An NVIDIA GPU: compute on the caller's current stream, one stream for each direction of copies.

Events order the streams; the host waits for nothing but `synchronize`.
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
        self.moment.record(stream)  # CUDA makes the event now, and not in the middle of a forward

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
        """Copy in this stream, unseen by dispatch modes."""
        with _disable_current_modes(), torch.cuda.stream(self.stream):
            target.copy_(source, non_blocking=True)

    def wait(self, event: CudaEvent) -> None:
        """The stream waits, not the host."""
        self.stream.wait_event(event.moment)

    def record(self, event: CudaEvent) -> None:
        """The event happens when the stream gets to it."""
        event.moment.record(self.stream)


class CallersLane(CudaLane):
    """The stream that the caller computes in, which may be another one each time it is asked for."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(torch.cuda.current_stream(device))
        self._device, self._handover = device, CudaEvent(self.stream)

    def follow(self) -> None:
        """Go on in the caller's stream, behind what was computed in another one before."""
        stream = torch.cuda.current_stream(self._device)
        if stream != self.stream:
            super().record(self._handover)
            self.stream = stream
            super().wait(self._handover)

    def wait(self, event: CudaEvent) -> None:
        """The caller's stream waits."""
        self.follow()
        super().wait(event)

    def record(self, event: CudaEvent) -> None:
        """The event happens when all streams get to it that the caller has computed in."""
        self.follow()
        super().record(event)


@dataclass(frozen=True, slots=True)
class _Bytes:
    """Device memory that torch can look at as a storage of its own; torch keeps this object, which keeps the memory."""

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
        """Nothing to do: the card takes the time it takes."""

    def event(self) -> CudaEvent:
        """A new event."""
        return CudaEvent(self._compute.stream)

    def allocate(self, nbytes: int) -> Tensor:
        """Memory from torch's allocator, which aligns it to 512 bytes, in the caller's stream."""
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def window(self, memory: Tensor, start: int, nbytes: int) -> Tensor:
        """Bytes of such memory, with a storage of their own."""
        if nbytes == 0:
            return torch.empty(0, dtype=torch.uint8, device=self.device)
        return torch.as_tensor(_Bytes(memory, start, nbytes), device=self.device)

    def pin(self, home: Tensor) -> None:
        """Lock pages of exactly this size, for every GPU; torch's own pinned memory rounds up to powers of two."""
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
        """Compute in the caller's stream. One that is captured cannot."""
        with torch.cuda.device(self.device):
            is_capturing = torch.cuda.is_current_stream_capturing()
        if is_capturing:
            raise ExecutionError(
                "CUDA graphs are not supported: a graph replays fixed addresses, but the weights of an offloaded model "
                'move; detach before the capture, and do not compile with mode="reduce-overhead"'
            )
        self._compute.follow()

    def reached(self, label: object, memory: Tensor, reads: Sequence[Range], writes: Sequence[Range]) -> None:
        """The caller may have changed its stream within the forward. Checks nothing."""
        self._compute.follow()

    def synchronize(self) -> None:
        """Block until the device is done."""
        torch.cuda.synchronize(self.device)

    def peak_bytes(self) -> int | None:
        """The most that torch's allocator had given away since then, if that is more than ever before.

        Torch keeps one peak, and it is the user's to reset.
        """
        peak = torch.cuda.max_memory_allocated(self.device)
        return peak if peak > self._peak_before else None

    def close(self) -> None:
        """Nothing to end: streams are torch's own."""

    def _check(self, code: Any, verb: str, nbytes: int) -> None:
        if int(code) != 0:
            self._clear_error()
            raise ExecutionError(f"CUDA could not {verb} {nbytes} bytes of host memory: {code}; is there enough of it?")

    def _clear_error(self) -> None:
        """Or torch would take CUDA's last error for that of its own next kernel."""
        if (get := getattr(torch.cuda.cudart(), "cudaGetLastError", None)) is not None:
            get()
        else:
            with suppress(RuntimeError):
                torch.zeros(1, device=self.device)  # a kernel, after which torch asks for the error


def check(number: str, link_bytes_per_second: float | None) -> None:
    """The GPU has to be there."""
    refuse_link("cuda", link_bytes_per_second)
    if not torch.cuda.is_available():
        raise SettingsError("device 'cuda' is not available here; device='cpu' runs every plan anywhere")
    if int(number or 0) >= torch.cuda.device_count():
        raise SettingsError(f"no such device: 'cuda:{number}'; torch sees {torch.cuda.device_count()} of that kind")


def create(number: str, link_bytes_per_second: float | None) -> CudaDevice:
    """Open a GPU by its number, or the current one."""
    return CudaDevice(int(number) if number else torch.cuda.current_device())
