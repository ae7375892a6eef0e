"""Makes a trace from plain numbers: reads units as people write them, and refuses what makes no sense."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

from ..errors import SettingsError
from .trace import Boundary, Call, Piece, Trace, Weight, call_name

KNOWN = ("name", "seconds", "tensors", "transient_bytes", "tensor_seconds", "component")
REQUIRED = KNOWN[:3]


@dataclass(frozen=True, slots=True)
class Unit:
    """One unit as given, checked."""

    name: str
    seconds: float
    tensors: Mapping[str, int]
    transient_bytes: int
    tensor_seconds: Sequence[float]
    component: str


def trace_from_units(given: Iterable[Mapping[str, Any]]) -> Trace:
    """See `Trace.from_units`."""
    weights: dict[str, Weight] = {}
    calls: dict[str, Call] = {}
    times: dict[str, int] = {}
    for unit in _read_units(given):
        for tensor, nbytes in unit.tensors.items():
            if weights.setdefault(tensor, Weight(tensor, nbytes)).nbytes != nbytes:
                raise SettingsError(
                    f"unit {unit.name!r}: tensor {tensor!r} has {nbytes} bytes here, {weights[tensor].nbytes} elsewhere"
                )
        occurrence = times[unit.name] = times.get(unit.name, -1) + 1
        name = call_name(unit.name, occurrence, calls)
        calls[name] = Call(name, unit.name, _pieces(unit, occurrence), unit.component)
    if not calls:
        raise SettingsError("a trace needs at least one unit")
    return Trace(weights, tuple(calls.values()))


def _read_units(given: Iterable[Mapping[str, Any]]) -> Iterable[Unit]:
    if isinstance(given, Mapping | str) or not isinstance(given, Iterable):
        raise SettingsError(f"units are a list of dicts with {', '.join(KNOWN)}, not {type(given).__name__}")
    return [_read_unit(unit, f"unit {index}") for index, unit in enumerate(given)]


def _read_unit(unit: Mapping[str, Any], where: str) -> Unit:
    if not isinstance(unit, Mapping):
        raise SettingsError(f"{where}: {unit!r} is no dict with {', '.join(REQUIRED)}")
    for key in unit:
        if key not in KNOWN:
            raise SettingsError(f"{where}: unknown key {key!r}; known are {', '.join(KNOWN)}")
    for key in REQUIRED:
        if key not in unit:
            raise SettingsError(f"{where}: {key!r} is missing")
    name, tensors = unit["name"], unit["tensors"]
    if not isinstance(name, str) or not name:
        raise SettingsError(f"{where}: its name is {name!r}, not a text")
    if isinstance(tensors, str) or not isinstance(tensors, Mapping | Sequence):
        raise SettingsError(f"unit {name!r}: tensors are a list of bytes, or a dict of name to bytes, not {tensors!r}")
    named = tensors if isinstance(tensors, Mapping) else {f"{name}.{i}": nbytes for i, nbytes in enumerate(tensors)}
    shares = [_number(share, name, "tensor_seconds") for share in unit.get("tensor_seconds") or ()]
    if shares and len(shares) != len(named):
        raise SettingsError(f"unit {name!r}: {len(shares)} tensor_seconds for {len(named)} tensors")
    return Unit(
        name=name,
        seconds=_number(unit["seconds"], name, "seconds"),
        tensors={str(key): _count(nbytes, name, f"tensor {key!r}") for key, nbytes in named.items()},
        transient_bytes=_count(unit.get("transient_bytes", 0), name, "transient_bytes"),
        tensor_seconds=shares,
        component=str(unit.get("component", "")),
    )


def _number(value: Any, name: str, what: str) -> float:
    is_number = isinstance(value, Real) and not isinstance(value, bool) and 0 <= float(value) < math.inf
    if not is_number:
        raise SettingsError(f"unit {name!r}: {what} is {value!r}, it must be a finite number, zero or more")
    return float(value)


def _count(value: Any, name: str, what: str) -> int:
    number = _number(value, name, what)
    if number != int(number):
        raise SettingsError(f"unit {name!r}: {what} is {value!r}, it must be a whole number of bytes")
    return int(value)


def _pieces(unit: Unit, occurrence: int) -> tuple[Piece, ...]:
    """Make one piece; or one for each tensor if the seconds of each are known, so that the unit can be cut finer."""
    start, tensors = Boundary(unit.name, "enter", occurrence), tuple(unit.tensors)
    whole = sum(unit.tensor_seconds)
    if not tensors or not whole:
        return (Piece(start, tensors, seconds=unit.seconds, transient_bytes=unit.transient_bytes),)
    inner = (Boundary(f"{unit.name}.{i}", "enter", occurrence) for i in range(1, len(tensors)))
    return tuple(
        Piece(place, (tensor,), seconds=unit.seconds * share / whole, transient_bytes=unit.transient_bytes)
        for place, tensor, share in zip((start, *inner), tensors, unit.tensor_seconds, strict=True)
    )
