"""Fixtures that run in every test."""

from __future__ import annotations

import hypothesis
import pytest

from taskgraph_offload.devices.cpu import HostMemory

# Hypothesis fails a test that draws its inputs slowly. On a busy machine every test may.
hypothesis.settings.register_profile(
    "any machine", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("any machine")


@pytest.fixture(autouse=True)
def no_operator_reads_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every device with host memory refuse an operator that reads a weight at home.

    On a GPU such an operator fails. Without this, the CPU runs it, and the test misses a gap in the plan.
    """
    monkeypatch.setattr(HostMemory, "refuses_home_reads", True)
