"""Proves a plan safe before it runs, or refuses it and names both culprits. It repairs nothing.

It unrolls a plan over its cold cycle and two steady ones, and proves two things:

    in the order of issue     every call finds the right bytes of its weights, and room for its activations
    in every order            if two tasks touch the same byte and one of them writes it, then edges of the graph
                              lead from one to the other, so they run in the order of issue

So a call reads the same bytes however the lanes interleave. Three cycles stand for all: a steady cycle leaves each byte
either untouched or as its last copy wrote it, so the third cycle begins exactly as every later one.

It shares no code with what makes plans. It takes their edges as a claim, and computes everything else again.
"""

from __future__ import annotations

from itertools import pairwise, zip_longest
from typing import TYPE_CHECKING

from ...nouns.graph import ACTIVATION, LANES, Task, TaskGraph
from .program import ALIGNMENT, Order, Program, Step
from .race import prove_bytes
from .room import prove_room

if TYPE_CHECKING:
    from ..plan import Bundle, Plan


def verify(plan: Plan, graph: TaskGraph | None = None) -> None:
    """Prove that a plan is safe with the edges of `graph`, by default its own, or raise `PlanError`.

    >>> import taskgraph_offload as tgo
    >>> trace = tgo.Trace.from_units([{"name": n, "seconds": 1e-3, "tensors": [2**20]} for n in "abcd"])
    >>> verify(tgo.Planner.for_trace(trace, "2MiB", strategy="layerwise", machine="cpu").plan())
    """
    program = Program(plan)
    prove_bundles(program)
    prove_seats(program)
    prove_tasks(program)
    prove_residency(program)
    order = prove_graph(program, plan.graph(cycles=len(program.cycles)) if graph is None else graph)
    prove_gates(program, order)
    prove_room(program, order)
    prove_bytes(program, order)


def prove_bundles(program: Program) -> None:
    """Each bundle holds weights of the trace, no weight is in two bundles, and every weight that is read is in one."""
    plan = program.plan
    carrier: dict[str, Bundle] = {}
    for name, bundle in plan.bundles.items():
        if name != bundle.name or name.startswith(ACTIVATION):
            program.refuse(f"bundle {bundle.name!r} cannot go by the name {name!r}", bundle)
        for weight in bundle.weights:
            if weight not in plan.trace.weights:
                program.refuse(f"bundle {name!r} holds {weight!r}, which is no weight of the trace", bundle)
            other = carrier.setdefault(weight, bundle)
            if other is not bundle or bundle.weights.count(weight) > 1:
                program.refuse(f"weight {weight!r} is twice in bundles: {other.name!r} and {name!r}", other, bundle)
    for call in plan.trace.calls:
        for weight in call.reads:
            if weight not in carrier:
                reader = (step for step in program.cycles[0] if step.task == Task("compute", call.name))
                program.refuse(f"{call.name} reads weight {weight!r}, which has no seat: it is in no bundle", *reader)


def prove_seats(program: Program) -> None:
    """Every bundle begins at an aligned byte and lies inside the arena; so does every weight."""
    arena = program.plan.arena_bytes
    for name, bundle in program.plan.bundles.items():
        stop = bundle.offset + program.sizes[name]
        if bundle.offset % ALIGNMENT:
            program.refuse(f"bundle {name!r} begins at {bundle.offset}, not at a multiple of {ALIGNMENT}", bundle)
        if bundle.offset < 0 or stop > arena:
            program.refuse(f"bundle {name!r} at [{bundle.offset}:{stop}] leaves the arena of {arena} bytes", bundle)


def prove_tasks(program: Program) -> None:
    """Every task means something, and every cycle makes the calls of the trace in their order."""
    for step in program.steps:
        if fault := _fault_of(program, step.task):
            program.refuse(f"{step}: {fault}", step)
    for cycle, steps in enumerate(program.cycles):
        computes = [step for step in steps if step.task.kind == "compute"]
        for call, step in zip_longest(program.calls, computes):
            if step is None:
                program.refuse(f"cycle {cycle} ends without the call {call!r}", *steps[-1:])
            if step.task.name != call:
                program.refuse(f"{step}: the trace has {f'the call {call!r}' if call else 'no call'} here", step)


def _fault_of(program: Program, task: Task) -> str | None:
    for gate in (task.after, task.before):
        if gate is not None and gate not in program.calls:
            return f"there is no call {gate!r}"
    whole = task.start == 0 and task.stop is None
    if task.kind == "compute" or task.is_activation:
        kind, known = ("call", program.calls) if task.kind == "compute" else ("activation", program.activations)
        return (
            None if whole and task.name in known else f"there is no {kind} {task.name!r} that this task can take whole"
        )
    if task.name not in program.plan.bundles:
        return f"there is no bundle {task.name!r}"
    size = program.sizes[task.name]
    if not whole and (task.stop is None or not 0 <= task.start < task.stop <= size):
        return f"no bytes [{task.start}:{task.stop}] in a bundle of {size}"
    return None


def prove_residency(program: Program) -> None:
    """Residents are never copied again, all other bundles that are read are, and weights that must stay do stay."""
    plan, steady = program.plan, program.cycles[1]
    arrivals = {step.task.name: step for step in steady if step.task.kind == "h2d"}
    departures = {step.task.name for step in steady if step.task.kind == "d2h"}
    read = {program.seats[weight].bundle for call in plan.trace.calls for weight in call.reads}
    for name, bundle in plan.bundles.items():
        if bundle.resident and name in arrivals:
            program.refuse(f"bundle {name!r} is resident, yet {arrivals[name]} copies it again", bundle, arrivals[name])
        if not bundle.resident and name in read and name not in arrivals:
            program.refuse(f"bundle {name!r} is never copied in a steady cycle: it should be marked resident", bundle)
    written = {weight for call in plan.trace.calls for weight in call.writes}
    for weight, reason in plan.trace.fixed.items():
        if weight not in program.seats:
            continue  # `prove_bundles` has proved that nobody reads it
        bundle = plan.bundles[program.seats[weight].bundle]
        if not bundle.resident and not (weight in written and bundle.name in departures):
            program.refuse(f"weight {weight!r} must stay ({reason}), but bundle {bundle.name!r} does not", bundle)


def prove_graph(program: Program, graph: TaskGraph) -> Order:
    """The nodes are the steps, each waits for earlier ones only (so there is no circle), and each lane is a FIFO.

    On CUDA, waiting for an event that is not recorded yet does nothing. So every edge must lead forward.
    """
    prove_nodes(program, graph)
    place = {node: index for index, node in enumerate(graph.dag)}
    for before, after in graph.dag.edges:
        if place[before] >= place[after]:
            first, second = program.steps[place[before]], program.steps[place[after]]
            program.refuse(f"{second} waits for {first}, which the host issues later", first, second)
    order = Order([[place[before] for before in graph.dag.predecessors(node)] for node in graph.dag])
    for lane in LANES:
        for first, second in pairwise([step for step in program.steps if step.task.lane == lane]):
            if not order.holds(first, second):
                program.refuse(f"{second} does not wait for {first}, which is before it in lane {lane}", first, second)
    return order


def prove_nodes(program: Program, graph: TaskGraph) -> None:
    """The graph has exactly the tasks of the plan, in the order of issue."""
    for step, node in zip_longest(program.steps, graph.dag):
        if step is None:
            program.refuse(f"the graph goes on with {node!r} where the plan has ended", program.steps[-1])
        if node is None:
            program.refuse(f"the graph ends before {step}", step)
        data = graph.dag.nodes[node]
        claimed = (data["cycle"], data["task"], data["kind"], data["lane"])
        if claimed != (step.cycle, step.task, step.task.kind, step.task.lane):
            program.refuse(f"the graph has {node!r} where the plan has {step}", step)


def prove_gates(program: Program, order: Order) -> None:
    """Each task runs `after` the nearest earlier call that it names, and `before` the nearest later one."""
    latest: dict[str, Step] = {}
    for step in program.steps:
        if step.task.after in latest and not order.holds(latest[step.task.after], step):
            program.refuse(f"{step} does not wait for {latest[step.task.after]}", latest[step.task.after], step)
        if step.task.kind == "compute":
            latest[step.task.name] = step
    following: dict[str, Step] = {}
    for step in reversed(program.steps):
        if step.task.before in following and not order.holds(step, following[step.task.before]):
            program.refuse(f"{following[step.task.before]} does not wait for {step}", step, following[step.task.before])
        if step.task.kind == "compute":
            following[step.task.name] = step
