"""Several models with one budget: a pipeline. Each is planned when it is first called, with what it is called with.

pipe(prompt)     ->  text_encoder.forward  ->  trace, plan, attach; the device is its own
                 ->  transformer.forward   ->  trace, plan, attach; the text encoder gives its memory back
                 ->  transformer.forward   ->  as planned
                 ->  vae.decode            ->  trace, plan, attach
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from operator import attrgetter
from types import TracebackType
from typing import Any

import torch
from torch import nn

from ..devices import check_device
from ..errors import BudgetError, ExecutionError
from ..foreign import refuse_foreign_hooks
from ..nouns.budget import Budget, parse_budget, readable
from ..nouns.timeline import Timeline
from ..nouns.trace import Trace
from ..nouns.weights import named_tensors
from ..plan.plan import Plan, aligned
from .component import Called, Component, Part, Served, named, who
from .executor import Executor, attached_to
from .measured import Stats
from .model_device import ModelDevice

PHASES = 64  # that are remembered of a program
HEADROOM = 1.25  # times the activations: what a call that needs more than the ones before gets beyond that


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
        with named(component, entry):
            self.traced = who(component, entry)
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
        with named(component, trace.entry):
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
                    f"{who(component, plan.trace.entry)} is called while {other.name} runs, and the budget of "
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


def run_of(model: nn.Module) -> list[Run]:
    """The runs that a model, or a part of it, belongs to."""
    called = [value for module in model.modules() for value in vars(module).values() if isinstance(value, Called)]
    return list(dict.fromkeys(one.run for one in called if not one.is_removed))


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
