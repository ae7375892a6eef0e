"""Memory beside the arena, for as long as a call runs that found no seat for all it reads.

Nobody planned for that: two weights of one block have one seat, since the plan never needs them together, and now the
whole block runs at once.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..devices.base import Device
from ..errors import ExecutionError
from .arena import Arena
from .homes import Home
from .members import point_home
from .needs import Need


class Lender:
    """Lends memory to the call that runs."""

    def __init__(self, arena: Arena, device: Device[Any]) -> None:
        self._arena, self._device = arena, device
        self._lent: list[Tensor] = []
        self._versions: dict[str, list[int]] = {}
        self.peak_bytes = 0  # of one call, in this forward

    def lend(self, need: Need) -> None:
        """Let a call's weights without a seat have memory of their own, and point its tensors there."""
        for home in need.beside:
            memory = self._arena.lend(home, need)
            self._lent.append(memory)
            self._device.reached(need.name, memory, [(0, home.memory.nbytes)], [])
            self.peak_bytes = max(self.peak_bytes, sum(memory.nbytes for memory in self._lent))
            self._versions[home.name] = _versions(home)
            for member in home.members:
                member.tensor.data = member.view_of(memory)

    def take_back(self, need: Need) -> None:
        """The call has ended."""
        addresses = self.addresses()
        self._lent.clear()
        for home in need.beside:
            changed = _versions(home) != self._versions[home.name]
            point_home(home.members, addresses)
            if changed:
                raise ExecutionError(
                    f"{need.name} changed weight {home.name!r} at a moment that the plan did not expect, and that left "
                    "no seat for it: plan again, for a forward like this one"
                )

    def addresses(self) -> set[int]:
        """Where the memory that is lent begins."""
        return {memory.data_ptr() for memory in self._lent}

    def forget(self) -> None:
        """Whoever had memory is gone."""
        self._lent.clear()
        self._versions.clear()


def _versions(home: Home) -> list[int]:
    return [member.tensor._version for member in home.members if member.counted]
