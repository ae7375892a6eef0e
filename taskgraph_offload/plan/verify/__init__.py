"""Proves a plan safe before it runs, or refuses it and names both culprits. It repairs nothing.

It unrolls a plan over its cold cycle and two steady ones, and proves two things:

    in the order of issue     every call finds the right bytes of its weights, and room for its activations
    in every order            if two tasks touch the same byte and one of them writes it, then edges of the graph
                              lead from one to the other, so they run in the order of issue

So a call reads the same bytes however the lanes interleave. Three cycles stand for all: a steady cycle leaves each byte
either untouched or as its last copy wrote it, so the third cycle begins exactly as every later one. For the same reason
three equal iterations in a row of a program's component stand for any number of them.

It shares no code with what makes plans. It takes their edges as a claim, and computes everything else again.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import zip_longest
from operator import attrgetter
from textwrap import shorten
from typing import TYPE_CHECKING, NoReturn, TypeAlias

from ...errors import PlanError
from ...nouns.graph import ACTIVATION, LANES, Task, TaskGraph

if TYPE_CHECKING:
    from ...nouns.trace import Activation, Call
    from ..plan import Bundle, Plan

ALIGNMENT = 512  # bytes: where the seat of a weight may begin
MOST_STEPS = 60_000  # of a program, without equal iterations
KEPT = 3  # equal iterations in a row that stand for any number
CONTEXT = 3  # lines of the plan printed on either side of a culprit


@dataclass(frozen=True, slots=True)
class Step:
    """One task of the unrolled plan; `index` counts in the order in which the host issues them."""

    index: int
    cycle: int
    task: Task

    def __str__(self) -> str:
        return f"{self.cycle}/{self.task}"


@dataclass(frozen=True, slots=True)
class Seat:
    """Where a weight lies in the arena: bytes [start, stop)."""

    weight: str
    bundle: str
    start: int
    stop: int


class Order:
    """For each task: the tasks that have surely ended when it begins, as the bits of a number."""

    def __init__(self, predecessors: Sequence[Sequence[int]]) -> None:
        self.before: list[int] = []
        for direct in predecessors:
            bits = 0
            for index in direct:
                bits |= self.before[index] | 1 << index
            self.before.append(bits)

    def holds(self, first: Step, second: Step) -> bool:
        """Whether `first` has ended when `second` begins."""
        return bool(self.before[second.index] >> first.index & 1)


class Program:
    """The cold cycle of a plan and two steady ones, as one list of steps."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.order = [call.name for call in plan.trace.order]
        self.steps: list[Step] = []
        self.cycles: list[list[Step]] = []
        for cycle, tasks in enumerate((plan.cold, plan.steady, plan.steady)):
            for task in tasks:
                self.steps.append(Step(len(self.steps), cycle, task))
            self.cycles.append(self.steps[-len(tasks) :] if tasks else [])
        self.calls: dict[str, Call] = {}
        self.pieces: dict[str, range] = {}  # by call: the indices of its pieces, counted through all calls
        self.piece_count = 0
        for call in plan.trace.calls:
            self.calls[call.name] = call
            self.pieces[call.name] = range(self.piece_count, self.piece_count + len(call.pieces))
            self.piece_count += len(call.pieces)
        self.activations: dict[str, Activation] = {}  # by the name that tasks use
        for activation in plan.trace.activations:
            self.activations[ACTIVATION + activation.name] = activation

    @cached_property
    def seats(self) -> dict[str, list[Seat]]:
        """By bundle. Each weight begins at the next aligned byte behind the one before."""
        found: dict[str, list[Seat]] = {}
        for bundle in self.plan.bundles.values():
            start = bundle.offset
            found[bundle.name] = []
            for weight in bundle.weights:
                stop = start + self.plan.trace.weights[weight].nbytes
                found[bundle.name].append(Seat(weight, bundle.name, start, stop))
                start = stop + -stop % ALIGNMENT
        return found

    @cached_property
    def seats_for(self) -> dict[str, dict[str, Seat]]:
        """By component and weight: where its calls read it, in a bundle of their own or in one for all."""
        found: dict[str, dict[str, Seat]] = {call.component: {} for call in self.calls.values()}
        for component, seats in found.items():
            for bundle in self.plan.bundles.values():
                for seat in self.seats[bundle.name]:
                    if bundle.component == component or (bundle.component is None and seat.weight not in seats):
                        seats[seat.weight] = seat
        return found

    @cached_property
    def sizes(self) -> dict[str, int]:
        """By bundle: the bytes from its first to its last."""
        found = {}
        for name, bundle in self.plan.bundles.items():
            found[name] = max((seat.stop - bundle.offset for seat in self.seats[name]), default=0)
        return found

    @cached_property
    def room(self) -> dict[str, int]:
        """By call: where the arena ends for it. Its activations use the bytes from there on."""
        lent = self.plan.lent
        return {name: self.plan.arena_bytes - lent.get(call.component, 0) for name, call in self.calls.items()}

    def activations_of(self, call: str) -> tuple[list[str], list[str]]:
        """The activations that a call reads and that other calls, or the caller, made; and those that it makes."""
        used, made, inside = list[str](), list[str](), self.pieces[call]
        for name, activation in self.activations.items():
            if activation.producer in inside:
                made.append(name)
            elif not set(inside).isdisjoint(activation.uses):
                used.append(name)
        return used, made

    def refuse(self, why: str, *culprits: Step | Bundle) -> NoReturn:
        """Raise `PlanError`: why, and the plan around the culprits, each marked with an arrow."""
        rows: list[Step | Bundle] = [*self.plan.bundles.values(), *self.steps]
        marked = [place for place, row in enumerate(rows) if row in culprits]
        raise PlanError("\n".join([why, *_around(rows, marked)]))


def _around(rows: Sequence[Step | Bundle], marked: Sequence[int]) -> Iterator[str]:
    """The rows near the marked ones, dots where some are left out."""
    near = sorted({i for m in marked for i in range(m - CONTEXT, m + CONTEXT + 1) if 0 <= i < len(rows)})
    for previous, place in zip([-1, *near], [*near, len(rows)], strict=True):
        if place != previous + 1:
            yield "       ..."
        if place < len(rows):
            row = rows[place]
            text = str(row) if isinstance(row, Step) else f"bundle {row.name} at {row.offset}: {' '.join(row.weights)}"
            yield ("  ---> " if place in marked else "       ") + shorten(text, 100)


if TYPE_CHECKING:
    from ..plan import Bundle, Plan

ARENA = "the arena"


def verify(plan: Plan, graph: TaskGraph | None = None) -> None:
    """Prove that a plan is safe with the edges of `graph`, by default its own, or raise `PlanError`.

    >>> import taskgraph_offload as tgo
    >>> trace = tgo.Trace.from_units([{"name": n, "seconds": 1e-3, "tensors": [2**20]} for n in "abcd"])
    >>> verify(tgo.Planner.for_trace(trace, "2MiB", strategy="layerwise", machine="cpu").plan())
    """
    whole = Program(plan)
    prove_trace(whole)
    prove_bundles(whole)
    prove_seats(whole)
    prove_tasks(whole)
    program = Program(few_iterations(plan)) if plan.trace.program and graph is None else whole
    if plan.trace.program and len(program.steps) > MOST_STEPS:
        program.refuse(f"{len(program.steps)} tasks of iterations that are not alike are too many to prove")
    prove_residency(program)
    order = prove_graph(program, program.plan.graph(cycles=len(program.cycles)) if graph is None else graph)
    prove_gates(program, order)
    prove_room(program, order)
    prove_lent(program)
    prove_bytes(program, order)


def prove_trace(program: Program) -> None:
    """Each call has a name of its own, and no activation outlives an iteration of a program."""
    if len(program.calls) < len(program.plan.trace.calls):
        program.refuse("two calls of the trace have the same name")
    if program.plan.trace.program and program.activations:
        program.refuse("a program has no activations that a plan could move")


def few_iterations(plan: Plan) -> Plan:
    """The plan with three of the equal iterations that follow each other, if there are more."""
    cold, steady = _iterations(plan, plan.cold), _iterations(plan, plan.steady)
    names = [name for name, times in plan.trace.program for _ in range(times)]
    kept = []
    for index, name in enumerate(names):
        alike = 0  # earlier iterations that are the same, in both cycles
        while alike < KEPT and alike < index and names[index - alike - 1] == name:
            before = index - alike - 1
            if cold[before] != cold[index] or steady[before] != steady[index]:
                break
            alike += 1
        if alike < KEPT:
            kept.append(index)
    return replace(
        plan,
        trace=replace(plan.trace, program=tuple((names[index], 1) for index in kept)),
        cold=tuple(task for index in kept for task in cold[index]),
        steady=tuple(task for index in kept for task in steady[index]),
    )


def _iterations(plan: Plan, tasks: Sequence[Task]) -> list[list[Task]]:
    """The tasks of each iteration of a component, from its first call on; the first has what is before all calls."""
    lengths = [len(plan.trace.calls_of[name]) for name, times in plan.trace.program for _ in range(times)]
    found: list[list[Task]] = [[]]
    missing = lengths[0]  # calls of this iteration
    for task in tasks:
        if task.kind == "compute":
            if not missing:
                missing = lengths[len(found)]
                found.append([])
            missing -= 1
        found[-1].append(task)
    return found


def prove_bundles(program: Program) -> None:
    """Each bundle holds weights of the trace, and each call finds each weight that it reads in just one bundle."""
    plan = program.plan
    carrier: dict[tuple[str, str | None], Bundle] = {}
    components = {call.component for call in program.calls.values()}
    for name, bundle in plan.bundles.items():
        if name != bundle.name or name.startswith(ACTIVATION):
            program.refuse(f"bundle {bundle.name!r} cannot go by the name {name!r}", bundle)
        if bundle.component is not None and bundle.component not in components:
            program.refuse(f"bundle {name!r} is for {bundle.component!r}, which has no call", bundle)
        for weight in bundle.weights:
            if weight not in plan.trace.weights:
                program.refuse(f"bundle {name!r} holds {weight!r}, which is no weight of the trace", bundle)
            other = carrier.setdefault((weight, bundle.component), bundle)
            if other is not bundle or bundle.weights.count(weight) > 1:
                program.refuse(f"weight {weight!r} is twice in bundles: {other.name!r} and {name!r}", other, bundle)
    for call in plan.trace.calls:
        for weight in call.reads:
            if weight in call.writes and any(weight == other for other, component in carrier if component is not None):
                program.refuse(f"{call.name} changes weight {weight!r}, which has a bundle for one component alone")
            if (weight, None) not in carrier and (weight, call.component) not in carrier:
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
        expected = iter(program.order)
        for step in steps:
            if step.task.kind == "compute" and step.task.name != (call := next(expected, None)):
                program.refuse(f"{step}: the trace has {f'the call {call!r}' if call else 'no call'} here", step)
        for call in expected:
            program.refuse(f"cycle {cycle} ends without the call {call!r}", *steps[-1:])


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
    plan, arrivals, departures = program.plan, dict[str, Step](), set[str]()
    for step in program.cycles[1]:
        if step.task.kind == "h2d":
            arrivals[step.task.name] = step
        elif step.task.kind == "d2h":
            departures.add(step.task.name)
    read, written = set[str](), set[str]()
    for call in plan.trace.calls:
        written.update(call.writes)
        for weight in call.reads:
            read.add(program.seats_for[call.component][weight].bundle)
    for name, bundle in plan.bundles.items():
        if bundle.resident and name in arrivals:
            program.refuse(f"bundle {name!r} is resident, yet {arrivals[name]} copies it again", bundle, arrivals[name])
        if not bundle.resident and name in read and name not in arrivals:
            program.refuse(f"bundle {name!r} is never copied in a steady cycle: it should be marked resident", bundle)
    for bundle in plan.bundles.values():
        for weight in bundle.weights:
            stays = bundle.resident or (weight in written and bundle.name in departures)
            if weight in plan.trace.fixed and not stays:
                reason = plan.trace.fixed[weight]
                program.refuse(f"weight {weight!r} must stay ({reason}), but bundle {bundle.name!r} does not", bundle)


# --- the graph: its nodes are the tasks, and its edges keep the order of each lane and of the gates ------------------


def prove_graph(program: Program, graph: TaskGraph) -> Order:
    """The nodes are the steps, each waits for earlier ones only (so there is no circle), and each lane is a FIFO.

    On CUDA, waiting for an event that is not recorded yet does nothing. So every edge must lead forward.
    """
    prove_nodes(program, graph)
    place = dict(zip(graph.dag, range(len(program.steps)), strict=True))
    for before, after in graph.dag.edges:
        if place[before] >= place[after]:
            first, second = program.steps[place[before]], program.steps[place[after]]
            program.refuse(f"{second} waits for {first}, which the host issues later", first, second)
    predecessors: list[list[int]] = []
    for node in graph.dag:
        predecessors.append(list(map(place.__getitem__, graph.dag.pred[node])))
    order = Order(predecessors)
    for lane in LANES:
        last: Step | None = None
        for step in program.steps:
            if step.task.lane == lane:
                if last is not None and not order.holds(last, step):
                    program.refuse(f"{step} does not wait for {last}, which is before it in lane {lane}", last, step)
                last = step
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


# --- room: the arena and the activations fit the budget in every call, and no call uses an absent activation ---------
#
#     d2h      [--~x--]
#     compute  [---- a ----][---- b ----][---- c ----]       d2h ~x before compute b, h2d ~x after compute b
#     h2d                                [--~x--]
#     away                  [ - - - - - -)
#
# An activation leaves room only while it is surely away, in every order in which the lanes may run.


@dataclass(frozen=True, slots=True)
class Absence:
    """An activation is away from the beginning of the call `since` until the copy `back` is issued, if one is."""

    name: str
    copy: Step
    since: Step
    back: Step | None = None

    def spans(self, step: Step) -> bool:
        """Whether it lasts through a call, if tasks run in the order of issue."""
        end = self.back.index if self.back else None
        return step.cycle == self.since.cycle and self.since.index <= step.index and (end is None or step.index < end)

    def ends_too_early(self, step: Step, order: Order) -> bool:
        """Whether the copy back, which is issued after a call, may already take memory while that call runs."""
        return self.spans(step) and self.back is not None and not order.holds(step, self.back)

    def covers(self, step: Step, order: Order) -> bool:
        """Whether it lasts through a call, in every order in which the lanes may run."""
        return self.spans(step) and not self.ends_too_early(step, order)


def prove_room(program: Program, order: Order) -> None:
    """In every call of every cycle: the arena, the present activations and the margin fit the budget."""
    plan, found = program.plan, list(absences(program))
    for step in program.steps:
        if step.task.kind != "compute":
            continue
        away = []
        for absence in found:
            if absence.covers(step, order):
                away.append(absence.name)
        activations = activation_peak(program, step, away)
        room = program.room[step.task.name]
        nbytes = room + activations + plan.margin_bytes
        if nbytes > plan.budget_bytes:
            why = f"arena {room} + activations {activations} + margin {plan.margin_bytes} = {nbytes}"
            early = [absence.back for absence in found if absence.back and absence.ends_too_early(step, order)]
            hint = "".join(f"; {copy} may run before it has ended" for copy in early)
            program.refuse(f"{step}: {why}, over the budget of {plan.budget_bytes}{hint}", step, *early)


def prove_lent(program: Program) -> None:
    """Only bytes of the arena are lent; and while calls of a component follow each other, no copy uses what they have.

    Such a call counts as a write of these bytes. So `prove_bytes` proves that nothing else touches them while it runs.
    """
    plan, components = program.plan, {call.component for call in program.calls.values()}
    for component, nbytes in plan.lent.items():
        if component not in components or not 0 <= nbytes <= plan.arena_bytes:
            program.refuse(f"{nbytes} bytes of an arena of {plan.arena_bytes} are lent to {component!r}")
    copies = list[Step]()
    owner, room = "", plan.arena_bytes
    for step in program.steps:
        if step.task.kind != "compute":
            copies.append(step)
            continue
        call = program.calls[step.task.name]
        if call.component == owner:
            for copy in copies:
                if not copy.task.is_activation and _arena_stop(program, copy.task) > room:
                    program.refuse(f"{copy} uses bytes that are lent to {owner!r}", copy, step)
        owner, room, copies = call.component, program.room[call.name], []


def _arena_stop(program: Program, copy: Task) -> int:
    """Where the bytes end that a copy writes; 0 if there are none."""
    if not program.sizes[copy.name]:
        return 0
    return program.plan.bundles[copy.name].offset + (program.sizes[copy.name] if copy.stop is None else copy.stop)


def activation_peak(program: Program, step: Step, away: Sequence[str]) -> int:
    """The peak of activations in a call, without those in `away` that would be alive."""
    call, peaks = program.calls[step.task.name], list[int]()
    for index, piece in zip(program.pieces[call.name], call.pieces, strict=True):
        nbytes = piece.transient_bytes
        for name in away:
            life = program.activations[name]
            if life.producer < index < life.until:
                nbytes -= life.nbytes
        peaks.append(nbytes)
    return max(peaks)


def absences(program: Program) -> Iterator[Absence]:
    """Follow each activation that is ever copied, in each cycle alone: no activation outlives its forward."""
    copied: dict[str, None] = {}
    for step in program.steps:
        if step.task.is_activation:
            copied[step.task.name] = None
    for name in copied:
        for steps in program.cycles:
            yield from follow(program, name, steps)


def follow(program: Program, name: str, steps: Sequence[Step]) -> Iterator[Absence]:
    """Follow one activation through one cycle: it leaves, no call uses it while it is away, it comes back."""
    absence: Absence | None = None
    piece = 0  # the first that is not issued yet
    for step in steps:
        if step.task.kind == "compute":
            piece = program.pieces[step.task.name].stop
            if absence and absence.since.index <= step.index and name in program.activations_of(step.task.name)[0]:
                program.refuse(f"{step} uses {name}, which {absence.copy} took away", absence.copy, step)
        elif step.task.name == name and step.task.kind == "d2h":
            if absence:
                program.refuse(f"{step} takes {name}, which {absence.copy} took already", absence.copy, step)
            absence = Absence(name, step, _call_without(program, step, steps))
            _prove_alive(program, step, piece)
            _prove_alive(program, step, program.pieces[absence.since.task.name].start)
        elif step.task.name == name:
            if absence is None or step.index < absence.since.index:
                program.refuse(f"{step} brings {name} back, which has not gone", step)
            _prove_alive(program, step, piece)
            yield replace(absence, back=step)
            absence = None
    if absence:
        life = program.activations[name]
        if life.producer < 0 or life.until >= program.piece_count:
            program.refuse(f"{absence.copy}: the caller holds {name}, and nothing brings it back", absence.copy)
        yield absence


def _call_without(program: Program, copy: Step, steps: Sequence[Step]) -> Step:
    """The first call that runs without the activation that leaves."""
    for step in steps:
        if step.index > copy.index and step.task.kind == "compute" and step.task.name == copy.task.before:
            return step
    program.refuse(f"{copy} names no later call of its cycle before which {copy.task.name} is gone", copy)


def _prove_alive(program: Program, copy: Step, piece: int) -> None:
    """When all pieces before this one are issued, the activation that is copied was made and is still alive."""
    life = program.activations[copy.task.name]
    if life.producer >= piece:
        program.refuse(f"{copy}: no call has made {copy.task.name} yet", copy)
    if life.until <= piece and life.until < program.piece_count:
        program.refuse(f"{copy}: {copy.task.name} is dead by then", copy)


# --- bytes: no two tasks race, and every task finds what it expects --------------------------------------------------
#
# Cut every line of bytes wherever the range of a task begins or ends, and check each segment alone:
#
#     tasks        h2d a, h2d b     [------ a ------)[------ b ------)
#                  h2d c                      [------ c ------)
#     segments                      [---------|------|--------|------)
#     who touches                    h2d a     h2d a  h2d b    h2d b
#                                    compute a h2d c  h2d c    compute b
#                                              ...


@dataclass(frozen=True, slots=True)
class Touch:
    """Bytes [start, stop) of a line of bytes that a task reads or writes, and the bundle that it expects there."""

    line: str
    start: int
    stop: int
    writes: bool
    bundle: str = ""


Access: TypeAlias = tuple[Step, Touch]


def prove_bytes(program: Program, order: Order) -> None:
    """Every two accesses of a byte are ordered unless both read, and every read finds the right bytes."""
    lines: dict[str, list[Access]] = {}
    touches: dict[Task, list[Touch]] = {}
    for step in program.steps:
        if step.task not in touches:
            touches[step.task] = touches_of(program, step.task)
        for touch in touches[step.task]:
            lines.setdefault(touch.line, []).append((step, touch))
    for line, accesses in lines.items():
        for start, stop, found in segments(accesses):
            where = f"bytes [{start}:{stop}] of {line}"
            prove_ordered(program, order, where, found)
            if line == ARENA:
                prove_contents(program, where, start, found)


def touches_of(program: Program, task: Task) -> list[Touch]:
    """What a task reads and writes."""
    if task.kind == "compute":
        return _touches_of_call(program, task.name)
    arrives, home = task.kind == "h2d", f"the home of {task.name}"
    if task.is_activation:
        nbytes = program.activations[task.name].nbytes
        return [Touch(task.name, 0, nbytes, arrives), Touch(home, 0, nbytes, not arrives)]
    offset = program.plan.bundles[task.name].offset
    start, stop = task.start, program.sizes[task.name] if task.stop is None else task.stop
    return [Touch(ARENA, offset + start, offset + stop, arrives, task.name), Touch(home, start, stop, not arrives)]


def _touches_of_call(program: Program, call: str) -> list[Touch]:
    """The weights that a call uses, neighbouring seats of one bundle joined if it uses them alike; then activations."""
    written = set(program.calls[call].writes)
    found: list[Touch] = []
    seats = program.seats_for[program.calls[call].component]
    for seat in sorted(map(seats.__getitem__, program.calls[call].reads), key=attrgetter("start")):
        touch = Touch(ARENA, seat.start, seat.stop, seat.weight in written, seat.bundle)
        last = found[-1] if found else None
        if last and (last.stop, last.writes, last.bundle) == (touch.start, touch.writes, touch.bundle):
            found[-1] = replace(touch, start=last.start)
        else:
            found.append(touch)
    if (room := program.room[call]) < program.plan.arena_bytes:
        found.append(Touch(ARENA, room, program.plan.arena_bytes, writes=True))
    used, made = program.activations_of(call)
    for name in used:
        found.append(Touch(name, 0, program.activations[name].nbytes, writes=False))
    for name in made:
        found.append(Touch(name, 0, program.activations[name].nbytes, writes=True))
    return found


def segments(accesses: Sequence[Access]) -> Iterator[tuple[int, int, Sequence[Access]]]:
    """Ranges with the same accesses for all their bytes, in the order of issue; of equal ranges only the last."""
    places: set[int] = set()
    for _, touch in accesses:
        places |= {touch.start, touch.stop}
    cuts = sorted(places)
    found: dict[int, list[int]] = defaultdict(list)
    for number, (_, touch) in enumerate(accesses):
        for index in range(bisect_left(cuts, touch.start), bisect_left(cuts, touch.stop)):
            found[index].append(number)
    alike: dict[tuple[int, ...], int] = {}
    for index in sorted(found):
        alike[tuple(found[index])] = index
    for numbers, index in alike.items():
        yield cuts[index], cuts[index + 1], list(map(accesses.__getitem__, numbers))


def prove_ordered(program: Program, order: Order, where: str, accesses: Sequence[Access]) -> None:
    """When a write begins, all earlier accesses have ended; when a read begins, all earlier writes have ended."""
    touched = written = 0  # the bits of tasks, as in `Order`
    for step, touch in accesses:
        racing = (touched if touch.writes else written) & ~order.before[step.index]
        if racing:
            other = program.steps[racing.bit_length() - 1]
            program.refuse(f"{other} and {step} race on {where}: no path of edges orders them", other, step)
        touched |= 1 << step.index
        if touch.writes:
            written |= 1 << step.index


def prove_contents(program: Program, where: str, place: int, accesses: Sequence[Access]) -> None:
    """Replay some bytes of the arena: which copy brought them, and which call has changed them since."""
    brought: Step | None = None
    changed: Step | None = None
    for step, touch in accesses:
        if touch.writes and not touch.bundle:  # an activation lies there
            prove_expendable(program, where, step, brought, changed)
            brought = None
            continue
        if touch.writes and step.task.kind == "h2d":
            prove_expendable(program, where, step, brought, changed)
            brought, changed = step, None
            continue
        if brought is None or brought.task.name != touch.bundle:
            wanted = f"{step} reads {_content(program, touch.bundle, place)} from {where}"
            if brought is None:
                program.refuse(f"{wanted}: nothing has brought it, or it was lent since", step)
            program.refuse(f"{wanted}, but {brought} has overwritten them", brought, step)
        if step.task.kind == "d2h":
            changed = None
        elif touch.writes:
            changed = step


def prove_expendable(program: Program, where: str, copy: Step, brought: Step | None, changed: Step | None) -> None:
    """Nothing overwrites a resident, nor bytes that changed since they were last copied home."""
    if changed is not None:
        program.refuse(f"{copy} overwrites {where}, which {changed} changed and no d2h copied home", changed, copy)
    if brought is not None and brought.task.name != copy.task.name and program.plan.bundles[brought.task.name].resident:
        program.refuse(f"{copy} overwrites {where}, which {brought} brought to stay: it is resident", brought, copy)


def _content(program: Program, bundle: str, place: int) -> str:
    """What a bundle has at a place of the arena."""
    for seat in program.seats[bundle]:
        if seat.start <= place < seat.stop:
            return f"weight {seat.weight!r}"
    return f"the gap between weights of {bundle!r}"
