"""From a model and its inputs to a trace: one run of the forward on tensors without data."""

from .tracing import capture, read_inputs

__all__ = ["capture", "read_inputs"]
