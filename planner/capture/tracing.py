"""Turn a model and its inputs into a trace: run its forward once on tensors without data.

No weight is read and nothing is computed, unless the forward looks at data: then it runs once for real. Either way,
the model, the random number generators and torch end as they began.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from taskgraph_offload.errors import NothingReadError, OffloadError, SettingsError, TraceError, shown
from taskgraph_offload.foreign import refuse_foreign_hooks
from taskgraph_offload.nouns.trace import Trace

from .blocks import Usage, add_unread, always_resident, choose_blocks, fold, lasting, match_blocks
from .failures import failure, may_succeed_for_real
from .recorder import Lifetime, Record, Recorder, boundaries_reported, tensors_in
from .symbolic import symbolic_records
from .untouched import (
    collector_paused,
    everything_below,
    fakes_quiet,
    module_to_makes_new_tensors,
    same_random_numbers,
    untouched,
)
from .weights import Backup, Fakes, WeightMap, assert_no_fakes_left


@dataclass
class Recording:
    """What one run of the forward showed, the blocks to cut it into, and how it was run."""

    records: list[Record]
    lifetimes: list[Lifetime]
    blocks: list[str]
    source: Literal["fake", "real", "symbolic"]


def capture(
    model: nn.Module,
    inputs: Any = None,
    *,
    entry: str = "forward",
    blocks: Sequence[str] | None = None,
    on_cpu: bool = False,
) -> Trace:
    """Trace one forward of a model.

    `inputs` is a tuple (positional), a dict (keywords), `(args, kwargs)` (a tuple or list and a dict), a tensor, or a
    function that returns one of these. Without it, the model's own `dummy_inputs` are tried, then a symbolic trace.
    `entry` names the method to trace. `blocks` is a list of name patterns of the modules that are blocks; see
    `choose_blocks` for the default. `on_cpu` says that the forward will run on the CPU.

    >>> trace = capture(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), torch.zeros(1, 8))
    >>> [(call.name, call.reads) for call in trace.calls]
    [('0', ('0.weight', '0.bias')), ('0:after', ()), ('2', ('2.weight', '2.bias'))]
    """
    _check_model(model, entry)
    if blocks is not None:
        _check_patterns(blocks)
    where = WeightMap(model)
    recording = _recording(model, where, inputs, entry, blocks, on_cpu)
    folded = fold(recording.records, recording.blocks)
    return Trace(
        weights=where.weights,
        calls=folded.calls,
        activations=lasting(folded, recording.lifetimes),
        model=type(model).__name__,
        entry=entry,
        source=recording.source,
        fixed=always_resident(folded.calls),
    )


def _recording(
    model: nn.Module, where: WeightMap, given: Any, entry: str, patterns: Sequence[str] | None, on_cpu: bool
) -> Recording:
    """Record a run on the caller's inputs, or on the model's own example if that works, or else a symbolic one."""

    def blocks_of(usage: Usage) -> list[str]:
        return choose_blocks(model, usage, where.weights) if patterns is None else match_blocks(patterns, usage)

    with same_random_numbers(where.device), torch.inference_mode(False), torch.no_grad():
        inputs = example_of(model, entry) if given is None else read_inputs(given)
        if inputs is not None:
            with nullcontext() if given is not None else suppress(TraceError):
                recorder, source = _run(model, where, inputs, entry, on_cpu)
                _check_use(model, entry, recorder.records)
                blocks = blocks_of(Usage.of(recorder.records))
                if source == "real":
                    add_unread(recorder.records, blocks, where.weights.values())
                return Recording(recorder.records, recorder.lifetimes, blocks, source)
        blocks = blocks_of(Usage.guessed(model, where.names_of))
        records = symbolic_records(model, where, entry, blocks)
        _check_use(model, entry, records)
        return Recording(records, [], blocks, "symbolic")


def _check_use(model: nn.Module, entry: str, records: Sequence[Record]) -> None:
    if not any(map(attrgetter("uses_weights"), records)):
        raise NothingReadError(
            f"{type(model).__name__}.{entry} was run, and read no weight: is it a generator, or does it run in another "
            "thread? Give the method that does the work when it is called, as in entry='forward'"
        )


def _run(
    model: nn.Module, where: WeightMap, inputs: Inputs, entry: str, on_cpu: bool
) -> tuple[Recorder, Literal["fake", "real"]]:
    """Run on fakes, or for real if the fakes are the reason why that fails and the weights are there."""
    try:
        return _run_on_fakes(model, where, inputs, entry, on_cpu), "fake"
    except OffloadError:
        raise
    except Exception as error:
        if where.device.type == "meta" or not may_succeed_for_real(error):
            raise failure(model, where, entry, inputs, error) from error
    try:
        return _run_for_real(model, where, inputs, entry), "real"
    except OffloadError:
        raise
    except Exception as error:
        raise failure(model, where, entry, inputs, error) from error


def _run_on_fakes(model: nn.Module, where: WeightMap, inputs: Inputs, entry: str, on_cpu: bool) -> Recorder:
    fakes = Fakes(where)
    recorder = Recorder(fakes.weights_of, replace=fakes.of_arguments, on_cpu=on_cpu)
    try:
        with collector_paused(), fakes_quiet(), untouched(model), fakes.in_place_of_weights(model):
            _record(model, entry, inputs, partial(fakes.of, device=fakes.device), recorder, fakes.mode)
    finally:
        assert_no_fakes_left(model)
    return recorder


def _run_for_real(model: nn.Module, where: WeightMap, inputs: Inputs, entry: str) -> Recorder:
    def own_copy(tensor: Tensor) -> Tensor:
        if tensor.device.type == "meta":
            raise TraceError(
                f"{type(model).__name__}.{entry} looks at data, but its inputs are on the meta device; give real ones"
            )
        return tensor if where.names_of(tensor) else tensor.detach().to(where.device, copy=True)

    backup = Backup(where)
    recorder = Recorder(where.names_of, before_write=backup.before_write)
    with untouched(model):
        try:
            _record(model, entry, inputs, own_copy, recorder, nullcontext())
        finally:
            backup.restore()
    return recorder


def _record(
    model: nn.Module,
    entry: str,
    inputs: Inputs,
    convert: Callable[[Tensor], Tensor],
    recorder: Recorder,
    mode: AbstractContextManager[Any],
) -> None:
    held: list[Tensor] = []

    def converted(tensor: Tensor) -> Tensor:
        held.append(convert(tensor))
        return held[-1]

    given = inputs.converted(converted)
    for tensor in held:
        recorder.hold_input(tensor)
    with (
        # Compiled functions (`torch.compile`, flex_attention) run as plain Python: the compiler refuses to work under
        # a dispatch mode, and remembers the refusal until the process ends.
        torch.compiler.set_stance("force_eager"),
        module_to_makes_new_tensors(),
        boundaries_reported(model, recorder),
        mode,
        recorder,
    ):
        output = (model if entry == "forward" else getattr(model, entry))(*given.args, **(given.kwargs or {}))
        recorder.finish(tensors_in(output))


def _check_model(model: Any, entry: Any) -> None:
    """Raise if the model is no module, has no such method, or keeps its weights where a trace cannot replace them."""
    if isinstance(model, str):
        raise SettingsError(
            f"{shown(model)} is a text, not a model: load the model first, as in "
            f"transformers.AutoModel.from_pretrained({shown(model)}), and give what that returns"
        )
    if not isinstance(model, nn.Module):
        raise SettingsError(f"only a torch.nn.Module can be traced, not a {type(model).__name__}")
    if not isinstance(entry, str) or not callable(getattr(model, entry, None)):
        raise SettingsError(f"entry={entry!r}: {type(model).__name__} has no such method")
    for name, module in model.named_modules():
        who = f"{type(model).__name__}.{name}".rstrip(".")
        if isinstance(module, torch.jit.ScriptModule):
            raise TraceError(
                f"{who} is a torch.jit.ScriptModule, which keeps its weights in C++, out of reach; "
                "give the module that it was scripted or traced from"
            )
        for wrapper in (*vars(module).values(), *module._forward_pre_hooks.values()):
            if getattr(type(wrapper), "is_offloading", False) is True:
                raise SettingsError(
                    f"{who} is attached to an Executor, so it cannot be traced: "
                    "detach the executor (or leave its `with` block) first"
                )
    refuse_foreign_hooks(model)


def _check_patterns(patterns: Any) -> None:
    """Raise if `blocks=` is not a list of name patterns."""
    if isinstance(patterns, str) or not isinstance(patterns, Collection):
        example = patterns if isinstance(patterns, str) else "layers.*"
        raise SettingsError(f"blocks={patterns!r}: give a list of name patterns, as in blocks=[{example!r}]")
    if not patterns:
        raise SettingsError("blocks=[] names no module; give name patterns, as in blocks=['layers.*'], or leave it out")
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise SettingsError(f"blocks= holds {pattern!r}; give name patterns only, as in blocks=['layers.*']")


@dataclass(frozen=True)
class Inputs:
    """The arguments of one call."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] | None = None

    def converted(self, convert: Callable[[Tensor], Tensor]) -> Inputs:
        """A deep copy. Every tensor, also one inside a cache or a custom object, is converted, each once."""
        tree = (self.args, dict(self.kwargs or {}))
        memo: dict[int, Any] = {}
        for tensor in tensors_in(tree):
            memo[id(tensor)] = convert(tensor)
        for thing, _ in everything_below([tree]):
            if isinstance(thing, torch.Generator):
                memo[id(thing)] = _cloned(thing)
        with _ConvertCopies(convert):
            args, kwargs = copy.deepcopy(tree, memo)
        return Inputs(args, kwargs)

    def __str__(self) -> str:
        """The call as a person would write it.

        >>> str(Inputs((torch.zeros(2, 3),), {"flag": True}))
            '(float32[2, 3], flag=True)'
        """
        named = [f"{key}={_short(value)}" for key, value in (self.kwargs or {}).items()]
        return f"({', '.join([_short(value) for value in self.args] + named)})"


def read_inputs(given: Any) -> Inputs:
    """Inputs from what a caller gives.

    A tuple or list is positional, a mapping is by keyword, a tensor is the only argument. `(args, kwargs)`, a tuple of
    a tuple or list and a dict, is both. A function is called, and returns one of these.

    >>> str(read_inputs(((torch.zeros(2),), {"flag": True}))), str(read_inputs((torch.zeros(2), {"flag": True})))
    ('(float32[2], flag=True)', "(float32[2], {'flag': True})")
    """
    if callable(given) and not isinstance(given, Mapping | Tensor):
        given = _called(given)
    if isinstance(given, Tensor):
        return Inputs((given,))
    if isinstance(given, Mapping):
        return Inputs((), {str(key): value for key, value in given.items()})
    if _is_args_and_kwargs(given):
        args, kwargs = given
        return Inputs(tuple(args), dict(kwargs))
    if isinstance(given, tuple | list):
        return Inputs(tuple(given))
    raise SettingsError(
        f"inputs= is a {type(given).__name__}; give a tuple (positional), a dict (keywords), (args, kwargs), a tensor, "
        "or a function that returns one of these"
    )


def _is_args_and_kwargs(given: Any) -> bool:
    if not isinstance(given, tuple) or len(given) != 2:
        return False
    args, kwargs = given
    return (
        isinstance(args, tuple | list) and isinstance(kwargs, Mapping) and all(isinstance(key, str) for key in kwargs)
    )


def example_of(model: nn.Module, entry: str) -> Inputs | None:
    """The model's own `dummy_inputs`, if it has some that are of use. They are for its forward only."""
    try:
        given = getattr(model, "dummy_inputs", None) if entry == "forward" else None
        return None if given is None else read_inputs(given)
    except Exception:  # the model's own example may be broken: then there is none
        return None


class _ConvertCopies(TorchFunctionMode):
    """While on, a deep copy of a tensor is its conversion."""

    def __init__(self, convert: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.convert = convert

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not Tensor.__deepcopy__:
            return func(*args, **(kwargs or {}))
        tensor, memo = args
        if id(tensor) not in memo:
            memo[id(tensor)] = self.convert(tensor)
        return memo[id(tensor)]


def _called(function: Callable[[], Any]) -> Any:
    try:
        return function()
    except Exception as error:
        raise SettingsError(f"inputs= is a function that failed: {type(error).__name__}: {error}") from error


def _cloned(generator: torch.Generator) -> torch.Generator:
    """A generator that gives the same numbers."""
    clone = torch.Generator(generator.device)
    clone.set_state(generator.get_state())
    return clone


def _short(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if isinstance(value, tuple | list):
        return f"[{', '.join(_short(item) for item in value)}]"
    text = repr(value)
    return text if len(text) <= 40 else f"<{type(value).__name__}>"
