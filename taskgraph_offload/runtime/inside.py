"""Which modules lie inside of which blocks: who runs one of them by itself needs what its block reads.

A step cache does so: it asks the first block's norm whether the rest is worth running.
"""

from __future__ import annotations

from collections.abc import Collection, Container, Iterable, Iterator
from itertools import chain

from torch import Tensor, jit, nn

from ..nouns.names import above


class Inside:
    """For each block, and each module inside that has weights which come and go: its blocks; and which one runs `now`.

    A module may lie in several blocks. One that is elsewhere in the model, too, is not among them: what it reads is
    there throughout.
    """

    def __init__(self, model: nn.Module, blocks: Collection[str], moving: Iterable[Tensor]) -> None:
        self.blocks_of: dict[str, tuple[str, ...]] = {block: (block,) for block in blocks if block}
        self.blocks_of |= _blocks_of_modules(model, blocks, {id(tensor) for tensor in moving})
        self.now: str | None = None
        self.thread = 0  # in which it runs

    def is_served(self, module: str) -> bool:
        """Whether what a module reads is there: it lies in the block that runs, or in none."""
        return module not in self.blocks_of or self.now in self.blocks_of[module]


def can_stand_in(module: nn.Module) -> bool:
    """Whether the module has a forward, and one that Python calls."""
    return type(module).forward is not nn.Module.forward and not isinstance(module, jit.ScriptModule)


def _blocks_of_modules(model: nn.Module, blocks: Collection[str], moving: Container[int]) -> dict[str, tuple[str, ...]]:
    found: dict[nn.Module, list[str]] = {}
    paths: dict[str, nn.Module] = {}
    elsewhere: set[nn.Module] = set()
    for name in [name for name, tensor in _named_tensors(model) if id(tensor) in moving]:
        climbed = list(above(name))
        block = next((path for path in climbed if path in blocks), None)
        for path in climbed[: climbed.index(block) if block else len(climbed)]:
            module = paths[path] = model.get_submodule(path)
            if block is None:
                elsewhere.add(module)
            elif block not in found.setdefault(module, []):
                found[module].append(block)
    return {path: tuple(found[module]) for path, module in paths.items() if module in found and module not in elsewhere}


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return chain(model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
