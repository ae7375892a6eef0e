"""Fixtures that run in every test."""

from __future__ import annotations

import importlib.util
from collections.abc import Generator

import hypothesis
import pytest

from taskgraph_offload.devices.cpu import HostMemory

# Hypothesis fails a test that draws its inputs slowly. On a busy machine every test may.
hypothesis.settings.register_profile(
    "any machine", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("any machine")


# The libraries of the extra `models` that are not installed.
MISSING = [name for name in ("diffusers", "transformers") if importlib.util.find_spec(name) is None]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup() -> Generator[None]:
    """Skip a test whose fixtures import a library that is not installed."""
    yield from skipping_without_models()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None]:
    """Skip a test that imports a library that is not installed."""
    yield from skipping_without_models()


def skipping_without_models() -> Generator[None]:
    """Turn the error of importing a missing library into a skip."""
    try:
        yield
    except ModuleNotFoundError as error:
        library = (error.name or "").partition(".")[0]
        if library not in MISSING:
            raise
        pytest.skip(f"{library} is not installed: pip install 'taskgraph-offload[models]'")


@pytest.fixture(autouse=True)
def no_operator_reads_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every device with host memory refuse an operator that reads a weight at home.

    On a GPU such an operator fails. Without this, the CPU runs it, and the test misses a gap in the plan.
    """
    monkeypatch.setattr(HostMemory, "refuses_home_reads", True)
