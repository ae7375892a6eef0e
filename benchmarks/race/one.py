"""Races, each in a process of its own: reads jobs as lines of JSON, and writes the result of each as one.

`benchmarks/race.py` starts it. A job runs in a fork of this process, which has imported what is slow to import, has
built the model, and has never met the device. It races for real on a real GPU; on the simulated one it sets rates, and
the clock is the card's, which skips the time that the host waits.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import signal
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import replace
from functools import lru_cache
from importlib import import_module
from itertools import pairwise
from typing import Any

import psutil
import torch

import taskgraph_offload as tgo
from taskgraph_offload.devices.cuda import library_bytes
from tests.simulated_gpu import card
from tests.simulated_gpu.compute import computing

from .models import Case, build, nbytes, on
from .racers import RACERS

LATENCY, LAUNCH = 10e-6, 5e-6  # seconds that a copy and a kernel take besides their work, as on a real card
GEMM_SHARE = 0.85  # of a resident step, as in a model of full size
COUNTED = ("h2d_bytes", "d2h_bytes", "pageable_bytes", "host_wait_seconds")  # by the simulated card
NOTHING = 1e18  # a rate so high that it costs no time
LIMIT = 600  # seconds that one job may take
Forward = Callable[..., Any]
Facts = dict[str, Any]

built = lru_cache(maxsize=1)(build)
now = card.now if card.is_here() else time.perf_counter


def main() -> None:
    """Do all jobs that come."""
    warnings.filterwarnings("ignore")
    torch.set_grad_enabled(False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # threads do not live on in a fork
    if card.is_here():
        torch.cuda._device_count_nvml = lambda: 1  # what a driver tells without beginning to work
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # some libraries print
    for line in sys.stdin:
        job = json.loads(line)
        if "size" in job:
            built(job["model"], job["size"])
        print(json.dumps(in_a_fork(job, threads)), file=results, flush=True)


def in_a_fork(job: Facts, threads: int) -> Facts:
    """Do a job in a process of its own. A job that fails gives its error."""
    with tempfile.TemporaryFile("w+") as answer:
        if not (child := os.fork()):
            torch.set_num_threads(threads)
            answer.write(json.dumps(done(job)))
            answer.flush()
            os._exit(0)  # threads of some libraries never end
        ends = time.monotonic() + LIMIT
        while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0):
            time.sleep(0.02)
            if time.monotonic() > ends:
                os.kill(child, signal.SIGKILL)
        answer.seek(0)
        text = answer.read()
    if text:
        found: Facts = json.loads(text)
        return found
    return {"error": f"ended with {os.waitstatus_to_exitcode(ended[1])} (-9: more than {LIMIT} s, or out of memory)"}


def done(job: Facts) -> Facts:
    """Do what the job says."""
    if card.is_here():
        torch.backends.cudnn.enabled = False  # its stand-in does nothing
        card.skip_waits()
    doing = {"weigh": weigh, "probe": probe, "race": race, "check": check}[job.pop("do")]
    try:
        with card.charged_attention() if card.is_here() and doing is not check else nullcontext():
            return doing(**job)
    except Exception as error:
        text = str(error).strip().splitlines() or [""]
        return {"error": f"{type(error).__name__}: {text[0]}"[:300]}


def weigh(model: str, size: float) -> Facts:
    """How large the model is."""
    return {"weights": built(model, size).nbytes}


def probe(model: str, size: float, wanted: float) -> Facts:
    """The resident model: its step and its memory. On a simulated card, find rates for the step that is wanted."""
    case = built(model, size)
    weights = case.nbytes
    case.model.cuda()
    inputs = on("cuda", case.inputs)
    rates = None
    if card.is_here():
        rates = _rates(case, inputs, wanted)
        card.set_rates(**rates)
    seconds, _, _ = _steps(case, case.model, inputs, 3)
    peak = torch.cuda.max_memory_allocated()
    return {
        "card": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "weights": weights,
        "activations": peak - weights,
        "smallest_block": min(map(nbytes, case.blocks)),
        "step": statistics.median(seconds),
        "rates": rates,
        "link": None if rates else tgo.Machine.measure("cuda").h2d_bytes_per_second,
    }


def _rates(case: Case, inputs: Facts, step: float) -> dict[str, float]:
    """Rates of compute and memory: matrix products take their share of a step, all other kernels the rest."""

    def busy(flops: float, memory: float) -> float:
        card.set_rates(flops=flops, memory=memory, launch=0)
        before = card.counts()
        _steps(case, case.model, inputs, 1)
        return card.counts().since(before).compute_seconds

    operations, nbytes = 1e12 * busy(1e12, NOTHING), 1e12 * busy(NOTHING, 1e12)
    flops, memory = operations / (GEMM_SHARE * step), nbytes / ((1 - GEMM_SHARE) * step)
    return {"flops": flops, "memory": memory, "link": NOTHING, "latency": LATENCY, "launch": LAUNCH}


def race(
    model: str, size: float, racer: str, knob: int, rates: dict[str, float] | None, first: int, steady: int
) -> Facts:
    """Attach a racer, run a first request of `first` steps, then `steady` steps more."""
    for name in RACERS[racer].packages:
        import_module(name)  # not a part of setting up
    case = built(model, size)
    inputs, weights = on("cuda", case.inputs), case.nbytes
    machine = None
    if rates is not None:
        card.set_rates(**rates)
        link = rates["link"]
        taken = library_bytes(torch.device("cuda", 0))
        machine = tgo.Machine(
            "the simulated card", link, link, rates["latency"], rates["flops"], rates["memory"], taken
        )
    _trim()
    before, start = _host_bytes(), now()
    attached = RACERS[racer].attach(replace(case, inputs=inputs), knob, machine)
    torch.cuda.synchronize()
    setup = now() - start
    start = now()
    cold, _, _ = _steps(case, attached.forward, inputs, first)
    request = now() - start
    seconds, calls, counts = _steps(case, attached.forward, inputs, steady)
    _trim()
    return {
        "setup": setup,
        "request": request,
        "cold": cold[0],
        "step": statistics.median(seconds),
        "steps": seconds,
        "call": statistics.median(calls),
        "peak": torch.cuda.max_memory_allocated(),
        "reserved": torch.cuda.max_memory_reserved(),
        "host": _host_bytes() - before + weights,
        "load": os.getloadavg()[0],
        **{name: count / steady for name, count in counts.items()},
        **attached.report(),
    }


def check(model: str, racer: str) -> Facts:
    """Compare the outputs of three steps with those of the resident model, with a small model whose operators compute.

    Each step begins from what the one before gave.
    """
    torch.set_num_threads(1)
    case = build(model, 0.06, 0.15, torch.float32)
    inputs = on("cuda", case.inputs)
    with _computing():
        wanted = _outputs(case, deepcopy(case.model).cuda(), inputs)
        knob = case.nbytes * 6 // 10 + (_small_activations() if RACERS[racer].knob_is_budget else 0)
        attached = RACERS[racer].attach(replace(case, inputs=inputs), knob, tgo.Machine.preset("rtx4090"))
        got = _outputs(case, attached.forward, inputs)
    differences = [float((one - other).abs().max()) for one, other in zip(got, wanted, strict=True)]
    equal = all(torch.equal(one, other) for one, other in zip(got, wanted, strict=True))
    return {"equal": equal, "difference": max(differences)}


def _computing() -> AbstractContextManager[None]:
    """Let the simulated card compute. A real one does so anyway."""
    if not card.is_here():
        return nullcontext()
    for kernels in (torch.backends.cuda.enable_flash_sdp, torch.backends.cuda.enable_mem_efficient_sdp):
        kernels(False)  # CPUs do not have these operators
    return computing()


def _small_activations() -> int:
    return 24 * 2**20


def _outputs(case: Case, forward: Forward, inputs: Facts) -> list[torch.Tensor]:
    outputs = []
    for _ in range(3):
        output, inputs = case.step(forward, inputs)
        outputs.append(output.cpu())
    return outputs


def _steps(
    case: Case, forward: Forward, inputs: Facts, count: int
) -> tuple[list[float], list[float], dict[str, float]]:
    """Run steps: the device's seconds of each, the host's seconds in each forward, and what the card counted."""
    moments = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    before, calls = _counts(), []
    moments[0].record()
    for moment in moments[1:]:
        start = now()
        _, inputs = case.step(forward, inputs)
        calls.append(now() - start)
        moment.record()
    counts = {name: count - before[name] for name, count in _counts().items()}  # without our own wait, which follows
    moments[-1].synchronize()  # the last output is there; copies for a next request may still be under way
    return [one.elapsed_time(other) / 1e3 for one, other in pairwise(moments)], calls, counts


def _counts() -> dict[str, float]:
    counts = card.counts() if card.is_here() else None
    return {name: getattr(counts, name) for name in COUNTED} if counts else {}


def _trim() -> None:
    """Give freed host memory back to the system, so that it is not counted."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)


def _host_bytes() -> int:
    """The host memory of this process. The memory of a simulated card is host memory too, and is left out."""
    return psutil.Process().memory_info().rss - (torch.cuda.memory_reserved() if card.is_here() else 0)


if __name__ == "__main__":
    main()
