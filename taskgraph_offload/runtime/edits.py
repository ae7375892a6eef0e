"""Finds what the user changed in weights between forwards: edits in place, other data, other parameters.

Torch counts the edits of a tensor, but not edits through `.data`, which LoRA merging uses. So we also compare a few
words of every weight. If the user gave a weight other memory, that memory becomes its home. No bytes are changed here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from operator import methodcaller
from typing import Any

import numpy
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ..errors import ExecutionError
from .homes import Homes, WeightHome
from .tensors import WeightTensor, count_of_edits

WORDS = 64  # samples of eight bytes in each weight: one in each row of 64 rows, or one every 64 bytes of 4 KiB
TOGETHER = 32  # tensors that are looked at together: few enough to be in the processor's cache for the second look
_CALL = methodcaller("__call__")
Array = numpy.ndarray[Any, Any]
Pair = tuple[WeightHome, WeightTensor]
Place = tuple[WeightHome, WeightTensor, dict[str, Any], str]  # where the model keeps a tensor of a weight


@dataclass(slots=True)
class _Sample:
    """A few words of each weight in some memory: their places, the names of their weights, and their last values."""

    memory: Array
    places: Array
    names: list[str]
    words: bytes = b""

    def differing(self, words: bytes) -> set[str]:
        """The weights whose words are not what they were."""
        now, then = (numpy.frombuffer(text, self.memory.dtype) for text in (words, self.words))
        return {self.names[place] for place in numpy.flatnonzero(now != then)}


class _Group:
    """Some tensors, and what torch told of them at the last look."""

    def __init__(self, pairs: Sequence[Pair]) -> None:
        self._pairs, self._tensors = pairs, [shown.tensor for _, shown in pairs]
        homes = [shown.home for _, shown in pairs]
        self._looks = [
            list(map(Tensor.data_ptr, homes)),
            list(map(Tensor.numel, homes)),
            list(map(Tensor.stride, homes)),
        ]
        self._counted_pairs = [(home, shown) for home, shown in pairs if shown.counted]
        self._counted = [shown.tensor for _, shown in self._counted_pairs]
        self._versions = [shown.version for _, shown in self._counted_pairs]

    def look(self) -> tuple[set[str], list[Pair]]:
        """The weights that were edited in place since the last look, and the tensors that do not show their homes."""
        edited, moved = set[str](), list[Pair]()
        if (versions := list(map(count_of_edits, self._counted))) != self._versions:
            for (home, shown), now, then in zip(self._counted_pairs, versions, self._versions, strict=True):
                if now != then:
                    edited.add(home.name)
                    shown.note_version()
            self._versions = versions
        ours = self._tensors
        looks = [list(map(Tensor.data_ptr, ours)), list(map(Tensor.numel, ours)), list(map(Tensor.stride, ours))]
        if looks != self._looks:  # these change with other data, and lists are quick to make and to compare
            moved = [(home, shown) for home, shown in self._pairs if not shown.is_home]
        return edited, moved


class Edits:
    """Compares every home with what it was at the last forward.

    `changed_here` are weights that the forward itself changes. The device has their true values, so their homes are not
    compared.
    """

    def __init__(self, homes: Homes, changed_here: frozenset[str]) -> None:
        self._homes = homes
        weights = homes.weights.values()
        self._still = [home for home in weights if home.name not in changed_here]
        self._changing = [(home, shown) for home in weights if home.name in changed_here for shown in home.tensors]
        groups: dict[str, list[WeightHome]] = {}
        for home in self._still:
            groups.setdefault(home.group, []).append(home)
        self._samples = {
            group: _sample_of(here[0]) if here[0].moved else _sample(homes.memories[group].words, here)
            for group, here in groups.items()
        }
        self._changed: set[str] = set()  # what the next forward will be told
        self._list_tensors()
        self.changes()  # only edits after this moment count

    def changes(self) -> set[str]:
        """The weights that changed since the last forward. New memory of a weight becomes its home."""
        given_other_memory: list[Pair] = []
        for group in self._groups:
            edited, moved = group.look()
            self._changed |= edited
            given_other_memory += moved
        self._take_over(given_other_memory)
        for sample in self._samples.values():
            if (words := sample.memory.take(sample.places).tobytes()) != sample.words:
                self._changed |= sample.differing(words) if sample.words else set()
                sample.words = words
        changed, self._changed = self._changed, set()
        return changed

    def everything_changed(self) -> None:
        """Count every weight as changed, except those whose true values only the device has."""
        for home in self._homes.weights.values():
            if not any(shown.shows(shown.seat) and not shown.is_home for shown in home.tensors):
                self._changed.add(home.name)

    def _list_tensors(self) -> None:
        pairs = [(home, shown) for home in self._still for shown in home.tensors]
        self._groups = [_Group(pairs[first : first + TOGETHER]) for first in range(0, len(pairs), TOGETHER)]
        everyone = [(home, shown) for home in self._homes.weights.values() for shown in home.tensors]
        self._places: list[Place] = [(home, m, owner, key) for home, m in everyone for owner, key in m.owners]
        self._identities = [id(shown.tensor) for _, shown, _, _ in self._places]
        self._lookups = [partial(owner.get, key) for _, _, owner, key in self._places]

    def _take_over(self, given_other_memory: list[Pair]) -> None:
        """Find tensors that were replaced. Make their memory, and other memory that was given, the home."""
        moves, problems = self._homes.moves, list[ExecutionError]()
        replaced, moved = (
            dict[WeightTensor, tuple[WeightHome, Tensor]](),
            list[tuple[WeightHome, WeightTensor, Tensor]](),
        )
        if list(map(id, map(_CALL, self._lookups))) != self._identities:
            replaced = _replaced(self._places)
            moved = [(home, shown, tensor) for shown, (home, tensor) in replaced.items()]
        for home, shown in given_other_memory:
            if shown not in replaced:
                moved.append((home, shown, shown.tensor))
        for home, shown in self._changing:
            if shown not in replaced and not shown.is_home and not shown.shows(shown.seat):
                moved.append((home, shown, shown.tensor))
        for home, shown, tensor in moved:
            try:
                _check(home, shown, tensor)
                self._homes.adopt(home, shown, tensor)
            except ExecutionError as error:
                problems.append(error)
                continue
            self._changed.add(home.name)
            self._samples[home.group] = _sample_of(home)
        if self._homes.moves != moves:
            self._list_tensors()
        if problems:
            raise problems[0]


def _replaced(places: Iterable[Place]) -> dict[WeightTensor, tuple[WeightHome, Tensor]]:
    """The tensors that replaced others of the same shape and dtype. A cache that grew, for example, is no weight."""
    found: dict[WeightTensor, tuple[WeightHome, list[Tensor]]] = {}
    for home, shown, owner, key in places:
        tensor = owner.get(key)
        if isinstance(tensor, Tensor) and shown.is_like(tensor):
            found.setdefault(shown, (home, []))[1].append(tensor)
    replaced: dict[WeightTensor, tuple[WeightHome, Tensor]] = {}
    for shown, (home, tensors) in found.items():
        if any(tensor is not tensors[0] for tensor in tensors):
            raise _several(home)
        if tensors[0] is not shown.tensor:
            replaced[shown] = home, tensors[0]
    return replaced


def _check(home: WeightHome, shown: WeightTensor, tensor: Tensor) -> None:
    if not shown.is_like(tensor):
        raise ExecutionError(
            f"weight {home.name!r} was {shown.dtype} {tuple(shown.shape)} when the plan was attached and is now "
            f"{tensor.dtype} {tuple(tensor.shape)}: detach, and plan again"
        )
    if len(home.tensors) > 1:
        raise _several(home)


def _several(home: WeightHome) -> ExecutionError:
    return ExecutionError(
        f"weight {home.name!r} is shown in several places, and one of them was given another tensor or other data: "
        "detach, and plan again"
    )


def _sample(memory: Array, homes: Iterable[WeightHome]) -> _Sample:
    """A sample of the weights in a slab."""
    places, names = list[Array](), list[str]()
    for home in homes:
        if home.memory.nbytes:
            places.append(_spread(home.offset // 8, (home.offset + home.memory.nbytes - 1) // 8))
            names += [home.name] * len(places[-1])
    return _Sample(memory, numpy.concatenate(places) if places else numpy.array([], numpy.int64), names)


def _sample_of(home: WeightHome) -> _Sample:
    """A sample of a weight that has moved. A small weight is sampled byte by byte."""
    with _disable_current_modes():
        memory = home.memory.numpy()
    if memory.nbytes >= 8 * WORDS:
        memory = memory[: memory.nbytes // 8 * 8].view(numpy.int64)
    places = _spread(0, len(memory) - 1) if len(memory) else numpy.array([], numpy.int64)
    sample = _Sample(memory, places, [home.name] * len(places))
    sample.words = sample.memory[places].tobytes()
    return sample


def _spread(first: int, last: int) -> Array:
    """Up to 64 places from the first to the last, evenly spread."""
    count = min(WORDS, last - first + 1)
    return numpy.linspace(first, last, count).astype(numpy.int64)
