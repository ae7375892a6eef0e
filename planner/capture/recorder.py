"""Record every operator of one forward: what it reads, writes, computes and moves, and how long its results live.

Knows weights by name and modules by name. Decides nothing: `blocks` folds what is recorded here into calls.

    events      |enter ""   |enter a   |enter a.0   |exit a.0   |exit a   |enter b ...
    segments    |---- 0 ----|--- 1 ----|---- 2 -----|---- 3 ----|--- 4 ---|---- 5 ---
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.nn.modules import module as module_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from taskgraph_offload.nouns.trace import INPUT, Boundary

from .operators import FLOP_FORMULAS, effect_of, operator_name, storage_key, storage_of, tensors_in, tensors_written_by

ROOT = Boundary("", "enter", 0)
COMPOSITE = "CompositeImplicitAutograd"
aten, prim = torch.ops.aten, torch.ops.prim

ASKS_LAYOUT = {  # operators that only ask how a tensor is laid out; torch's own FLOP counter leaves the same ones alone
    *("size", "sym_size", "stride", "sym_stride", "storage_offset", "sym_storage_offset", "numel", "sym_numel", "dim"),
    *("layout", "is_contiguous", "sym_is_contiguous", "is_strides_like_format", "is_non_overlapping_and_dense"),
}


@dataclass
class Segment:
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
        """Whether an operator moved bytes or met a weight."""
        return self.uses_weights or self.flop_bytes + self.other_bytes > 0


@dataclass
class Life:
    """A storage that is no weight: the segments that made it and used it, and where it went (None: it never did)."""

    nbytes: int
    producer: int
    uses: list[int] = field(default_factory=list)
    end: int | None = None


class Recorder(TorchDispatchMode):
    """Sees every operator of what runs inside it.

    `weights_of` names the weights that a tensor shows. `replace` may swap a tensor before it is used. `before_write` is
    told of each tensor about to be changed that the forward did not make itself.
    """

    supports_higher_order_operators = True

    def __init__(
        self,
        weights_of: Callable[[Tensor], Sequence[str]],
        replace: Callable[[Tensor], Tensor] | None = None,
        before_write: Callable[[Tensor], None] | None = None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.weights_of, self.replace, self.before_write = weights_of, replace, before_write
        self.segments = [Segment(ROOT)]
        self.lives: list[Life] = []
        self._live: dict[int, tuple[Life, Any]] = {}  # by storage, with the weak reference that ends the life
        self._live_bytes = 0
        self._seen: Counter[tuple[str, str]] = Counter()

    def reach(self, module: str, side: Any) -> None:
        """The forward enters or leaves a module: a new segment begins."""
        boundary = Boundary(module, side, self._seen[module, side])
        self._seen[module, side] += 1
        if boundary != ROOT:
            self.segments.append(Segment(boundary, peak_bytes=self._live_bytes))

    def stop(self) -> None:
        """What lives now lives on after the forward."""
        self._live.clear()

    def hold_input(self, tensor: Tensor) -> None:
        """Count a tensor that the caller hands in, and keeps."""
        if not self.weights_of(tensor):
            self._life_of(tensor, INPUT)

    def show(self, tensors: Iterable[Tensor]) -> None:
        """Somebody learns where these tensors are, and may look there later."""
        self.segments[-1].reads.update(dict.fromkeys(name for tensor in tensors for name in self.weights_of(tensor)))

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
            args, kwargs = tree_map_only(Tensor, self.replace, (args, kwargs))
        if self.before_write is not None:
            self._announce_writes(func, args, kwargs)
        out = func(*args, **kwargs)
        self._note(func, args, kwargs, out)
        return out

    def _announce_writes(self, func: Any, args: Any, kwargs: Any) -> None:
        for tensor in tensors_written_by(func, args, kwargs):
            life, _ = self._live.get(storage_key(tensor), (None, None))
            if self.before_write is not None and (life is None or life.producer == INPUT):
                self.before_write(tensor)

    def _note(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        segment, effect = self.segments[-1], effect_of(func, args, kwargs, out)
        segment.started = True
        for tensors, weights in ((effect.reads, segment.reads), (effect.writes, segment.writes)):
            for tensor in tensors:
                self._note_use(tensor, weights)
        self.show(effect.shows)
        given = set() if func is aten.lift_fresh.default else set(map(storage_key, tensors_in((args, kwargs))))
        for tensor in tensors_in(out):
            if not self.weights_of(tensor):  # a view of what nobody made in the forward was there before it
                self._life_of(tensor, INPUT if storage_key(tensor) in given else len(self.segments) - 1)
        segment.flops += effect.flops
        if effect.flops:
            segment.flop_bytes += effect.moved_bytes
        else:
            segment.other_bytes += effect.moved_bytes

    def _note_use(self, tensor: Tensor, weights: dict[str, None]) -> None:
        names = self.weights_of(tensor)
        weights.update(dict.fromkeys(names))
        if names:
            return
        if (life := self._life_of(tensor, INPUT)) is not None:
            now = len(self.segments) - 1
            if not life.uses or life.uses[-1] != now:
                life.uses.append(now)

    def _life_of(self, tensor: Tensor, producer: int) -> Life | None:
        storage = storage_of(tensor)
        if storage is None:
            return None
        key = int(storage._cdata)
        if key not in self._live:
            life = Life(storage.nbytes(), producer)
            self._live[key] = (life, weakref.ref(storage, partial(self._end, key)))
            self.lives.append(life)
            self._count(life)
        return self._live[key][0]

    def _count(self, life: Life) -> None:
        """Add a new life to the peaks; what was there before the forward, to those of all segments so far."""
        self._live_bytes += life.nbytes
        if life.producer == INPUT:
            for segment in self.segments:
                segment.peak_bytes += life.nbytes
        self.segments[-1].peak_bytes = max(self.segments[-1].peak_bytes, self._live_bytes)

    def _end(self, key: int, _: Any) -> None:
        """A storage is gone. What a module returns from drops before the next operator was gone when it returned."""
        (life, _), segment = self._live.pop(key), self.segments[-1]
        self._live_bytes -= life.nbytes
        life.end = max(len(self.segments) - (1 if segment.started else 2), life.producer, 0)
        if not segment.started:
            segment.peak_bytes = self._live_bytes


def is_composite(func: Any) -> bool:
    """Whether an operator is made of others: in inference mode, such operators are seen whole."""
    return isinstance(func, OpOverload) and torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), COMPOSITE)


@contextmanager
def boundaries_reported(model: nn.Module, recorder: Recorder) -> Iterator[None]:
    """Tell the recorder of each module of the model that is entered or left, without touching the modules."""
    names = {id(module): name for name, module in model.named_modules()}

    def enter(module: nn.Module, args: Any) -> None:
        if id(module) in names:
            recorder.reach(names[id(module)], "enter")

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        if id(module) in names:
            recorder.reach(names[id(module)], "exit")

    handles = [
        module_hooks.register_module_forward_pre_hook(enter),
        module_hooks.register_module_forward_hook(leave, always_call=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
