"""The CPU as a device. Fast memory is host memory, each copy lane is a thread, and the link can be slowed down.

The compute lane is the caller's own thread, so a wait there blocks the caller. A copy does not hold Python's global
lock, so compute and copies overlap as they do on a GPU.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from queue import SimpleQueue

import numpy
import torch
from torch import Tensor

from ..errors import ExecutionError, SettingsError
from ..nouns.graph import Lane as LaneName
from ..nouns.machine import Machine
from .base import Range, refuse_closed


class Failure:
    """The first error in a copy thread, until it is raised in the caller's thread."""

    def __init__(self) -> None:
        self.error: BaseException | None = None

    def check(self) -> None:
        """Raise the error, if there is one: the bytes of that copy did not arrive."""
        if self.error is not None:
            raise ExecutionError(f"a copy failed: {self.error!r}; call the model again") from self.error


class CpuEvent:
    """A moment in a lane: how often it was recorded, how often it has happened, and when it last did.

    A thread that waits appends a locked lock to `waiting` and tries to lock it again; the lane unlocks it. We use no
    `threading.Condition`, because an interrupt (such as Ctrl-C) could leave it half done.
    """

    __slots__ = ("_failure", "happened", "recorded", "seconds", "waiting")

    def __init__(self, failure: Failure) -> None:
        self._failure = failure
        self.waiting: deque[tuple[int, threading.Lock]] = deque()
        self.recorded = self.happened = 0
        self.seconds = 0.0

    def seconds_since(self, earlier: CpuEvent) -> float:
        """The time between two events."""
        return self.seconds - earlier.seconds

    def synchronize(self) -> None:
        """Block until the event has happened."""
        if self.happened < self.recorded:
            self.wait(self.recorded)
        if self._failure.error is not None:
            self._failure.check()

    def wait(self, number: int) -> None:
        """Block until the event has happened `number` times, even if a copy failed."""
        if self.happened < number:
            lock = threading.Lock()
            lock.acquire()
            self.waiting.append((number, lock))
            if self.happened < number:  # if it happens from here on, the lane finds the lock and unlocks it
                lock.acquire()

    def happen(self, number: int) -> None:
        """Happen for the `number`th time, and wake the threads that wait for that."""
        self.seconds, self.happened = time.perf_counter(), number
        if self.waiting:
            self.wake(number)

    def wake(self, number: int) -> None:
        """Wake the threads that wait until the event has happened `number` times."""
        for _ in range(len(self.waiting)):
            wanted, lock = self.waiting.popleft()
            if wanted <= number:
                lock.release()
            else:
                self.waiting.append((wanted, lock))


class ComputeLane:
    """The caller's thread."""

    def copy(self, target: Tensor, source: Tensor, label: object) -> None:
        """Copy at once."""
        copy_bytes(target, source)

    def wait(self, event: CpuEvent) -> None:
        """Block until the event has happened."""
        event.synchronize()

    def record(self, event: CpuEvent) -> None:
        """The event happens now."""
        event.recorded += 1
        event.seconds, event.happened = time.perf_counter(), event.recorded
        if event.waiting:
            event.wake(event.recorded)


class CopyLane:
    """A thread that does one copy after another, at the rate of the link if one is given."""

    def __init__(self, name: str, bytes_per_second: float | None, failure: Failure) -> None:
        self._rate, self._failure = bytes_per_second, failure
        self._free_at = 0.0  # when the link has carried all copies so far
        self._issued: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=f"taskgraph_offload {name}", daemon=True)
        self._thread.start()

    def copy(self, target: Tensor, source: Tensor, label: object) -> None:
        """Copy after all earlier work of this lane."""
        self._issued.put(partial(self._carry, target, source))

    def wait(self, event: CpuEvent) -> None:
        """Block the thread, not the caller."""
        if event.happened < event.recorded:
            self._issued.put(partial(event.wait, event.recorded))

    def record(self, event: CpuEvent) -> None:
        """Let the event happen after all earlier work of this lane."""
        event.recorded += 1
        self._issued.put(partial(event.happen, event.recorded))

    def close(self) -> None:
        """End the thread after all its work."""
        self._issued.put(None)
        if threading.current_thread() is not self._thread:  # the garbage collector may call this in any thread
            self._thread.join()

    def _run(self) -> None:
        while (command := self._issued.get()) is not None:
            try:
                command()
            except BaseException as error:  # go on: otherwise a thread that waits for this lane never wakes up
                self._failure.error = self._failure.error or error
            del command  # it holds tensors, which an idle thread must not keep alive

    def _carry(self, target: Tensor, source: Tensor) -> None:
        # The link has its own clock, so that sleeping too long after one copy does not delay the next one.
        #
        #     asked for     |a          |b |c
        #     link          [--- a ---) [--- b ---)[--- c ---)
        begin = max(time.perf_counter(), self._free_at)
        copy_bytes(target, source)
        if self._rate is not None:
            self._free_at = begin + target.nbytes / self._rate
            if (rest := self._free_at - time.perf_counter()) > 0:
                time.sleep(rest)


class HostMemory:
    """The part that is the same in all devices whose memory is host memory."""

    device = torch.device("cpu")
    refuses_home_reads = False
    library_bytes = 0

    def window(self, memory: Tensor, start: int, nbytes: int) -> Tensor:
        """Bytes of such memory as a tensor with its own storage."""
        return bytes_of(memory.numpy(), start, nbytes)

    def expect(self, machine: Machine, seconds: Mapping[str, float]) -> None:
        """Nothing to do: this device runs in real time."""

    def pin(self, home: Tensor) -> None:
        """Nothing to do: all host memory is equally fast."""

    def unpin(self, home: Tensor) -> None:
        """Nothing to undo."""

    def peak_bytes(self) -> int | None:
        """None: torch does not count memory on the CPU."""
        return None


class CpuDevice(HostMemory):
    """The CPU as a device. `link_bytes_per_second` slows copies down to this rate, in each direction."""

    def __init__(self, link_bytes_per_second: float | None = None) -> None:
        self._failure = Failure()
        self._copies = [CopyLane(name, link_bytes_per_second, self._failure) for name in ("h2d", "d2h")]
        self._is_closed, self._process = False, os.getpid()
        self.lanes: Mapping[LaneName, ComputeLane | CopyLane] = {
            "compute": ComputeLane(),
            "h2d": self._copies[0],
            "d2h": self._copies[1],
        }

    def event(self) -> CpuEvent:
        """A new event."""
        return CpuEvent(self._failure)

    def allocate(self, nbytes: int) -> Tensor:
        """Memory of exactly this size, aligned to a page."""
        return bytes_of(new_pages(nbytes), 0, nbytes)

    def begin(self) -> None:
        """Refuse if the device is closed, or in a forked process: the copy threads run only in the old one."""
        if self._is_closed:
            refuse_closed()
        if os.getpid() != self._process:
            raise ExecutionError(
                "the model was attached before this process was forked, and threads that copy do not survive a fork: "
                "attach in the new process, not before the fork"
            )

    def reached(self, label: object, memory: Tensor, reads: Sequence[Range], writes: Sequence[Range]) -> None:
        """Nothing to do: this device checks no accesses."""

    def synchronize(self) -> None:
        """Block until both copy threads are done."""
        if self._is_forked:
            return
        for lane in self._copies:
            event = self.event()
            lane.record(event)
            event.wait(event.recorded)
        self._raise_once()

    def close(self) -> None:
        """End the threads."""
        if not self._is_closed and not self._is_forked:
            self._is_closed = True
            for lane in self._copies:
                lane.close()
            self._raise_once()

    @property
    def _is_forked(self) -> bool:
        """Whether this process was forked after the device was opened. Then the device has no threads and no work."""
        return os.getpid() != self._process

    def _raise_once(self) -> None:
        """Raise the error of a copy, if there is one, and forget it."""
        try:
            self._failure.check()
        finally:
            self._failure.error = None


def copy_bytes(target: Tensor, source: Tensor) -> None:
    """One memcpy in one thread. It does not hold Python's global lock, and dispatch modes do not see it."""
    ctypes.memmove(target.data_ptr(), source.data_ptr(), target.nbytes)


def new_pages(nbytes: int) -> mmap.mmap:
    """Memory from the operating system. It goes back as soon as no tensor uses it."""
    if hasattr(mmap, "MAP_ANONYMOUS"):
        return mmap.mmap(-1, max(nbytes, mmap.PAGESIZE), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return mmap.mmap(-1, max(nbytes, mmap.PAGESIZE))


def bytes_of(buffer: mmap.mmap | numpy.ndarray, start: int, nbytes: int) -> Tensor:
    """Bytes of a buffer as a tensor with its own storage. The tensor keeps the buffer alive."""
    if nbytes == 0:
        return torch.empty(0, dtype=torch.uint8)
    return torch.frombuffer(buffer, dtype=torch.uint8, count=nbytes, offset=start)


def check(number: str, link_bytes_per_second: float | None) -> None:
    """Raise if this is not the one CPU, or if the rate is not above zero."""
    if number not in ("", "0"):
        raise SettingsError(f"no such device: 'cpu:{number}'; there is one 'cpu'")
    if link_bytes_per_second is not None and not link_bytes_per_second > 0:
        raise SettingsError(f"link_bytes_per_second={link_bytes_per_second!r} must be above zero")


def create(number: str, link_bytes_per_second: float | None) -> CpuDevice:
    """Open the CPU."""
    return CpuDevice(link_bytes_per_second)
