"""Runs a plan on a model, and measures what happens. The model's own forward runs unchanged."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from types import TracebackType
from typing import Any
from warnings import warn
from weakref import finalize

import torch
from torch import nn

from ..devices import check_device, open_device
from ..devices.base import Device
from ..errors import ExecutionError, SettingsError
from ..foreign import refuse_foreign_hooks
from ..nouns.budget import readable
from ..nouns.timeline import Timeline
from ..nouns.weights import check_model
from ..plan.plan import Plan
from .conductor import Conductor
from .copies import copies_by_slot
from .edits import Edits
from .forwards import Forwards
from .homes import HomeMemory, Homes
from .hooks import Hooks, Inside, Reach, owners
from .measured import Log, Stats
from .model_device import ModelDevice
from .needs import Needs


class Executor:
    """Runs a plan on a model. As a context manager, it attaches the plan on entry and detaches it on exit.

    `device` is "cuda", "cuda:1", "cpu", "checked" or "virtual"; without it, a GPU if there is one, else the CPU.
    `link_bytes_per_second` slows the copies of "cpu" down to the rate of a real link. With `lazy`, the executor
    allocates the device's memory at the first forward. With `preload`, `attach` starts to copy what stays on the
    device, and does not wait until that is done. So after other work, the first forward is as fast as any other one. If
    it begins at once, what streams comes behind these copies: it may be slower than without `preload`.

    You may read and edit weights between forwards, and in hooks. The next forward sees

    - every operator that works in place, such as `weight.add_(1)`;
    - another Parameter, or other data of a Parameter (`weight.data = ...`). That memory is the weight's home from then
      on; if its pages cannot be locked, a copy is. If you set `.data` while a forward runs, the forward raises as soon
      as a block is about to read the weight;
    - an edit that torch does not count (`weight.data.add_(1)`, numpy), if it changes one of 64 samples of eight bytes,
      spread evenly over the weight. An edit of all rows always does. After a smaller edit, call `weights_changed()`.

    On a GPU, the host is ahead of the device. Copies may be under way after a forward, in a hook, and after attaching
    with `preload`: call `torch.cuda.synchronize()` before you edit a weight there.

    Between its calls, a weight is at home, in host memory: `module.weight.device` is "cpu" for code outside of the
    model. But `model.device`, if its class has such a property, is the device where the forward runs: pipelines and
    `generate` ask it. The forward moves its inputs there, and leaves its outputs there.

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
        preload: bool = False,
    ) -> None:
        if device is None or isinstance(device, str | torch.device):
            check_device(device, link_bytes_per_second)
        elif not hasattr(device, "lanes"):
            raise SettingsError(f"device={device!r} is no device: give a name, such as 'cuda:1', 'cpu' or 'checked'")
        if lazy and preload:
            raise SettingsError(
                "lazy=True takes no memory before the first forward, so preload=True cannot copy: drop one"
            )
        if plan.trace.program:
            raise SettingsError(
                f"this plan is of a request of {plan.trace.model}: it can be predicted and drawn, not run yet; "
                "tgo.offload runs a pipeline, with a plan for each model"
            )
        check_model(plan.trace, model)
        plan.verify()
        self.model, self.plan = model, plan
        self.stats = Stats()
        self._device_wanted, self._link, self._lazy = device, link_bytes_per_second, lazy
        self._preload = preload
        self.wakes: Callable[[], None] | None = None  # ends a pause where a forward begins; None: that is an error
        self._timeline: Timeline | None = None
        self._finalizer: finalize[[Device[Any], Mapping[str, HomeMemory]], Executor] | None = None
        self._clear()

    def _clear(self) -> None:
        self._device: Device[Any] | None = None
        self._homes: Homes | None = None
        self._hooks: Hooks | None = None
        self._model_device: ModelDevice | None = None
        self._forwards: Forwards | None = None
        self._conductor: Conductor | None = None
        self._paused = False
        self.is_hooked = False  # whether the hooks of the plan are on the model, all of them
        if self._finalizer is not None:
            self._finalizer.detach()
        self._finalizer = None

    def attach(self) -> Executor:
        """Move the weights to their homes, and put hooks on the model that follow its forward."""
        for name, owner in owners(self.model).items():
            if owner is not self:
                where = f"its module {name!r}" if name else f"this {type(self.model).__name__}"
                raise ExecutionError(f"{where} is attached already; call taskgraph_offload.detach(model) first")
        if self._device is not None:
            raise ExecutionError("this executor is attached already")
        refuse_foreign_hooks(self.model)
        self.stats = Stats()
        try:
            with torch.inference_mode(False):
                self._move_in()
            self._take_memory()
        except BaseException:
            self.detach()
            raise
        return self

    def detach(self) -> None:
        """Put the model back as it was found. Does nothing if it is not attached."""
        if self._device is None:
            return
        self._refuse_while_running("detach")
        with ExitStack() as steps:  # runs the last step first, and each one even if another one fails
            steps.callback(self._clear)
            steps.callback(self._device.close)
            if self._homes is not None:
                steps.callback(self._homes.give_back)
            steps.callback(self._end_conductor)
            if self._hooks is not None:
                steps.callback(self._hooks.remove)
            if self._model_device is not None:
                steps.callback(self._model_device.remove)

    def follow(self, plan: Plan) -> None:
        """Follow another plan of the same model from now on. The weights stay in their homes.

        If there is an error, this goes on with the plan that it has.
        """
        check_model(plan.trace, self.model)
        plan.verify()
        self._refuse_while_running("follow another plan")
        self._require_attached()
        self._end_conductor()
        before, self.plan = self.plan, plan
        try:
            self._put_hooks()
            if not self._paused:
                self._take_memory()
        except BaseException:
            self._end_conductor()
            self.plan = before
            self._put_hooks()
            raise

    @contextmanager
    def unhooked(self) -> Iterator[None]:
        """The model without hooks, and with all weights at home, so that it can be traced. No forward may run."""
        self._refuse_while_running("trace")
        self._require_attached()
        assert self._device is not None
        assert self._hooks is not None
        assert self._model_device is not None
        self._end_conductor()
        self.is_hooked = False
        self._hooks.remove()
        self._model_device.remove()
        try:
            yield
        finally:
            self._put_hooks()
            self._model_device = ModelDevice(self.model, self._device.device)

    def pause(self) -> None:
        """Move everything home and free the device's memory, until `resume`. So several executors can take turns."""
        self._refuse_while_running("pause")
        self._require_attached()
        self._end_conductor()
        self._paused = True

    def resume(self) -> None:
        """End a pause: allocate the device's memory again."""
        self._require_attached()
        self._paused = False
        self._take_memory()

    @property
    def is_attached(self) -> bool:
        """Whether the plan is attached to the model."""
        return self._device is not None

    @property
    def is_paused(self) -> bool:
        """Whether `pause` was called, and not yet `resume`."""
        return self._paused

    def weights_changed(self) -> None:
        """Say that you edited weights in a way that torch does not count. The next forward loads all weights again."""
        self._require_attached()
        self._edits.everything_changed()

    def timeline(self) -> Timeline:
        """The measured timeline of the last forwards."""
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
        device.begin()
        self._homes = Homes(self.model, self.plan, device)
        self._finalizer = finalize(self, _let_go, device, self._homes.memories)
        self._finalizer.atexit = False
        self._put_hooks()
        self._model_device = ModelDevice(self.model, device.device)

    def _put_hooks(self) -> None:
        """Take off the hooks of the plan before, and put on those of the plan."""
        assert self._device is not None
        assert self._homes is not None
        machine, calls = self.plan.machine, self.plan.trace.calls
        self._device.expect(machine, {call.name: call.cost(machine) for call in calls})
        _warn_if_libraries_do_not_fit(self.plan, self._device)
        self.is_hooked = False
        if self._hooks is not None:
            self._hooks.remove()
        needs, entry = Needs(self.model, self.plan, self._homes), self.plan.trace.entry
        self._needs, self._inside, self._slots = needs, Inside(), copies_by_slot(self.plan)
        self._edits = Edits(self._homes, needs.changed)
        self._forwards = Forwards(needs.entries, self._edits, self._ready)
        self._hooks = Hooks(self.model, self, Reach(self._forwards.reach, self._forwards.inputs))
        self._hooks.watch(dict.fromkeys(n for call in calls for n in (call.boundary.module, call.block) if n))
        self._hooks.watch((name for name in needs.on_demand if name), self._forwards.returned)
        for method in dict.fromkeys((entry, "forward")):
            self._hooks.wrap_entry("", method, self._forwards.run, planned=method == entry)
        for module in needs.entries:
            self._hooks.wrap_entry(module, "forward", self._forwards.run, planned=True)
        self._hooks.wrap_inside({name: () for name in needs.on_demand if name} | needs.blocks_of, self._inside)
        self.is_hooked = True

    def _ready(self) -> Conductor:
        """The conductor for the forward that is about to begin."""
        if self._paused and self.wakes is not None:
            self.wakes()
        if self._paused:
            raise ExecutionError("this executor is paused; call resume() before the model")
        assert self._device is not None
        assert self._hooks is not None
        self._device.begin()  # first, because it may raise, and there is nothing to undo yet
        if self._conductor is None:
            self._conductor = self._new_conductor()
        self._hooks.come_outermost()
        return self._conductor

    def _take_memory(self) -> None:
        """Allocate the device's memory ahead of the next forward, and begin to fill it, as the user wished."""
        if self._conductor is None and not self._lazy:
            self._conductor = self._new_conductor()
            if self._preload:
                with torch.inference_mode(False):
                    self._conductor.preload()

    def _new_conductor(self) -> Conductor:
        assert self._device is not None
        assert self._homes is not None
        self._device.begin()  # allocate and record in the caller's own stream
        self._log = Log(self.stats)
        with torch.inference_mode(False):
            return Conductor(self.plan, self._slots, self._homes, self._needs, self._inside, self._device, self._log)

    def _end_conductor(self) -> None:
        if self._conductor is None:
            return
        conductor, self._conductor = self._conductor, None
        try:
            self._timeline = self._log.timeline(self.plan, conductor.lanes)
        finally:
            conductor.close()

    def _require_attached(self) -> None:
        if self._device is None:
            raise ExecutionError("this executor is not attached; call attach() first")

    def _refuse_while_running(self, what: str) -> None:
        if self._forwards is not None and self._forwards.are_running:
            raise ExecutionError(f"cannot {what} while a forward is running")


def attached_to(model: nn.Module) -> list[Executor]:
    """The executors that are attached to a model, or to a part of it."""
    return list(owners(model).values())


def _warn_if_libraries_do_not_fit(plan: Plan, device: Device[Any]) -> None:
    """Say so if the plan leaves too little of its budget to the device's libraries."""
    over = plan.peak_bytes + device.library_bytes - plan.budget_bytes
    if device.library_bytes and over > 0:
        warn(
            f"this forward will pass its budget of {readable(plan.budget_bytes)} by {readable(over)}: CUDA's libraries "
            f"take {readable(device.library_bytes)} on this GPU. Plan with margin='{device.library_bytes}B'",
            stacklevel=4,
        )


def _let_go(device: Device[Any], memories: Mapping[str, HomeMemory]) -> None:
    """Clean up after an executor that was never detached and is garbage now, together with its model."""
    with suppress(Exception):
        device.synchronize()
    for memory in memories.values():
        with suppress(Exception):
            memory.unpin(device)
    with suppress(Exception):
        device.close()
