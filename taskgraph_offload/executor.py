"""Runs a plan: attaches it to a model, whose own forward then runs unchanged, and measures what happens."""

from __future__ import annotations

from functools import cached_property
from types import TracebackType
from typing import Any

import torch
from torch import nn

from .devices import check_device, open_device
from .devices.base import Device
from .errors import ExecutionError
from .fingerprint import check_model
from .homes import Homes
from .plan import Plan
from .runtime.agenda import Agenda, agendas
from .runtime.boundaries import Boundaries, Entry
from .runtime.conductor import Conductor
from .runtime.forwards import Forwards
from .runtime.log import Log, Stats
from .runtime.needs import Needs
from .runtime.watch import Watch
from .timeline import Timeline


class Executor:
    """A plan at work on a model. A context manager: attached inside, the model as it was outside.

    `device` is "cuda", "cuda:1", "cpu" or "checked" (by default the best there is), `link_bytes_per_second` slows the
    copies of "cpu" to those of a real link, and with `lazy` the device's memory is taken at the first forward.

    >>> import taskgraph_offload as tgo
    >>> model, x = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(8))), torch.ones(1, 64)
    >>> plan = tgo.Planner(model, "50%", inputs=(x,), machine="cpu").plan()
    >>> with tgo.Executor(model, plan, device="cpu") as run:
    ...     y = model(x)
    >>> run.stats.divergences
    0
    """

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        *,
        device: str | torch.device | Device[Any] | None = None,
        link_bytes_per_second: float | None = None,
        lazy: bool = False,
    ) -> None:
        if device is None or isinstance(device, str | torch.device):
            check_device(device, link_bytes_per_second)
        check_model(plan.trace, model)
        plan.verify()
        self.model, self.plan, self.stats = model, plan, Stats()
        self._device_wanted, self._link, self._lazy = device, link_bytes_per_second, lazy
        self._timeline: Timeline | None = None
        self._clear()

    def _clear(self) -> None:
        self._device: Device[Any] | None = None
        self._homes: Homes | None = None
        self._boundaries: Boundaries | None = None
        self._forwards: Forwards | None = None
        self._conductor: Conductor | None = None
        self._paused = False

    def attach(self) -> Executor:
        """Move the weights to their homes and take over the boundaries of the forward."""
        if self._device is not None or isinstance(vars(self.model).get(self.plan.trace.entry), Entry):
            raise ExecutionError(f"this {type(self.model).__name__} is attached already; detach that executor first")
        try:
            with torch.inference_mode(False):
                self._move_in()
            if not self._lazy:
                self._conductor = self._new_conductor()
        except BaseException:
            self.detach()
            raise
        return self

    def detach(self) -> None:
        """Put the model back as it was found. Does nothing if it is not attached."""
        if self._device is None:
            return
        self._refuse_while_running("detach")
        if self._boundaries is not None:
            self._boundaries.remove()
        self._end_conductor()
        if self._homes is not None:
            with torch.inference_mode(False):
                self._homes.give_back()
        self._device.close()
        self._clear()

    def pause(self) -> None:
        """Everything home and the device's memory free, until `resume`; so that several executors can take turns."""
        self._refuse_while_running("pause")
        self._require_attached()
        self._end_conductor()
        self._paused = True

    def resume(self) -> None:
        """Be ready again after a pause."""
        self._require_attached()
        self._paused = False
        if self._conductor is None and not self._lazy:
            self._conductor = self._new_conductor()

    def timeline(self) -> Timeline:
        """What the last forwards did, task by task, as measured."""
        if self._conductor is not None:
            self._timeline = self._log.timeline(self.plan, self._conductor.lanes)
        if self._timeline is None or not self._timeline.spans:
            raise ExecutionError("no forward has run yet; call the model, then ask for the timeline")
        return self._timeline

    def __enter__(self) -> Executor:
        return self if self._device is not None else self.attach()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.detach()

    def _move_in(self) -> None:
        wanted = self._device_wanted
        if wanted is None or isinstance(wanted, str | torch.device):
            wanted = open_device(wanted, self._link)
        device = self._device = wanted
        self._homes = Homes(self.model, self.plan, device)
        self._needs = Needs(self.plan, self._homes)
        self._forwards = Forwards(self.plan.trace.entry, Watch(self._homes, self._needs.changed), self._ready)
        self._boundaries = Boundaries(self.model, self._modules(), self._forwards.reach)
        for method in dict.fromkeys((self.plan.trace.entry, "forward")):
            self._boundaries.wrap(self.model, method, self._forwards.run)

    @cached_property
    def _agendas(self) -> tuple[Agenda, ...]:
        return agendas(self.plan)

    def _modules(self) -> list[str]:
        """The modules whose boundaries matter, the model itself aside."""
        calls = self.plan.trace.calls
        found = dict.fromkeys(name for call in calls for name in (call.boundary.module, call.block) if name)
        return list(found)

    def _ready(self) -> Conductor:
        """What conducts the forward that is about to begin."""
        if self._paused:
            raise ExecutionError("this executor is paused; call resume() before the model")
        if self._conductor is None:
            self._conductor = self._new_conductor()
        return self._conductor

    def _new_conductor(self) -> Conductor:
        assert self._device is not None
        assert self._homes is not None
        self._log = Log(self.stats)
        with torch.inference_mode(False):
            return Conductor(self.plan, self._agendas, self._homes, self._needs, self._device, self._log)

    def _end_conductor(self) -> None:
        if self._conductor is None:
            return
        self._timeline = self._log.timeline(self.plan, self._conductor.lanes)
        self._conductor.close()
        self._conductor = None

    def _require_attached(self) -> None:
        if self._device is None:
            raise ExecutionError("this executor is not attached; call attach() first")

    def _refuse_while_running(self, what: str) -> None:
        if self._forwards is not None and self._forwards.are_running:
            raise ExecutionError(f"cannot {what} while a forward is running")
