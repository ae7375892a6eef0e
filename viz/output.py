"""Writes what was drawn: the format follows the suffix, a reader never sees half a file, no two runs differ."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Final

from matplotlib import rc_context
from matplotlib.figure import Figure

from taskgraph_offload.errors import SettingsError

PICTURES: Final = (".png", ".svg")
DOTS_PER_INCH: Final = 160
SALT: Final = "taskgraph-offload"  # of the names of an SVG's parts, which are random without one


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a figure as PNG or SVG, whichever the suffix says."""
    kind = suffix_of(path, PICTURES).removeprefix(".")
    without_date = {"Date": None} if kind == "svg" else {}
    with rc_context({"svg.hashsalt": SALT}):
        write(path, lambda half: figure.savefig(half, format=kind, dpi=DOTS_PER_INCH, metadata=without_date))


def suffix_of(path: str | os.PathLike[str], accepted: Collection[str]) -> str:
    """The suffix of a path, or `SettingsError` if it is none of the accepted ones.

    >>> suffix_of("out/Timeline.PNG", PICTURES)
    '.png'
    """
    suffix = Path(path).suffix.lower()
    if suffix not in accepted:
        raise SettingsError(f"cannot write {os.fspath(path)!r}: the name must end in {' or '.join(accepted)}")
    return suffix


def write(path: str | os.PathLike[str], fill: Callable[[Path], object]) -> None:
    """Have a file filled under another name beside its place, and then put there."""
    target = Path(path)
    if target.is_dir():
        raise SettingsError(f"cannot write {os.fspath(path)!r}: it is a folder; name a file in it")
    half = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        fill(half)
        half.replace(target)
    except OSError as error:
        raise SettingsError(f"cannot write {os.fspath(path)!r}: {error.strerror or error}") from error
    finally:
        if half.exists():
            half.unlink()
