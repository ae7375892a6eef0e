"""What each command shows to a person: a page about a plan, a table of strategies, of budgets, of what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import itemgetter
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..nouns.budget import readable, readable_seconds
from ..nouns.names import printable, spoken
from ..nouns.reports import Comparison, Sweep, clock
from ..nouns.timeline import Span, Timeline
from ..plan.explain import facts
from ..plan.plan import Plan
from ..plan.simulate import SETTLED
from ..runtime.measured import Stats
from .documents import Circumstances
from .strip import step_strip
from .tables import ABSENT, Column, print_table

Row = Mapping[str, Any]

GUESSED = "the forward was traced without shapes: all times and activations are guesses"


def show_facts(console: Console, pairs: Sequence[tuple[str, str]]) -> None:
    """Labels on the left, what there is to say on the right, wrapped in its own column."""
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True, style="bold", min_width=10)
    grid.add_column(overflow="fold")
    for label, text in pairs:
        grid.add_row(label, Text(printable(text), style="yellow" if label == "careful" else ""))
    console.print(grid)


def show_plan(console: Console, plan: Plan, inputs: str = "") -> None:
    """What a plan does in words, and its step as a strip."""
    said = facts(plan)
    show_facts(console, [*said[:1], *([("inputs", inputs)] if inputs else []), *said[1:]])
    console.print()
    for line in step_strip(plan.predict(SETTLED), console.width, console.options.ascii_only):
        console.print(line, no_wrap=True, overflow="crop")


def show_grid(console: Console, plan: Plan) -> None:
    """One line for each call of a steady step: when it begins, what it waits for, what is copied meanwhile."""
    timeline = plan.predict(SETTLED)
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


def show_text(console: Console, plan: Plan) -> None:
    """Every seat and every task, a line each, however long."""
    console.print(Text(str(plan).rstrip()), soft_wrap=True)


def show_proof(console: Console, plan: Plan) -> None:
    """What a loaded plan does, and that it was proved: loading is proving."""
    show_plan(console, plan)
    console.print()
    said = "Proved: nothing is overwritten while it is read; the budget holds throughout."
    console.print(Text(said, style="bold green"))


def show_comparison(console: Console, about: Circumstances, comparison: Comparison) -> None:
    """Strategies down, the best one marked; what does not fit says what it needs."""
    rows = comparison.rows
    budget = readable(rows[0]["budget_bytes"])
    show_facts(console, [*_about(about), ("budget", budget), ("bound", _bound(rows))])
    console.print()
    seconds = clock(row["cold_seconds"] for row in rows)
    columns: list[Column[Row]] = [
        Column("strategy", lambda row: str(row["strategy"]), words=True),
        Column("step", lambda row: seconds(row["step_seconds"])),
        Column("/ bound", lambda row: _ratio(row["step_seconds"], row["bound_seconds"]), 2),
        Column("waits", lambda row: seconds(row["stall_seconds"]), 3),
        Column("hidden", lambda row: ABSENT if row["overlap"] is None else f"{row['overlap']:.0%}", 5),
        Column("first step", lambda row: seconds(row["cold_seconds"]), 6),
        Column("copied", lambda row: _bytes(row["streamed_bytes"]), 4),
        Column("peak", _peak, 1),
    ]
    works = [row for row in rows if row["step_seconds"] is not None]
    best = min(works, key=itemgetter("step_seconds"), default=None)
    print_table(console, rows, columns, lambda row: row is best, lambda row: row["step_seconds"] is None)


def show_sweep(console: Console, about: Circumstances, sweep: Sweep) -> None:
    """Budgets down, strategies across; the smallest budget that is enough for the first strategy is marked."""
    show_facts(console, _about(about))
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
        said = f"{readable(enough)} is enough: more memory makes {first} less than 5% faster."
        console.print(Text(said, style="bold green"))


def show_run(console: Console, plan: Plan, inputs: str, predicted: Timeline, measured: Timeline, stats: Stats) -> None:
    """The plan, what it promised beside what happened, and a word where the forward was not the traced one."""
    show_plan(console, plan, inputs)
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
        said = f"{stats.divergences} calls came unplanned, {stats.demand_loads} loads were on demand: another forward?"
        console.print(Text(said, style="yellow"))


def _about(about: Circumstances) -> list[tuple[str, str]]:
    model = f"{about.trace.model}, {readable(about.trace.weight_bytes)} of weights, on {about.machine.name}"
    guessed = [("careful", GUESSED)] if about.trace.source == "symbolic" else []
    return [("model", model), ("inputs", about.inputs), *guessed]


def _bound(rows: Sequence[Row]) -> str:
    """The least that any strategy can reach: nobody beats it."""
    return f"{readable_seconds(rows[0]['bound_seconds'])} per step, which no schedule beats"


def _step_of(steps: Mapping[tuple[int, str], float | None], name: str, seconds: Any) -> Any:
    return lambda budget: seconds(steps.get((budget, name)))


def _held(timeline: Timeline, span: Span) -> int:
    """The most that the device holds while a call runs."""
    before = [point.nbytes for point in timeline.memory if point.seconds <= span.start]
    during = [point.nbytes for point in timeline.memory if span.start < point.seconds < span.stop]
    return max([*before[-1:], *during], default=0)


def _copied(timeline: Timeline, span: Span) -> str:
    """The copies that run while a call does, without their lane: nearly all of them come to the device."""
    copies = [other for other in timeline.spans if other.lane != "compute"]
    names = [spoken(copy.name) for copy in copies if copy.start < span.stop and span.start < copy.stop]
    return ABSENT if not names else names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def _peak(row: Row) -> str:
    return _bytes(row["peak_bytes"]) if row["smallest_bytes"] is None else f"needs {readable(row['smallest_bytes'])}"


def _bytes(nbytes: int | None) -> str:
    return ABSENT if nbytes is None else readable(nbytes)


def _ratio(value: float | None, to: float | None) -> str:
    return ABSENT if value is None or not to else f"{value / to:.2f}"
