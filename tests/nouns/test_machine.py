"""Machine: presets that make sense, refusals that say why, a measurement that disturbs nobody."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from taskgraph_offload.errors import SettingsError
from taskgraph_offload.nouns.machine import Machine

CARDS = ("rtx3060", "rtx4090", "rtx5090", "a100", "h100", "h200")
RATES = ("h2d_bytes_per_second", "d2h_bytes_per_second", "compute_flops", "memory_bytes_per_second")


def assert_ordered(slower: str, faster: str) -> None:
    for rate in RATES:
        assert getattr(Machine.preset(slower), rate) <= getattr(Machine.preset(faster), rate), rate


@pytest.mark.parametrize("name", [*CARDS, "cpu"])
def test_a_preset_has_its_name_and_rates_that_a_plan_file_gives_back(name: str) -> None:
    machine = Machine.preset(name)
    assert machine.name == name
    assert Machine.from_dict(machine.to_dict()) == machine
    assert all(type(value) is float for key, value in machine.to_dict().items() if key != "name")


@pytest.mark.parametrize(
    ("slower", "faster"), [("cpu", "rtx3060"), ("rtx3060", "rtx4090"), ("rtx4090", "rtx5090"), ("a100", "h100")]
)
def test_a_faster_card_is_nowhere_slower(slower: str, faster: str) -> None:
    assert_ordered(slower, faster)


def test_an_h200_is_an_h100_with_faster_memory() -> None:
    h100, h200 = Machine.preset("h100"), Machine.preset("h200")
    assert h200.memory_bytes_per_second > h100.memory_bytes_per_second
    assert replace(h200, name="h100", memory_bytes_per_second=h100.memory_bytes_per_second) == h100


@pytest.mark.parametrize("name", CARDS)
def test_a_cards_own_memory_is_faster_than_its_link(name: str) -> None:
    machine = Machine.preset(name)
    assert machine.memory_bytes_per_second > 10 * machine.h2d_bytes_per_second


@pytest.mark.parametrize("ask", [Machine.preset, Machine.of])
def test_an_unknown_preset_is_refused_with_the_names_that_are_known(ask: Callable[[str], Machine]) -> None:
    with pytest.raises(SettingsError, match="rtx9090") as caught:
        ask("rtx9090")
    assert all(name in str(caught.value) for name in (*CARDS, "cpu"))


def test_of_keeps_a_machine_and_refuses_what_is_none() -> None:
    machine = replace(Machine.preset("a100"), name="mine")
    assert Machine.of(machine) is machine
    with pytest.raises(SettingsError, match="42"):
        Machine.of(42)  # type: ignore[arg-type]


def test_none_is_the_cpu_preset_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert Machine.of(None) == Machine.preset("cpu")


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("value", [0, -1.0, math.inf, math.nan, "fast", None, True])
def test_a_rate_that_is_no_rate_is_refused_with_its_name_and_value(rate: str, value: Any) -> None:
    with pytest.raises(SettingsError, match=rate) as caught:
        replace(Machine.preset("cpu"), **{rate: value})
    assert repr(value) in str(caught.value)


def test_latency_may_be_zero_but_not_negative() -> None:
    assert replace(Machine.preset("cpu"), latency_seconds=0).latency_seconds == 0
    with pytest.raises(SettingsError, match="latency_seconds is -1e-05"):
        replace(Machine.preset("cpu"), latency_seconds=-1e-5)


def test_a_dict_with_a_key_too_few_or_too_many_is_refused() -> None:
    values = Machine.preset("cpu").to_dict()
    with pytest.raises(SettingsError, match="'speed' is unknown"):
        Machine.from_dict({**values, "speed": 1.0})
    del values["compute_flops"]
    with pytest.raises(SettingsError, match="'compute_flops' is missing"):
        Machine.from_dict(values)


def test_a_card_has_what_its_libraries_take_and_the_cpu_has_none() -> None:
    assert all(Machine.preset(name).library_bytes > 8 << 20 for name in CARDS)
    cpu = Machine.preset("cpu")
    assert cpu.library_bytes == 0
    assert "library_bytes" not in cpu.to_dict()
    assert Machine.from_dict({**cpu.to_dict(), "library_bytes": 5}) == replace(cpu, library_bytes=5)
    with pytest.raises(SettingsError, match="library_bytes is -1"):
        replace(cpu, library_bytes=-1)


def test_measuring_the_cpu_gives_plausible_rates_and_leaves_the_random_state() -> None:
    before = torch.get_rng_state()
    machine = Machine.measure("cpu")
    assert torch.equal(torch.get_rng_state(), before)
    # Wide on purpose: from a loaded two-core container to a large server.
    assert 1e8 < machine.h2d_bytes_per_second < 1e13
    assert 1e8 < machine.d2h_bytes_per_second < 1e13
    assert 1e8 < machine.memory_bytes_per_second < 1e13
    assert 1e8 < machine.compute_flops < 1e15
    assert 0 < machine.latency_seconds < 1e-2


@pytest.mark.parametrize("device", ["tpu-v9", "meta", 1.5])
def test_a_device_that_cannot_be_measured_is_refused_by_name(device: object) -> None:
    with pytest.raises(SettingsError, match=str(device)):
        Machine.measure(device)  # type: ignore[arg-type]


def test_measuring_a_card_that_is_not_there_names_the_presets() -> None:
    with pytest.raises(SettingsError, match=r"cuda:63.*rtx4090"):
        Machine.measure("cuda:63")


@pytest.mark.parametrize("integrated", [True, False, None])
def test_a_gpu_that_shares_its_memory_is_found(monkeypatch: pytest.MonkeyPatch, integrated: bool | None) -> None:
    properties = SimpleNamespace() if integrated is None else SimpleNamespace(is_integrated=integrated)
    for name, value in {"device_count": 1, "get_device_name": "Orin", "get_device_properties": properties}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    monkeypatch.setattr(
        "taskgraph_offload.runtime.rates._measure", lambda name, *_: replace(Machine.preset("cpu"), name=name)
    )
    machine = Machine.measure("cuda")
    assert machine.name.startswith("Orin (measured")
    assert machine.shares_memory == bool(integrated)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_measuring_cuda_gives_plausible_rates_and_returns_its_memory() -> None:
    torch.cuda.empty_cache()
    reserved = torch.cuda.memory_reserved()
    machine = Machine.measure("cuda")
    assert torch.cuda.memory_reserved() - reserved < 64 << 20  # cuBLAS keeps a workspace
    assert 1e8 < machine.h2d_bytes_per_second < machine.memory_bytes_per_second < 1e14
    assert 1e8 < machine.d2h_bytes_per_second < machine.memory_bytes_per_second
    assert 1e11 < machine.compute_flops < 1e16
    assert 0 < machine.latency_seconds < 1e-3
    assert Machine.of(None) is Machine.of(None)
