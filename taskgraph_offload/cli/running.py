"""The command that runs a model: a plan for this machine, a few forwards, what they took and what was promised."""

from __future__ import annotations

import os
from argparse import Namespace
from dataclasses import asdict, replace

import torch
from torch import Tensor, nn

from taskgraph_offload.planner.capture.inputs import Inputs, example_of, read_inputs

from ..devices import check_device
from ..errors import SettingsError
from ..nouns.budget import readable
from ..nouns.machine import Machine
from ..nouns.timeline import Timeline
from ..plan.plan import Plan
from ..runtime.executor import Executor
from . import documents, pages
from .asked import planner_of, settings_of, subject_of
from .commands import planned, write_files
from .console import Answer, one_by_one, working
from .models import Subject

GB = 1e9


def run(arguments: Namespace) -> Answer:
    """Run the model for some steps by its plan, and see whether the plan kept its promise."""
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    link = None if arguments.link is None else arguments.link * GB
    check_device(device, link)
    settings = settings_of(arguments)
    machine = settings.machine
    if machine is None:
        with working(f"measuring {device}"):
            machine = Machine.measure(device)
    settings = replace(settings, machine=_paced(Machine.of(machine), link))
    subject = _with_weights(arguments)
    made = planned(planner_of(arguments, settings, subject))
    given = _inputs_on(subject, made, "cpu" if device.startswith("checked") else device)
    with Executor(subject.model, made, device=device, link_bytes_per_second=link) as executor:
        for _ in one_by_one(range(arguments.steps), "running"):
            _forward(subject.model, made, given)
        measured = executor.timeline()
    predicted = made.predict(arguments.steps)
    write_files(arguments, made, predicted, measured)
    inputs = subject.described(made.trace.source)
    return Answer(
        document=lambda: {
            **documents.of_plan(made),
            "inputs": inputs,
            "device": device,
            **_figures(measured, executor),
        },
        show=lambda console: pages.show_run(console, made, inputs, predicted, measured, executor.stats),
    )


def _figures(measured: Timeline, executor: Executor) -> documents.Document:
    figures = measured.figures() | {"peak_bytes": executor.stats.peak_bytes}
    return {"measured": figures, "stats": asdict(executor.stats)}


def _paced(machine: Machine, link: float | None) -> Machine:
    """The machine behind a link that is no faster than this."""
    if link is None:
        return machine
    h2d, d2h = min(link, machine.h2d_bytes_per_second), min(link, machine.d2h_bytes_per_second)
    return replace(machine, h2d_bytes_per_second=h2d, d2h_bytes_per_second=d2h)


def _with_weights(arguments: Namespace) -> Subject:
    """The model with weights in memory: random ones, where it comes from a configuration."""
    subject = subject_of(arguments)
    if arguments.config is None:
        return subject
    nbytes, memory = _nbytes(subject.model), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if nbytes > memory:
        raise SettingsError(
            f"{arguments.config}: {readable(nbytes)} of weights do not fit in this machine's {readable(memory)} of RAM;"
            " `plan` needs none of them"
        )
    return subject_of(arguments, "cpu")


def _nbytes(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def _inputs_on(subject: Subject, made: Plan, device: str) -> Inputs:
    def moved(tensor: Tensor) -> Tensor:
        return tensor.to(device)

    given = example_of(subject.model, made.trace.entry) if subject.inputs is None else read_inputs(subject.inputs)
    if given is None:
        raise SettingsError(
            f"{type(subject.model).__name__} comes without inputs; let the factory give (model, inputs)"
        )
    return given.converted(moved)


def _forward(model: nn.Module, made: Plan, inputs: Inputs) -> None:
    entry = model if made.trace.entry == "forward" else getattr(model, made.trace.entry)
    with torch.no_grad():
        entry(*inputs.args, **(inputs.kwargs or {}))
