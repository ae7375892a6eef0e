"""The file form of a plan: YAML that people can read, loaded through a safe loader, bound to its model.

A file holds the trace, the machine and the plan's text form. It is never authority: loading checks every value, the
fingerprint of the trace, the model when one is given, and then proves the whole plan again.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ..errors import OffloadError, PlanError
from ..nouns.trace import Activation, Call, Piece, Weight
from .filed import bound_of, dict_of, machine_of, outlook_of, trace_of
from .plan import Plan
from .simulate import SETTLED
from .text import parse_plan, print_plan

if TYPE_CHECKING:
    import torch

VERSION = 1
LARGEST_FILE = 64 * 2**20  # bytes; a plan of 10,000 weights has about two million
KEYS = ("taskgraph_offload", "model", "fingerprint", "machine", "bound", "outlook", "plan", "trace")

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_NOT_FOR_YAML = re.compile("[^\x20-\x7e\xa0-\u2027\u2030-\ud7ff\ue000-\ufefe\uff00-\ufffd\U00010000-\U0010ffff]")


def save(plan: Plan, path: str | os.PathLike[str]) -> None:
    """Write a plan; a reader never sees half of it. A folder that is missing is made, a link is followed."""
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
            from .fingerprint import check_model

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
    """Read the file form and prove the plan in it; whatever is wrong is a `PlanError`."""
    try:
        content = yaml.load(text, Loader=_Loader)
        if not isinstance(content, dict) or content.get("taskgraph_offload") != VERSION:
            raise PlanError(
                f"not a plan file of version {VERSION}: it does not begin with 'taskgraph_offload: {VERSION}'"
            )
        plan = _plan_of(content)
        plan.verify()
        if plan.bound.step_seconds > plan.predict(SETTLED).step_seconds * (1 + 1e-6):
            raise PlanError("its bound was edited: the plan itself is faster; plan again with Planner(...).plan()")
        return plan
    except PlanError:
        raise
    except (OffloadError, yaml.YAMLError, RecursionError) as error:
        raise PlanError(f"not a readable plan file: {str(error) or type(error).__name__}") from error


def _plan_of(content: dict[Any, Any]) -> Plan:
    given = dict_of(content, KEYS, "the plan file")
    trace = trace_of(given["trace"], given["model"])
    if trace.fingerprint != given["fingerprint"]:
        raise PlanError("its trace was edited: the fingerprint does not fit; plan again with Planner(...).plan()")
    if not isinstance(given["plan"], str):
        raise PlanError("'plan' is no text")
    decided = parse_plan(given["plan"])
    return Plan(
        trace=trace,
        machine=machine_of(given["machine"]),
        bound=bound_of(given["bound"]),
        outlook=outlook_of(given["outlook"]),
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
    """A value on one line: JSON, which YAML reads, but for the characters that YAML wants escaped."""
    text = json.dumps(value, ensure_ascii=False)
    return _NOT_FOR_YAML.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
