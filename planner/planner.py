"""The planner: from a model (or a trace) and a budget to a plan that is proved before anyone sees it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import replace
from functools import cached_property
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from taskgraph_offload.errors import SettingsError, shown
from taskgraph_offload.nouns.budget import GIB, Budget, parse_budget
from taskgraph_offload.nouns.machine import Machine
from taskgraph_offload.nouns.program import Program, checked_program, program_trace, within
from taskgraph_offload.nouns.reports import Comparison, Sweep
from taskgraph_offload.nouns.timeline import Timeline
from taskgraph_offload.nouns.trace import Trace
from taskgraph_offload.plan.plan import Outlook, Plan, aligned

from . import strategies
from .assemble import make_plan, unproved_plan
from .bound import smallest_budget_without_stall
from .calibrate import measured_machine, measured_trace, with_seconds_of
from .capture import capture, read_inputs
from .compare import Choice, budgets_between, compare, sweep
from .strategies import Request

if TYPE_CHECKING:
    import torch

ALLOCATOR_SHARE = 0.05  # of the activations: what a GPU's caching allocator may waste in rounding and fragments
TOY = 4  # a model with less weights than so many times what CUDA's libraries take is a toy, its plan is to look at


class Planner:
    """Turns a model and a memory budget into a plan.

    `budget_gb` is GiB, or a text: "12GiB", "800MiB", "123456B", "30%" (of the weights; activations come on top).
    `inputs` is a tuple, a dict, `(args, kwargs)`, or a callable that returns one of them. `options` are those of the
    strategy, and `margin` (written like a budget, or 0) for what the device needs besides. On a GPU it is 5% of the
    activations, for the allocator, and the machine's `library_bytes`, unless the model is a toy with less than four
    times as many bytes of weights; on the CPU it is nothing.

    For a whole request of a pipeline, `model` is a dict of its models. `program` has pairs: a model, or a method of one
    as in "vae.decode", and how often it runs in a row. `inputs` is a dict with the inputs of each.

    >>> import torch
    >>> model = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(8)))
    >>> plan = Planner(model, "40KiB", inputs=(torch.ones(1, 64),), strategy="layerwise", machine="cpu").plan()
    >>> plan.strategy, len(plan.residents)
    ('layerwise', 0)
    """

    def __init__(
        self,
        model: torch.nn.Module | Mapping[str, torch.nn.Module],
        budget_gb: float | str,
        *,
        inputs: Any = None,
        entry: str = "forward",
        strategy: str = strategies.DEFAULT,
        machine: Machine | str | None = None,
        blocks: Sequence[str] | None = None,
        program: Sequence[tuple[str, int]] | None = None,
        **options: Any,
    ) -> None:
        self._settle(budget_gb, strategy, machine, options)
        self._model, self._inputs, self._entry, self._blocks = model, inputs, entry, blocks
        self._program = _checked_program(model, inputs, program)

    @classmethod
    def from_settings(
        cls,
        path: str | os.PathLike[str],
        model: torch.nn.Module,
        *,
        inputs: Any = None,
        component: str | None = None,
    ) -> Planner:
        """A planner with the values of a settings file (see `planner.settings`), for all or for one component."""
        from .settings import read_settings

        settings = read_settings(path, component)
        if settings.budget is None:
            raise SettingsError(f"settings file {os.fspath(path)}: the key 'budget' is missing")
        return cls(model, settings.budget, inputs=inputs, **settings.arguments())

    @classmethod
    def for_trace(
        cls,
        trace: Trace,
        budget_gb: float | str,
        *,
        strategy: str = strategies.DEFAULT,
        machine: Machine | str | None = None,
        **options: Any,
    ) -> Planner:
        """A planner without a model, for a trace made by hand or kept from an earlier capture."""
        planner = cls.__new__(cls)
        planner._settle(budget_gb, strategy, machine, options)
        planner.__dict__["trace"] = trace
        return planner

    @classmethod
    def for_program(
        cls,
        traces: Mapping[str, Trace],
        program: Sequence[tuple[str, int]],
        budget_gb: float | str,
        *,
        strategy: str = strategies.DEFAULT,
        machine: Machine | str | None = None,
        **options: Any,
    ) -> Planner:
        """A planner for whole requests: `program` has pairs of a component, one of `traces`, and how often it runs.

        The same name in two traces is one weight.

        >>> block = {"name": "block", "seconds": 1e-3}
        >>> traces = {name: Trace.from_units([{**block, "tensors": {name: 2**20}}]) for name in ("clip", "unet")}
        >>> plan = Planner.for_program(traces, [("clip", 1), ("unet", 4)], "1MiB", machine="cpu").plan()
        >>> plan.streamed_bytes == 2 * 2**20
        True
        """
        return cls.for_trace(program_trace(traces, program), budget_gb, strategy=strategy, machine=machine, **options)

    def _settle(
        self, budget: float | str, strategy: str, machine: Machine | str | None, options: dict[str, Any]
    ) -> None:
        """Check everything that can be checked before a model is touched."""
        margin = options.pop("margin", None)
        self._budget: Budget = parse_budget(budget)
        self._margin: Budget | None = None if margin is None else parse_margin(margin)
        strategies.check_options(strategy, options)
        self._strategy, self._options = strategy, options
        self.machine = Machine.of(machine)
        self._latest: Plan | None = None  # what `plan` gave last
        self._incumbent: Plan | None = None  # the plan to beat, with measured costs

    @property
    def inputs(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of the call that is planned: positional ones, and those by keyword."""
        if isinstance(self._model, Mapping):
            raise SettingsError("several models are planned: each has inputs of its own")
        given = read_inputs(self._inputs)
        return given.args, dict(given.kwargs or {})

    @cached_property
    def trace(self) -> Trace:
        """What the model's forward needs, or a whole request; captured when first asked for."""
        if isinstance(self._model, Mapping):
            return self._request_trace(self._model)
        return capture(self._model, self._inputs, entry=self._entry, blocks=self._blocks, on_cpu=self._runs_on_cpu)

    def _request_trace(self, models: Mapping[str, torch.nn.Module]) -> Trace:
        traces: dict[str, Trace] = {}
        for phase in dict(self._program):
            component, entry = _model_and_entry(phase, models)
            inputs = (self._inputs or {}).get(phase)
            trace = capture(models[component], inputs, entry=entry, blocks=self._blocks, on_cpu=self._runs_on_cpu)
            traces[phase] = within(component, trace)
        owners: dict[str, str] = {}
        for phase, trace in traces.items():
            component, _ = _model_and_entry(phase, models)
            for name in trace.weights:
                if owners.setdefault(name, component) != component:
                    raise SettingsError(f"{owners[name]!r} and {component!r} both have a weight {name!r}: rename one")
        return program_trace(traces, self._program)

    @property
    def _runs_on_cpu(self) -> bool:
        return self.machine.name.startswith("cpu")

    @property
    def margin_bytes(self) -> int:
        """The bytes that the plan leaves free for the device itself: for its allocator, and for CUDA's libraries."""
        if self._margin is not None:
            return self._margin.total_bytes(self.trace.weight_bytes, 0)
        if self._runs_on_cpu or self.trace.source == "units":
            return 0
        libraries = int(self.machine.library_bytes)
        if self.trace.weight_bytes < TOY * libraries:
            libraries = 0
        return int(self.trace.activation_bytes * ALLOCATOR_SHARE) + libraries

    @property
    def budget_bytes(self) -> int:
        """The budget in bytes, for everything: arena, activations and margin."""
        return self._bytes_of(self._budget)

    def _bytes_of(self, budget: Budget) -> int:
        seats = sum(map(aligned, map(attrgetter("nbytes"), self.trace.weights.values())))
        return budget.total_bytes(seats, self.trace.activation_bytes + self.margin_bytes)

    def plan(self) -> Plan:
        """Make a plan and prove it. The plan also says what more memory would bring."""
        plan = make_plan(self._request(), self.budget_bytes)
        if self._incumbent is not None and self._incumbent.settled_seconds <= plan.settled_seconds:
            plan = replace(self._incumbent, bound=plan.bound)
        self._latest = replace(plan, outlook=self._outlook(plan))
        return self._latest

    def calibrate(self, timeline: Timeline) -> Planner:
        """A planner with measured figures: the seconds of each call and the rate of the link.

        It makes a new plan only if that predicts a shorter step with these figures. Else it returns this planner's
        latest plan, with these figures.
        """
        cuts = [self.trace] if self._latest is None else [self.trace, self._latest.trace]
        measured, calibrated = measured_trace(cuts, self.machine, timeline), copy(self)
        calibrated.__dict__["trace"] = with_seconds_of(self.trace, measured)
        calibrated.machine = measured_machine(self.machine, timeline)
        if self._latest is not None:
            trace = with_seconds_of(self._latest.trace, measured)
            calibrated._incumbent = replace(self._latest, trace=trace, machine=calibrated.machine)
        return calibrated

    def compare(self, strategies: Sequence[Choice] | str | None = None) -> Comparison:
        """Plan with several strategies, by default with all of them: names, or pairs of a name and its options."""
        strategies = [strategies] if isinstance(strategies, str) else strategies
        return compare(self._request(), self.budget_bytes, strategies)

    def sweep(
        self, budgets: Sequence[float | str] | int | str, strategies: Sequence[Choice] | str | None = None
    ) -> Sweep:
        """Plan under several budgets; a number means that many budgets, from the smallest to where everything fits."""
        strategies = [strategies] if isinstance(strategies, str) else strategies
        if isinstance(budgets, int):
            return sweep(self._request(), self.budgets(budgets, strategies), strategies)
        if isinstance(budgets, str):
            budgets = [budgets]
        elif isinstance(budgets, float):
            raise SettingsError(f"a sweep takes a list of budgets, or a number of steps from 2 on, not {budgets!r}")
        return sweep(self._request(), [self._bytes_of(parse_budget(budget)) for budget in budgets], strategies)

    def budgets(self, steps: int, strategies: Sequence[Choice] | None = None) -> list[int]:
        """`steps` budgets in bytes, from the smallest that works to where everything fits."""
        return budgets_between(self._request(), steps, strategies)

    def _request(self) -> Request:
        return Request(self.trace, self.machine, self._strategy, self._options, self.margin_bytes)

    def _outlook(self, plan: Plan) -> Outlook:
        """The budget from which nothing stalls, and the step with one GiB more.

        That step is planned, unless the strategy has a quicker guess.
        """
        more, step_with = plan.budget_bytes + GIB, strategies.find(self._strategy).step_with
        if step_with is None:
            with_more = unproved_plan(self._request(), more).settled_seconds
        else:
            with_more = step_with(self._request(), more, plan)
        enough = smallest_budget_without_stall(self.trace, self.machine) + self.margin_bytes
        return Outlook(enough, with_more)


def _checked_program(
    model: torch.nn.Module | Mapping[str, torch.nn.Module], inputs: Any, program: Sequence[tuple[str, int]] | None
) -> Program:
    """The phases of a request; none for one model."""
    if not isinstance(model, Mapping):
        if program is not None:
            raise SettingsError("program= is for a dict of models; one model alone is called once in a step")
        return ()
    if program is None:
        raise SettingsError(
            f"how often does each of {', '.join(model)} run in a request? Give program=, such as "
            f"[{', '.join(f'({name!r}, 1)' for name in model)}]"
        )
    phases = checked_program(program)
    for phase, _ in phases:
        _model_and_entry(phase, model)
    known = dict(phases)
    if inputs is not None and not isinstance(inputs, Mapping):
        raise SettingsError("the inputs of several models are a dict: for each phase of the program, its inputs")
    for phase in inputs or {}:
        if phase not in known:
            raise SettingsError(f"inputs for {shown(phase)}, but the program has {', '.join(sorted(known))}")
    return phases


def _model_and_entry(phase: str, models: Mapping[str, torch.nn.Module]) -> tuple[str, str]:
    """The model of a phase and the method that it runs: "vae.decode" is the method `decode` of "vae"."""
    if phase in models:
        return phase, "forward"
    component, _, entry = phase.rpartition(".")
    if component not in models:
        raise SettingsError(f"the program runs {shown(phase)}, but there are {', '.join(models)}")
    return component, entry


def parse_margin(value: float | str) -> Budget:
    """A margin is written like a budget, and may be zero."""
    if value == 0 and not isinstance(value, bool):
        return Budget(nbytes=0)
    try:
        return parse_budget(value)
    except SettingsError:
        raise SettingsError(
            f"margin {shown(value)} is no amount of memory; write it like a budget: '200MiB', or 0"
        ) from None
