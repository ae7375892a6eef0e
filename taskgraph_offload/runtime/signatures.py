"""What the arguments of a call look like: one plan serves all calls that look alike and need no more memory."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy
import torch
from torch import Tensor, nn

PLAIN = (str, bytes, bool, type(None), torch.dtype, torch.device)  # a forward may go another way for another one
A_CHOICE = 2  # a number as small as this may choose what a forward does; a larger one is a size
DEPTH = 4  # of objects in objects that are looked into: a cache has layers, a layer has tensors


@dataclass(frozen=True, slots=True)
class Signature:
    """`kind`: structure, dtypes and settings. `sizes`: the shape of each tensor, and each larger whole number."""

    kind: Hashable
    sizes: tuple[tuple[int, ...], ...]

    @staticmethod
    def of(entry: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Signature:
        """The signature of a call of a method.

        >>> small, large = (Signature.of("forward", (torch.zeros(rows, 4),), {"flag": True}) for rows in (2, 6))
        >>> small.kind == large.kind, large.growth_over(small), small.growth_over(large)
        (True, 3.0, 1.0)
        """
        sizes: list[tuple[int, ...]] = []
        state = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled()
        kind = entry, state, tuple(_described((args, kwargs), sizes, DEPTH))
        return Signature(kind, tuple(sizes))

    def growth_over(self, other: Signature) -> float:
        """How many times as large the largest argument is as the same one of another call of this kind; at least 1.

        A tensor grows with each of its dimensions, whatever the others do.
        """
        pairs = zip(self.sizes, other.sizes, strict=True)
        return max([1.0, *(prod(max(1.0, n / max(1, m)) for n, m in zip(*pair, strict=True)) for pair in pairs)])


def _described(value: Any, sizes: list[tuple[int, ...]], depth: int) -> Iterator[object]:
    """Words for a value and all that is in it. Sizes are put aside."""
    if isinstance(value, Tensor):
        sizes.append(tuple(value.shape))
        yield type(value), value.dtype, value.dim(), value.requires_grad
    elif isinstance(value, numpy.ndarray):
        sizes.append(value.shape)
        yield type(value), value.dtype, value.ndim
    elif isinstance(value, PLAIN) or (isinstance(value, int) and abs(value) <= A_CHOICE):
        yield value
    elif isinstance(value, int):
        sizes.append((abs(value),))
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
