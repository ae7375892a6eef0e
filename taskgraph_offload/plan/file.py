"""The file form of a plan: YAML that people can read, loaded through a safe loader, bound to its model.

A file holds the trace, the machine and the plan's text form. It is never trusted: loading checks every value, the
fingerprint of the trace and the model if one is given, and then proves the whole plan again.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ..errors import OffloadError, PlanError
from ..nouns.machine import Machine
from ..nouns.trace import Activation, Boundary, Call, Piece, Trace, Weight
from ..nouns.weights import check_model
from .plan import Bound, Outlook, Plan
from .text import MOST_TASKS, parse_plan, print_plan

if TYPE_CHECKING:
    import torch

VERSION = 1
LARGEST_FILE = 64 * 2**20  # bytes; a plan of 10,000 weights has about two million
KEYS = ("taskgraph_offload", "model", "fingerprint", "machine", "bound", "outlook", "plan", "trace")
SOURCES = ("fake", "real", "symbolic", "units")
SIDES = ("enter", "exit")
TRACE_KEYS = ("entry", "source", "program", "fixed", "weights", "calls", "activations")

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_NOT_FOR_YAML = re.compile("[^\x20-\x7e\xa0-\u2027\u2030-\ud7ff\ue000-\ufefe\uff00-\ufffd\U00010000-\U0010ffff]")


def save(plan: Plan, path: str | os.PathLike[str]) -> None:
    """Write a plan; a reader never sees half of it. Makes missing folders and follows symbolic links."""
    target = Path(path).resolve()
    half = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        half.write_text(print_file(plan), encoding="utf-8")
        half.replace(target)
    except OSError as error:
        raise PlanError(f"the plan cannot be written to {os.fspath(path)!r}: {error.strerror}") from error
    finally:
        if half.exists():
            half.unlink()


def load(path: str | os.PathLike[str], model: torch.nn.Module | None = None) -> Plan:
    """Read a plan, check that it is for this model, and prove it."""
    try:
        plan = parse_file(_read(Path(path)))
        if model is not None:
            check_model(plan.trace, model)
    except PlanError as error:
        raise PlanError(f"{os.fspath(path)}: {error}") from error
    return plan


def _read(file: Path) -> str:
    try:
        if file.stat().st_size > LARGEST_FILE:
            raise PlanError(f"{file.stat().st_size} bytes are no plan; at most {LARGEST_FILE} are read")
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(f"cannot be read: {error}") from error


def print_file(plan: Plan) -> str:
    """The file form of a plan. One line for each weight, piece and task."""
    trace = plan.trace
    lines = [
        f"taskgraph_offload: {VERSION}",
        f"model: {_flow(trace.model)}",
        f"fingerprint: {_flow(trace.fingerprint)}",
        f"machine: {_flow(plan.machine.to_dict())}",
        f"bound: {_flow(_fields(plan.bound))}",
        f"outlook: {_flow(_fields(plan.outlook) if plan.outlook else None)}",
        "plan: |",
        *(f"  {line}" for line in print_plan(plan).splitlines()),
        "trace:",
        f"  entry: {_flow(trace.entry)}",
        f"  source: {_flow(trace.source)}",
        *([f"  program: {_flow(trace.program)}"] if trace.program else []),
        f"  fixed: {_flow(dict(trace.fixed))}",
        f"  weights: # {', '.join(Weight.__slots__)}",
        *(f"  - {_flow(_values(weight))}" for weight in trace.weights.values()),
        f"  calls: # name, block, component, and of each piece: boundary, {', '.join(Piece.__slots__[1:])}",
        *(line for call in trace.calls for line in _print_call(call)),
        f"  activations: # {', '.join(Activation.__slots__)}",
        *(f"  - {_flow(_values(activation))}" for activation in trace.activations),
    ]
    return "\n".join(lines) + "\n"


def parse_file(text: str) -> Plan:
    """Read the file form and prove the plan in it; raise `PlanError` if anything is wrong."""
    try:
        content = yaml.load(text, Loader=_Loader)
        if not isinstance(content, dict) or content.get("taskgraph_offload") != VERSION:
            raise PlanError(
                f"not a plan file of version {VERSION}: it does not begin with 'taskgraph_offload: {VERSION}'"
            )
        plan = _plan_of(content)
        plan.verify()
        if plan.bound.step_seconds > plan.predict(plan.settled).step_seconds * (1 + 1e-6) + 1e-12:
            raise PlanError("its bound was edited: the plan itself is faster; plan again with Planner(...).plan()")
        return plan
    except PlanError:
        raise
    except (OffloadError, yaml.YAMLError, RecursionError) as error:
        raise PlanError(f"not a readable plan file: {str(error) or type(error).__name__}") from error


def _plan_of(content: dict[Any, Any]) -> Plan:
    given = _dict_of(content, KEYS, "the plan file")
    trace = trace_of(given["trace"], given["model"])
    if trace.fingerprint != given["fingerprint"]:
        raise PlanError("its trace was edited: the fingerprint does not fit; plan again with Planner(...).plan()")
    if not isinstance(given["plan"], str):
        raise PlanError("'plan' is no text")
    decided = parse_plan(given["plan"])
    return Plan(
        trace=trace,
        machine=_machine_of(given["machine"]),
        bound=_bound_of(given["bound"]),
        outlook=_outlook_of(given["outlook"]),
        **{name: getattr(decided, name) for name in decided.__slots__},
    )


def _print_call(call: Call) -> list[str]:
    pieces = [[_values(piece.boundary), *_values(piece)[1:]] for piece in call.pieces]
    head = f"  - [{_flow(call.name)}, {_flow(call.block)}, {_flow(call.component)}, ["
    return [head, *(f"      {_flow(piece)}," for piece in pieces), "    ]]"]


def _fields(noun: Any) -> dict[str, Any]:
    return {name: getattr(noun, name) for name in noun.__slots__}


def _values(noun: Any) -> list[Any]:
    return [getattr(noun, name) for name in noun.__slots__]


def _flow(value: Any) -> str:
    """A value on one line of JSON, which YAML reads too; escape the characters that YAML does not accept."""
    text = json.dumps(value, ensure_ascii=False)
    return _NOT_FOR_YAML.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


# From here on: read nouns back from a file. A file may hold anything, so every value is checked.


def trace_of(given: Any, model: Any) -> Trace:
    """Read a trace, and check that its parts fit together."""
    complete = {"program": None, **given} if isinstance(given, dict) else given  # only programs have one
    parts = _dict_of(complete, TRACE_KEYS, "the trace")
    weights = [_weight(row) for row in _rows(parts["weights"], "weights")]
    calls = tuple(_call(row) for row in _rows(parts["calls"], "calls"))
    if not calls:
        raise PlanError("the trace has no call")
    _all_different([weight.name for weight in weights], "weight")
    _all_different([call.name for call in calls], "call")
    fixed = _dict_of(parts["fixed"], None, "fixed")
    program = tuple(_phase(row, calls) for row in _rows(parts["program"], "the program"))
    if sum(times for _, times in program) * len(calls) > MOST_TASKS:
        raise PlanError(f"the program has more than {MOST_TASKS} calls")
    if program and parts["activations"]:
        raise PlanError("a program has no activations that a plan could move")
    count = sum(len(call.pieces) for call in calls)
    return Trace(
        weights={weight.name: weight for weight in weights},
        calls=calls,
        activations=tuple(_activation(row, count) for row in _rows(parts["activations"], "activations")),
        model=_text(model, "model"),
        entry=_text(parts["entry"], "entry"),
        source=_one_of(parts["source"], SOURCES, "source"),
        fixed={_text(name, "fixed"): _text(reason, "fixed") for name, reason in fixed.items()},
        program=program,
    )


def _phase(row: Any, calls: Sequence[Call]) -> tuple[str, int]:
    name, times = _row(row, 2, "a phase of the program")
    component = _text(name, "a phase of the program")
    if component not in {call.component for call in calls}:
        raise PlanError(f"the program runs {component!r:.60}, which has no call")
    if not _count(times, "how often a phase runs"):
        raise PlanError(f"the program runs {component!r} {times!r:.60} times")
    return component, times


def _machine_of(given: Any) -> Machine:
    """Read a machine, which refuses rates that make no sense."""
    complete = {"library_bytes": 0, **given} if isinstance(given, dict) else given  # it is left out where it is zero
    rates = _dict_of(complete, tuple(Machine.__slots__), "the machine")
    return Machine.from_dict({key: value if key == "name" else _seconds(value, key) for key, value in rates.items()})


def _bound_of(given: Any) -> Bound:
    """Read a bound."""
    return Bound(
        **{key: _seconds(value, key) for key, value in _dict_of(given, tuple(Bound.__slots__), "bound").items()}
    )


def _outlook_of(given: Any) -> Outlook | None:
    """Read an outlook, if there is one."""
    if given is None:
        return None
    outlook = _dict_of(given, tuple(Outlook.__slots__), "outlook")
    more = _seconds(outlook["one_more_gib_step_seconds"], "one_more_gib_step_seconds")
    return Outlook(_count(outlook["no_stall_bytes"], "no_stall_bytes"), more)


def _dict_of(given: Any, keys: Sequence[str] | None, where: str) -> dict[Any, Any]:
    """Check that this is a dict, with exactly these keys if keys are given."""
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
        raise PlanError(f"{where}: {given!r:.60} is not a text")
    return given


def _one_of(given: Any, accepted: Sequence[str], where: str) -> Any:
    if given not in accepted:
        raise PlanError(f"{where}: {given!r:.60} is none of {', '.join(accepted)}")
    return given


def _count(given: Any, where: str) -> int:
    if isinstance(given, bool) or not isinstance(given, int) or given < 0:
        raise PlanError(f"{where}: {given!r:.60} is not a whole number from 0 on")
    return given


def _seconds(given: Any, where: str) -> float:
    """A number from 0 on; YAML 1.1 reads 1e-05 as a text."""
    try:
        number = math.nan if isinstance(given, bool) else float(given)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 <= number < math.inf:
        raise PlanError(f"{where}: {given!r:.60} is not a finite number from 0 on")
    return number


def _all_different(names: Sequence[str], what: str) -> None:
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise PlanError(f"{what} {twice!r} comes twice")
