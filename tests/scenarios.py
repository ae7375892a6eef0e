"""Scenarios that an executor must survive, on a device that checks every access.

Every scenario must pass. If any wait is left out, one of them must fail.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

import taskgraph_offload as tgo
from taskgraph_offload.devices import open_device
from taskgraph_offload.devices.base import Device
from taskgraph_offload.devices.checked import CheckedDevice, CheckedLane
from taskgraph_offload.devices.cpu import copy_bytes
from taskgraph_offload.nouns.trace import Call, Piece

from . import models, running
from .guard import Guard
from .running import Case, assert_equal, plan_of, spilling
from .simulated_gpu import card

Scenario = Callable[[int], None]
LATE = 1e-3  # seconds that work of a simulated GPU may be late


class Recording(CheckedDevice):
    """Notes the clock of the lane at each copy and call: the accesses that were certainly over then."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.issued: dict[str, list[tuple[str, int, dict[str, int]]]] = {}

    def touch(self, lane: CheckedLane, label: str, memory: Tensor, ranges: Any, writes: bool) -> None:
        super().touch(lane, label, memory, ranges, writes)
        if writes:  # a task first touches what it reads, then what it writes: note the last touch
            name = f"{lane.name} {label.removeprefix(f'{lane.name} ')}"
            self.issued.setdefault(name, []).append((lane.name, lane.clock[lane.name], dict(lane.clock)))


def assert_follows(plan: tgo.Plan, device: Recording, cycles: int = 3) -> None:
    """Assert that the run respected every edge of the plan's graph."""
    graph, seen, places = plan.graph(cycles), dict[str, int](), dict[str, tuple[str, int, dict[str, int]]]()
    for node, data in graph:
        name = str(data["task"]).partition(" after ")[0].partition(" before ")[0]
        names = [key for key in device.issued if key.partition(" #")[0] == name]
        ordered = sorted((entry for key in names for entry in device.issued[key]), key=lambda entry: entry[1])
        places[node] = ordered[seen.get(name, 0)]
        seen[name] = seen.get(name, 0) + 1
    for before, after in graph.dag.edges:
        lane, number, _ = places[before]
        assert places[after][2].get(lane, 0) >= number, f"{after} did not wait for {before}"


def disturbed(seed: int, checked: type[CheckedDevice] = CheckedDevice) -> Device[Any]:
    """The device under test, as this seed disturbs it: one that checks every access, or a GPU whose work is late."""
    if running.DEVICE == "cpu":
        return checked(seed)
    if card.is_here():
        card.delays(seed, LATE)
    return open_device(running.DEVICE)


def run(made: Case, plan: tgo.Plan, seed: int, forwards: int = 3, follows: bool = True) -> None:
    """Run some forwards, and compare them with the plain model's."""
    with torch.no_grad():
        wanted = made()
    device = disturbed(seed, Recording)
    with tgo.Executor(made.model, plan, device=device) as executor, torch.no_grad():
        for _ in range(forwards):
            with Guard(executor):
                assert_equal(made(), wanted)
    if follows and isinstance(device, Recording):
        assert_follows(plan, device)


def layerwise(seed: int) -> None:
    made = running.case("chain")
    run(made, running.known_plan("chain", "layerwise"), seed)


def sequential(seed: int) -> None:
    run(running.case("albert"), running.known_plan("albert", "sequential"), seed)


def written_back(seed: int) -> None:
    """Weights are copied home after two of the calls, and one right after it came, before its call."""
    plan = running.known_plan("chain", "sequential")

    def with_copies_home(tasks: tuple[tgo.Task, ...]) -> tuple[tgo.Task, ...]:
        found: list[tgo.Task] = []
        for task in tasks:
            early = task.kind == "h2d" and task.name == "blocks.3"
            late = task.kind == "compute" and task.name in ("blocks.1", "blocks.2")
            found += [task] + [tgo.Task("d2h", task.name)] * (early or late)
        return tuple(found)

    changed = replace(plan, cold=with_copies_home(plan.cold), steady=with_copies_home(plan.steady))
    changed.verify()
    run(running.case("chain"), changed, seed)


@cache
def planned(model: type[nn.Module], strategy: str) -> tgo.Plan:
    """The tight plan of a model that takes rows of 16."""
    return plan_of(Case(model(), {"x": torch.randn(8, 16)}), strategy)


def spilled(seed: int) -> None:
    torch.manual_seed(0)
    made = Case(running.Skips(), {"x": torch.randn(8, 16)})
    spills = [("~down.0/0", "down.1", "down.2", "up.1"), ("~down.1/0", "down.2", "down.3", "up.0")]
    run(made, spilling(planned(running.Skips, "sequential"), *spills), seed)


def _met(seed: int, gone_before: str, met_after: str) -> None:
    """An operator that the trace did not see uses a spilled activation."""
    torch.manual_seed(0)
    made = Case(running.Skips(), {"x": torch.randn(8, 16)})
    plan = spilling(planned(running.Skips, "sequential"), ("~down.0/0", "down.1", gone_before, "up.1"))
    kept: list[Tensor] = []
    made.model.down[0].register_forward_hook(lambda module, args, output: kept.append(output))
    meets = made.model.get_submodule(met_after)
    meets.register_forward_hook(lambda module, args, output: output + kept.pop())
    run(made, plan, seed, follows=False)


def spilled_and_met(seed: int) -> None:
    """The activation is away."""
    _met(seed, gone_before="down.2", met_after="middle")


def spilled_and_met_too_early(seed: int) -> None:
    """The activation is being copied out."""
    _met(seed, gone_before="middle", met_after="down.3")


class Peeking(running.Skips):
    """Reads the first activation with no operator of torch, in the call that it comes back for."""

    peeks = False

    def before(self, x: Tensor, skips: list[Tensor]) -> Tensor:
        unseen = torch.zeros(x.shape)
        if self.peeks and len(skips) == 1:
            copy_bytes(unseen, skips[0])
        return x + unseen


def spilled_and_read_unseen(seed: int) -> None:
    """A spilled activation is read by its address, as a custom kernel does."""
    torch.manual_seed(0)
    made = Case(Peeking(), {"x": torch.randn(8, 16)})
    plan = spilling(planned(Peeking, "resident"), ("~down.0/0", "down.1", "down.2", "up.1"))
    made.model.peeks = True
    run(made, plan, seed, follows=False)


def reordered(seed: int) -> None:
    """Blocks are skipped, repeated, called in another order, and called directly."""
    made = running.case("chain")
    net = made.model
    orders = [(0, 1, 2, 3, 4), (4, 2, 0), (0, 0, 3, 3), (1,), (0, 1, 2, 3, 4), (3, 4, 1)]
    wanted = []
    with torch.no_grad():
        for order in orders:
            net.order = order
            wanted.append(made())
        with running.plainly(net):
            alone = net.blocks[2](made.inputs["x"])
        with tgo.Executor(net, running.known_plan("chain", "layerwise"), device=disturbed(seed)) as executor:
            for order, outputs in zip(orders, wanted, strict=True):
                net.order = order
                with Guard(executor):
                    assert_equal(made(), outputs, str(order))
                    assert_equal([net.blocks[2](made.inputs["x"])], [alone])


def colliding(seed: int) -> None:
    """The plan cuts a block so fine that its own weights share seats. Then the block is called directly."""
    made = running.case("vit")
    plan = running.known_plan("vit", "auto")
    hidden = torch.randn(1, 5, 16, device=running.DEVICE)
    with torch.no_grad():
        wanted = made()
        with running.plainly(made.model):
            alone = made.model.layers[1](hidden)
        with tgo.Executor(made.model, plan, device=disturbed(seed)) as executor:
            for _ in range(2):
                with Guard(executor):
                    assert_equal(made(), wanted)
                    assert_equal([made.model.layers[1](hidden)], [alone])
            assert any(need.loose is not None for need in executor._needs.blocks.values())


class Detour(nn.Module):
    """Blocks, and two modules that run only if `asks` is set. One of them changes a weight if `counts` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Counting() for _ in range(4))
        self.extra, self.asks, self.counts = models.Block(4, 64), False, False
        self.other = Scaled()

    def forward(self, x: Tensor) -> Tensor:
        for number, block in enumerate(self.blocks):
            x = block(x)
            if self.asks and number == 1:
                x = self.other(self.extra(x), self.counts)
        return x


class Scaled(nn.Module):
    """Owns a weight that it may change, and reads weights of a module that it never calls."""

    def __init__(self) -> None:
        super().__init__()
        self.gain, self.inner = nn.Parameter(torch.randn(4)), nn.Linear(4, 4)

    def forward(self, x: Tensor, counts: bool) -> Tensor:
        if counts:
            self.gain.mul_(2)
        return nn.functional.linear(x, self.inner.weight) * self.gain


def _detour(seed: int, spare: bool, counts: bool) -> None:
    """Every second forward reads weights that no call of the plan reads."""
    torch.manual_seed(0)
    made = Case(Detour(), {"x": torch.randn(2, 4)})
    plan = plan_of(made, "resident" if counts else "layerwise")
    if spare:
        budget = f"{plan.budget_bytes + 2**16}B"
        plan = tgo.Planner.for_trace(plan.trace, budget, strategy="sequential", machine="cpu").plan()
    with torch.no_grad():
        before, wanted = {name: tensor.clone() for name, tensor in made.model.state_dict().items()}, []
        made.model.counts = made.model.blocks[0].counts = made.model.blocks[1].counts = counts
        for number in range(6):
            made.model.asks = number % 2 == 1
            wanted.append(made())
        after = {name: tensor.clone() for name, tensor in made.model.state_dict().items()}
        made.model.load_state_dict(before)
        with tgo.Executor(made.model, plan, device=disturbed(seed)) as executor:
            for number, outputs in enumerate(wanted):
                made.model.asks = number % 2 == 1
                with Guard(executor):
                    assert_equal(made(), outputs, str(number))
            assert executor.stats.demand_loads
            for name, tensor in made.model.state_dict().items():
                assert torch.equal(tensor, after[name]), name
        running.assert_within_budget(executor)


def unread_in_the_arena(seed: int) -> None:
    """Weights that no call of the plan reads. The budget has no memory to spare, so they go to the arena."""
    _detour(seed, spare=False, counts=False)


def unread_beside_the_arena(seed: int) -> None:
    """The same, but the budget has memory to spare."""
    _detour(seed, spare=True, counts=False)


def unread_and_changed(seed: int) -> None:
    """The same, but all planned weights are resident, and the forward changes weights: an unread one and others."""
    _detour(seed, spare=False, counts=True)


@dataclass(eq=False)
class Counting(nn.Module):
    """Counts its calls in a buffer, if `counts` is set."""

    times: Tensor = field(init=False)

    def __post_init__(self) -> None:
        super().__init__()
        self.block, self.counts = models.Block(4, 64), False
        self.register_buffer("times", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        if self.counts:
            self.times.add_(1)
        return self.block(x) + self.times


def changed_unexpectedly(seed: int) -> None:
    """The forward changes weights that it did not change when it was traced."""
    torch.manual_seed(0)
    made = Case(models.Net([Counting() for _ in range(4)], range(4)), {"x": torch.randn(2, 4)})
    plan = plan_of(made, "layerwise")
    for block in made.model.blocks:
        block.counts = True
    outputs = []
    with torch.no_grad():
        for _ in range(3):
            outputs.append(made())
        for block in made.model.blocks:
            block.times.zero_()
        with tgo.Executor(made.model, plan, device=disturbed(seed)):
            for number, wanted in enumerate(outputs, 1):
                assert_equal(made(), wanted)
                assert all(torch.equal(b.times, torch.full((4,), float(number))) for b in made.model.blocks)
    assert all(torch.equal(b.times, torch.full((4,), 3.0)) for b in made.model.blocks)


def changed_while_streaming(seed: int) -> None:
    """The forward changes weights of blocks that stream: they are copied home after every call."""
    torch.manual_seed(0)
    made = Case(models.Net([Counting() for _ in range(4)], range(4)), {"x": torch.randn(2, 4)})
    for block in made.model.blocks:
        block.counts = True
    plan = streaming_changes(made)
    with tgo.Executor(made.model, plan, device=disturbed(seed)), torch.no_grad():
        for number, order in enumerate([range(4), range(4), (0, 1, 3, 2), range(4)], 1):
            made.model.order = order
            made()
            assert all(torch.equal(b.times, torch.full((4,), float(number))) for b in made.model.blocks)


def streaming_changes(made: Case) -> tgo.Plan:
    """A plan made by hand in which changed weights stream. No strategy makes such a plan."""
    trace = running.trace_of(made)
    still = replace(trace, fixed={}, calls=tuple(replace(c, pieces=_without_writes(c)) for c in trace.calls))
    plan = running.tight(still, "sequential")

    def with_copies_home(tasks: tuple[tgo.Task, ...]) -> tuple[tgo.Task, ...]:
        found: list[tgo.Task] = []
        for task in tasks:
            found += [task, tgo.Task("d2h", task.name)] if task.kind == "compute" else [task]
        return tuple(found)

    moving = replace(trace, fixed={})
    plan = replace(plan, trace=moving, cold=with_copies_home(plan.cold), steady=with_copies_home(plan.steady))
    plan.verify()
    return plan


def _without_writes(call: Call) -> tuple[Piece, ...]:
    return tuple(replace(piece, reads=(*piece.reads, *piece.writes), writes=()) for piece in call.pieces)


def trained(seed: int) -> None:
    """BatchNorm in training: changed weights stay on the device, and are copied home at the end."""
    torch.manual_seed(0)
    made = Case(running.Normed().train(), {"x": torch.randn(4, 8)})
    before = {name: tensor.clone() for name, tensor in made.model.state_dict().items()}
    wanted = [made() for _ in range(3)]
    after = {name: tensor.clone() for name, tensor in made.model.state_dict().items()}
    made.model.load_state_dict(before)
    with tgo.Executor(made.model, plan_of(made), device=disturbed(seed)):
        for outputs in wanted:
            assert_equal(made(), outputs)
    for name, tensor in made.model.state_dict().items():
        assert torch.equal(tensor, after[name]), name


def edited(seed: int) -> None:
    """Weights are edited between two forwards: one that is read between blocks, one that was fetched already."""
    made = running.case("chain")
    with (
        torch.no_grad(),
        tgo.Executor(made.model, running.known_plan("chain", "layerwise"), device=disturbed(seed)) as executor,
    ):
        for number in range(4):
            made.model.scale.add_(number)
            made.model.blocks[0].down.weight.mul_(0.5)
            with Guard(executor):
                outputs = made()
            plain = Case(models.Net([models.Block(4, 64) for _ in range(5)], range(5), scaled=True), made.inputs)
            plain.model.load_state_dict(made.model.state_dict())
            assert_equal(outputs, plain())


def every_second_stays() -> tuple[Case, tgo.Plan]:
    """A chain, the same every time, under a plan in which every second block stays and the others stream."""
    torch.manual_seed(0)
    made = running.chain(10)
    options: dict[str, Any] = {"residents": "spread", "prefetch": 1}
    return made, tgo.Planner.for_trace(
        running.trace_of(made), "60%", strategy="layerwise", machine="cpu", **options
    ).plan()


def preloaded(seed: int) -> None:
    """What stays comes before the first forward. Weights are edited, a block runs alone, and a block raises."""
    (made, plan), (plain, _) = every_second_stays(), every_second_stays()
    device = disturbed(seed)
    with tgo.Executor(made.model, plan, device=device, preload=True) as executor, torch.no_grad():
        for number in range(3):
            for model in (made.model, plain.model):
                model.blocks[number].down.weight.mul_(0.5)
            with Guard(executor):
                alone = made.model.blocks[4](made.inputs["x"])
            with running.plainly(plain.model):
                assert_equal([alone], [plain.model.blocks[4](made.inputs["x"])])
            handle = made.model.blocks[number + 1].register_forward_pre_hook(_raise)
            try:
                made()
            except ZeroDivisionError:
                handle.remove()
            with Guard(executor):
                assert_equal(made(), plain())
            executor.pause()
            executor.resume()


def interrupted(seed: int) -> None:
    """A block raises. Later forwards must not use bytes whose copies were under way."""
    made = running.case("chain")
    with torch.no_grad():
        wanted = made()
        for strategy in ("resident", "layerwise"):
            with tgo.Executor(made.model, running.known_plan("chain", strategy), device=disturbed(seed)):
                for number in (1, 3, 4):
                    handle = made.model.blocks[number].register_forward_pre_hook(_raise)
                    try:
                        made()
                    except ZeroDivisionError:
                        handle.remove()
                    assert_equal(made(), wanted)


def _raise(*_: object) -> None:
    raise ZeroDivisionError


SCENARIOS: dict[str, Scenario] = {
    function.__name__: function
    for function in (
        *(layerwise, sequential, written_back, spilled, spilled_and_met, spilled_and_met_too_early),
        *(spilled_and_read_unseen, reordered, colliding),
        *(changed_unexpectedly, changed_while_streaming, trained, edited, preloaded, interrupted),
        *(unread_in_the_arena, unread_beside_the_arena, unread_and_changed),
    )
}
