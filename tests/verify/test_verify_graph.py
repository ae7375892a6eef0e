"""The verifier on edges: one that is missing, or wrong, is refused with both its ends."""

from __future__ import annotations

import pytest

import taskgraph_offload as tgo
from taskgraph_offload.nouns.graph import TaskGraph
from taskgraph_offload.plan.plan import Plan
from taskgraph_offload.plan.verify import verify

from .test_verify import ABC, COUNTER, ROTATION, assert_bad, edited, make_plan


def assert_bad_graph(plan: Plan, graph: TaskGraph, *words: str) -> None:
    with pytest.raises(tgo.PlanError) as caught:
        verify(plan, graph)
    assert all(word in str(caught.value).splitlines()[0] for word in words), str(caught.value)


def without(graph: TaskGraph, *edges: tuple[str, str]) -> TaskGraph:
    dag = graph.dag.copy()
    dag.remove_edges_from(edges)
    return TaskGraph(dag)


def test_an_edge_against_the_order_of_issue_is_refused() -> None:
    plan = make_plan(ROTATION, ABC)
    graph = plan.graph()
    graph.dag.add_edge("1/compute c", "1/h2d a", reason="data")
    assert_bad_graph(plan, graph, "1/h2d a waits for 1/compute c", "later")


def test_a_circle_is_refused() -> None:
    plan = make_plan(ROTATION, ABC)
    graph = plan.graph()
    graph.dag.add_edge("0/compute a", "0/h2d a", reason="reuse")
    assert_bad_graph(plan, graph, "0/h2d a waits for 0/compute a", "later")


def test_a_lane_that_is_no_queue_is_refused() -> None:
    plan = make_plan(ROTATION, ABC)
    graph = without(plan.graph(), ("0/h2d a", "0/h2d b"))
    assert_bad_graph(plan, graph, "0/h2d b does not wait for 0/h2d a", "lane h2d")


@pytest.mark.parametrize("node", ["0/compute b", "2/compute c"])
def test_a_graph_without_one_of_the_tasks_is_refused(node: str) -> None:
    plan = make_plan(ROTATION, ABC)
    graph = plan.graph()
    graph.dag.remove_node(node)
    assert_bad_graph(plan, graph, node)


def test_a_graph_with_a_task_of_its_own_is_refused() -> None:
    plan = make_plan(ROTATION, ABC)
    assert_bad_graph(plan, plan.graph(cycles=4), "goes on with '3/h2d a'")


def test_a_graph_that_says_something_else_about_a_task_is_refused() -> None:
    plan = make_plan(ROTATION, ABC)
    graph = plan.graph()
    graph.dag.nodes["1/h2d c"]["lane"] = "compute"
    assert_bad_graph(plan, graph, "'1/h2d c'")


@pytest.mark.parametrize("gate", ["after compute a", "before compute b"])
def test_a_gate_that_no_edge_keeps_is_refused(gate: str) -> None:
    copy = f"h2d c [0:512] {gate}"
    call = gate.split(maxsplit=1)[1]
    moved = {"arena 3072": "arena 5120", "budget 3072": "budget 5120", "bundle c at 0": "bundle c at 3072"}
    plan = make_plan(
        edited(ROTATION, {**moved, "  compute b\n  h2d c": f"  {copy}\n  h2d c [512:2048]\n  compute b"}), ABC
    )
    plan.verify()
    graph = plan.graph()
    edge = ("0/compute a", "0/h2d c [0:512]") if "after" in gate else ("0/h2d c [0:512]", "0/compute b")
    assert graph.dag.edges[edge]["reason"] == "issue"
    assert_bad_graph(plan, without(graph, edge), "does not wait for", call, copy)


# --- races -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("edge", [("0/h2d a", "0/compute a"), ("0/compute a", "0/h2d c"), ("1/compute c", "2/h2d a")])
def test_two_tasks_on_the_same_bytes_need_an_order(edge: tuple[str, str]) -> None:
    plan = make_plan(edited(ROTATION, {"  h2d a\n  h2d b": "  h2d b\n  h2d a"}), ABC)
    plan.verify()
    assert_bad_graph(plan, without(plan.graph(), edge), *edge, "race", "bytes [0:2048] of the arena")


def test_a_race_on_few_bytes_is_seen() -> None:
    moved = {"arena 3072": "arena 4608", "budget 3072": "budget 4608", "bundle a at 0": "bundle a at 2560"}
    text = edited(ROTATION, {**moved, "b at 2048": "b at 1536", "bundle c at 0": "bundle c at 2560"})
    assert_bad(text, ABC, {"c at 2560": "c at 0"}, "0/h2d c overwrites bytes [1536:2048]", "0/h2d b", "resident")
    plan = make_plan(text, ABC)
    plan.verify()
    assert_bad_graph(plan, without(plan.graph(), ("0/compute a", "0/h2d c")), "race", "[2560:4608]")


def test_a_copy_home_ends_before_the_next_copy_back_begins() -> None:
    alone = {"bundle c at 0": "bundle c at 3072", "arena 3072": "arena 5120", "budget 3072": "budget 5120"}
    plan = make_plan(edited(ROTATION, {**alone, "compute a": "compute a\n  d2h a"}), COUNTER)
    plan.verify()
    graph = without(plan.graph(), ("0/d2h a", "1/h2d a"))
    assert_bad_graph(plan, graph, "0/d2h a and 1/h2d a race")


# --- messages --------------------------------------------------------------------------------------------------------


def test_a_refusal_prints_the_plan_around_both_culprits() -> None:
    plan = make_plan(ROTATION, ABC)
    with pytest.raises(tgo.PlanError) as caught:
        verify(plan, without(plan.graph(), ("1/compute c", "2/h2d a")))
    assert str(caught.value) == "\n".join(
        [
            "1/compute c and 2/h2d a race on bytes [0:2048] of the arena: no path of edges orders them",
            "       ...",
            "       1/compute a",
            "       1/compute b",
            "       1/h2d c",
            "  ---> 1/compute c",
            "  ---> 2/h2d a",
            "       2/compute a",
            "       2/compute b",
            "       2/h2d c",
            "       ...",
        ]
    )
