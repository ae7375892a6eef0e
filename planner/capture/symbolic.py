"""A recording without inputs: torch.fx gives the order of the blocks; costs are guesses from bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from torch import Tensor, fx, nn

from taskgraph_offload.errors import TraceError
from taskgraph_offload.nouns.trace import Boundary

from .recorder import ROOT, Segment
from .storages import Storages


def symbolic_segments(model: nn.Module, storages: Storages, entry: str, blocks: Sequence[str]) -> list[Segment]:
    """What the forward would show if each block read all that it owns, once, and did nothing else."""
    return [Segment(ROOT), *_segments(model, _graph(model, entry, blocks), storages)]


class _Tracer(fx.Tracer):
    """Follows a method of the model, and takes blocks as they are."""

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
        raise TraceError(
            f"{type(model).__name__}.{entry} has no inputs to be traced with: give those of one run, as in "
            f"Planner(model, ..., inputs={{'x': torch.zeros(2, 16, device='meta')}}{which}), a dict by name or a tuple "
            f"by position. Without them: {type(error).__name__}: {_first_line(error)}"
        ) from error


def _segments(model: nn.Module, graph: fx.Graph, storages: Storages) -> Iterator[Segment]:
    times: Counter[str] = Counter()
    modules = dict(model.named_modules())
    for node in graph.nodes:
        if node.op == "call_module":
            module, occurrence = modules[node.target], times[node.target]
            times[node.target] += 1
            tensors = [*module.parameters(), *module.buffers()]
            yield _segment(Boundary(node.target, "enter", occurrence), tensors, storages)
            yield Segment(Boundary(node.target, "exit", occurrence))
        elif node.op == "get_attr":
            owner, _, attribute = node.target.rpartition(".")
            yield _segment(Boundary(owner, "exit"), [getattr(modules[owner], attribute)], storages)


def _segment(boundary: Boundary, tensors: Sequence[Tensor], storages: Storages) -> Segment:
    reads = dict.fromkeys(name for tensor in tensors for name in storages.names_of(tensor))
    return Segment(boundary, reads, flop_bytes=sum(storages.weights[name].nbytes for name in reads))


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or "no reason given").splitlines()[0][:200]
