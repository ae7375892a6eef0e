"""One file per strategy. A file here is a strategy: nothing lists them.

A strategy's module has one function, `schedule(problem, **options) -> Schedule`, whose keyword-only parameters are its
options, annotated with what they accept. It orders computes and copies and picks who stays; it writes no offsets, and
never an edge.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from typing import Any

from taskgraph_offload.errors import SettingsError, shown

from ..options import accepts, in_words, options_of
from ..schedule import Schedule

Strategy = Callable[..., Schedule]


def names() -> tuple[str, ...]:
    """The strategies that there are.

    >>> "layerwise" in names()
    True
    """
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_")))


def find(name: str) -> Strategy:
    """A strategy by its name."""
    if name not in names():
        raise SettingsError(f"unknown strategy {shown(name)}; there are {', '.join(names())}")
    strategy: Strategy = importlib.import_module(f"{__name__}.{name}").schedule
    return strategy


def check_options(name: str, options: Mapping[str, Any]) -> None:
    """Raise `SettingsError` for an option that the strategy does not have, or that does not accept its value."""
    known = options_of(find(name))
    for option, value in options.items():
        if option not in known:
            has = f"it has {', '.join(known)}" if known else "it has none"
            raise SettingsError(f"strategy {name!r} has no option {shown(option)}; {has}")
        if not accepts(known[option], value):
            raise SettingsError(f"option {option!r} of {name} is {in_words(known[option])}, not {shown(value)}")
