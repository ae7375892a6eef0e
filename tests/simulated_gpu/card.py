"""The simulated card: what it counted, and how it shall behave. Only in a Python that `__main__` started."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cache
from typing import Any

OUT_OF_MEMORY, LAUNCH_FAILURE = 2, 719  # codes of CUDA's errors
GIB = 1 << 30


@dataclass(frozen=True)
class Counts:
    """What the card has done since the process began, in the order of `card::Counts`."""

    h2d_copies: float
    h2d_bytes: float
    d2h_copies: float
    d2h_bytes: float
    pageable_copies: float
    pageable_bytes: float
    kernels: float
    products: float
    flops: float
    host_waits: float
    host_wait_seconds: float
    locked_bytes: float  # now
    allocated_bytes: float  # now
    compute_seconds: float
    h2d_seconds: float
    d2h_seconds: float
    delays: float
    delay_seconds: float

    def since(self, before: Counts) -> Counts:
        """What was added."""
        return Counts(*(getattr(self, f.name) - getattr(before, f.name) for f in fields(self)))


class Range(ctypes.Structure):
    """Bytes that a work reads or writes."""

    _fields_ = (("address", ctypes.c_void_p), ("nbytes", ctypes.c_size_t), ("writes", ctypes.c_bool))


CALL = ctypes.CFUNCTYPE(None, ctypes.c_long)


@cache
def library() -> Any:
    """The stand-in for CUDA's runtime."""
    if not is_here():
        raise RuntimeError("no simulated GPU in this process; run it with: python -m tests.simulated_gpu ...")
    loaded = ctypes.CDLL(os.environ["SIMULATED_GPU"])
    number, pointer, size, text = ctypes.c_double, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p
    for name, result, *arguments in (
        ("counts", None, pointer),
        ("rates", None, *[number] * 7),
        ("limits", None, size, size),
        ("unlock_all", None),
        ("delays", None, ctypes.c_uint64, number),
        ("skip_waits", None, ctypes.c_int),
        ("now", number),
        ("empty_queues", None, ctypes.c_int),
        ("label", None, text),
        ("failure", None, text, ctypes.c_long, ctypes.c_int),
        ("uses", ctypes.c_long, text),
        ("watch", None, ctypes.c_int),
        ("races", size, text, size),
        ("work", None, pointer, CALL, ctypes.c_long, text, pointer, size),
        ("cost", None, pointer, number, number),
    ):
        function = getattr(loaded, f"simulated_{name}")
        function.restype, function.argtypes = result, arguments
    return loaded


def is_here() -> bool:
    """Whether this process runs on the simulated card."""
    return "SIMULATED_GPU" in os.environ


def counts() -> Counts:
    """What the card has counted so far."""
    values = (ctypes.c_double * len(fields(Counts)))()
    library().simulated_counts(values)
    return Counts(*values)


def set_rates(
    flops: float = 0,
    memory: float = 0,
    link: float = 0,
    pageable: float | None = None,
    latency: float = 10e-6,
    launch: float = 5e-6,
    lock: float = 0,
) -> None:
    """Operations and bytes a second; `lock`: of page locking. 0: as fast as the host goes. Pageable: half the link."""
    paced = flops or link
    library().simulated_rates(
        flops,
        memory,
        link,
        link / 2 if pageable is None else pageable,
        latency if paced else 0,
        launch if paced else 0,
        lock,
    )


def limit(memory: int = 8 * GIB, locked: int = 2**63) -> None:
    """How much memory the card has, and how much of the host's can be locked."""
    library().simulated_limits(memory, locked)


def unlock_all() -> None:
    """Unlock all pages that anybody has locked in his own memory."""
    library().simulated_unlock_all()


def fail(function: str, nth: int, code: int = OUT_OF_MEMORY) -> None:
    """Let the nth next use of a function of CUDA's runtime fail. 0: none."""
    library().simulated_failure(function.encode(), nth, code)


def uses(function: str) -> int:
    """How often a function of CUDA's runtime was called."""
    return int(library().simulated_uses(function.encode()))


def delays(seed: int, longest: float) -> None:
    """Let one work in four be late, by up to so many seconds. The same seed delays the same works. 0 ends it."""
    library().simulated_delays(seed, longest)


def skip_waits(skips: bool = True) -> None:
    """Let the clock jump where the host waits for the card, and no thread of the process works: time passes sooner.

    What depends on the wall clock (`time.sleep`, a wait with a timeout) does not see that.
    """
    library().simulated_skip_waits(skips)


def now() -> float:
    """Seconds by the clock of the card, which the host's calls go by, too: what has passed, and what was skipped."""
    return float(library().simulated_now())


def empty_queues(empty: bool) -> None:
    """Drop all work that is given to streams: what is left is the host's cost."""
    library().simulated_empty_queues(empty)


_labels = threading.local()


def label(text: str) -> str:
    """Say what the calling thread does, for reports of races; gives what it said before."""
    before: str = getattr(_labels, "text", "")
    _labels.text = text
    library().simulated_label(text.encode())
    return before


def watch(on: bool = True) -> None:
    """Look for races from now on, or no longer. What was found is forgotten."""
    library().simulated_watch(on)


def races() -> list[str]:
    """The races found since `watch`: bytes that two tasks touch, one of them writing, in no order."""
    room = library().simulated_races(None, 0)
    text = ctypes.create_string_buffer(room)
    library().simulated_races(text, room)
    return text.value.decode().splitlines()


def cost(flops: float, nbytes: float) -> None:
    """Charge the current stream with a kernel."""
    import torch

    library().simulated_cost(torch.cuda.current_stream().cuda_stream, flops, nbytes)


@contextmanager
def charged_attention() -> Iterator[None]:
    """Charge attention with its products: torch's own kernels for it are no products of cuBLAS."""
    import torch
    from torch.nn import functional

    plain = functional.scaled_dot_product_attention

    def charged(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if query.is_cuda:
            rows, width = query.numel() // query.shape[-1], query.shape[-1]
            cost(2 * rows * key.shape[-2] * (width + value.shape[-1]), query.nbytes * 2 + key.nbytes + value.nbytes)
        return plain(query, key, value, *args, **kwargs)

    functional.scaled_dot_product_attention = charged
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = plain
