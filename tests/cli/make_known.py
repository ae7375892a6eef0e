"""Makes the traces of the models that the command line knows by name: `python -m tests.cli.make_known`.

Each model is built from its configuration at full size on the meta device, and traced at its usual sizes. Run this
after a change of what a trace says; a test compares.
"""

from __future__ import annotations

import gzip
import json
from dataclasses import astuple

from taskgraph_offload.planner.capture import capture

from taskgraph_offload.cli.models import KNOWN, Traced, from_name, known_names


def traced(name: str) -> Traced:
    """A known model, traced now."""
    subject = from_name(name, {})
    return Traced(capture(subject.model, subject.inputs), subject.note)


def file_form(known: Traced) -> bytes:
    """The bytes of a trace's file: JSON with the rows of a plan file, compressed."""
    trace = known.trace
    rows = {
        "entry": trace.entry,
        "source": trace.source,
        "fixed": dict(trace.fixed),
        "weights": [astuple(weight) for weight in trace.weights.values()],
        "calls": [[call.name, call.block, call.component, list(map(astuple, call.pieces))] for call in trace.calls],
        "activations": [astuple(activation) for activation in trace.activations],
    }
    content = {"model": trace.model, "inputs": known.note, "trace": rows}
    return gzip.compress(json.dumps(content, separators=(",", ":")).encode(), mtime=0)


if __name__ == "__main__":
    for name in known_names():
        nbytes = (KNOWN / f"{name}.trace.gz").write_bytes(file_form(traced(name)))
        print(f"{name}: {nbytes} bytes")
