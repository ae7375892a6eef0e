"""A map of byte ranges agrees with a list that has one value for each byte."""

from __future__ import annotations

import random

from taskgraph_offload.nouns.ranges import ByteMap

BYTES = 40


def value_of_each_byte(line: ByteMap[int]) -> list[int]:
    return [value for start, stop, value in line.over(0, BYTES) for _ in range(start, stop)]


def test_a_map_agrees_with_a_list_of_bytes() -> None:
    """Whatever ranges are replaced in whatever order, and the parts returned are what was there, clipped."""
    for seed in range(50):
        rng, line, expected = random.Random(seed), ByteMap(0), [0] * BYTES
        for value in range(1, 30):
            start, stop = rng.randint(0, BYTES), rng.randint(0, BYTES)
            looked = line.over(start, stop)
            parts = line.replace(start, stop, value)
            assert (
                [old for a, b, old in parts for _ in range(a, b)]
                == expected[start:stop]
                == [old for a, b, old in looked for _ in range(a, b)]
            )
            assert [a for a, _, _ in parts][1:] == [b for _, b, _ in parts][:-1]  # no gap between two parts
            expected[start:stop] = [value] * max(0, stop - start)
            assert value_of_each_byte(line) == expected


def test_looking_cuts_nothing() -> None:
    line = ByteMap("a")
    line.over(10, 20)
    assert line.over(0, 30) == [(0, 30, "a")]


def test_parts_of_a_value_that_changes_change_alone() -> None:
    line = ByteMap[list[str]]([], copy=list)
    for seen in line.fit(10, 30):
        seen.append("first")
    for seen in line.fit(20, 40):
        seen.append("second")
    assert line.over(0, 50) == [
        (0, 10, []),
        (10, 20, ["first"]),
        (20, 30, ["first", "second"]),
        (30, 40, ["second"]),
        (40, 50, []),
    ]


def test_an_empty_range_is_nothing() -> None:
    line = ByteMap("a")
    assert line.replace(10, 10, "b") == line.over(10, 10) == line.fit(10, 10) == []
    assert line.over(0, 20) == [(0, 20, "a")]
