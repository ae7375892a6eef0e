"""Gets torch's CUDA build and makes the stand-ins for NVIDIA's libraries, once, in a cache outside of the repository.

Nothing of NVIDIA's is downloaded but the headers of CUDA's runtime (about 2 MB). The cache is `SIMULATED_GPU_CACHE`, or
`~/.cache/taskgraph-offload/simulated-gpu`: a folder for each version of torch, 1.1 GB each.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

from . import stubs

TORCH = "2.11.0"  # what `make test-gpu` runs


@dataclass(frozen=True)
class Built:
    """Where things are."""

    site: Path  # torch
    libraries: Path  # the stand-ins

    @property
    def runtime(self) -> Path:
        """The stand-in for CUDA's runtime, which is the simulated card."""
        return next(self.libraries.glob("libcudart.so.*[0-9]"))


def build(version: str = TORCH) -> Built:
    """Make what is missing, and say where everything is."""
    cache = Path(os.environ.get("SIMULATED_GPU_CACHE") or Path.home() / ".cache/taskgraph-offload/simulated-gpu")
    folder = cache / f"torch-{version}-py{sys.version_info[0]}{sys.version_info[1]}"
    sources = [*sorted(stubs.RUNTIME.iterdir()), Path(stubs.__file__)]
    state = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:12]
    built = Built(folder / "site", folder / f"libraries-{state}")
    if not built.site.exists():
        _say(f"getting torch {version}, built for CUDA, without NVIDIA's packages")
        _unpack(f"torch=={version}", built.site)
        if not (built.site / "torch/lib/libtorch_cuda.so").exists():
            shutil.rmtree(folder)
            raise SystemExit(
                f"pip gave a build of torch {version} without CUDA: its configuration (PIP_FIND_LINKS, an index) "
                "prefers another build. Set PIP_CONFIG_FILE=/dev/null and PIP_FIND_LINKS= , or give another --torch"
            )
    if not (folder / "headers").exists():
        _unpack(_headers_of(built.site), folder / "headers")
    if not built.libraries.exists():
        _say("making stand-ins for NVIDIA's libraries")
        for old in folder.glob("libraries-*"):
            if time.time() - old.stat().st_mtime > 24 * 3600:  # another clone may use younger ones
                shutil.rmtree(old, ignore_errors=True)
        (header,) = (folder / "headers").rglob("cuda_runtime_api.h")
        making = Path(tempfile.mkdtemp(dir=folder))
        stubs.build(stubs.wanted(built.site / "torch"), header.parent, making)
        _move(making, built.libraries)
    return built


def _headers_of(site: Path) -> str:
    """The package with the headers of CUDA's runtime that this torch was built with."""
    (metadata,) = site.glob("torch-*.dist-info/METADATA")
    text = metadata.read_text()
    if found := re.search(r"(nvidia-cuda-runtime-cu12)\W*==\s*([\d.]+)", text):
        return f"{found[1]}=={found[2]}"
    found = re.search(r"cuda-toolkit\S*==(\d+\.\d+)", text)
    assert found, "this torch says nothing of the CUDA runtime that it wants"
    return f"nvidia-cuda-runtime=={found[1]}.*"


def _unpack(requirement: str, folder: Path) -> None:
    """Download one wheel, without what it requires, and unpack it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as passing:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        subprocess.run([*pip, "--dest", passing, requirement], check=True)
        (wheel,) = Path(passing).glob("*.whl")
        with zipfile.ZipFile(wheel) as packed:
            packed.extractall(Path(passing) / "unpacked")
        _move(Path(passing) / "unpacked", folder)


def _move(made: Path, to: Path) -> None:
    """Put a finished folder in its place. Another process may have been first."""
    try:
        made.rename(to)
    except OSError:
        shutil.rmtree(made)


def _say(what: str) -> None:
    print(f"simulated GPU: {what}", file=sys.stderr, flush=True)
