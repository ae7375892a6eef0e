"""From parsed arguments to what the library takes: settings, a model with inputs, a planner."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace
from typing import NoReturn

from taskgraph_offload.planner import Planner
from taskgraph_offload.planner.settings import Settings, read_settings

from ..errors import TraceError
from .console import working
from .examples import SIZES
from .files import check_files
from .models import Subject, from_config, from_factory

EVERYTHING = "100%"  # the budget of a command that asks about all budgets


def settings_of(arguments: Namespace) -> Settings:
    """What the settings file says, and over it what was typed. Options belong to a strategy, and go with it."""
    check_files(arguments)
    if arguments.component is not None and arguments.settings is None:
        _wrong_usage(arguments, "--component is a part of the --settings file; give that too")
    settings = Settings() if arguments.settings is None else read_settings(arguments.settings, arguments.component)
    strategy = getattr(arguments, "strategy", None)
    if strategy not in (None, settings.strategy):
        settings = replace(settings, strategy=strategy, options={})
    typed = {"budget": getattr(arguments, "budget", None), "machine": arguments.machine}
    options = {**settings.options, **dict(getattr(arguments, "option", ()))}
    settings = replace(settings, options=options, **{key: value for key, value in typed.items() if value is not None})
    if settings.budget is None and "budget" in arguments:
        _wrong_usage(arguments, "give --budget, as 12GiB, or --settings with a budget")
    return settings


def subject_of(arguments: Namespace, device: str = "meta") -> Subject:
    """The model that was named, built on a device if it comes from a configuration."""
    if (arguments.model is None) == (arguments.config is None):
        _wrong_usage(arguments, "name one model, before the options: module:factory, or --config FILE")
    sizes = {name: getattr(arguments, name) for name in SIZES if getattr(arguments, name) is not None}
    if arguments.model is not None:
        if sizes or arguments.dtype:
            _wrong_usage(
                arguments, f"--{next(iter(sizes), 'dtype')} is for --config; module:factory gives its own inputs"
            )
        with working(f"building {arguments.model}"):
            return from_factory(arguments.model)
    with working(f"building {arguments.config}"):
        return from_config(arguments.config, sizes, device, arguments.dtype)


def planner_of(arguments: Namespace, settings: Settings, subject: Subject) -> Planner:
    """A planner that has traced the model."""
    planner = Planner(subject.model, settings.budget or EVERYTHING, inputs=subject.inputs, **settings.arguments())
    name = type(subject.model).__name__
    try:
        with working(f"tracing {name}"):
            _ = planner.trace
    except TraceError as error:
        if subject.inputs is not None:
            raise
        raise TraceError(
            f"how {name} is called is not known here, and without inputs it cannot be traced; "
            "name a module:factory that gives (model, inputs)"
        ) from error
    return planner


def _wrong_usage(arguments: Namespace, message: str) -> NoReturn:
    arguments.parser.error(message)
    raise SystemExit
