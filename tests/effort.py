"""Counts work instead of timing it: the count is the same on every machine, also on a busy one."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any


def calls_of(work: Callable[[], Any], most: int) -> int:
    """Count the function calls that the work makes, in Python and in C. Fail as soon as there are more than `most`."""
    count, before = 0, sys.getprofile()

    def one_more(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")
        if count > most:
            sys.setprofile(before)
            raise AssertionError(f"this takes more than {most} calls")

    sys.setprofile(one_more)
    try:
        work()
    finally:
        sys.setprofile(before)
    return count
