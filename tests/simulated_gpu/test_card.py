"""The simulated card itself: what it does in other tests must be true of a card."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from . import card

pytestmark = pytest.mark.skipif(not card.is_here(), reason="no simulated GPU in this process")

MIB = 1 << 20

PLACES: dict[str, Callable[[Tensor], Tensor]] = {
    "pageable": lambda tensor: tensor,
    "locked": lambda tensor: tensor.pin_memory(),
    "device": lambda tensor: tensor.cuda(),
}
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {  # views of 6 x 8 x 4 x 2 values; all have as many
    "whole": lambda whole: whole[:3, :4],
    "turned": lambda whole: whole[:4, :3].transpose(0, 1),
    "with gaps": lambda whole: whole[::2, ::2],
    "repeated": lambda whole: whole[:3, :1].expand(3, 4, 4, 2),
    "channels last": lambda whole: whole[:4, :4, :3].permute(2, 0, 1, 3).contiguous(memory_format=torch.channels_last),
    "later": lambda whole: whole[3:, 4:],
}
DTYPES = [(torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.int64, torch.float32)]
DTYPES += [(torch.bool, torch.uint8), (torch.complex64, torch.complex64), (torch.float16, torch.float64)]


def values(dtype: torch.dtype) -> Tensor:
    return (torch.arange(6 * 8 * 4 * 2) % 251 - 125).reshape(6, 8, 4, 2).to(dtype)


@pytest.mark.parametrize("inference", [True, False])
@pytest.mark.parametrize("waits", [True, False])
@pytest.mark.parametrize(("source", "target"), list(itertools.product(PLACES, PLACES)))
def test_a_copy_brings_the_values_in_every_layout_and_type(
    source: str, target: str, waits: bool, inference: bool
) -> None:
    targets = ["whole", "turned", "with gaps", "later"]
    with torch.inference_mode(inference):
        for (given, wanted), one, other in itertools.product(DTYPES, LAYOUTS, targets):
            here = torch.zeros(6, 8, 4, 2, dtype=wanted)
            LAYOUTS[other](here).copy_(LAYOUTS[one](values(given)))
            there = PLACES[target](torch.zeros(6, 8, 4, 2, dtype=wanted))
            LAYOUTS[other](there).copy_(LAYOUTS[one](PLACES[source](values(given))), non_blocking=not waits)
            torch.cuda.synchronize()
            assert torch.equal(there.cpu(), here), (given, wanted, one, other)


@pytest.mark.parametrize("place", ["pageable", "locked"])
def test_only_a_copy_of_locked_memory_lets_the_host_go_on(place: str) -> None:
    host, device = PLACES[place](torch.zeros(1000)), torch.empty(1000, device="cuda")
    for copy in (lambda: device.copy_(host, non_blocking=True), lambda: host.copy_(device, non_blocking=True)):
        torch.cuda.synchronize()
        before = card.counts()
        copy()
        done = card.counts().since(before)
        assert (done.host_waits, done.pageable_copies) == ((0, 0) if place == "locked" else (1, 1))


def test_memory_and_locks_have_a_limit() -> None:
    torch.cuda.empty_cache()
    now = card.counts()
    card.limit(memory=int(now.allocated_bytes) + 64 * MIB, locked=int(now.locked_bytes) + 8 * MIB)
    assert torch.empty(16 * MIB, dtype=torch.uint8, device="cuda").is_cuda
    with pytest.raises(torch.cuda.OutOfMemoryError, match="CUDA out of memory"):
        torch.empty(128 * MIB, dtype=torch.uint8, device="cuda")
    with pytest.raises(RuntimeError, match="out of memory"):
        torch.empty(32 * MIB, dtype=torch.uint8, pin_memory=True)
    home = torch.empty(16 * MIB, dtype=torch.uint8)
    assert int(torch.cuda.cudart().cudaHostRegister(home.data_ptr(), home.nbytes, 0)) == card.OUT_OF_MEMORY
    with pytest.raises(RuntimeError, match="out of memory"):
        torch.ones(1, device="cuda")  # CUDA keeps the error, and torch finds it behind its next kernel
    card.limit()
    assert int(torch.cuda.cudart().cudaHostRegister(home.data_ptr(), home.nbytes, 0)) == 0
    assert int(torch.cuda.cudart().cudaHostUnregister(home.data_ptr())) == 0


def test_memory_comes_as_no_number() -> None:
    torch.cuda.empty_cache()
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        assert torch.empty(8 * MIB, dtype=dtype, device="cuda").isnan().all()
        torch.cuda.empty_cache()


def test_the_nth_call_fails() -> None:
    host, device = torch.ones(8).pin_memory(), torch.zeros(8, device="cuda")
    card.fail("cudaMemcpyAsync", 2, card.LAUNCH_FAILURE)
    device.copy_(host, non_blocking=True)
    with pytest.raises(RuntimeError, match="CUDA error"):
        device.copy_(host, non_blocking=True)
    device.copy_(host, non_blocking=True)
    assert device.sum().item() == 8


def delayed(seed: int) -> tuple[float, Any]:
    x = torch.ones(8, device="cuda")
    torch.cuda.synchronize()
    before = card.counts()
    card.delays(seed, longest=1e-4)
    for _ in range(64):
        x += 1
    torch.cuda.synchronize()
    card.delays(0, 0)
    done = card.counts().since(before)
    return done.delays, round(done.delay_seconds, 9)


def test_the_same_seed_gives_the_same_delays() -> None:
    found = [delayed(seed) for seed in (1, 2, 1, 2)]
    assert found[:2] == found[2:]
    assert found[0] != found[1]
    assert all(8 <= number <= 24 for number, _ in found)


@pytest.fixture
def watched() -> Iterator[Tensor]:
    """Memory of the card, while races are looked for; what is found is not held against the test."""
    memory = torch.zeros(64, device="cuda")
    torch.cuda.synchronize()
    card.watch()
    yield memory
    torch.cuda.synchronize()
    card.watch()


def reads(memory: Tensor) -> None:
    memory.sum()


def writes(memory: Tensor) -> None:
    memory.fill_(1)


BETWEEN: dict[str, Callable[[Any, Any], object]] = {
    "an event": lambda first, second: second.wait_event(first.record_event()),
    "a wait for the stream": lambda first, second: second.wait_stream(first),
    "a synchronisation of all": lambda first, second: torch.cuda.synchronize(),
    "one of the stream": lambda first, second: first.synchronize(),
    "one of an event": lambda first, second: first.record_event().synchronize(),
}
PAIRS = [(writes, reads), (reads, writes), (writes, writes)]


def run_both(
    first: Callable[[Tensor], object], second: Callable[[Tensor], object], memory: Tensor, between: Any
) -> None:
    streams = torch.cuda.Stream(), torch.cuda.Stream()
    with torch.cuda.stream(streams[0]):
        first(memory[:40])
    between(*streams)
    with torch.cuda.stream(streams[1]):
        second(memory[30:])


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_a_race_between_two_streams_is_found(watched: Tensor, first: Any, second: Any) -> None:
    run_both(first, second, watched, between=lambda *_: None)
    wanted = f"] {second.__name__} bytes that [", f"] {first.__name__}, and waits for no event behind it"
    assert any(all(part in race for part in wanted) for race in card.races())


@pytest.mark.parametrize("between", BETWEEN)
@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_what_is_ordered_is_no_race(watched: Tensor, first: Any, second: Any, between: str) -> None:
    run_both(first, second, watched, BETWEEN[between])
    assert card.races() == []


def test_reads_and_other_bytes_are_no_race(watched: Tensor) -> None:
    run_both(reads, reads, watched, between=lambda *_: None)
    torch.cuda.synchronize()
    run_both(lambda memory: writes(memory[:30]), lambda memory: writes(memory[10:]), watched, lambda *_: None)
    assert card.races() == []


def test_an_event_of_before_orders_nothing(watched: Tensor) -> None:
    streams = torch.cuda.Stream(), torch.cuda.Stream()
    early = streams[0].record_event()
    run_both(writes, reads, watched, between=lambda _, second: second.wait_event(early))
    assert card.races()


def test_a_copy_races_too(watched: Tensor) -> None:
    host = torch.ones(64).pin_memory()
    run_both(lambda memory: memory.copy_(host[:40], non_blocking=True), reads, watched, lambda *_: None)
    assert "(h2d copy)" in card.races()[0]


FLOPS, MEMORY, LINK, PAGEABLE, LATENCY, LAUNCH = 1e11, 1e10, 1e8, 3e7, 1e-3, 2e-3


@pytest.fixture(params=[True, False], ids=["skipping waits", "in real time"])
def paced(request: pytest.FixtureRequest) -> None:
    card.skip_waits(request.param)
    torch.ones(2, 2, device="cuda") @ torch.ones(2, 2, device="cuda")  # cuBLAS begins
    torch.cuda.synchronize()
    card.set_rates(FLOPS, MEMORY, LINK, PAGEABLE, LATENCY, LAUNCH)
    card.watch(False)  # the same bytes are copied twice at once


def seconds_of(*works: Callable[[], object]) -> float:
    """What the works take on the card's clock, each in a stream of its own. They queue behind two seconds of others."""
    for work in works:
        work()  # what is slow the first time is slow here
    torch.cuda.synchronize()
    start, ends = torch.cuda.Event(enable_timing=True), [torch.cuda.Event(enable_timing=True) for _ in works]
    card.cost(2 * FLOPS, 0)
    start.record()
    for work, end in zip(works, ends, strict=True):
        stream = torch.cuda.Stream()
        stream.wait_event(start)
        with torch.cuda.stream(stream):
            work()
            end.record()
    torch.cuda.synchronize()
    return max(start.elapsed_time(end) for end in ends) / 1e3


@pytest.mark.usefixtures("paced")
def test_a_product_takes_what_the_roofline_says() -> None:
    size = 500
    square, thin, out = (torch.ones(size, n, device="cuda") for n in (size, 1, size))
    products = seconds_of(lambda: torch.mm(square, square, out=out))
    assert products == pytest.approx(LAUNCH + 2 * size**3 / FLOPS, rel=1e-3)
    column = torch.ones(size, 1, device="cuda")
    moved = seconds_of(lambda: torch.mm(square, thin, out=column))
    assert moved == pytest.approx(LAUNCH + 4 * (size * size + 2 * size) / MEMORY, rel=1e-3)


@pytest.mark.usefixtures("paced")
def test_a_copy_takes_what_the_link_allows() -> None:
    host, other, device = torch.ones(MIB).pin_memory(), torch.ones(MIB).pin_memory(), torch.zeros(2, MIB, device="cuda")
    here, back = device[0], device[1]
    alone = LATENCY + 4 * MIB / LINK

    def there() -> object:
        return here.copy_(host, non_blocking=True)

    assert seconds_of(there) == pytest.approx(alone, rel=1e-3)
    assert seconds_of(there, there) == pytest.approx(2 * alone, rel=1e-3)
    assert seconds_of(there, lambda: other.copy_(back, non_blocking=True)) == pytest.approx(alone, rel=1e-3)
    before = card.counts()
    here.copy_(torch.ones(MIB))
    assert card.counts().since(before).h2d_seconds == pytest.approx(LATENCY + 4 * MIB / PAGEABLE, rel=1e-6)


@pytest.mark.usefixtures("paced")
def test_a_copy_and_a_product_run_at_the_same_time() -> None:
    host, device, square = torch.ones(MIB).pin_memory(), torch.zeros(MIB, device="cuda"), torch.ones(900, 900).cuda()
    copy, product = LATENCY + 4 * MIB / LINK, LAUNCH + 2 * 900**3 / FLOPS
    out = torch.empty_like(square)
    both = seconds_of(lambda: device.copy_(host, non_blocking=True), lambda: torch.mm(square, square, out=out))
    assert both == pytest.approx(max(copy, product), rel=1e-3)


def test_the_clock_skips_what_the_host_waits_for() -> None:
    card.set_rates(FLOPS, MEMORY, LINK)
    start, before = card.now(), card.counts()
    day = 24 * 3600.0
    card.cost(day * FLOPS, 0)
    torch.cuda.synchronize()
    assert card.now() - start >= day
    assert card.counts().since(before).host_wait_seconds == pytest.approx(day, rel=1e-3)


WORK: dict[str, Callable[[Tensor, Any], object]] = {
    "Python": lambda memory, stream: None,
    "kernels": lambda memory, stream: memory.add_(1),
    "events": lambda memory, stream: torch.cuda.Event().record(stream),
    "questions": lambda memory, stream: stream.query(),
}


@pytest.mark.parametrize("work", WORK)
def test_the_clock_skips_nothing_while_another_thread_of_the_host_works(work: str) -> None:
    memory, streams = torch.zeros(8, device="cuda"), (torch.cuda.Stream(), torch.cuda.Stream())
    torch.cuda.synchronize()
    card.watch(False)
    card.set_rates(FLOPS, MEMORY, LINK)
    with torch.cuda.stream(streams[0]):
        card.cost(3600 * FLOPS, 0)
    seen: list[float] = []

    def working() -> None:
        began = time.monotonic()
        with torch.cuda.stream(streams[1]):
            while time.monotonic() - began < 0.3:
                WORK[work](memory, streams[1])
                seen.append(card.now())

    thread = threading.Thread(target=working)
    start = card.now()
    thread.start()
    streams[0].synchronize()
    thread.join()
    assert len(seen) > 1
    assert seen[-1] - start < 3600 <= card.now() - start
