"""The examples in docstrings run, of every module under its installed name."""

from __future__ import annotations

import doctest
import importlib

import pytest

from .test_house import FILES


@pytest.mark.parametrize("name", [name for name in FILES if not name.endswith("__main__")])
def test_examples_in_docstrings(name: str) -> None:
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    assert doctest.testmod(importlib.import_module(name), optionflags=flags).failed == 0
