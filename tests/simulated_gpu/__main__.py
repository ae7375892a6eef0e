"""Runs Python with torch's CUDA build on the simulated GPU: `python -m tests.simulated_gpu [--torch 2.11.0] ARGUMENTS`.

On a machine with a GPU, and no version of torch given, the same runs there. Examples:

    python -m tests.simulated_gpu -m pytest tests/devices/test_cuda.py
    python -m tests.simulated_gpu benchmarks/race.py
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from .build import TORCH, build

ROOT = Path(__file__).parents[2]


def main(arguments: list[str]) -> None:
    """Become that Python."""
    version = None
    if arguments[:1] == ["--torch"]:
        version, arguments = arguments[1], arguments[2:]
    if not arguments:
        sys.exit(__doc__)
    environment = {**os.environ, "PYTHONPATH": _joined(str(ROOT), os.environ.get("PYTHONPATH"))}
    if version or not _has_a_gpu():
        built = build(version or TORCH)
        environment |= {
            "SIMULATED_GPU": str(built.runtime),
            "LD_LIBRARY_PATH": _joined(str(built.libraries), os.environ.get("LD_LIBRARY_PATH")),
            "PYTHONPATH": _joined(str(built.site), environment["PYTHONPATH"]),
        }
    os.execve(sys.executable, [sys.executable, *arguments], environment)


def _has_a_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _joined(*paths: str | None) -> str:
    return os.pathsep.join(path for path in paths if path)


if __name__ == "__main__":
    main(sys.argv[1:])
