"""The device that counts time: each lane has a clock, and copies are real."""

from __future__ import annotations

import pytest
import torch

import taskgraph_offload as tgo
from taskgraph_offload.devices.virtual import VirtualDevice
from taskgraph_offload.nouns.graph import Lane

from ..running import assert_equal, case, known_plan

MACHINE = tgo.Machine("slow", 1000.0, 500.0, 0.5, 1e12, 1e12)  # 1000 bytes in 1.5 s, or back in 2.5 s


def time_of(device: VirtualDevice, lane: Lane) -> float:
    event = device.event()
    device.lanes[lane].record(event)
    return event.seconds_since(device.event())


def test_a_copy_takes_the_latency_and_its_bytes_at_the_rate_of_its_direction() -> None:
    device = VirtualDevice(MACHINE)
    memory, home = device.allocate(1000), torch.full((1000,), 3, dtype=torch.uint8)
    device.lanes["h2d"].copy(memory, home, "in")
    assert memory.eq(3).all()
    device.lanes["d2h"].copy(home[:500], memory[500:], "out")
    assert [time_of(device, lane) for lane in ("compute", "h2d", "d2h")] == [0, 1.5, 1.5]


def test_a_lane_that_waits_goes_on_to_the_moment_of_the_event_and_never_back() -> None:
    device = VirtualDevice(MACHINE)
    memory, arrived = device.allocate(1000), device.event()
    device.lanes["h2d"].copy(memory, torch.zeros_like(memory), "in")
    device.lanes["h2d"].record(arrived)
    device.lanes["h2d"].copy(memory, torch.zeros_like(memory), "in")
    for _ in range(2):
        device.lanes["compute"].wait(arrived)
        device.lanes["h2d"].wait(arrived)
    assert [time_of(device, lane) for lane in ("compute", "h2d")] == [1.5, 3.0]


def test_a_call_takes_what_the_plan_says_unless_another_time_was_given() -> None:
    device = VirtualDevice(seconds={"b": 5.0})
    device.expect(MACHINE, {"a": 1.0, "b": 2.0})
    memory = device.allocate(8)
    for label in ("a", "b", "between blocks"):
        device.reached(label, memory, [], [])
    assert time_of(device, "compute") == 6.0
    assert device.machine == MACHINE


def test_what_comes_after_a_synchronisation_comes_after_all_lanes() -> None:
    device = VirtualDevice(MACHINE)
    memory = device.allocate(1000)
    device.lanes["h2d"].copy(memory, torch.zeros_like(memory), "in")
    device.synchronize()
    assert {time_of(device, lane) for lane in device.lanes} == {1.5}


def test_a_machine_that_is_not_here_is_tried_by_name() -> None:
    """The plan is for a card; the outputs are the plain model's, and the timeline is the card's."""
    made, plan = case("chain"), known_plan("chain", "layerwise")
    with torch.no_grad():
        wanted = made()
        with tgo.Executor(made.model, plan, device=VirtualDevice("h100")) as run:
            for _ in range(3):
                assert_equal(made(), wanted)
            copies = run.timeline().lane("h2d")
    card = tgo.Machine.preset("h100")
    assert [span.seconds for span in copies] == pytest.approx([card.copy_seconds("h2d", s.nbytes) for s in copies])


def test_blocks_that_are_skipped_cost_no_time() -> None:
    made, plan = case("chain"), known_plan("chain", "layerwise")
    orders = [(0, 1, 2, 3, 4), (4, 2, 0), (0, 1, 2, 3, 4)]
    cost = {call.name: call.cost(plan.machine) for call in plan.trace.calls}
    with torch.no_grad():
        wanted = []
        for order in orders:
            made.model.order = order
            wanted.append(made())
        with tgo.Executor(made.model, plan, device="virtual") as run:
            for order, outputs in zip(orders, wanted, strict=True):
                made.model.order = order
                assert_equal(made(), outputs)
            timeline = run.timeline()
    for cycle, order in enumerate(orders):
        spans = timeline.lane("compute", cycle)
        assert [span.seconds for span in spans] == pytest.approx([cost[span.call] for span in spans])
        assert [s.call for s in spans if s.call.removeprefix("blocks.").isdecimal()] == [
            f"blocks.{index}" for index in order
        ]


def test_a_closed_device_is_refused() -> None:
    device = VirtualDevice()
    device.close()
    with pytest.raises(tgo.ExecutionError, match="this device is closed"):
        device.begin()
