"""What cannot be traced is refused in words, before anything is touched."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from taskgraph_offload.planner.capture import capture
from torch import Tensor, nn

import taskgraph_offload as tgo
from taskgraph_offload.errors import SettingsError, TraceError
from taskgraph_offload.nouns.trace import Coverage

X = torch.linspace(-1, 1, 12).reshape(3, 4)


def _layers() -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(4, 4) for _ in range(6)))


def test_an_attached_model_is_refused_and_runs_on() -> None:
    model = _layers()
    whole, expected = nn.ModuleDict({"part": model}), model(X)
    plan = tgo.Planner(model, "70%", inputs=X, machine="cpu").plan()
    with tgo.Executor(model, plan, device="cpu"):
        with pytest.raises(SettingsError, match=r"Sequential is attached to an Executor.*detach the executor"):
            capture(model, X)
        with pytest.raises(SettingsError, match=r"ModuleDict\.part is attached"):
            capture(whole, X)
        assert torch.equal(model(X), expected)
    assert capture(model, X).source == "fake"


def test_a_hook_that_offloads_is_seen_too() -> None:
    class Hook:
        is_offloading = True

        def __call__(self, *_: Any) -> None:
            """Would fetch the weights."""

    model = _layers()
    model[3].register_forward_pre_hook(Hook())
    with pytest.raises(SettingsError, match=r"Sequential\.3 is attached"):
        capture(model, X)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_scripted_module_is_refused_and_runs_on() -> None:
    layer = nn.Linear(4, 4)
    expected = layer(X)
    for scripted in (torch.jit.script(layer), torch.jit.trace(layer, X)):
        model = nn.Sequential(nn.Linear(4, 4), scripted)
        with pytest.raises(TraceError, match=r"Sequential\.1 is a torch\.jit\.ScriptModule.*scripted or traced from"):
            capture(model, X)
        assert torch.equal(scripted(X), expected)


class Later(nn.Module):
    """Its forward does nothing yet."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Iterator[Tensor]:
        yield self.layer(x)


class Elsewhere(Later):
    """Its forward works in another thread."""

    def forward(self, x: Tensor) -> Any:
        thread = threading.Thread(target=super().forward(x).__next__)
        thread.start()
        thread.join()
        return x


@pytest.mark.parametrize("model", [Later(), Elsewhere()])
def test_a_forward_that_reads_no_weight_is_refused(model: nn.Module) -> None:
    with pytest.raises(TraceError, match=r"read no weight: is it a generator, or .* another thread"):
        capture(model, X)


def test_where_nothing_is_read_nothing_streams() -> None:
    assert Coverage(total_bytes=8, fixed_bytes=0, unread_bytes=8, reasons={}).share == 0
    assert Coverage(total_bytes=0, fixed_bytes=0, unread_bytes=0, reasons={}).share == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"blocks": 5}, r"blocks=5: give a list of name patterns"),
        ({"blocks": [3]}, r"blocks= holds 3; give name patterns only"),
        ({"entry": 3}, r"entry=3: Sequential has no such method"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        capture(_layers(), X, **arguments)


def test_inputs_that_cannot_be_made_say_why() -> None:
    with pytest.raises(SettingsError, match="a function that failed: ZeroDivisionError: division by zero") as caught:
        capture(_layers(), lambda: 1 / 0)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


class Raises(nn.Module):
    """Its forward fails in its own way."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.layer, self.error = nn.Linear(4, 4), error

    def forward(self, x: Tensor) -> Tensor:
        raise self.error


@pytest.mark.parametrize(
    ("model", "inputs", "blames_inputs"),
    [
        (_layers(), torch.zeros(3, 5), True),
        (_layers(), {"y": X}, True),
        (Raises(ValueError("give one of a and b")), X, True),
        (Raises(RuntimeError("the key of the licence is missing")), X, False),
        (Raises(NotImplementedError("not on this machine")), X, False),
    ],
)
def test_the_inputs_are_blamed_only_where_they_may_be_the_cause(
    model: nn.Module, inputs: Any, blames_inputs: bool
) -> None:
    with pytest.raises(TraceError) as caught:
        capture(model, inputs)
    assert ("Give inputs= that it accepts" in str(caught.value)) is blames_inputs
    assert ("own code raised this error" in str(caught.value)) is not blames_inputs


def test_a_text_is_no_model() -> None:
    with pytest.raises(SettingsError, match=r"'bert-base' is a text, not a model.*from_pretrained\('bert-base'\)"):
        tgo.Planner("bert-base", 1, inputs=X).plan()  # type: ignore[arg-type]


class Branches(nn.Module):
    """Reads one of two weights."""

    def __init__(self, looks: bool = False) -> None:
        super().__init__()
        self.one, self.other, self.looks, self.takes_other = nn.Linear(4, 4), nn.Linear(4, 6), looks, False
        self.register_buffer("spare", torch.ones(5))

    def forward(self, x: Tensor) -> Tensor:
        y = self.other(x) if self.takes_other else self.one(x)
        return y * 2 if self.looks and y.sum().item() > 1e9 else y


@pytest.mark.parametrize(
    ("looks", "inputs", "source"), [(False, X, "fake"), (True, X, "real"), (False, None, "symbolic")]
)
def test_weights_that_the_forward_did_not_read_are_part_of_the_trace(looks: bool, inputs: Any, source: str) -> None:
    model = Branches(looks)
    trace = capture(model, inputs)
    assert trace.source == source
    assert {name: weight.nbytes for name, weight in trace.weights.items()} == {
        name: tensor.nbytes for name, tensor in model.state_dict().items()
    }
    unread = ["other.weight", "other.bias", "spare"]
    assert [name for name in trace.weights if name not in trace.readers] == unread
    assert f"not read by the traced forward: {4 * (24 + 6 + 5)} bytes" in str(trace.coverage())
    explained = tgo.Planner(model, 1, inputs=inputs, machine="cpu").plan().explain()
    assert "not read    140 B (64% of the weights), not planned: other.weight, other.bias, spare\n" in explained
