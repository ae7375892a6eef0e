"""Record every operator of one forward: what it reads, writes, computes and moves, and how long its results live.

Knows weights by name and modules by name. Decides nothing: `blocks` makes calls of what is recorded here.

    events      |enter ""   |enter a   |enter a.0   |exit a.0   |exit a   |enter b ...
    records     |---- 0 ----|--- 1 ----|---- 2 -----|---- 3 ----|--- 4 ---|---- 5 ---
"""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.modules import module as module_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from taskgraph_offload.nouns.progress import report
from taskgraph_offload.nouns.trace import INPUT, Boundary

PROGRESS = "modules traced"  # what progress reports call it
ROOT = Boundary("", "enter", 0)
COMPOSITE = "CompositeImplicitAutograd"
aten, prim = torch.ops.aten, torch.ops.prim


def attention_flops(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    """The work of an attention. There may be fewer heads of keys and values than of queries."""
    batch, heads, queries, width = query.shape
    return int(2 * batch * heads * queries * value.shape[-2] * (width + value.shape[-1]))


# Torch has no formula for the CPU's fused attention, on which most models are traced. Before 2.13, its formula for the
# other ones refuses fewer heads of keys than of queries.
FUSED_ATTENTION = {
    getattr(aten, f"_scaled_dot_product_{kind}_attention{where}")
    for kind, where in (("flash", ""), ("flash", "_for_cpu"), ("efficient", ""), ("cudnn", ""))
}
FLOP_FORMULAS: dict[Any, Any] = {**flop_registry, **dict.fromkeys(FUSED_ATTENTION, attention_flops)}
ASKS_LAYOUT = {  # operators that only ask how a tensor is laid out; torch's own FLOP counter skips the same ones
    *("size", "sym_size", "stride", "sym_stride", "storage_offset", "sym_storage_offset", "numel", "sym_numel", "dim"),
    *("layout", "is_contiguous", "sym_is_contiguous", "is_strides_like_format", "is_non_overlapping_and_dense"),
}
GATHERS = {"embedding", "index_select", "index", "gather", "take"}  # read what they return, not their whole table
SCATTERS = {"index_put_", "_index_put_impl_", "index_copy_", "index_add_", "scatter_"}  # write what they are given
OVERWRITES = {
    *("copy_", "fill_", "zero_", "set_", "resize_", "uniform_", "normal_", "random_", "bernoulli_", "exponential_"),
    *("log_normal_", "cauchy_", "geometric_"),
}
RUNNING_STATISTICS = {"running_mean", "running_var"}  # some batch norms change these, and their schema does not say so


@dataclass
class Record:
    """What ran from one module boundary to the next."""

    boundary: Boundary
    reads: dict[str, None] = field(default_factory=dict)
    writes: dict[str, None] = field(default_factory=dict)
    flops: int = 0
    flop_bytes: int = 0
    other_bytes: int = 0
    peak_bytes: int = 0
    started: bool = False  # whether an operator has run in it

    @property
    def uses_weights(self) -> bool:
        return bool(self.reads or self.writes)

    @property
    def works(self) -> bool:
        """Whether an operator moved bytes or used a weight."""
        return self.uses_weights or self.flop_bytes + self.other_bytes > 0


@dataclass
class Lifetime:
    """The lifetime of a storage that is no weight, in indices of records. `end` is None if it outlives the forward.

    `repeats` says how often it holds the same bytes, if it is a copy of an expanded tensor.
    """

    nbytes: int
    producer: int
    repeats: int = 1
    uses: list[int] = field(default_factory=list)
    end: int | None = None


class Recorder(TorchDispatchMode):
    """Sees every operator of what runs inside it.

    `weights_of` names the weights whose bytes a tensor shows. `replace` may replace the arguments of an operator before
    it runs. `before_write` gets each tensor that is about to change, unless the forward made it itself. With `on_cpu`,
    attention has room to run as the CPU may run it outside of a trace.
    """

    supports_higher_order_operators = True

    def __init__(
        self,
        weights_of: Callable[[Tensor], Sequence[str]],
        replace: Callable[[Any, Any, Any], tuple[Any, Any]] | None = None,
        before_write: Callable[[Tensor], None] | None = None,
        on_cpu: bool = False,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.weights_of, self.replace, self.before_write, self.on_cpu = weights_of, replace, before_write, on_cpu
        self.records = [Record(ROOT)]
        self.lifetimes: list[Lifetime] = []
        self._live: dict[int, tuple[Lifetime, Any]] = {}  # by storage, with the weak reference that ends the lifetime
        self._live_bytes = 0
        self._seen: Counter[tuple[str, str]] = Counter()

    def reach(self, module: str, side: Any) -> None:
        """Begin a new record: the forward enters or leaves a module."""
        boundary = Boundary(module, side, self._seen[module, side])
        self._seen[module, side] += 1
        if boundary != ROOT:
            self.records.append(Record(boundary, peak_bytes=self._live_bytes))

    def hold_input(self, tensor: Tensor) -> None:
        """Count a tensor that the caller hands in, and keeps."""
        if not self.weights_of(tensor):
            self._lifetime_of(tensor, INPUT)

    def finish(self, outputs: Iterable[Tensor]) -> None:
        """End the forward. What is alive now, the outputs and the inputs among it, outlives it."""
        self._show(outputs)
        self._live.clear()

    def _show(self, tensors: Iterable[Tensor]) -> None:
        """Count weights as read if the code learns where their bytes are, and may read them later."""
        for tensor in tensors:
            self.records[-1].reads.update(dict.fromkeys(self.weights_of(tensor)))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if operator_name(func) in ASKS_LAYOUT and func.namespace in ("aten", "prim"):
            return NotImplemented
        if func is prim.device.default:
            return func(*args, **kwargs)
        if is_composite(func) and func._overloadpacket not in FLOP_FORMULAS:
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        if self.replace is not None and func is not aten.lift_fresh.default:
            args, kwargs = self.replace(func, args, kwargs)
        if self.before_write is not None:
            self._announce_writes(func, args, kwargs)
        if self.on_cpu and getattr(func, "_overloadpacket", None) in FUSED_ATTENTION:
            self._make_room_for_grouped_keys(*args[:3])
        out = func(*args, **kwargs)
        self._note(func, args, kwargs, out)
        return out

    def _make_room_for_grouped_keys(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        """Count the memory of an attention that gets each key once, for a group of query heads, and no mask.

        Models of transformers repeat keys and make a mask when they are traced, but not when they run. Older versions
        of torch (2.8, but not 2.11) have no fused attention for grouped keys on the CPU, and compute all scores.
        """
        lifetime, _ = self._live.get(storage_key(key), (None, None))
        repeats = lifetime.repeats if lifetime else 1
        if repeats == 1 or key.shape[1] % repeats:
            return
        record = self.records[-1]
        costs = record.flops, record.flop_bytes, record.other_bytes
        with self:
            scaled_dot_product_attention(query, key[:, ::repeats], value[:, ::repeats], is_causal=True, enable_gqa=True)
        record.flops, record.flop_bytes, record.other_bytes = costs

    def _announce_writes(self, func: Any, args: Any, kwargs: Any) -> None:
        for tensor in touches_of(func, args, kwargs).writes:
            lifetime, _ = self._live.get(storage_key(tensor), (None, None))
            if self.before_write is not None and (lifetime is None or lifetime.producer == INPUT):
                self.before_write(tensor)

    def _note(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        record, effect = self.records[-1], effect_of(func, args, kwargs, out)
        record.started = True
        for tensor in effect.reads:
            self._note_use(tensor, record.reads)
        for tensor in effect.writes:
            self._note_use(tensor, record.writes)
        self._show(effect.shows)
        given = set() if func is aten.lift_fresh.default else set(map(storage_key, tensors_in((args, kwargs))))
        for tensor in tensors_in(out):
            if not self.weights_of(tensor):  # a view of what nobody made in the forward was there before it
                lifetime = self._lifetime_of(tensor, INPUT if storage_key(tensor) in given else len(self.records) - 1)
                if func is aten.clone.default and lifetime is not None:
                    lifetime.repeats = _repeats(args[0])
        record.flops += effect.flops
        if effect.flops:
            record.flop_bytes += effect.moved_bytes
        else:
            record.other_bytes += effect.moved_bytes

    def _note_use(self, tensor: Tensor, weights: dict[str, None]) -> None:
        names = self.weights_of(tensor)
        weights.update(dict.fromkeys(names))
        if names:
            return
        if (lifetime := self._lifetime_of(tensor, INPUT)) is not None:
            now = len(self.records) - 1
            if not lifetime.uses or lifetime.uses[-1] != now:
                lifetime.uses.append(now)

    def _lifetime_of(self, tensor: Tensor, producer: int) -> Lifetime | None:
        storage = storage_of(tensor)
        if storage is None:
            return None
        key = int(storage._cdata)
        if key not in self._live:
            lifetime = Lifetime(storage.nbytes(), producer)
            self._live[key] = (lifetime, weakref.ref(storage, partial(self._end, key)))
            self.lifetimes.append(lifetime)
            self._live_bytes += lifetime.nbytes
            for record in self.records if producer == INPUT else ():  # it was there before the forward
                record.peak_bytes += lifetime.nbytes
            self.records[-1].peak_bytes = max(self.records[-1].peak_bytes, self._live_bytes)
        return self._live[key][0]

    def _end(self, key: int, _: Any) -> None:
        """End a lifetime. If no operator has run since the last boundary, it ended before that boundary."""
        (lifetime, _), record = self._live.pop(key), self.records[-1]
        self._live_bytes -= lifetime.nbytes
        lifetime.end = max(len(self.records) - (1 if record.started else 2), lifetime.producer, 0)
        if not record.started:
            record.peak_bytes = self._live_bytes


@contextmanager
def boundaries_reported(model: nn.Module, recorder: Recorder) -> Iterator[None]:
    """Tell the recorder each time a module of the model is entered or left, without touching the modules.

    Reports as progress how many modules have been entered at least once.
    """
    names: dict[int, str] = {}
    for name, module in model.named_modules():
        names[id(module)] = name
    entered = set[int]()

    def reached(side: str, module: nn.Module, *_: Any) -> None:
        if id(module) in names:
            recorder.reach(names[id(module)], side)
            if side == "enter":
                entered.add(id(module))
                report(PROGRESS, len(entered), len(names))

    handles = [
        module_hooks.register_module_forward_pre_hook(partial(reached, "enter")),
        module_hooks.register_module_forward_hook(partial(reached, "exit"), always_call=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        report(PROGRESS, len(names), len(names))


@dataclass(frozen=True, slots=True)
class Effect:
    """What one execution of an operator did.

    `shows` are the tensors of which it made views. A view reads nothing; the operator that takes the view does.
    But the bytes must be at their place when the view is made.
    """

    reads: Sequence[Tensor] = ()
    shows: Sequence[Tensor] = ()
    writes: Sequence[Tensor] = ()
    flops: int = 0
    moved_bytes: int = 0


@dataclass
class Touches:
    """The tensors that an operator is given, those of which it reads data, and those that it changes."""

    given: list[Tensor] = field(default_factory=list)
    reads: list[Tensor] = field(default_factory=list)
    writes: list[Tensor] = field(default_factory=list)


def effect_of(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> Effect:
    """The effect of `out = func(*args, **kwargs)`."""
    name, touches, outputs = operator_name(func), touches_of(func, args, kwargs), tensors_in(out)
    known = set(map(storage_key, touches.given))
    fresh = []
    for tensor in outputs:
        if storage_key(tensor) not in known:
            fresh.append(tensor)
    reads, writes = touches.reads, touches.writes
    if name == "device" or name.startswith(("new_", "sym_", "is_", "empty")) or name.endswith("_like"):
        return Effect(writes=writes, moved_bytes=0 if "empty" in name else _sum_bytes(fresh))  # asks for the shape only
    if outputs and not writes and (not fresh or name == "lift_fresh"):
        return Effect(shows=touches.given)
    flops = _flops(func, args, kwargs, out)
    if name in GATHERS:
        moved_bytes = 2 * _sum_bytes(fresh) + _sum_bytes(reads[1:])
    elif name in SCATTERS:
        moved_bytes = 2 * _sum_bytes(reads[1:])
    else:
        moved_bytes = _sum_bytes([*reads, *writes, *fresh])
    return Effect(reads, (), writes, flops, moved_bytes)


def _flops(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> int:
    """The work of an operator. If its formula fails, it counts as one that only moves bytes."""
    formula = FLOP_FORMULAS.get(getattr(func, "_overloadpacket", None))
    try:
        return 0 if formula is None else int(formula(*args, **kwargs, out_val=out))
    except Exception:
        return 0


def touches_of(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Touches:
    """What an operator does to its tensor arguments, by its schema."""
    schema, touches = getattr(func, "_schema", None), Touches()
    if schema is None:  # a higher-order operator: assume that it only reads
        touches.given = touches.reads = tensors_in((args, dict(kwargs)))
        return touches
    given = dict(kwargs)
    for argument, value in zip(schema.arguments, args, strict=False):
        given[argument.name] = value
    overwrites = operator_name(func) in OVERWRITES
    silently_written = RUNNING_STATISTICS if given.get("training") is True else ()
    for argument in schema.arguments:
        if argument.name in given:
            tensors = tensors_in(given[argument.name])
            declared = argument.alias_info is not None and argument.alias_info.is_write
            touches.given += tensors
            if not declared or not (overwrites or argument.kwarg_only):  # a keyword-only one is written as `out=`
                touches.reads += tensors
            if declared or argument.name in silently_written:
                touches.writes += tensors
    return touches


def is_composite(func: Any) -> bool:
    """Whether an operator is made of others. In inference mode, the recorder sees such operators whole."""
    return isinstance(func, OpOverload) and torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), COMPOSITE)


def operator_name(func: Any) -> str:
    """The plain name of an operator: `addmm` of `aten.addmm.default`."""
    schema = getattr(func, "_schema", None)
    return str(schema.name).split("::")[-1] if schema is not None else str(func)


def storage_of(tensor: Tensor) -> torch.UntypedStorage | None:
    """The storage of a tensor, or None if it has none of its own (sparse and wrapped tensors)."""
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
    return list(filter(torch.is_tensor, tree_leaves(tree)))


def _repeats(tensor: Tensor) -> int:
    """How often an expanded tensor shows the same bytes."""
    return math.prod(size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride == 0)


def _sum_bytes(tensors: Sequence[Tensor]) -> int:
    total = 0
    for tensor in tensors:
        storage, nbytes = storage_of(tensor), tensor.numel() * tensor.element_size()
        total += nbytes if storage is None else min(nbytes, storage.nbytes())  # an expanded tensor is read once
    return total
