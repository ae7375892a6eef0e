"""The weights of a model by the bytes they occupy.

Reads shapes, strides and addresses. Never reads the data of a weight.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Hashable
from functools import cached_property

import torch
from torch import Tensor, nn

from taskgraph_offload.errors import TraceError
from taskgraph_offload.nouns.weights import Group, extent_of, group_by_bytes, named_tensors

from .operators import storage_of


class Storages:
    """Which weight occupies which bytes.

    >>> layer = nn.Linear(2, 2)
    >>> Storages(layer).names_of(layer.weight.T[1:])
    ['weight']
    """

    def __init__(self, model: nn.Module) -> None:
        named = list(named_tensors(model))
        self.device = _one_device(model, named)
        self.groups = group_by_bytes(named)
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
