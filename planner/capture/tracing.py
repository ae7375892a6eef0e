"""Turn a model and its inputs into a trace: run its forward once on tensors without data.

No weight is read and nothing is computed, unless the forward looks at data: then it runs once for real. Either way,
the model, the random number generators and torch end as they began.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from taskgraph_offload.errors import OffloadError, TraceError
from taskgraph_offload.nouns.trace import Boundary, Trace

from .blocks import Usage, add_unread, always_resident, choose_blocks, fold, lasting, match_blocks
from .failures import check_model, check_patterns, failure, may_succeed_for_real
from .inputs import Inputs, example_of, read_inputs
from .recorder import ROOT, Lifetime, Record, Recorder, boundaries_reported, tensors_in
from .untouched import (
    collector_paused,
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
    model: nn.Module, inputs: Any = None, *, entry: str = "forward", blocks: Sequence[str] | None = None
) -> Trace:
    """Trace one forward of a model.

    `inputs` is a tuple (positional), a dict (keywords), `(args, kwargs)` (a tuple or list and a dict), a tensor, or a
    function that returns one of these. Without it, the model's own `dummy_inputs` are tried, then a symbolic trace.
    `entry` names the method to trace. `blocks` is a list of name patterns of the modules that are blocks; see
    `choose_blocks` for the default.

    >>> trace = capture(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), torch.zeros(1, 8))
    >>> [(call.name, call.reads) for call in trace.calls]
    [('0', ('0.weight', '0.bias')), ('0:after', ()), ('2', ('2.weight', '2.bias'))]
    """
    check_model(model, entry)
    if blocks is not None:
        check_patterns(blocks)
    where = WeightMap(model)
    recording = _recording(model, where, inputs, entry, blocks)
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


def _recording(model: nn.Module, where: WeightMap, given: Any, entry: str, patterns: Sequence[str] | None) -> Recording:
    """Record a run on the caller's inputs, or on the model's own example if that works, or else a symbolic one."""

    def blocks_of(usage: Usage) -> list[str]:
        return choose_blocks(model, usage, where.weights) if patterns is None else match_blocks(patterns, usage)

    with same_random_numbers(where.device), torch.inference_mode(False), torch.no_grad():
        inputs = example_of(model, entry) if given is None else read_inputs(given)
        if inputs is not None:
            with nullcontext() if given is not None else suppress(TraceError):
                recorder, source = _run(model, where, inputs, entry)
                _check_use(model, entry, recorder.records)
                blocks = blocks_of(Usage.of(recorder.records))
                if source == "real":
                    add_unread(recorder.records, blocks, where.weights.values())
                return Recording(recorder.records, recorder.lifetimes, blocks, source)
        blocks = blocks_of(Usage.guessed(model, where.names_of))
        records = _symbolic_records(model, where, entry, blocks)
        _check_use(model, entry, records)
        return Recording(records, [], blocks, "symbolic")


def _check_use(model: nn.Module, entry: str, records: Sequence[Record]) -> None:
    if not any(record.uses_weights for record in records):
        raise TraceError(
            f"{type(model).__name__}.{entry} was run, and read no weight: is it a generator, or does it run in another "
            "thread? Give the method that does the work when it is called, as in entry='forward'"
        )


def _run(model: nn.Module, where: WeightMap, inputs: Inputs, entry: str) -> tuple[Recorder, Literal["fake", "real"]]:
    """Run on fakes, or for real if the fakes are the reason why that fails and the weights are there."""
    try:
        return _run_on_fakes(model, where, inputs, entry), "fake"
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


def _run_on_fakes(model: nn.Module, where: WeightMap, inputs: Inputs, entry: str) -> Recorder:
    fakes = Fakes(where)
    recorder = Recorder(fakes.weights_of, replace=fakes.of_arguments)
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


def _symbolic_records(model: nn.Module, where: WeightMap, entry: str, blocks: Sequence[str]) -> list[Record]:
    """Records without inputs: torch.fx gives the order of the blocks; each reads all its weights. Costs are guesses."""
    return [Record(ROOT), *_records_of_graph(model, _graph(model, entry, blocks), where)]


class _Tracer(fx.Tracer):
    """Follows a method of the model, and does not look into blocks."""

    def __init__(self, entry: str, blocks: set[str]) -> None:
        super().__init__()
        self.traced_func_name, self.blocks = entry, blocks

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name in self.blocks or super().is_leaf_module(m, module_qualified_name)


def _graph(model: nn.Module, entry: str, blocks: Sequence[str]) -> fx.Graph:
    try:
        return _Tracer(entry, set(blocks)).trace(model)
    except Exception as error:
        which = "" if entry == "forward" else f", entry={entry!r}"
        reason = (str(error).strip() or "no reason given").splitlines()[0][:200]
        raise TraceError(
            f"{type(model).__name__}.{entry} has no inputs to be traced with: give those of one run, as in "
            f"Planner(model, ..., inputs={{'x': torch.zeros(2, 16, device='meta')}}{which}), a dict by name or a tuple "
            f"by position. Without them: {type(error).__name__}: {reason}"
        ) from error


def _records_of_graph(model: nn.Module, graph: fx.Graph, where: WeightMap) -> Iterator[Record]:
    times: Counter[str] = Counter()
    modules = dict(model.named_modules())
    for node in graph.nodes:
        if node.op == "call_module":
            module, occurrence = modules[node.target], times[node.target]
            times[node.target] += 1
            tensors = [*module.parameters(), *module.buffers()]
            yield _record_of(Boundary(node.target, "enter", occurrence), tensors, where)
            yield Record(Boundary(node.target, "exit", occurrence))
        elif node.op == "get_attr":
            owner, _, attribute = node.target.rpartition(".")
            yield _record_of(Boundary(owner, "exit"), [getattr(modules[owner], attribute)], where)


def _record_of(boundary: Boundary, tensors: Sequence[Tensor], where: WeightMap) -> Record:
    reads = dict.fromkeys(name for tensor in tensors for name in where.names_of(tensor))
    return Record(boundary, reads, flop_bytes=sum(where.weights[name].nbytes for name in reads))
