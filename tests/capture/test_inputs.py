"""A trace needs inputs: the caller's in any form, the model's own example, or a guess without any."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from taskgraph_offload.planner.capture.capture import capture
from torch import Tensor, nn

from taskgraph_offload.errors import SettingsError, TraceError

from ..models import Block, Net

X = torch.linspace(-1, 1, 12).reshape(3, 4)


def test_inputs_come_in_any_form() -> None:
    net = Net([Block(4, 8)], [0])
    forms: list[Any] = [X, (X,), [X], {"x": X}, lambda: X, lambda: {"x": X}, X.to("meta"), X.expand(3, 4)]
    assert len({capture(net, form).fingerprint for form in forms}) == 1
    with pytest.raises(SettingsError, match="a tuple"):
        capture(net, 3)


def test_without_inputs_the_models_own_example_is_used_then_a_symbolic_trace() -> None:
    net: Any = Net([Block(4, 8), Block(4, 2)], [0, 1, 0], scaled=True)
    symbolic = capture(net)
    assert symbolic.source == "symbolic"
    assert [call.name for call in symbolic.calls if call.block] == ["blocks.0", "blocks.1", "blocks.0#2"]
    assert symbolic.fixed == {"scale": "read between blocks"}
    assert symbolic.calls[1].moved_bytes == sum(p.nbytes for p in [*net.blocks[0].parameters(), net.blocks[0].calls])
    net.dummy_inputs = {"x": X}
    assert capture(net).fingerprint == capture(net, X).fingerprint
    net.dummy_inputs = {"wrong": X}
    assert capture(net).source == "symbolic"
    with pytest.raises(TraceError, match=r"Planner\(model, \.\.\., inputs="):
        capture(Choosy())


def test_a_number_that_is_handed_in_may_be_looked_at() -> None:
    class Steps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor, steps: Tensor) -> Tensor:
            while steps > 0:
                x = self.layer(x)
                steps.sub_(1)
            return x

    steps = torch.tensor(3)
    trace = capture(Steps().to("meta"), (X, steps))
    assert int(steps) == 3
    assert [call.name for call in trace.calls if call.block] == ["layer", "layer#2", "layer#3"]


class Choosy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if x.sum() > 0 else x
