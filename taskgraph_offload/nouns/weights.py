"""Which tensors of a model are one weight (their bytes overlap), and whether a trace was made from this model.

Reads shapes, strides and addresses. Never reads the data of a weight.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from operator import attrgetter

from torch import Tensor, nn

from ..errors import PlanError
from .trace import Trace, Weight

ADVICE = "make a plan for this model: Planner(model, ...).plan()"


@dataclass(frozen=True, slots=True)
class Extent:
    """The bytes `[start, stop)` that a tensor spans. In one space, equal numbers are equal bytes."""

    space: Hashable
    start: int
    stop: int


@dataclass
class Group:
    """Names and tensors whose bytes overlap: one weight. `places` are their indices among all of the model."""

    space: Hashable
    start: int
    stop: int
    places: list[int]
    members: list[tuple[str, Tensor]] = field(init=False)
    weight: Weight = field(init=False)


def group_by_bytes(named: list[tuple[str, Tensor]]) -> list[Group]:
    """Sweep over the bytes from low to high; a tensor that begins inside the group so far belongs to it."""
    extents: list[tuple[int, int, Extent]] = []
    for place, (_, tensor) in enumerate(named):
        extent = extent_of(tensor)
        extents.append((extent.start, place, extent))
    found: list[Group] = []
    open_groups: dict[Hashable, Group] = {}
    for start, place, extent in sorted(extents):  # no two places are equal, so extents are never compared
        is_empty = start == extent.stop
        sweep = id(named[place][1]) if is_empty else extent.space  # a tensor without bytes is a group of its own
        group = open_groups.get(sweep)
        if group is None or not (is_empty or start < group.stop):
            group = open_groups[sweep] = Group(extent.space, start, extent.stop, [])
            found.append(group)
        group.stop = max(group.stop, extent.stop)
        group.places.append(place)
    for group in found:
        group.places.sort()
        group.members = list(map(named.__getitem__, group.places))
        group.weight = _weight(group)
    return sorted(found, key=attrgetter("places"))


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and buffer under every name it has."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def extent_of(tensor: Tensor) -> Extent:
    """Where a tensor's bytes are: by address; on the meta device, which has no addresses, by storage and offset."""
    storage, size = tensor.untyped_storage(), tensor.element_size()
    placeless = tensor.device.type == "meta"
    start = (0 if placeless else storage.data_ptr()) + int(tensor.storage_offset()) * size
    elements = 1
    for n, step in zip(tensor.shape, tensor.stride(), strict=True):
        elements += (n - 1) * step
    space: Hashable = ("meta", storage._cdata) if placeless else tensor.device
    return Extent(space, start, start + (elements * size if tensor.numel() else 0))


def check_model(trace: Trace, model: nn.Module) -> None:
    """Raise `PlanError` naming the first weight in which the model differs from the trace.

    It compares weights, not the forward's code. The runtime serves calls that the plan did not expect.
    """
    given = {group.weight.name: group.weight for group in group_by_bytes(list(named_tensors(model)))}
    for name, expected in trace.weights.items():
        if name not in given:
            raise PlanError(f"the plan's weight {name!r} is {_where(name, given, type(model).__name__)}; {ADVICE}")
        if given[name] != expected:
            raise PlanError(
                f"weight {name!r} is {_said(given[name])} in the model, {_said(expected)} in the plan; {ADVICE}"
            )
    for name in given:
        if name not in trace.weights:
            raise PlanError(f"the model's weight {name!r} is {_where(name, trace.weights, 'the plan')}; {ADVICE}")


def _weight(group: Group) -> Weight:
    (name, *aliases), (tensor, *_) = zip(*group.members, strict=True)
    dtype = str(tensor.dtype).removeprefix("torch.")
    return Weight(name, group.stop - group.start, dtype, tuple(tensor.shape), tuple(aliases))


def _where(name: str, weights: Mapping[str, Weight], place: str) -> str:
    """Say how a weight of that name is missing: tied to another one, or not there at all."""
    tied = next((weight.name for weight in weights.values() if name in weight.aliases), None)
    return f"not in {place}" if tied is None else f"tied to {tied!r} in {place}"


def _said(weight: Weight) -> str:
    tied = f", tied to {', '.join(weight.aliases)}" if weight.aliases else ""
    return f"{weight.dtype} {weight.shape} of {weight.nbytes} bytes{tied}"
