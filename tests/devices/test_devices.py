"""Devices as the executor uses them: lanes that copy in order, wait for one another, and keep time."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

import taskgraph_offload as tgo
from taskgraph_offload.devices import open_device
from taskgraph_offload.devices.checked import CheckedDevice
from taskgraph_offload.devices.cpu import CpuDevice, HostMemory
from taskgraph_offload.devices.virtual import VirtualDevice
from taskgraph_offload.runtime.copies import Lanes

from ..running import case, known_plan

MEGABYTE = 1 << 20


@pytest.fixture
def device() -> Iterator[CpuDevice]:
    opened = CpuDevice()
    yield opened
    opened.close()


class Clock:
    """Takes the place of `time`: who sleeps moves it on. With a barrier, whoever sleeps waits for the others there."""

    def __init__(self, barrier: threading.Barrier | None = None) -> None:
        self.now, self.barrier = 0.0, barrier

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        if self.barrier is not None:
            self.barrier.wait(timeout=60)
        self.now += seconds


def test_a_gpu_that_does_not_start_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def init() -> None:
        raise RuntimeError("CUDA driver initialization failed, you might not have a CUDA gpu.\nmore")

    monkeypatch.setattr(torch.cuda, "init", init)
    for is_available in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda is_available=is_available: is_available)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        with pytest.raises(tgo.SettingsError, match=r"driver initialization failed.*gpu\.; device='cpu'"):
            open_device("cuda")


def test_a_process_that_was_forked_from_one_with_cuda_is_told_to_spawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: True)
    for use in (open_device, tgo.Machine.measure):
        with pytest.raises(tgo.SettingsError, match=r"get_context\('spawn'\)"):
            use("cuda")


def test_a_plan_that_leaves_no_room_for_the_devices_libraries_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HostMemory, "library_bytes", MEGABYTE)
    made, plan = case("chain"), known_plan("chain")
    with (
        pytest.warns(UserWarning, match=rf"take 1\.0 MiB on this GPU.*margin='{MEGABYTE}B'"),
        tgo.Executor(made.model, plan, device="cpu") as run,
        torch.no_grad(),
    ):
        made()
    assert run.stats.peak_bytes == plan.peak_bytes + MEGABYTE
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with tgo.Executor(made.model, replace(plan, budget_bytes=plan.peak_bytes + MEGABYTE), device="cpu"):
            pass


@pytest.mark.parametrize("copies", [1, 5])
def test_a_paced_link_takes_as_long_as_its_rate_says(monkeypatch: pytest.MonkeyPatch, copies: int) -> None:
    monkeypatch.setattr("taskgraph_offload.devices.cpu.time", Clock())
    device = CpuDevice(link_bytes_per_second=100 * MEGABYTE)
    source, target = torch.zeros(MEGABYTE, dtype=torch.uint8), device.allocate(MEGABYTE)
    begin, end = device.event(), device.event()
    device.lanes["h2d"].record(begin)
    for _ in range(copies):
        device.lanes["h2d"].copy(target, source, "a copy")
    device.lanes["h2d"].record(end)
    end.synchronize()
    assert end.seconds_since(begin) == pytest.approx(0.01 * copies)
    device.close()


def test_both_directions_and_the_caller_go_on_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """All three meet in the middle: no copy ends before the other one and the caller are there."""
    meeting = threading.Barrier(3)
    monkeypatch.setattr("taskgraph_offload.devices.cpu.time", Clock(meeting))
    device = CpuDevice(link_bytes_per_second=100 * MEGABYTE)
    memory, other = device.allocate(MEGABYTE), device.allocate(MEGABYTE)
    for lane in ("h2d", "d2h"):
        device.lanes[lane].copy(memory, other, "a copy")
    meeting.wait(timeout=60)
    device.synchronize()
    device.close()


def test_a_lane_waits_for_the_latest_moment_that_was_recorded_when_it_was_told(device: CpuDevice) -> None:
    here, there, back = device.allocate(1), device.allocate(1), torch.zeros(1, dtype=torch.uint8)
    event, done = device.event(), device.event()
    for value in range(20):
        back.fill_(value)
        device.lanes["h2d"].copy(here, back, "in")
        device.lanes["h2d"].record(event)
        device.lanes["d2h"].wait(event)
        device.lanes["d2h"].copy(there, here, "out")
        device.lanes["d2h"].record(done)
        device.lanes["compute"].wait(done)
        assert int(there) == value


def test_a_wait_for_an_event_that_was_never_recorded_is_no_wait(device: CpuDevice) -> None:
    device.lanes["compute"].wait(device.event())
    device.lanes["h2d"].wait(device.event())
    device.synchronize()


def test_closing_ends_the_threads() -> None:
    before = threading.active_count()
    device = CpuDevice()
    assert threading.active_count() == before + 2
    device.close()
    assert threading.active_count() == before


def test_windows_share_bytes_and_have_a_storage_of_their_own(device: CpuDevice) -> None:
    memory = device.allocate(2048)
    window = device.window(memory, 512, 100)
    window.fill_(3)
    assert memory[511:513].tolist() == [0, 3]
    assert (window.untyped_storage().nbytes(), window.data_ptr() % 512) == (100, 0)


@pytest.mark.parametrize("opened", [CpuDevice, CheckedDevice, VirtualDevice])
def test_a_task_that_has_left_the_ring_is_waited_for_by_a_later_one(opened: type) -> None:
    device = opened()
    lanes = Lanes(device, {"compute": 3, "h2d": 3, "d2h": 3})
    memory, home = device.allocate(1), torch.zeros(1, dtype=torch.uint8)
    lanes.wait("h2d", "compute", lanes.mark("compute"))
    for value in range(8):
        lanes.start("h2d")
        device.lanes["h2d"].copy(memory, torch.full_like(home, value), f"copy {value}")
        lanes.stop("h2d")
    assert lanes.moments("h2d", 2) is None
    lanes.wait("compute", "h2d", 1)
    assert int(memory) >= 5
    assert lanes.start("compute") == (("h2d", 6),)
    lanes.stop("compute")
    lanes.wait("compute", "h2d", 4)
    assert lanes.start("compute") == ()  # who has waited for 6 has waited for 4
    lanes.synchronize()
    device.close()


def test_devices_are_opened_by_name() -> None:
    assert isinstance(open_device("checked:7"), CheckedDevice)
    assert isinstance(open_device("virtual"), VirtualDevice)
    for name in ("cpu", "cpu:0", torch.device("cpu", 0)):
        opened = open_device(name, link_bytes_per_second=1e9)
        assert isinstance(opened, CpuDevice)
        opened.close()


@pytest.mark.parametrize(
    ("name", "rate", "message"),
    [
        ("tpu", None, "no such device: 'tpu'"),
        ("cuda:x", None, "no such device: 'cuda:x'"),
        ("cpu:1", None, "no such device: 'cpu:1'"),
        ("virtual:1", None, "no such device: 'virtual:1'"),
        ("virtual", 1e9, "link_bytes_per_second=1000000000.0 with device 'virtual'"),
        ("checked", 1e9, "link_bytes_per_second=1000000000.0 with device 'checked'"),
        ("cpu", 0, "link_bytes_per_second=0"),
    ],
)
def test_a_device_that_makes_no_sense_is_refused(name: str, rate: float | None, message: str) -> None:
    with pytest.raises(tgo.SettingsError, match=message):
        open_device(name, rate)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_cuda_is_refused_with_what_to_do() -> None:
    with pytest.raises(tgo.SettingsError, match="device='cpu' runs every plan anywhere"):
        open_device("cuda")
