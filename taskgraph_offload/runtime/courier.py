"""Issues one copy: behind the call that its task names, counted, logged, and awaited by the call that asks for it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..devices.base import Device
from ..nouns.graph import Lane
from .agenda import Errand
from .lanes import Lanes
from .log import Entry, Log

Piece = tuple[Tensor, Tensor]  # where bytes go, and where they come from


class Courier:
    """Copies on the lanes of a device. Who copies what behind whom is for its callers to say."""

    def __init__(self, device: Device[Any], lanes: Lanes, log: Log) -> None:
        self._device, self._lanes, self._log, self.stats = device, lanes, log, log.stats
        self._ended: dict[str, int] = {}  # for each call: the number of its last run
        self._gates: dict[str, list[tuple[Lane, int]]] = {}  # for each call: what else must be done before it

    def copy(self, errand: Errand, *pieces: Piece) -> int:
        """Copy bytes, piece by piece; the copy's number in its lane."""
        task, lane = errand.task, errand.task.lane
        if task.after is not None:
            self._lanes.wait(lane, "compute", self._ended.get(task.after, 0))
        self._lanes.start(lane)
        for target, source in pieces:
            self._device.lanes[lane].copy(target, source, errand.node)
        number = self._lanes.stop(lane)
        if task.before is not None:
            self._gates.setdefault(task.before, []).append((lane, number))
        nbytes = sum(target.nbytes for target, _ in pieces)
        self._count(lane, nbytes)
        waited = self._lanes.waited_for(lane)
        self._log.add(Entry(lane, number, errand.node, task.name, errand.call, nbytes, waited))
        return number

    def open_gates(self, call: str) -> None:
        """Let the compute lane wait for the copies that a call may not begin before."""
        for lane, number in self._gates.pop(call, ()):
            self._lanes.wait("compute", lane, number)

    def call_ended(self, call: str, number: int) -> None:
        """A call has been issued to its end."""
        self._ended[call] = number

    def forget(self) -> None:
        """No copy is on its way any more."""
        self._gates.clear()

    def _count(self, lane: Lane, nbytes: int) -> None:
        self.stats.copies += 1
        if lane == "h2d":
            self.stats.h2d_bytes += nbytes
        else:
            self.stats.d2h_bytes += nbytes
