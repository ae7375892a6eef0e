"""The weights of a model by the bytes they occupy: names whose bytes overlap are one weight.

Reads shapes, strides and addresses. Never reads the data of a weight.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field

from torch import Tensor, nn

from .trace import Weight


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


def group_by_bytes(named: list[tuple[str, Tensor]]) -> list[Group]:
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


def _weight(group: Group) -> Weight:
    (name, first), *others = group.members
    dtype = str(first.dtype).removeprefix("torch.")
    return Weight(name, group.stop - group.start, dtype, tuple(first.shape), tuple(other for other, _ in others))
