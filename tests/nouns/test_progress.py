"""Long work says how far it is, to a caller who listens."""

from __future__ import annotations

from collections import defaultdict

import taskgraph_offload as tgo
from taskgraph_offload.nouns.progress import listening


def heard_while_sweeping() -> dict[str, list[tuple[int, int]]]:
    """What a listener hears while `auto` and `keep` are planned under three budgets."""
    heard = defaultdict(list)
    trace = tgo.Trace.from_units([{"name": name, "seconds": 1e-3, "tensors": [2**22] * 4} for name in "abcdef"])
    planner = tgo.Planner.for_trace(trace, "50%", machine="rtx4090")
    with listening(lambda what, done, total: heard[what].append((done, total))):
        planner.sweep(["40%", "60%", "80%"], ["auto", "keep"])
    planner.sweep(["40%"], ["keep"])  # nobody listens any more
    return heard


def test_a_sweep_reports_each_plan_and_nothing_once_nobody_listens() -> None:
    assert heard_while_sweeping()["plans"] == [(done, 6) for done in range(7)]


def test_the_search_reports_drafts_up_to_their_number() -> None:
    drafts = heard_while_sweeping()["drafts"]
    assert len(drafts) > 3
    assert all(done <= total for done, total in drafts)
    assert drafts[-1][0] == drafts[-1][1]


def test_a_comparison_reports_each_strategy() -> None:
    heard = []
    trace = tgo.Trace.from_units([{"name": name, "seconds": 1e-3, "tensors": [2**22]} for name in "abcd"])
    with listening(lambda *report: heard.append(report)):
        tgo.Planner.for_trace(trace, "50%", machine="rtx4090").compare(["keep", "sequential"])
    assert heard == [("strategies", done, 2) for done in range(3)]
