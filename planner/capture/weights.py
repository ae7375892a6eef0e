"""The weights of a model during a trace: which bytes each one occupies, its fake, and a backup of its bytes.

Reads shapes, strides and addresses. Reads the data of a weight only to save it before a real run changes it.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    FakeTensor,
    FakeTensorMode,
    UnsupportedFakeTensorException,
    unset_fake_temporarily,
)
from torch.utils._pytree import tree_map_only

from taskgraph_offload.errors import TraceError
from taskgraph_offload.nouns.trace import Weight
from taskgraph_offload.nouns.weights import Group, extent_of, group_by_bytes, named_tensors

from .recorder import operator_name, storage_key, storage_of, tensors_in

# What real kernels refuse and fakes accept: floating tensors of several dtypes.
ONE_DTYPE = {"mm", "addmm", "mv", "addmv", "index_add", "index_add_", "index_put", "index_put_", "_index_put_impl_"}
NORMS = {"native_layer_norm", "native_group_norm", "native_batch_norm"}  # take half precision beside float32


class MixedDtypesError(RuntimeError):
    """An operator got tensors of several dtypes that a real kernel refuses."""


class WeightMap:
    """Which weight occupies which bytes.

    >>> layer = nn.Linear(2, 2)
    >>> WeightMap(layer).names_of(layer.weight.T[1:])
    ['weight']
    """

    def __init__(self, model: nn.Module) -> None:
        named = list(named_tensors(model))
        self.device = _one_device(model, named)
        self.groups = group_by_bytes(named)
        self.weights: dict[str, Weight] = {}
        self._by_identity: dict[int, Group] = {}
        self._by_space: dict[Hashable, tuple[list[int], list[Group]]] = {}  # where each group starts, and the group
        for group in self.groups:
            self.weights[group.weight.name] = group.weight
            for _, tensor in group.members:
                self._by_identity[id(tensor)] = group
        for group in sorted(self.groups, key=attrgetter("start")):
            if group.start < group.stop:
                starts, groups = self._by_space.setdefault(group.space, ([], []))
                starts.append(group.start)
                groups.append(group)

    def names_of(self, tensor: Tensor) -> list[str]:
        """The weights whose bytes a tensor shows: none, one, or several if it spans a slab of them."""
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


class Fakes:
    """Makes and remembers the fake of every real tensor of one run. Each weight gets one storage of its own.

    A model on the meta device is traced as if on the CPU. There attention is fused, as on the device where it will run.
    """

    def __init__(self, where: WeightMap) -> None:
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.device = torch.device("cpu") if where.device.type == "meta" else where.device
        self.where = where
        self._made: dict[int, tuple[Tensor, Tensor]] = {}  # real and fake, by the identity of the real one
        self._bytes: dict[str, Tensor] = {}
        self._names: dict[int, tuple[str]] = {}  # by storage
        with self.mode:
            for group in where.groups:
                rounded = (group.stop - group.start + 15) // 16 * 16  # so that every dtype can view it
                base = torch.empty(max(rounded, 16), dtype=torch.uint8, device=self.device)
                self._bytes[group.weight.name] = base
                self._names[storage_key(base)] = (group.weight.name,)

    @contextmanager
    def in_place_of_weights(self, model: nn.Module) -> Iterator[None]:
        """Put fakes into the modules' tables of parameters and buffers. At the end, put the same tensors back."""
        before: list[tuple[dict[str, Any], dict[str, Any]]] = []  # each table, and what it holds
        for module in model.modules():
            before += [(module._parameters, dict(module._parameters)), (module._buffers, dict(module._buffers))]
        try:
            for table, tensors in before:
                for name, tensor in tensors.items():
                    if tensor is not None:
                        table[name] = self.of(tensor)
            yield
        finally:
            for table, tensors in before:
                for name in set(table) - set(tensors):
                    del table[name]
                table.update(tensors)

    def of(self, tensor: Tensor, device: torch.device | None = None) -> Tensor:
        """The fake of any tensor, on the tensor's own device or on another one."""
        if isinstance(tensor, FakeTensor):
            return tensor
        if id(tensor) not in self._made:
            with self.mode:
                self._made[id(tensor)] = (tensor, self._make(tensor, device or tensor.device))
        return self._made[id(tensor)][1]

    def of_arguments(self, func: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """The arguments of an operator with fakes in place of real tensors.

        Some real tensors appear only during the forward: `nn.LSTM` keeps its weights in a list of its own.
        """
        args, kwargs = tree_map_only(Tensor, self.of, (args, kwargs))
        _check_dtypes(operator_name(func), args, kwargs)
        return args, kwargs

    def weights_of(self, tensor: Tensor) -> Sequence[str]:
        """The weight whose bytes a fake stands for, if any."""
        return self._names.get(storage_key(tensor), ())

    def _make(self, tensor: Tensor, device: torch.device) -> Tensor:
        if tensor.layout is not torch.strided or storage_of(tensor) is None:
            return self.mode.from_tensor(tensor)
        groups = self.where.groups_of(tensor)
        if len(groups) > 1:
            raise UnsupportedFakeTensorException(f"a tensor that is no parameter spans {len(groups)} weights")
        if groups:
            offset = (extent_of(tensor).start - groups[0].start) // tensor.element_size() if tensor.numel() else 0
            base = self._bytes[groups[0].weight.name].view(tensor.dtype)
            view = base.as_strided(tensor.shape, tensor.stride(), offset)
            return nn.Parameter(view, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else view
        if tensor.numel() == 1 and type(tensor) is Tensor and tensor.device.type == device.type == "cpu":
            return self._constant(tensor)
        place = self.device if device.type == "meta" else device
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=place)

    def _constant(self, tensor: Tensor) -> Tensor:
        """A fake that knows its one number, so that `int(timestep)` works."""
        with unset_fake_temporarily():
            number = tensor.clone()  # the fake may change the number
        fake: Tensor = self.mode.fake_tensor_converter.from_real_tensor(self.mode, number, make_constant=True)
        return fake


def assert_no_fakes_left(model: nn.Module) -> None:
    """Raise if a module still has a fake where it should keep a parameter or buffer."""
    for name, tensor in named_tensors(model):
        if isinstance(tensor, FakeTensor):
            raise TraceError(
                f"{name!r} of {type(model).__name__} is kept where it cannot be put back after tracing, and is lost: "
                "load the model again, and keep its parameters and buffers as plain torch.nn.Module does"
            )


def _check_dtypes(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Raise if an operator gets dtypes that its real kernels refuse."""
    if name not in ONE_DTYPE and name not in NORMS:
        return
    dtypes: list[torch.dtype] = []
    for tensor in tensors_in((args, dict(kwargs))):
        if tensor.is_floating_point() and tensor.dtype not in dtypes:
            dtypes.append(tensor.dtype)
    if len(dtypes) > 1 and not (name in NORMS and dtypes[0].itemsize == 2 and dtypes[1:] == [torch.float32]):
        shown = " and ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise MixedDtypesError(f"{name} got tensors of different dtypes: {shown}")


class Backup:
    """Keeps the bytes of weights and other tensors from before their first change in a real run."""

    def __init__(self, where: WeightMap) -> None:
        self.where = where
        self._saved: dict[tuple[object, int], tuple[Tensor, Tensor]] = {}

    def before_write(self, tensor: Tensor) -> None:
        """Save the weight whose bytes a tensor shows, or the tensor's whole storage if it shows none."""
        extent, groups = extent_of(tensor), self.where.groups_of(tensor)
        storage = tensor.untyped_storage()
        first = extent.start - int(tensor.storage_offset()) * tensor.element_size()
        start, stop = 0, storage.nbytes()
        if groups:
            start, stop = groups[0].start - first, groups[-1].stop - first
        key = (extent.space, first + start)
        if key not in self._saved:
            view = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage, start, (stop - start,), (1,))
            self._saved[key] = (view, view.clone())

    def restore(self) -> None:
        """Put every saved byte back."""
        for view, before in self._saved.values():
            view.copy_(before)
