"""How much work something is, counted, not timed: the same on every machine, however busy it is."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any


def calls_of(work: Callable[[], Any], most: int) -> int:
    """Count the calls of functions, Python's and C's, that the work makes; fail as soon as there are too many."""
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
