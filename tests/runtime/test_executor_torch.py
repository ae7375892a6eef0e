"""What torch and the model's owner do around an attached model: compilers, transforms, checkpoints, hooks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import taskgraph_offload as tgo

from ..guard import Guard
from ..left_behind import attached
from ..running import DEVICE, Case, assert_equal, case, known_plan, not_simulated, plainly, plan_of
from .test_executor_divergence import plain


@pytest.fixture
def made() -> Case:
    return case("chain")


COMPILES: dict[str, Any] = {
    "torch.compile": lambda model, backend: torch.compile(model, backend=backend),
    "model.compile": lambda model, backend: model.compile(backend=backend) or model,
    "blocks": lambda model, backend: [block.compile(backend=backend) for block in model.blocks] and model,
}


@not_simulated("it computes in a mode of torch's dispatch, and torch compiles nothing within one")
@pytest.mark.parametrize("when", ["before", "inside"])
@pytest.mark.parametrize("how", COMPILES)
def test_a_compiled_model_is_offloaded_too(made: Case, how: str, when: str) -> None:
    torch._dynamo.reset()
    homes, seen, x = set[int](), list[int](), made.inputs["x"]

    def backend(module: Any, _: Any) -> Any:  # no Guard here: torch compiles nothing while there is one
        def compiled(*arguments: Any) -> Any:
            seen.extend(found.data_ptr() for found in arguments if isinstance(found, Tensor))
            return module.forward(*arguments)

        return compiled

    with torch.no_grad(), plainly(made.model):
        wanted = made.model(x)
        model = COMPILES[how](made.model, backend) if when == "before" else made.model
        assert torch.equal(model(x), wanted)
    with torch.no_grad():
        with tgo.Executor(made.model, known_plan("chain"), device=DEVICE) as run:
            model = COMPILES[how](made.model, backend) if when == "inside" else model
            assert run._homes is not None
            homes |= {member.home.data_ptr() for member in run._homes.tensors()}
            seen.clear()
            for _ in range(3):
                assert torch.equal(model(x), wanted)
            assert not homes.intersection(seen)
            assert (run.stats.divergences, run.stats.demand_loads) == (0, 0)
            assert run.stats.h2d_bytes > 0
        with plainly(made.model):
            assert torch.equal(model(x), wanted)
            made.model.blocks[0].up.weight.zero_()
            after = model(x)
        assert torch.equal(after, plain(made)[0])
    torch._dynamo.reset()


@pytest.mark.parametrize("transform", ["grad", "jvp", "vmap"])
@pytest.mark.parametrize("warm", [True, False])
def test_transforms_of_functions_are_refused(made: Case, transform: str, warm: bool) -> None:
    x, model = made.inputs["x"], made.model
    transformed = {
        "grad": lambda: torch.func.grad(lambda x: model(x).sum())(x),
        "jvp": lambda: torch.func.jvp(model, (x,), (x,)),
        "vmap": lambda: torch.vmap(model)(x),
    }
    wanted = made()
    with attached(made):
        if warm:
            made()
        with pytest.raises(tgo.ExecutionError, match=r"inside torch.func transforms"):
            transformed[transform]()
        assert_equal(made(), wanted)


class Checkpointed(nn.Module):
    """Blocks that are computed again in the backward."""

    def __init__(self, net: Any, reentrant: bool) -> None:
        super().__init__()
        self.blocks, self.reentrant = net.blocks, reentrant

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.reentrant)
        return x


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_a_backward_through_checkpoints_is_right(frozen: bool, reentrant: bool) -> None:
    made = Case(Checkpointed(case("chain").model, reentrant), {"x": torch.randn(2, 4)})
    plan = plan_of(made)
    made.model.requires_grad_(not frozen)
    x, twin = made.inputs["x"].requires_grad_(), Case(copy.deepcopy(made.model).to(DEVICE), made.inputs)

    def grads(made: Case) -> list[Tensor]:
        wrt = [x, *(p for p in made.model.parameters() if p.requires_grad)]
        for tensor in wrt:
            tensor.grad = None
        made()[0].square().sum().backward()
        return [tensor.grad.clone() for tensor in wrt if tensor.grad is not None]

    wanted = grads(twin)
    with tgo.Executor(made.model, plan, device=DEVICE):
        for _ in range(2):
            assert_equal(grads(made), wanted)


def test_hooks_of_the_user_for_saved_tensors_get_what_they_would(made: Case) -> None:
    made.model.requires_grad_(False)
    x, packed = made.inputs["x"].requires_grad_(), list[int]()

    def pack(tensor: Tensor) -> Tensor:
        packed.append(tensor.numel())
        return tensor

    def run(made: Case) -> tuple[Tensor, list[int]]:
        packed.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = made()[0].square().sum()
        (grad,) = torch.autograd.grad(out, x)
        return grad, list(packed)

    wanted, count = run(Case(copy.deepcopy(made.model).to(DEVICE), made.inputs))
    with attached(made):
        for _ in range(2):
            grad, counted = run(made)
            assert torch.equal(grad, wanted)
            assert counted == count


def test_hooks_that_are_added_while_attached_read_weights_where_the_block_does(made: Case) -> None:
    block = made.model.blocks[2]
    with torch.no_grad(), tgo.Executor(made.model, known_plan("chain"), device=DEVICE) as run:
        made()
        handles = [
            block.register_forward_pre_hook(lambda module, args: (args[0] * module.up.weight.mean(),), prepend=True),
            block.register_forward_hook(lambda module, args, out: out + module.down.weight.mean()),
        ]
        for _ in range(2):
            with Guard(run):
                outputs = made()
    with torch.no_grad():
        assert_equal(outputs, made())
    for handle in handles:
        handle.remove()
