"""Every error this library raises on purpose. Each says what was wrong, with the value, and what mends it.

OffloadError
    BudgetError       the budget is too small; `.smallest_bytes` is what would do
    TraceError        the model could not be traced with these inputs
    PlanError         a plan is not safe, or is not for this model
    SettingsError     an argument, option or file that makes no sense
    ExecutionError    a running model was used in a way that cannot be right
"""

from __future__ import annotations


class OffloadError(Exception):
    """The base of all errors of this library."""


class BudgetError(OffloadError):
    """The budget is too small. `smallest_bytes` is the smallest budget that works for the strategy asked for."""

    def __init__(self, message: str, smallest_bytes: int) -> None:
        super().__init__(message)
        self.smallest_bytes = smallest_bytes


class TraceError(OffloadError):
    """The model could not be traced."""


class NothingReadError(TraceError):
    """The method reads no weight, so there is nothing to plan."""


class PlanError(OffloadError):
    """A plan is unsafe, unreadable, or made for another model."""


class SettingsError(OffloadError, ValueError):
    """An argument or option is unknown, of the wrong type or out of range."""


class ExecutionError(OffloadError, RuntimeError):
    """An attached model was used in a way that could not give a right answer."""


def shown(value: object) -> str:
    """A value as an error quotes it: on one line, and short.

    >>> shown("spread"), len(shown("x" * 1000))
    ("'spread'", 30)
    """
    text = repr(value)
    return text if len(text) <= 30 else f"{text[:13]}...{text[-14:]}"
