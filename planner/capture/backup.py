"""Copies of what a real run is about to change, and how to put them back."""

from __future__ import annotations

import torch
from torch import Tensor

from taskgraph_offload.nouns.weights import extent_of

from .storages import Storages


class Backup:
    """Keeps the bytes of weights and other tensors from before their first change."""

    def __init__(self, storages: Storages) -> None:
        self.storages = storages
        self._saved: dict[tuple[object, int], tuple[Tensor, Tensor]] = {}

    def before_write(self, tensor: Tensor) -> None:
        """Save the weight that a tensor shows, or its whole storage if it shows none."""
        extent, groups = extent_of(tensor), self.storages.groups_of(tensor)
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
