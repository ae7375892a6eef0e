"""Sees what happened to homes between two forwards: edits in place, data or parameters that were replaced.

torch counts edits of a tensor, but not those through `.data`, which LoRA merging uses; so a few bytes of every weight
are remembered too. Changes nothing but homes that must take over a new value.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor

from ..errors import ExecutionError
from ..homes import Home, Homes, Member, fill

WORDS = 8  # of eight bytes, spread over each weight
Array = numpy.ndarray[Any, Any]


@dataclass(slots=True)
class _Sample:
    """A few words of each weight in one slab: their places, whose they are, and what they were."""

    slab: Array
    places: Array
    names: list[str]
    words: bytes = b""

    def read(self) -> bytes:
        """What the words are now."""
        return self.slab[self.places].tobytes()

    def differing(self, words: bytes) -> set[str]:
        """The weights of which some words are others."""
        now, then = (numpy.frombuffer(text, numpy.int64) for text in (words, self.words))
        return {self.names[place] for place in numpy.flatnonzero(now != then)}


class Watch:
    """Compares every home with what it was when the last forward ended.

    `changed_here` are weights that the forward itself changes: their seats hold the truth, not their homes.
    """

    def __init__(self, homes: Homes, changed_here: frozenset[str]) -> None:
        self._homes = homes
        self._still = [home for home in homes.weights.values() if home.name not in changed_here]
        self._samples = [
            _sample(words, [home for home in self._still if home.bundle == bundle])
            for bundle, words in homes.words.items()
        ]
        self._list_tensors()
        self.remember()

    def remember(self) -> None:
        """How things are now is how they should be."""
        self._versions = [tensor._version for tensor in self._counted]
        for sample in self._samples:
            sample.words = sample.read()

    def changes(self) -> set[str]:
        """The weights whose homes are no longer what they were; replaced tensors have become theirs."""
        found = self._replaced()
        versions = [tensor._version for tensor in self._counted]
        if versions != self._versions:
            pairs = zip(self._names, versions, self._versions, strict=True)
            found |= {name for name, now, then in pairs if now != then}
        for sample in self._samples:
            if (words := sample.read()) != sample.words:
                found |= sample.differing(words)
        return found

    def _list_tensors(self) -> None:
        pairs = [(home, member) for home in self._still for member in home.members]
        counted = [(home, member) for home, member in pairs if member.counted]
        self._names = [home.name for home, _ in counted]
        self._counted = [member.tensor for _, member in counted]
        self._pairs = pairs
        self._pointers = [member.home.data_ptr() for _, member in pairs]
        everyone = [(home, member) for home in self._homes.weights.values() for member in home.members]
        self._places = [(home, member, owner, key) for home, member in everyone for owner, key in member.owners]
        self._identities = [id(member.tensor) for _, member, _, _ in self._places]

    def _replaced(self) -> set[str]:
        """Weights with another tensor in the model's hands, or another memory behind the tensor."""
        found: set[str] = set()
        if [id(owner.get(key)) for _, _, owner, key in self._places] != self._identities:
            for home, member, owner, key in self._places:
                if owner.get(key) is not member.tensor and _takes_over(home, member, owner, key):
                    found.add(home.name)
            self._list_tensors()
            self._versions = [tensor._version for tensor in self._counted]
        if [member.tensor.data_ptr() for _, member in self._pairs] != self._pointers:
            for home, member in self._pairs:
                if member.tensor.data_ptr() != member.home.data_ptr():
                    _move_back(home, member)
                    found.add(home.name)
        return found


def _takes_over(home: Home, member: Member, owner: dict[str, Any], key: str) -> bool:
    """Whether a new tensor of the same kind is in the place of an old one; then it becomes the member."""
    new = owner.get(key)
    others = [place for place in member.owners if not (place[0] is owner and place[1] == key)]
    if not isinstance(new, Tensor) or not _same_kind(new, member.tensor):
        member.owners = others
        return False  # the model's own affair: a cache that grew, a weight that was taken away
    if others:
        raise ExecutionError(
            f"weight {home.name!r} has several names, and one of them was given another tensor: detach, and plan again"
        )
    member.tensor, member.owners = new, [(owner, key)]
    _move_back(home, member)
    return True


def _move_back(home: Home, member: Member) -> None:
    """The tensor shows other memory than its home: its value moves there."""
    tensor = member.tensor
    if not _same_kind(tensor, member.home):
        raise ExecutionError(
            f"weight {home.name!r} was {member.home.dtype} {tuple(member.home.shape)} when it was attached and is now "
            f"{tensor.dtype} {tuple(tensor.shape)}: detach, and plan again"
        )
    with torch.inference_mode(False), torch.no_grad():
        alike = torch.empty_strided(tensor.shape, member.home.stride(), dtype=tensor.dtype)
        alike.copy_(tensor.detach())
        fill(home.memory[member.offset :], alike)
    tensor.data = member.home


def _same_kind(tensor: Tensor, other: Tensor) -> bool:
    return tensor.dtype == other.dtype and tensor.shape == other.shape and tensor.device.type != "meta"


def _sample(slab: Array, homes: Iterable[Home]) -> _Sample:
    """Words spread over the weights that lie in a slab."""
    places, names = list[int](), list[str]()
    for home in homes:
        if home.memory.nbytes:
            first, last = home.offset // 8, (home.offset + home.memory.nbytes - 1) // 8
            chosen = sorted({first + (last - first) * step // (WORDS - 1) for step in range(WORDS)})
            places += chosen
            names += [home.name] * len(chosen)
    return _Sample(slab, numpy.array(places, numpy.int64), names)
