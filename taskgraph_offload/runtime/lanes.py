"""Numbers the tasks of each lane, and makes lanes wait for one another by these numbers.

    lane h2d       | 1 | 2 |   3   |      a lane is a FIFO: who has waited for 3 has waited for 1 and 2
    lane compute           |  1  |  2  |

Every task has two events, at its start and at its end; they live in a ring and are recorded again when it comes round.
A wait for a task that has left the ring waits for the oldest one in it, which came later.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..devices.base import Device
from ..nouns.graph import LANES, Lane

Waited = tuple[Lane, int]  # a task that another one waited for: its lane and its number


@dataclass(frozen=True, slots=True)
class Moments:
    """The events at the start and at the end of a task."""

    start: Any
    stop: Any


class Lanes:
    """The lanes of a device, with numbered tasks; so many of each lane are remembered."""

    def __init__(self, device: Device[Any], remembered: Mapping[Lane, int]) -> None:
        self.device, self._sizes = device, remembered
        self._rings = {
            lane: tuple(Moments(device.event(), device.event()) for _ in range(remembered[lane])) for lane in LANES
        }
        self._lanes = dict(device.lanes)
        self.latest: dict[Lane, int] = dict.fromkeys(LANES, 0)
        self._seen: dict[Lane, dict[Lane, int]] = {lane: dict.fromkeys(LANES, 0) for lane in LANES}
        self._waits: dict[Lane, list[Waited]] = {lane: [] for lane in LANES}

    def wait(self, lane: Lane, other: Lane, number: int) -> None:
        """Let what `lane` does next begin when the other lane's task of this number is done."""
        seen = self._seen[lane]
        if number <= seen[other]:
            return
        number = max(number, self.latest[other] - self._sizes[other] + 1)
        self._lanes[lane].wait(self._rings[other][number % self._sizes[other]].stop)
        seen[other] = number
        self._waits[lane].append((other, number))

    def start(self, lane: Lane) -> None:
        """The next task of a lane begins, when the lane has waited for what it must."""
        self._lanes[lane].record(self._rings[lane][(self.latest[lane] + 1) % self._sizes[lane]].start)

    def stop(self, lane: Lane) -> int:
        """The task that began ends; its number."""
        number = self.latest[lane] + 1
        self._lanes[lane].record(self._rings[lane][number % self._sizes[lane]].stop)
        self.latest[lane] = number
        return number

    def mark(self, lane: Lane) -> int:
        """Number this moment of a lane, as a task that does nothing."""
        self.start(lane)
        return self.stop(lane)

    def waited_for(self, lane: Lane) -> tuple[Waited, ...]:
        """What the lane has been told to wait for since this was last asked."""
        found = tuple(self._waits[lane])
        self._waits[lane].clear()
        return found

    def moments(self, lane: Lane, number: int) -> Moments | None:
        """The events of a task, unless the ring has come round since."""
        gone = number <= self.latest[lane] - self._sizes[lane]
        return None if gone else self._rings[lane][number % self._sizes[lane]]

    def settle(self, lane: Lane, number: int) -> None:
        """Block the caller until a task is done."""
        if number:
            number = max(number, self.latest[lane] - self._sizes[lane] + 1)
            self._rings[lane][number % self._sizes[lane]].stop.synchronize()

    def synchronize(self) -> None:
        """Block until every task is done; nobody need wait for any of them again."""
        self.device.synchronize()
        for lane in LANES:
            self._seen[lane].update(self.latest)
            self._waits[lane].clear()
