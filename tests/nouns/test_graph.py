"""The text form says everything about a task, and the graph is a plain networkx graph with the promised data."""

import networkx as nx
import pytest
from hypothesis import given
from hypothesis import strategies as st

import taskgraph_offload as tgo
from taskgraph_offload.nouns.graph import LANES, LINKS, parse_tasks, print_tasks, tokens

from ..made import plan_of, trace_of

names = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\n\r"), min_size=1)
gates = st.none() | names
copies = st.builds(
    lambda kind, name, part, after, before: tgo.Task(kind, name, part[0], part[1], after, before),
    st.sampled_from(["h2d", "d2h"]),
    names,
    st.just((0, None)) | st.tuples(st.integers(0, 9), st.integers(10, 2**40)),
    gates,
    gates,
)
calls = st.builds(lambda name: tgo.Task("compute", name), names)


@given(st.lists(copies | calls))
def test_tasks_read_back_as_they_were_printed(tasks):
    """Whatever a block is called, also with spaces, quotes and brackets."""
    separable = [t for t in tasks if not any(len(str(t).splitlines()) > 1 for _ in "x")]
    assert list(parse_tasks(print_tasks(separable))) == separable


@pytest.mark.parametrize(
    "line",
    [
        "",
        "h2d",
        "load a",
        "h2d a [0:x]",
        "h2d a after",
        "h2d a after b",
        "h2d a after compute b c",
        'h2d "a',
        "h2d a ]",
    ],
)
def test_a_line_that_is_no_task_is_refused_with_its_text(line):
    with pytest.raises(tgo.PlanError, match=r"task|quotes|cannot read"):
        tgo.Task.parse(line)


def test_tokens_keep_quoted_words_whole():
    assert tokens('bundle "my block" at 0: a "b c"') == ["bundle", "my block", "at", "0:", "a", "b c"]


@pytest.mark.parametrize("lane", LANES)
def test_a_task_waits_in_the_lane_of_its_link(lane):
    """Every lane has a text form, and all lanes but compute are links."""
    assert tgo.Task.parse(f"{lane} a").lane == lane
    assert set(LANES) - set(LINKS) == {"compute"}


def test_graph_has_the_promised_data_on_nodes_and_edges():
    plan = plan_of(trace_of([512, 1024, 1536]), 4096, "layerwise")
    dag = plan.graph().dag
    assert isinstance(dag, nx.DiGraph)
    assert nx.is_directed_acyclic_graph(dag)
    for _, data in dag.nodes(data=True):
        assert data["kind"] in ("compute", "h2d", "d2h")
        assert data["lane"] == data["kind"]
        assert data["call"] in "abc"
        assert data["seconds"] == pytest.approx(1e-3 if data["kind"] == "compute" else data["nbytes"] / 1e9)
    assert {data["reason"] for _, _, data in dag.edges(data=True)} <= {"data", "reuse", "issue", "order"}


def test_graph_prints_each_node_with_what_it_waits_for():
    graph = plan_of(trace_of([512, 512]), 512, "sequential").graph(1)
    assert str(graph).splitlines() == [
        "0/h2d a",
        "0/compute a after 0/h2d a (data)",
        "0/h2d b after 0/compute a (reuse)",
        "0/compute b after 0/h2d b (data)",
    ]
