"""The commands: each takes parsed arguments, calls the library, and returns an answer. Refusals are errors."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor, nn

import taskgraph_offload as tgo
from taskgraph_offload.planner import Planner
from taskgraph_offload.planner.capture.tracing import Inputs, example_of, read_inputs
from taskgraph_offload.planner.compare import everything
from taskgraph_offload.planner.settings import Settings, read_settings
from taskgraph_offload.planner.strategies import DEFAULT

from ..devices import check_device
from ..errors import BudgetError, SettingsError, TraceError
from ..nouns.budget import readable
from ..nouns.machine import Machine
from ..nouns.reports import Comparison, Sweep
from ..nouns.timeline import Timeline
from ..nouns.trace import Trace
from ..plan.plan import Plan
from ..runtime.executor import Executor
from . import answers
from .answers import Answer
from .inputs import SIZES
from .models import Subject, Traced, from_config, from_factory, from_name, known_names, known_trace
from .pipelines import INDEX, Asked, Pipeline, from_pipeline, is_pipeline
from .progress import one_by_one, working

CONFIG = "config.json"
GB = 1e9
EVERYTHING = "100%"  # the budget of a planner that is only asked about other budgets
SWEPT = (DEFAULT, "layerwise", "keep", "sequential")  # the default strategies of a sweep
PICTURES = (".png", ".svg")
SUFFIXES: Mapping[str, tuple[str, ...]] = {"timeline": PICTURES, "picture": PICTURES, "trace": (".json",)}
WRITTEN = ("save", *SUFFIXES)
READ = ("settings", "config")


# The commands


def plan(arguments: Namespace) -> Answer:
    """Plan for one budget."""
    planner, inputs = _planner(arguments)
    made = _planned(planner)
    _write_files(arguments, made, made.predict())
    return answers.of_plan(made, inputs)


def compare(arguments: Namespace) -> Answer:
    """Plan for one budget with many strategies."""
    planner, inputs = _planner(arguments)
    found = planner.compare(arguments.strategies or everything())
    if arguments.picture:
        found.save(arguments.picture)
    about = answers.Circumstances(planner.trace, planner.machine, inputs)
    return answers.of_comparison(about, planner.budget_bytes, found, fault=_none_fits(found))


def sweep(arguments: Namespace) -> Answer:
    """Plan for many budgets with some strategies."""
    planner, inputs = _planner(arguments)
    choices = arguments.strategies or [(name, {}) for name in SWEPT]
    budgets = arguments.budgets or [f"{nbytes}B" for nbytes in planner.budgets(arguments.points, choices)]
    found = planner.sweep(budgets, choices)
    if arguments.picture:
        found.save(arguments.picture)
    about = answers.Circumstances(planner.trace, planner.machine, inputs)
    return answers.of_sweep(about, found, fault=_fits_nowhere(found))


def run(arguments: Namespace) -> Answer:
    """Run the model for some steps under its plan, and compare the measured steps with the predicted ones."""
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    link = None if arguments.link is None else arguments.link * GB
    check_device(device, link)
    settings = _settings(arguments)
    settings = replace(settings, machine=_paced(_machine(settings, device), link))
    subject = _with_weights(arguments)
    made = _planned(_planner_of(settings, subject))
    given = _inputs_on(subject, made, "cpu" if device.startswith(("checked", "virtual")) else device)
    with Executor(subject.model, made, device=device, link_bytes_per_second=link) as executor:
        for _ in one_by_one("running", range(arguments.steps)):
            _forward(subject.model, made, given)
        measured = executor.timeline()
    predicted = made.predict(arguments.steps)
    _write_files(arguments, made, predicted, measured)
    return answers.of_run(made, subject.described(made.trace.source), device, predicted, measured, executor.stats)


def show(arguments: Namespace) -> Answer:
    """Load a saved plan. Loading proves it again."""
    model = None if arguments.model is None else from_factory(arguments.model).model
    with working(f"proving {arguments.plan}"):
        loaded = Plan.load(arguments.plan, model)
    return answers.of_saved_plan(loaded, "text" if arguments.text else "grid" if arguments.grid else "page")


def models(arguments: Namespace) -> Answer:
    """List the models that come with this package."""
    return answers.of_models({name: known_trace(name) for name in known_names()})


# From arguments to a planner


def _planner(arguments: Namespace) -> tuple[Planner, str]:
    """A planner that has its trace, and a description of the inputs."""
    settings = _settings(arguments)
    subject = _subject(arguments, settings)
    planner = _planner_of(settings, subject)
    return planner, subject.described(planner.trace.source)


def _settings(arguments: Namespace) -> Settings:
    """What the settings file says, overridden by arguments. A new strategy drops the options of the old one."""
    _check_files(arguments)
    if arguments.component is not None and arguments.settings is None:
        _wrong_usage(arguments, "--component names a part of the --settings file; give --settings too")
    settings = Settings() if arguments.settings is None else read_settings(arguments.settings, arguments.component)
    strategy = getattr(arguments, "strategy", None)
    if strategy not in (None, settings.strategy):
        settings = replace(settings, strategy=strategy, options={})
    typed = {"budget": getattr(arguments, "budget", None), "machine": arguments.machine}
    options = {**settings.options, **dict(getattr(arguments, "option", ()))}
    settings = replace(settings, options=options, **{key: value for key, value in typed.items() if value is not None})
    if settings.budget is None and "budget" in arguments:
        _wrong_usage(arguments, "give --budget, such as --budget 12GiB, or --settings with a budget")
    return settings


def _subject(arguments: Namespace, settings: Settings) -> Subject | Pipeline | Traced:
    """What was named: its trace, if the package has the right one; else the model or models on the meta device."""
    directory = _directory(arguments)
    if directory is not None and is_pipeline(directory):
        return _pipeline(arguments, settings, directory)
    for option, given in (("--steps", arguments.steps), ("--exclude", arguments.exclude)):
        if given:
            _wrong_usage(arguments, f"{option} is for the directory of a pipeline, with a model_index.json")
    as_traced = not _sizes(arguments) and arguments.dtype is None and _takes_whole_forward(settings)
    if arguments.config is None and arguments.model in known_names() and as_traced:
        return known_trace(arguments.model)
    return _built(arguments, "meta")


def _pipeline(arguments: Namespace, settings: Settings, directory: Path) -> Pipeline:
    """The models of a pipeline, and what a request runs."""
    if not _takes_whole_forward(settings):
        raise SettingsError("--settings: blocks and entry are for one model; plan it alone, as in DIR/transformer")
    asked = Asked(_sizes(arguments), arguments.steps, arguments.dtype, tuple(arguments.exclude))
    with working(f"building {directory}"):
        return from_pipeline(directory, asked)


def _takes_whole_forward(settings: Settings) -> bool:
    """Whether the settings leave the cut into blocks and the method to be traced as they are."""
    return settings.blocks is None and settings.entry == "forward"


def _built(arguments: Namespace, device: str) -> Subject:
    """The model that was named, on this device if this program builds it."""
    if (arguments.model is None) == (arguments.config is None):
        _wrong_usage(arguments, "give one model, before the options: MODEL, or --config FILE")
    sizes, name = _sizes(arguments), arguments.config or arguments.model
    with working(f"building {name}"):
        if (directory := _directory(arguments)) is not None:
            return from_config(_config_in(directory), sizes, device, arguments.dtype)
        if arguments.config is not None:
            return from_config(arguments.config, sizes, device, arguments.dtype)
        if arguments.model in known_names():
            return from_name(arguments.model, sizes, device, arguments.dtype)
        if sizes or arguments.dtype:
            option = next(iter(sizes), "dtype")
            _wrong_usage(
                arguments,
                f"--{option} is for known models, directories and --config; module:factory returns its own inputs",
            )
        return from_factory(arguments.model)


def _directory(arguments: Namespace) -> Path | None:
    """The directory that was named in place of a model. A known name is the known model."""
    if arguments.config is not None or arguments.model is None or arguments.model in known_names():
        return None
    path = Path(arguments.model)
    if path.is_file():
        raise SettingsError(f"{path} is a file; give the directory that it is in, or --config {path}")
    return path if path.is_dir() else None


def _config_in(directory: Path) -> str:
    path = directory / CONFIG
    if not path.is_file():
        raise SettingsError(
            f"{directory}: this directory has neither {INDEX} (a diffusers pipeline) nor {CONFIG} (one model)"
        )
    return str(path)


def _sizes(arguments: Namespace) -> dict[str, int]:
    return {name: getattr(arguments, name) for name in SIZES if getattr(arguments, name) is not None}


def _planner_of(settings: Settings, subject: Subject | Pipeline | Traced) -> Planner:
    """A planner that has its trace."""
    given, budget = settings.arguments(), settings.budget or EVERYTHING
    if not isinstance(subject, Subject):
        of_capture = ("blocks", "entry")
        trace = subject.trace if isinstance(subject, Traced) else _request_trace(subject, given["machine"])
        return Planner.for_trace(trace, budget, **{key: given[key] for key in given if key not in of_capture})
    if settings.entry == "forward":
        given["entry"] = subject.entry
    planner = Planner(subject.model, budget, inputs=subject.inputs, **given)
    name = type(subject.model).__name__
    try:
        with working(f"tracing {name}"):
            _ = planner.trace
    except TraceError as error:
        if subject.inputs is not None:
            raise
        raise TraceError(
            f"{name} cannot be traced without inputs, and its inputs are not known here; "
            "give a module:factory that returns (model, inputs)"
        ) from error
    return planner


def _request_trace(pipeline: Pipeline, machine: Machine | str | None) -> Trace:
    """The trace of a request, under the name of the pipeline."""
    models, inputs, program = dict(pipeline.models), pipeline.inputs, pipeline.program
    planner = Planner(models, EVERYTHING, inputs=inputs, program=program, machine=machine)
    with working(f"tracing {pipeline.name}"):
        return replace(planner.trace, model=pipeline.name)


def _planned(planner: Planner) -> Plan:
    with working("planning"):
        return planner.plan()


def _wrong_usage(arguments: Namespace, message: str) -> NoReturn:
    arguments.parser.error(message)
    raise SystemExit


# What `run` needs besides


def _machine(settings: Settings, device: str) -> Machine:
    """The machine of the settings, or this one, measured."""
    if settings.machine is not None:
        return Machine.of(settings.machine)
    with working(f"measuring {device}"):
        return Machine.measure(device)


def _paced(machine: Machine, link: float | None) -> Machine:
    """The machine with a link that is at most so fast."""
    if link is None:
        return machine
    h2d, d2h = min(link, machine.h2d_bytes_per_second), min(link, machine.d2h_bytes_per_second)
    return replace(machine, h2d_bytes_per_second=h2d, d2h_bytes_per_second=d2h)


def _with_weights(arguments: Namespace) -> Subject:
    """The model with weights in memory. Those of a configuration are random."""
    directory = _directory(arguments)
    if directory is not None and is_pipeline(directory):
        raise SettingsError(f"{directory}: `run` runs one model; give one of its models, as in {directory}/transformer")
    subject = _built(arguments, "meta")
    if arguments.config is None and directory is None and arguments.model not in known_names():
        return subject  # a factory returned it, with its own weights
    nbytes, memory = _nbytes(subject.model), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if nbytes > memory:
        raise SettingsError(
            f"{arguments.config or arguments.model}: {readable(nbytes)} of weights do not fit in the "
            f"{readable(memory)} of RAM of this machine; `plan` needs no weights"
        )
    return _built(arguments, "cpu")


def _nbytes(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def _inputs_on(subject: Subject, made: Plan, device: str) -> Inputs:
    def moved(tensor: Tensor) -> Tensor:
        return tensor.to(device)

    given = example_of(subject.model, made.trace.entry) if subject.inputs is None else read_inputs(subject.inputs)
    if given is None:
        raise SettingsError(
            f"{type(subject.model).__name__} comes without inputs; let the factory return (model, inputs)"
        )
    return given.converted(moved)


def _forward(model: nn.Module, made: Plan, inputs: Inputs) -> None:
    entry = model if made.trace.entry == "forward" else getattr(model, made.trace.entry)
    with torch.no_grad():
        entry(*inputs.args, **(inputs.kwargs or {}))


# Files


def _check_files(arguments: Namespace) -> None:
    """Refuse, before the work, files that could not be written after it."""
    taken: dict[Path, str] = {}
    for name in (*READ, *WRITTEN):
        if (given := getattr(arguments, name, None)) is None:
            continue
        path = Path(given)
        if name in WRITTEN:
            _check_place(name, path)
        if (other := taken.setdefault(path.resolve(), name)) != name:
            raise SettingsError(f"--{other} and --{name} name one file, {path}; give each a file of its own")


def _check_place(name: str, path: Path) -> None:
    if path.is_dir():
        raise SettingsError(f"--{name} {path}: this is a folder; give the name of a file in it")
    if not path.absolute().parent.is_dir():
        raise SettingsError(f"--{name} {path}: there is no folder {path.parent}; make it, or choose another")
    accepted = SUFFIXES.get(name)
    if accepted and path.suffix.lower() not in accepted:
        raise SettingsError(f"--{name} {path}: the name must end in {' or '.join(accepted)}")


def _write_files(arguments: Namespace, made: Plan, *timelines: Timeline) -> None:
    if arguments.save:
        made.save(arguments.save)
    if arguments.timeline:
        tgo.viz.save_timeline(arguments.timeline, *timelines)
    if arguments.trace:
        tgo.viz.save_trace(arguments.trace, *timelines)


# Where nothing fits


def _none_fits(found: Comparison) -> BudgetError | None:
    """If no strategy fits: an error that names the one which needs least, and how much it needs."""
    if any(row["smallest_bytes"] is None for row in found.rows):
        return None
    frugal = min(found.rows, key=lambda row: int(row["smallest_bytes"]))
    budget, least = frugal["budget_bytes"], frugal["smallest_bytes"]
    needs = f'the smallest that works is "{least}B" ({readable(least)}), with {frugal["strategy"]}'
    return BudgetError(f"a budget of {budget} bytes ({readable(budget)}) is too small for all of these: {needs}", least)


def _fits_nowhere(found: Sweep) -> SettingsError | None:
    if any(row["step_seconds"] is not None for row in found.rows):
        return None
    return SettingsError("no strategy fits into any of these budgets; without --budgets the smallest one fits")
