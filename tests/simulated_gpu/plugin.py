"""For pytest on the simulated GPU: `-p tests.simulated_gpu.plugin`. On a real one, it does nothing."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from taskgraph_offload.devices import cuda

from . import card
from .compute import computing


def pytest_report_header() -> str:
    """Say which card it is."""
    if not torch.cuda.is_available():
        return "no GPU"
    name = torch.cuda.get_device_name() + (" (simulated)" if card.is_here() else "")
    return f"GPU: {name}, torch {torch.__version__}"


if card.is_here():
    torch.backends.cudnn.enabled = False  # its stand-in does nothing
    torch.backends.cuda.enable_flash_sdp(False)  # CPUs do not have these operators
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(call: pytest.CallInfo[None]) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Compute what a report of a failure prints."""
        with computing() if call.excinfo else nullcontext():
            return (yield)

    @pytest.fixture(autouse=True)
    def _computed() -> Iterator[None]:
        """Compute what the test does on the card, and begin with a card that behaves."""
        card.limit()
        card.set_rates()
        card.delays(0, 0)
        card.skip_waits()
        card.watch()
        with computing():
            yield
        races = card.races()
        card.watch(False)
        assert not races, "\n".join(races[:5])

    @pytest.fixture(autouse=True)
    def _named(monkeypatch: pytest.MonkeyPatch) -> None:
        """Let reports of races name the tasks of the plan."""
        copy, reached = cuda.CudaLane.copy, cuda.CudaDevice.reached

        def copy_named(self: Any, target: Any, source: Any, label: object) -> None:
            before = card.label(str(label))
            copy(self, target, source, label)
            card.label(before)

        def reached_named(self: Any, label: object, *args: Any) -> None:
            card.label(str(label))
            reached(self, label, *args)

        monkeypatch.setattr(cuda.CudaLane, "copy", copy_named)
        monkeypatch.setattr(cuda.CudaDevice, "reached", reached_named)
