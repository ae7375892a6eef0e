"""What one operator of a forward does: the tensors it reads and writes, the bytes it moves, its FLOPs.

Looks at operators only. Never knows what a weight, a module or a piece is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten

# torch counts every fused attention except the CPU's, where most models wait before they are offloaded: same formula.
FLOP_FORMULAS: dict[Any, Any] = {
    **flop_registry,
    aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[aten._scaled_dot_product_flash_attention],
}

GATHERS = {"embedding", "index_select", "index", "gather", "take"}  # read what they return, not their whole table
SCATTERS = {"index_put_", "_index_put_impl_", "index_copy_", "index_add_", "scatter_"}  # write what they are given
OVERWRITES = {
    *("copy_", "fill_", "zero_", "set_", "resize_", "uniform_", "normal_", "random_", "bernoulli_", "exponential_"),
    *("log_normal_", "cauchy_", "geometric_"),
}
RUNNING_STATISTICS = {"running_mean", "running_var"}  # some batch norms change these without saying so in the schema


@dataclass(frozen=True, slots=True)
class Effect:
    """What one execution of an operator did. A view reads nothing, the operator that consumes it does; but it `shows`
    where a tensor's bytes are, so they must be where they will be read."""

    reads: tuple[Tensor, ...] = ()
    shows: tuple[Tensor, ...] = ()
    writes: tuple[Tensor, ...] = ()
    flops: int = 0
    moved_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Touch:
    """One tensor argument of an operator, and what the operator does to its data."""

    tensor: Tensor
    read: bool
    written: bool


def effect_of(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> Effect:
    """The effect of `out = func(*args, **kwargs)`."""
    name, touches, outputs = operator_name(func), _touches(func, args, kwargs), tensors_in(out)
    known = {storage_key(touch.tensor) for touch in touches}
    fresh = [tensor for tensor in outputs if storage_key(tensor) not in known]
    writes = tuple(touch.tensor for touch in touches if touch.written)
    if _only_asks_shape(name):
        return Effect(writes=writes, moved_bytes=0 if "empty" in name else _sum_bytes(fresh))
    if outputs and not writes and (not fresh or name == "lift_fresh"):
        return Effect(shows=tuple(touch.tensor for touch in touches))
    reads = tuple(touch.tensor for touch in touches if touch.read)
    return Effect(reads, (), writes, _flops(func, args, kwargs, out), _moved_bytes(name, reads, writes, fresh))


def tensors_written_by(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The tensors that an operator is about to change."""
    return [touch.tensor for touch in _touches(func, args, kwargs) if touch.written]


def operator_name(func: Any) -> str:
    """The plain name of an operator: `addmm` of `aten.addmm.default`."""
    schema = getattr(func, "_schema", None)
    return str(schema.name).split("::")[-1] if schema is not None else str(func)


def storage_of(tensor: Tensor) -> torch.UntypedStorage | None:
    """The storage of a tensor, where it has one of its own (sparse and wrapped tensors have none)."""
    try:
        return tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):
        return None


def storage_key(tensor: Tensor) -> int:
    """A number that tensors share if and only if they share storage, as long as they live."""
    storage = storage_of(tensor)
    return id(tensor) if storage is None else int(storage._cdata)


def tensors_in(tree: Any) -> list[Tensor]:
    """All tensors in nested tuples, lists and dicts."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _touches(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Touch]:
    if getattr(func, "_schema", None) is None:  # a higher-order operator: assume that it only reads
        return [Touch(tensor, read=True, written=False) for tensor in tensors_in((args, dict(kwargs)))]
    overwrites, silently_written = operator_name(func) in OVERWRITES, _silently_written(func, args, kwargs)
    touches = []
    for argument, value in _bound(func, args, kwargs):
        declared = argument.alias_info is not None and argument.alias_info.is_write
        written = declared or argument.name in silently_written
        read = not declared or not (overwrites or argument.kwarg_only)  # what is written and keyword-only is an `out=`
        touches += [Touch(tensor, read, written) for tensor in tensors_in(value)]
    return touches


def _bound(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[tuple[Any, Any]]:
    for index, argument in enumerate(func._schema.arguments):
        if index < len(args):
            yield argument, args[index]
        elif argument.name in kwargs:
            yield argument, kwargs[argument.name]


def _silently_written(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> set[str]:
    given = {argument.name: value for argument, value in _bound(func, args, kwargs)}
    return RUNNING_STATISTICS & set(given) if given.get("training") is True else set()


def _only_asks_shape(name: str) -> bool:
    return name.endswith("_like") or name.startswith(("new_", "sym_", "is_", "empty")) or name == "device"


def _flops(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> int:
    formula = FLOP_FORMULAS.get(getattr(func, "_overloadpacket", None))
    return 0 if formula is None else int(formula(*args, **kwargs, out_val=out))


def _moved_bytes(name: str, reads: Sequence[Tensor], writes: Sequence[Tensor], fresh: Sequence[Tensor]) -> int:
    if name in GATHERS:
        return 2 * _sum_bytes(fresh) + _sum_bytes(reads[1:])
    if name in SCATTERS:
        return 2 * _sum_bytes(reads[1:])
    return _sum_bytes(reads) + _sum_bytes(writes) + _sum_bytes(fresh)


def _sum_bytes(tensors: Sequence[Tensor]) -> int:
    return sum(_moved(tensor) for tensor in tensors)


def _moved(tensor: Tensor) -> int:
    storage, nbytes = storage_of(tensor), tensor.numel() * tensor.element_size()
    return nbytes if storage is None else min(nbytes, storage.nbytes())  # an expanded tensor is read once
