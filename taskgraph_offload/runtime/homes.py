"""Where weights live when they are not on the device: one slab of host memory per bundle, of exactly its size.

Weights move in one by one and each original is freed at once, so the host never holds much more than one copy. Knows
bytes and tensors; never decides when anything moves.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from ..devices.base import Device
from ..devices.cpu import bytes_of, copy_bytes, new_pages
from ..nouns.weights import extent_of
from ..plan.fingerprint import check_model
from ..plan.plan import Bundle, Plan, aligned, inner_offsets
from .members import Member, members_of


@dataclass(eq=False)
class Home:
    """The bytes of one weight at home, where they lie in the slab of its bundle, and the tensors that show them.

    One that has `moved` lies elsewhere, in memory that the model gave it.
    """

    name: str
    bundle: str
    offset: int
    members: list[Member]
    memory: Tensor
    moved: bool = False


class Homes:
    """The homes of all weights that a plan moves, and the model's tensors that show them."""

    def __init__(self, model: nn.Module, plan: Plan, device: Device[Any]) -> None:
        check_model(plan.trace, model)
        self._device = device
        self.slabs: dict[str, Tensor] = {}
        self.words: dict[str, numpy.ndarray] = {}  # the same memory, eight bytes each
        self.weights: dict[str, Home] = {}
        self.moves = 0
        members = members_of(model, plan)
        try:
            for bundle in plan.bundles.values():
                self._move_in(plan, bundle, members)
        except BaseException:
            self.give_back()
            raise

    def members(self) -> Iterator[Member]:
        """Every tensor of every weight."""
        return (member for home in self.weights.values() for member in home.members)

    def pieces(self, bundle: str, start: int, stop: int) -> Iterator[tuple[int, int, Tensor]]:
        """Where bytes of a bundle lie at home: (first, last, memory), in order."""
        moved = [home for home in self.weights.values() if home.moved and home.bundle == bundle and home.memory.nbytes]
        for home in sorted(moved, key=lambda home: home.offset):
            first, last = max(start, home.offset), min(stop, home.offset + home.memory.nbytes)
            if first < last:
                if start < first:
                    yield start, first, self.slabs[bundle][start:first]
                yield first, last, home.memory[first - home.offset : last - home.offset]
                start = last
        if start < stop or not moved:
            yield start, stop, self.slabs[bundle][start:stop]

    def give_back(self) -> None:
        """Everything at home, on the device where it was found. The slabs live on as the tensors' memory.

        What the model has given other data keeps it. Each step is tried, whatever became of the others.
        """
        with torch.inference_mode(False), ExitStack() as steps:
            for home in self.weights.values():
                steps.callback(_give_back, home)
            for memory in self.slabs.values():
                steps.callback(self._device.unpin, memory)

    def adopt(self, home: Home, member: Member, tensor: Tensor) -> None:
        """Other memory than its home is behind a weight: that is the home now.

        What was the home stays as it is, for whoever shows it. Where no copy can be made from the new memory, the
        tensor moves to pages of our own.
        """
        with torch.no_grad(), torch.inference_mode(False), _disable_current_modes():
            if tensor is not member.tensor:
                _let_go(home, member)
            self._free_pages(home.name)
            member.tensor, member.came_from = tensor, tensor.device
            member.note_version()
            if tensor.device.type == "cpu" and tensor.stride() == member.stride and not _is_lazy(tensor):
                home.memory = bytes_of(raw_bytes(tensor.detach()).numpy(), 0, home.memory.nbytes)
                member.settle(tensor.detach())
            else:
                home.memory = self._pages_with(home, member, tensor)
                member.settle(member.view_of(home.memory))
                tensor.data = member.home
        home.moved = True
        self.moves += 1

    def _pages_with(self, home: Home, member: Member, tensor: Tensor) -> Tensor:
        memory = bytes_of(new_pages(home.memory.nbytes), 0, home.memory.nbytes)
        alike = torch.empty_strided(member.shape, member.stride, dtype=member.dtype)
        fill(memory, alike.copy_(tensor.detach()))
        self._device.pin(memory)
        self.slabs[_moved(home.name)] = memory
        return memory

    def _free_pages(self, name: str) -> None:
        if _moved(name) in self.slabs:
            self._device.synchronize()
            self._device.unpin(self.slabs.pop(_moved(name)))

    def _move_in(self, plan: Plan, bundle: Bundle, members: Mapping[str, list[Member]]) -> None:
        pages = new_pages(aligned(plan.sizes[bundle.name]))
        for name, offset in inner_offsets(bundle.weights, plan.trace).items():
            home = Home(
                name, bundle.name, offset, members[name], bytes_of(pages, offset, plan.trace.weights[name].nbytes)
            )
            for member in home.members:
                _move_in(member, home.memory)
            self.weights[name] = home
        slab = bytes_of(pages, 0, plan.sizes[bundle.name])
        self._device.pin(slab)
        self.slabs[bundle.name], self.words[bundle.name] = slab, numpy.frombuffer(pages, numpy.int64)


def raw_bytes(tensor: Tensor) -> Tensor:
    """All bytes between a tensor's first and last element, as they lie in its storage."""
    extent, start = extent_of(tensor), tensor.storage_offset() * tensor.element_size()
    empty = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    return empty.set_(tensor.untyped_storage(), start, (extent.stop - extent.start,), (1,))


def fill(memory: Tensor, tensor: Tensor) -> None:
    """Copy a tensor's bytes to the beginning of host memory, unseen by whoever watches operators."""
    source = raw_bytes(tensor.detach())
    if source.device.type != "cpu":
        source = source.cpu()
    copy_bytes(memory[: source.nbytes], source)


def _move_in(member: Member, memory: Tensor) -> None:
    with torch.inference_mode(False):
        fill(memory[member.offset :], member.tensor)
    member.settle(member.view_of(memory))
    member.seat = member.home
    member.tensor.data = member.home


def _moved(name: str) -> str:
    """The name of a slab that holds one weight which has moved to pages of our own."""
    return f"{name}, moved"


def _let_go(home: Home, member: Member) -> None:
    """A tensor that the model has put aside gets a last value of its own, if it still shows the device's."""
    if not member.shows(member.home):
        if not member.shows(member.seat):
            return
        fill(home.memory[member.offset :], member.tensor)
        member.tensor.data = member.home
    if member.came_from.type != "cpu" and member.tensor is not member.found:
        member.tensor.data = member.home.to(member.came_from)


def _give_back(home: Home) -> None:
    memory: dict[torch.device, Tensor] = {}
    for member in home.members:
        if member.shows(member.seat):
            member.tensor.data = member.home
        if member.device.type != "cpu":
            if member.shows(member.home):
                on_device = memory.setdefault(member.device, home.memory.to(member.device))
                member.tensor.data = member.view_of(on_device)
            if member.found is not member.tensor:
                member.found.data = member.found.data.to(member.device)


def _is_lazy(tensor: Tensor) -> bool:
    return tensor.is_conj() or tensor.is_neg()
