"""A trace needs inputs: the caller's in any form, the model's own example, or a guess without any."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from taskgraph_offload.planner.capture import capture
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


def test_args_and_kwargs_come_together() -> None:
    net = Net([Block(4, 8)], [0])
    forms: list[Any] = [((X,), {}), ([X], {}), ((), {"x": X}), lambda: ((), {"x": X})]
    assert {capture(net, form).fingerprint for form in forms} == {capture(net, X).fingerprint}

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor, options: dict[str, Tensor]) -> Tensor:
            return self.layer(x) * options["scale"]

    assert capture(Scaled(), (X, {"scale": X})).source == "fake"  # a tensor and a dict: two positional arguments


DTYPES = [
    (lambda: nn.Sequential(nn.Linear(4, 4)), X.double(), "float64", "float32"),
    (lambda: nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4)), X.double(), "float64", "float32"),
    (lambda: nn.Sequential(nn.Conv1d(3, 3, 1)).to(torch.bfloat16), X, "float32", "bfloat16"),
]


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(("make", "x", "given", "wanted"), DTYPES)
def test_inputs_of_a_dtype_that_the_model_refuses_are_refused(
    make: Any, x: Tensor, given: str, wanted: str, device: str
) -> None:
    with pytest.raises(RuntimeError, match=r"dtype|data ?type|type"):
        make()(x)
    with pytest.raises(TraceError, match=rf"inputs are {given}, its weights {wanted}.*x\.to\(torch\.{wanted}\)"):
        capture(make().to(device), x)


def test_inputs_of_a_dtype_that_the_model_takes_are_traced() -> None:
    norm = nn.Sequential(nn.LayerNorm(4))
    assert norm(X.bfloat16()).dtype == torch.bfloat16
    assert capture(norm, X.bfloat16()).source == "fake"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert capture(nn.Sequential(nn.Linear(4, 4)), X).source == "fake"


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
