"""Why a step is not shorter: what binds it, how far it is from the bound, and what would close the gap.

    compute  --[- x -]                          [- y -]--      y waits, though x has long ended:
    h2d               [--- a ---][----- y -----]               a window in which the link cannot keep up

Reads a predicted timeline; decides nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from ..nouns.budget import readable, readable_seconds
from ..nouns.names import START
from ..nouns.timeline import Span, Stall, Timeline, clip, length
from .simulate import SETTLED

if TYPE_CHECKING:
    from .plan import Plan

BUSY = 0.98  # a lane that works for this share of the step is what bounds it
CLOSE = 0.002  # of the step: nearer to the bound there is nothing to win
NAMED = 0.1  # of the gap: a smaller part of it is not worth a word


def what_binds(timeline: Timeline) -> str:
    """What keeps the last step of a timeline from being shorter: compute, the link, or a window by its calls."""
    step, last = timeline.step_seconds, timeline.cycles - 1
    if step <= 0 or timeline.compute_seconds >= BUSY * step:
        return f"compute: it works {timeline.compute_seconds / step if step > 0 else 1:.1%} of the step"
    copying = sum(span.seconds for span in timeline.lane("h2d", last))
    if copying >= BUSY * step:
        return f"the link: it copies {min(1.0, copying / step):.1%} of the step"
    stalls = timeline.stalls()
    worst = stalls[0]
    cause = "" if worst.cause is None else f" for {worst.cause.partition('/')[2]}"
    return (
        f"stalls: compute waits {readable_seconds(timeline.stall_seconds)} in {len(stalls)} places, "
        f"longest {worst.call} {readable_seconds(worst.seconds)}{cause}{_window(timeline, worst)}"
    )


def gap(plan: Plan, timeline: Timeline) -> str:
    """How far a plan's step is from the bound, and what would close that."""
    step, bound = timeline.step_seconds, plan.bound.step_seconds
    if step - bound <= CLOSE * step:
        computes = timeline.compute_seconds >= BUSY * step
        return f"none: only {'faster compute' if computes else 'more memory or a faster link'} makes a step shorter"
    parts = []
    latencies = step - plan.predict(SETTLED, replace(plan.machine, latency_seconds=0.0)).step_seconds
    if latencies >= NAMED * (step - bound):
        parts.append(f"{readable_seconds(latencies)} of it the latency of copies")
    if plan.strategy == "auto":
        parts += _unavoidable(plan, step - bound)
    else:
        parts.append("strategy 'auto' comes closer")
    return f"{step / bound - 1:.1%} over the bound, {readable_seconds(step - bound)}: {'; '.join(parts)}"


def _unavoidable(plan: Plan, seconds: float) -> list[str]:
    """What the bound knows nothing of: whole tensors, one seat for each, and one arena for all the cycle."""
    weights, lows = plan.trace.weights, min(plan.activation_bytes)
    room = plan.arena_bytes - sum(weights[name].nbytes for name in plan.residents)
    more = plan.machine.copy_seconds("h2d", room)
    parts = []
    if plan.streamed_bytes and more >= NAMED * seconds:
        parts.append(f"weights stream through {readable(room)}, so each step copies as much more than what cannot stay")
    if max(plan.activation_bytes) - lows >= NAMED * plan.arena_bytes:
        parts.append(f"the arena is beside the highest activations all the time, though they fall to {readable(lows)}")
    return parts or ["computing and copying whole tensors do not fit together better"]


def _window(timeline: Timeline, stall: Stall) -> str:
    """The copies that a stalled call waits for, one behind the other, back to the call that let the first one start."""
    *copies, first = _chain(timeline, stall)
    if not copies or first.lane != "compute":
        return ""
    window = first.stop, stall.stop
    worked = length(clip(((span.start, span.stop) for span in timeline.lane("compute")), window))
    nbytes = readable(sum(span.nbytes for span in copies))
    since = "the first block" if first.call == START else f"the end of {first.call}"
    return (
        f"; from {since} on, the link brings {nbytes} in {readable_seconds(window[1] - window[0])}, "
        f"and compute has work for {readable_seconds(worked)}"
    )


def _chain(timeline: Timeline, stall: Stall) -> Iterator[Span]:
    """What a stall waits for, what that waits for, and so on, up to the first that is no copy to the device."""
    spans = {span.node: span for span in timeline.spans}
    node = stall.cause
    while node is not None:
        yield spans[node]
        node = spans[node].waited_for if spans[node].lane == "h2d" else None
