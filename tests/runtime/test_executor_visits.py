"""Modules that run where the plan does not expect them: without their block, or a block inside of another one."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import taskgraph_offload as tgo

from .. import models, running
from ..guard import Guard
from ..left_behind import attached, everything_of
from ..running import DEVICE, Case, assert_equal, case, devices, known_plan, plainly, plan_of


@pytest.fixture
def made() -> Case:
    return case("chain")


class StepCache(nn.Module):
    """Asks inner modules of some blocks, before, between and after them, as TeaCache asks the first block's norm."""

    def __init__(self, net: Any, asks: bool = False) -> None:
        super().__init__()
        self.blocks, self.asks = net.blocks, asks

    def forward(self, x: Tensor) -> Tensor:
        for number, block in enumerate(self.blocks):
            if self.asks:
                x = x + self.blocks[(number + 2) % len(self.blocks)].up(x).mean()
            x = block(x)
        return x + self.blocks[1].down(self.blocks[1].up(x)) if self.asks else x


@pytest.mark.parametrize("device", devices("cpu", "checked:0", "checked:1", "checked:2", "checked:3", "checked:4"))
@pytest.mark.parametrize("strategy", running.STRATEGIES)
def test_an_inner_module_may_be_called_outside_of_its_block(made: Case, strategy: str, device: str) -> None:
    cached = Case(StepCache(made.model), made.inputs)
    plan = plan_of(cached, strategy)
    cached.model.asks = True
    with torch.no_grad():
        wanted = cached()
        with tgo.Executor(cached.model, plan, device=device) as run:
            for number in range(3):
                with Guard(run):
                    assert_equal(cached(), wanted)
                assert run.stats.divergences == 7 * (number + 1)
            cached.model.asks = False
            cached()
            loads = run.stats.demand_loads
            cached()
            assert run.stats.demand_loads == loads  # the plan goes on as if nothing had been


@pytest.mark.parametrize("device", devices("checked:0", "checked:1", "checked:2", "checked:3", "checked:4"))
def test_so_may_one_where_the_plan_cuts_inside_of_blocks(device: str) -> None:
    made, plan = case("vit"), known_plan("vit", "auto")
    places = {call.boundary.module for call in plan.trace.calls}
    hidden = torch.randn(1, 5, 16).to(DEVICE)
    inner = [module for name, module in made.model.named_modules() if name.startswith("layers.1.") and name in places]
    assert inner
    with torch.no_grad():
        with plainly(made.model):
            wanted = made()
            alone = [_output(module, hidden) for module in inner]
        with tgo.Executor(made.model, plan, device=device) as run:
            for _ in range(2):
                with Guard(run):
                    assert_equal(made(), wanted)
                    assert_equal([_output(module, hidden) for module in inner], alone)
            made()
            loads = run.stats.demand_loads
            made()
            assert run.stats.demand_loads == loads


def _output(module: nn.Module, x: Tensor) -> Tensor:
    made = module(x.repeat(1, 1, module.in_features // 16) if isinstance(module, nn.Linear) else x)
    return made[0] if isinstance(made, tuple) else made


@pytest.mark.parametrize("strategy", ["layerwise", "auto"])
def test_an_inner_module_may_run_by_itself_or_fail(made: Case, strategy: str) -> None:
    x, inner = made.inputs["x"], made.model.blocks[3].up
    with torch.no_grad():
        with plainly(made.model):
            wanted, alone = made(), inner(x)
        with attached(made, strategy) as run:
            for _ in range(2):
                with Guard(run):
                    assert_equal([inner(x), inner.forward(x)], [alone, alone])
                    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
                        inner(torch.randn(2, 5).to(DEVICE))
                    assert_equal(made(), wanted)


class Nesting(nn.Module):
    """A block that runs another one, which it knows but does not own, in the middle of its own work."""

    def __init__(self, block: nn.Module, other: nn.Module) -> None:
        super().__init__()
        self.block, self.known, self.asks = block, [other], False
        self.last, self.gain = nn.Linear(4, 4), nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(x)
        if self.asks:
            x = x + self.known[0](x)
        return self.last(x) * self.gain


@pytest.mark.parametrize("device", devices("cpu", "checked:0", "checked:1", "checked:2"))
@pytest.mark.parametrize("number", [0, 1, 2, 3])
@pytest.mark.parametrize("asks", [False, True])
@pytest.mark.parametrize("strategy", ["sequential", "layerwise", "keep", "auto"])
def test_a_block_may_run_another_one(strategy: str, asks: bool, number: int, device: str) -> None:
    """One whose turn was, or is still to come; when the plan was made, or only since."""
    torch.manual_seed(0)
    others = [models.Block(4, 64) for _ in range(4)]
    nesting = Nesting(models.Block(4, 64), others[number])
    blocks = [*others[:2], nesting, *others[2:]]
    made = Case(models.Net(blocks, range(5)), {"x": torch.randn(2, 4)})
    nesting.asks = asks
    plan, orders = plan_of(made, strategy), [range(5), (2, 2, 0), (4, 2), range(5)]
    nesting.asks = True
    with torch.no_grad():
        wanted = []
        for made.model.order in orders:
            wanted.append(made())
        with tgo.Executor(made.model, plan, device=device) as run:
            for made.model.order, outputs in zip(orders, wanted, strict=True):
                with Guard(run):
                    assert_equal(made(), outputs)


class Shared(nn.Module):
    """One inner module in all blocks, and another one in all blocks and between them."""

    def __init__(self) -> None:
        super().__init__()
        inner, everywhere = nn.Linear(4, 64), nn.Linear(4, 4)
        self.blocks = nn.ModuleList(models.Block(4, 64) for _ in range(4))
        for block in self.blocks:
            block.up, block.everywhere = inner, everywhere
            block.register_forward_pre_hook(lambda module, args: (module.everywhere(args[0]),))
        self.everywhere = everywhere

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = self.everywhere(block(x))
        return x


@pytest.mark.parametrize("strategy", running.STRATEGIES)
def test_an_inner_module_that_several_blocks_share_is_no_surprise(strategy: str) -> None:
    torch.manual_seed(0)
    made = Case(Shared(), {"x": torch.randn(2, 4)})
    with torch.no_grad():
        wanted = made()
        with tgo.Executor(made.model, plan_of(made, strategy), device=DEVICE) as run:
            for _ in range(3):
                with Guard(run):
                    assert_equal(made(), wanted)
            assert run.stats.divergences == 0


def test_an_inner_module_keeps_a_forward_of_its_own(made: Case) -> None:
    inner, x = made.model.blocks[1].up, made.inputs["x"]
    own = inner.forward
    inner.forward = lambda x: own(x) * 2
    with torch.no_grad():
        with plainly(made.model):
            wanted, alone = made(), own(x) * 2
        with attached(made) as run, Guard(run):
            assert_equal(made(), wanted)
            assert torch.equal(inner(x), alone)
        assert_equal(made(), wanted)


def test_a_module_inside_of_an_attached_one_is_refused(made: Case) -> None:
    inner = Case(made.model.blocks[1].up, {"input": made.inputs["x"]})
    plan = plan_of(inner, "resident")
    with attached(made), pytest.raises(tgo.ExecutionError, match="attached already"):
        tgo.Executor(inner.model, plan, device=DEVICE).attach()


def test_what_stands_in_is_not_asked_once_it_is_gone(made: Case) -> None:
    inner = made.model.blocks[1].up
    before = everything_of(made.model)
    with attached(made):
        kept = inner.forward
    assert everything_of(made.model) == before
    with plainly(made.model):
        assert torch.equal(kept(made.inputs["x"]), inner(made.inputs["x"]))


class Recursive(nn.Module):
    """A block that runs itself, and reads a weight after that."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.gain, self.depth = models.Block(4, 64), nn.Parameter(torch.randn(4)), 0

    def forward(self, x: Tensor) -> Tensor:
        if self.depth < 2:
            self.depth += 1
            try:
                x = self(x)
            finally:
                self.depth -= 1
        return self.block(x) * self.gain


@pytest.mark.parametrize("strategy", ["sequential", "layerwise", "auto"])
def test_a_block_may_run_itself(strategy: str) -> None:
    torch.manual_seed(0)
    made = Case(models.Net([Recursive() for _ in range(4)], range(4)), {"x": torch.randn(2, 4)})
    plan, orders = plan_of(made, strategy), [range(4), (3, 1), range(4)]
    with torch.no_grad():
        wanted = []
        for made.model.order in orders:
            wanted.append(made())
        with plainly(made.model):
            alone = made.model.blocks[2](made.inputs["x"])
        with tgo.Executor(made.model, plan, device=DEVICE) as run:
            for made.model.order, outputs in zip(orders, wanted, strict=True):
                with Guard(run):
                    assert_equal(made(), outputs)
                    assert_equal([made.model.blocks[2](made.inputs["x"])], [alone])


@pytest.mark.parametrize("strategy", ["layerwise", "auto"])
def test_the_forward_of_a_block_may_be_called_without_its_hooks(strategy: str) -> None:
    torch.manual_seed(0)
    made = Case(models.Net([Recursive() for _ in range(4)], range(4)), {"x": torch.randn(2, 4)})
    x, block = made.inputs["x"], made.model.blocks[1]
    with torch.no_grad():
        with plainly(made.model):
            wanted, alone = made(), block(x)
        with tgo.Executor(made.model, plan_of(made, strategy), device=DEVICE) as run, Guard(run):
            assert_equal([block.forward(x)], [alone])
            assert_equal(made(), wanted)


def test_another_thread_cannot_use_what_a_block_finds(made: Case) -> None:
    x, found = made.inputs["x"], list[object]()

    def elsewhere() -> None:
        try:
            found.append(made.model.blocks[1].up(x))
        except tgo.ExecutionError as error:
            found.append(error)

    def in_the_block(*_: object) -> None:
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()

    handle = made.model.blocks[1].down.register_forward_pre_hook(in_the_block)
    with torch.no_grad(), tgo.Executor(made.model, known_plan("chain"), device=DEVICE):
        made()
    handle.remove()
    assert "in another thread" in str(found[0])


def test_a_wrapper_that_kept_what_stood_in_does_not_bar_the_next_executor(made: Case) -> None:
    """As accelerate's hooks keep a forward, and put it back."""
    for module in (made.model, made.model.blocks[1].up):
        with tgo.Executor(made.model, known_plan("chain"), device=DEVICE):
            kept = module.forward
            module.forward = lambda *args, forward=kept, **kwargs: forward(*args, **kwargs)
            made()
        module.forward = kept
    with torch.no_grad():
        wanted = made()
        with tgo.Executor(made.model, known_plan("chain"), device=DEVICE) as run, Guard(run):
            assert_equal(made(), wanted)


class Timed:
    """A forward with attributes of its own."""

    def __init__(self, module: nn.Module) -> None:
        self._module, self.name, self._own, self.is_removed, self._blocks = module, "timed", None, True, ()
        self.forward = module.forward

    def __call__(self, *args: object, **kwargs: object) -> object:
        return self.forward(*args, **kwargs)


def test_a_forward_with_attributes_is_put_back(made: Case) -> None:
    for module in (made.model, made.model.blocks[1].up):
        module.forward = own = Timed(module)
        for _ in range(2):
            with tgo.Executor(made.model, known_plan("chain"), device=DEVICE):
                made()
            assert vars(module)["forward"] is own


class Encoder(nn.Module):
    """Layers that compute in another way if they find hooks in themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(256, 4, 512, batch_first=True) for _ in range(3))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=mask)
        return x


@pytest.mark.parametrize("strategy", ["layerwise", "auto"])
def test_no_hook_changes_how_a_module_computes(strategy: str) -> None:
    torch.manual_seed(0)
    mask = torch.zeros(3, 17, dtype=torch.bool)
    mask[0, 5:] = True
    made = Case(Encoder().eval(), {"x": torch.randn(3, 17, 256), "mask": mask})
    plan = plan_of(made, strategy)
    with torch.no_grad():
        wanted = made()
        with tgo.Executor(made.model, plan, device=DEVICE) as run, Guard(run):
            for _ in range(2):
                assert_equal(made(), wanted)
            assert run.stats.divergences == 0
