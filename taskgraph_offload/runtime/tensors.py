"""Finds the model's tensors that show the bytes of weights, and points them to the device and home again.

    while a call runs that reads the weight     tensor ----> seat
    at all other times                          tensor ----> home

This module never moves a byte.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ExecutionError
from ..nouns.trace import Weight
from ..nouns.weights import extent_of

count_of_edits = attrgetter("_version")  # for `map`, which is faster than a loop in Python
MODULE_TABLES = frozenset(vars(nn.Module()))  # attributes of every module, such as the dicts of parameters and hooks


@dataclass(eq=False)
class WeightTensor:
    """A tensor that shows the bytes of a weight; tied weights have several. `owners`: dicts of the model that hold it.

    `home` and `seat` are views of the same shape: one of the weight's bytes at home, one of those on the device.
    `found` is the tensor that was there when the plan was attached. `counted`: torch counts the edits of this tensor
    (not if it was made in inference mode). `version` is torch's count when we last looked.
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
        """Set the view of the bytes at home."""
        self.home, self.home_address = home, home.data_ptr()

    @property
    def is_home(self) -> bool:
        """Whether the tensor shows its home, and the home was not moved, for example by `share_memory_`."""
        return self.shows(self.home) and self.home.data_ptr() == self.home_address

    def note_version(self) -> None:
        """Note torch's count of edits: all edits until now are known."""
        self.counted = not self.tensor.is_inference()
        self.version = self.tensor._version if self.counted else 0

    def is_like(self, tensor: Tensor) -> bool:
        """Whether another tensor could take this one's place."""
        alike = tensor.dtype == self.dtype and tensor.shape == self.shape
        return alike and tensor.device.type != "meta" and tensor.layout is torch.strided

    def shows(self, view: Tensor) -> bool:
        """Whether the tensor shows exactly this view. If it shows no view of ours, the user gave it other data."""
        tensor = self.tensor
        same_place = tensor.data_ptr() == view.data_ptr() and tensor.device == view.device
        return same_place and tensor.stride() == self.stride and self.is_like(tensor)

    def view_of(self, memory: Tensor) -> Tensor:
        """A view of the tensor's shape, on memory that holds the bytes of its weight."""
        with torch.inference_mode(not self.counted):
            empty = torch.empty(0, dtype=self.dtype, device=memory.device)
            place = self.offset // empty.element_size()
            return empty.set_(memory.untyped_storage(), place, self.shape, self.stride)


class Pointing:
    """Points the tensors that one call reads. This runs at every call, often for thirty tensors, so it must be fast."""

    def __init__(self, call: str, tensors: Sequence[WeightTensor]) -> None:
        self._call, self._shown = call, tensors
        self._tensors = [shown.tensor for shown in tensors]
        self._out = [(shown.tensor, shown.seat) for shown in tensors]
        self._back = [(shown.tensor, shown.seat.data_ptr(), shown.home) for shown in tensors]
        self._home_addresses = [shown.home_address for shown in tensors]
        self._counted = [shown.tensor for shown in tensors if shown.counted]
        self._versions: list[int] = []

    def to_seats(self) -> set[str]:
        """Point the tensors to their seats. Returns the weights that the user edited at home since the last call.

        Raises if a tensor does not show its home: the user gave it other data.
        """
        if list(map(Tensor.data_ptr, self._tensors)) != self._home_addresses:
            raise self._moved()
        versions = list(map(count_of_edits, self._counted))
        edited = set() if versions == self._versions else self._edited(versions)
        for tensor, seat in self._out:
            tensor.data = seat
        return edited

    def to_homes(self) -> set[str]:
        """Point the tensors home, unless the user gave them other data. Returns the weights that the call edited."""
        versions = list(map(count_of_edits, self._counted))
        edited = set() if versions == self._versions else self._edited(versions)
        for tensor, address, home in self._back:
            if tensor.data_ptr() == address:
                tensor.data = home
        return edited

    def _edited(self, versions: list[int]) -> set[str]:
        self._versions = versions
        return edited_weights(self._shown)

    def _moved(self) -> ExecutionError:
        places = zip(self._shown, self._home_addresses, strict=True)
        weight = next(shown.weight for shown, address in places if shown.tensor.data_ptr() != address)
        return ExecutionError(
            f"weight {weight!r} was given other data after the forward had begun, and before {self._call} read it; do "
            "that between forwards (the next forward will read the new data)"
        )


def point_home(tensors: Iterable[WeightTensor]) -> None:
    """Point tensors from their seats back to their homes, unless the user gave them other data."""
    for shown in tensors:
        if shown.tensor.data_ptr() == shown.seat.data_ptr():
            shown.tensor.data = shown.home


def edited_weights(tensors: Iterable[WeightTensor]) -> set[str]:
    """The weights that were edited since the last time this was called."""
    edited = [shown for shown in tensors if shown.counted and shown.tensor._version != shown.version]
    for shown in edited:
        shown.note_version()
    return {shown.weight for shown in edited}


def tensors_of_weights(model: nn.Module, weights: Mapping[str, Weight]) -> dict[str, list[WeightTensor]]:
    """For each weight: the model's tensors that show its bytes, each once, with all places that hold it."""
    weight_of = {name: weight.name for weight in weights.values() for name in (weight.name, *weight.aliases)}
    found: dict[str, dict[int, WeightTensor]] = {name: {} for name in weights}
    for path, owner, key in _places(model):
        if path in weight_of:
            tensor = owner[key]
            if tensor.device.type == "meta":
                raise ExecutionError(f"weight {path!r} is on the meta device and has no data; load the model first")
            if tensor.is_conj() or tensor.is_neg():
                raise ExecutionError(
                    f"weight {path!r} is a lazy conjugate or negative of other data; give it data of its own first: "
                    "p.data = p.data.resolve_conj().resolve_neg()"
                )
            shown = found[weight_of[path]].setdefault(id(tensor), WeightTensor(tensor, 0, [], tensor.device))
            shown.owners.append((owner, key))
    tensors = {name: list(several.values()) for name, several in found.items()}
    _add_other_views(model, tensors)
    for name, several in tensors.items():
        first = min(extent_of(shown.tensor).start for shown in several)
        for shown in several:
            shown.weight, shown.offset = name, extent_of(shown.tensor).start - first
    return tensors


def _places(model: nn.Module) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Every path of a parameter or buffer, with the dict and the key that hold it."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        for owner in (module._parameters, module._buffers):
            for key, tensor in owner.items():
                if tensor is not None:
                    yield f"{prefix}.{key}" if prefix else key, owner, key


def _add_other_views(model: nn.Module, weights: Mapping[str, list[WeightTensor]]) -> None:
    """Add plain attributes of modules that show a weight's bytes: they must point where the weight points."""
    known = {id(shown.tensor) for several in weights.values() for shown in several}
    weight_at = {t.tensor.untyped_storage()._cdata: name for name, several in weights.items() for t in several}
    shared = _shared_storages(weights)
    for module in model.modules():
        for tensor in _plain_tensors(vars(module)):
            storage = tensor.untyped_storage()._cdata if tensor.layout is torch.strided else None
            if id(tensor) in known or storage not in weight_at or storage in shared:
                continue
            known.add(id(tensor))
            if _within(tensor, weights[weight_at[storage]]):
                weights[weight_at[storage]].append(WeightTensor(tensor, 0, [], tensor.device))


def _shared_storages(weights: Mapping[str, list[WeightTensor]]) -> set[int]:
    """Storages that hold several weights. A view of such a storage may show any of them."""
    seen: dict[int, str] = {}
    return {
        storage
        for name, several in weights.items()
        for shown in several
        for storage in (shown.tensor.untyped_storage()._cdata,)
        if seen.setdefault(storage, name) != name
    }


def _within(tensor: Tensor, tensors: list[WeightTensor]) -> bool:
    extents, extent = [extent_of(shown.tensor) for shown in tensors], extent_of(tensor)
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
