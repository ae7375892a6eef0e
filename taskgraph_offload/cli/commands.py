"""The commands that run no model. Each takes parsed arguments, calls the library, and answers; refusals are errors."""

from __future__ import annotations

from argparse import Namespace

import taskgraph_offload as tgo
from taskgraph_offload.planner import Planner
from taskgraph_offload.planner.compare import everything, ranked
from taskgraph_offload.planner.strategies import DEFAULT

from ..errors import BudgetError, SettingsError
from ..nouns.budget import readable
from ..nouns.reports import Comparison, Sweep
from ..nouns.timeline import Timeline
from ..plan.plan import Plan
from . import documents, pages
from .asked import planner_of, settings_of, subject_of
from .console import Answer, one_by_one, working
from .models import Subject, from_factory

SWEPT = (DEFAULT, "layerwise", "keep", "sequential")  # unless others are asked for


def plan(arguments: Namespace) -> Answer:
    """Decide for one budget."""
    settings, subject = settings_of(arguments), subject_of(arguments)
    made = planned(planner_of(arguments, settings, subject))
    write_files(arguments, made, made.predict())
    inputs = subject.described(made.trace.source)
    return Answer(
        document=lambda: {**documents.of_plan(made), "inputs": inputs},
        show=lambda console: pages.show_plan(console, made, inputs),
    )


def compare(arguments: Namespace) -> Answer:
    """One budget, many strategies."""
    settings, subject = settings_of(arguments), subject_of(arguments)
    planner = planner_of(arguments, settings, subject)
    choices = one_by_one(arguments.strategies or everything(), "planning")
    found = ranked(row for choice in choices for row in planner.compare([choice]).rows)
    if arguments.picture:
        found.save(arguments.picture)
    about = _about(planner, subject)
    budget = {"budget_bytes": planner.budget_bytes}
    return Answer(
        document=lambda: {**documents.of_circumstances(about), **budget, **documents.of_comparison(found)},
        show=lambda console: pages.show_comparison(console, about, found),
        fault=_none_fits(found),
    )


def sweep(arguments: Namespace) -> Answer:
    """Many budgets, some strategies."""
    settings, subject = settings_of(arguments), subject_of(arguments)
    planner = planner_of(arguments, settings, subject)
    choices = arguments.strategies or [(name, {}) for name in SWEPT]
    budgets = arguments.budgets or [f"{nbytes}B" for nbytes in planner.budgets(arguments.points, choices)]
    pairs = one_by_one([(choice, budget) for choice in choices for budget in budgets], "planning")
    found = Sweep([row for choice, budget in pairs for row in planner.sweep([budget], [choice]).rows])
    if arguments.picture:
        found.save(arguments.picture)
    about = _about(planner, subject)
    return Answer(
        document=lambda: {**documents.of_circumstances(about), **documents.of_sweep(found)},
        show=lambda console: pages.show_sweep(console, about, found),
        fault=_fits_nowhere(found),
    )


def show(arguments: Namespace) -> Answer:
    """A saved plan, proved again by being loaded."""
    model = None if arguments.model is None else from_factory(arguments.model).model
    with working(f"proving {arguments.plan}"):
        loaded = Plan.load(arguments.plan, model)
    tasks = documents.of_tasks(loaded)
    views = {"text": pages.show_text, "grid": pages.show_grid, "proof": pages.show_proof}
    view = views["text" if arguments.text else "grid" if arguments.grid else "proof"]
    return Answer(
        document=lambda: {**documents.of_plan(loaded), "verified": True, "tasks": tasks},
        show=lambda console: view(console, loaded),
    )


def planned(planner: Planner) -> Plan:
    """The planner's plan, with a word to who waits."""
    with working("planning"):
        return planner.plan()


def write_files(arguments: Namespace, made: Plan, *timelines: Timeline) -> None:
    """The files that were asked for."""
    if arguments.save:
        made.save(arguments.save)
    if arguments.timeline:
        tgo.viz.save_timeline(arguments.timeline, *timelines)
    if arguments.trace:
        tgo.viz.save_trace(arguments.trace, *timelines)


def _none_fits(found: Comparison) -> BudgetError | None:
    """Where no strategy works: the one that needs least, and what it needs."""
    if any(row["smallest_bytes"] is None for row in found.rows):
        return None
    frugal = min(found.rows, key=lambda row: int(row["smallest_bytes"]))
    budget, least = frugal["budget_bytes"], frugal["smallest_bytes"]
    needs = f'the smallest that works is "{least}B" ({readable(least)}), with {frugal["strategy"]}'
    return BudgetError(f"a budget of {budget} bytes ({readable(budget)}) is too small for all of these: {needs}", least)


def _fits_nowhere(found: Sweep) -> SettingsError | None:
    if any(row["step_seconds"] is not None for row in found.rows):
        return None
    return SettingsError("no strategy fits into any of these budgets; without --budgets they begin where one does")


def _about(planner: Planner, subject: Subject) -> documents.Circumstances:
    return documents.Circumstances(planner.trace, planner.machine, subject.described(planner.trace.source))
