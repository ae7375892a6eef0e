"""The model's tensors that show bytes of weights: which they are, and where the model keeps them.

Finds them, describes them, points them; never moves a byte.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ExecutionError
from ..nouns.weights import extent_of
from ..plan.plan import Plan

MODULE_TABLES = frozenset(vars(nn.Module()))  # what every module has, its parameters and hooks among it


@dataclass(eq=False)
class Member:
    """One tensor that shows bytes of a weight, and where the model keeps it (`owners`: a dict and a key in it).

    `counted`: whether torch counts the edits of the tensor, as it does unless it was made in inference mode; `version`
    is the count that is accounted for. `found` is the tensor that was there when the plan was attached.

    `home` and `seat` are views of the same shape, of the weight's bytes at home and on the device.
    """

    tensor: Tensor
    offset: int
    owners: list[tuple[dict[str, Any], str]]
    device: torch.device
    weight: str = ""
    home: Tensor = field(init=False)
    home_address: int = field(init=False)
    seat: Tensor = field(init=False)
    counted: bool = field(init=False)
    version: int = field(init=False)

    def __post_init__(self) -> None:
        self.found, self.came_from = self.tensor, self.device
        self.dtype, self.shape, self.stride = self.tensor.dtype, self.tensor.shape, self.tensor.stride()
        self.note_version()

    def settle(self, home: Tensor) -> None:
        """This shows the bytes at home from now on."""
        self.home, self.home_address = home, home.data_ptr()

    @property
    def is_home(self) -> bool:
        """Whether the tensor shows its bytes at home, where they were: memory may move behind all its views."""
        return self.shows(self.home) and self.home.data_ptr() == self.home_address

    def note_version(self) -> None:
        """All edits of the tensor until now are accounted for."""
        self.counted = not self.tensor.is_inference()
        self.version = self.tensor._version if self.counted else 0

    def is_like(self, tensor: Tensor) -> bool:
        """Whether another tensor could take this one's place."""
        alike = tensor.dtype == self.dtype and tensor.shape == self.shape
        return alike and tensor.device.type != "meta" and tensor.layout is torch.strided

    def shows(self, view: Tensor) -> bool:
        """Whether the tensor is where it was pointed to; else its data is the model's own affair."""
        tensor = self.tensor
        same_place = tensor.data_ptr() == view.data_ptr() and tensor.device == view.device
        return same_place and tensor.stride() == self.stride and self.is_like(tensor)

    def view_of(self, memory: Tensor) -> Tensor:
        """The tensor's shape over the bytes of its weight."""
        with torch.inference_mode(not self.counted):
            empty = torch.empty(0, dtype=self.dtype, device=memory.device)
            place = self.offset // empty.element_size()
            return empty.set_(memory.untyped_storage(), place, self.shape, self.stride)


def point_home(members: Iterable[Member], lent: Collection[int] = ()) -> None:
    """Whoever was pointed elsewhere by us; data that the model has put there is its own affair."""
    for member in members:
        address = member.tensor.data_ptr()
        if address == member.seat.data_ptr() or address - member.offset in lent:
            member.tensor.data = member.home


def edited_weights(members: Iterable[Member]) -> set[str]:
    """The weights that somebody has edited since this was last asked."""
    edited = [member for member in members if member.counted and member.tensor._version != member.version]
    for member in edited:
        member.note_version()
    return {member.weight for member in edited}


def members_of(model: nn.Module, plan: Plan) -> dict[str, list[Member]]:
    """For each weight that moves: its tensors, each once, with all places that hold it."""
    moving = {name: name for name in plan.seats}
    moving |= {alias: name for name in plan.seats for alias in plan.trace.weights[name].aliases}
    found: dict[str, dict[int, Member]] = {name: {} for name in plan.seats}
    for path, owner, key in _places(model):
        if path in moving:
            tensor = owner[key]
            if tensor.device.type == "meta":
                raise ExecutionError(f"weight {path!r} is on the meta device and has no data; load the model first")
            if tensor.is_conj() or tensor.is_neg():
                raise ExecutionError(
                    f"weight {path!r} is a lazy conjugate or negative of other data; give it data of its own first: "
                    "p.data = p.data.resolve_conj().resolve_neg()"
                )
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
    waiting, seen = [value for key, value in attributes.items() if key not in MODULE_TABLES], set[int]()
    while waiting:
        value = waiting.pop()
        if type(value) in (Tensor, nn.Parameter):
            yield value
        elif isinstance(value, list | tuple | dict) and id(value) not in seen:
            seen.add(id(value))
            waiting += value.values() if isinstance(value, dict) else value
