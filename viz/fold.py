"""Leaves out of a program's timeline what repeats, so that the phases can be seen. Draws nothing.

before    clip | t5 | transformer 0 | 1 | 2 | 3 | ............ | 26 | 27 | vae
after     clip | t5 | transformer 0 | 1 |                             27 | vae
                                         26 left out: they are like the one before
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, replace

from taskgraph_offload.nouns.timeline import MemoryPoint, Span, Timeline

FIRST, LAST = 2, 1  # iterations of a phase that are shown


@dataclass(frozen=True, slots=True)
class Phase:
    """A component that runs some times in a row: `[start, stop)` in seconds. `left_out` are at the moment `cut`."""

    component: str
    times: int
    start: float
    stop: float
    left_out: int = 0
    cut: float = 0.0


def folded(timeline: Timeline) -> tuple[Timeline, list[Phase]]:
    """A timeline without most of the iterations, and its phases as they are then. Nothing changes for one model."""
    if not timeline.of_program:
        return timeline, []
    found = [_runs(run) for run in _phases(timeline)]
    holes = [hole for _, hole in found if hole is not None]
    moves = [0.0]
    for start, stop in holes:
        moves.append(moves[-1] + stop - start)
    starts = [start for start, _ in holes]

    def moved(moment: float) -> float:
        index = bisect_right(starts, moment)
        if index and moment < holes[index - 1][1]:
            moment = holes[index - 1][1]  # what happens in a hole happens where it was
        return moment - moves[index]

    spans = []
    for span in timeline.spans:
        index = bisect_right(starts, span.start)
        if index and span.stop <= holes[index - 1][1]:
            continue
        spans.append(replace(span, start=moved(span.start), stop=moved(span.stop)))
    memory: dict[float, int] = {}
    for point in timeline.memory:
        memory[moved(point.seconds)] = point.nbytes
    phases = [
        replace(
            phase,
            start=moved(phase.start),
            stop=moved(phase.stop),
            cut=moved(hole[1]) if hole is not None else 0.0,
        )
        for phase, hole in found
    ]
    points = tuple(MemoryPoint(*point) for point in sorted(memory.items()))
    return replace(timeline, spans=tuple(spans), memory=points), phases


def _phases(timeline: Timeline) -> Iterator[list[Span]]:
    """The calls of each phase, in order."""
    run: list[Span] = []
    for span in timeline.lane("compute"):
        goes_on = run and (run[-1].cycle, run[-1].component) == (span.cycle, span.component)
        if not goes_on or span.iteration < run[-1].iteration:
            if run:
                yield run
            run = []
        run.append(span)
    if run:
        yield run


def _runs(run: list[Span]) -> tuple[Phase, tuple[float, float] | None]:
    """A phase, and the seconds of it that are left out."""
    times = run[-1].iteration + 1
    phase = Phase(run[0].component, times, run[0].start, run[-1].stop)
    if times <= FIRST + LAST + 1:
        return phase, None
    start = max((span.stop for span in run if span.iteration < FIRST), default=run[0].start)
    stop = max(span.stop for span in run if span.iteration < times - LAST)
    return replace(phase, left_out=times - FIRST - LAST), (start, stop)
