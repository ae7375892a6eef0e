"""What a person can type, and the help for it. This module runs no command."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NoReturn

from taskgraph_offload.planner.settings import ACCEPTED
from taskgraph_offload.planner.strategies import names as strategy_names
from taskgraph_offload.planner.strict_yaml import scalar

from .. import __version__
from ..nouns.machine import Machine
from ..nouns.names import printable
from . import commands
from .answers import Answer
from .inputs import SIZES
from .models import DTYPES

PROGRAM = "taskgraph-offload"
MOST_POINTS = 100  # of a sweep: a curve cannot show more

ABOUT = """\
Run PyTorch models whose weights do not fit in fast memory, and know before
the run how fast it will be. Only `run` needs weights. No command needs a GPU,
and some well-known models come with this program: see `models`."""

EXIT_CODES = "exit codes: 0 success; 1 refused, with one line on stderr; 2 wrong usage"

EXAMPLES = """\
  How would Wan2.1-14B run in 12 GiB of an RTX 4090?
    taskgraph-offload plan wan2.1-14b --budget 12GiB --machine rtx4090
  How much memory is enough for Flux.1-dev?
    taskgraph-offload sweep flux1-dev --machine rtx4090"""

FIGURES = "step_seconds, cold_seconds, compute_seconds, stall_seconds, overlap,\n    peak_bytes"
KEYS_OF_PLAN = f"""\
  command, model, trace (fake, real or symbolic), inputs, machine,
  program (empty for one model; for a pipeline, what a request runs, each:
    model, times; then a step is a request in all other keys),
  strategy, options, budget_bytes, arena_bytes, activation_bytes,
  margin_bytes, peak_bytes, weight_bytes, resident_bytes,
  streamed_bytes (in each step),
  predicted:
    {FIGURES}
  bound:
    step_seconds, cold_seconds, block_step_seconds, block_cold_seconds
  outlook (or null):
    no_stall_bytes, one_more_gib_step_seconds"""
KEYS_OF_COMPARE = f"""\
  command, model, inputs, machine, budget_bytes,
  rows, the fastest first, each:
    strategy, budget_bytes, bound_seconds, streamed_bytes,
    {FIGURES}, measured_step_seconds (null),
    error (null, or why the plan does not fit),
    smallest_bytes (null, or the smallest budget that works)"""
KEYS_OF_SWEEP = """\
  command, model, inputs, machine,
  rows, each:
    strategy, budget_bytes, step_seconds (null where it does not fit),
    bound_seconds, peak_bytes
  enough_bytes, for each strategy: from this budget on, more memory makes
    the step less than 5% faster"""
KEYS_OF_RUN = f"""\
  the keys of plan, and device,
  measured:
    {FIGURES}
  stats:
    h2d_bytes, d2h_bytes, copies, demand_loads, divergences,
    skipped_spills, peak_bytes"""
KEYS_OF_SHOW = """\
  the keys of plan without inputs, and verified (true),
  tasks of a steady step, in the order of issue, each:
    kind, name, nbytes, text"""
KEYS_OF_MODELS = """\
  command, rows, each:
    name, model, weight_bytes, inputs"""

EXAMPLES_OF_PLAN = """\
  taskgraph-offload plan flux1-dev --budget 12GiB --machine rtx4090
  taskgraph-offload plan ./FLUX.1-dev --budget 12GiB --machine rtx4090
  taskgraph-offload plan --config config.json --tokens 2048 \\
      --budget 30% --machine h100
  taskgraph-offload plan my_models:build --budget 8GiB \\
      --strategy layerwise --option prefetch=2
  taskgraph-offload plan my_models:build --settings offload.yaml \\
      --save plan.yaml --timeline plan.png"""
EXAMPLES_OF_COMPARE = """\
  taskgraph-offload compare flux1-dev --budget 12GiB --machine rtx4090
  taskgraph-offload compare my_models:build --budget 8GiB \\
      --strategies auto keep "layerwise prefetch=2 residents=spread"
  taskgraph-offload compare my_models:build --budget 8GiB --json"""
EXAMPLES_OF_SWEEP = """\
  taskgraph-offload sweep wan2.1-14b --machine rtx4090
  taskgraph-offload sweep my_models:build --budgets 4GiB 8GiB 12GiB \\
      --strategies auto sequential --picture sweep.png"""
EXAMPLES_OF_RUN = """\
  taskgraph-offload run my_models:build --budget 2GiB --device cuda
  taskgraph-offload run my_models:build --budget 50% --device cpu \\
      --link 4 --timeline run.png

The cpu device uses a region of RAM in place of GPU memory, and --link sets
the speed of its copies. A model of --config runs with random weights."""
EXAMPLES_OF_SHOW = """\
  taskgraph-offload show plan.yaml
  taskgraph-offload show plan.yaml --grid
  taskgraph-offload show plan.yaml --text | grep h2d
  taskgraph-offload show plan.yaml --model my_models:build"""
EXAMPLES_OF_MODELS = """\
  taskgraph-offload models

A name that is listed here needs neither weights nor other libraries. With
other sizes, as in `plan flux1-dev --height 512`, the model is traced anew:
that needs diffusers or transformers."""


class _Parser(argparse.ArgumentParser):
    """Says what was wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {printable(message)} (see {self.prog} --help)\n")


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = _Parser(
        PROGRAM, description=ABOUT, epilog=f"examples:\n{EXAMPLES}\n\n{EXIT_CODES}", formatter_class=_formatter
    )
    top.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    every = top.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=_Parser)
    for name, command in COMMANDS.items():
        added = every.add_parser(
            name,
            help=command.about,
            usage=f"{PROGRAM} {name} {command.needs}".rstrip() + " [options]",
            description=f"{command.about[0].upper()}{command.about[1:]}.\nDefaults are in [brackets].",
            epilog=f"examples:\n{command.examples}\n\nkeys of --json:\n{command.keys}\n\n{EXIT_CODES}",
            formatter_class=_formatter,
        )
        added.set_defaults(answer=command.answer, command=name, parser=added)
        command.add_arguments(added)
        _add_output(added)
    return top


# The arguments of each command


def _add_plan(to: argparse.ArgumentParser) -> None:
    _add_model(to)
    _add_request(to)
    _add_decision(to)
    _add_files(to)


def _add_compare(to: argparse.ArgumentParser) -> None:
    _add_model(to)
    _add_request(to)
    group = _add_decision(to, one_strategy=False)
    _add_strategies(group, "all")
    _add_picture(to)


def _add_sweep(to: argparse.ArgumentParser) -> None:
    _add_model(to)
    _add_request(to)
    group = _add_decision(to, one_strategy=False, one_budget=False)
    _add_strategies(group, " ".join(commands.SWEPT))
    group.add_argument(
        "--budgets", nargs="+", metavar="SIZE", help="which ones [from the smallest that works to all weights]"
    )
    group.add_argument("--points", type=_points, default=9, metavar="N", help="how many, without --budgets [9]")
    _add_picture(to)


def _add_run(to: argparse.ArgumentParser) -> None:
    _add_model(to)
    _add_decision(to)
    group = to.add_argument_group("the run")
    group.add_argument("--device", metavar="NAME", help="cuda, cuda:1 or cpu [cuda if there is one]")
    group.add_argument("--steps", type=_steps, default=4, metavar="N", help="number of forwards; the first is cold [4]")
    group.add_argument("--link", type=_rate, metavar="GB/S", help="slow the copies of the cpu device down to this rate")
    _add_files(to)


def _add_show(to: argparse.ArgumentParser) -> None:
    group = to.add_argument_group("the plan")
    group.add_argument("plan", metavar="plan.yaml", help="a file that `plan --save` wrote")
    group.add_argument("--model", metavar="MODULE:FACTORY", help="check that the plan was made for this model")
    form = to.add_argument_group("another view").add_mutually_exclusive_group()
    form.add_argument("--grid", action="store_true", help="one line for each call: its times, and what is copied")
    form.add_argument("--text", action="store_true", help="every seat and every task, as in the file")


def _add_models(to: argparse.ArgumentParser) -> None:
    """The list takes no argument of its own."""


@dataclass(frozen=True)
class Command:
    """One command: what answers it, and everything that its help says."""

    answer: Callable[[argparse.Namespace], Answer]
    about: str
    needs: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    examples: str
    keys: str


COMMANDS: Mapping[str, Command] = {
    "plan": Command(
        commands.plan,
        "decide which weights stay, which stream, and when; predict the step",
        "MODEL --budget SIZE",
        _add_plan,
        EXAMPLES_OF_PLAN,
        KEYS_OF_PLAN,
    ),
    "compare": Command(
        commands.compare,
        "plan for one budget with every strategy, and compare the steps",
        "MODEL --budget SIZE",
        _add_compare,
        EXAMPLES_OF_COMPARE,
        KEYS_OF_COMPARE,
    ),
    "sweep": Command(
        commands.sweep,
        "plan for many budgets, and show how much memory is enough",
        "MODEL",
        _add_sweep,
        EXAMPLES_OF_SWEEP,
        KEYS_OF_SWEEP,
    ),
    "run": Command(
        commands.run,
        "run a model under a plan; compare what was measured with what was predicted",
        "MODEL --budget SIZE",
        _add_run,
        EXAMPLES_OF_RUN,
        KEYS_OF_RUN,
    ),
    "show": Command(
        commands.show,
        "load a saved plan, prove it again, and print it",
        "plan.yaml",
        _add_show,
        EXAMPLES_OF_SHOW,
        KEYS_OF_SHOW,
    ),
    "models": Command(
        commands.models,
        "list the models that can be planned by name",
        "",
        _add_models,
        EXAMPLES_OF_MODELS,
        KEYS_OF_MODELS,
    ),
}


# Groups of arguments that several commands share


def _add_output(to: argparse.ArgumentParser) -> None:
    group = to.add_argument_group("output")
    group.add_argument("--json", action="store_true", help="print one JSON object; its keys are listed below")
    group.add_argument("--traceback", action="store_true", help="show where in the code an error was raised")


def _add_picture(to: argparse.ArgumentParser) -> None:
    group = to.add_argument_group("files to write")
    group.add_argument("--picture", metavar="FILE", help="a picture of the table: .png or .svg")


def _add_model(to: argparse.ArgumentParser) -> None:
    group = to.add_argument_group("the model, one of")
    group.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="a name from `taskgraph-offload models`; or a directory that diffusers or transformers saved, with or "
        "without weights; or module:factory, a function in a Python module that returns a model or (model, inputs)",
    )
    group.add_argument("--config", metavar="FILE", help="a config.json of diffusers or transformers")
    sizes = to.add_argument_group("the inputs of one forward, for a name, a directory or --config [the usual ones]")
    for name, meaning in SIZES.items():
        sizes.add_argument(f"--{name}", type=_positive, metavar="N", help=meaning)
    sizes.add_argument(
        "--dtype",
        choices=DTYPES,
        metavar="NAME",
        help=f"{', '.join(DTYPES)} [as in the config; bfloat16 for a pipeline]",
    )


def _add_request(to: argparse.ArgumentParser) -> None:
    group = to.add_argument_group("a request, for the directory of a pipeline")
    group.add_argument("--steps", type=_positive, metavar="N", help="number of denoising steps [as the pipeline does]")
    group.add_argument("--exclude", nargs="+", default=[], metavar="NAME", help="models that the request does not run")


def _add_decision(
    to: argparse.ArgumentParser, one_strategy: bool = True, one_budget: bool = True
) -> argparse._ArgumentGroup:
    group = to.add_argument_group("the decision")
    if one_budget:
        group.add_argument(
            "--budget",
            metavar="SIZE",
            help="device memory for weights and activations: 12GiB, 800MiB; or 30%% of the weights",
        )
    group.add_argument("--machine", metavar="NAME", help=f"{', '.join(Machine.presets())} [this machine]")
    if one_strategy:
        group.add_argument("--strategy", metavar="NAME", help=f"{', '.join(strategy_names())} [auto]")
        group.add_argument(
            "--option",
            action="append",
            type=_option,
            default=[],
            metavar="KEY=VALUE",
            help="an option of the strategy; may be repeated",
        )
    group.add_argument(
        "--settings",
        metavar="FILE",
        help=f"YAML with any of {', '.join(ACCEPTED)}; arguments win over the file",
    )
    group.add_argument("--component", metavar="NAME", help="use what --settings says for this part of a pipeline")
    return group


def _add_strategies(group: argparse._ArgumentGroup, default: str) -> None:
    group.add_argument(
        "--strategies",
        nargs="+",
        type=_choice,
        metavar="NAME",
        help=f'which ones, such as auto "layerwise prefetch=2" [{default}]',
    )


def _add_files(to: argparse.ArgumentParser) -> None:
    group = to.add_argument_group("files to write")
    group.add_argument("--save", metavar="FILE", help="the plan, as YAML; `show` reads it")
    group.add_argument("--timeline", metavar="FILE", help="a picture of computes, copies and waits: .png or .svg")
    group.add_argument("--trace", metavar="FILE", help="the timeline as JSON for ui.perfetto.dev")


# Values


def _option(text: str) -> tuple[str, object]:
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE; write it like prefetch=2")
    return key, scalar(value)


def _choice(text: str) -> tuple[str, dict[str, object]]:
    name, *options = text.split() or [""]
    return name, dict(map(_option, options))


def _positive(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above zero")
    return int(text)


def _steps(text: str) -> int:
    if (number := _positive(text)) < 2:
        raise argparse.ArgumentTypeError("at least 2 are needed")
    return number


def _points(text: str) -> int:
    if (number := _steps(text)) > MOST_POINTS:
        raise argparse.ArgumentTypeError(f"at most {MOST_POINTS} are planned; or list the budgets with --budgets")
    return number


def _rate(text: str) -> float:
    value = scalar(text)
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of GB/s; write it like 4 or 0.5")
    return float(value)


def _formatter(prog: str) -> argparse.HelpFormatter:
    return argparse.RawDescriptionHelpFormatter(prog, max_help_position=26)
