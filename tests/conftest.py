"""What holds in every test."""

from __future__ import annotations

import pytest

from taskgraph_offload.devices.cpu import HostMemory


@pytest.fixture(autouse=True)
def no_operator_reads_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """No operator of a forward under a plan reads a weight at home, on any device whose memory is the host's.

    On a GPU such an operator fails. The CPU would do it silently, and hide a hole in the plan.
    """
    monkeypatch.setattr(HostMemory, "refuses_home_reads", True)
