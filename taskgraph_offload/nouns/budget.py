"""Reads a memory budget as people write it (12, "12GiB", "800MiB", "123456B", "30%"); writes bytes and seconds."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from numbers import Real

from ..errors import SettingsError, shown

GIB = 2**30
MOST = 2**60  # bytes: 1 EiB
_UNITS = {
    "b": 1,
    "kib": 2**10,
    "mib": 2**20,
    "gib": GIB,
    "tib": 2**40,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
}
_POSSIBLE = "more than zero, and at most 1 EiB"
_ADVICE = "give GiB as a number, or '800MiB', '123456B', or '30%' of the weights"


@dataclass(frozen=True, slots=True)
class Budget:
    """A budget as asked for: bytes for everything, or a share of the weights with activations on top."""

    nbytes: int | None = None
    share: float | None = None

    def total_bytes(self, weight_bytes: int, other_bytes: int) -> int:
        """The bytes that everything together may take, for a model with these weights and other needs."""
        return self.nbytes if self.nbytes is not None else math.ceil(weight_bytes * (self.share or 0.0)) + other_bytes


def parse_budget(value: float | str) -> Budget:
    """Read a budget, or raise `SettingsError`.

    >>> parse_budget(1.5), parse_budget("800 MiB").nbytes, parse_budget("30%").share
    (Budget(nbytes=1610612736, share=None), 838860800, 0.3)
    """
    if isinstance(value, str):
        return _parse_text(value)
    if isinstance(value, bool) or not isinstance(value, Real):
        raise SettingsError(f"budget {shown(value)} is not an amount of memory; {_ADVICE}")
    if not 0 < value <= MOST / GIB:
        raise SettingsError(f"budget {shown(value)} must be {_POSSIBLE}; {_ADVICE}")
    return Budget(nbytes=int(value * GIB))


def _parse_text(text: str) -> Budget:
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([A-Za-z]+|%)?\s*", text)
    if found is None or (found[2] or "GiB").lower() not in (*_UNITS, "%"):
        raise SettingsError(f"cannot read the budget {shown(text)}; {_ADVICE}")
    number, unit = float(found[1]), (found[2] or "GiB").lower()
    if not 0 < number * _UNITS.get(unit, 1) <= MOST:
        raise SettingsError(f"budget {shown(text)} must be {_POSSIBLE}; {_ADVICE}")
    if unit == "%":
        return Budget(share=number / 100)
    return Budget(nbytes=int(found[1]) if unit == "b" and found[1].isdigit() else int(number * _UNITS[unit]))


def readable(nbytes: float) -> str:
    """Bytes as people read them.

    >>> readable(12 * 2**30), readable(800), readable(1.5 * 2**20)
    ('12.00 GiB', '800 B', '1.5 MiB')
    """
    if abs(nbytes) >= GIB:
        return f"{nbytes / GIB:.2f} GiB"
    if abs(nbytes) >= 2**20:
        return f"{nbytes / 2**20:.1f} MiB"
    return f"{nbytes / 2**10:.1f} KiB" if abs(nbytes) >= 2**10 else f"{nbytes:.0f} B"


def readable_seconds(seconds: float) -> str:
    """Seconds as people read them.

    >>> readable_seconds(1.5), readable_seconds(0.0123)
    ('1.500 s', '12.30 ms')
    """
    if seconds >= 1:
        return f"{seconds:.3f} s"
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} us"
