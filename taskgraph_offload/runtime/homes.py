"""Homes: the host memory where weights are when they are not on the device.

Weights that travel together lie together, so that one copy brings them: the homes are laid out for the bundles of one
plan. A weight that no call of that plan reads has a home of its own. Other plans of the same model run over the same
homes, and their bundles may take more copies. Weights move in one by one, and each original is freed at once, so the
host never holds much more than the model once. This module knows bytes and tensors; it never decides when a weight is
copied.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any, Protocol

import numpy
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from ..devices.base import Device
from ..devices.cpu import bytes_of, copy_bytes, new_pages
from ..errors import ExecutionError
from ..nouns.progress import reported
from ..nouns.weights import check_model, extent_of
from ..plan.plan import Plan, aligned, inner_offsets
from .tensors import WeightTensor, tensors_of_weights

TRIM_EVERY = 2**30  # bytes that moved in; then freed memory goes back to the system


class HomeMemory(Protocol):
    """What every kind of home must offer. Today there is one kind, `Slab`; pages of a file would be another one."""

    @property
    def memory(self) -> Tensor:
        """All bytes, where a copy lane can read and write them."""
        ...

    @property
    def words(self) -> numpy.ndarray:
        """The same bytes as words of eight bytes each, to look for edits."""
        ...

    def pin(self, device: Device[Any]) -> None:
        """Make the memory ready for fast copies."""
        ...

    def unpin(self, device: Device[Any]) -> None:
        """Undo `pin`; does nothing if the memory is not pinned."""
        ...


class Slab:
    """Host memory of a given size."""

    def __init__(self, nbytes: int) -> None:
        pages = new_pages(aligned(nbytes))
        self.memory, self.words = bytes_of(pages, 0, nbytes), numpy.frombuffer(pages, numpy.int64)
        self._is_pinned = False

    def pin(self, device: Device[Any]) -> None:
        """Make the memory ready for fast copies."""
        device.pin(self.memory)
        self._is_pinned = True

    def unpin(self, device: Device[Any]) -> None:
        """Undo `pin`; does nothing if the memory is not pinned."""
        if self._is_pinned:
            self._is_pinned = False
            device.unpin(self.memory)


class GivenMemory(Slab):
    """Memory that the user gave to a weight. If it is pinned already, that is the user's affair."""

    def __init__(self, memory: numpy.ndarray) -> None:
        self.memory, self.words = bytes_of(memory, 0, memory.nbytes), memory[: memory.nbytes // 8 * 8].view(numpy.int64)
        self._is_pinned = False

    def pin(self, device: Device[Any]) -> None:
        """Make the memory ready for fast copies."""
        if not self.memory.is_pinned():
            super().pin(device)


@dataclass(eq=False)
class WeightHome:
    """The home of one weight: its bytes in the memory of a `group`, and the tensors that show it.

    `moved`: the user gave the weight other memory, which is its home now, and a group of its own.
    """

    name: str
    group: str
    offset: int
    tensors: list[WeightTensor]
    memory: Tensor
    moved: bool = False

    @property
    def is_number(self) -> bool:
        """Whether this is a single number. Operators on a GPU can read a single number from the host."""
        return all(not shown.shape for shown in self.tensors)


class Homes:
    """The homes of all weights of a model. `moves` counts how often a weight got another home."""

    def __init__(self, model: nn.Module, plan: Plan, device: Device[Any]) -> None:
        check_model(plan.trace, model)
        self._device = device
        self.memories: dict[str, HomeMemory] = {}  # by group
        self.weights: dict[str, WeightHome] = {}
        self.moves = 0
        try:
            self._move_in(plan, tensors_of_weights(model, plan.trace.weights))
        except BaseException:
            self.give_back()
            raise

    def tensors(self) -> Iterator[WeightTensor]:
        """Every tensor of every weight."""
        return (shown for home in self.weights.values() for shown in home.tensors)

    def pieces(self, offsets: Mapping[str, int], start: int, stop: int) -> Iterator[tuple[int, int, Tensor]]:
        """Where the bytes of a bundle are at home, as (first, last, memory), in order.

        `offsets` are those of its weights. What lies next to each other in the bundle and at home is one piece.
        """
        pieces: list[
            tuple[str, int, int, int]
        ] = []  # group, first and last byte of the bundle, first byte of the group
        for name, offset in offsets.items():
            home = self.weights[name]
            first, last = max(start, offset), min(stop, offset + home.memory.nbytes)
            if first < last:
                place = home.offset + first - offset
                if pieces and pieces[-1][0] == home.group and place - pieces[-1][3] == first - pieces[-1][1]:
                    _, first, _, place = pieces.pop()
                pieces.append((home.group, first, last, place))
        for group, first, last, place in pieces:
            yield first, last, self.memories[group].memory[place : place + last - first]

    def give_back(self) -> None:
        """Put every tensor back on the device where it was found. Tensors of the CPU keep their home as memory.

        A tensor that the user gave other data keeps that data. Every step runs, even if another one fails.
        """
        with torch.inference_mode(False), ExitStack() as steps:
            for home in self.weights.values():
                steps.callback(_give_back, home)
            for memory in self.memories.values():
                steps.callback(memory.unpin, self._device)

    def adopt(self, home: WeightHome, shown: WeightTensor, tensor: Tensor) -> None:
        """The user gave a weight other memory, `tensor`: make that memory the weight's home.

        The old home stays as it is, because other tensors may show it. If copies cannot read the new memory, or it
        cannot be pinned, the tensor moves to a new slab.
        """
        with torch.no_grad(), torch.inference_mode(False), _disable_current_modes():
            given = self._pinned_in_place(shown, tensor)
            slab = self._slab_with(home, shown, tensor) if given is None else given  # raises before anything changes
            if tensor is not shown.tensor:
                _let_go(home, shown)
            self._free_slab(home.name)
            shown.tensor, shown.came_from = tensor, tensor.device
            shown.note_version()
            if given is not None:
                shown.settle(tensor.detach())
            else:
                shown.settle(shown.view_of(slab.memory))
                tensor.data = shown.home
            home.group, home.offset, home.memory = _moved(home.name), 0, slab.memory
            self.memories[home.group] = slab
            shown.seat = shown.home
        home.moved = True
        self.moves += 1

    def _pinned_in_place(self, shown: WeightTensor, tensor: Tensor) -> GivenMemory | None:
        """The tensor's own memory, pinned; or None if copies cannot read it, or it cannot be pinned."""
        if tensor.device.type != "cpu" or tensor.stride() != shown.stride or _is_lazy(tensor):
            return None
        given = GivenMemory(raw_bytes(tensor.detach()).numpy())
        try:
            given.pin(self._device)
        except ExecutionError:  # for example, pages of a file, or pages that are pinned already for other memory
            return None
        return given

    def _slab_with(self, home: WeightHome, shown: WeightTensor, tensor: Tensor) -> Slab:
        slab = Slab(home.memory.nbytes)
        alike = torch.empty_strided(shown.shape, shown.stride, dtype=shown.dtype)
        fill(slab.memory, alike.copy_(tensor.detach()))
        slab.pin(self._device)
        return slab

    def _free_slab(self, name: str) -> None:
        if _moved(name) in self.memories:
            self._device.synchronize()
            self.memories.pop(_moved(name)).unpin(self._device)

    def _move_in(self, plan: Plan, tensors: Mapping[str, list[WeightTensor]]) -> None:
        """Copy all weights to their homes, group by group."""
        weights, since_trim = plan.trace.weights, 0
        groups = {name: bundle.weights for name, bundle in plan.bundles.items()}
        groups |= {f"{name}, not planned": (name,) for name in weights if name not in plan.seats}
        for group, names in reported("bundles of weights moved to their homes", list(groups.items())):
            offsets = inner_offsets(names, plan.trace)
            slab = Slab(max((offsets[name] + weights[name].nbytes for name in names), default=0))
            for name, offset in offsets.items():
                memory = bytes_of(slab.memory.numpy(), offset, weights[name].nbytes)
                self.weights[name] = WeightHome(name, group, offset, tensors[name], memory)
                for shown in tensors[name]:
                    _move_in(shown, memory)
            slab.pin(self._device)
            self.memories[group] = slab
            since_trim += slab.memory.nbytes
            if since_trim >= TRIM_EVERY:
                since_trim = 0
                give_freed_memory_back()
        give_freed_memory_back()


def raw_bytes(tensor: Tensor) -> Tensor:
    """All bytes between a tensor's first and last element, as they lie in its storage."""
    extent, start = extent_of(tensor), tensor.storage_offset() * tensor.element_size()
    empty = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    return empty.set_(tensor.untyped_storage(), start, (extent.stop - extent.start,), (1,))


def fill(memory: Tensor, tensor: Tensor) -> None:
    """Copy a tensor's bytes to the beginning of host memory. Dispatch modes do not see the copy."""
    source = raw_bytes(tensor.detach())
    if source.device.type != "cpu":
        source = source.cpu()
    copy_bytes(memory[: source.nbytes], source)


def give_freed_memory_back() -> None:
    """Return freed pages to the system. Otherwise the C library keeps them, and the process seems twice as large."""
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # another C library than GNU's has no such function
            ctypes.CDLL(None).malloc_trim(0)


def _move_in(shown: WeightTensor, memory: Tensor) -> None:
    with torch.inference_mode(False):
        fill(memory[shown.offset :], shown.tensor)
    shown.settle(shown.view_of(memory))
    shown.seat = shown.home
    shown.tensor.data = shown.home


def _moved(name: str) -> str:
    """The group of one weight that the user moved."""
    return f"{name}, moved"


def _let_go(home: WeightHome, shown: WeightTensor) -> None:
    """Let go of a tensor that the user replaced: point it home, and back to the device that it came from."""
    if not shown.shows(shown.home):
        if not shown.shows(shown.seat):
            return
        fill(home.memory[shown.offset :], shown.tensor)
        shown.tensor.data = shown.home
    if shown.came_from.type != "cpu" and shown.tensor is not shown.found:
        shown.tensor.data = shown.home.to(shown.came_from)


def _give_back(home: WeightHome) -> None:
    memory: dict[torch.device, Tensor] = {}
    for shown in home.tensors:
        if shown.shows(shown.seat):
            shown.tensor.data = shown.home
        if shown.device.type != "cpu":
            if shown.shows(shown.home):
                on_device = memory.setdefault(shown.device, home.memory.to(shown.device))
                shown.tensor.data = shown.view_of(on_device)
            if shown.found is not shown.tensor:
                shown.found.data = shown.found.data.to(shown.device)


def _is_lazy(tensor: Tensor) -> bool:
    return tensor.is_conj() or tensor.is_neg()
