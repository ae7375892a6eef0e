"""The parts of `auto`, each by itself: units, items, seats in a ring, copies, rounding, the fluid, the rehearsal."""

from __future__ import annotations

import random

import numpy as np
import pytest
from scipy.optimize import linprog
from taskgraph_offload.planner.auto.draft import Copy, Drafter, Seat, copies_of, ring
from taskgraph_offload.planner.auto.fluid import Flow, cut_finer, round_to_items, take_stock
from taskgraph_offload.planner.strategies.auto import search

import taskgraph_offload as tgo

from ..made import SLOW_LINK, plan_of


def test_a_finer_trace_reads_the_same_in_the_same_time() -> None:
    unit = {"name": "a", "seconds": 1.0, "tensors": [4, 4, 1, 1, 8], "tensor_seconds": [1, 2, 3, 4, 5]}
    whole = tgo.Trace.from_units([unit, {"name": "b", "seconds": 1.0, "tensors": [9]}])
    finer = cut_finer(whole, 8)
    assert [call.name for call in finer.calls] == ["a/0", "a/1", "b"]
    assert [call.reads for call in finer.calls] == [("a.0", "a.1"), ("a.2", "a.3", "a.4"), ("b.0",)]
    pieces = [[piece for call in trace.calls for piece in call.pieces] for trace in (whole, finer)]
    assert pieces[0] == pieces[1]


def test_what_neighbours_share_comes_once_and_what_distant_units_share_comes_again() -> None:
    units = [
        {"name": "a", "seconds": 1.0, "tensors": {"near": 512, "far": 512}},
        {"name": "b", "seconds": 1.0, "tensors": {"near": 512, "own": 512}},
        {"name": "c", "seconds": 1.0, "tensors": {}},
        {"name": "d", "seconds": 1.0, "tensors": {"far": 512}},
    ]
    stock = take_stock(tgo.Trace.from_units(units), (1.0,) * 4)
    assert {item.weights: item.visits for item in stock.items} == {
        ("near",): ((0, 1),),
        ("far",): ((0, 0), (3, 3)),
        ("own",): ((1, 1),),
    }


def test_a_ring_begins_again_and_cuts_a_unit_where_it_ends() -> None:
    assert ring([[0], [1, 2], [3]], [4, 3, 2, 4], 9) == [(0, [0]), (4, [1, 2]), (0, [3])]
    assert ring([[0], [1, 2]], [4, 3, 2], 7) == [(0, [0]), (4, [1]), (0, [2])]
    assert ring([[0], [1]], [4, 8], 7) is None


def test_each_copy_waits_for_the_unit_that_last_read_its_bytes() -> None:
    seats = [Seat(0, 10, ((0, 0),)), Seat(10, 10, ((1, 1),)), Seat(5, 10, ((2, 2),))]
    assert copies_of(seats, 3, 0) == [
        Copy(0, 5, 10, due=0, after=-1),
        Copy(1, 0, 5, due=1, after=-1),
        Copy(2, 0, 5, due=2, after=0),
        Copy(2, 5, 10, due=2, after=1),
    ]


def test_bytes_that_one_unit_needs_together_cannot_overlap() -> None:
    assert copies_of([Seat(0, 10, ((0, 0),)), Seat(5, 10, ((0, 0),))], 2, 0) is None
    assert copies_of([Seat(0, 10, ((0, 2),)), Seat(5, 10, ((1, 1),))], 3, 0) is None


@pytest.mark.parametrize("seed", range(20))
def test_rounding_follows_what_was_asked_within_half_an_item(seed: int) -> None:
    draw = random.Random(seed)
    sizes = [tuple(draw.randint(1, 100) for _ in range(draw.randint(1, 8))) for _ in range(50)]
    asked = [draw.random() * sum(unit) for unit in sizes]
    chosen = round_to_items(asked, sizes)
    taken = [sum(unit[i] for i in some) for unit, some in zip(sizes, chosen, strict=True)]
    assert np.abs(np.cumsum(asked) - np.cumsum(taken)).max() <= 100


@pytest.mark.parametrize("seed", range(60))
def test_the_fluid_finds_a_residency_exactly_where_the_linear_program_does(seed: int) -> None:
    draw = random.Random(seed)
    count = draw.choice([3, 8, 20])
    nbytes, seconds, idle = ([draw.random() * scale for _ in range(count)] for scale in (1.0, 0.5, 0.2))
    starts = np.cumsum([0.0, *(s + i for s, i in zip(seconds, idle, strict=True))])
    pace, streamed = float(starts[-1]), draw.uniform(0.2, 1.0) * sum(nbytes)
    room, rate = draw.uniform(1, 6) * streamed / count, draw.uniform(0.9, 2) * streamed / pace
    flow = Flow.at(pace, starts[:-1], np.array(seconds), rate)
    found = flow.residency(np.array(nbytes), streamed, room)
    assert (found is not None) == _feasible(nbytes, flow.carried, streamed, room)
    assert found is None or found.sum() == pytest.approx(streamed)


def _feasible(nbytes: list[float], carried: np.ndarray, streamed: float, room: float) -> bool:
    """The same constraints for HiGHS: due (0..n), copied by each start (n..2n) and each end (2n..3n)."""
    count, rows, limits = len(nbytes), [], []

    def at_most(later: int, earlier: int, most: float) -> None:
        row = np.zeros(3 * count)
        row[later] += 1
        row[earlier] -= 1
        rows.append(row)
        limits.append(most)

    for k in range(count):
        before, wrap = (k - 1) % count, 0.0 if k else streamed
        at_most(k, before, nbytes[k] - wrap)
        at_most(before, k, wrap)
        at_most(k, count + k, 0)
        at_most(2 * count + k, before, room - wrap)
        at_most(count + k, 2 * count + before, carried[2 * k] - wrap)
        at_most(2 * count + before, count + k, wrap)
        at_most(2 * count + k, count + k, carried[2 * k + 1])
        at_most(count + k, 2 * count + k, 0)
    nothing = np.zeros(3 * count)
    return bool(linprog(nothing, A_ub=np.array(rows), b_ub=limits, bounds=[(None, None)] * (3 * count)).status == 0)


@pytest.mark.parametrize("seed", range(6))
def test_the_rehearsal_says_what_the_graph_says(seed: int) -> None:
    draw = random.Random(seed)
    trace = tgo.Trace.from_units(
        {"name": f"u{i}", "seconds": 1e-3 * draw.random(), "tensors": [draw.randint(1, 1800) * 512 for _ in range(4)]}
        for i in range(8)
    )
    budget = int(trace.weight_bytes * draw.uniform(0.5, 0.9))
    drafter = Drafter(take_stock(trace, tuple(call.cost(SLOW_LINK) for call in trace.calls)), budget, SLOW_LINK)
    draft = search(drafter, drafter.everything_streams())
    assert draft is not None
    assert plan_of(trace, budget, "auto").predict(12).step_seconds == pytest.approx(draft.step_seconds, rel=1e-6)
