"""Tracing leaves no stand-in and no change behind, wherever a model keeps what it keeps."""

from __future__ import annotations

import gc
from collections.abc import Iterator, MutableMapping
from types import CodeType, FrameType, FunctionType, ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from taskgraph_offload.planner.capture import capture
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from taskgraph_offload.errors import TraceError
from taskgraph_offload.nouns.trace import INPUT

from .. import models

X = torch.linspace(-1, 1, 12).reshape(3, 4)


def fakes_below(model: nn.Module) -> int:
    """How many fake tensors the garbage collector can reach from a model."""
    waiting, seen, found = [model], dict[int, Any](), 0
    while waiting:
        thing = waiting.pop()
        if id(thing) in seen or isinstance(thing, type | ModuleType | CodeType | FrameType):
            continue
        seen[id(thing)] = thing
        found += isinstance(thing, FakeTensor)
        world = thing.__globals__ if isinstance(thing, FunctionType) else None
        waiting += [below for below in gc.get_referents(thing) if below is not world]
    return found


class Slotted:
    __slots__ = ("__frozen", "keys", "spare")

    def __init__(self) -> None:
        self.keys: Any = None
        self.__frozen = [X]

    def push(self, y: Tensor) -> None:
        self.keys = self.spare = y
        self.__frozen.append(y)


class Hoarder(nn.Module):
    """Keeps what it computes in every kind of place."""

    shared: dict[str, Any] = {}  # noqa: RUF012 (a mistake that models make)

    def __init__(self, looks: bool) -> None:
        super().__init__()
        self.layer, self.looks = nn.Linear(4, 4), looks
        from transformers import DynamicCache

        self.cache, self.slotted = DynamicCache(), Slotted()
        self.deep: dict[str, Any] = {"a": {"b": {"c": {"d": {"e": {"f": []}}}}}}
        self.count, self.things = np.zeros(3), np.array([None, None], dtype=object)
        self.hidden = [nn.Linear(2, 2)]
        self.shared.clear()
        self.draws, self.mark = torch.Generator().manual_seed(3), torch.zeros(2)
        seen: list[Tensor] = []
        self.layer.register_forward_hook(lambda module, args, out: seen.append(out))

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x) + torch.rand(4, generator=self.draws)
        self.cache.update(y.reshape(1, 1, 3, 4), y.reshape(1, 1, 3, 4), 0)
        self.slotted.push(y)
        self.deep["a"]["b"]["c"]["d"]["e"]["f"].append(y)
        self.count[1:] += 1
        self.things[0] = self.shared["y"] = self.hidden[0].kept = self.mark.kept = y  # type: ignore[attr-defined]
        self.mark[0] = 7
        return y * 2 if self.looks and y.sum().item() > 1e9 else y


@pytest.mark.parametrize("looks", [False, True])
def test_nothing_of_a_trace_is_left_anywhere_below_the_model(looks: bool) -> None:
    model = Hoarder(looks)
    state = model.draws.get_state()
    assert capture(model, X).source == ("real" if looks else "fake")
    assert fakes_below(model) == 0
    assert model.cache.get_seq_length() == 0
    assert model.slotted.keys is None
    assert not hasattr(model.slotted, "spare")
    assert not model.deep["a"]["b"]["c"]["d"]["e"]["f"]
    assert model.count.tolist() == [0, 0, 0]
    assert model.mark.tolist() == [0, 0]
    assert model.things.tolist() == [None, None]
    assert not model.shared
    assert not hasattr(model.hidden[0], "kept")
    assert torch.equal(model.draws.get_state(), state)
    model(X)


def test_a_filled_cache_of_a_module_stays_filled() -> None:
    model: Any = Hoarder(looks=False)
    model(X)
    keys = model.cache.layers[0].keys
    capture(model, X)
    assert model.cache.layers[0].keys is keys


def test_a_tensor_written_through_a_view_was_there_before_the_forward() -> None:
    trace = capture(Hoarder(looks=False), X)
    mark = next(a for a in trace.activations if a.nbytes == torch.zeros(2).nbytes)
    assert mark.producer == INPUT


def test_the_very_parameters_are_put_back_whatever_the_forward_does_to_them() -> None:
    class Rearranges(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.scale = nn.Linear(4, 4), nn.Parameter(torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            y = self.layer(x) * self.scale
            self.register_buffer("last", y)
            self.scale = nn.Parameter(y)
            self._parameters = dict(self._parameters)
            return y

    model = Rearranges()
    before = {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
    capture(model, X)
    assert {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()} == before


FAR_AWAY: dict[str, Any] = {}


class Lossy(MutableMapping[str, Any]):
    """A table of parameters far from the model, which gives up no stand-in that it holds."""

    def __getitem__(self, name: str) -> Any:
        return FAR_AWAY[name]

    def __setitem__(self, name: str, value: Any) -> None:
        if not isinstance(FAR_AWAY.get(name), FakeTensor):
            FAR_AWAY[name] = value

    def __delitem__(self, name: str) -> None:
        del FAR_AWAY[name]

    def __iter__(self) -> Iterator[str]:
        return iter(list(FAR_AWAY))

    def __len__(self) -> int:
        return len(FAR_AWAY)


def test_a_weight_that_cannot_be_put_back_is_no_secret() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    model[0]._parameters = Lossy()  # type: ignore[assignment]
    FAR_AWAY["weight"] = nn.Parameter(torch.ones(4, 4))
    FAR_AWAY["bias"] = None
    with pytest.raises(TraceError, match=r"'0\.weight' of Sequential is kept where it cannot be put back"):
        capture(model, X)
    FAR_AWAY.clear()


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_generator_that_is_handed_in_gives_the_same_numbers_later(device: str) -> None:
    model, _ = models.vae()
    generator, sample = torch.Generator().manual_seed(5), torch.zeros(1, 3, 16, 16)
    state = generator.get_state()
    given = {"sample": sample, "sample_posterior": True, "generator": generator}
    trace = capture(model.to(device), given)
    assert trace.source == "fake"
    assert len(trace.readers) == len(trace.weights)
    assert torch.equal(generator.get_state(), state)
