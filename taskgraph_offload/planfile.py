"""The file form of a plan: YAML that people can read, loaded through a safe loader, bound to its model.

A file holds the trace, the machine and the plan's text form. It is never authority: loading checks the fingerprint of
the trace, the model when one is given, and then proves the whole plan again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from .errors import OffloadError, PlanError
from .machine import Machine
from .plan import Bound, Outlook, Plan
from .text import parse_plan, print_plan
from .trace import Activation, Boundary, Call, Piece, Trace, Weight

if TYPE_CHECKING:
    import torch

VERSION = 1
LARGEST_FILE = 64 * 2**20  # bytes; a plan of 10,000 weights has about two million

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def save(plan: Plan, path: str | os.PathLike[str]) -> None:
    """Write a plan; a reader never sees half of it."""
    target = Path(path)
    half = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        half.write_text(print_file(plan), encoding="utf-8")
        half.replace(target)
    finally:
        half.unlink(missing_ok=True)


def load(path: str | os.PathLike[str], model: torch.nn.Module | None = None) -> Plan:
    """Read a plan, check that it is for this model, and prove it."""
    file = Path(path)
    try:
        plan = parse_file(_read(file))
        if model is not None:
            from .fingerprint import check_model

            check_model(plan.trace, model)
        plan.verify()
    except PlanError as error:
        raise PlanError(f"{file}: {error}") from error
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
        f"fingerprint: {trace.fingerprint}",
        f"machine: {_flow(plan.machine.to_dict())}",
        f"bound: {_flow(_fields(plan.bound))}",
        f"outlook: {_flow(_fields(plan.outlook) if plan.outlook else None)}",
        "plan: |",
        *(f"  {line}" for line in print_plan(plan).splitlines()),
        "trace:",
        f"  entry: {_flow(trace.entry)}",
        f"  source: {trace.source}",
        f"  fixed: {_flow(dict(trace.fixed))}",
        "  weights: # name: [bytes, dtype, shape, other names]",
        *(f"    {_flow(w.name)}: {_flow([w.nbytes, w.dtype, w.shape, w.aliases])}" for w in trace.weights.values()),
        "  calls: # [name, block, component, pieces]",
        *(line for call in trace.calls for line in _print_call(call)),
        "  activations: # [name, bytes, producer, uses, until]",
        *(f"  - {_flow([a.name, a.nbytes, a.producer, a.uses, a.until])}" for a in trace.activations),
    ]
    return "\n".join(lines) + "\n"


def parse_file(text: str) -> Plan:
    """Read the file form; whatever is wrong with it is a `PlanError`."""
    try:
        content = yaml.load(text, Loader=_Loader)
        if not isinstance(content, dict) or content.get("taskgraph_offload") != VERSION:
            raise PlanError(
                f"not a plan file of version {VERSION}: it does not begin with 'taskgraph_offload: {VERSION}'"
            )
        trace = _parse_trace(content)
        decided = parse_plan(content["plan"])
        return Plan(
            trace=trace,
            machine=_parse_machine(content["machine"]),
            bound=Bound(**{name: float(value) for name, value in content["bound"].items()}),
            outlook=_parse_outlook(content["outlook"]),
            **{name: getattr(decided, name) for name in decided.__slots__},
        )
    except PlanError:
        raise
    except KeyError as error:
        raise PlanError(f"the plan file has no {error}") from error
    except (OffloadError, yaml.YAMLError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise PlanError(f"not a readable plan file: {str(error) or type(error).__name__}") from error


def _print_call(call: Call) -> list[str]:
    """A call, and a line for each piece: boundary, reads, writes, flops, flop and other bytes, peak, seconds."""
    pieces = [
        [
            *(p.boundary.module, p.boundary.side, p.boundary.occurrence, p.reads, p.writes),
            *(p.flops, p.flop_bytes, p.other_bytes, p.transient_bytes, p.seconds),
        ]
        for p in call.pieces
    ]
    head = f"  - [{_flow(call.name)}, {_flow(call.block)}, {_flow(call.component)}, ["
    return [head, *(f"      {_flow(piece)}," for piece in pieces), "    ]]"]


def _parse_trace(content: Mapping[str, Any]) -> Trace:
    given = content["trace"]
    trace = Trace(
        weights={
            str(name): Weight(str(name), int(nbytes), dtype, tuple(shape), tuple(aliases))
            for name, (nbytes, dtype, shape, aliases) in given["weights"].items()
        },
        calls=tuple(_parse_call(*call) for call in given["calls"]),
        activations=tuple(
            Activation(name, int(nbytes), int(producer), tuple(uses), int(until))
            for name, nbytes, producer, uses, until in given["activations"] or ()
        ),
        model=content["model"],
        entry=given["entry"],
        source=given["source"],
        fixed=given["fixed"],
    )
    if trace.fingerprint != content["fingerprint"]:
        raise PlanError("its trace was edited: the fingerprint does not fit; plan again with Planner(...).plan()")
    return trace


def _parse_call(name: str, block: str | None, component: str, pieces: list[list[Any]]) -> Call:
    return Call(name, block, tuple(_parse_piece(*piece) for piece in pieces), component)


def _parse_piece(
    module: str, side: Any, occurrence: int, reads: list[str], writes: list[str], *costs: int | float | str | None
) -> Piece:
    flops, flop_bytes, other_bytes, transient_bytes, seconds = costs
    return Piece(
        boundary=Boundary(module, side, occurrence),
        reads=tuple(reads),
        writes=tuple(writes),
        flops=int(flops or 0),
        flop_bytes=int(flop_bytes or 0),
        other_bytes=int(other_bytes or 0),
        transient_bytes=int(transient_bytes or 0),
        seconds=None if seconds is None else float(seconds),  # YAML 1.1 reads 1e-05 as a text
    )


def _parse_machine(given: Mapping[str, Any]) -> Machine:
    return Machine.from_dict({key: value if key == "name" else float(value) for key, value in given.items()})


def _parse_outlook(given: Mapping[str, Any] | None) -> Outlook | None:
    if given is None:
        return None
    return Outlook(int(given["no_stall_bytes"]), float(given["one_more_gib_step_seconds"]))


def _fields(value: Any) -> dict[str, Any]:
    return {name: getattr(value, name) for name in value.__slots__}


def _flow(value: Any) -> str:
    """A value on one line: JSON, which YAML reads; infinities never occur in a plan."""
    return json.dumps(value, default=list)
