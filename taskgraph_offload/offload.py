"""The front door: `offload` plans and attaches in one call, `detach` detaches without a handle."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import nn

from .errors import ExecutionError, SettingsError, shown
from .nouns.budget import parse_budget
from .nouns.trace import Trace
from .nouns.weights import named_tensors
from .plan.plan import Plan
from .runtime.component import Part
from .runtime.executor import Executor, attached_to
from .runtime.run import Run, run_of

EXECUTOR_ARGUMENTS = ("device", "link_bytes_per_second", "lazy", "preload")


def offload(
    target: Any,
    budget_gb: float | str | None = None,
    *,
    inputs: Any = None,
    settings: str | os.PathLike[str] | None = None,
    components: Mapping[str, Mapping[str, Any]] | None = None,
    exclude: Collection[str] = (),
    **arguments: Any,
) -> Run:
    """Offload a model, a dict of models, or a pipeline; `arguments` are those of `Planner` and of `Executor`.

    Each model of the target is planned when it is first called, for what it is called with, and again when a call needs
    more memory; with `inputs`, the only one is planned for them and attached at once. All models share the budget:
    whoever is called gets what it needs, and the others give memory back.

    `components` has arguments of single models, by name: `{"vae": {"strategy": "resident"}}`. `settings` is a file with
    all of this (see `planner.settings`); what is given here comes first. Models named in `exclude` are left alone.

    If a plan is attached to the target already, the new one replaces it. If there is an error, the old plan stays.

    >>> import torch
    >>> models = {name: torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(8))) for name in ("one", "other")}
    >>> run = offload(models, "50%", device="cpu")
    >>> y = models["other"](models["one"](torch.ones(1, 64)))
    >>> run.program
    (('one', 'forward', 1), ('other', 'forward', 1))
    >>> run.detach()
    """
    ours = {key: arguments.pop(key) for key in EXECUTOR_ARGUMENTS if key in arguments}
    models = _models_to_offload(target, components or {}, exclude)
    if inputs is not None and (len(models) > 1 or not isinstance(target, nn.Module)):
        raise SettingsError(
            f"inputs= is for one model, and a {type(target).__name__} holds {len(models)}: leave it out, each model is "
            "planned for what it is called with"
        )
    everyone, single = ({}, {}) if settings is None else _arguments_in(settings, models)
    in_file = everyone.pop("budget_gb", None)
    if (budget := in_file if budget_gb is None else budget_gb) is None:
        raise SettingsError("how much memory? Give a budget, as in budget_gb=12, or a settings file that has one")
    if str(ours.get("device", "")).startswith(("cpu", "checked")):
        everyone = {"machine": "cpu", **everyone}
    plannings = {
        name: _Planning(
            model, budget, {**everyone, **single.get(name, {}), **arguments, **(components or {}).get(name, {})}
        )
        for name, model in models.items()
    }
    before = [_Attached(one) for one in _replaceable(models)]
    for one in before:
        one.attached.detach()
    parts = {name: Part(models[name], planning, (planning.entry,)) for name, planning in plannings.items()}
    run = Run(parts, parse_budget(budget), **ours)
    try:
        run.attach()
        for planning in plannings.values() if inputs is not None else ():
            run.prepare(planning.entry, *planning.call_with(inputs))
        return run
    except BaseException:
        run.detach()
        for one in before:
            one.put_back()
        raise


def detach(target: Any) -> None:
    """Detach every plan from a model, from the models in a dict, or from the components of a pipeline.

    This needs no handle from `offload`. It does nothing if nothing is attached.

    >>> import torch
    >>> model, x = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(8))), torch.ones(1, 64)
    >>> _ = offload(model, "50%", inputs=(x,), device="cpu")
    >>> detach(model)
    """
    for part in _attached(components_of(target)):
        part.detach()


def components_of(target: Any) -> dict[str, nn.Module]:
    """The models of a pipeline, of a dict or of any object, by name. Those that are inside of another one are left out.

    >>> components_of({"unet": nn.Linear(1, 1), "scheduler": None})
    {'unet': Linear(in_features=1, out_features=1, bias=True)}
    """
    if isinstance(target, nn.Module):
        return {"": target}
    held = target if isinstance(target, Mapping) else getattr(target, "components", None)
    if not isinstance(held, Mapping):
        held = getattr(target, "__dict__", {})
    models = {str(name): value for name, value in held.items() if isinstance(value, nn.Module)}
    inner = {module for model in models.values() for module in model.modules() if module is not model}
    found: dict[str, nn.Module] = {}
    for name, model in models.items():
        if model not in inner and model not in found.values():
            found[name] = model
    if not found:
        raise SettingsError(f"a {type(target).__name__} holds no model; give a torch.nn.Module, a dict or a pipeline")
    return found


class _Planning:
    """The planner of one model, as a run asks for it. `arguments` are those of `Planner`, which are checked here."""

    def __init__(self, model: nn.Module, budget_gb: float | str, arguments: dict[str, Any]) -> None:
        import taskgraph_offload as tgo

        self._model, self._planner = model, tgo.Planner
        machine = tgo.Planner(model, budget_gb, **arguments).machine
        self._arguments = {**arguments, "machine": machine}
        self.entry: str = arguments.get("entry", "forward")
        self._of_traces = {key: value for key, value in self._arguments.items() if key not in ("blocks", "entry")}

    def call_with(self, inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments that a user describes as `inputs`: positional ones, and those by keyword."""
        return self._planner(self._model, "100%", inputs=inputs).inputs

    def trace(self, model: nn.Module, entry: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Trace:
        """What one call needs."""
        arguments = {**self._arguments, "entry": entry}
        return self._planner(model, "100%", inputs=(args, dict(kwargs)), **arguments).trace

    def plan(self, trace: Trace, budget_bytes: int, reserved_bytes: int) -> Plan:
        """A plan for a trace. `reserved_bytes` stay free besides, for calls that need more."""
        margin = self.margin_bytes(trace) + reserved_bytes
        arguments = {**self._of_traces, "margin": f"{margin}B" if margin else 0}
        return self._planner.for_trace(trace, f"{budget_bytes}B", **arguments).plan()

    def margin_bytes(self, trace: Trace) -> int:
        """What the device needs for itself."""
        return self._planner.for_trace(trace, "100%", **self._of_traces).margin_bytes


def _models_to_offload(target: Any, components: Iterable[str], exclude: Collection[str]) -> dict[str, nn.Module]:
    """The models of a target that have weights, without those that the user leaves out."""
    models = components_of(target)
    _check_names(models, components, "components=")
    _check_names(models, exclude, "exclude=")
    wanted = {name: model for name, model in models.items() if name not in exclude}
    found = {name: model for name, model in wanted.items() if not name or _has_weights(model)}
    if not found:
        raise SettingsError(f"nothing of this {type(target).__name__} is left to offload: the rest holds no weights")
    return found


def _arguments_in(
    path: str | os.PathLike[str], models: Mapping[str, nn.Module]
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The arguments that a settings file gives for all models, with the budget, and those for single ones."""
    from .planner.settings import read_all_settings

    everyone, components = read_all_settings(path)
    _check_names(models, components, f"settings file {os.fspath(path)}")
    single = {name: each.arguments() for name, each in components.items()}
    return {**everyone.arguments(), "budget_gb": everyone.budget}, single


def _has_weights(model: nn.Module) -> bool:
    return next(named_tensors(model), None) is not None


def _check_names(models: Mapping[str, nn.Module], names: Iterable[str], where: str) -> None:
    for name in names:
        if name not in models:
            known = ", ".join(models) if "" not in models else "none: it is one model"
            raise SettingsError(f"{where}: no component {shown(name)}; there are {known}")


class _Attached:
    """What was attached before, as it was."""

    def __init__(self, attached: Executor | Run) -> None:
        self.attached, self._was_paused = attached, attached.is_paused

    def put_back(self) -> None:
        """Attach it again."""
        self.attached.attach()
        if self._was_paused:
            self.attached.pause()


def _attached(models: Mapping[str, nn.Module]) -> list[Executor | Run]:
    """The runs, and the executors that belong to no run, that are attached to these models or to parts of them."""
    runs = dict.fromkeys(run for model in models.values() for run in run_of(model))
    theirs = {executor for run in runs for executor in run.executors.values()}
    alone = dict.fromkeys(executor for model in models.values() for executor in attached_to(model))
    return [*runs, *(executor for executor in alone if executor not in theirs)]


def _replaceable(models: Mapping[str, nn.Module]) -> list[Executor | Run]:
    """What is attached to these models or to parts of them. It must not be attached to more than them."""
    parts = {module for model in models.values() for module in model.modules()}
    found = _attached(models)
    asked = ", ".join(type(model).__name__ for model in models.values())
    for one in found:
        theirs = one.models if isinstance(one, Run) else {"": one.model}
        if not parts.issuperset(theirs.values()):
            held = " and ".join(name or f"a {type(model).__name__}" for name, model in theirs.items())
            raise ExecutionError(
                f"this {asked} is part of {held} that is attached: detach that first, with taskgraph_offload.detach"
            )
    return found
