"""Measures a machine: how fast its link copies, how fast it computes, and the memory that its libraries take.

Every device is measured in the same way; only the clock and the sizes differ. Each figure is the median of several
runs, after a first run that does not count.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..devices.cuda import library_bytes, refuse_fork
from ..errors import SettingsError
from ..nouns.machine import SHARED, Machine
from ..nouns.progress import report


@dataclass(frozen=True, slots=True)
class _Sizes:
    """How much is copied and multiplied: too much for the caches, but it takes only a second or two."""

    link_bytes: int
    memory_bytes: int
    matmul_side: int


_ON_CPU = _Sizes(link_bytes=128 << 20, memory_bytes=128 << 20, matmul_side=1024)
_ON_CUDA = _Sizes(link_bytes=64 << 20, memory_bytes=256 << 20, matmul_side=8192)
_SMALL_BYTES = 4096
_SMALL_COPIES = 50
_RUNS = 5

_Clock = Callable[[Callable[[], object], int], float]


def measure(device: str | torch.device) -> Machine:
    """See `Machine.measure`."""
    place = _known_device(device)
    if place.type == "cpu":
        return _measure("cpu (measured)", place, _ON_CPU, _seconds_by_clock)
    with torch.cuda.device(place):
        name = f"{torch.cuda.get_device_name()} (measured{SHARED if _is_integrated(place) else ''})"
        machine = _measure(name, place, _ON_CUDA, _seconds_by_events)
        torch.cuda.empty_cache()
    return machine


def _known_device(device: str | torch.device) -> torch.device:
    try:
        place = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise SettingsError(f"no such device: {device!r}; measure 'cuda' or 'cpu'") from error
    if place.type not in ("cuda", "cpu"):
        raise SettingsError(f"cannot measure {device!r}; measure 'cuda' or 'cpu'")
    if place.type == "cuda":
        refuse_fork()
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise SettingsError(
            f"cannot measure {str(device)!r}: torch sees {torch.cuda.device_count()} CUDA devices here; "
            f"measure 'cpu', or take a preset: {', '.join(Machine.presets())}"
        )
    return place


def _is_integrated(device: torch.device) -> bool:
    """Whether a GPU uses the CPU's memory. Older versions of torch cannot tell."""
    return bool(getattr(torch.cuda.get_device_properties(device), "is_integrated", False))


def _measure(name: str, device: torch.device, sizes: _Sizes, clock: _Clock) -> Machine:
    report("rates measured", 0, 3)
    libraries = library_bytes(device) if device.type == "cuda" else 0
    h2d, d2h, latency = _measure_link(device, sizes.link_bytes, clock)
    report("rates measured", 1, 3)
    flops = _measure_matmul(device, sizes.matmul_side, clock)
    report("rates measured", 2, 3)
    memory = _measure_memory(device, sizes.memory_bytes, clock)
    report("rates measured", 3, 3)
    return Machine(name, h2d, d2h, latency, flops, memory, libraries)


def _measure_link(device: torch.device, nbytes: int, clock: _Clock) -> tuple[float, float, float]:
    home = _filled(nbytes, torch.device("cpu"), pinned=device.type == "cuda")
    seat = _filled(nbytes, device)
    small_home, small_seat = home[:_SMALL_BYTES], seat[:_SMALL_BYTES]
    h2d = clock(lambda: seat.copy_(home, non_blocking=True), 1)
    d2h = clock(lambda: home.copy_(seat, non_blocking=True), 1)
    small = clock(lambda: small_seat.copy_(small_home, non_blocking=True), _SMALL_COPIES)
    return nbytes / h2d, nbytes / d2h, small


def _measure_memory(device: torch.device, nbytes: int, clock: _Clock) -> float:
    source, target = _filled(nbytes, device), _filled(nbytes, device)
    return 2 * nbytes / clock(lambda: target.copy_(source), 1)


def _measure_matmul(device: torch.device, side: int, clock: _Clock) -> float:
    # Random numbers, because a card multiplies zeros faster than weights. A generator of our own, because measuring
    # must not change the random numbers that the caller gets later.
    dtype = _matmul_dtype(device)
    generator = torch.Generator(device).manual_seed(0)
    left, right = (torch.randn(side, side, device=device, dtype=dtype, generator=generator) for _ in range(2))
    product = torch.empty_like(left)
    return 2 * side**3 / clock(lambda: torch.mm(left, right, out=product), 1)


def _matmul_dtype(device: torch.device) -> torch.dtype:
    if device.type == "cpu":
        return torch.float32
    has_bfloat16 = torch.cuda.get_device_capability(device) >= (8, 0)  # older cards only emulate it, slowly
    return torch.bfloat16 if has_bfloat16 else torch.float16


def _filled(nbytes: int, device: torch.device, pinned: bool = False) -> torch.Tensor:
    # Written once, so that the system allocates the pages: copying pages that were never written is too fast.
    return torch.empty(nbytes, dtype=torch.uint8, device=device, pin_memory=pinned).fill_(1)


def _seconds_by_clock(action: Callable[[], object], times: int) -> float:
    def run() -> float:
        start = time.perf_counter()
        for _ in range(times):
            action()
        return (time.perf_counter() - start) / times

    run()
    return statistics.median(run() for _ in range(_RUNS))


def _seconds_by_events(action: Callable[[], object], times: int) -> float:
    def run() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(times):
            action()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1000 / times

    run()
    return statistics.median(run() for _ in range(_RUNS))
