"""The verifier on activations that leave and come back: when they leave room, and when they are missed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest

import taskgraph_offload as tgo
from taskgraph_offload.nouns.trace import Activation, Trace

from .test_verify import assert_bad, assert_good, make_plan, make_trace

SKIP = make_trace(
    {"down": "w0", "mid": "w1", "deep": "w2", "up": "w3"},
    transient=1000,
    activations=(Activation("x", 600, producer=0, uses=(3,), until=4), Activation("text", 50, -1, (0, 3), until=4)),
)
SPILL = """
strategy test
budget 5096 margin 0 arena 4096
bundle all at 0 resident: w0 w1 w2 w3
cold:
  h2d all
  compute down
  d2h ~x before compute mid
  compute mid
  compute deep
  h2d ~x after compute deep
  compute up
steady:
  compute down
  d2h ~x before compute mid
  compute mid
  compute deep
  h2d ~x after compute deep
  compute up
"""


def peaks(trace: Trace, **nbytes: int) -> Trace:
    """The trace with other activation peaks in some calls."""
    calls = tuple(
        replace(call, pieces=(replace(call.pieces[0], transient_bytes=nbytes.get(call.name, call.transient_bytes)),))
        for call in trace.calls
    )
    return replace(trace, calls=calls)


def test_an_activation_that_is_away_leaves_room() -> None:
    high = peaks(SKIP, mid=1600, deep=1600)
    assert_good(SPILL, high)
    assert_bad(SPILL, peaks(SKIP, mid=1601), None, "0/compute mid", "1001", "5097", "5096")
    for call in ("down", "up"):  # it is there
        assert_bad(SPILL, peaks(SKIP, **{call: 1001}), None, f"0/compute {call}", "1001", "5097", "5096")


def test_the_smallest_budget_is_what_the_plan_says() -> None:
    plan = make_plan(SPILL, peaks(SKIP, mid=1600, deep=1500))
    replace(plan, budget_bytes=plan.peak_bytes).verify()
    with pytest.raises(tgo.PlanError, match="over the budget"):
        replace(plan, budget_bytes=plan.peak_bytes - 1).verify()


def test_an_activation_that_may_come_back_early_leaves_no_room() -> None:
    anytime = {" after compute deep": ""}
    assert_good(SPILL, SKIP, anytime)
    high = peaks(SKIP, deep=1600)
    assert_good(SPILL, high)
    message = assert_bad(SPILL, high, anytime, "0/compute deep", "0/h2d ~x may run before it has ended")
    assert "---> 0/h2d ~x\n" in message


@pytest.mark.parametrize(
    ("edits", "words"),
    [
        ({"  h2d ~x after compute deep\n  compute up": "  compute up\n  h2d ~x"}, ["0/compute up uses ~x", "0/d2h ~x"]),
        ({" before compute mid": ""}, ["0/d2h ~x", "names no later call"]),
        ({"before compute mid": "before compute down"}, ["0/d2h ~x before compute down", "names no later call"]),
        ({"before compute mid": "before compute up"}, ["0/h2d ~x", "which has not gone"]),
        ({"  d2h ~x before compute mid\n": ""}, ["0/h2d ~x", "which has not gone"]),
        (
            {"  compute down\n  d2h ~x before compute mid": "  d2h ~x before compute mid\n  compute down"},
            ["no call has made ~x yet"],
        ),
        ({"  compute mid\n": "  compute mid\n  d2h ~x before compute up\n"}, ["takes ~x", "took already"]),
        (
            {"compute up\nsteady": "compute up\n  d2h ~text before compute up\nsteady"},
            ["0/d2h ~text", "names no later call"],
        ),
        (
            {"  compute down\n  d2h": "  compute down\n  d2h ~text before compute mid\n  d2h"},
            ["0/compute up uses ~text"],
        ),
    ],
)
def test_an_activation_is_followed_wherever_it_goes(edits: Mapping[str, str], words: list[str]) -> None:
    assert_bad(SPILL, SKIP, edits, *words)


def test_what_the_caller_holds_comes_back() -> None:
    trace = replace(SKIP, activations=(SKIP.activations[0], Activation("text", 50, -1, (0,), until=4)))
    leaves = "  compute down\n  d2h ~text before compute mid\n"
    assert_bad(SPILL, trace, {"  compute down\n": leaves}, "0/d2h ~text", "the caller holds ~text")
    assert_good(SPILL, trace, {"  compute down\n": leaves, "  compute up\n": "  h2d ~text\n  compute up\n"})


def test_what_is_dead_is_not_copied() -> None:
    trace = replace(SKIP, activations=(Activation("x", 600, producer=0, uses=(1,), until=2),))
    late = {"  d2h ~x before compute mid\n": "", "  h2d ~x after compute deep\n": "  d2h ~x before compute up\n"}
    assert_bad(SPILL, trace, late, "0/d2h ~x", "dead by then")
    dying = {"before compute mid": "before compute deep", "  h2d ~x after compute deep\n": ""}
    assert_bad(SPILL, trace, dying, "0/d2h ~x before compute deep", "dead by then")


def test_only_what_would_be_alive_leaves_room() -> None:
    trace = replace(peaks(SKIP, deep=1600), activations=(Activation("x", 600, producer=0, uses=(), until=2),))
    gone = {"  h2d ~x after compute deep\n": ""}
    assert_good(SPILL, peaks(trace, mid=1600, deep=1000), gone)
    assert_bad(SPILL, trace, gone, "0/compute deep", "activations 1600")
