"""Tensors without data in place of a model's weights and inputs: one storage for each weight, so that use is exact."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    FakeTensor,
    FakeTensorMode,
    UnsupportedFakeTensorException,
    unset_fake_temporarily,
)

from taskgraph_offload.errors import TraceError
from taskgraph_offload.nouns.weights import Group, extent_of, named_tensors

from .operators import storage_key, storage_of
from .storages import Storages


class Fakes:
    """Makes and remembers the fake of every real tensor of one run.

    A model on the meta device is traced as if on the CPU, whose attention is fused, as it is on the device to come.
    """

    def __init__(self, storages: Storages) -> None:
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.device = torch.device("cpu") if storages.device.type == "meta" else storages.device
        self.storages = storages
        self._made: dict[int, tuple[Tensor, Tensor]] = {}  # real and fake, by the identity of the real one
        with self.mode:
            self._bytes = {group.weight.name: _empty_bytes(group, self.device) for group in storages.groups}
        self._names = {storage_key(base): (name,) for name, base in self._bytes.items()}

    @contextmanager
    def take_the_place_of_weights(self, model: nn.Module) -> Iterator[None]:
        """Put fakes where the modules keep their parameters and buffers; in the end, put the very same ones back."""
        tables: list[dict[str, Any]] = [t for module in model.modules() for t in (module._parameters, module._buffers)]
        before = [dict(table) for table in tables]
        try:
            for table in tables:
                for name, tensor in list(table.items()):
                    if tensor is not None:
                        table[name] = self.of_weight_or_other(tensor)
            yield
        finally:
            for table, tensors in zip(tables, before, strict=True):
                for name in set(table) - set(tensors):
                    del table[name]
                table.update(tensors)

    def of_input(self, tensor: Tensor) -> Tensor:
        """A fake on the model's device of a tensor that the caller hands in."""
        return self.of_weight_or_other(tensor, self.device)

    def of_weight_or_other(self, tensor: Tensor, device: torch.device | None = None) -> Tensor:
        """The fake of any tensor. Real ones also come up late: `nn.LSTM` holds its weights in a list of its own."""
        if isinstance(tensor, FakeTensor):
            return tensor
        if id(tensor) not in self._made:
            with self.mode:
                self._made[id(tensor)] = (tensor, self._make(tensor, device or tensor.device))
        return self._made[id(tensor)][1]

    def weights_of(self, tensor: Tensor) -> Sequence[str]:
        """The weight whose stand-in a fake shows, if any."""
        return self._names.get(storage_key(tensor), ())

    def _make(self, tensor: Tensor, device: torch.device) -> Tensor:
        if tensor.layout is not torch.strided or storage_of(tensor) is None:
            return self.mode.from_tensor(tensor)
        groups = self.storages.groups_of(tensor)
        if len(groups) > 1:
            raise UnsupportedFakeTensorException(f"a tensor that is no parameter spans {len(groups)} weights")
        if groups:
            return self._stand_in(tensor, groups[0])
        if tensor.numel() == 1 and type(tensor) is Tensor and tensor.device.type == device.type == "cpu":
            return self._constant(tensor)
        place = self.device if device.type == "meta" else device
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=place)

    def _stand_in(self, tensor: Tensor, group: Group) -> Tensor:
        offset = (extent_of(tensor).start - group.start) // tensor.element_size() if tensor.numel() else 0
        view = self._bytes[group.weight.name].view(tensor.dtype).as_strided(tensor.shape, tensor.stride(), offset)
        return nn.Parameter(view, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else view

    def _constant(self, tensor: Tensor) -> Tensor:
        """A fake that knows its one number, so that `int(timestep)` works."""
        with unset_fake_temporarily():
            number = tensor.clone()  # what changes the fake may compute on the number
        fake: Tensor = self.mode.fake_tensor_converter.from_real_tensor(self.mode, number, make_constant=True)
        return fake


def assert_none_left(model: nn.Module) -> None:
    """Raise if a module still shows a fake where it should keep a parameter or buffer."""
    for name, tensor in named_tensors(model):
        if isinstance(tensor, FakeTensor):
            raise TraceError(
                f"{name!r} of {type(model).__name__} is kept where it cannot be put back after tracing, and is lost: "
                "load the model again, and keep its parameters and buffers as plain torch.nn.Module does"
            )


def _empty_bytes(group: Group, device: torch.device) -> Tensor:
    rounded = (group.stop - group.start + 15) // 16 * 16  # so that every dtype can view it
    return torch.empty(max(rounded, 16), dtype=torch.uint8, device=device)
