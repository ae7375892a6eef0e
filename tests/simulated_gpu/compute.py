"""Computes on the simulated GPU. torch's own CUDA code checks, allocates and launches; its kernels do nothing.

A host function in the same stream computes the same operator on the CPU, over the same bytes, when the stream gets
there: too early or too late is as wrong here as on a GPU.
"""

from __future__ import annotations

import ctypes
import itertools
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from . import card

aten = torch.ops.aten
errors: list[str] = []  # of operators that failed in a stream
_waiting: dict[int, Callable[[], None]] = {}
_numbers = itertools.count()

_ONLY_HOST = {  # operators that launch no kernel, or read on the host what the stream has made
    "_local_scalar_dense", "detach", "set_", "resize_", "lift", "lift_fresh", "is_pinned", "_pin_memory",
    "record_stream", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "empty_permuted",
    "_has_compatible_shallow_copy_type", "_fused_sdp_choice",
}  # fmt: skip
_SIZED_BY_DATA = {  # operators whose output's shape depends on what the stream has made
    "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "bincount", "repeat_interleave",
    "equal", "is_nonzero", "histc", "multinomial",
}  # fmt: skip


@card.CALL
def _run(number: int) -> None:
    try:
        _waiting.pop(number)()
    except BaseException:
        errors.append(traceback.format_exc())


class _Place:
    """Where a tensor of the card lies."""

    __slots__ = ("address", "dtype", "nbytes", "shape", "strides")

    def __init__(self, tensor: Tensor) -> None:
        self.address, self.dtype = tensor.data_ptr(), tensor.dtype
        self.shape, self.strides = tuple(tensor.shape), tensor.stride()
        last = sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))
        self.nbytes = (last + 1) * tensor.element_size() if tensor.numel() else 0

    def tensor(self) -> Tensor:
        """The same bytes as a tensor of the CPU."""
        if not self.nbytes:
            return torch.empty_strided(self.shape, self.strides, dtype=self.dtype)
        memory = (ctypes.c_char * self.nbytes).from_address(self.address)
        made = torch.empty(0, dtype=self.dtype)
        return made.set_(torch.frombuffer(memory, dtype=torch.uint8).untyped_storage(), 0, self.shape, self.strides)


class Compute(TorchDispatchMode):
    """While it is active, the operators of its thread are computed."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        if func.namespace != "aten" or not _is_of_the_card(args, kwargs):
            return func(*args, **kwargs)
        with self:  # in inference mode, operators that are made of others come here whole
            if (made := func.decompose(*args, **kwargs)) is not NotImplemented:
                return made
        if func.is_view or name in _ONLY_HOST:
            return func(*args, **kwargs)
        if name in ("copy_", "_to_copy") and (found := _across(name, args, kwargs)) is not None:
            return found
        if name in _SIZED_BY_DATA or (name.startswith("index") and _has_a_mask(args)):
            return _at_once(func, args, kwargs)
        out = func(*args, **kwargs)
        reads, writes = _map(args, _frozen), _map(out, _frozen)
        asked = {key: _map(value, _frozen) for key, value in kwargs.items()}
        if torch.Tag.nondeterministic_seeded in func.tags:
            torch.cuda.current_stream().synchronize()  # only this thread may use the CPU's generator
            with _seeded(kwargs.get("generator")):
                _compute(func, name, reads, asked, writes)
        else:
            _enqueue(f"aten.{name}", (reads, asked), writes, lambda: _compute(func, name, reads, asked, writes))
        return out


@contextmanager
def computing() -> Iterator[None]:
    """Compute what this thread does on the card; an operator that fails in a stream fails here, at the end."""
    switch = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)  # streams are threads that run Python
    errors.clear()
    try:
        with Compute():
            yield
        torch.cuda.synchronize()
    finally:
        sys.setswitchinterval(switch)
    assert not errors, errors[0]


def _compute(func: Any, name: str, reads: Any, asked: dict[str, Any], writes: Any) -> None:
    """Run the operator on the CPU, and put what it gives where torch's CUDA code wants it."""
    with _disable_current_modes(), torch.no_grad():
        args, kwargs = _map(reads, _thawed), {key: _map(value, _thawed) for key, value in asked.items()}
        if "device" in kwargs:
            kwargs["device"] = "cpu"
        if "generator" in kwargs:
            kwargs["generator"] = None
        made = _CPU.get(name, func)(*args, **kwargs)
        for place, value in zip(_leaves(writes), _leaves(made), strict=False):
            if isinstance(place, _Place) and isinstance(value, Tensor):
                target = place.tensor()
                if target.data_ptr() != value.data_ptr():
                    target.copy_(value)


@contextmanager
def _seeded(generator: torch.Generator | None) -> Iterator[None]:
    """Draw from another seed each time, as the card's generator goes on. The CPU's own goes on as before."""
    used = generator or torch.cuda.default_generators[torch.cuda.current_device()]
    before = torch.default_generator.get_state()
    torch.default_generator.manual_seed(hash((used.initial_seed(), used.get_offset())) % 2**63)
    try:
        yield
    finally:
        torch.default_generator.set_state(before)


def _at_once(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Let the host wait for the stream, as CUDA does for these operators, and compute on the CPU."""
    torch.cuda.current_stream().synchronize()
    with _disable_current_modes():
        given, cpu = _map(args, _thawed_now), {key: _map(value, _thawed_now) for key, value in kwargs.items()}
        if func is aten.histc.default and not given[0].is_floating_point():  # the CPU has none of integers
            made = func(given[0].double(), *given[1:], **cpu).to(given[0].dtype)
        else:
            made = func(*given, **cpu)
        if func._schema.is_mutable:
            return args[0]
        return _map(made, lambda value: value.cuda() if isinstance(value, Tensor) else value)


def _across(name: str, args: Any, kwargs: dict[str, Any]) -> Any:
    """A copy between host and card, step by step: torch would convert and reorder with kernels."""
    if name == "_to_copy":
        source = args[0]
        wanted = kwargs.get("device")
        device = source.device if wanted is None else torch.device(wanted)
        if device.type == source.device.type:
            return None
        like = {"memory_format": kwargs["memory_format"]} if kwargs.get("memory_format") is not None else {}
        with _disable_current_modes():
            target = torch.empty_like(
                source,
                device=device,
                dtype=kwargs.get("dtype") or source.dtype,
                pin_memory=bool(kwargs.get("pin_memory")),
                **like,
            )
        waits = kwargs.get("non_blocking") or False
    else:
        target, source = args[:2]
        waits = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
        if target.device.type == source.device.type:
            return None
    with Compute():  # a mode is off while it handles an operator
        source = source.to(target.dtype) if source.dtype != target.dtype else source
        source = source.expand_as(target)
        if target.stride() == source.stride() and _is_dense(target):
            with _disable_current_modes():
                return target.copy_(source, non_blocking=waits)
        source = source.contiguous()
        passing = target if target.is_contiguous() else torch.empty_like(target, memory_format=torch.contiguous_format)
        with _disable_current_modes():
            passing.copy_(source, non_blocking=waits)
        return target if passing is target else target.copy_(passing)


def _is_dense(tensor: Tensor) -> bool:
    return _Place(tensor).nbytes == tensor.nbytes and all(
        n < 2 or s for n, s in zip(tensor.shape, tensor.stride(), strict=True)
    )


def _enqueue(what: str, reads: Any, writes: Any, action: Callable[[], None]) -> None:
    number = next(_numbers)
    _waiting[number] = action
    ranges = [(place, False) for place in _leaves(reads) if isinstance(place, _Place)]
    ranges += [(place, True) for place in _leaves(writes) if isinstance(place, _Place)]
    touched = (card.Range * len(ranges))(*(card.Range(place.address, place.nbytes, writes) for place, writes in ranges))
    stream = torch.cuda.current_stream().cuda_stream
    card.library().simulated_work(stream, _run, number, what.encode(), touched, len(ranges))


def _frozen(value: Any) -> Any:
    """What an operator was given: where tensors of the card lie, and what those of the host hold now."""
    if not isinstance(value, Tensor):
        return value
    return _Place(value) if value.is_cuda else value.clone()


def _thawed(value: Any) -> Any:
    return value.tensor() if isinstance(value, _Place) else value


def _thawed_now(value: Any) -> Any:
    return _Place(value).tensor() if isinstance(value, Tensor) and value.is_cuda else value


def _map(tree: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(tree, tuple | list):
        return type(tree)(_map(item, change) for item in tree)
    return change(tree)


def _leaves(tree: Any) -> Iterator[Any]:
    if isinstance(tree, tuple | list):
        for item in tree:
            yield from _leaves(item)
    elif isinstance(tree, dict):
        for item in tree.values():
            yield from _leaves(item)
    else:
        yield tree


def _is_of_the_card(args: Any, kwargs: dict[str, Any]) -> bool:
    if (device := kwargs.get("device")) is not None and torch.device(device).type == "cuda":
        return True
    return any(isinstance(value, Tensor) and value.is_cuda for value in _leaves((args, kwargs)))


def _has_a_mask(args: Any) -> bool:
    return any(isinstance(value, Tensor) and value.dtype in (torch.bool, torch.uint8) for value in _leaves(args[1:2]))


def _lstm_cell(
    gates: Tensor, hidden: Tensor, cell: Tensor, bias: Tensor | None = None, other: Tensor | None = None
) -> Any:
    """What CUDA computes in one kernel for a step of an LSTM."""
    together = gates + hidden + (0 if bias is None else bias) + (0 if other is None else other)
    enters, forgets, new, leaves = together.chunk(4, 1)
    enters, forgets, new, leaves = enters.sigmoid(), forgets.sigmoid(), new.tanh(), leaves.sigmoid()
    after = forgets * cell + enters * new
    return leaves * after.tanh(), after, torch.cat([enters, forgets, new, leaves], 1)


def _batch_norm(x: Tensor, weight: Any, bias: Any, mean: Tensor, var: Tensor, momentum: float, eps: float) -> Any:
    """CUDA gives the statistics that it has used, the CPU only those that it has computed."""
    out, _, _ = aten._native_batch_norm_legit_no_training(x, weight, bias, mean, var, momentum, eps)
    return out, mean, (var + eps).rsqrt()


_CPU: dict[str, Callable[..., Any]] = {  # operators that only CUDA has, or that give something else there
    "_thnn_fused_lstm_cell": _lstm_cell,
    "_native_batch_norm_legit_no_training": _batch_norm,
}
