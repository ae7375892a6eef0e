"""How fast a machine copies and computes, and the memory that its libraries take: known cards by name, or this machine
measured in a few seconds.

Figures only. This module never looks at a model or a plan, and never decides anything.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cache
from numbers import Real
from typing import Any

import torch

from ..errors import SettingsError, shown
from .graph import Link

SHARED = ", memory shared with the CPU"  # the name of such a GPU ends with it, in brackets


@dataclass(frozen=True, slots=True)
class Machine:
    """The rates that predict a plan: the link in both directions, the latency of one copy, and compute.

    A copy takes `latency_seconds + nbytes / h2d_bytes_per_second` (or d2h). `memory_bytes_per_second` counts bytes
    read plus bytes written. `library_bytes` is the device memory that CUDA's libraries take for matrix products.

    >>> Machine("my card", 25e9, 25e9, 10e-6, 1e14, 9e11).h2d_bytes_per_second
    25000000000.0
    """

    name: str
    h2d_bytes_per_second: float
    d2h_bytes_per_second: float
    latency_seconds: float
    compute_flops: float
    memory_bytes_per_second: float
    library_bytes: int = 0

    def __post_init__(self) -> None:
        """Refuse rates that would make a prediction meaningless."""
        if not isinstance(self.name, str):
            raise SettingsError(f"machine: name is {shown(self.name)}, it must be a text")
        for key in _NUMBERS:
            value = getattr(self, key)
            if not isinstance(value, Real) or isinstance(value, bool) or not math.isfinite(value):
                raise SettingsError(f"machine {shown(self.name)}: {key} is {shown(value)}, it must be a finite number")
            if value < 0 or (value == 0 and key not in _MAY_BE_ZERO):
                allowed = "zero or more" if key in _MAY_BE_ZERO else "more than zero"
                raise SettingsError(f"machine {shown(self.name)}: {key} is {shown(value)}, it must be {allowed}")

    @staticmethod
    def preset(name: str) -> Machine:
        """Give a known card by its name. The rates are what programs reach, a share of what the data sheet says.

        >>> Machine.preset("rtx4090").h2d_bytes_per_second
        25000000000.0
        """
        if name not in _PRESETS:
            raise SettingsError(
                f"unknown machine {shown(name)}; known are {', '.join(_PRESETS)}. "
                f"Machine.measure() measures the one at hand, Machine(...) takes its rates as numbers"
            )
        return _PRESETS[name]

    @staticmethod
    def presets() -> tuple[str, ...]:
        """The names of the known cards."""
        return tuple(_PRESETS)

    @staticmethod
    def of(value: Machine | str | None) -> Machine:
        """Give the machine that an argument names: a machine, a preset's name, or None for this machine.

        This machine is measured once per process where CUDA is available; elsewhere it is the preset "cpu".

        >>> Machine.of("h100") is Machine.of(Machine.preset("h100"))
        True
        """
        if isinstance(value, Machine):
            return value
        if isinstance(value, str):
            return Machine.preset(value)
        if value is None:
            return _measured_once(torch.cuda.current_device()) if torch.cuda.is_available() else Machine.preset("cpu")
        raise SettingsError(
            f"machine is {shown(value)}; give a Machine, the name of a preset, or None for this machine"
        )

    @staticmethod
    def measure(device: str | torch.device = "cuda") -> Machine:
        """Measure a CUDA device: its link, its compute rates and its libraries; or the CPU with its memory as the link.

        The random state stays as it was. The device memory that was used goes back to the driver. A GPU may share its
        memory with the CPU (an integrated one): the machine's name says so, because offloading cannot help there.

        >>> Machine.measure("cpu").name
        'cpu (measured)'
        """
        from ..runtime.rates import measure

        return measure(device)

    @property
    def shares_memory(self) -> bool:
        """Whether this is a GPU that shares its memory with the CPU.

        >>> Machine.preset("h100").shares_memory
        False
        """
        return self.name.endswith(f"{SHARED})")

    def copy_seconds(self, link: Link, nbytes: int) -> float:
        """Seconds that one copy takes on a link.

        >>> Machine.preset("rtx4090").copy_seconds("h2d", 250_000_000)
        0.01001
        """
        rate = self.h2d_bytes_per_second if link == "h2d" else self.d2h_bytes_per_second
        return self.latency_seconds + nbytes / rate

    def to_dict(self) -> dict[str, str | float]:
        """Give plain text and floats, for a plan file. `library_bytes` is there if it is not zero.

        >>> Machine.preset("rtx4090").to_dict()["latency_seconds"]
        1e-05
        """
        values = {key: value if key == "name" else float(value) for key, value in asdict(self).items()}
        return {key: value for key, value in values.items() if value or key not in _OPTIONAL}

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Machine:
        """Read what `to_dict` gave, and refuse anything else.

        >>> Machine.from_dict(Machine.preset("a100").to_dict()) == Machine.preset("a100")
        True
        """
        expected = {"name", *_NUMBERS}
        if wrong := expected.symmetric_difference(values) - (_OPTIONAL - set(values)):
            key = min(wrong, key=str)
            problem = "is missing" if key in expected else f"is unknown; known are {', '.join(sorted(expected))}"
            raise SettingsError(f"machine: key {key!r} {problem}")
        return Machine(**values)


_NUMBERS = tuple(field.name for field in fields(Machine) if field.name != "name")
_OPTIONAL = {"library_bytes"}
_MAY_BE_ZERO = {"latency_seconds", "library_bytes"}


# Presets
#
# The cards' tensor rates and memory bandwidths are NVIDIA's: dense bf16/fp16 with fp32 accumulation (half of what the
# data sheets print "with sparsity"). A large matmul alone reaches 70-95% of that; a whole transformer's forward, with
# its attention and its smaller shapes, about 60%. Streaming kernels reach about 90% of the memory bandwidth.
#
# PCIe 4.0 x16 carries 31.5 GB/s each way, 5.0 x16 twice that (PCI-SIG); after packet overhead, pinned copies reach
# 25 and 55 GB/s, and one copy costs about 10 microseconds besides its bytes.
#
# Torch gives cuBLAS a workspace of 32 MiB on Hopper and Blackwell, and of 8.125 MiB on older cards (two of 4 MiB, eight
# of 16 KiB), and cuBLASLt 1 MiB, before 2.13; CUBLAS_WORKSPACE_CONFIG and CUBLASLT_WORKSPACE_SIZE change that.

_SHARE_OF_COMPUTE = 0.6
_SHARE_OF_MEMORY = 0.9
_PCIE_4_X16 = 25e9
_PCIE_5_X16 = 55e9
LIGHT_KIB = 1024  # for cuBLASLt; the rest is for cuBLAS
LIBRARIES_BEFORE_HOPPER = (8320 + LIGHT_KIB) << 10
LIBRARIES_FROM_HOPPER_ON = (32768 + LIGHT_KIB) << 10


def _card(name: str, link: float, peak_flops: float, peak_memory: float, libraries: int) -> Machine:
    return Machine(name, link, link, 10e-6, _SHARE_OF_COMPUTE * peak_flops, _SHARE_OF_MEMORY * peak_memory, libraries)


_PRESETS = {
    machine.name: machine
    for machine in (
        # GeForce RTX 3060 12 GB. The GA102 white paper gives 512 flops per clock and SM; 28 SMs at 1.777 GHz.
        _card("rtx3060", _PCIE_4_X16, 25.5e12, 360e9, LIBRARIES_BEFORE_HOPPER),
        # GeForce RTX 4090: NVIDIA Ada GPU architecture white paper, appendix A.
        _card("rtx4090", _PCIE_4_X16, 165.2e12, 1008e9, LIBRARIES_BEFORE_HOPPER),
        # GeForce RTX 5090: NVIDIA RTX Blackwell GPU architecture white paper, appendix A.
        _card("rtx5090", _PCIE_5_X16, 209.5e12, 1792e9, LIBRARIES_FROM_HOPPER_ON),
        # A100 80 GB SXM: NVIDIA A100 Tensor Core GPU data sheet.
        _card("a100", _PCIE_4_X16, 312e12, 2039e9, LIBRARIES_BEFORE_HOPPER),
        # H100 SXM: NVIDIA H100 Tensor Core GPU data sheet.
        _card("h100", _PCIE_5_X16, 989.4e12, 3350e9, LIBRARIES_FROM_HOPPER_ON),
        # H200 SXM: NVIDIA H200 Tensor Core GPU data sheet.
        _card("h200", _PCIE_5_X16, 989.4e12, 4800e9, LIBRARIES_FROM_HOPPER_ON),
        # A desktop: eight cores with AVX2 near 3.5 GHz (0.9 TFLOP/s fp32, about half achieved) and two channels of
        # DDR4-3200 (51.2 GB/s, JEDEC). Its link is a copy within that memory: each byte is read and written.
        Machine("cpu", 15e9, 15e9, 10e-6, 4e11, 40e9),
    )
}


@cache
def _measured_once(cuda_index: int) -> Machine:
    return Machine.measure(f"cuda:{cuda_index}")
