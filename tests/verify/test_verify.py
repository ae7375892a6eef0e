"""The verifier: whatever is wrong with a plan is refused and named, and its good twin is accepted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest

import taskgraph_offload as tgo
from taskgraph_offload.nouns.machine import Machine
from taskgraph_offload.nouns.trace import Activation, Boundary, Call, Piece, Trace, Weight
from taskgraph_offload.plan.plan import Bound, Plan
from taskgraph_offload.plan.text import parse_plan

MACHINE = Machine("test", 1e9, 1e9, 0.0, 1e12, 1e12)


# --- plans from texts ------------------------------------------------------------------------------------------------


def make_trace(
    reads: Mapping[str, str],
    *,
    writes: Mapping[str, str] | None = None,
    transient: int = 0,
    activations: tuple[Activation, ...] = (),
) -> Trace:
    """One call of one piece for each key, which reads the weights that its value lists, 1024 bytes each."""

    def call(name: str) -> Call:
        written = tuple((writes or {}).get(name, "").split())
        return Call(
            name, name, (Piece(Boundary(name), tuple(reads[name].split()), written, transient_bytes=transient),)
        )

    names = " ".join(reads.values()).split()
    return Trace({name: Weight(name, 1024) for name in names}, tuple(map(call, reads)), activations)


def make_plan(text: str, trace: Trace) -> Plan:
    decided = parse_plan(text)
    return Plan(trace, MACHINE, bound=Bound(0, 0, 0, 0), **{name: getattr(decided, name) for name in decided.__slots__})


def edited(text: str, edits: Mapping[str, str]) -> str:
    """The text with some of its lines, or words of them, replaced: every place where they occur."""
    for old, new in edits.items():
        assert old in text, f"{old!r} is not in the plan"
        text = text.replace(old, new)
    return text


def assert_good(text: str, trace: Trace, edits: Mapping[str, str] | None = None) -> None:
    make_plan(edited(text, edits or {}), trace).verify()


def assert_bad(text: str, trace: Trace, edits: Mapping[str, str] | None, *words: str) -> str:
    """The plan is refused, and the message's first line says all these words."""
    with pytest.raises(tgo.PlanError) as caught:
        make_plan(edited(text, edits or {}), trace).verify()
    reason = str(caught.value).splitlines()[0]
    assert all(word in reason for word in words), str(caught.value)
    return str(caught.value)


# --- a plan that is right --------------------------------------------------------------------------------------------

ABC = make_trace({"a": "a.0 a.1", "b": "b.0", "c": "c.0 c.1"})
ROTATION = """
strategy test
budget 3072 margin 0 arena 3072
bundle a at 0: a.0 a.1
bundle b at 2048 resident: b.0
bundle c at 0: c.0 c.1
cold:
  h2d a
  h2d b
  compute a
  compute b
  h2d c
  compute c
steady:
  h2d a
  compute a
  compute b
  h2d c
  compute c
"""


def test_a_rotation_beside_a_resident_is_good() -> None:
    assert_good(ROTATION, ABC)


# --- structure -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("edits", "words"),
    [
        ({"a.0 a.1": "a.0 a.1 z"}, ["'a'", "'z'", "no weight"]),
        ({"b.0": "b.0 a.1"}, ["'a.1'", "'a'", "'b'"]),
        ({"b.0": "b.0 b.0"}, ["'b.0'", "twice"]),
        ({"a.0 a.1": "a.0"}, ["a reads weight 'a.1'", "no seat"]),
        ({"h2d c": "h2d z"}, ["0/h2d z", "no bundle 'z'"]),
        ({"compute b": "compute z"}, ["0/compute z", "no call 'z'"]),
        ({"h2d c": "h2d ~c"}, ["0/h2d ~c", "no activation '~c'"]),
        ({"h2d a": "h2d a [0:2560]"}, ["0/h2d a [0:2560]", "2048"]),
        ({"h2d a": "h2d a [512:512]"}, ["0/h2d a [512:512]", "2048"]),
        ({"h2d c": "h2d c after compute z"}, ["0/h2d c after compute z", "no call 'z'"]),
        ({"h2d c": "h2d c before compute z"}, ["0/h2d c before compute z", "no call 'z'"]),
        ({"compute b": "compute c", "compute c\nsteady": "compute b\nsteady"}, ["0/compute c", "'b' here"]),
        ({"steady:\n": "  compute c\nsteady:\n"}, ["0/compute c", "no call here"]),
        ({"  compute c\nsteady:": "steady:"}, ["cycle 0", "without the call 'c'"]),
        ({"steady:\n": "steady:\n  h2d b\n"}, ["'b' is resident", "1/h2d b"]),
        ({" resident": ""}, ["'b'", "should be marked resident"]),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused_by_name(edits: Mapping[str, str], words: list[str]) -> None:
    assert_bad(ROTATION, ABC, edits, *words)


def test_parts_and_gates_that_make_sense_are_good() -> None:
    parts = "h2d a [0:512]\n  h2d a [512:2048]"
    assert_good(ROTATION, ABC, {"h2d a": parts, "h2d c": "h2d c after compute a before compute c"})


def test_a_bundle_goes_by_its_own_name() -> None:
    plan = make_plan(ROTATION, ABC)
    bundles = {**plan.bundles, "b": replace(plan.bundles["b"], name="z")}
    with pytest.raises(tgo.PlanError, match="'z' cannot go by the name 'b'"):
        replace(plan, bundles=bundles).verify()


def test_a_cycle_without_any_task_is_refused() -> None:
    with pytest.raises(tgo.PlanError, match="cycle 1 ends without the call 'a'"):
        replace(make_plan(ROTATION, ABC), steady=()).verify()


def test_a_weight_that_must_stay_is_resident() -> None:
    assert_good(ROTATION, replace(ABC, fixed={"b.0": "glue reads it"}))
    assert_bad(ROTATION, replace(ABC, fixed={"a.1": "glue reads it"}), None, "'a.1'", "glue reads it", "'a'")


def test_a_weight_that_must_stay_and_that_nobody_reads_has_no_seat() -> None:
    assert_good(ROTATION, replace(ABC, weights={**ABC.weights, "z": Weight("z", 8)}, fixed={"z": "unread"}))


# --- seats and room --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("edits", "words"),
    [
        ({"b at 2048": "b at 2000"}, ["'b'", "2000", "512"]),
        ({"b at 2048": "b at 2560"}, ["'b'", "[2560:3584]", "3072"]),
        ({"arena 3072": "arena 2560"}, ["'b'", "[2048:3072]", "2560"]),
        ({"budget 3072": "budget 3071"}, ["0/compute a", "3072", "3071"]),
        ({"margin 0": "margin 1"}, ["0/compute a", "margin 1 = 3073", "3072"]),
    ],
)
def test_a_seat_or_an_arena_too_far_is_refused_with_its_numbers(edits: Mapping[str, str], words: list[str]) -> None:
    assert_bad(ROTATION, ABC, edits, *words)


def test_a_seat_before_the_arena_is_refused() -> None:
    plan = make_plan(ROTATION, ABC)
    with pytest.raises(tgo.PlanError, match=r"'b' at \[-512:512\]"):
        replace(plan, bundles={**plan.bundles, "b": replace(plan.bundles["b"], offset=-512)}).verify()


def test_activations_count() -> None:
    trace = make_trace({"a": "a.0 a.1", "b": "b.0", "c": "c.0 c.1"}, transient=100)
    assert_good(ROTATION, trace, {"budget 3072": "budget 3172"})
    assert_bad(ROTATION, trace, {"budget 3072": "budget 3171"}, "0/compute a", "3072", "100", "3171")


# --- versions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("edits", "words"),
    [
        ({"cold:\n  h2d a": "cold:"}, ["0/compute a reads weight 'a.0'", "nothing has brought it"]),
        ({"h2d a": "h2d a [0:1024]"}, ["0/compute a reads weight 'a.1'", "[1024:2048]", "nothing has brought it"]),
        ({"h2d a\n  h2d b": "h2d a\n  h2d c\n  h2d b"}, ["0/compute a reads weight 'a.0'", "0/h2d c has overwritten"]),
        ({"steady:\n  h2d a": "  h2d a\nsteady:"}, ["'a'", "should be marked resident"]),
        ({"c at 0": "c at 1024"}, ["0/h2d c overwrites bytes [2048:3072]", "0/h2d b", "resident"]),
        ({"  h2d c\n  compute c\nsteady": "  h2d c [0:1024]\n  compute c\nsteady"},
         ["0/compute c reads weight 'c.1'", "[1024:2048]", "0/h2d a has overwritten"]),
    ],
)  # fmt: skip
def test_a_call_that_would_read_wrong_bytes_is_refused(edits: Mapping[str, str], words: list[str]) -> None:
    assert_bad(ROTATION, ABC, edits, *words)


def test_what_is_right_in_the_first_steady_cycle_must_be_right_in_the_next() -> None:
    text = edited(ROTATION, {"steady:\n  h2d a": "  h2d a\nsteady:"})
    good = text.rstrip("\n") + "\n  h2d a\n"
    assert_good(good, ABC)
    once = text.rstrip("\n") + "\n  h2d a [0:1024]\n"
    assert_bad(once, ABC, None, "2/compute a reads weight 'a.1'", "1/h2d c has overwritten")


COUNTER = make_trace({"a": "a.0 a.1", "b": "b.0", "c": "c.0 c.1"}, writes={"a": "a.1"})


def test_a_weight_that_a_call_changes_goes_home_or_stays() -> None:
    assert_bad(ROTATION, COUNTER, None, "0/h2d c overwrites bytes [1024:2048]", "0/compute a changed")
    assert_good(ROTATION, COUNTER, {"compute a": "compute a\n  d2h a [1024:2048]"})
    assert_bad(ROTATION, COUNTER, {"compute a": "compute a\n  d2h a [0:1024]"}, "0/h2d c", "0/compute a changed")
    assert_good(ROTATION, replace(COUNTER, calls=ABC.calls))


def test_a_changed_weight_that_must_stay_may_go_home_instead() -> None:
    trace = replace(COUNTER, fixed={"a.1": "the forward changes it"})
    assert_good(ROTATION, trace, {"compute a": "compute a\n  d2h a"})
    assert_bad(ROTATION, trace, None, "'a.1'", "the forward changes it")


def test_a_copy_home_takes_the_bundles_own_bytes() -> None:
    assert_good(ROTATION, ABC, {"compute c": "d2h c\n  compute c"})
    assert_bad(
        ROTATION, ABC, {"compute c": "d2h a\n  compute c"}, "0/d2h a reads weight 'a.0'", "0/h2d c has overwritten"
    )
