"""One file for each device. There is no list of devices: a new file here is a new device.

Besides its device, each file has two functions. `check` raises `SettingsError` if there is no such device here, and
`create` opens it. Both take the number after the colon (`1` in "cuda:1") and the rate of the link, or None.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType
from typing import Any

import torch

from ..errors import SettingsError
from .base import Device


def names() -> tuple[str, ...]:
    """The kinds of devices that there are.

    >>> names()
    ('checked', 'cpu', 'cuda', 'virtual')
    """
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name != "base"))


def check_device(name: str | torch.device | None, link_bytes_per_second: float | None = None) -> None:
    """Raise `SettingsError` if there is no such device here.

    >>> check_device("checked:7")
    """
    file, number = _find(name)
    file.check(number, link_bytes_per_second)


def open_device(name: str | torch.device | None, link_bytes_per_second: float | None = None) -> Device[Any]:
    """Open a device: "cuda", "cuda:1", "cpu", "virtual", "checked" or "checked:7" (7 is a seed). None: a GPU if any.

    >>> device = open_device("cpu")
    >>> device.close()
    """
    file, number = _find(name)
    file.check(number, link_bytes_per_second)
    device: Device[Any] = file.create(number, link_bytes_per_second)
    return device


def _find(name: str | torch.device | None) -> tuple[ModuleType, str]:
    """The file of a device, and the number after the colon of its name."""
    wanted = str(name) if name is not None else "cuda" if torch.cuda.is_available() else "cpu"
    kind, colon, number = wanted.partition(":")
    if kind not in names() or (colon and not number.isdecimal()):
        raise SettingsError(f"no such device: {wanted!r}; use one of {', '.join(names())}, or 'cuda:1', 'checked:7'")
    return importlib.import_module(f"{__name__}.{kind}"), number
