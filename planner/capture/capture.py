"""Turn a model and its inputs into a trace, by running its forward once on tensors that hold no data.

No weight is read and no FLOP is run, unless the forward looks at data: then it is run once for real. The model and the
random number generators end as they began.
"""

from __future__ import annotations

import gc
import logging
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses import fake_tensor

from taskgraph_offload.errors import OffloadError, SettingsError, TraceError
from taskgraph_offload.nouns.trace import Trace

from .backup import Backup
from .blocks import Needs, always_resident, check_patterns, choose_blocks, fold, lasting, match_blocks
from .fakes import Fakes, assert_none_left
from .inputs import Inputs, example_of, read_inputs
from .operators import tensors_in
from .recorder import Life, Recorder, Segment, boundaries_reported
from .storages import Storages
from .symbolic import symbolic_segments
from .unseen import add_unseen
from .untouched import same_random_numbers, untouched

NEEDS_REAL_DATA = {  # by name: not every torch has all of them
    *("DataDependentOutputException", "DynamicOutputShapeException", "UnsupportedFakeTensorException"),
    *("UnsupportedOperatorException", "UnsupportedMutationAliasingException", "MetadataMismatchError"),
}
SPEAKS_OF_DATA = (
    "faketensor",
    "fake tensor",
    "data pointer",
    "data_ptr",
    "tensor subclass",
    "meta tensor",
    "data-dependent",
)


@dataclass
class Recording:
    """What one run of the forward showed, the blocks to cut it into, and how it was run."""

    segments: list[Segment]
    lives: list[Life]
    blocks: list[str]
    source: Literal["fake", "real", "symbolic"]


def capture(
    model: nn.Module, inputs: Any = None, *, entry: str = "forward", blocks: Sequence[str] | None = None
) -> Trace:
    """Trace one forward of a model.

    `inputs` is a tuple (positional), a dict (keywords), a tensor, or a function that returns one of these; without it,
    the model's own `dummy_inputs` are tried, then a symbolic trace. `entry` names the method to trace. `blocks` is a
    list of name patterns of the modules whose calls are units; see `choose_blocks` for the default.

    >>> trace = capture(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), torch.zeros(1, 8))
    >>> [(call.name, call.reads) for call in trace.calls]
    [('0', ('0.weight', '0.bias')), ('0:after', ()), ('2', ('2.weight', '2.bias'))]
    """
    _check_arguments(model, entry, blocks)
    _check_modules(model)
    storages = Storages(model)
    recording = _recording(model, storages, inputs, entry, blocks)
    folded = fold(recording.segments, recording.blocks)
    return Trace(
        weights=storages.weights,
        calls=folded.calls,
        activations=lasting(folded, recording.lives),
        model=type(model).__name__,
        entry=entry,
        source=recording.source,
        fixed=always_resident(folded.calls),
    )


def _check_arguments(model: Any, entry: Any, blocks: Any) -> None:
    if not isinstance(model, nn.Module):
        raise SettingsError(f"only a torch.nn.Module can be traced, not a {type(model).__name__}")
    if not isinstance(entry, str) or not callable(getattr(model, entry, None)):
        raise SettingsError(f"entry={entry!r}: {type(model).__name__} has no such method")
    if blocks is not None:
        check_patterns(blocks)


def _check_modules(model: nn.Module) -> None:
    """Refuse modules whose weights are not where stand-ins can take their place, before anything is touched."""
    for name, module in model.named_modules():
        who = f"{type(model).__name__}.{name}".rstrip(".")
        if isinstance(module, torch.jit.ScriptModule):
            raise TraceError(
                f"{who} is a torch.jit.ScriptModule, whose weights are out of reach in C++; "
                "give the module that it was scripted or traced from"
            )
        wrappers = [*vars(module).values(), *module._forward_pre_hooks.values()]
        if any(getattr(type(wrapper), "is_offloading", False) is True for wrapper in wrappers):
            raise SettingsError(
                f"{who} is attached to an Executor, so it cannot be traced: "
                "detach the executor (or leave its `with` block) first"
            )


def _recording(
    model: nn.Module, storages: Storages, given: Any, entry: str, patterns: Sequence[str] | None
) -> Recording:
    """One recorded run on the caller's inputs, or on the model's own example if that works, or else a symbolic one."""

    def blocks_of(needs: Needs) -> list[str]:
        return choose_blocks(model, needs, storages.weights) if patterns is None else match_blocks(patterns, needs)

    with same_random_numbers(storages.device), torch.inference_mode(False), torch.no_grad():
        inputs = example_of(model, entry) if given is None else read_inputs(given)
        if inputs is not None:
            with nullcontext() if given is not None else suppress(TraceError):
                recorder, source = _run(model, storages, inputs, entry)
                _check_use(model, entry, recorder.segments)
                found = blocks_of(Needs.of(recorder.segments))
                if source == "real":
                    add_unseen(recorder.segments, found, storages.weights.values())
                return Recording(recorder.segments, recorder.lives, found, source)
        chosen = blocks_of(Needs.owned(model, storages.names_of))
        segments = symbolic_segments(model, storages, entry, chosen)
        _check_use(model, entry, segments)
        return Recording(segments, [], chosen, "symbolic")


def _check_use(model: nn.Module, entry: str, segments: Sequence[Segment]) -> None:
    if not any(segment.uses_weights for segment in segments):
        raise TraceError(
            f"{type(model).__name__}.{entry} was run, and nothing of the weights was read: is it a generator, or does "
            "it run in another thread? Give the method that does the work here and now, as in entry='forward'"
        )


def _run(model: nn.Module, storages: Storages, inputs: Inputs, entry: str) -> tuple[Recorder, Literal["fake", "real"]]:
    try:
        return _run_on_fakes(model, storages, inputs, entry), "fake"
    except Exception as error:
        if storages.device.type == "meta":
            raise (_no_data if _looks_at_data(error) else _failure)(model, entry, inputs, error) from error
        if not _looks_at_data(error) and not _came_from_an_operator(error):
            raise _failure(model, entry, inputs, error) from error
    try:
        return _run_for_real(model, storages, inputs, entry), "real"
    except OffloadError:
        raise
    except Exception as error:
        raise _failure(model, entry, inputs, error) from error


def _run_on_fakes(model: nn.Module, storages: Storages, inputs: Inputs, entry: str) -> Recorder:
    fakes = Fakes(storages)
    recorder = Recorder(fakes.weights_of, replace=fakes.of_weight_or_other)
    try:
        with _collector_paused(), untouched(model), _fakes_quiet(), fakes.take_the_place_of_weights(model):
            _record(model, entry, inputs, fakes.of_input, recorder, fakes.mode)
    finally:
        assert_none_left(model)
    return recorder


def _run_for_real(model: nn.Module, storages: Storages, inputs: Inputs, entry: str) -> Recorder:
    def own_copy(tensor: Tensor) -> Tensor:
        if tensor.device.type == "meta":
            raise TraceError(
                f"{type(model).__name__}.{entry} looks at data, but its inputs are on the meta device; give real ones"
            )
        return tensor if storages.names_of(tensor) else tensor.detach().to(storages.device, copy=True)

    backup = Backup(storages)
    recorder = Recorder(storages.names_of, before_write=backup.before_write)
    with untouched(model):
        try:
            _record(model, entry, inputs, own_copy, recorder, nullcontext())
        finally:
            backup.restore()
    return recorder


def _record(model: nn.Module, entry: str, inputs: Inputs, convert: Any, recorder: Recorder, mode: Any) -> None:
    held: list[Tensor] = []

    def converted(tensor: Tensor) -> Tensor:
        held.append(convert(tensor))
        return held[-1]

    given = inputs.converted(converted)
    for tensor in held:
        recorder.hold_input(tensor)
    with boundaries_reported(model, recorder), mode, recorder:
        output = (model if entry == "forward" else getattr(model, entry))(*given.args, **(given.kwargs or {}))
        recorder.show(tensors_in(output))
    recorder.stop()  # what is alive now, the output and the inputs among it, outlives the forward
    del output


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Storages end when the forward drops them, never when the garbage collector happens to come by."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextmanager
def _fakes_quiet() -> Iterator[None]:
    """Torch logs the traceback of each operator that refuses fakes; the error itself says it all."""
    logger = logging.getLogger(fake_tensor.__name__)
    was_disabled, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = was_disabled


def _came_from_an_operator(error: BaseException) -> bool:
    """Whether an operator refused: those on fakes are at times stricter than the real ones."""
    frames = traceback.extract_tb(error.__traceback__)
    return any(frame.filename == fake_tensor.__file__ for frame in frames)


def _looks_at_data(error: BaseException | None) -> bool:
    while error is not None:
        text = str(error).lower()
        if type(error).__name__ in NEEDS_REAL_DATA or any(phrase in text for phrase in SPEAKS_OF_DATA):
            return True
        error = error.__cause__ or error.__context__
    return False


def _failure(model: nn.Module, entry: str, inputs: Inputs, error: BaseException) -> TraceError:
    reason = f"{type(error).__name__}: {error}".strip()
    return TraceError(
        f"{type(model).__name__}.{entry}{inputs} failed, so it cannot be traced; give inputs= that it accepts. {reason}"
    )


def _no_data(model: nn.Module, entry: str, inputs: Inputs, error: BaseException) -> TraceError:
    return TraceError(
        f"{type(model).__name__}.{entry}{inputs} looks at data: it must run once for real, and its weights are on the "
        f"meta device. Load them on a device that can run it, and trace that. {type(error).__name__}: {error}"
    )
