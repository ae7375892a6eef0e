"""One file per device, and how to open one by its name."""

from __future__ import annotations

from typing import Any

import torch

from ..errors import SettingsError
from .base import Device


def check_device(name: str | torch.device | None, link_bytes_per_second: float | None = None) -> None:
    """Raise `SettingsError` if there is no such device here.

    >>> check_device("checked:7")
    """
    kind, number = _read(name)
    if kind not in ("cuda", "cpu", "checked") or (number and (kind == "cpu" or not number.isdigit())):
        raise SettingsError(f"no such device: {str(name)!r}; there are 'cuda', 'cuda:1', 'cpu', 'checked', 'checked:7'")
    if link_bytes_per_second is not None and (kind != "cpu" or not link_bytes_per_second > 0):
        raise SettingsError(
            f"link_bytes_per_second={link_bytes_per_second!r} with device {kind!r}; "
            "it is a rate above zero, for device='cpu', which then copies as slowly as a real link"
        )
    if kind == "cuda" and not torch.cuda.is_available():
        raise SettingsError("device 'cuda' is not available here; device='cpu' runs every plan anywhere")
    if kind == "cuda" and int(number or 0) >= torch.cuda.device_count():
        raise SettingsError(f"no such device: {str(name)!r}; torch sees {torch.cuda.device_count()} of that kind")


def open_device(name: str | torch.device | None, link_bytes_per_second: float | None = None) -> Device[Any]:
    """Open a device: "cuda", "cuda:1", "cpu", "checked", or "checked:7" (the seed); by default the best there is.

    >>> device = open_device("cpu")
    >>> device.close()
    """
    check_device(name, link_bytes_per_second)
    kind, number = _read(name)
    if kind == "cpu":
        from .cpu import CpuDevice

        return CpuDevice(link_bytes_per_second)
    if kind == "checked":
        from .checked import CheckedDevice

        return CheckedDevice(int(number or 0))
    from .cuda import CudaDevice

    return CudaDevice(int(number) if number else torch.cuda.current_device())


def _read(name: str | torch.device | None) -> tuple[str, str]:
    """The kind of a device, and its number or seed."""
    wanted = str(name) if name is not None else "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, number = wanted.partition(":")
    return kind, number
