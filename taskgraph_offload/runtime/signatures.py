"""What the arguments of a call look like: one plan serves all calls that look alike and need no more memory."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

PLAIN = (str, bytes, bool, type(None), torch.dtype, torch.device)  # a forward may go another way for another one
DEPTH = 4  # of objects in objects that are looked into: a cache has layers, a layer has tensors


@dataclass(frozen=True, slots=True)
class Signature:
    """`kind`: structure, dtypes and settings. `sizes`: how many elements each tensor has, and whole numbers as such."""

    kind: Hashable
    sizes: tuple[int, ...]

    @staticmethod
    def of(entry: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Signature:
        """The signature of a call of a method.

        >>> small, large = (Signature.of("forward", (torch.zeros(rows, 4),), {"flag": True}) for rows in (2, 6))
        >>> small.kind == large.kind, large.growth_over(small), small.growth_over(large)
        (True, 3.0, 1.0)
        """
        sizes: list[int] = []
        state = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled()
        kind = entry, state, tuple(_described((args, kwargs), sizes, DEPTH))
        return Signature(kind, tuple(sizes))

    def growth_over(self, other: Signature) -> float:
        """How many times as large the largest argument is, beside the same one of another call; at least 1."""
        return max([1.0, *(mine / max(1, its) for mine, its in zip(self.sizes, other.sizes, strict=True))])


def _described(value: Any, sizes: list[int], depth: int) -> Iterator[object]:
    """Words for a value and all that is in it. Sizes are put aside."""
    if isinstance(value, Tensor):
        sizes.append(prod(value.shape))
        yield type(value), value.dtype, value.dim(), value.requires_grad
    elif isinstance(value, PLAIN):
        yield value
    elif isinstance(value, int):
        sizes.append(abs(value))
        yield int
    elif isinstance(value, Mapping):
        yield type(value), len(value)
        for key, item in value.items():
            yield key if isinstance(key, Hashable) else type(key)
            yield from _described(item, sizes, depth)
    elif isinstance(value, list | tuple | set | frozenset):
        yield type(value), len(value)
        for item in value:
            yield from _described(item, sizes, depth)
    else:
        yield type(value)
        if depth and not isinstance(value, nn.Module) and not callable(value):
            for key, item in vars(value).items() if hasattr(value, "__dict__") else ():
                yield key
                yield from _described(item, sizes, depth - 1)
