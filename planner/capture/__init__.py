"""From a model and its inputs to a trace: one run of the forward on tensors without data."""

from .tracing import capture

__all__ = ["capture"]
