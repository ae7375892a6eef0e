"""A naive check of traces: runs one forward for real, and compares the addresses of every operator's arguments.

It shares no code with what it checks. It is simple and slow on purpose.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from taskgraph_offload.nouns.trace import Trace

READS_NO_DATA = {"aten::_unsafe_view", "aten::_reshape_alias", "aten::lift_fresh", "prim::device"}
READS_NO_DATA |= {f"aten::{name}_like" for name in ("empty", "zeros", "ones", "full", "rand", "randn")}
READS_NO_DATA |= {f"aten::new_{name}" for name in ("empty", "empty_strided", "zeros", "ones", "full")}


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}  # torch does not count it


@dataclass
class Seen:
    """What happened in one call of a block, or between two (`name` is empty)."""

    name: str
    used: set[str] = field(default_factory=set)
    written: set[str] = field(default_factory=set)
    peak_bytes: int = 0


class NaiveForward(TorchDispatchMode):
    """Watches one forward of a model whose blocks are known."""

    def __init__(self, model: nn.Module, trace: Trace) -> None:
        super().__init__()
        self.model, self.trace = model, trace
        self.names = {name: weight.name for weight in trace.weights.values() for name in (weight.name, *weight.aliases)}
        self.tensors: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
        self.tensors |= dict(model.named_buffers(remove_duplicate=False))
        self.by_weight = {self.names[name]: tensor for name, tensor in reversed(self.tensors.items())}
        self.places = [(self.names[name], *_addresses(tensor)) for name, tensor in self.tensors.items()]
        self.shown_at: dict[tuple[int, int], set[str]] = {}
        self.seen = [Seen("")]
        self.living: list[tuple[StorageWeakRef, int, int]] = []

    def run(self, inputs: dict[str, Any], entry: str = "forward") -> list[Seen]:
        times: Counter[str] = Counter()

        def enter(name: str) -> None:
            times[name] += 1
            self.seen.append(Seen((name or "model") if times[name] == 1 else f"{name}#{times[name]}"))
            self._measure()

        handles = []
        for name in {call.block for call in self.trace.calls if call.block is not None}:
            module = self.model.get_submodule(name)
            handles.append(module.register_forward_pre_hook(lambda *_, name=name: enter(name), prepend=True))
            handles.append(module.register_forward_hook(lambda *_: self.seen.append(Seen("")), prepend=True))
        for tensor in tree_leaves(inputs):
            if isinstance(tensor, Tensor):
                self._live(tensor)
        with torch.no_grad(), self:
            (self.model if entry == "forward" else getattr(self.model, entry))(**inputs)
        for handle in handles:
            handle.remove()
        return self.seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        shown = {name for tensor in _tensors((args, kwargs)) for name in self._shown_by(tensor)}
        before = {name: _bytes(self.by_weight[name]) for name in shown}
        out = func(*args, **(kwargs or {}))
        now = self.seen[-1]
        if not func.is_view and func.name().split(".")[0] not in READS_NO_DATA:
            now.used |= shown
        now.written |= {name for name in shown if _bytes(self.by_weight[name]) != before[name]}
        for tensor in _tensors(out):
            self._live(tensor)
        self._measure()
        return out

    def _shown_by(self, tensor: Tensor) -> set[str]:
        start, stop = _addresses(tensor)
        if (start, stop) not in self.shown_at:  # weights never move
            self.shown_at[start, stop] = self._shown_between(start, stop)
        return self.shown_at[start, stop]

    def _shown_between(self, start: int, stop: int) -> set[str]:
        return {name for name, first, last in self.places if max(start, first) < min(stop, last)}

    def _live(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        known = any(not ref.expired() and address == storage.data_ptr() for ref, _, address in self.living)
        if storage.nbytes() and not known and not self._shown_by(tensor):
            self.living.append((StorageWeakRef(storage), storage.nbytes(), storage.data_ptr()))

    def _measure(self) -> None:
        self.living = [one for one in self.living if not one[0].expired()]
        alive = sum(nbytes for _, nbytes, _ in self.living)
        self.seen[-1].peak_bytes = max(self.seen[-1].peak_bytes, alive)


def assert_trace_is_what_happens(
    model: nn.Module, inputs: dict[str, Any], trace: Trace, entry: str = "forward", peaks: bool = True
) -> None:
    """Assert that blocks, weights, writes and peaks of a trace are those of a real run."""
    seen = NaiveForward(model, trace).run(inputs, entry)
    happened = [(one.name, _some(trace, one.used), one.written, one.peak_bytes) for one in seen if one.name]
    traced = [
        (call.name, _some(trace, set(call.reads)), set(call.writes), call.transient_bytes)
        for call in trace.calls
        if call.block is not None
    ]
    assert len(traced) == len(happened)
    for one, other in zip(traced, happened, strict=True):
        assert one[: 4 if peaks else 3] == other[: 4 if peaks else 3]
    between = {name for one in seen if not one.name for name in one.used | one.written}
    expected_fixed = between | {name for one in seen for name in one.written}
    assert _some(trace, set(trace.fixed)) == _some(trace, expected_fixed)
    assert not peaks or trace.activation_bytes == max(one.peak_bytes for one in seen)


def counted_flops(model: nn.Module, inputs: dict[str, Any]) -> int:
    """What torch's own counter counts."""
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter:
        model(**inputs)
    return counter.get_total_flops()


def _some(trace: Trace, names: set[str]) -> set[str]:
    return {name for name in names if trace.weights[name].nbytes}


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def _bytes(tensor: Tensor) -> bytes:
    with torch._C._DisableTorchDispatch():
        return bytes(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())


def _addresses(tensor: Tensor) -> tuple[int, int]:
    if not tensor.numel():
        return 0, 0
    last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()
