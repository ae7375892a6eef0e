"""The answer of each command, in two forms: a page for people, and an object for scripts (`--json`).

The keys of the objects never change their meaning. Sizes are bytes, times are seconds; a key that ends in `_seconds`
or `_bytes` holds a number, or null if the plan has no such figure.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from operator import itemgetter
from typing import Any, Literal, TypeAlias

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..errors import OffloadError
from ..nouns.budget import readable, readable_seconds
from ..nouns.graph import LANES
from ..nouns.machine import Machine
from ..nouns.names import printable, spoken
from ..nouns.reports import Comparison, Sweep, clock
from ..nouns.timeline import Interval, Span, Timeline, clip, length, union
from ..nouns.trace import Trace
from ..plan.explain import facts
from ..plan.plan import Plan
from ..runtime.measured import Stats
from .models import Traced
from .tables import ABSENT, Column, print_table

Row: TypeAlias = Mapping[str, Any]
Document: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True)
class Answer:
    """What a command found. `fault` is the error that the command ends with, after it has printed."""

    document: Callable[[], Document]
    show: Callable[[Console], None]
    fault: OffloadError | None = None


@dataclass(frozen=True)
class Circumstances:
    """What a comparison or a sweep was made for: the model, the machine, and a description of the inputs."""

    trace: Trace
    machine: Machine
    inputs: str

    def document(self) -> Document:
        """As an object."""
        return {"model": self.trace.model, "inputs": self.inputs, "machine": self.machine.to_dict()}

    def facts(self) -> list[tuple[str, str]]:
        """As pairs of a label and a text."""
        model = f"{self.trace.model}, {readable(self.trace.weight_bytes)} of weights, on {self.machine.name}"
        guessed = [("careful", GUESSED)] if self.trace.source == "symbolic" else []
        return [("model", model), ("inputs", self.inputs), *guessed]


GUESSED = "the forward was traced without shapes: all times and activations are guesses"


# The answers


def of_plan(plan: Plan, inputs: str) -> Answer:
    """`plan`: what was decided, and what is predicted."""
    return Answer(
        document=lambda: {**_plan_document(plan), "inputs": inputs},
        show=lambda console: _show_plan(console, plan, inputs),
    )


def of_saved_plan(plan: Plan, view: Literal["page", "grid", "text"]) -> Answer:
    """`show`: a loaded plan, so a proved one."""
    views = {"page": _show_proved, "grid": _show_grid, "text": _show_text}
    return Answer(
        document=lambda: {**_plan_document(plan), "verified": True, "tasks": _task_documents(plan)},
        show=lambda console: views[view](console, plan),
    )


def of_comparison(about: Circumstances, budget_bytes: int, found: Comparison, fault: OffloadError | None) -> Answer:
    """`compare`: a row for each strategy, the fastest first; `error` says why a strategy has no figures."""
    rows = [dict(row) for row in found.rows]
    return Answer(
        document=lambda: {**about.document(), "budget_bytes": budget_bytes, "rows": rows},
        show=lambda console: _show_comparison(console, about, found),
        fault=fault,
    )


def of_sweep(about: Circumstances, found: Sweep, fault: OffloadError | None) -> Answer:
    """`sweep`: a row for each strategy and budget; `enough_bytes` is where more memory gains nearly nothing."""
    rows = [dict(row) for row in found.rows]
    knees = {name: found.knee(name) for name in found.strategies}
    enough = {name: None if knee is None else knee["budget_bytes"] for name, knee in knees.items()}
    return Answer(
        document=lambda: {**about.document(), "rows": rows, "enough_bytes": enough},
        show=lambda console: _show_sweep(console, about, found),
        fault=fault,
    )


def of_run(plan: Plan, inputs: str, device: str, predicted: Timeline, measured: Timeline, stats: Stats) -> Answer:
    """`run`: the plan, what it predicted, and what was measured."""
    figures = measured.figures() | {"peak_bytes": stats.peak_bytes}
    document = {"inputs": inputs, "device": device, "measured": figures, "stats": asdict(stats)}
    return Answer(
        document=lambda: {**_plan_document(plan), **document},
        show=lambda console: _show_run(console, plan, inputs, predicted, measured, stats),
    )


def of_models(found: Mapping[str, Traced]) -> Answer:
    """`models`: a row for each model that comes with the package."""
    rows = [
        {
            "name": name,
            "model": known.trace.model,
            "weight_bytes": known.trace.weight_bytes,
            "inputs": known.note,
        }
        for name, known in found.items()
    ]
    columns: list[Column[Row]] = [
        Column("name", itemgetter("name"), words=True),
        Column("weights", lambda row: readable(row["weight_bytes"])),
        Column("inputs of one forward", itemgetter("inputs"), words=True),
    ]
    return Answer(document=lambda: {"rows": rows}, show=lambda console: print_table(console, rows, columns))


def as_typed(text: str) -> str:
    """A text of the library in which arguments have the form that they have on the command line.

    >>> as_typed("device='cpu' runs every plan anywhere")
    '--device cpu runs every plan anywhere'
    """
    for argument, typed in TYPED.items():
        text = re.sub(argument, typed, text)
    return text


TYPED: Mapping[str, str] = {
    r"device='([^']*)'": r"--device \1",
    r"link_bytes_per_second=\S+": "--link",
    r"([Gg]ive|[Pp]ass) inputs=": r"\1 a module:factory that returns (model, inputs), with inputs",
    r"inputs=": "what module:factory returns as inputs",
    r"(blocks|entry)=": r"in --settings, \1: ",
}


# Objects


def _plan_document(plan: Plan) -> Document:
    weights = plan.trace.weights
    return {
        "model": plan.trace.model,
        "program": [{"model": name, "times": times} for name, times in plan.trace.program],
        "trace": plan.trace.source,
        "machine": plan.machine.to_dict(),
        "strategy": plan.strategy,
        "options": dict(plan.options),
        "budget_bytes": plan.budget_bytes,
        "arena_bytes": plan.arena_bytes,
        "activation_bytes": max(plan.activation_bytes),
        "margin_bytes": plan.margin_bytes,
        "peak_bytes": plan.peak_bytes,
        "weight_bytes": plan.trace.weight_bytes,
        "resident_bytes": sum(weights[name].nbytes for name in plan.residents),
        "streamed_bytes": plan.streamed_bytes,
        "predicted": plan.predict(plan.settled).figures(),
        "bound": {name: getattr(plan.bound, name) for name in plan.bound.__slots__},
        "outlook": None if plan.outlook is None else asdict(plan.outlook),
    }


def _task_documents(plan: Plan) -> list[Document]:
    """The tasks of a steady step, in the order of issue."""
    return [
        {"kind": task.kind, "name": task.name, "nbytes": plan.task_bytes(task), "text": str(task)}
        for task in plan.tasks
    ]


# Pages


def _show_facts(console: Console, pairs: Sequence[tuple[str, str]]) -> None:
    """Labels on the left, texts on the right, wrapped in their own column."""
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True, style="bold", min_width=10)
    grid.add_column(overflow="fold")
    for label, text in pairs:
        grid.add_row(label, Text(printable(as_typed(text)), style="yellow" if label == "careful" else ""))
    console.print(grid)


def _show_plan(console: Console, plan: Plan, inputs: str = "") -> None:
    """The plan in words, and its step as a strip."""
    found = facts(plan)
    _show_facts(console, [*found[:1], *([("inputs", inputs)] if inputs else []), *found[1:]])
    console.print()
    for line in step_strip(plan.predict(plan.settled), console.width, console.options.ascii_only):
        console.print(line, no_wrap=True, overflow="crop")


def _show_proved(console: Console, plan: Plan) -> None:
    _show_plan(console, plan)
    console.print()
    proved = "Proved: no copy overwrites what a call still reads, and the budget holds at every moment."
    console.print(Text(proved, style="bold green"))


def _show_grid(console: Console, plan: Plan) -> None:
    """One line for each call of a steady step: its times, and what is copied while it runs."""
    timeline = plan.predict(plan.settled)
    last = timeline.cycles - 1
    begin, waits = timeline.window(last)[0], {stall.call: stall.seconds for stall in timeline.stalls()}
    calls = timeline.lane("compute", last)
    seconds = clock([span.seconds for span in calls])
    columns: list[Column[Span]] = [
        Column("call", lambda span: spoken(span.call), words=True),
        Column("begins", lambda span: seconds(span.start - begin)),
        Column("takes", lambda span: seconds(span.seconds), 2),
        Column("waits", lambda span: seconds(waits[span.call]) if span.call in waits else ABSENT),
        Column("on device", lambda span: readable(_held(timeline, span)), 3),
        Column("copied meanwhile", lambda span: _copied(timeline, span), 1, words=True),
    ]
    longest = max(waits.values(), default=0.0)
    print_table(console, calls, columns, lambda span: span.call in waits and waits[span.call] == longest)


def _show_text(console: Console, plan: Plan) -> None:
    """Every seat and every task, one line each; long lines are not broken."""
    console.print(Text(str(plan).rstrip()), soft_wrap=True)


def _show_comparison(console: Console, about: Circumstances, comparison: Comparison) -> None:
    """One line for each strategy, the best one marked. A strategy that does not fit shows what it needs."""
    rows = comparison.rows
    cycle = comparison.cycle
    bound = f"{readable_seconds(rows[0]['bound_seconds'])} per {cycle}: no schedule is faster"
    _show_facts(console, [*about.facts(), ("budget", readable(rows[0]["budget_bytes"])), ("bound", bound)])
    console.print()
    seconds = clock(row["cold_seconds"] for row in rows)
    columns: list[Column[Row]] = [
        Column("strategy", lambda row: str(row["strategy"]), words=True),
        Column(cycle, lambda row: seconds(row["step_seconds"])),
        Column("/ bound", lambda row: _ratio(row["step_seconds"], row["bound_seconds"]), 2),
        Column("waits", lambda row: seconds(row["stall_seconds"]), 3),
        Column("hidden", lambda row: ABSENT if row["overlap"] is None else f"{row['overlap']:.0%}", 5),
        Column(f"first {cycle}", lambda row: seconds(row["cold_seconds"]), 6),
        Column("copied", lambda row: _bytes(row["streamed_bytes"]), 4),
        Column("peak", _peak, 1),
    ]
    fitting = [row for row in rows if row["step_seconds"] is not None]
    best = min(fitting, key=itemgetter("step_seconds"), default=None)
    print_table(console, rows, columns, lambda row: row is best, lambda row: row["step_seconds"] is None)


def _show_sweep(console: Console, about: Circumstances, sweep: Sweep) -> None:
    """One line for each budget, a column for each strategy; the smallest budget that is enough is marked."""
    _show_facts(console, about.facts())
    console.print()
    seconds = clock(row["step_seconds"] for row in sweep.rows)
    steps = {(row["budget_bytes"], row["strategy"]): row["step_seconds"] for row in sweep.rows}
    bounds = {row["budget_bytes"]: row["bound_seconds"] for row in sweep.rows}
    first, others = sweep.strategies[0], len(sweep.strategies)
    knee = sweep.knee(first)
    columns: list[Column[int]] = [
        Column("budget", readable),
        *(Column(name, _step_of(steps, name, seconds), place) for place, name in enumerate(sweep.strategies)),
        Column("bound", lambda budget: seconds(bounds[budget]), others),
    ]
    enough = 0 if knee is None else int(knee["budget_bytes"])
    print_table(console, sorted(bounds), columns, lambda budget: budget == enough)
    if enough:
        console.print()
        text = f"{readable(enough)} is enough: more memory makes {first} less than 5% faster."
        console.print(Text(text, style="bold green"))


def _show_run(console: Console, plan: Plan, inputs: str, predicted: Timeline, measured: Timeline, stats: Stats) -> None:
    """The plan, then predicted beside measured figures, then a warning if the forward was not the traced one."""
    _show_plan(console, plan, inputs)
    lines = [
        ("step", predicted.step_seconds, measured.step_seconds),
        ("first step", predicted.cold_seconds, measured.cold_seconds),
        ("compute", predicted.compute_seconds, measured.compute_seconds),
        ("waits", predicted.stall_seconds, measured.stall_seconds),
    ]
    rows = [(name, readable_seconds(one), readable_seconds(two), _ratio(two, one)) for name, one, two in lines]
    promised = sum(span.nbytes for span in predicted.spans if span.lane != "compute")
    sizes = [
        ("copied in all", promised, stats.h2d_bytes + stats.d2h_bytes),
        ("peak on device", predicted.peak_bytes, stats.peak_bytes),
    ]
    rows += [(name, readable(one), readable(two), _ratio(two, one)) for name, one, two in sizes]
    rows.append(("copying hidden", f"{predicted.overlap:.0%}", f"{measured.overlap:.0%}", ABSENT))
    columns: list[Column[tuple[str, ...]]] = [
        Column(f"of {measured.cycles} steps", itemgetter(0), words=True),
        Column("predicted", itemgetter(1)),
        Column("measured", itemgetter(2)),
        Column("ratio", itemgetter(3), 1),
    ]
    console.print()
    print_table(console, rows, columns, lambda row: row[0] == "step")
    if stats.divergences or stats.demand_loads:
        text = (
            f"{stats.divergences} calls were not in the plan, and {stats.demand_loads} loads were made on demand: "
            "the forward was not the traced one."
        )
        console.print(Text(text, style="yellow"))


def _step_of(steps: Mapping[tuple[int, str], float | None], name: str, seconds: Any) -> Any:
    return lambda budget: seconds(steps.get((budget, name)))


def _held(timeline: Timeline, span: Span) -> int:
    """The most that the device holds while a call runs."""
    before = [point.nbytes for point in timeline.memory if point.seconds <= span.start]
    during = [point.nbytes for point in timeline.memory if span.start < point.seconds < span.stop]
    return max([*before[-1:], *during], default=0)


def _copied(timeline: Timeline, span: Span) -> str:
    """The names of the copies that run while a call runs."""
    copies = [other for other in timeline.spans if other.lane != "compute"]
    names = [spoken(copy.name) for copy in copies if copy.start < span.stop and span.start < copy.stop]
    return ABSENT if not names else names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def _peak(row: Row) -> str:
    return _bytes(row["peak_bytes"]) if row["smallest_bytes"] is None else f"needs {readable(row['smallest_bytes'])}"


def _bytes(nbytes: int | None) -> str:
    return ABSENT if nbytes is None else readable(nbytes)


def _ratio(value: float | None, to: float | None) -> str:
    return ABSENT if value is None or not to else f"{value / to:.2f}"


# A step as a strip of characters, one line for each lane, dark where the lane works:
#
#   compute  ████████░░██████████████████████
#   h2d      ██████████████████████···███████
#            0                        990 ms

SHADES, ASCII_SHADES = "·░▒▓█", ".:+*#"
FULL = 0.97  # a cell that is busy for this share of its time is drawn full
LABEL = 12  # columns for the name of the lane
WIDEST = 100
STYLES = {"compute": "blue", "h2d": "green", "d2h": "magenta"}


def step_strip(timeline: Timeline, width: int, ascii_only: bool = False) -> list[Text]:
    """The last step of a timeline as lines of at most `width` characters."""
    begin, end = timeline.window(timeline.cycles - 1)
    cells = max(10, min(WIDEST, width - LABEL - 1))
    shades = ASCII_SHADES if ascii_only else SHADES
    lines = []
    for lane in LANES:
        spans = union(clip(((span.start, span.stop) for span in timeline.lane(lane)), (begin, end)))
        if spans:
            bar = "".join(_shade(share, shades) for share in _shares(spans, begin, end, cells))
            lines.append(Text.assemble((lane.ljust(LABEL), "bold"), (bar, STYLES[lane])))
    scale = "0" + readable_seconds(end - begin).rjust(cells - 1)
    return [*lines, Text(" " * LABEL + scale, style="dim")]


def _shares(spans: list[Interval], begin: float, end: float, cells: int) -> Iterator[float]:
    """For each cell: the share of its time that the spans cover."""
    size = (end - begin) / cells
    for cell in range(cells):
        start = begin + cell * size
        yield length(clip(spans, (start, start + size))) / size if size > 0 else 0.0


def _shade(share: float, shades: str) -> str:
    """The darker, the busier. Only a cell that is always busy is full, and only one that is always idle is empty.

    >>> "".join(_shade(share, SHADES) for share in (0, 0.01, 0.5, 0.9, 1))
    '·░▒▓█'
    """
    if share >= FULL:
        return shades[-1]
    return shades[0] if share <= 0 else shades[1 + min(2, int(share * 3))]
