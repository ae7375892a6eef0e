"""Who runs, and how it ends: failing copies, interrupts, threads that are gone, other executors, nobody at all."""

from __future__ import annotations

import faulthandler
import gc
import itertools
import sys
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import taskgraph_offload as tgo
from taskgraph_offload.devices import cpu
from taskgraph_offload.devices.cpu import CpuDevice
from taskgraph_offload.runtime.conductor import Conductor
from taskgraph_offload.runtime.forwards import Forwards

from ..guard import Guard
from ..left_behind import attached
from ..running import DEVICE, Case, assert_equal, case, fails_on_a_gpu, known_plan, only_on_the_cpu, plan_of


@pytest.fixture
def made() -> Case:
    return case("chain")


@pytest.fixture(autouse=True)
def nothing_hangs() -> Any:
    """A test that hangs says where, and ends."""
    faulthandler.dump_traceback_later(120, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


@only_on_the_cpu("copies by its threads fail")
@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_a_copy_that_fails_is_an_error_and_the_next_forward_is_right(
    made: Case, monkeypatch: pytest.MonkeyPatch, number: int, error: type[BaseException]
) -> None:
    with torch.no_grad():
        wanted = made()
        with attached(made) as run:
            made()
            with monkeypatch.context() as patch:
                patch.setattr(cpu, "copy_bytes", failing(number, error))
                with pytest.raises(tgo.ExecutionError, match=f"a copy failed: {error.__name__}"):
                    assert [made() for _ in range(3)]
            with Guard(run):
                assert_equal(made(), wanted)


def failing(number: int, error: type[BaseException]) -> Any:
    copy, numbers = cpu.copy_bytes, itertools.count()

    def fails(target: Tensor, source: Tensor) -> None:
        if next(numbers) == number:
            raise error("no room")
        copy(target, source)

    return fails


@only_on_the_cpu("copies by its threads fail")
def test_a_failed_copy_is_told_once_by_whoever_waits_for_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "copy_bytes", failing(0, MemoryError))
    memory = torch.zeros(1, dtype=torch.uint8)
    for end in (CpuDevice.synchronize, CpuDevice.close):
        device = CpuDevice()
        monkeypatch.setattr(cpu, "copy_bytes", failing(0, MemoryError))
        device.lanes["h2d"].copy(memory, memory, "a copy")
        with pytest.raises(tgo.ExecutionError, match="a copy failed: MemoryError"):
            end(device)
        device.close()


@pytest.mark.parametrize("line", range(60))
def test_an_interrupt_on_any_line_that_begins_or_ends_a_forward_leaves_the_model_fit(made: Case, line: int) -> None:
    """The error is kept, and with it all frames of the forward that was interrupted."""
    with torch.no_grad():
        wanted = made()
        with attached(made) as run:
            made()
            with pytest.raises((KeyboardInterrupt, NothingLeft)) as kept:
                interrupted(made, line)
            for _ in range(2):
                with Guard(run):
                    assert_equal(made(), wanted)
            del kept


class NothingLeft(Exception):
    """There is no such line."""


def interrupted(made: Case, line: int) -> None:
    """A forward with Ctrl-C at the n-th line that Forwards and the machinery of `with` run."""
    left = line

    def trace(frame: Any, event: str, _: Any) -> Any:
        nonlocal left
        if frame.f_code.co_filename.endswith(("runtime/forwards.py", "contextlib.py")):
            if event != "return" and not isinstance(frame.f_locals.get("self"), GeneratorExit):
                left -= 1
                if left == -1:
                    raise KeyboardInterrupt
            return trace
        return None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        made()
    finally:
        sys.settrace(before)
    raise NothingLeft


def test_an_interrupted_forward_does_not_stop_a_detach(made: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with torch.no_grad():
        wanted = made()
        with attached(made), monkeypatch.context() as patch:
            patch.setattr(Conductor, "finish", interrupt)
            patch.setattr(Conductor, "abandon", interrupt)  # and Ctrl-C again
            with pytest.raises(KeyboardInterrupt):
                made()
            patch.undo()
        assert_equal(made(), wanted)


def test_a_turn_of_a_thread_that_is_gone_is_over(made: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.no_grad():
        wanted = made()
    with attached(made), torch.no_grad():
        with monkeypatch.context() as patch:
            patch.setattr(Forwards, "_release", lambda *_: None)
            thread = threading.Thread(target=torch.no_grad()(made))
            thread.start()
            thread.join()
        assert_equal(made(), wanted)


@fails_on_a_gpu("nobody brings the weights that such a forward reads between blocks")
def test_a_forward_that_the_user_sets_while_attached_is_kept(made: Case) -> None:
    plain = type(made.model).forward
    with tgo.Executor(made.model, known_plan("chain"), device=DEVICE), torch.no_grad():
        wanted = made()[0]
        mine = made.model.forward = lambda x: 2 * plain(made.model, x)
        assert_equal(made(), [2 * wanted])
    assert vars(made.model)["forward"] is mine
    with torch.no_grad():
        assert_equal(made(), [2 * wanted])


def test_a_wrapper_of_the_attached_forward_still_works_when_it_is_detached(made: Case) -> None:
    with tgo.Executor(made.model, known_plan("chain"), device=DEVICE), torch.no_grad():
        wanted = made()[0]
        attached_forward = made.model.forward
        made.model.forward = lambda x: 2 * attached_forward(x)
        assert_equal(made(), [2 * wanted])
    with torch.no_grad():
        assert_equal(made(), [2 * wanted])


def test_a_method_of_the_class_that_is_replaced_while_attached_is_called(
    made: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = type(made.model).forward
    with torch.no_grad(), attached(made):
        wanted = made()[0]
        with monkeypatch.context() as patch:
            patch.setattr(type(made.model), "forward", lambda self, x: 2 * plain(self, x))
            assert_equal(made(), [2 * wanted])
        assert_equal(made(), [wanted])


class Codec(nn.Module):
    """Two methods that may each be planned."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))

    def encode(self, x: Tensor) -> Tensor:
        return self.layers[1](self.layers[0](x))

    def decode(self, x: Tensor) -> Tensor:
        return self.layers[3](self.layers[2](x))

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x))


def test_a_second_executor_for_another_method_or_for_a_part_is_refused() -> None:
    encode, decode = (Case(Codec(), {"x": torch.randn(1, 4)}, entry) for entry in ("encode", "decode"))
    decode.model = encode.model
    first, second = (tgo.Executor(made.model, plan_of(made), device=DEVICE) for made in (encode, decode))
    with first, pytest.raises(tgo.ExecutionError, match="attached already"):
        second.attach()


@pytest.mark.parametrize("outer_first", [True, False])
def test_executors_on_a_model_and_on_a_part_of_it_are_refused(outer_first: bool) -> None:
    outer = case("chain")
    inner = Case(outer.model.blocks[0], {"x": torch.randn(1, 4)})
    cases = [(outer, known_plan("chain")), (inner, plan_of(inner))]
    runs = [tgo.Executor(made.model, plan, device=DEVICE) for made, plan in cases]
    first, second = runs if outer_first else reversed(runs)
    with first, pytest.raises(tgo.ExecutionError, match="attached already"):
        second.attach()


def test_a_device_must_be_one(made: Case) -> None:
    with pytest.raises(tgo.SettingsError, match="device=0 is no device"):
        tgo.Executor(made.model, known_plan("chain"), device=0)  # type: ignore[arg-type]


@only_on_the_cpu("only its devices can be closed")
@pytest.mark.parametrize("lazy", [True, False])
def test_a_device_that_was_closed_is_refused(made: Case, lazy: bool) -> None:
    run = tgo.Executor(made.model, known_plan("chain"), device=CpuDevice(), lazy=lazy)
    with run, torch.no_grad():
        made()
    with pytest.raises(tgo.ExecutionError, match="this device is closed"):
        run.attach()
    made()


@only_on_the_cpu("its threads are counted")
@pytest.mark.parametrize("lazy", [True, False])
def test_what_nobody_detaches_is_let_go_with_the_model(lazy: bool) -> None:
    unpinned: list[int] = []

    class Pinning(CpuDevice):
        def unpin(self, home: Tensor) -> None:
            unpinned.append(home.nbytes)

    made, plan, threads = case("chain"), known_plan("chain"), threading.active_count()
    run = tgo.Executor(made.model, plan, device=Pinning(), lazy=lazy).attach()
    made()
    assert threading.active_count() == threads + 2
    del run, made
    gc.collect()
    assert threading.active_count() == threads
    unread = [weight.nbytes for name, weight in plan.trace.weights.items() if name not in plan.seats]
    assert sum(unpinned) == sum(plan.sizes[bundle] for bundle in plan.bundles) + sum(unread)
