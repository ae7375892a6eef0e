"""Tests that need diffusers or transformers are skipped where these are missing, and nowhere else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ..conftest import MISSING, skipping_without_models

ROOT = Path(__file__).resolve().parents[2]
HIDING = "import sys; sys.modules.update(dict.fromkeys(sys.argv[1].split())); import pytest; pytest.main(sys.argv[2:])"
TESTS = "tests/capture/test_capture_models.py", "-k", "shared or fused_layer"


def outcome(error: str) -> type[BaseException]:
    """What becomes of a test that fails to import a module."""
    test = skipping_without_models()
    next(test)
    with pytest.raises(BaseException) as caught:  # noqa: PT011
        test.throw(ModuleNotFoundError(name=error))
    return caught.type


def test_no_test_is_skipped_for_a_library_that_is_installed() -> None:
    for library in {"diffusers", "transformers"} - set(MISSING):
        for module in (library, f"{library}.gone", "gone"):
            assert outcome(module) is ModuleNotFoundError, module


def test_tests_that_need_a_missing_library_are_skipped_with_the_reason() -> None:
    command = [sys.executable, "-c", HIDING, "diffusers transformers", *TESTS, "-rs", "-p", "no:cacheprovider"]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    assert "transformers is not installed: pip install 'taskgraph-offload[models]'" in said, said
    assert "1 passed, 1 skipped" in said, said
