"""Issues copies on the lanes of a device, and lists when the plan wants each copy.

Tasks of a lane are numbered, and lanes wait for one another by these numbers:

    lane h2d       | 1 | 2 |   3   |      a lane is a FIFO: to wait for 3 is to wait for 1 and 2, too
    lane compute           |  1  |  2  |

Callers choose which bytes are copied, and what each copy waits for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..devices.base import Device
from ..nouns.graph import LANES, Lane, Task
from ..plan.plan import Plan
from .measured import Log, Ran, TaskNumber
from .needs import standing_bundles

Bytes = tuple[Tensor, Tensor]  # where bytes go, and where they come from


@dataclass(frozen=True, slots=True)
class Moments:
    """The events at the start and at the end of a task."""

    start: Any
    stop: Any


class Lanes:
    """The lanes of a device. Every task has two events. Each lane keeps the events of its last `remembered` tasks.

    To wait for an older task, a lane waits for the oldest one that is kept: it ended later.
    """

    def __init__(self, device: Device[Any], remembered: Mapping[Lane, int]) -> None:
        self.device, self._sizes = device, remembered
        self._rings = {
            lane: tuple(Moments(device.event(), device.event()) for _ in range(remembered[lane])) for lane in LANES
        }
        self._lanes = dict(device.lanes)
        self.latest: dict[Lane, int] = dict.fromkeys(LANES, 0)
        self._seen: dict[Lane, dict[Lane, int]] = {lane: dict.fromkeys(LANES, 0) for lane in LANES}
        self._waits: dict[Lane, list[TaskNumber]] = {lane: [] for lane in LANES}
        self._is_open: dict[Lane, bool] = dict.fromkeys(LANES, False)  # whether a task has begun and not ended

    def wait(self, lane: Lane, other: Lane, number: int) -> None:
        """Let `lane` wait until the other lane's task of this number is done."""
        seen = self._seen[lane]
        if number <= seen[other]:
            return
        number = max(number, self.latest[other] - self._sizes[other] + 1)
        self._lanes[lane].wait(self._rings[other][number % self._sizes[other]].stop)
        seen[other] = number
        self._waits[lane].append((other, number))

    def start(self, lane: Lane) -> tuple[TaskNumber, ...]:
        """Begin the next task of a lane. Returns the tasks that the lane waits for since its last task began."""
        self._lanes[lane].record(self._rings[lane][(self.latest[lane] + 1) % self._sizes[lane]].start)
        self._is_open[lane] = True
        waited = tuple(self._waits[lane])
        self._waits[lane].clear()
        return waited

    def stop(self, lane: Lane) -> int:
        """End the task that began. Returns its number."""
        number = self.latest[lane] + 1
        self._lanes[lane].record(self._rings[lane][number % self._sizes[lane]].stop)
        self.latest[lane], self._is_open[lane] = number, False
        return number

    def mark(self, lane: Lane) -> int:
        """Give this moment of a lane a number. If a task runs there, it goes on under the next number."""
        is_open = self._is_open[lane]
        if not is_open:
            self._begin(lane)
        number = self.stop(lane)
        if is_open:
            self._begin(lane)
        return number

    def _begin(self, lane: Lane) -> None:
        self._is_open[lane] = True
        self._lanes[lane].record(self._rings[lane][(self.latest[lane] + 1) % self._sizes[lane]].start)

    def moments(self, lane: Lane, number: int) -> Moments | None:
        """The events of a task, or None if a later task uses them now."""
        gone = number <= self.latest[lane] - self._sizes[lane]
        return None if gone else self._rings[lane][number % self._sizes[lane]]

    def settle(self, lane: Lane, number: int) -> None:
        """Block the caller until a task is done."""
        if number:
            number = max(number, self.latest[lane] - self._sizes[lane] + 1)
            self._rings[lane][number % self._sizes[lane]].stop.synchronize()

    def synchronize(self) -> None:
        """Block until every task is done. No lane has to wait for any of them later."""
        self.device.synchronize()
        for lane in LANES:
            self._seen[lane].update(self.latest)
            self._waits[lane].clear()
            self._is_open[lane] = False


@dataclass(frozen=True, slots=True)
class Copy:
    """A copy to issue: its task, and its node's name without the cycle.

    `call` is the call that it serves. `serves` is that call's index, counted from the first call of the forward that
    issues the copy. `lane` and `is_activation` are those of the task, stored here because they are asked often.
    """

    task: Task
    node: str
    call: str
    serves: int = 0
    lane: Lane = field(init=False)
    is_activation: bool = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "lane", self.task.lane)
        object.__setattr__(self, "is_activation", self.task.is_activation)


class Copier:
    """Issues one copy at a time, counts it and logs it. Copies with `before` become gates of that call."""

    def __init__(self, device: Device[Any], lanes: Lanes, log: Log) -> None:
        self._lanes_of_device, self._lanes, self._log, self.stats = dict(device.lanes), lanes, log, log.stats
        self.ended: dict[str, int] = {}  # for each call: the number of its last run
        self.gates: dict[str, list[TaskNumber]] = {}  # for each call: copies that must be done before it begins

    def copy(self, copy: Copy, pieces: Sequence[Bytes]) -> int:
        """Copy bytes, piece by piece. Returns the copy's number in its lane."""
        task, lane = copy.task, copy.lane
        if task.after is not None:
            self._lanes.wait(lane, "compute", self.ended.get(task.after, 0))
        waited = self._lanes.start(lane)
        nbytes = 0
        for target, source in pieces:
            self._lanes_of_device[lane].copy(target, source, copy.node)
            nbytes += target.nbytes
        number = self._lanes.stop(lane)
        if task.before is not None:
            self.gates.setdefault(task.before, []).append((lane, number))
        self.stats.copies += 1
        if lane == "h2d":
            self.stats.h2d_bytes += nbytes
        else:
            self.stats.d2h_bytes += nbytes
        self._log.add(Ran(lane, number, copy.node, task.name, copy.call, nbytes, waited))
        return number

    def open_gate(self, call: str) -> None:
        """Let the compute lane wait for the copies that must be done before a call begins."""
        for lane, number in self.gates.pop(call):
            self._lanes.wait("compute", lane, number)


# When the host issues each copy of a plan: as soon as every call that the copy waits for has been issued.
#
#    forward  |          0          |          1          |
#    call     |  0     1     2      |  0     1     2      |
#    slot      0     1     2     3   0     1     2     3
#
# A copy that waits for call 1 is issued in slot 2 of that forward. A copy that waits for no call of its forward is
# issued in slot 0. Copies that a step prefetches for the next one come last. Copies of activations are issued exactly
# where the plan lists them, because the activation's memory is freed, or allocated, at that moment.
Slots = tuple[tuple[Copy, ...], ...]


def copies_by_slot(plan: Plan) -> tuple[Slots, Slots, Slots]:
    """The copies to issue in the cold forward, in the second one, and in every later one.

    Standing weights come before all others.
    """
    calls = {call.name: index for index, call in enumerate(plan.trace.calls)}
    first, count = standing_bundles(plan), len(calls)
    slots: list[list[list[Copy]]] = [[[] for _ in range(count + 1)] for _ in range(3)]
    for node, data, last_call, reached in _copies_behind_calls(plan, calls):
        begin = data["cycle"] * count
        serves = calls[data["call"]] + (count if begin + calls[data["call"]] <= reached else 0)
        copy = Copy(data["task"], node.partition("/")[2], data["call"], serves)
        if copy.task.name in first:
            slots[0][0].insert(0, copy)
        else:
            slots[data["cycle"]][max(last_call - begin, -1) + 1].append(copy)
    cold, second, later = (tuple(map(tuple, forward)) for forward in slots)
    return cold, second, later


def _copies_behind_calls(plan: Plan, calls: Mapping[str, int]) -> list[tuple[str, dict[str, Any], int, int]]:
    """Each copy of three cycles, with the last call that it waits for and the last call listed before it.

    Calls are counted through all three cycles. A lane is a FIFO, so a copy also waits for what earlier copies wait for.
    """
    graph = plan.graph(3)
    found: list[tuple[str, dict[str, Any], int, int]] = []
    waits_for: dict[str, int] = {}
    reached = -1
    for node, data in graph:
        if data["kind"] == "compute":
            reached = waits_for[node] = data["cycle"] * len(calls) + calls[data["task"].name]
            continue
        last = max((waits_for[before] for before in graph.dag.pred[node]), default=-1)
        waits_for[node] = max(last, reached) if data["task"].is_activation else last
        found.append((node, data, waits_for[node], reached))
    return found
