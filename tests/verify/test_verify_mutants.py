"""The verifier against mutants of good plans: each is refused, or an adversary who runs it cannot make it go wrong."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import networkx as nx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from taskgraph_offload.planner.strategies import names as strategy_names

import taskgraph_offload as tgo
from taskgraph_offload.nouns.graph import Task, TaskGraph
from taskgraph_offload.nouns.trace import Trace
from taskgraph_offload.plan.plan import Plan
from taskgraph_offload.plan.verify import Program, verify

from ..adversary import UNIT, found_by_the_adversary
from .test_verify import COUNTER, ROTATION, edited, make_plan
from .test_verify_graph import without
from .test_verify_room import SKIP, SPILL, peaks

WRITTEN_BACK = edited(ROTATION, {"compute a": "compute a\n  d2h a"})
BUDGETS = ("30%", "60%", "130%")


def units() -> list[dict[str, object]]:
    """Two components, blocks of several sizes, one called twice, a weight that two blocks share."""
    sizes = {"e0": (4, 2), "e1": (4, 2), "b0": (3, 3, 1), "b1": (5, 1), "b2": (3, 3, 1), "b3": (2,), "b4": (6, 2)}
    made: list[dict[str, object]] = []
    for name, counts in sizes.items():
        tensors = {f"{name}.{i}": UNIT * count for i, count in enumerate(counts)}
        if name in ("b1", "b4"):
            tensors["shared"] = 2 * UNIT
        made.append({"name": name, "seconds": 1e-6, "tensors": tensors, "component": name[0], "transient_bytes": 100})
    return [*made[:5], made[4], *made[5:]]


def planned(strategy: str, budget: str, **options: Any) -> Plan:
    trace = Trace.from_units(units())
    try:
        return tgo.Planner.for_trace(trace, budget, strategy=strategy, machine="cpu", **options).plan()
    except tgo.BudgetError as error:
        enough = f"{error.smallest_bytes}B"
        return tgo.Planner.for_trace(trace, enough, strategy=strategy, machine="cpu", **options).plan()


def good_plans() -> Iterator[tuple[str, Plan]]:
    for strategy in strategy_names():
        for budget in BUDGETS:
            yield f"{strategy} {budget}", planned(strategy, budget)
    yield "layerwise spread", planned("layerwise", "60%", prefetch=2, residents="spread")
    yield "model writeback", planned("model", "60%", writeback=True)
    yield "written back", make_plan(WRITTEN_BACK, COUNTER)
    yield "program", program_of("30%")
    yield "program that lends", program_of("30%", activations={"vae": 9 * UNIT})
    yield "program with seats of their own", program_of("30%", activations={"prefill": 8 * UNIT, "vae": 2 * UNIT})
    yield "spilled", make_plan(SPILL, peaks(SKIP, mid=1600, deep=1600))


def program_of(budget: str, activations: Mapping[str, int] | None = None) -> Plan:
    """A text encoder once, a model in two phases that share its weights, a decoder once."""
    sizes = {"clip": (4, 3), "prefill": (3, 2, 5, 2, 4, 2), "decode": (3, 2, 5, 2, 4, 2), "vae": (2, 2)}
    traces = {}
    for component, counts in sizes.items():
        owner = "model" if component in ("prefill", "decode") else component
        traces[component] = Trace.from_units(
            {
                "name": f"b{i}",
                "seconds": 1e-6,
                "tensors": {f"{owner}.{i}.0": UNIT * count, f"{owner}.{i}.1": UNIT},
                "transient_bytes": (activations or {}).get(component, 100),
            }
            for i, count in enumerate(counts)
        )
    program = [("clip", 1), ("prefill", 1), ("decode", 3), ("vae", 1)]
    return tgo.Planner.for_program(traces, program, budget, machine="cpu").plan()


PLANS = dict(good_plans())


def test_the_programs_are_of_the_kinds_that_they_should_be() -> None:
    assert PLANS["program that lends"].lent == {"vae": 9 * UNIT}, PLANS["program that lends"]
    assert any(bundle.component for bundle in PLANS["program with seats of their own"].bundles.values())
    assert all(plan.streamed_bytes for name, plan in PLANS.items() if name.startswith("program"))


def with_cycle(plan: Plan, cycle: str, tasks: Sequence[Task]) -> Plan:
    """The plan with other tasks in its cold or in its steady cycle."""
    return replace(plan, cold=tuple(tasks)) if cycle == "cold" else replace(plan, steady=tuple(tasks))


def is_good(plan: Plan, graph: TaskGraph | None = None) -> bool:
    try:
        verify(plan, graph)
    except tgo.PlanError:
        return False
    return True


@pytest.mark.parametrize("name", PLANS)
def test_a_good_plan_is_proved_and_the_adversary_finds_nothing(name: str) -> None:
    PLANS[name].verify()
    assert found_by_the_adversary(PLANS[name], PLANS[name].graph(), range(5)) is None


@pytest.mark.parametrize("name", PLANS)
def test_the_verifier_and_the_plan_agree_on_seats_though_they_share_no_code(name: str) -> None:
    program = Program(PLANS[name])
    found = {name: {seat.weight: seat.start for seat in seats} for name, seats in program.seats.items()}
    assert found == PLANS[name].seats_of
    assert program.sizes == PLANS[name].sizes


@pytest.mark.parametrize("name", ["layerwise 30%", "sequential 60%", "model writeback", "written back"])
def test_the_adversary_makes_a_race_go_wrong(name: str) -> None:
    plan = PLANS[name]
    graph = plan.graph()
    copies = [
        edge
        for edge in nx.transitive_reduction(graph.dag).edges
        if graph.dag.edges[edge]["reason"] in ("data", "reuse")
    ]
    assert found_by_the_adversary(plan, without(graph, *copies), range(20))


# --- mutants ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PLANS)
def test_no_edge_can_be_spared(name: str) -> None:
    plan = PLANS[name]
    graph = plan.graph()
    spared = [edge for edge in nx.transitive_reduction(graph.dag).edges if is_good(plan, without(graph, edge))]
    assert not spared


@pytest.mark.parametrize("name", PLANS)
def test_the_smallest_budget_is_what_the_plan_says(name: str) -> None:
    plan = PLANS[name]
    enough = plan.peak_bytes + plan.margin_bytes
    replace(plan, budget_bytes=enough).verify()
    with pytest.raises(tgo.PlanError, match="over the budget"):
        replace(plan, budget_bytes=enough - 1).verify()


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("cycle", ["cold", "steady"])
def test_no_copy_that_comes_once_can_be_spared(name: str, cycle: str) -> None:
    plan, tasks = PLANS[name], getattr(PLANS[name], cycle)
    names = [task.name for task in tasks if task.kind == "h2d"]
    copies = [index for index, task in enumerate(tasks) if task.kind == "h2d" and names.count(task.name) == 1]
    fewer = [with_cycle(plan, cycle, tasks[:index] + tasks[index + 1 :]) for index in copies]
    spared = [tasks[index] for index, mutant in zip(copies, fewer, strict=True) if is_good(mutant)]
    assert not spared


@st.composite
def mutants(draw: st.DrawFn) -> Plan:
    """A good plan after one to three mutations."""
    plan = PLANS[draw(st.sampled_from(sorted(PLANS)))]
    for mutate in draw(
        st.lists(st.sampled_from([moved, swapped, dropped, doubled, cut, marked, shrunk]), min_size=1, max_size=3)
    ):
        plan = mutate(draw, plan)
    return plan


def moved(draw: st.DrawFn, plan: Plan) -> Plan:
    """A seat elsewhere."""
    bundle = plan.bundles[draw(st.sampled_from(sorted(plan.bundles)))]
    offset = draw(st.integers(0, plan.arena_bytes // UNIT)) * UNIT
    return replace(plan, bundles={**plan.bundles, bundle.name: replace(bundle, offset=offset)})


def marked(draw: st.DrawFn, plan: Plan) -> Plan:
    """A bundle that stays no more, or from now on."""
    bundle = plan.bundles[draw(st.sampled_from(sorted(plan.bundles)))]
    return replace(plan, bundles={**plan.bundles, bundle.name: replace(bundle, resident=not bundle.resident)})


def shrunk(draw: st.DrawFn, plan: Plan) -> Plan:
    """A smaller arena."""
    return replace(plan, arena_bytes=plan.arena_bytes - draw(st.integers(1, 2 * UNIT)))


def swapped(draw: st.DrawFn, plan: Plan) -> Plan:
    """Two tasks in each other's place, near one another or not."""
    tasks, cycle = _one_cycle(draw, plan)
    i, j = draw(st.integers(0, len(tasks) - 1)), draw(st.integers(0, len(tasks) - 1))
    tasks[i], tasks[j] = tasks[j], tasks[i]
    return with_cycle(plan, cycle, tasks)


def dropped(draw: st.DrawFn, plan: Plan) -> Plan:
    """A task missing."""
    tasks, cycle = _one_cycle(draw, plan)
    del tasks[draw(st.integers(0, len(tasks) - 1))]
    return with_cycle(plan, cycle, tasks)


def doubled(draw: st.DrawFn, plan: Plan) -> Plan:
    """A task of one cycle once more, somewhere."""
    tasks, cycle = _one_cycle(draw, plan)
    tasks.insert(draw(st.integers(0, len(tasks))), draw(st.sampled_from([*plan.cold, *plan.steady])))
    return with_cycle(plan, cycle, tasks)


def cut(draw: st.DrawFn, plan: Plan) -> Plan:
    """A copy that brings only a part, and no longer waits."""
    tasks, cycle = _one_cycle(draw, plan)
    index = draw(st.integers(0, len(tasks) - 1))
    if tasks[index].kind != "compute" and not tasks[index].is_activation:
        stop = draw(st.integers(1, plan.sizes[tasks[index].name] // UNIT)) * UNIT
        tasks[index] = Task(tasks[index].kind, tasks[index].name, 0, stop)
    return with_cycle(plan, cycle, tasks)


def _one_cycle(draw: st.DrawFn, plan: Plan) -> tuple[list[Task], str]:
    cycle = draw(st.sampled_from(["cold", "steady"]))
    return list(plan.cold if cycle == "cold" else plan.steady), cycle


@given(mutant=mutants(), seed=st.integers(0, 2**20))
@settings(max_examples=300)
def test_a_mutant_is_refused_or_harmless(mutant: Plan, seed: int) -> None:
    if is_good(mutant):
        graph = mutant.graph(cycles=5)  # what holds for three cycles holds for more
        assert found_by_the_adversary(mutant, graph, range(seed, seed + 5)) is None, str(mutant)
