"""Several models with one budget: a pipeline. Each is planned when it is first called, with what it is called with.

    pipe(prompt)     ->  text_encoder.forward  ->  trace, plan, attach; the device is its own
                     ->  transformer.forward   ->  trace, plan, attach; the text encoder gives its memory back
                     ->  transformer.forward   ->  as planned
                     ->  vae.decode            ->  trace, plan, attach

A call that looks like an earlier one, or needs no more memory than was reserved for one, follows the plan that is
there. Any other one is traced anew before it runs: if it needs more memory, it gets another plan, over the same homes.
"""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields
from operator import attrgetter
from threading import get_ident
from types import TracebackType
from typing import Any, Protocol
from warnings import warn

import torch
from torch import nn

from ..devices import check_device
from ..errors import BudgetError, ExecutionError, NothingReadError, OffloadError, TraceError
from ..foreign import refuse_foreign_hooks
from ..nouns.budget import Budget, parse_budget, readable
from ..nouns.timeline import Timeline
from ..nouns.trace import Trace
from ..nouns.weights import named_tensors
from ..plan.plan import Plan, aligned
from .executor import Executor, attached_to
from .hooks import StandIn
from .measured import Stats
from .model_device import ModelDevice
from .signatures import Signature

MOST = 256  # signatures that are kept for a plan
PHASES = 64  # that are remembered of a program
HEADROOM = 1.25  # times the activations: what a call that needs more than the ones before gets beyond that
LIBRARIES = ("torch.", "transformers.modeling_utils", "transformers.generation", "diffusers.models.modeling_utils")


class Planning(Protocol):
    """What this module asks of the planner, for one component."""

    def trace(self, model: nn.Module, entry: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Trace:
        """What one call needs."""
        ...

    def plan(self, trace: Trace, budget_bytes: int, reserved_bytes: int) -> Plan:
        """A plan for a trace. `reserved_bytes` stay free besides, for calls that need more."""
        ...

    def margin_bytes(self, trace: Trace) -> int:
        """What the device needs for itself."""
        ...


@dataclass(frozen=True)
class Part:
    """One model of a target, how it is planned, and the methods to watch besides those that models offer."""

    model: nn.Module
    planning: Planning
    entries: tuple[str, ...] = ()


@dataclass(eq=False)
class Served:
    """A plan, and the calls that it was made for, or turned out to have room for, with the activations of each."""

    plan: Plan
    made_for: Trace  # as it was captured; the plan may have cut it finer
    room: int  # bytes of activations
    signatures: deque[tuple[Signature, int]] = field(default_factory=lambda: deque(maxlen=MOST))
    untraced: deque[Signature] = field(default_factory=lambda: deque(maxlen=MOST))  # calls that could not be traced

    def has_room_for(self, signature: Signature) -> bool:
        """Whether a call needs no more than one that was traced, if memory grows at most as the square of inputs."""
        return signature in self.untraced or any(
            known.kind == signature.kind and needed * signature.growth_over(known) ** 2 <= self.room
            for known, needed in self.signatures
        )

    def serves(self, trace: Trace) -> bool:
        """Whether this plan runs the calls of another trace, with as much memory as they need."""
        if trace.entry != self.plan.trace.entry or trace.activation_bytes > self.room:
            return False
        return _steps(trace) == _steps(self.made_for)


class Component:
    """One model of a run: its entries, the plans that were made for them, and the executor that follows one."""

    def __init__(self, name: str, part: Part, run: Run) -> None:
        self.name, self.model, self.run = name, part.model, run
        self.planning, self._watched = part.planning, dict.fromkeys((*entries_of(part.model), *part.entries))
        self.executor: Executor | None = None
        self.plans: list[Served] = []
        self._entries: dict[str, _Called] = {}
        self._thread: int | None = None  # where it runs
        self._is_aside = False  # True: calls pass through
        self._weightless = set[str]()  # methods that read no weight
        self._names = frozenset[str]()  # of its tensors, when the executor was attached

    @property
    def is_running(self) -> bool:
        """Whether one of its methods runs."""
        return self._thread is not None

    @property
    def plan(self) -> Plan | None:
        """The plan that is followed now."""
        return None if self.executor is None else self.executor.plan

    @property
    def arena_bytes(self) -> int:
        """What it holds on the device between its calls."""
        executor = self.executor
        is_there = executor is not None and executor.is_attached and not executor.is_paused
        return executor.plan.arena_bytes if executor is not None and is_there else 0

    @property
    def held_bytes(self) -> int:
        """What it needs on the device now: while it runs, its activations too."""
        return self.executor.plan.peak_bytes if self.executor is not None and self.is_running else self.arena_bytes

    def call(self, called: _Called, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an entry, as planned. One entry may call another one."""
        if self._thread == get_ident() or self._is_aside or called.name in self._weightless:
            return called.original(*args, **kwargs)
        if self.run.traced is not None:
            raise TraceError(
                f"{self.run.traced} calls {_who(self, called.name)}, another component, so it cannot be traced alone: "
                f"leave one out, as in exclude=[{self.name!r}]"
            )
        if self.is_running:
            raise ExecutionError(f"{_who(self, called.name)} is called while another thread runs it: wait for that one")
        if self.run.is_paused:
            raise ExecutionError(f"{_who(self, called.name)}: this run is paused; call resume() first")
        self._thread = get_ident()
        try:
            try:
                self.prepare(called.name, args, kwargs)
            except NothingReadError:
                self._weightless.add(called.name)
                return called.original(*args, **kwargs)
            try:
                return self._entries[called.name].original(*args, **kwargs)  # now the executor's
            finally:
                self.run.has_run(self, called.name)
        finally:
            self._thread = None

    def prepare(self, entry: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Have a plan that serves a call, and memory for it."""
        served = self._served(entry, args, kwargs)
        self.run.make_room(self, served.plan)
        self._follow(served.plan)

    def remove(self) -> None:
        """Give the model back as it was found."""
        self._take_off()
        if self.executor is not None:
            self.executor.detach()

    def _served(self, entry: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Served:
        """The plan for a call. A call that is like none before is traced, and gets a plan if none has room for it."""
        signature = Signature.of(entry, args, kwargs)
        if (known := next((served for served in self.plans if served.has_room_for(signature)), None)) is not None:
            return known
        if self.executor is not None and self.executor.is_attached and self._names != _names(self.model):
            with self._entries_aside():  # modules came or went: the homes are those of another model
                self.executor.detach()
            self.plans.clear()
        try:
            with self._as_found():
                trace = self.run.trace(self, entry, args, kwargs)
        except TraceError as error:
            served = next((served for served in self.plans if served.made_for.entry == entry), None)
            if served is None:
                raise
            warn(f"{error}\nIt runs as an earlier call was planned; the budget may not hold", stacklevel=5)
            served.untraced.append(signature)
            return served
        served = next((served for served in self.plans if served.serves(trace)), None)
        if served is None:
            served = self.run.planned(self, trace)
            self.plans.insert(0, served)
        served.signatures.append((signature, trace.activation_bytes))
        return served

    def _follow(self, plan: Plan) -> None:
        if self.executor is None or not self.executor.is_attached:
            with self._entries_aside():
                self.executor = Executor(self.model, plan, **self.run.executor_arguments).attach()
            self._names, self.executor.wakes = _names(self.model), self._wake
        elif self.executor.plan is not plan or not self.executor.is_hooked:
            with self._entries_aside():
                self.executor.follow(plan)
        if self.executor.is_paused:
            self.executor.resume()

    def _wake(self) -> None:
        """Something outside of the entries needs the device, and another component has it."""
        if self.executor is not None and not self.run.is_paused:
            self.run.make_room(self, self.executor.plan)
            self.executor.resume()

    @contextmanager
    def _as_found(self) -> Iterator[None]:
        """The model without anything of ours, as far as a trace can see."""
        with self._entries_aside(), self.run.silent():
            if self.executor is None or not self.executor.is_attached:
                yield
            else:
                with self.executor.unhooked():
                    yield

    @contextmanager
    def _entries_aside(self) -> Iterator[None]:
        """The model without what watches its methods, and without what a user has put around that."""
        here, covers = vars(self.model), dict[_Called, Any]()
        self._is_aside = True
        try:
            for name, called in self._entries.items():
                if name in here and not called.is_removed:
                    covers[called] = here[name]
                    called.uncover()
            yield
        finally:
            for called, cover in covers.items():
                called.cover_with(cover)
            self._is_aside = False

    def put_entries(self) -> None:
        """Let calls of the model come here first."""
        for name in self._watched:
            self._entries[name] = _Called(self, name)

    def _take_off(self) -> None:
        for called in self._entries.values():
            called.remove()


class Run:
    """Models that share a budget, each planned when it is called: what `offload` gives for a pipeline.

    As a context manager, it detaches on exit.
    """

    def __init__(self, parts: Mapping[str, Part], budget: Budget, **executor_arguments: Any) -> None:
        check_device(executor_arguments.get("device"), executor_arguments.get("link_bytes_per_second"))
        self.models = {name: part.model for name, part in parts.items()}
        self.is_paused = False
        self.traced: str | None = None  # what is traced just now
        self.executor_arguments = executor_arguments
        self._budget, self._peak_bytes = budget, 0
        self._most: dict[str, int] = {}  # the peak of each component, up to its last call
        self._weight_bytes = _weight_bytes(self.models.values())
        self._device = _device_of(executor_arguments.get("device"))
        self._answers: list[ModelDevice] = []
        self._order: list[Component] = []  # those that have run; the last one comes last
        self.program: tuple[tuple[str, str, int], ...] = ()  # component, method, how often in a row
        self.components = {name: Component(name, part, self) for name, part in parts.items()}

    def attach(self) -> Run:
        """Watch the models for their calls. Nothing is traced, and no weight moves, before the first one."""
        for name, model in self.models.items():
            refuse_foreign_hooks(model)
            if attached_to(model) or run_of(model):
                raise ExecutionError(f"{name or type(model).__name__} is attached already; call detach first")
        try:
            for component in self.components.values():
                component.put_entries()
            self._answer()
        except BaseException:
            self.detach()
            raise
        return self

    def prepare(self, entry: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Run:
        """Plan the only model for a call, and attach the plan, before it is called."""
        (component,) = self.components.values()
        component.prepare(entry, args, kwargs)
        return self

    @property
    def plan(self) -> Plan:
        """The plan of the model that ran last."""
        return self._latest().plan

    @property
    def plans(self) -> dict[str, Plan]:
        """The plan that each model follows now, of those that were called."""
        return {name: executor.plan for name, executor in self.executors.items()}

    @property
    def budget_bytes(self) -> int:
        """The budget: of what is known so far, if it was given as a share of the weights."""
        known = [served.plan.budget_bytes for component in self.components.values() for served in component.plans]
        return self._budget.total_bytes(self._weight_bytes, 0) if not known else max(known)

    @property
    def stats(self) -> Stats:
        """The totals of all models. The peak is the highest one, with what the others held at that time."""
        total = Stats(peak_bytes=self._peak_bytes)
        for executor in self.executors.values():
            for each in fields(Stats):
                if each.name != "peak_bytes":
                    setattr(total, each.name, getattr(total, each.name) + getattr(executor.stats, each.name))
        return total

    def timeline(self) -> Timeline:
        """The measured timeline of the last forwards of the model that ran last."""
        return self._latest().timeline()

    def explain(self) -> str:
        """What was decided for each model, in words."""
        texts = []
        for name, component in self.components.items():
            plan = component.plan
            what = "not called yet: it is planned at its first call" if plan is None else plan.explain()
            texts.append(f"{name}\n{what}" if name else what)
        return "\n\n".join(texts)

    @contextmanager
    def request(self) -> Iterator[Run]:
        """One request: `program` begins anew."""
        self.program = ()
        yield self

    def replan(self, budget_gb: float | str) -> None:
        """Go on with another budget. Each model is planned for it at its next call; its weights stay in their homes."""
        budget = parse_budget(budget_gb)
        self._refuse_while_running("replan")
        self._budget, self._peak_bytes = budget, 0
        for component in self.components.values():
            component.plans.clear()

    def weights_changed(self) -> None:
        """Say that you edited weights in a way that torch does not count. The next forwards load all weights again."""
        for executor in self.executors.values():
            if executor.is_attached:
                executor.weights_changed()

    def pause(self) -> None:
        """Free the device's memory, until `resume`."""
        self._refuse_while_running("pause")
        for executor in self.executors.values():
            if executor.is_attached and not executor.is_paused:
                executor.pause()
        self.is_paused = True

    def resume(self) -> None:
        """End a pause. Each model takes its memory again when it is called."""
        self.is_paused = False

    def detach(self) -> None:
        """Put all models back as they were found."""
        self._refuse_while_running("detach")
        with ExitStack() as steps:
            steps.callback(self._fall_silent)
            for component in self.components.values():
                steps.callback(component.remove)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.detach()

    # What components call.

    def trace(self, component: Component, entry: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Trace:
        """What one call needs."""
        with _named(component, entry):
            self.traced = _who(component, entry)
            try:
                return component.planning.trace(component.model, entry, args, kwargs)
            finally:
                self.traced = None

    def planned(self, component: Component, trace: Trace) -> Served:
        """A plan for a trace. If this is not the first one of its kind, it leaves room to grow, where there is some."""
        rest = trace.activation_bytes + component.planning.margin_bytes(trace)
        budget = self._budget.total_bytes(self._weight_bytes, rest)
        grows = any(served.plan.trace.entry == trace.entry for served in component.plans)
        more = int(trace.activation_bytes * (HEADROOM - 1)) if grows else 0
        with _named(component, trace.entry):
            try:
                plan = component.planning.plan(trace, budget, more)
            except BudgetError:
                if not more:
                    raise
                plan, more = component.planning.plan(trace, budget, 0), 0
        return Served(plan, trace, trace.activation_bytes + more)

    def make_room(self, component: Component, plan: Plan) -> None:
        """Let other models give memory back until a plan fits beside them; who was used longest ago comes first."""
        if component in self._order:
            self._order.remove(component)
        self._order.append(component)
        others = [other for other in self._order if other is not component and other.arena_bytes]
        held = sum(other.held_bytes for other in others)
        for other in sorted(others, key=attrgetter("is_running")):  # stable: the order of use otherwise
            if plan.peak_bytes + held <= plan.budget_bytes:
                return
            if other.is_running:
                raise ExecutionError(
                    f"{_who(component, plan.trace.entry)} is called while {other.name} runs, and the budget of "
                    f"{readable(plan.budget_bytes)} does not hold both: give more, or offload them apart"
                )
            held -= other.held_bytes
            assert other.executor is not None
            other.executor.pause()

    def has_run(self, component: Component, entry: str) -> None:
        """Note what a model used."""
        others = sum(other.held_bytes for other in self._order if other is not component)
        if component.executor is not None:
            most, planned = component.executor.stats.peak_bytes, component.executor.plan.peak_bytes
            used = most if most > self._most.get(component.name, 0) else min(most, planned)
            self._most[component.name] = most
            self._peak_bytes = max(self._peak_bytes, used + others)
        if self.program and self.program[-1][:2] == (component.name, entry):
            name, method, times = self.program[-1]
            self.program = (*self.program[:-1], (name, method, times + 1))
        else:
            self.program = (*self.program[1 - PHASES :], (component.name, entry, 1))

    def _refuse_while_running(self, what: str) -> None:
        for component in self.components.values():
            if component.is_running:
                raise ExecutionError(f"cannot {what} while {component.name or 'the model'} runs")

    @contextmanager
    def silent(self) -> Iterator[None]:
        """Let `model.device` say what it says without us."""
        self._fall_silent()
        try:
            yield
        finally:
            self._answer()

    def _answer(self) -> None:
        if self._device.type != "cpu":
            self._answers = [ModelDevice(component.model, self._device) for component in self.components.values()]

    def _fall_silent(self) -> None:
        while self._answers:
            self._answers.pop().remove()

    @property
    def executors(self) -> dict[str, Executor]:
        """The executors of the models that were called, also after they were detached."""
        found = {name: component.executor for name, component in self.components.items()}
        return {name: executor for name, executor in found.items() if executor is not None}

    def _latest(self) -> Executor:
        executor = self._order[-1].executor if self._order else None
        if executor is None:
            raise ExecutionError("nothing has run yet, so there is no plan: call the model or the pipeline first")
        return executor


@contextmanager
def _named(component: Component, entry: str) -> Iterator[None]:
    """Let errors say which component they are about."""
    try:
        yield
    except BudgetError as error:
        raise BudgetError(f"{_who(component, entry)}: {error}", error.smallest_bytes) from error
    except OffloadError as error:
        raise type(error)(f"{_who(component, entry)}: {error}") from error


def _who(component: Component, entry: str) -> str:
    return f"{component.name or type(component.model).__name__}.{entry}"


def _steps(trace: Trace) -> list[tuple[str, Any, Any]]:
    return [(call.name, call.reads, call.writes) for call in trace.calls]


def _names(model: nn.Module) -> frozenset[str]:
    return frozenset(name for name, _ in named_tensors(model))


def _weight_bytes(models: Iterable[nn.Module]) -> int:
    """The bytes of the seats of all weights of all models, tied ones once."""
    tensors = [tensor for model in models for _, tensor in named_tensors(model)]
    places = {(t.untyped_storage()._cdata, t.storage_offset()): t.nbytes for t in tensors}
    return sum(map(aligned, places.values()))


def _device_of(wanted: Any) -> torch.device:
    """The device that torch will name where forwards run."""
    if wanted is None:
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    if isinstance(wanted, str | torch.device):
        device = torch.device(wanted) if str(wanted).startswith("cuda") else torch.device("cpu")
        return torch.device("cuda", torch.cuda.current_device()) if device == torch.device("cuda") else device
    return torch.device(getattr(wanted, "device", "cpu"))


class _Called(StandIn):
    """A method of a model that begins a forward: it may need a plan."""

    is_offloading = False  # a trace finds the model without it

    def __init__(self, component: Component, name: str) -> None:
        super().__init__(component.model, name, None)
        self._component, self.run = component, component.run

    @property
    def original(self) -> Callable[..., Any]:
        """The method that this one stands in for."""
        return self._method()

    def uncover(self) -> None:
        """Put back what was there before."""
        if self._own is None:
            del vars(self._module)[self.name]
        else:
            vars(self._module)[self.name] = self._own

    def cover_with(self, outermost: Any) -> None:
        """Stand in for what is there now; the model holds `outermost`: this, or what a user has put around it."""
        self._own = vars(self._module).get(self.name)
        vars(self._module)[self.name] = outermost

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.is_removed:
            return self._method()(*args, **kwargs)
        return self._component.call(self, args, kwargs)


def run_of(model: nn.Module) -> list[Run]:
    """The runs that a model, or a part of it, belongs to."""
    called = [value for module in model.modules() for value in vars(module).values() if isinstance(value, _Called)]
    return list(dict.fromkeys(one.run for one in called if not one.is_removed))


def entries_of(model: nn.Module) -> list[str]:
    """The methods of a model that may begin a forward: `forward`, and what its own classes offer besides.

    >>> entries_of(nn.Linear(1, 1))
    ['forward']
    """
    found: dict[str, None] = {"forward": None}
    for kind in type(model).__mro__:
        library = kind.__module__.startswith(LIBRARIES) or kind.__name__.endswith("Mixin")
        if kind is nn.Module or library:
            continue
        for name, value in vars(kind).items():
            is_known = name in ("encode", "decode") or (name.startswith("get_") and name.endswith("_features"))
            if is_known and inspect.isfunction(value):
                found[name] = None
    return list(found)
