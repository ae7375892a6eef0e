"""Edges follow from bytes: pairs of a serial program and the edges that it must get, no more and no fewer."""

from dataclasses import replace
from typing import Any

import networkx as nx
import pytest
from hypothesis import given
from hypothesis import strategies as st

import taskgraph_offload as tgo
from taskgraph_offload.nouns.graph import parse_tasks
from taskgraph_offload.nouns.trace import Activation
from taskgraph_offload.plan.connect import connect
from taskgraph_offload.plan.plan import Bound, Bundle

from ..made import SLOW_LINK, lines, trace_of


def program(text: str, seats: dict[str, int], trace: tgo.Trace | None = None) -> tgo.Plan:
    """A plan by hand, not proved: units of 512 bytes, one bundle each."""
    trace = trace or trace_of([512] * len(seats))
    bundles = {name: Bundle(name, trace.calls[i].reads, seats[name]) for i, name in enumerate(seats)}
    tasks = parse_tasks(text)
    return tgo.Plan(trace, SLOW_LINK, "hand", {}, 4096, 0, 2048, bundles, tasks, tasks, Bound(0, 0, 0, 0))


def edges(plan: tgo.Plan, cycles: int = 1) -> list[str]:
    graph = connect(plan, cycles)
    return [f"{a} -> {b} {data['reason']}" for a, b, data in graph.dag.edges(data=True) if data["reason"] != "order"]


def test_copies_to_apart_seats_wait_for_nobody():
    text = """
        h2d a
        h2d b
        compute a
        compute b
    """
    assert edges(program(text, {"a": 0, "b": 512})) == lines("""
        0/h2d a -> 0/compute a data
        0/h2d b -> 0/compute b data
    """)


def test_a_copy_waits_for_the_last_reader_of_the_bytes_it_overwrites():
    text = """
        h2d a
        compute a
        h2d b
        compute b
        h2d c
        compute c
    """
    assert edges(program(text, {"a": 0, "b": 1024, "c": 256})) == lines("""
        0/h2d a -> 0/compute a data
        0/compute a -> 0/h2d c reuse
        0/h2d b -> 0/compute b data
        0/h2d c -> 0/compute c data
    """)


def test_a_cycle_waits_for_the_one_before():
    text = """
        h2d a
        compute a
        h2d b
        compute b
    """
    found = edges(program(text, {"a": 0, "b": 0}), cycles=2)
    assert "0/compute b -> 1/h2d a reuse" in found
    assert "1/compute a -> 1/h2d b reuse" in found


def test_parts_of_a_bundle_wait_each_for_its_own_bytes():
    text = """
        h2d a
        compute a
        h2d b [0:256]
        h2d b [256:512]
        compute b
    """
    assert edges(program(text, {"a": 0, "b": 256})) == lines("""
        0/h2d a -> 0/compute a data
        0/compute a -> 0/h2d b [0:256] reuse
        0/h2d b [0:256] -> 0/compute b data
        0/h2d b [256:512] -> 0/compute b data
    """)


def test_gates_are_edges_of_their_own():
    text = """
        h2d a
        compute a
        h2d b after compute a
        compute b
    """
    assert "0/compute a -> 0/h2d b issue" in edges(program(text, {"a": 0, "b": 512}))


def test_an_activation_that_leaves_is_gone_before_its_call_and_back_before_its_use():
    trace = trace_of([512] * 3)
    trace = replace(trace, activations=(Activation("skip", 64, 0, (2,), 3),))
    text = """
        h2d a
        h2d b
        h2d c
        compute a
        d2h ~skip before compute b
        compute b
        h2d ~skip after compute b
        compute c
    """
    plan = program(text, {"a": 0, "b": 512, "c": 1024}, trace)
    found = edges(plan)
    for edge in lines("""
        0/compute a -> 0/d2h ~skip data
        0/d2h ~skip -> 0/compute b issue
        0/compute b -> 0/h2d ~skip issue
        0/h2d ~skip -> 0/compute c data
    """):
        assert edge in found
    served = {node: data["call"] for node, data in plan.graph(1).dag.nodes(data=True)}
    assert served["0/h2d ~skip"] == "c"


def test_what_is_written_back_is_home_before_it_comes_again():
    text = """
        h2d a
        compute a
        d2h a
        h2d b
        compute b
    """
    found = edges(program(text, {"a": 0, "b": 0}), cycles=2)
    assert "0/d2h a -> 0/h2d b reuse" in found
    assert "0/d2h a -> 1/h2d a data" in found


@given(st.data())
def test_any_two_tasks_that_touch_a_byte_with_a_write_are_ordered(data):
    """Against brute force over all pairs, for random seats and random programs."""
    count = data.draw(st.integers(2, 6))
    seats = {chr(97 + i): 128 * data.draw(st.integers(0, 8), label="seat") for i in range(count)}
    tasks = "\n".join(f"h2d {name}\ncompute {name}" for name in seats)
    plan = program(tasks, seats)
    dag = connect(plan, 2).dag
    order = nx.transitive_closure_dag(dag)
    nodes: list[tuple[str, dict[str, Any]]] = list(dict(dag.nodes).items())
    for i, (first, one) in enumerate(nodes):
        for second, two in nodes[i + 1 :]:
            apart = abs(seats[one["task"].name] - seats[two["task"].name]) >= 512
            if not apart and "h2d" in (one["kind"], two["kind"]):
                assert order.has_edge(first, second), (first, second)


@pytest.mark.parametrize("cycles", [1, 3, 6])
def test_issue_order_is_the_order_of_the_nodes(cycles):
    plan = tgo.Planner.for_trace(trace_of([512] * 5), "1024B", strategy="layerwise", machine=SLOW_LINK).plan()
    graph = plan.graph(cycles)
    place = {node: i for i, node in enumerate(graph.nodes)}
    assert all(place[a] < place[b] for a, b in graph.dag.edges)
    assert len(graph.lane("compute")) == 5 * cycles
