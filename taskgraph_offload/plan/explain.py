"""Says in words what a plan does: who stays, what streams, what bounds the step, what another budget would do."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..nouns.budget import readable, readable_seconds
from ..nouns.names import printable, spoken
from ..nouns.timeline import Timeline
from .binding import gap, what_binds
from .simulate import SETTLED

if TYPE_CHECKING:
    from .plan import Plan


def explain(plan: Plan) -> str:
    """A page about a plan, for people."""
    return "\n".join(f"{label:<12}{text}" for label, text in facts(plan))


def facts(plan: Plan) -> list[tuple[str, str]]:
    """The same as pairs of a label and what there is to say."""
    timeline = plan.predict(SETTLED)
    found = [
        ("plan", f"{plan.trace.model}, {plan.title}, on {plan.machine.name}"),
        ("budget", _budget(plan)),
        ("resident", _residents(plan)),
        ("streamed", _streamed(plan)),
        *_unread(plan),
        ("step", _step(plan, timeline)),
        ("bound by", what_binds(timeline)),
        *([("gap", gap(plan, timeline))] if plan.bound.step_seconds else []),
        *_outlook(plan, timeline),
        *_warnings(plan),
    ]
    return [(label, printable(spoken(text))) for label, text in found]


def _budget(plan: Plan) -> str:
    parts = [f"arena {readable(plan.arena_bytes)}", f"activations {readable(max(plan.activation_bytes))}"]
    if plan.margin_bytes:
        parts.append(f"margin {readable(plan.margin_bytes)} for the allocator")
    spare = plan.budget_bytes - plan.peak_bytes - plan.margin_bytes
    return f"{readable(plan.budget_bytes)}: {', '.join(parts)}, unused {readable(spare)}"


def _residents(plan: Plan) -> str:
    weights = plan.trace.weights
    nbytes = sum(weights[name].nbytes for name in plan.residents)
    fixed = sum(weights[name].nbytes for name in plan.trace.fixed if name in plan.seats)
    always = f", {readable(fixed)} of it always (read between blocks, or changed)" if fixed else ""
    share = nbytes / plan.trace.weight_bytes if plan.trace.weight_bytes else 1.0
    stays = [bundle.name for bundle in plan.bundles.values() if bundle.resident]
    return f"{readable(nbytes)} ({share:.0%} of the weights){always}: {_some(stays)}"


def _streamed(plan: Plan) -> str:
    copies = [task for task in plan.steady if task.kind == "h2d"]
    if not copies:
        return "nothing"
    back = sum(plan.task_bytes(task) for task in plan.steady if task.kind == "d2h")
    text = f"{readable(plan.streamed_bytes)} per step in {len(copies)} copies: "
    return (
        text + _some(list(dict.fromkeys(task.name for task in copies))) + (f"; {readable(back)} back" if back else "")
    )


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


def _outlook(plan: Plan, timeline: Timeline) -> list[tuple[str, str]]:
    if plan.outlook is None:
        return []
    step, more = timeline.step_seconds, plan.outlook.one_more_gib_step_seconds
    gain = 1 - more / step if step else 0.0
    shorter = f"a step of about {readable_seconds(more)}, {gain:.1%} less" if gain > 5e-4 else "no shorter step"
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


def _some(names: list[str], most: int = 4) -> str:
    if not names:
        return "none"
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
