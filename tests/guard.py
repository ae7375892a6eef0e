"""Watches every operator of an offloaded forward: fails if one touches a home, and counts the live bytes."""

from __future__ import annotations

import weakref
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import taskgraph_offload as tgo


class Guard(TorchDispatchMode):
    """Fails if an operator touches a home. A GPU would fail there, too; the CPU alone would not notice.

    It counts the bytes of the device that the model runs on.
    """

    def __init__(self, run: tgo.Executor, inputs: Any = None) -> None:
        super().__init__()
        assert run._homes is not None
        self.homes = {name: home.memory for name, home in run._homes.memories.items()}  # keeps this memory alive
        places = sorted((*span(memory), name) for name, memory in self.homes.items())
        self.starts, self.stops, self.names = zip(*places, strict=True)
        self.measures = inputs is not None
        self.device: torch.device = getattr(run._device, "device", torch.device("cpu"))
        self.peak_bytes = 0
        self.live: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self.ours = set[int]()  # storages of weights, which count as arena
        for shown in run._homes.tensors():
            self.ours |= {shown.home.untyped_storage()._cdata, shown.seat.untyped_storage()._cdata}
        self._count(inputs)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        asks_layout = func is torch.ops.aten._has_compatible_shallow_copy_type.default  # torch calls it in `.data =`
        if not asks_layout and not func.is_view:  # a view reads nothing
            for tensor in _tensors((args, kwargs)):
                self._refuse_home(func, tensor)
        out = func(*args, **(kwargs or {}))
        if self.measures:
            self._count(out)
        return out

    def _refuse_home(self, func: Any, tensor: Tensor) -> None:
        start, stop = span(tensor)
        place = bisect_left(self.starts, stop) - 1
        assert place < 0 or self.stops[place] <= start, f"{func} touches the home of {self.names[place]}"

    def _count(self, found: Any) -> None:
        for tensor in _tensors(found):
            storage: Any = tensor.untyped_storage()
            if storage._cdata not in self.ours and storage.device == self.device:
                self.live[storage._cdata] = weakref.ref(storage)
        alive = [storage for ref in self.live.values() if (storage := ref()) is not None]
        self.peak_bytes = max(self.peak_bytes, sum(storage.nbytes() for storage in alive))


def tensors(tree: Any) -> list[Tensor]:
    """All tensors in nested values."""
    return list(_tensors(tree))


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        yield from (tensor for item in tree.values() for tensor in _tensors(item))
    elif isinstance(tree, list | tuple):
        yield from (tensor for item in tree for tensor in _tensors(item))
    elif hasattr(tree, "layers"):  # a cache of transformers
        yield from (t for layer in tree.layers for t in (layer.keys, layer.values) if t is not None)
    elif hasattr(tree, "to_tuple"):
        yield from _tensors(tree.to_tuple())


def span(tensor: Tensor) -> tuple[int, int]:
    """The addresses between a tensor's first and last byte."""
    if not tensor.numel():
        return 0, 0
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()
