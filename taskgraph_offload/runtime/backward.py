"""Lets a backward read weights that have left the device since the forward.

The bytes in a seat are soon overwritten. So when autograd saves a view of a weight, we save the view's place at home
instead, and the backward fetches the bytes from there. This module knows autograd's saved tensors; it knows no plan.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import ExecutionError
from .homes import WeightHome

Find = Callable[
    [int], tuple[WeightHome, int] | None
]  # takes an address on the device; gives the weight that is there now, and the address of its first byte


@dataclass(frozen=True, slots=True)
class _AtHome:
    """A view of a weight, by its place at home. `version` is torch's count of edits when the view was saved."""

    home: WeightHome
    offset: int
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    device: torch.device
    version: int


def saved_from_home(find: Find) -> AbstractContextManager[Any]:
    """A context in which autograd saves views of weights by their place at home.

    If saved-tensor hooks are on already (a checkpoint's, for example), they get every tensor as usual, and a copy of
    each view of a weight. Before torch 2.8 nobody can ask for them: then tensors are saved as if there were none.
    """
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    if top is not None and (outer := top(True)) is not None:
        pack_outer, unpack_outer = outer
        return torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: pack_outer(tensor.detach().clone() if _place(tensor, find) else tensor), unpack_outer
        )

    def pack(tensor: Tensor) -> Tensor | _AtHome:
        found = _place(tensor, find)
        if found is None:
            return tensor
        home, start = found
        offset = tensor.data_ptr() - start
        return _AtHome(home, offset, tensor.dtype, tensor.shape, tensor.stride(), tensor.device, _version(home))

    return torch.autograd.graph.saved_tensors_hooks(pack, _unpack)


def _place(tensor: Tensor, find: Find) -> tuple[WeightHome, int] | None:
    return find(tensor.data_ptr()) if tensor.layout is torch.strided and tensor.numel() else None


def _unpack(saved: Tensor | _AtHome) -> Tensor:
    if isinstance(saved, Tensor):
        return saved
    if _version(saved.home) != saved.version:
        raise ExecutionError(f"weight {saved.home.name!r} was changed between the forward and this backward")
    empty = torch.empty(0, dtype=saved.dtype)
    place = saved.offset // empty.element_size()
    view = empty.set_(saved.home.memory.untyped_storage(), place, saved.shape, saved.stride)
    return view.to(saved.device)


def _version(home: WeightHome) -> int:
    return sum(shown.tensor._version for shown in home.tensors if shown.counted)
