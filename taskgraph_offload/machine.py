"""How fast a machine copies and computes: known cards by name, or this machine measured in a few seconds.

Rates only. This module never looks at a model or a plan, and never decides anything.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from functools import cache
from numbers import Real
from typing import Any

import torch

from .errors import SettingsError
from .graph import Lane


@dataclass(frozen=True, slots=True)
class Machine:
    """The rates that predict a plan: the link both ways, what one copy costs besides its bytes, and compute.

    A copy takes `latency_seconds + nbytes / h2d_bytes_per_second` (or d2h). `memory_bytes_per_second` counts bytes
    read plus bytes written.

    >>> Machine("my card", 25e9, 25e9, 10e-6, 1e14, 9e11).h2d_bytes_per_second
    25000000000.0
    """

    name: str
    h2d_bytes_per_second: float
    d2h_bytes_per_second: float
    latency_seconds: float
    compute_flops: float
    memory_bytes_per_second: float

    def __post_init__(self) -> None:
        """Refuse rates that would make a prediction meaningless."""
        if not isinstance(self.name, str):
            raise SettingsError(f"machine: name is {self.name!r}, it must be a text")
        for key in _NUMBERS:
            value = getattr(self, key)
            if not isinstance(value, Real) or isinstance(value, bool) or not math.isfinite(value):
                raise SettingsError(f"machine {self.name!r}: {key} is {value!r}, it must be a finite number")
            if value < 0 or (value == 0 and key != "latency_seconds"):
                allowed = "zero or more" if key == "latency_seconds" else "more than zero"
                raise SettingsError(f"machine {self.name!r}: {key} is {value!r}, it must be {allowed}")

    @staticmethod
    def preset(name: str) -> Machine:
        """Give a known card by its name: what it achieves, a share of what its data sheet says.

        >>> Machine.preset("rtx4090").h2d_bytes_per_second
        25000000000.0
        """
        if name not in _PRESETS:
            raise SettingsError(
                f"unknown machine {name!r}; known are {', '.join(_PRESETS)}. "
                f"Machine.measure() measures the one at hand, Machine(...) takes its rates as numbers"
            )
        return _PRESETS[name]

    @staticmethod
    def presets() -> tuple[str, ...]:
        """The names of the known cards."""
        return tuple(_PRESETS)

    @staticmethod
    def of(value: Machine | str | None) -> Machine:
        """Give the machine that an argument means: itself, a preset's name, or (None) the machine at hand.

        The machine at hand is measured once per process where CUDA is available; elsewhere it is the preset "cpu".

        >>> Machine.of("h100") is Machine.of(Machine.preset("h100"))
        True
        """
        if isinstance(value, Machine):
            return value
        if isinstance(value, str):
            return Machine.preset(value)
        if value is None:
            return _measured_once(torch.cuda.current_device()) if torch.cuda.is_available() else Machine.preset("cpu")
        raise SettingsError(f"machine is {value!r}; give a Machine, the name of a preset, or None for this machine")

    @staticmethod
    def measure(device: str | torch.device = "cuda") -> Machine:
        """Measure the link and the compute rates of a CUDA device, or of the CPU with its memory as the link.

        The random state stays as it was, and the device memory that was used goes back to the driver.

        >>> Machine.measure("cpu").name
        'cpu (measured)'
        """
        place = _known_device(device)
        if place.type == "cpu":
            return _measure("cpu (measured)", place, _ON_CPU, _seconds_by_clock)
        with torch.cuda.device(place):
            machine = _measure(f"{torch.cuda.get_device_name()} (measured)", place, _ON_CUDA, _seconds_by_events)
            torch.cuda.empty_cache()
        return machine

    def copy_seconds(self, lane: Lane, nbytes: int) -> float:
        """Seconds that one copy takes on the link.

        >>> Machine.preset("rtx4090").copy_seconds("h2d", 250_000_000)
        0.01001
        """
        rate = self.h2d_bytes_per_second if lane == "h2d" else self.d2h_bytes_per_second
        return self.latency_seconds + nbytes / rate

    def to_dict(self) -> dict[str, str | float]:
        """Give plain text and floats, for a plan file.

        >>> Machine.preset("rtx4090").to_dict()["latency_seconds"]
        1e-05
        """
        return {key: value if key == "name" else float(value) for key, value in asdict(self).items()}

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Machine:
        """Read what `to_dict` gave, and refuse anything else.

        >>> Machine.from_dict(Machine.preset("a100").to_dict()) == Machine.preset("a100")
        True
        """
        expected = {"name", *_NUMBERS}
        if wrong := expected.symmetric_difference(values):
            key = min(wrong, key=str)
            problem = "is missing" if key in expected else f"is unknown; known are {', '.join(sorted(expected))}"
            raise SettingsError(f"machine: key {key!r} {problem}")
        return Machine(**values)


_NUMBERS = tuple(field.name for field in fields(Machine) if field.name != "name")


# Presets
#
# The cards' tensor rates and memory bandwidths are NVIDIA's: dense bf16/fp16 with fp32 accumulation (half of what the
# data sheets print "with sparsity"). A large matmul alone reaches 70-95% of that; a whole transformer's forward, with
# its attention and its smaller shapes, about 60%. Streaming kernels reach about 90% of the memory bandwidth.
#
# PCIe 4.0 x16 carries 31.5 GB/s each way, 5.0 x16 twice that (PCI-SIG); after packet overhead, pinned copies reach
# 25 and 55 GB/s, and one copy costs about 10 microseconds besides its bytes.

_SHARE_OF_COMPUTE = 0.6
_SHARE_OF_MEMORY = 0.9
_PCIE_4_X16 = 25e9
_PCIE_5_X16 = 55e9


def _card(name: str, link: float, peak_flops: float, peak_memory: float) -> Machine:
    return Machine(name, link, link, 10e-6, _SHARE_OF_COMPUTE * peak_flops, _SHARE_OF_MEMORY * peak_memory)


_PRESETS = {
    machine.name: machine
    for machine in (
        # GeForce RTX 3060 12 GB. The GA102 white paper gives 512 flops per clock and SM; 28 SMs at 1.777 GHz.
        _card("rtx3060", _PCIE_4_X16, 25.5e12, 360e9),
        # GeForce RTX 4090: NVIDIA Ada GPU architecture white paper, appendix A.
        _card("rtx4090", _PCIE_4_X16, 165.2e12, 1008e9),
        # GeForce RTX 5090: NVIDIA RTX Blackwell GPU architecture white paper, appendix A.
        _card("rtx5090", _PCIE_5_X16, 209.5e12, 1792e9),
        # A100 80 GB SXM: NVIDIA A100 Tensor Core GPU data sheet.
        _card("a100", _PCIE_4_X16, 312e12, 2039e9),
        # H100 SXM: NVIDIA H100 Tensor Core GPU data sheet.
        _card("h100", _PCIE_5_X16, 989.4e12, 3350e9),
        # H200 SXM: NVIDIA H200 Tensor Core GPU data sheet.
        _card("h200", _PCIE_5_X16, 989.4e12, 4800e9),
        # A desktop: eight cores with AVX2 near 3.5 GHz (0.9 TFLOP/s fp32, about half achieved) and two channels of
        # DDR4-3200 (51.2 GB/s, JEDEC). Its link is a copy within that memory: each byte is read and written.
        Machine("cpu", 15e9, 15e9, 10e-6, 4e11, 40e9),
    )
}


# Measuring
#
# One procedure for every device; only the clock and the sizes differ. Each figure is the median of several runs after
# a first run that does not count.


@dataclass(frozen=True, slots=True)
class _Sizes:
    """What is copied and multiplied: beyond the last cache, yet done in a second or two."""

    link_bytes: int
    memory_bytes: int
    matmul_side: int


_ON_CPU = _Sizes(link_bytes=128 << 20, memory_bytes=128 << 20, matmul_side=1024)
_ON_CUDA = _Sizes(link_bytes=64 << 20, memory_bytes=256 << 20, matmul_side=8192)
_SMALL_BYTES = 4096
_SMALL_COPIES = 50
_RUNS = 5

_Clock = Callable[[Callable[[], object], int], float]


@cache
def _measured_once(cuda_index: int) -> Machine:
    return Machine.measure(f"cuda:{cuda_index}")


def _known_device(device: str | torch.device) -> torch.device:
    try:
        place = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise SettingsError(f"no such device: {device!r}; measure 'cuda' or 'cpu'") from error
    if place.type not in ("cuda", "cpu"):
        raise SettingsError(f"cannot measure {device!r}; measure 'cuda' or 'cpu'")
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise SettingsError(
            f"cannot measure {str(device)!r}: torch sees {torch.cuda.device_count()} CUDA devices here; "
            f"measure 'cpu', or take a preset: {', '.join(_PRESETS)}"
        )
    return place


def _measure(name: str, device: torch.device, sizes: _Sizes, clock: _Clock) -> Machine:
    h2d, d2h, latency = _measure_link(device, sizes.link_bytes, clock)
    return Machine(
        name=name,
        h2d_bytes_per_second=h2d,
        d2h_bytes_per_second=d2h,
        latency_seconds=latency,
        compute_flops=_measure_matmul(device, sizes.matmul_side, clock),
        memory_bytes_per_second=_measure_memory(device, sizes.memory_bytes, clock),
    )


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
    # Random numbers, since a card computes on zeros faster than it can on weights; from a generator of our own, since
    # the caller's seed is not ours to advance.
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
    # Written once, so that its pages exist: a fresh page of zeros is not yet memory, and copies too fast.
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
