"""Which versions of torch pass the suite: `python -m tests.simulated_gpu.versions [VERSION ...]`; a table of Markdown.

Each version's CUDA build runs the tests of capture, runtime and devices on the CPU, and those of the GPU on the
simulated card.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time

from .build import build

VERSIONS = [
    "2.6.0",
    "2.7.1",
    "2.8.0",
    "2.9.1",
    "2.10.0",
    "2.11.0",
    "2.12.1",
    "2.13.0",
    "2.14.1",
    "2.15.0",
]
ON_THE_CPU = [
    "--ignore-glob=*/test_cuda*",
    "tests/capture",
    "tests/runtime",
    "tests/devices",
    "tests/planner/test_planner.py",
]
ON_THE_GPU = ["tests/devices/test_cuda.py"]


def main(versions: list[str]) -> None:
    """Print a row for each version as soon as it is known."""
    print("| torch | CUDA | on the CPU | on the simulated GPU | what fails |")
    print("|---|---|---|---|---|")
    for version in versions or VERSIONS:
        build(version)
        cuda = _python(version, "-c", "import torch; print(torch.version.cuda)").stdout.strip()
        cpu, cpu_failed = _tested(version, ["-m", "not slow", *ON_THE_CPU], CUDA_VISIBLE_DEVICES="")
        gpu, gpu_failed = _tested(version, ["-p", "tests.simulated_gpu.plugin", *ON_THE_GPU], TEST_DEVICE="cuda")
        failed = sorted(cpu_failed | gpu_failed)
        shown = ", ".join(failed[:6]) + (f" and {len(failed) - 6} more" if len(failed) > 6 else "")
        print(f"| {version} | {cuda} | {cpu} | {gpu} | {shown} |", flush=True)


def _tested(version: str, arguments: list[str], **environment: str) -> tuple[str, set[str]]:
    """The last line of pytest in short, and the tests that failed."""
    began = time.monotonic()
    workers = os.environ.get("WORKERS", "2")
    usual = ["-m", "pytest", "-q", "-p", "no:cacheprovider", f"--numprocesses={workers}"]
    ran = _python(version, *usual, *arguments, **environment)
    found = re.findall(r"(\d+) (passed|failed|skipped|errors?)", ran.stdout.strip().rpartition("\n")[2])
    if not found:
        return "did not run", {ran.stdout[-300:] + ran.stderr[-300:]}
    counted = ", ".join(f"{number} {what}" for number, what in found)
    failed = set(re.findall(r"^(?:FAILED|ERROR) \S*/(\S+)", ran.stdout, re.MULTILINE))
    return f"{counted} ({time.monotonic() - began:.0f} s)", failed


def _python(version: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.simulated_gpu", "--torch", version, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})


if __name__ == "__main__":
    main(sys.argv[1:])
