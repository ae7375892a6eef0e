"""The text form of a plan: printed for people, read back for files and tests. It decides nothing.

strategy layerwise prefetch=1
budget 4194304 margin 0 arena 2097152
bundle a at 0: a.0 a.1
bundle embed at 1048576 resident: embed.weight
cold:
  h2d a
  compute a
steady:
  compute a

A program's cycle is in stretches, each of which is repeated:

lend 4096 to vae
bundle a.0 at 0 for encoder: a.0
steady:
  27 times unet:
    compute unet.a
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..errors import PlanError
from ..nouns.graph import Task, quoted, tokens
from ..nouns.program import stretches
from .plan import Bundle

if TYPE_CHECKING:
    from .plan import Plan

MOST_TASKS = 300_000  # of a cycle in a file: a program of 128 steps of 80 blocks has about 40,000

_NAME = r'("(?:[^"\\]|\\.)*"|[^\s"]+?)'
_STRETCH = re.compile(rf"\s*(\d+) times {_NAME}:\s*$")


@dataclass(frozen=True, slots=True)
class PlanText:
    """What the text form of a plan holds: all decisions, and nothing of the trace."""

    strategy: str
    options: dict[str, Any]
    budget_bytes: int
    margin_bytes: int
    arena_bytes: int
    bundles: dict[str, Bundle]
    cold: tuple[Task, ...]
    steady: tuple[Task, ...]
    lent: dict[str, int]


def print_plan(plan: Plan) -> str:
    """The text form of a plan."""
    options = [f" {key}={json.dumps(value)}" for key, value in plan.options.items()]
    lines = [
        f"strategy {plan.strategy}{''.join(options)}",
        f"budget {plan.budget_bytes} margin {plan.margin_bytes} arena {plan.arena_bytes}",
        *(f"lend {nbytes} to {_component(component)}" for component, nbytes in plan.lent.items()),
        *map(_print_bundle, plan.bundles.values()),
    ]
    for title, tasks in (("cold:", plan.cold), ("steady:", plan.steady)):
        lines.append(title)
        for stretch in stretches(tasks, plan.trace):
            if plan.trace.program:
                lines.append(f"  {stretch.times} times {_component(stretch.component)}:")
            lines += [f"    {task}" if plan.trace.program else f"  {task}" for task in stretch.tasks]
    return "\n".join(lines) + "\n"


def parse_plan(text: str) -> PlanText:
    """Read the text form of a plan; the error for a line that makes no sense names its number."""
    found = _Found()
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                _read_line(line, found)
            except PlanError as error:
                raise PlanError(f"line {number} of the plan: {error}") from None
    for name, there in (("strategy", found.strategy), ("budget", found.sizes)):
        if not there:
            raise PlanError(f"the plan has no line that starts with {name!r}")
    for name in ("cold:", "steady:"):
        if name not in found.cycles:
            raise PlanError(f"the plan has no {name!r}")
    return PlanText(
        strategy=found.strategy,
        options=found.options,
        budget_bytes=found.sizes["budget"],
        margin_bytes=found.sizes["margin"],
        arena_bytes=found.sizes["arena"],
        bundles=found.bundles,
        cold=found.tasks("cold:"),
        steady=found.tasks("steady:"),
        lent=found.lent,
    )


@dataclass
class _Found:
    """What was read so far; `current` are the tasks that the next ones belong to, of a stretch of a cycle."""

    strategy: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    bundles: dict[str, Bundle] = field(default_factory=dict)
    lent: dict[str, int] = field(default_factory=dict)
    cycles: dict[str, list[tuple[int, list[Task]]]] = field(default_factory=dict)  # stretches: how often, and tasks
    current: list[tuple[int, list[Task]]] | None = None

    def tasks(self, cycle: str) -> tuple[Task, ...]:
        """All tasks of a cycle."""
        stretches = self.cycles[cycle]
        if sum(times * len(tasks) for times, tasks in stretches) > MOST_TASKS:
            raise PlanError(f"the plan has more than {MOST_TASKS} tasks in a cycle")
        return tuple(task for times, tasks in stretches for task in tasks * times)


def _read_line(line: str, found: _Found) -> None:
    word = line.split()[0]
    if word in ("cold:", "steady:"):
        if word in found.cycles:
            raise PlanError(f"{word!r} comes twice")
        found.current = found.cycles.setdefault(word, [(1, [])])
    elif found.current is not None and (stretch := _STRETCH.match(line)):
        found.current.append((int(stretch[1]), []))
    elif found.current is not None:
        found.current[-1][1].append(Task.parse(line))
    elif word == "strategy":
        found.strategy, found.options = _parse_strategy(line)
    elif word == "budget":
        found.sizes = _parse_sizes(line)
    elif word == "lend":
        nbytes, component = _parse_lent(line)
        found.lent[component] = nbytes
    elif word == "bundle":
        bundle = _parse_bundle(line)
        if bundle.name in found.bundles:
            raise PlanError(f"bundle {bundle.name!r} comes twice")
        found.bundles[bundle.name] = bundle
    else:
        raise PlanError(f"a line starts with strategy, budget, lend, bundle, cold: or steady:, not {word!r}")


def _print_bundle(bundle: Bundle) -> str:
    mark = "" if bundle.component is None else f" for {_component(bundle.component)}"
    mark += " resident" if bundle.resident else ""
    return f"bundle {quoted(bundle.name)} at {bundle.offset}{mark}: {' '.join(map(quoted, bundle.weights))}"


def _component(name: str) -> str:
    """The name of a component; in quotes where it could be read as something else."""
    return json.dumps(name) if ":" in name else quoted(name)


def _parse_bundle(line: str) -> Bundle:
    head = re.match(rf"\s*bundle {_NAME} at (\d+)(?: for {_NAME})?( resident)?:", line)
    if head is None:
        raise PlanError(f"cannot read {line.strip()!r}; a bundle reads like 'bundle blocks.0 at 512 resident: w1 w2'")
    component = None if head[3] is None else tokens(head[3])[0]
    return Bundle(tokens(head[1])[0], tuple(tokens(line[head.end() :])), int(head[2]), head[4] is not None, component)


def _parse_lent(line: str) -> tuple[int, str]:
    found = re.fullmatch(rf"\s*lend (\d+) to {_NAME}\s*", line)
    if found is None:
        raise PlanError(f"cannot read {line.strip()!r}; it reads like 'lend 4096 to vae'")
    return int(found[1]), tokens(found[2])[0]


def _parse_strategy(line: str) -> tuple[str, dict[str, Any]]:
    head = re.fullmatch(r'\s*strategy (\S+)((?: \w+=(?:"(?:[^"\\]|\\.)*"|\S+))*)\s*', line)
    try:
        pairs = re.findall(r'(\w+)=("(?:[^"\\]|\\.)*"|\S+)', head[2] if head else "")
        options = {key: json.loads(value) for key, value in pairs}
    except ValueError:
        head = None
    if head is None:
        raise PlanError(f"cannot read {line.strip()!r}; it reads like 'strategy layerwise prefetch=1'")
    return head[1], options


def _parse_sizes(line: str) -> dict[str, int]:
    found = re.fullmatch(r"\s*budget (\d+) margin (\d+) arena (\d+)\s*", line)
    if found is None:
        raise PlanError(f"cannot read {line.strip()!r}; it reads like 'budget 4096 margin 0 arena 2048'")
    return dict(zip(("budget", "margin", "arena"), map(int, found.groups()), strict=True))
