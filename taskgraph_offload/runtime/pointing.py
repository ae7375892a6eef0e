"""Points the tensors of a call to their seats, and home again. Thirty tensors at every call: here, every line counts.

outside of its call     tensor ----> home
inside                  tensor ----> seat
"""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import ExecutionError
from .homes import Homes
from .members import Member, edited_weights
from .needs import Need


class Pointings:
    """Those of all calls, each made when it is first asked for, and again when a home has moved."""

    def __init__(self, homes: Homes) -> None:
        self._homes, self._moves = homes, homes.moves
        self._made: dict[Need, Pointing] = {}

    def of(self, need: Need) -> Pointing:
        """Where the tensors of a call show to."""
        if self._homes.moves != self._moves:
            self._made.clear()
            self._moves = self._homes.moves
        found = self._made.get(need)
        if found is None:
            found = self._made[need] = Pointing(need.name, need.members)
        return found


class Pointing:
    """The tensors of one call, with where they show to."""

    def __init__(self, name: str, members: Sequence[Member]) -> None:
        self._name, self._members = name, members
        self._tensors = [member.tensor for member in members]
        self._out = [(member.tensor, member.seat) for member in members]
        self._back = [(member.tensor, member.seat.data_ptr(), member.home) for member in members]
        self._home_addresses = [member.home_address for member in members]
        self._counted = [member.tensor for member in members if member.counted]
        self._versions: list[int] = []

    def go(self) -> None:
        """To the seats; or an error where a tensor is not at home, because somebody has given it other data."""
        if [tensor.data_ptr() for tensor in self._tensors] != self._home_addresses:
            raise self._moved()
        for tensor, seat in self._out:
            tensor.data = seat

    def come_back(self) -> None:
        """Home, those that are still where they were sent: data that the model has put there is its own affair."""
        for tensor, address, home in self._back:
            if tensor.data_ptr() == address:
                tensor.data = home

    def edited(self) -> set[str]:
        """The weights that somebody has edited since anybody last asked."""
        versions = [tensor._version for tensor in self._counted]
        if versions == self._versions:
            return set()
        self._versions = versions
        return edited_weights(self._members)

    def _moved(self) -> ExecutionError:
        places = zip(self._members, self._home_addresses, strict=True)
        weight = next(member.weight for member, address in places if member.tensor.data_ptr() != address)
        return ExecutionError(
            f"weight {weight!r} was given other data after the forward had begun, and before {self._name} read it: do "
            "that between forwards; the next one will find it"
        )
