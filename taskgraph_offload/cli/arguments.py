"""What can be typed, and the help for it. Knows the commands by name, and runs none."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import NoReturn

from taskgraph_offload.planner.settings import ACCEPTED
from taskgraph_offload.planner.strategies import names as strategy_names
from taskgraph_offload.planner.strict_yaml import scalar

from ..nouns.machine import Machine
from ..nouns.names import printable
from . import commands, running
from .console import Answer
from .examples import SIZES
from .models import DTYPES
from .words import ABOUT, EXAMPLES, JSON_KEYS

PROGRAM = "taskgraph-offload"
MOST_POINTS = 100  # of a sweep: more than a curve can show
COMMANDS: Mapping[str, tuple[Callable[[argparse.Namespace], Answer], str]] = {
    "plan": (commands.plan, "decide what stays, what streams and when; predict the step"),
    "compare": (commands.compare, "one budget with every strategy that people use"),
    "sweep": (commands.sweep, "step time against budget: how much memory is enough?"),
    "run": (running.run, "run a model by its plan; set measured beside predicted"),
    "show": (commands.show, "read a saved plan, prove it again, look at it"),
}


class _Parser(argparse.ArgumentParser):
    """Says what was wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {printable(message)} (see {self.prog} --help)\n")


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = _Parser(PROGRAM, description=ABOUT, epilog=_epilog(""), formatter_class=_formatter)
    every = top.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=_Parser)
    for name in COMMANDS:
        _PARTS[name](command := _command(every, name))
        _add_output(command)
    return top


def _command(every: argparse._SubParsersAction[_Parser], name: str) -> argparse.ArgumentParser:
    command, about = COMMANDS[name]
    needs = "plan.yaml" if name == "show" else "(MODEL | --config FILE)"
    added = every.add_parser(
        name,
        help=about,
        usage=f"{PROGRAM} {name} {needs}{' --budget SIZE' * (name not in ('show', 'sweep'))} [options]",
        description=f"{about[0].upper()}{about[1:].rstrip('?')}.\nWhat is usual stands in [brackets].",
        epilog=_epilog(name),
        formatter_class=_formatter,
    )
    added.set_defaults(answer=command, command=name, parser=added)
    return added


def _add_plan(to: argparse.ArgumentParser) -> None:
    _add_model(to)
    _add_decision(to)
    _add_files(to)


def _add_compare(to: argparse.ArgumentParser) -> None:
    _add_model(to)
    group = _add_decision(to, one_strategy=False)
    _add_strategies(group, "all")
    _add_picture(to)


def _add_sweep(to: argparse.ArgumentParser) -> None:
    _add_model(to)
    group = _add_decision(to, one_strategy=False, one_budget=False)
    _add_strategies(group, " ".join(commands.SWEPT))
    group.add_argument("--budgets", nargs="+", metavar="SIZE", help="which [from the least that works to all]")
    group.add_argument("--points", type=_points, default=9, metavar="N", help="how many, where none are listed [9]")
    _add_picture(to)


def _add_run(to: argparse.ArgumentParser) -> None:
    _add_model(to)
    _add_decision(to)
    group = to.add_argument_group("the run")
    group.add_argument("--device", metavar="NAME", help="cuda, cuda:1 or cpu [cuda where there is one]")
    group.add_argument("--steps", type=_steps, default=4, metavar="N", help="forwards; the first one is cold [4]")
    group.add_argument("--link", type=_rate, metavar="GB/S", help="pace the copies of the cpu device like a link")
    _add_files(to)


def _add_show(to: argparse.ArgumentParser) -> None:
    group = to.add_argument_group("the plan")
    group.add_argument("plan", metavar="plan.yaml", help="a file that `plan --save` wrote")
    group.add_argument("--model", metavar="module:factory", help="check that the plan is for this model, too")
    form = to.add_argument_group("another view").add_mutually_exclusive_group()
    form.add_argument("--grid", action="store_true", help="a line for each call: what it waits for, what is copied")
    form.add_argument("--text", action="store_true", help="every seat and every task, as the file has them")


_PARTS = {"plan": _add_plan, "compare": _add_compare, "sweep": _add_sweep, "run": _add_run, "show": _add_show}


def _add_output(to: argparse.ArgumentParser) -> None:
    group = to.add_argument_group("output")
    group.add_argument("--json", action="store_true", help="print one JSON object instead; its keys are below")
    group.add_argument("--traceback", action="store_true", help="when something fails, show where")


def _add_picture(to: argparse.ArgumentParser) -> None:
    to.add_argument_group("files to write").add_argument(
        "--picture", metavar="FILE", help="the table, drawn: .png or .svg"
    )


def _add_model(to: argparse.ArgumentParser) -> None:
    group = to.add_argument_group("the model, one of")
    group.add_argument(
        "model", nargs="?", metavar="MODEL", help="module:factory, a function that gives a model or (model, inputs)"
    )
    group.add_argument("--config", metavar="FILE", help="a config.json of diffusers or transformers")
    sizes = to.add_argument_group("with --config, the inputs of one forward [what is usual for the model]")
    for name, meaning in SIZES.items():
        sizes.add_argument(f"--{name}", type=_positive, metavar="N", help=meaning)
    sizes.add_argument("--dtype", choices=DTYPES, metavar="NAME", help=f"{', '.join(DTYPES)} [as the config says]")


def _add_decision(
    to: argparse.ArgumentParser, one_strategy: bool = True, one_budget: bool = True
) -> argparse._ArgumentGroup:
    group = to.add_argument_group("the decision")
    if one_budget:
        group.add_argument(
            "--budget", metavar="SIZE", help="of device memory, for everything: 12GiB, 800MiB, or 30%% of the weights"
        )
    group.add_argument("--machine", metavar="NAME", help=f"{', '.join(Machine.presets())} [the one at hand]")
    if one_strategy:
        group.add_argument("--strategy", metavar="NAME", help=f"{', '.join(strategy_names())} [auto]")
        group.add_argument(
            "--option",
            action="append",
            type=_option,
            default=[],
            metavar="KEY=VALUE",
            help="of the strategy; may be repeated",
        )
    group.add_argument(
        "--settings", metavar="FILE", help=f"YAML, with any of {', '.join(ACCEPTED)}; what is typed wins"
    )
    group.add_argument("--component", metavar="NAME", help="what --settings says for this part of a pipeline")
    return group


def _add_strategies(group: argparse._ArgumentGroup, usual: str) -> None:
    group.add_argument(
        "--strategies", nargs="+", type=_choice, metavar="NAME", help=f'which, as auto "layerwise prefetch=2" [{usual}]'
    )


def _add_files(to: argparse.ArgumentParser) -> None:
    group = to.add_argument_group("files to write")
    group.add_argument("--save", metavar="FILE", help="the plan, as YAML; `show` reads it")
    group.add_argument("--timeline", metavar="FILE", help="a picture of what overlaps and what waits: .png or .svg")
    group.add_argument("--trace", metavar="FILE", help="the same as JSON for ui.perfetto.dev")


def _option(text: str) -> tuple[str, object]:
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE, as prefetch=2")
    return key, scalar(value)


def _choice(text: str) -> tuple[str, dict[str, object]]:
    name, *options = text.split() or [""]
    return name, dict(map(_option, options))


def _positive(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 on")
    return int(text)


def _steps(text: str) -> int:
    if (number := _positive(text)) < 2:
        raise argparse.ArgumentTypeError("at least 2 are needed")
    return number


def _points(text: str) -> int:
    if (number := _steps(text)) > MOST_POINTS:
        raise argparse.ArgumentTypeError(f"at most {MOST_POINTS}, since each is planned; for others, list --budgets")
    return number


def _rate(text: str) -> float:
    value = scalar(text)
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of GB/s, as 4 or 0.5")
    return float(value)


def _epilog(command: str) -> str:
    keys = f"\n\nkeys of --json:\n{JSON_KEYS[command]}" if command else ""
    codes = "\n\nexit codes: 0 fine; 1 refused, with one line on stderr; 2 wrong usage"
    return f"examples:\n{EXAMPLES[command]}{keys}{codes}"


def _formatter(prog: str) -> argparse.HelpFormatter:
    return argparse.RawDescriptionHelpFormatter(prog, max_help_position=26)
