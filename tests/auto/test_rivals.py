"""`auto` is never behind what it replaces: where few large tensors stream, where calls share weights, anywhere."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from taskgraph_offload.planner.auto.fluid import round_to_items, trim
from taskgraph_offload.planner.strategies.auto import improve

import taskgraph_offload as tgo
from taskgraph_offload.plan.plan import aligned

from ..made import SLOW_LINK, plan_of, trace_of

MIB = 2**20
OTHERS = ("sequential", "keep", ("layerwise", {"residents": "leading"}), ("layerwise", {"residents": "spread"}))


def few_large_tensors(seed: int) -> list[dict[str, object]]:
    """One tensor in each unit, no two alike, and next to no compute: who streams decides everything."""
    chance = random.Random(seed)
    sizes = [chance.randrange(1, 200) * 4096 for _ in range(chance.randrange(12, 36))]
    return [{"name": f"b{i}", "seconds": nbytes * 1e-11, "tensors": [nbytes]} for i, nbytes in enumerate(sizes)]


def shared(seed: int) -> list[dict[str, object]]:
    """Every weight is read twice in a cycle, by distant calls."""
    chance = random.Random(seed)
    names = {f"b{i}": {f"b{i}.{k}": chance.randrange(1, 64) * 4096 for k in range(4)} for i in range(10)}
    return [{"name": name, "seconds": 1e-5, "tensors": names[name]} for _ in range(2) for name in names]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("units", [few_large_tensors, shared])
@pytest.mark.parametrize("share", [0.5, 0.85, 0.97])
def test_no_other_strategy_is_faster(units: object, seed: int, share: float) -> None:
    assert callable(units)
    trace = tgo.Trace.from_units(units(seed))
    budget = int(share * trace.weight_bytes)
    rows = tgo.Planner.for_trace(trace, f"{budget}B", machine=SLOW_LINK).compare(["auto", *OTHERS]).rows
    steps = {row["strategy"]: row["step_seconds"] for row in rows if row["step_seconds"] is not None}
    assert steps["auto"] <= min(steps.values()) * (1 + 1e-9), steps


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("share", [0.5, 0.7, 0.85, 0.95])
def test_of_large_tensors_hardly_more_stream_than_must(seed: int, share: float) -> None:
    """Of all sets of tensors that leave room for the largest of them, none is noticeably smaller."""
    trace = tgo.Trace.from_units(few_large_tensors(seed))
    budget, sums = int(share * trace.weight_bytes), [(0, 0)]
    sizes = [aligned(weight.nbytes) for weight in trace.weights.values()]
    for nbytes in sizes:
        sums += [(total + nbytes, max(largest, nbytes)) for total, largest in sums]
    least = min(total for total, largest in sums if total >= sum(sizes) - budget + largest)
    plan = tgo.Planner.for_trace(trace, f"{budget}B", machine=SLOW_LINK).plan()
    assert plan.streamed_bytes <= least * 1.02


def test_a_rival_that_is_faster_takes_the_place_and_the_name() -> None:
    trace = trace_of([MIB] * 8, 1e-3)
    slow, fast = (plan_of(trace, 4 * MIB, strategy) for strategy in ("sequential", "layerwise"))
    auto = replace(slow, strategy="auto")
    best = improve(auto, lambda *_: fast)
    assert (best.strategy, best.steady) == ("auto", fast.steady)
    best.verify()
    assert improve(replace(fast, strategy="auto"), lambda *_: slow).steady == fast.steady


@pytest.mark.parametrize("seed", range(20))
def test_trimming_ends_where_no_exchange_gets_nearer(seed: int) -> None:
    chance = random.Random(seed)
    sizes = [tuple(chance.randrange(1, 500) for _ in range(chance.randrange(5))) for _ in range(12)]
    share = chance.uniform(0.1, 0.9)
    least = share * sum(map(sum, sizes))
    chosen = trim(round_to_items([share * sum(unit) for unit in sizes], sizes), sizes, least)
    inside = [unit[i] for unit, some in zip(sizes, chosen, strict=True) for i in some]
    outside = [
        nbytes for unit, some in zip(sizes, chosen, strict=True) for i, nbytes in enumerate(unit) if i not in some
    ]
    over = sum(inside) - least
    exchanged = [over - leaving + coming for leaving in (0, *inside) for coming in (0, *outside)]
    assert over >= 0
    assert over <= 0.001 * least or over <= min(left for left in exchanged if left >= 0)


def test_what_cannot_be_met_is_left_as_it_is() -> None:
    assert trim([(), ()], [(3,), (4,)], 100) == [(), ()]
