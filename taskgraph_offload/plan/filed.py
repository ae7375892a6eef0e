"""Nouns read back from a plan file, every value checked: a file may hold anything, a plan may not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ..errors import PlanError
from ..nouns.machine import Machine
from ..nouns.trace import Activation, Boundary, Call, Piece, Trace, Weight
from .plan import Bound, Outlook

SOURCES = ("fake", "real", "symbolic", "units")
SIDES = ("enter", "exit")
TRACE_KEYS = ("entry", "source", "fixed", "weights", "calls", "activations")


def trace_of(given: Any, model: Any) -> Trace:
    """A trace, whose parts fit together."""
    parts = dict_of(given, TRACE_KEYS, "the trace")
    weights = [_weight(row) for row in _rows(parts["weights"], "weights")]
    calls = tuple(_call(row) for row in _rows(parts["calls"], "calls"))
    if not calls:
        raise PlanError("the trace has no call")
    _all_different([weight.name for weight in weights], "weight")
    _all_different([call.name for call in calls], "call")
    fixed = dict_of(parts["fixed"], None, "fixed")
    count = sum(len(call.pieces) for call in calls)
    return Trace(
        weights={weight.name: weight for weight in weights},
        calls=calls,
        activations=tuple(_activation(row, count) for row in _rows(parts["activations"], "activations")),
        model=_text(model, "model"),
        entry=_text(parts["entry"], "entry"),
        source=_one_of(parts["source"], SOURCES, "source"),
        fixed={_text(name, "fixed"): _text(reason, "fixed") for name, reason in fixed.items()},
    )


def machine_of(given: Any) -> Machine:
    """A machine; its own checks refuse rates that make no sense."""
    rates = dict_of(given, tuple(Machine.__slots__), "the machine")
    return Machine.from_dict({key: value if key == "name" else _seconds(value, key) for key, value in rates.items()})


def bound_of(given: Any) -> Bound:
    """A bound."""
    return Bound(
        **{key: _seconds(value, key) for key, value in dict_of(given, tuple(Bound.__slots__), "bound").items()}
    )


def outlook_of(given: Any) -> Outlook | None:
    """An outlook, if there is one."""
    if given is None:
        return None
    outlook = dict_of(given, tuple(Outlook.__slots__), "outlook")
    more = _seconds(outlook["one_more_gib_step_seconds"], "one_more_gib_step_seconds")
    return Outlook(_count(outlook["no_stall_bytes"], "no_stall_bytes"), more)


def dict_of(given: Any, keys: Sequence[str] | None, where: str) -> dict[Any, Any]:
    """A dict with exactly these keys, or with any."""
    if not isinstance(given, dict):
        raise PlanError(f"{where} is {given!r:.60}, not keys with values")
    if keys is not None:
        for key in keys:
            if key not in given:
                raise PlanError(f"{where} has no {key!r}")
        for key in given:
            if key not in keys:
                raise PlanError(f"{where} has an unknown key {key!r}; it has {', '.join(keys)}")
    return given


def _weight(row: Any) -> Weight:
    name, nbytes, dtype, shape, aliases = _row(row, 5, "a weight")
    sizes = tuple(_count(size, f"a size of {name!r}") for size in _rows(shape, f"the shape of {name!r}"))
    return Weight(
        _text(name, "name"), _count(nbytes, "nbytes"), _text(dtype, "dtype"), sizes, _names(aliases, "aliases")
    )


def _call(row: Any) -> Call:
    name, block, component, pieces = _row(row, 4, "a call")
    where = f"call {name!r}"
    found = tuple(_piece(piece, where) for piece in _rows(pieces, f"the pieces of {where}"))
    if not found:
        raise PlanError(f"{where} has no piece")
    block = None if block is None else _text(block, f"the block of {where}")
    return Call(_text(name, "the name of a call"), block, found, _text(component, f"the component of {where}"))


def _piece(row: Any, where: str) -> Piece:
    boundary, reads, writes, flops, flop_bytes, other_bytes, transient_bytes, seconds = _row(
        row, 8, f"a piece of {where}"
    )
    module, side, occurrence = _row(boundary, 3, f"a boundary of {where}")
    return Piece(
        Boundary(_text(module, "a module"), _one_of(side, SIDES, "side"), _count(occurrence, "occurrence")),
        _names(reads, f"the reads of {where}"),
        _names(writes, f"the writes of {where}"),
        _count(flops, "flops"),
        _count(flop_bytes, "flop_bytes"),
        _count(other_bytes, "other_bytes"),
        _count(transient_bytes, "transient_bytes"),
        None if seconds is None else _seconds(seconds, f"the seconds of {where}"),
    )


def _activation(row: Any, pieces: int) -> Activation:
    name, nbytes, producer, uses, until = _row(row, 5, "an activation")
    where = f"activation {name!r}"
    places = [_count(use, f"a use of {where}") for use in _rows(uses, f"the uses of {where}")]
    begins = -1 if producer == -1 else _count(producer, f"the producer of {where}")
    if not (begins < pieces and max(places, default=0) < pieces and begins < _count(until, where) <= pieces):
        raise PlanError(f"{where} lives from piece {producer} to {until}, of {pieces}")
    return Activation(_text(name, "the name of an activation"), _count(nbytes, where), begins, tuple(places), until)


def _rows(given: Any, where: str) -> list[Any]:
    if given is None:  # YAML's empty list
        return []
    if not isinstance(given, list):
        raise PlanError(f"{where} are {given!r:.60}, not a list")
    return given


def _row(given: Any, length: int, where: str) -> list[Any]:
    if not isinstance(given, list) or len(given) != length:
        raise PlanError(f"{where} reads {given!r:.60}, not a list of {length}")
    return given


def _names(given: Any, where: str) -> tuple[str, ...]:
    return tuple(_text(name, where) for name in _rows(given, where))


def _text(given: Any, where: str) -> str:
    if not isinstance(given, str):
        raise PlanError(f"{where}: {given!r:.60} is no text")
    return given


def _one_of(given: Any, accepted: Sequence[str], where: str) -> Any:
    if given not in accepted:
        raise PlanError(f"{where}: {given!r:.60} is none of {', '.join(accepted)}")
    return given


def _count(given: Any, where: str) -> int:
    if isinstance(given, bool) or not isinstance(given, int) or given < 0:
        raise PlanError(f"{where}: {given!r:.60} is no whole number from 0 on")
    return given


def _seconds(given: Any, where: str) -> float:
    """A number from 0 on; YAML 1.1 reads 1e-05 as a text."""
    try:
        number = math.nan if isinstance(given, bool) else float(given)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 <= number < math.inf:
        raise PlanError(f"{where}: {given!r:.60} is no finite number from 0 on")
    return number


def _all_different(names: Sequence[str], what: str) -> None:
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise PlanError(f"{what} {twice!r} comes twice")
