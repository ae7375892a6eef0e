"""Records of a model without inputs: torch.fx gives the order of its blocks, and costs are guesses. Runs nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from torch import Tensor, fx, nn

from taskgraph_offload.errors import TraceError
from taskgraph_offload.nouns.trace import Boundary

from .recorder import ROOT, Record
from .weights import WeightMap


def symbolic_records(model: nn.Module, where: WeightMap, entry: str, blocks: Sequence[str]) -> list[Record]:
    """One record for each block that runs, in order, which reads all weights of the block."""
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
