"""Where weights live when they are not on the device: one slab of host memory per bundle, of exactly its size.

Weights move in one by one and each original is freed at once, so the host never holds much more than one copy. Knows
bytes and tensors; never decides when anything moves.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from .devices.base import Device
from .devices.cpu import bytes_of, copy_bytes, new_pages
from .errors import ExecutionError
from .fingerprint import check_model
from .plan import Bundle, Plan, aligned, inner_offsets
from .weights import extent_of


@dataclass(eq=False)
class Member:
    """One tensor that shows bytes of a weight, and where the model keeps it (`owners`: a dict and a key in it).

    `counted`: whether torch counts the edits of the tensor, as it does unless it was made in inference mode.

    `home` and `seat` are views of the same shape, of the weight's bytes at home and on the device.
    """

    tensor: Tensor
    offset: int
    owners: list[tuple[dict[str, Any], str]]
    device: torch.device
    weight: str = ""
    home: Tensor = field(init=False)
    seat: Tensor = field(init=False)
    counted: bool = field(init=False)

    def __post_init__(self) -> None:
        self.counted = not self.tensor.is_inference()

    def view_of(self, memory: Tensor) -> Tensor:
        """The tensor's shape over the bytes of its weight."""
        with torch.inference_mode(not self.counted):
            empty = torch.empty(0, dtype=self.tensor.dtype, device=memory.device)
            place = self.offset // empty.element_size()
            return empty.set_(memory.untyped_storage(), place, self.tensor.shape, self.tensor.stride())


@dataclass(eq=False)
class Home:
    """The bytes of one weight at home, where they lie in the slab of its bundle, and the tensors that show them."""

    name: str
    bundle: str
    offset: int
    members: list[Member]
    memory: Tensor


class Homes:
    """The homes of all weights that a plan moves, and the model's tensors that show them."""

    def __init__(self, model: nn.Module, plan: Plan, device: Device[Any]) -> None:
        check_model(plan.trace, model)
        self._device = device
        self.slabs: dict[str, Tensor] = {}
        self.words: dict[str, numpy.ndarray] = {}  # the same memory, eight bytes each
        self.weights: dict[str, Home] = {}
        members = _members(model, plan)
        try:
            for bundle in plan.bundles.values():
                self._move_in(plan, bundle, members)
        except BaseException:
            self.give_back()
            raise

    def members(self) -> Iterator[Member]:
        """Every tensor of every weight."""
        return (member for home in self.weights.values() for member in home.members)

    def give_back(self) -> None:
        """Everything at home, on the device where it was found. The slabs live on as the tensors' memory."""
        for slab in self.slabs.values():
            self._device.unpin(slab)
        for home in self.weights.values():
            memory = home.memory.to(home.members[0].device)
            for member in home.members:
                member.tensor.data = member.view_of(memory)

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
    member.home = member.view_of(memory)
    member.tensor.data = member.home


def _members(model: nn.Module, plan: Plan) -> dict[str, list[Member]]:
    """For each weight that moves: its tensors, each once, with all places that hold it."""
    moving = {name: name for name in plan.seats}
    moving |= {alias: name for name in plan.seats for alias in plan.trace.weights[name].aliases}
    found: dict[str, dict[int, Member]] = {name: {} for name in plan.seats}
    for path, owner, key in _places(model):
        if path in moving:
            tensor = owner[key]
            if tensor.device.type == "meta":
                raise ExecutionError(f"weight {path!r} is on the meta device and has no data; load the model first")
            member = found[moving[path]].setdefault(id(tensor), Member(tensor, 0, [], tensor.device))
            member.owners.append((owner, key))
    members = {name: list(tensors.values()) for name, tensors in found.items()}
    _add_other_views(model, members)
    for name, tensors in members.items():
        first = min(extent_of(member.tensor).start for member in tensors)
        for member in tensors:
            member.weight, member.offset = name, extent_of(member.tensor).start - first
    return members


def _places(model: nn.Module) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Every path of a parameter or buffer, with the dict and the key that hold it."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        for owner in (module._parameters, module._buffers):
            for key, tensor in owner.items():
                if tensor is not None:
                    yield f"{prefix}.{key}" if prefix else key, owner, key


def _add_other_views(model: nn.Module, members: Mapping[str, list[Member]]) -> None:
    """Plain attributes that show a weight's bytes move with it."""
    known = {id(member.tensor) for tensors in members.values() for member in tensors}
    weight_at = {m.tensor.untyped_storage()._cdata: name for name, tensors in members.items() for m in tensors}
    shared = _shared_storages(members)
    for module in model.modules():
        for tensor in _plain_tensors(vars(module)):
            storage = tensor.untyped_storage()._cdata if tensor.layout is torch.strided else None
            if id(tensor) in known or storage not in weight_at or storage in shared:
                continue
            known.add(id(tensor))
            if _within(tensor, members[weight_at[storage]]):
                members[weight_at[storage]].append(Member(tensor, 0, [], tensor.device))


def _shared_storages(members: Mapping[str, list[Member]]) -> set[int]:
    """Storages in which several weights lie: there, a storage does not say which weight a view shows."""
    seen: dict[int, str] = {}
    return {
        storage
        for name, tensors in members.items()
        for member in tensors
        for storage in (member.tensor.untyped_storage()._cdata,)
        if seen.setdefault(storage, name) != name
    }


def _within(tensor: Tensor, members: list[Member]) -> bool:
    extents, extent = [extent_of(member.tensor) for member in members], extent_of(tensor)
    return min(e.start for e in extents) <= extent.start and extent.stop <= max(e.stop for e in extents)


def _plain_tensors(attributes: dict[str, Any]) -> Iterator[Tensor]:
    for value in attributes.values():
        for item in value if isinstance(value, list | tuple) else (value,):
            if type(item) in (Tensor, nn.Parameter):
                yield item
