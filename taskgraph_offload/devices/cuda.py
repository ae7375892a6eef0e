"""An NVIDIA GPU. The model computes in the caller's current stream; each direction of copies has its own stream.

Events order the streams. The host waits only in `synchronize`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils._mode_utils import no_dispatch

from ..errors import ExecutionError, SettingsError
from ..nouns.budget import readable
from ..nouns.graph import Lane as LaneName
from ..nouns.machine import LIBRARIES_BEFORE_HOPPER, LIBRARIES_FROM_HOPPER_ON, LIGHT_KIB, Machine
from .base import Range, refuse_link

_PORTABLE = 1  # cudaHostRegisterPortable
_FORKED = (
    "CUDA was in use before this process was forked, and does not work in forked processes: "
    "start the process with multiprocessing.get_context('spawn'), or use the GPU only after the fork"
)


class CudaEvent:
    """A moment in a stream."""

    __slots__ = ("moment",)

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self.moment = torch.cuda.Event(enable_timing=True)
        self.moment.record(stream)  # makes CUDA create the event now, not in the middle of a forward

    def seconds_since(self, earlier: CudaEvent) -> float:
        """The time between two events, on the device's clock. A forked process cannot read it."""
        if torch.cuda._is_in_bad_fork():
            return 0.0
        return float(earlier.moment.elapsed_time(self.moment)) / 1000

    def synchronize(self) -> None:
        """Block the host until the event has happened. In a forked process, none ever does."""
        if not torch.cuda._is_in_bad_fork():
            self.moment.synchronize()


StreamName = tuple[int, int, int]  # what names a stream to torch: its number, its device's number, the kind of device


def _current_by_public_names(index: int) -> StreamName:
    stream = torch.cuda.current_stream(index)
    return stream.stream_id, stream.device_index, stream.device_type


def _set_by_public_names(stream_id: int, device_index: int, device_type: int) -> None:
    torch.cuda.set_stream(torch.cuda.Stream(stream_id=stream_id, device_index=device_index, device_type=device_type))


# A copy switches streams, and every call asks for the caller's. Torch's own functions take a tenth of the public ones'
# time, which make an object for each answer.
_current_stream = getattr(torch._C, "_cuda_getCurrentStream", _current_by_public_names)
_set_stream = getattr(torch._C, "_cuda_setStream", _set_by_public_names)


class CudaLane:
    """One stream."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._switch_to(stream)

    def _switch_to(self, stream: torch.cuda.Stream) -> None:
        self.stream = stream
        self._name: StreamName = stream.stream_id, stream.device_index, stream.device_type

    def copy(self, target: Tensor, source: Tensor, label: object) -> None:
        """Copy in this stream. Dispatch modes do not see it."""
        index, current_device = self._name[1], torch.cuda.current_device()
        callers = _current_stream(index)
        try:
            _set_stream(*self._name)  # makes its device the current one, too
            with no_dispatch():
                target.copy_(source, non_blocking=True)
        finally:
            _set_stream(*callers)
            if current_device != index:
                torch.cuda.set_device(current_device)

    def wait(self, event: CudaEvent) -> None:
        """Let the stream wait for the event. The host does not wait."""
        event.moment.wait(self.stream)

    def record(self, event: CudaEvent) -> None:
        """Let the event happen after all earlier work of the stream."""
        event.moment.record(self.stream)


class CallersLane(CudaLane):
    """The stream that the caller computes in. The caller may change it at any time."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(torch.cuda.current_stream(device))
        self._device, self._index, self._handover = device, device.index, CudaEvent(self.stream)

    def follow(self) -> None:
        """Go on in the caller's current stream, after the work in the stream before."""
        if _current_stream(self._index) != self._name:
            super().record(self._handover)
            self._switch_to(torch.cuda.current_stream(self._device))
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
        self._peak_before = _allocated(self.device)["peak"]
        self._others_bytes: int | None = None  # what was in use before the first memory of this device

    @cached_property
    def library_bytes(self) -> int:
        """What CUDA's libraries take for matrix products in one stream."""
        return library_bytes(self.device)

    def expect(self, machine: Machine, seconds: Mapping[str, float]) -> None:
        """Nothing to do: the card runs in real time."""

    def event(self) -> CudaEvent:
        """A new event."""
        return CudaEvent(self._compute.stream)

    def allocate(self, nbytes: int) -> Tensor:
        """Allocate with torch, in the caller's stream. Torch aligns memory to 512 bytes."""
        if self._others_bytes is None:
            _taken_by_products(self.device)  # what libraries keep, they have now
            freed = _taken_by_products(self.device)
            self._others_bytes = _allocated(self.device)["current"] - (self.library_bytes - freed)
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
        """Unlock the pages. Pages are not locked in a forked process."""
        if home.nbytes and not torch.cuda._is_in_bad_fork():
            with torch.cuda.device(self.device):
                self._check(torch.cuda.cudart().cudaHostUnregister(home.data_ptr()), "unlock", home.nbytes)

    def begin(self) -> None:
        """Compute in the caller's stream. Refuse a forked process, and a stream that records a CUDA graph."""
        if torch.cuda._is_in_bad_fork():
            raise ExecutionError(_FORKED)
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
        """Block the host until the device has done all work. A forked process has none."""
        if not torch.cuda._is_in_bad_fork():
            torch.cuda.synchronize(self.device)

    def peak_bytes(self) -> int | None:
        """The peak of torch's allocator, without what others had in use before; None if an earlier peak hides it.

        Torch keeps only one peak for all of the process. We do not reset it, because it belongs to the user. After the
        user has reset it, nothing earlier hides ours any more.
        """
        peak = _allocated(self.device)["peak"]
        if peak < self._peak_before:
            self._peak_before = 0
        return peak - (self._others_bytes or 0) if peak > self._peak_before else None

    def close(self) -> None:
        """Nothing to end: the streams belong to torch."""

    def _check(self, code: Any, verb: str, nbytes: int) -> None:
        if int(code) != 0:
            self._clear_error()
            text = torch.cuda.cudart().cudaGetErrorString(code)
            advice = (
                ". Raise the limit of locked memory (`ulimit -l`, or memlock of the container), or free host memory"
            )
            raise ExecutionError(
                f"CUDA could not {verb} {readable(nbytes)} of host memory: {text} (error {int(code)})"
                + (advice if verb == "lock" else "")
            )

    def _clear_error(self) -> None:
        """Clear CUDA's last error. Otherwise torch raises it after its next kernel."""
        if (get := getattr(torch.cuda.cudart(), "cudaGetLastError", None)) is not None:
            get()
        else:
            with suppress(RuntimeError):
                torch.ones(1, device=self.device)  # a kernel: then torch reads and clears the error


@cache
def library_bytes(device: torch.device) -> int:
    """What CUDA's libraries take of a GPU's memory for matrix products in one stream. Torch keeps it, or most of it.

    Measured once, in the current stream. If this has it already, it is what torch documents.
    """
    return max(_taken_by_products(device), _documented_library_bytes(device))


def _taken_by_products(device: torch.device) -> int:
    """The bytes that two small matrix products allocate besides their results."""
    with torch.no_grad(), torch.autocast("cuda", enabled=False), no_dispatch():
        one, out = (torch.ones(16, 16, device=device) for _ in range(2))
        before = _allocated(device)["allocated"]  # a total, so that it includes what is freed at once
        torch.mm(one, one, out=out)  # by cuBLAS
        torch.addmm(one[0], one, one, out=out)  # by cuBLASLt
        return _allocated(device)["allocated"] - before


def _documented_library_bytes(device: torch.device) -> int:
    shared = LIGHT_KIB << 10 if _light_shares_memory() else 0
    if sizes := re.findall(r":(\d+):(\d+)", os.environ.get("CUBLAS_WORKSPACE_CONFIG", "")):
        return ((sum(int(kib) * int(count) for kib, count in sizes) + LIGHT_KIB) << 10) - shared
    is_new = torch.cuda.get_device_capability(device) >= (9, 0)
    return (LIBRARIES_FROM_HOPPER_ON if is_new else LIBRARIES_BEFORE_HOPPER) - shared


def _light_shares_memory() -> bool:
    """Whether cuBLASLt uses the memory of cuBLAS, as from torch 2.13 on."""
    return tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)


def _allocated(device: torch.device) -> dict[str, int]:
    """Torch's counts of bytes: `current`, `peak`, and the total `allocated`. Its other forms are 20 times slower."""
    counts: dict[str, int] = torch.cuda.memory_stats_as_nested_dict(device)["allocated_bytes"]["all"]
    return counts


def check(number: str, link_bytes_per_second: float | None) -> None:
    """Raise if torch sees no such GPU, or cannot use it in this process."""
    refuse_link("cuda", link_bytes_per_second)
    refuse_fork()
    if not torch.cuda.is_available():
        raise SettingsError(f"device 'cuda' is not available here{_why()}; device='cpu' runs every plan anywhere")
    if int(number or 0) >= torch.cuda.device_count():
        raise SettingsError(f"no such device: 'cuda:{number}'; torch sees {torch.cuda.device_count()} of that kind")


def refuse_fork() -> None:
    """Raise in a process that was forked after CUDA was in use."""
    if torch.cuda._is_in_bad_fork():
        raise SettingsError(_FORKED)


def _why() -> str:
    """Why CUDA does not start, if it does not."""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return f": {str(error).splitlines()[0]}"
    return ""


def create(number: str, link_bytes_per_second: float | None) -> CudaDevice:
    """Open a GPU by its number, or the current one."""
    refuse_fork()
    if why := _why():
        raise SettingsError(f"device 'cuda' cannot be used{why}; device='cpu' runs every plan anywhere")
    return CudaDevice(int(number) if number else torch.cuda.current_device())
