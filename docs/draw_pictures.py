"""Draws the pictures of these pages, from one small made-up model and one real pipeline. All times are predicted.

python docs/draw_pictures.py [folder]
"""

from __future__ import annotations

import json
import sys
from itertools import accumulate
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from taskgraph_offload.viz.page import (
    BLUE,
    FAINT,
    GRID,
    INK,
    PLAIN,
    TEXT_POINTS,
    TITLE_POINTS,
    WAIT,
    Page,
    block_colours,
    block_of,
    save_figure,
)

import taskgraph_offload as tgo
from taskgraph_offload.nouns.graph import Task
from taskgraph_offload.nouns.timeline import Span

MIB = 2**20
BLOCKS = 12
QUICK = range(3, 9)  # these blocks compute faster than the link can copy
BLOCK_BYTES = 192 * MIB
BUDGET = "38%"
LINK = tgo.Machine("a link of 24 GB/s", 24e9, 24e9, 1e-5, 1e14, 1e12)


def main() -> None:
    """Draw them all."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "pictures"
    auto = planner("auto").plan()
    layerwise = planner("layerwise").plan()
    tgo.viz.save_timeline(folder / "timelines.png", layerwise.predict(), auto.predict())
    draw_bound(folder / "bound.png", auto)
    draw_ring(folder / "ring.png", auto)
    tgo.viz.save_timeline(folder / "request.png", flux().predict(requests=2))


def flux() -> tgo.Plan:
    """A request of Flux.1-dev in 12 GiB: CLIP and T5 once, the transformer 28 times, the VAE once."""
    cases = Path(__file__).parent.parent / "tests" / "cases" / "program_cases.json"
    case = json.loads(cases.read_text())["flux-dev-1024"]
    traces = {name: tgo.Trace.from_units(units) for name, units in case["components"].items()}
    program = [(name, times) for name, times in case["phases"]]
    return tgo.Planner.for_program(traces, program, 12, machine="rtx4090").plan()


def planner(strategy: str) -> tgo.Planner:
    """Twelve blocks of 192 MiB, six of them with little to compute, in 38% of the memory that all weights need."""
    units = [
        {
            "name": f"blocks.{i}",
            "seconds": 2.5e-3 if i in QUICK else 9e-3,
            "transient_bytes": 16 * MIB,
            "tensors": [BLOCK_BYTES // 12] * 12,
        }
        for i in range(BLOCKS)
    ]
    return tgo.Planner.for_trace(tgo.Trace.from_units(units), BUDGET, strategy=strategy, machine=LINK)


# The bound: how many bytes the calls have needed, and how many can be there


def draw_bound(path: Path, plan: tgo.Plan) -> None:
    """One step at the bound, where the needed bytes touch what can be there; and one that is 10% faster."""
    page = Page(11.0, 4.2)
    for index, (title, share) in enumerate((("a step as long as the bound", 1.0), ("a step 10% shorter", 0.9))):
        axes = page.axes(0.7 + 5.3 * index, 0.6, 4.6, 3.0)
        _draw_needs(axes, plan, share)
        page.write(0.7 + 5.3 * index, 3.85, title, size=TITLE_POINTS, weight="bold")
    save_figure(page.figure, path)


def _draw_needs(axes: Axes, plan: tgo.Plan, share: float) -> None:
    """Needed bytes as stairs, bytes that can be there as a line; what is above the line is marked."""
    starts, first = tight_window(plan)
    begin = starts[first] + plan.trace.calls[first % BLOCKS].cost(LINK)  # the end of the first call of the window
    times = [0.0] + [share * (starts[first + k] - begin) for k in range(1, BLOCKS)]
    needs = list(accumulate([BLOCK_BYTES / 2**30] * BLOCKS))
    room, rate = room_of(plan) / 2**30, LINK.h2d_bytes_per_second / 2**30
    end, top = 1.05 * (starts[first + BLOCKS - 1] - begin), 1.2 * needs[-1]
    can = [room, room + rate * end]
    axes.fill_between([0, 1e3 * end], can, [top, top], color=GRID, linewidth=0)
    axes.plot([0, 1e3 * end], can, color=INK, linewidth=1.4)
    axes.step([1e3 * t for t in (*times, end)], [*needs, needs[-1]], where="post", color=BLUE, linewidth=1.6)
    late = [(1e3 * t, need) for t, need in zip(times, needs, strict=True) if need > room + rate * t + 1e-9]
    for moment, need in late:
        axes.plot(moment, need, "o", color=WAIT, markersize=5)
    axes.set_xlim(0, 1e3 * end)
    axes.set_ylim(0, top)
    axes.set_xlabel("ms since the end of one call", fontsize=TEXT_POINTS, color=INK, loc="right")
    axes.set_ylabel("GiB", fontsize=TEXT_POINTS, color=INK)
    inside: dict[str, Any] = {"transform": axes.transAxes, **PLAIN}
    axes.text(
        0.02, 0.92, "cannot be there yet: more than the budget holds and the link has brought", color=INK, **inside
    )
    axes.text(0.45, 0.25, "weights that the calls have read so far", color=BLUE, **inside)
    if late:
        axes.text(0.45, 0.17, "read before they can be there", color=WAIT, **inside)


def room_of(plan: tgo.Plan) -> int:
    """The bytes that weights can have: the budget without the activations."""
    return plan.budget_bytes - max(plan.activation_bytes)


def tight_window(plan: tgo.Plan) -> tuple[list[float], int]:
    """The earliest starts of the calls of eight steps, and a call from whose end on the link has no time to spare.

    Call j starts when the call before it has ended, and, for each earlier call i, not before the link could bring what
    i..j read and the device could not hold at the end of i.
    """
    seconds = [call.cost(LINK) for call in plan.trace.calls] * 8
    starts, tight = [0.0], 0
    for j in range(1, len(seconds)):
        brought = {i: starts[i] + seconds[i] + _copying(plan, j - i + 1) for i in range(max(0, j - BLOCKS + 1), j)}
        computed, latest = starts[-1] + seconds[j - 1], max(brought, key=lambda i: brought[i])
        starts.append(max(computed, brought[latest]))
        tight = latest if brought[latest] > computed and j < len(seconds) - BLOCKS else tight
    return starts, tight


def _copying(plan: tgo.Plan, blocks: int) -> float:
    """The seconds that the link needs for what so many blocks read beyond what the device can hold."""
    return max(0, blocks * BLOCK_BYTES - room_of(plan)) / LINK.h2d_bytes_per_second


# The ring: which bytes of the arena hold which weights, and when


def draw_ring(path: Path, plan: tgo.Plan) -> None:
    """Each bundle at its seat, from the start of its copy to the end of the last call that reads it."""
    timeline = plan.predict(3)
    page = Page(11.0, 4.4)
    axes = page.axes(0.7, 0.6, 10.1, 3.3)
    colours = block_colours(call.name for call in plan.trace.calls)
    for copy, stop in stays(plan, timeline):
        task = task_of(copy)
        seat, height = (plan.bundles[task.name].offset + task.start) / MIB, plan.task_bytes(task) / MIB
        place, colour = 1e3 * copy.start, colours[block_of(copy.call)]
        axes.add_patch(Rectangle((place, seat), 1e3 * copy.seconds, height, facecolor=colour, alpha=0.35))
        look = {"facecolor": colour, "edgecolor": "white", "linewidth": 0.4}
        axes.add_patch(Rectangle((1e3 * copy.stop, seat), 1e3 * (stop - copy.stop), height, **look))
    for end in timeline.ends:
        axes.axvline(1e3 * end, color=FAINT, linewidth=0.8, linestyle=(0, (2, 2)))
    axes.set_xlim(0, 1e3 * timeline.ends[-1])
    axes.set_ylim(0, plan.arena_bytes / MIB)
    axes.set_xlabel("ms", fontsize=TEXT_POINTS, color=INK, loc="right")
    axes.set_ylabel("address in the arena, MiB", fontsize=TEXT_POINTS, color=INK)
    page.write(0.7, 4.1, "the arena over the cold step and two steady steps", size=TITLE_POINTS, weight="bold")
    page.write(
        0.7,
        0.15,
        "colour: the block   ·   pale: the copy runs   ·   full: the weights are there until their last use",
    )
    save_figure(page.figure, path)


def stays(plan: tgo.Plan, timeline: tgo.Timeline) -> list[tuple[Span, float]]:
    """Each copy, and until when what it brought is used."""
    found = []
    for copy in timeline.lane("h2d"):
        bundle = plan.bundles[copy.name]
        again = min((o.start for o in timeline.lane("h2d") if o.node != copy.node and is_later(o, copy)), default=1e9)
        readers = [s for s in timeline.lane("compute") if set(bundle.weights) & set(plan.calls[s.call].reads)]
        ends = [span.stop for span in readers if copy.stop <= span.start + 1e-9 and span.stop <= again + 1e-9]
        found.append((copy, timeline.ends[-1] if bundle.resident or not ends else max(ends)))
    return found


def is_later(other: Span, copy: Span) -> bool:
    """Whether another copy brings the same bytes again."""
    one, two = task_of(copy), task_of(other)
    overlaps = two.start < (one.stop or 1 << 60) and one.start < (two.stop or 1 << 60)
    return other.name == copy.name and other.start > copy.start and overlaps


def task_of(span: Span) -> Task:
    """The task of a span; its node is `1/h2d blocks.2 [0:512]`, with ` #2` behind it where a cycle copies twice."""
    return Task.parse(span.node.partition("/")[2].partition(" #")[0])


if __name__ == "__main__":
    main()
