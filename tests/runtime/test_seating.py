"""The seat table against a table with an entry for every byte."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from taskgraph_offload.runtime.arena import SeatTable

SIZE = 24
RANGES = st.tuples(st.integers(0, SIZE), st.integers(0, SIZE)).map(lambda pair: (min(pair), max(pair)))
DEEDS = st.lists(st.tuples(st.sampled_from(["fill", "use", "forget"]), RANGES, st.sampled_from("abc")), max_size=30)


@given(deeds=DEEDS, asked=RANGES, holder=st.sampled_from("abc"))
def test_it_knows_of_every_byte_whose_it_is_and_who_was_there_last(deeds, asked, holder) -> None:
    table = SeatTable(SIZE, used=1)
    bytes_of: list[tuple[str | None, int, int]] = [(None, 0, 1)] * SIZE  # holder, arrived, used
    for number, (deed, (start, stop), name) in enumerate(deeds, 2):
        if deed == "fill":
            before = table.fill(start, stop, name, arrived=number)
            assert before.used == max((used for _, _, used in bytes_of[start:stop]), default=0)
            bytes_of[start:stop] = [(name, number, 0)] * (stop - start)
        elif deed == "forget":
            table.forget(start, stop)
            bytes_of[start:stop] = [(None, arrived, used) for _, arrived, used in bytes_of[start:stop]]
        else:
            for segment in table.over(start, stop):
                segment.used = number
            bytes_of[start:stop] = [(who, arrived, number) for who, arrived, _ in bytes_of[start:stop]]
            _spread(table, bytes_of)
    missing = {place for start, stop in table.missing(asked[0], asked[1], holder) for place in range(start, stop)}
    assert missing == {place for place in range(*asked) if bytes_of[place][0] != holder}
    arrived = max((segment.arrived for segment in table.over(*asked)), default=0)
    assert arrived == max((came for _, came, _ in bytes_of[slice(*asked)]), default=0)


def _spread(table: SeatTable, bytes_of: list[tuple[str | None, int, int]]) -> None:
    """A use counts for whole segments, which is more than it must: take that over."""
    for place in range(SIZE):
        (segment,) = table.over(place, place + 1)
        who, arrived, _ = bytes_of[place]
        assert segment.used >= bytes_of[place][2]
        bytes_of[place] = who, arrived, segment.used
