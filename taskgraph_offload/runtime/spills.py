"""Copies long-lived activations off the device while nobody uses them, and brings them back.

    made            copied out           gone                    comes back        used
    --|---------------|-----------------|~~~~~~~~~~~~~~~~~~~~~~~~~|-----------------|-----
      its call ends   d2h issued         the call begins that      h2d issued
                                         the d2h comes before

A storage is emptied and filled again in place, so views and aliases stay valid. To find the storage of an activation,
we compare with the trace: the same call made it, it has the same size, it comes at the same place in the order of
making, and the same number of storages is alive. If that does not fit, the activation stays on the device.

While a forward runs, a dispatch mode watches every operator. If an operator uses an emptied storage, the storage is
filled first. The mode does not see a kernel that gets only an address. Such a kernel finds the activation once the call
has begun that the copy back serves; before that, the storage is empty.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from ..devices.base import Device
from ..nouns.graph import Task
from ..plan.plan import Plan
from .copies import Copier, Copy, Lanes
from .homes import Slab


class StorageRef:
    """A weak reference to a storage. Before torch 2.10, who follows one must say so, or the storage breaks."""

    def __init__(self, storage: UntypedStorage) -> None:
        self._ref = weakref.ref(storage)

    def __call__(self) -> UntypedStorage | None:
        storage = self._ref()
        if storage is not None and hasattr(storage, "_fix_weakref"):
            storage._fix_weakref()
        return storage


@dataclass(eq=False)
class Spill:
    """An activation whose storage was found, and where it is now. Numbers count copies in their lanes.

    `leaving` keeps the storage alive while it is copied out, `returning` while a copy fills it. The model may drop the
    storage in the meantime, but its memory must not be used for anything else before the compute lane has waited for
    the copy.
    """

    name: str
    storage: StorageRef
    leaves_before: str | None = None  # after the copy out: its storage is emptied when this call begins
    leaving: UntypedStorage | None = None
    left: int = 0
    away: bool = False
    returned: int = 0
    serves: str | None = None  # after the copy back: the call that needs it
    returning: UntypedStorage | None = None


class Spills:
    """The activations that a plan copies out and back."""

    def __init__(self, plan: Plan, device: Device[Any], lanes: Lanes, copier: Copier) -> None:
        self._device, self._lanes, self._copier = device, lanes, copier
        tasks = [task for task in (*plan.cold, *plan.steady) if task.is_activation]
        self._homes = {task.name: Slab(plan.activations[task.name].nbytes) for task in tasks}
        try:
            for home in self._homes.values():
                home.pin(device)
        except BaseException:
            self.close()
            raise
        self._expected = _alive_at_the_end_of_calls(plan, set(self._homes))
        self.forget()

    def watching(self) -> AbstractContextManager[Any]:
        """A context in which every operator is watched."""
        return Watching(self)

    def forget(self) -> None:
        """Forget all activations."""
        self._spills: dict[str, Spill] = {}
        self._by_storage: dict[int, Spill] = {}
        self._made: list[StorageRef] = []

    def close(self) -> None:
        """Unpin the host memory."""
        for home in self._homes.values():
            home.unpin(self._device)

    def call_ends(self, call: str) -> None:
        """Find the activations of the call among the storages that it made and that are still alive."""
        made, self._made = self._made, []
        for nbytes, names in self._expected.get(call, {}).items():
            alive = [ref for ref in made if (storage := ref()) is not None and storage.nbytes() == nbytes]
            if len(alive) == len(names):
                for name, ref in zip(names, alive, strict=True):
                    if name in self._homes:
                        self._find(call, Spill(name, ref))

    def issue(self, copy: Copy) -> None:
        """Copy an activation out or back, as the plan says."""
        spill = self._spills.get(copy.task.name)
        storage = spill.storage() if spill is not None else None
        if spill is not None and storage is not None and copy.task.kind == "h2d":
            self._bring_back(spill, storage, copy)
            spill.serves = copy.call
        elif spill is not None and storage is not None and storage.resizable():
            self._copy_out(spill, storage, copy)
        elif copy.task.kind == "d2h":
            self._copier.stats.skipped_spills += 1

    def call_begins(self, call: str) -> None:
        """Empty the storages that must be gone before this call. Let the compute lane wait for those that it needs."""
        for spill in self._spills.values():
            if spill.serves == call:
                self._wait_for_return(spill)
            if spill.leaves_before == call and (storage := spill.storage()) is not None:
                self._device.reached(f"emptying {spill.name}", _bytes(storage), [], [(0, storage.nbytes())])
                spill.leaves_before, spill.leaving, spill.away = None, None, True  # the call has waited for the copy
                storage.resize_(0)

    def meet(self, storage: UntypedStorage) -> None:
        """An operator is about to use a storage: fill it if it is empty, and do not empty it later."""
        spill = self._by_storage.get(storage._cdata)
        if spill is None or spill.storage() is not storage:
            return
        self._stay(spill)
        if spill.away:
            self._bring_back(spill, storage, Copy(Task("h2d", spill.name), f"h2d {spill.name} on demand", ""))
        self._wait_for_return(spill)
        self._device.reached(f"an operator that uses {spill.name}", _bytes(storage), [(0, storage.nbytes())], [])

    def make(self, storage: UntypedStorage) -> None:
        """An operator has made a storage."""
        self._made.append(StorageRef(storage))

    def bring_all_back(self) -> None:
        """The forward ends: bring back every activation whose storage is still alive."""
        for spill in self._spills.values():
            if (storage := spill.storage()) is not None:
                self.meet(storage)
        self.forget()

    def _find(self, call: str, spill: Spill) -> None:
        storage = spill.storage()
        assert storage is not None
        self._spills[spill.name] = self._by_storage[storage._cdata] = spill
        self._device.reached(f"{call} makes {spill.name}", _bytes(storage), [], [(0, storage.nbytes())])

    def _copy_out(self, spill: Spill, storage: UntypedStorage, copy: Copy) -> None:
        # Wait for the compute lane. It has waited for every copy back, so an earlier copy back has filled this storage.
        self._lanes.wait("d2h", "compute", self._lanes.latest["compute"])
        spill.left = self._copier.copy(copy, [(self._homes[spill.name].memory, _bytes(storage))])
        spill.leaves_before, spill.leaving = copy.task.before, storage

    def _stay(self, spill: Spill) -> None:
        """Do not empty the storage later. The compute lane may change or reuse its memory once it is copied out."""
        spill.leaves_before = None
        if spill.leaving is not None:
            self._lanes.wait("compute", "d2h", spill.left)
            self._device.reached(f"{spill.name} stays", _bytes(spill.leaving), [], [(0, spill.leaving.nbytes())])
            spill.leaving = None

    def _bring_back(self, spill: Spill, storage: UntypedStorage, copy: Copy) -> None:
        self._stay(spill)
        if not spill.away:
            return
        home = self._homes[spill.name].memory
        storage.resize_(home.nbytes)
        target = _bytes(storage)
        # Wait for the compute lane: it may have used this memory before, and it has waited for the copy out.
        self._device.reached(f"memory for {spill.name}", target, [], [(0, home.nbytes)])
        self._lanes.wait("h2d", "compute", self._lanes.mark("compute"))
        spill.returning, spill.returned = storage, self._copier.copy(copy, [(target, home)])
        spill.away = False

    def _wait_for_return(self, spill: Spill) -> None:
        self._lanes.wait("compute", "h2d", spill.returned)
        spill.returning = None


class Watching(TorchDispatchMode):
    """Reports the storages that operators use and make."""

    supports_higher_order_operators = True

    def __init__(self, spills: Spills) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._spills = spills

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        met = {storage._cdata: storage for storage in _storages((args, kwargs))}
        for storage in met.values():
            self._spills.meet(storage)
        out = func(*args, **(kwargs or {}))
        for storage in _storages(out):
            if storage._cdata not in met:
                met[storage._cdata] = storage
                self._spills.make(storage)
        return out


def _storages(tree: Any) -> Iterable[UntypedStorage]:
    for leaf in tree_leaves(tree):
        if isinstance(leaf, Tensor) and leaf.layout is torch.strided:
            yield leaf.untyped_storage()


def _bytes(storage: UntypedStorage) -> Tensor:
    """All bytes of a storage."""
    with _disable_current_modes():
        return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage, 0, (storage.nbytes(),), (1,))


def _alive_at_the_end_of_calls(plan: Plan, spilled: set[str]) -> dict[str, dict[int, list[str]]]:
    """For each call that makes a spilled activation: its activations that live on, by size, in the order of making."""
    where, calls = plan.trace.call_of_piece, plan.trace.calls
    found: dict[str, dict[int, list[str]]] = {}
    for name, activation in plan.activations.items():
        if activation.producer < 0:
            continue
        maker = where[activation.producer]
        following = where.index(maker + 1) if maker + 1 < len(calls) else len(where)
        if activation.until > following:
            found.setdefault(calls[maker].name, {}).setdefault(activation.nbytes, []).append(name)
    return {call: sizes for call, sizes in found.items() if any(name in spilled for n in sizes.values() for name in n)}
