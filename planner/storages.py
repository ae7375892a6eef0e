"""The weights of a model by the bytes they occupy.

Reads shapes, strides and addresses. Never reads the data of a weight.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

from taskgraph_offload.errors import TraceError
from taskgraph_offload.trace import Weight

from .operators import storage_of


@dataclass(frozen=True, slots=True)
class Extent:
    """The bytes that a tensor spans: half-open, in a space where equal numbers mean equal bytes."""

    space: Hashable
    start: int
    stop: int


@dataclass
class Group:
    """Names and tensors whose bytes overlap: one weight."""

    space: Hashable
    start: int
    stop: int
    members: list[tuple[str, Tensor]]
    weight: Weight = field(init=False)


class Storages:
    """Which weight occupies which bytes.

    >>> layer = nn.Linear(2, 2)
    >>> Storages(layer).names_of(layer.weight.T[1:])
    ['weight']
    """

    def __init__(self, model: nn.Module) -> None:
        named = list(named_tensors(model))
        self.device = _one_device(model, named)
        self.groups = _group(named)
        self.weights = {group.weight.name: group.weight for group in self.groups}

    def names_of(self, tensor: Tensor) -> list[str]:
        """The weights whose bytes a tensor shows: none, one, or several where it spans a slab of them."""
        return [group.weight.name for group in self.groups_of(tensor)]

    def groups_of(self, tensor: Tensor) -> list[Group]:
        """The groups of names whose bytes a tensor shows."""
        if group := self._by_identity.get(id(tensor)):
            return [group]
        if storage_of(tensor) is None:
            return []
        extent = extent_of(tensor)
        starts, groups = self._by_space.get(extent.space, ([], []))
        first = max(bisect_right(starts, extent.start) - 1, 0)
        near = groups[first : max(bisect_left(starts, extent.stop), first + 1)]
        return [
            group for group in near if extent.start < group.stop and group.start < max(extent.stop, extent.start + 1)
        ]

    @cached_property
    def _by_identity(self) -> dict[int, Group]:
        return {id(tensor): group for group in self.groups for _, tensor in group.members}

    @cached_property
    def _by_space(self) -> dict[Hashable, tuple[list[int], list[Group]]]:
        spaces: dict[Hashable, tuple[list[int], list[Group]]] = {}
        for group in sorted(self.groups, key=lambda group: group.start):
            if group.start < group.stop:
                starts, groups = spaces.setdefault(group.space, ([], []))
                starts.append(group.start)
                groups.append(group)
        return spaces


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and buffer under every name it has."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def extent_of(tensor: Tensor) -> Extent:
    """Where a tensor's bytes are: by address, or on the meta device, which has none, by storage and offset."""
    storage, size = tensor.untyped_storage(), tensor.element_size()
    placeless = tensor.device.type == "meta"
    start = (0 if placeless else storage.data_ptr()) + int(tensor.storage_offset()) * size
    elements = 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    space: Hashable = ("meta", storage._cdata) if placeless else tensor.device
    return Extent(space, start, start + (elements * size if tensor.numel() else 0))


def _one_device(model: nn.Module, named: list[tuple[str, Tensor]]) -> torch.device:
    if not named:
        raise TraceError(f"{type(model).__name__} has no parameters and no buffers: there is nothing to offload")
    first_name, first = named[0]
    for name, tensor in named:
        if tensor.device != first.device:
            raise TraceError(
                f"the weights are on several devices: {first_name!r} on {first.device}, {name!r} on {tensor.device}; "
                "move the model to one device first, as in model.to('cpu')"
            )
        if tensor.layout is not torch.strided or type(tensor) not in (Tensor, nn.Parameter):
            kind = type(tensor).__name__ if tensor.layout is torch.strided else str(tensor.layout)
            raise TraceError(f"weight {name!r} is a {kind}: only plain strided tensors can be offloaded")
    return first.device


def _group(named: list[tuple[str, Tensor]]) -> list[Group]:
    """Sweep over the bytes from low to high; what begins before the group so far has ended belongs to it."""
    place = {name: index for index, (name, _) in enumerate(named)}
    found: list[Group] = []
    open_groups: dict[Hashable, Group] = {}
    for name, tensor in sorted(named, key=lambda pair: extent_of(pair[1]).start):
        extent = extent_of(tensor)
        is_empty = extent.start == extent.stop
        sweep = id(tensor) if is_empty else extent.space  # a tensor without bytes shares them with itself alone
        group = open_groups.get(sweep)
        if group is None or not (is_empty or extent.start < group.stop):
            group = open_groups[sweep] = Group(extent.space, extent.start, extent.stop, [])
            found.append(group)
        group.stop = max(group.stop, extent.stop)
        group.members.append((name, tensor))
    for group in found:
        group.members.sort(key=lambda member: place[member[0]])
        group.weight = _weight(group)
    return sorted(found, key=lambda group: place[group.weight.name])


def _weight(group: Group) -> Weight:
    (name, first), *others = group.members
    dtype = str(first.dtype).removeprefix("torch.")
    return Weight(name, group.stop - group.start, dtype, tuple(first.shape), tuple(other for other, _ in others))
