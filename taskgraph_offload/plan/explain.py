"""Says in words what a plan does: what stays, what streams, why a step is not shorter, what other budgets would do.

    compute  --[- x -]                          [- y -]--      y waits, though x has ended long ago:
    h2d               [--- a ---][----- y -----]               a window in which the link cannot keep up

Reads a plan and its predicted timeline; decides nothing.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from ..nouns.budget import readable, readable_seconds
from ..nouns.names import START, printable, spoken
from ..nouns.timeline import Span, Stall, Timeline, clip, length
from .connect import unroll
from .plan import Plan

BUSY = 0.98  # a lane that works for this share of the step bounds it
CLOSE = 0.002  # of the step: a gap to the bound that is not worth closing
NAMED = 0.1  # of the gap: a smaller part of it is not named
PROMISED = 0.05  # of the bound: the gap within which a good plan stays


def explain(plan: Plan) -> str:
    """A page about a plan, for people."""
    lines = facts(plan)
    width = max(len(label) for label, _ in lines)
    return "\n".join(f"{label:<{max(width, 10)}}  {text}" for label, text in lines)


def facts(plan: Plan) -> list[tuple[str, str]]:
    """The lines of the page, as pairs of a label and a text."""
    timeline = plan.predict(plan.settled)
    found = [
        ("plan", f"{plan.trace.model}, {plan.title}, on {plan.machine.name}"),
        ("budget", _budget(plan)),
        ("resident", _residents(plan)),
        ("streamed", _streamed(plan)),
        *_phases(plan),
        *_unread(plan),
        (plan.trace.cycle, _step(plan, timeline)),
        ("bound by", what_binds(timeline, plan.trace.cycle)),
        *([("gap", gap(plan, timeline))] if plan.bound.step_seconds else []),
        *_outlook(plan, timeline),
        *_warnings(plan),
    ]
    return [(printable(label), printable(spoken(text))) for label, text in found]


def _phases(plan: Plan) -> list[tuple[str, str]]:
    """For each phase of a program: how much of its weights stays, and how much is copied for it in a request."""
    copied: dict[str, int] = defaultdict(int)
    for step in unroll(plan, 2):
        if step.cycle and step.lane == "h2d":
            copied[plan.calls[step.call].component] += plan.task_bytes(step.task)
    found = []
    counts = Counter[str]()
    for component, times in plan.trace.program:
        counts[component] += times
    for component, times in counts.items():
        read = {name for call in plan.trace.calls_of[component] for name in call.reads}
        weights = sum(plan.trace.weights[name].nbytes for name in read)
        stays = sum(plan.trace.weights[name].nbytes for name in read.intersection(plan.residents))
        often = "once" if times == 1 else f"{times} times"
        lent = plan.lent.get(component, 0)
        text = f"{often}, weights {readable(weights)}: {readable(stays)} stay, {readable(copied[component])} are copied"
        found.append((component, text + (f"; its activations have {readable(lent)} of the arena" if lent else "")))
    return found


def _budget(plan: Plan) -> str:
    lent = f" (up to {readable(max(plan.lent.values()))} of it lent to activations)" if plan.lent else ""
    parts = [f"arena {readable(plan.arena_bytes)}{lent}", f"activations {readable(max(plan.activation_bytes))}"]
    if plan.margin_bytes:
        parts.append(f"margin {readable(plan.margin_bytes)} for the device: its allocator and libraries")
    spare = plan.budget_bytes - plan.peak_bytes - plan.margin_bytes
    return f"{readable(plan.budget_bytes)}: {', '.join(parts)}, unused {readable(spare)}"


def _residents(plan: Plan) -> str:
    weights = plan.trace.weights
    nbytes = sum(weights[name].nbytes for name in plan.residents)
    fixed = sum(weights[name].nbytes for name in plan.trace.fixed if name in plan.seats)
    always = f", {readable(fixed)} of it always (read between blocks, or changed)" if fixed else ""
    share = nbytes / plan.trace.weight_bytes if plan.trace.weight_bytes else 1.0
    stays = [bundle.name for bundle in plan.bundles.values() if bundle.resident]
    return f"{readable(nbytes)} ({share:.0%} of the weights){always}: {_readers(plan, stays)}"


def _streamed(plan: Plan) -> str:
    copies = [task for task in plan.steady if task.kind == "h2d"]
    if not copies:
        return "nothing"
    back = sum(plan.task_bytes(task) for task in plan.steady if task.kind == "d2h")
    text = f"{readable(plan.streamed_bytes)} per {plan.trace.cycle} in {len(copies)} copies: "
    return text + _readers(plan, [task.name for task in copies]) + (f"; {readable(back)} back" if back else "")


def _unread(plan: Plan) -> list[tuple[str, str]]:
    """The weights that the traced forward did not read: another argument or method may read them."""
    weights = plan.trace.weights
    names = [name for name in weights if name not in plan.trace.readers]
    nbytes = sum(weights[name].nbytes for name in names)
    share = f"{readable(nbytes)} ({nbytes / plan.trace.weight_bytes:.0%} of the weights)" if nbytes else ""
    return [("not read", f"{share}, not planned: {_some(names)}")] if nbytes else []


def _step(plan: Plan, timeline: Timeline) -> str:
    bound = plan.bound.step_seconds
    ratio = f" ({timeline.step_seconds / bound:.3f} times the bound, {readable_seconds(bound)})" if bound else ""
    overlap = f", {timeline.overlap:.0%} of the copying hidden" if plan.streamed_bytes else ""
    first = f"; the first {readable_seconds(timeline.cold_seconds)}"
    return f"{readable_seconds(timeline.step_seconds)} predicted{ratio}{overlap}{first}"


def what_binds(timeline: Timeline, cycle: str = "step") -> str:
    """What keeps the last cycle of a timeline from being shorter: compute, the link, or a window by its calls."""
    step, last = timeline.step_seconds, timeline.cycles - 1
    if step <= 0 or timeline.compute_seconds >= BUSY * step:
        return f"compute: it works {timeline.compute_seconds / step if step > 0 else 1:.1%} of the {cycle}"
    copying = sum(span.seconds for span in timeline.lane("h2d", last))
    if copying >= BUSY * step:
        return f"the link: it copies {min(1.0, copying / step):.1%} of the {cycle}"
    stalls = timeline.stalls()
    worst = stalls[0]
    return (
        f"stalls: compute waits {readable_seconds(timeline.stall_seconds)} in {len(stalls)} places, "
        f"longest before {worst.call}: {readable_seconds(worst.seconds)}{_window(timeline, worst)}"
    )


def gap(plan: Plan, timeline: Timeline) -> str:
    """How far a plan's step is from the bound, and why."""
    step, bound = timeline.step_seconds, plan.bound.step_seconds
    if step - bound <= CLOSE * step:
        computes = timeline.compute_seconds >= BUSY * step
        what = "faster compute" if computes else "more memory or a faster link"
        return f"none: only {what} makes a {plan.trace.cycle} shorter"
    parts = []
    latencies = step - plan.predict(plan.settled, replace(plan.machine, latency_seconds=0.0)).step_seconds
    if latencies >= NAMED * (step - bound):
        parts.append(f"{readable_seconds(latencies)} of it the latency of copies")
    parts += _unknown_to_the_bound(plan, step - bound)
    if step > bound * (1 + PROMISED):
        parts.append("Planner.compare() shows whether another strategy comes closer")
    return f"{step / bound - 1:.1%} over the bound, {readable_seconds(step - bound)}: {'; '.join(parts)}"


def _unknown_to_the_bound(plan: Plan, seconds: float) -> list[str]:
    """What the bound leaves out: weights are whole, each has one seat, and the arena has one size all the time."""
    weights, lows = plan.trace.weights, min(plan.activation_bytes)
    room = plan.arena_bytes - sum(weights[name].nbytes for name in plan.residents)
    more = plan.machine.copy_seconds("h2d", room)
    parts = []
    if plan.streamed_bytes and more >= NAMED * seconds and not plan.trace.program:
        parts.append(f"weights stream through {readable(room)}, so each step copies as much more than what cannot stay")
    if not plan.lent and max(plan.activation_bytes) - lows >= NAMED * plan.arena_bytes:
        parts.append(f"the arena is beside the highest activations all the time, though they fall to {readable(lows)}")
    return parts or ["computing and copying whole tensors do not fit together better"]


def _window(timeline: Timeline, stall: Stall) -> str:
    """Name the copies that a stalled call waits for, back to the call whose end let the first of them start."""
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
    """Give what a stall waits for, then what that waits for, and so on; the last one is no copy to the device."""
    spans = {span.node: span for span in timeline.spans}
    node = stall.cause
    while node is not None:
        yield spans[node]
        node = spans[node].waited_for if spans[node].lane == "h2d" else None


def _outlook(plan: Plan, timeline: Timeline) -> list[tuple[str, str]]:
    if plan.outlook is None:
        return []
    step, more = timeline.step_seconds, plan.outlook.one_more_gib_step_seconds
    gain = 1 - more / step if step else 0.0
    cycle = plan.trace.cycle
    shorter = f"a {cycle} of about {readable_seconds(more)}, {gain:.1%} less" if gain > 5e-4 else f"no shorter {cycle}"
    return [
        ("no stall", f"only from a budget of {readable(plan.outlook.no_stall_bytes)} on, whatever the schedule"),
        ("1 GiB more", shorter),
    ]


def _warnings(plan: Plan) -> list[tuple[str, str]]:
    warnings = []
    if plan.trace.source == "symbolic":
        warnings.append("the forward was traced without shapes: all times and activations are guesses; pass inputs=")
    if plan.machine.shares_memory:
        warnings.append("this GPU has no memory of its own: what leaves it frees nothing, so offloading cannot help")
    return [("careful", warning) for warning in warnings]


def _readers(plan: Plan, copied: Iterable[str]) -> str:
    """Name the first blocks that read any of these bundles or activations, and count the others."""
    wanted = set(copied)
    calls = [plan.calls[call] for call, reads in plan.reads_of.items() if not wanted.isdisjoint(reads)]
    blocks = list(dict.fromkeys([call.block or call.name for call in calls]))
    return f"for {_some(blocks)}" if blocks else "none"


def _some(names: Sequence[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
