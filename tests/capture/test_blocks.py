"""Where the forward is cut: which modules are blocks, and at which boundaries pieces begin."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from taskgraph_offload.planner.capture import capture
from torch import Tensor, nn

from taskgraph_offload.errors import SettingsError
from taskgraph_offload.nouns.trace import Trace

from .. import models
from ..models import Block, Net

X = torch.linspace(-1, 1, 12).reshape(3, 4)


def _blocks(model: nn.Module, x: Any = X, **options: Any) -> list[str | None]:
    return [call.block for call in capture(model, x, **options).calls if call.block is not None]


def _linears(count: int) -> list[nn.Module]:
    return [nn.Linear(4, 4) for _ in range(count)]


def test_items_of_lists_are_blocks_and_so_are_large_modules_beside_them() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(9, 4), nn.Linear(4, 9)
            self.stages = nn.ModuleDict({"a": Block(4, 4), "b": Block(4, 40)})
            self.tail = nn.Sequential(Block(4, 4), nn.ReLU(), Block(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.tail(self.stages["b"](self.stages["a"](self.embed(x)))))

    tokens = torch.zeros(3, dtype=torch.long)
    assert _blocks(Model(), tokens) == ["embed", "stages.a", "stages.b", "tail.0", "tail.2", "head"]


def test_stages_made_of_blocks_are_walked_into_and_small_ones_are_not() -> None:
    big = nn.Sequential(*[Block(4, 50) for _ in range(3)])
    small = nn.Sequential(*[Block(4, 2) for _ in range(3)])
    assert _blocks(nn.Sequential(small, big)) == ["0", "1.0", "1.1", "1.2"]


def test_transformer_blocks_stay_whole_however_few_there_are() -> None:
    model, inputs = models.flux()
    expected = [f"transformer_blocks.{i}" for i in range(2)] + [f"single_transformer_blocks.{i}" for i in range(3)]
    assert [block for block in _blocks(model, inputs) if block and "blocks" in block] == expected


def test_the_uneven_stages_of_a_unet_become_like_blocks() -> None:
    model, inputs = models.sdxl("meta", full=True)
    trace = capture(model, inputs)
    largest = max(sum(trace.weights[name].nbytes for name in call.reads) for call in trace.calls)
    assert largest < trace.weight_bytes / 20
    assert "down_blocks.0" in {call.block for call in trace.calls}


def test_a_layer_alone_is_one_block() -> None:
    trace = capture(nn.Linear(4, 4), X)
    assert [(call.name, call.block) for call in trace.calls] == [("model", "")]


def test_modules_called_by_forward_alone_are_read_between_blocks() -> None:
    class Sneaky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(_linears(2))

        def forward(self, x: Tensor) -> Tensor:
            return self.layers[1](self.layers[0].forward(x))

    trace = capture(Sneaky(), X)
    assert [call.block for call in trace.calls] == [None, "layers.1"]
    assert set(trace.fixed) == {"layers.0.weight", "layers.0.bias"}


def test_what_is_called_within_a_block_is_no_block() -> None:
    class Outer(nn.Module):
        def __init__(self, shared: nn.Module) -> None:
            super().__init__()
            self.mine, self.shared = nn.Linear(4, 4), shared

        def forward(self, x: Tensor) -> Tensor:
            return self.shared(self.mine(x))

    shared = nn.Linear(4, 4)
    assert _blocks(nn.Sequential(Outer(shared), Outer(shared))) == ["0", "1"]
    assert _blocks(nn.Sequential(shared, Outer(shared))) == ["1"]


def test_patterns_override_and_the_outer_match_wins() -> None:
    net = Net([Block(4, 8), Block(4, 8), Block(4, 8)], [0, 1, 2, 1])
    assert _blocks(net, blocks=["blocks.1"]) == ["blocks.1", "blocks.1"]
    assert _blocks(net, blocks=["blocks.*"]) == ["blocks.0", "blocks.1", "blocks.2", "blocks.1"]
    assert _blocks(net, blocks=["*.down", "blocks.0"]) == [
        "blocks.0",
        "blocks.1.down",
        "blocks.2.down",
        "blocks.1.down",
    ]
    fixed = capture(net, X, blocks=["blocks.[01]"]).fixed
    assert set(fixed.values()) == {"read between blocks"}
    assert {name for name in fixed if not name.startswith("blocks.2")} == set()


@pytest.mark.parametrize("inputs", [X, None])
def test_patterns_that_make_no_sense_are_refused(inputs: Tensor | None) -> None:
    net = Net([Block(4, 8)], [0])
    with pytest.raises(
        SettingsError, match=r"'layers\.\*' matches no module that the forward calls; it calls 'blocks.0'"
    ):
        capture(net, inputs, blocks=["blocks.*", "layers.*"])
    with pytest.raises(SettingsError, match=r"give a list of name patterns, as in blocks=\['blocks.0'\]"):
        capture(net, inputs, blocks="blocks.0")
    with pytest.raises(SettingsError, match="names no module"):
        capture(net, inputs, blocks=[])


def _boundaries_passed(model: nn.Module, inputs: dict[str, Any]) -> list[tuple[str, str, int]]:
    """What hooks see, as an executor would put them: before the module's own."""
    passed: list[tuple[str, str, int]] = []
    times: Counter[tuple[str, str]] = Counter()

    def note(name: str, side: str) -> None:
        passed.append((name, side, times[name, side]))
        times[name, side] += 1

    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(lambda *_, name=name: note(name, "enter"), prepend=True))
        handles.append(module.register_forward_hook(lambda *_, name=name: note(name, "exit"), prepend=True))
    with torch.no_grad():
        model(**inputs)
    for handle in handles:
        handle.remove()
    return passed


def _boundaries_traced(trace: Trace) -> list[tuple[str, str, int]]:
    pieces = [piece for call in trace.calls for piece in call.pieces]
    return [(p.boundary.module, p.boundary.side, p.boundary.occurrence) for p in pieces]


@pytest.mark.parametrize("make", [models.flux, models.sdxl, models.whisper, models.albert, models.t5, models.mixtral])
def test_hooks_pass_every_boundary_in_order(make: Any) -> None:
    model, inputs = make()
    passed = iter(_boundaries_passed(model, inputs))
    missing = [boundary for boundary in _boundaries_traced(capture(model, inputs)) if boundary not in passed]
    assert missing == []
