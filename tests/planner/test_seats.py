"""Seats: nobody sits on bytes that another still needs, and equal blocks take no more buffers than they must."""

from hypothesis import given
from hypothesis import strategies as st
from taskgraph_offload.planner.strategies import Schedule, arena_bytes, lives, place

import taskgraph_offload as tgo
from taskgraph_offload.nouns.graph import parse_tasks

from ..made import trace_of


def schedule_of(text: str, trace: tgo.Trace) -> Schedule:
    bundles = {call.name: call.reads for call in trace.calls}
    return Schedule(bundles, frozenset(), parse_tasks(text))


def test_a_life_goes_from_the_copy_to_the_last_reader_round_the_end():
    trace = trace_of([512] * 3)
    found = {
        life.name: life.arcs
        for life in lives(schedule_of("h2d b\ncompute a\ncompute b\nh2d a\ncompute c", trace), trace)
    }
    assert found == {"a": ((3, 5), (0, 2)), "b": ((0, 3),), "c": None}


@st.composite
def schedules(draw: st.DrawFn) -> tuple[Schedule, tgo.Trace]:
    """Blocks of random sizes, each copied a random number of calls ahead, or staying."""
    sizes = draw(st.lists(st.integers(1, 5000), min_size=1, max_size=9))
    trace = trace_of(sizes)
    count = len(sizes)
    behind: dict[int, list[str]] = {}
    for index, call in enumerate(trace.calls):
        ahead = draw(st.integers(0, count))
        if ahead:
            behind.setdefault((index - ahead) % count, []).append(f"h2d {call.name}")
    text = "\n".join(
        line for i, call in enumerate(trace.calls) for line in [f"compute {call.name}", *behind.get(i, [])]
    )
    return schedule_of(text, trace), trace


@given(schedules())
def test_no_two_bundles_share_a_byte_at_any_moment(made):
    """Played through twice: whoever is read is still there, whole."""
    schedule, trace = made
    offsets = place(schedule, trace)
    holder: dict[int, str] = {}
    streams = {task.name for task in schedule.steady if task.kind == "h2d"}

    def sit(name: str) -> None:
        nbytes = sum(trace.weights[weight].nbytes for weight in schedule.bundles[name])
        holder.update((byte, name) for byte in range(offsets[name] // 64, (offsets[name] + nbytes + 63) // 64))

    for name in schedule.bundles:
        if name not in streams:
            sit(name)
    for cycle in range(3):
        for task in schedule.steady:
            if task.kind == "h2d":
                sit(task.name)
            elif cycle:  # the first round only brings everyone in
                nbytes = sum(trace.weights[weight].nbytes for weight in schedule.bundles[task.name])
                here = range(offsets[task.name] // 64, (offsets[task.name] + nbytes + 63) // 64)
                assert all(holder.get(byte) == task.name for byte in here), task
    assert all(offset % 512 == 0 for offset in offsets.values())


@given(st.integers(2, 12), st.integers(1, 4))
def test_equal_blocks_in_a_row_take_one_buffer_for_each_that_is_there(count, ahead):
    """Without wrap: depth plus one buffers, as every layerwise offloader allocates."""
    trace = trace_of([1024] * count)
    names = [call.name for call in trace.calls]
    text = [f"h2d {name}" for name in names[:ahead]]
    for i, name in enumerate(names):
        text += [f"h2d {other}" for other in names[i + ahead : i + ahead + 1]] + [f"compute {name}"]
    schedule = schedule_of("\n".join(text), trace)
    assert arena_bytes(schedule, trace) == 1024 * min(ahead + 1, count)
