"""Refuses, before the work, files that could not be written after it. Writes none."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path

from ..errors import SettingsError

PICTURES = (".png", ".svg")
SUFFIXES: Mapping[str, tuple[str, ...]] = {"timeline": PICTURES, "picture": PICTURES, "trace": (".json",)}
WRITTEN = ("save", *SUFFIXES)
READ = ("settings", "config")


def check_files(arguments: Namespace) -> None:
    """Every file that is asked for has a place of its own, in a folder that there is, and a name of its kind."""
    taken: dict[Path, str] = {}
    for name in (*READ, *WRITTEN):
        if (given := getattr(arguments, name, None)) is None:
            continue
        path = Path(given)
        if name in WRITTEN:
            _check_place(name, path)
        if (other := taken.setdefault(path.resolve(), name)) != name:
            raise SettingsError(f"--{other} and --{name} name one file, {path}; give each a file of its own")


def _check_place(name: str, path: Path) -> None:
    if path.is_dir():
        raise SettingsError(f"--{name} {path}: this is a folder; name a file in it")
    if not path.absolute().parent.is_dir():
        raise SettingsError(f"--{name} {path}: there is no folder {path.parent}; make it, or name another")
    accepted = SUFFIXES.get(name)
    if accepted and path.suffix.lower() not in accepted:
        raise SettingsError(f"--{name} {path}: the name must end in {' or '.join(accepted)}")
