"""What is on the device throughout a forward: the weights that are read between blocks, or that the forward changes.

between forwards     the forward runs                                  between forwards
at home              seated, and tensors point there .............     at home
(changed ones stay)                                                    (changed ones stay: the device has the truth)
"""

from __future__ import annotations

from typing import Any

from ..devices.base import Device
from .arena import Arena
from .lanes import Lanes
from .members import Member, edited_weights, point_home
from .needs import Need, Needs


class Standing:
    """Seats what stands when a forward begins, and lets it go when the forward ends."""

    def __init__(self, needs: Needs, arena: Arena, lanes: Lanes, device: Device[Any]) -> None:
        self._need, self._changed = needs.standing, needs.changed
        self._kept, self._arena, self._lanes, self._device = needs.staying, arena, lanes, device
        self._staying = set(needs.staying.members)
        self.returning = [member for member in needs.standing.members if member not in self._staying]
        self._is_seated = False  # since the first forward began: then changed weights live on the device

    def begin(self) -> None:
        """A forward begins."""
        self._arena.seat(self._need)
        for member in self._need.members:
            member.tensor.data = member.seat
        self._is_seated = True

    def end(self) -> None:
        """A forward has ended, and everything that it has issued comes before this."""
        self._device.reached("between blocks", self._arena.memory, self._need.reads, [])
        self._arena.used(self._need, self._lanes.mark("compute"))
        point_home(self.returning)

    def carry_edits_home(self) -> None:
        """What stands was edited there by somebody's hook."""
        if names := sorted((edited_weights(self.returning) | self._need.changed_unseen()) - self._changed):
            self._arena.announce_changes(self._need, names)
            self._arena.used(self._need, self._lanes.mark("compute"))
            self._arena.carry_home(names)

    def stays(self, member: Member) -> bool:
        """Whether a tensor is on the device between forwards, too."""
        return self._is_seated and member in self._staying

    @property
    def kept(self) -> Need | None:
        """What the device alone knows."""
        return self._kept if self._is_seated else None

    def leave(self) -> None:
        """No forward will come: what the device alone knows goes home."""
        if self._is_seated:
            self._arena.carry_home(dict.fromkeys(member.weight for member in self._kept.members))
            self._is_seated = False
