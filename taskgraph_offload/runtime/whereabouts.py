"""Where a forward is: which modules it is inside of, and which call of the plan begins at a boundary.

boundary     enter a    enter a.0   exit a.0   exit a    enter a ...
depth of a      1           1          1          0         1
passed       (a, enter) once                            (a, enter) twice: the second call that begins there
"""

from __future__ import annotations

from dataclasses import dataclass

from ..plan.plan import Plan
from .boundaries import Side
from .needs import Need


@dataclass(frozen=True, slots=True)
class Visit:
    """What runs where the plan does not say so: a module without its block, or a block inside of another one.

    `interrupted` ran before it and goes on after it. It ends when the module is left as often as it was entered then.
    """

    module: str
    depth: int
    interrupted: Need | None


class Whereabouts:
    """Counts how deep the forward is in each module, and, of the boundaries that the plan knows, how many it passed."""

    def __init__(self, plan: Plan) -> None:
        self._starts = {
            (call.boundary.module, call.boundary.side, call.boundary.occurrence): index
            for index, call in enumerate(plan.trace.calls)
        }
        self._planned = False
        self._depth: dict[str, int] = {}
        self._passed: dict[tuple[str, Side], int] = {}

    def begin(self, planned: bool) -> None:
        """A forward begins, one that the plan knows or another one."""
        self._planned = planned
        self._depth.clear()
        self._passed.clear()

    def step(self, module: str, side: Side) -> None:
        """The forward enters or leaves a module."""
        self._depth[module] = self._depth.get(module, 0) + (1 if side == "enter" else -1)

    def depth(self, module: str) -> int:
        """How often a module was entered and not yet left."""
        return self._depth.get(module, 0)

    def start(self, module: str, side: Side) -> int | None:
        """The call that begins at a boundary, if it is passed now."""
        return self._starts.get((module, side, self._passed.get((module, side), 0))) if self._planned else None

    def count(self, module: str, side: Side) -> int | None:
        """Pass a boundary; the call that begins there."""
        number = self._passed.get((module, side), 0)
        self._passed[module, side] = number + 1
        return self._starts.get((module, side, number)) if self._planned else None
