"""Sees what happened to homes while no forward looked: edits in place, data or parameters that were replaced.

torch counts edits of a tensor, but not those through `.data`, which LoRA merging uses; so a few bytes of every weight
are remembered too. Changes no bytes: a weight with other memory behind it has its home there from then on.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ..errors import ExecutionError
from .homes import Home, Homes
from .members import Member

WORDS = 64  # of eight bytes, spread over each weight: every row of 64 rows, every 64 bytes of 4 KiB
Array = numpy.ndarray[Any, Any]
Place = tuple[Home, Member, dict[str, Any], str]  # where the model keeps a tensor of a weight


@dataclass(slots=True)
class _Sample:
    """A few words of each weight in some memory: their places, whose they are, and what they were."""

    memory: Array
    places: Array
    names: list[str]
    words: bytes = b""

    def read(self) -> bytes:
        """What the words are now."""
        return self.memory[self.places].tobytes()

    def differing(self, words: bytes) -> set[str]:
        """The weights of which some words are others."""
        now, then = (numpy.frombuffer(text, self.memory.dtype) for text in (words, self.words))
        return {self.names[place] for place in numpy.flatnonzero(now != then)}


class Watch:
    """Compares every home with what it was when it was last asked.

    `changed_here` are weights that the forward itself changes: their seats hold the truth, not their homes.
    """

    def __init__(self, homes: Homes, changed_here: frozenset[str]) -> None:
        self._homes = homes
        weights = homes.weights.values()
        self._still = [home for home in weights if home.name not in changed_here]
        self._changing = [(home, member) for home in weights if home.name in changed_here for member in home.members]
        self._samples = {
            ("bundle", bundle): _sample(words, [home for home in self._still if home.bundle == bundle])
            for bundle, words in homes.words.items()
        }
        self._changed: set[str] = set()  # what the next forward will be told
        self._versions: list[int] = []
        self._list_tensors()
        self._edited()  # from here on

    def changes(self) -> set[str]:
        """The weights whose homes are not what the last forward found; memory that was replaced has become theirs."""
        self._take_over()
        self._changed |= self._edited()
        changed, self._changed = self._changed, set()
        return changed

    def everything_changed(self) -> None:
        """Trust nothing but what the device alone knows."""
        for home in self._homes.weights.values():
            if not any(member.shows(member.seat) and not member.is_home for member in home.members):
                self._changed.add(home.name)

    def _edited(self) -> set[str]:
        """The weights with other bytes than when this was last asked."""
        found: set[str] = set()
        versions = [tensor._version for tensor in self._counted]
        if versions != self._versions:
            for (home, member), now, then in zip(self._counted_pairs, versions, self._versions, strict=True):
                if now != then:
                    found.add(home.name)
                    member.note_version()
            self._versions = versions
        for sample in self._samples.values():
            if (words := sample.read()) != sample.words:
                found |= sample.differing(words) if sample.words else set()
                sample.words = words
        return found

    def _list_tensors(self) -> None:
        self._pairs = [(home, member) for home in self._still for member in home.members]
        self._tensors = [member.tensor for _, member in self._pairs]
        self._looks = _looks(member.home for _, member in self._pairs)
        self._counted_pairs = [(home, member) for home, member in self._pairs if member.counted]
        self._counted = [member.tensor for _, member in self._counted_pairs]
        self._versions = [member.version for _, member in self._counted_pairs]
        everyone = [(home, member) for home in self._homes.weights.values() for member in home.members]
        self._places: list[Place] = [(home, m, owner, key) for home, m in everyone for owner, key in m.owners]
        self._identities = [id(member.tensor) for _, member, _, _ in self._places]
        self._lookups = [(owner.get, key) for _, _, owner, key in self._places]

    def _take_over(self) -> None:
        """Find other tensors in the model's hands, or other memory behind a tensor, and make that the home."""
        moves, problems = self._homes.moves, list[ExecutionError]()
        replaced, moved = dict[Member, tuple[Home, Tensor]](), list[tuple[Home, Member, Tensor]]()
        if [id(get(key)) for get, key in self._lookups] != self._identities:
            replaced = _replaced(self._places)
            moved = [(home, member, tensor) for member, (home, tensor) in replaced.items()]
        if _looks(self._tensors) != self._looks:
            moved += [(home, m, m.tensor) for home, m in self._pairs if m not in replaced and not m.is_home]
        for home, member in self._changing:
            if member not in replaced and not member.is_home and not member.shows(member.seat):
                moved.append((home, member, member.tensor))
        for home, member, tensor in moved:
            try:
                _check(home, member, tensor)
            except ExecutionError as error:
                problems.append(error)
                continue
            self._homes.adopt(home, member, tensor)
            self._changed.add(home.name)
            self._samples["weight", home.name] = _sample_of(home)
        if self._homes.moves != moves:
            self._list_tensors()
        if problems:
            raise problems[0]


def _looks(tensors: Iterable[Tensor]) -> list[object]:
    """What other data would change: place, size and strides; in lists, which are quick to make and to compare."""
    tensors = list(tensors)
    return [[t.data_ptr() for t in tensors], [t.numel() for t in tensors], [t.stride() for t in tensors]]


def _replaced(places: Iterable[Place]) -> dict[Member, tuple[Home, Tensor]]:
    """The tensors that are now where others were. One of another kind is the model's own: a cache that grew, say."""
    found: dict[Member, tuple[Home, list[Tensor]]] = {}
    for home, member, owner, key in places:
        tensor = owner.get(key)
        if isinstance(tensor, Tensor) and member.is_like(tensor):
            found.setdefault(member, (home, []))[1].append(tensor)
    replaced: dict[Member, tuple[Home, Tensor]] = {}
    for member, (home, tensors) in found.items():
        if any(tensor is not tensors[0] for tensor in tensors):
            raise _several(home)
        if tensors[0] is not member.tensor:
            replaced[member] = home, tensors[0]
    return replaced


def _check(home: Home, member: Member, tensor: Tensor) -> None:
    if not member.is_like(tensor):
        raise ExecutionError(
            f"weight {home.name!r} was {member.dtype} {tuple(member.shape)} when it was attached and is now "
            f"{tensor.dtype} {tuple(tensor.shape)}: detach, and plan again"
        )
    if len(home.members) > 1:
        raise _several(home)


def _several(home: Home) -> ExecutionError:
    return ExecutionError(
        f"weight {home.name!r} is shown in several places, and one of them was given another tensor or other data: "
        "detach, and plan again"
    )


def _sample(memory: Array, homes: Iterable[Home]) -> _Sample:
    """Words spread over the weights that lie in a slab."""
    places, names = list[Array](), list[str]()
    for home in homes:
        if home.memory.nbytes:
            places.append(_spread(home.offset // 8, (home.offset + home.memory.nbytes - 1) // 8))
            names += [home.name] * len(places[-1])
    return _Sample(memory, numpy.concatenate(places) if places else numpy.array([], numpy.int64), names)


def _sample_of(home: Home) -> _Sample:
    """Words spread over a weight that has moved: single bytes of a small one."""
    with _disable_current_modes():
        memory = home.memory.numpy()
    if memory.nbytes >= 8 * WORDS:
        memory = memory[: memory.nbytes // 8 * 8].view(numpy.int64)
    places = _spread(0, len(memory) - 1) if len(memory) else numpy.array([], numpy.int64)
    sample = _Sample(memory, places, [home.name] * len(places))
    sample.words = sample.read()
    return sample


def _spread(first: int, last: int) -> Array:
    """Places from the first to the last, all of them if they are few."""
    count = min(WORDS, last - first + 1)
    return numpy.linspace(first, last, count).astype(numpy.int64)
