"""Proves that the arena and the activations fit the budget in every call, and that no call uses an absent activation.

    d2h      [--~x--]
    compute  [---- a ----][---- b ----][---- c ----]       d2h ~x before compute b, h2d ~x after compute b
    h2d                                [--~x--]
    away                  [ - - - - - -)

An activation leaves room only while it is surely away, in every order in which the lanes may run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from .program import Order, Program, Step


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
    for step in (step for step in program.steps if step.task.kind == "compute"):
        away = [absence.name for absence in found if absence.covers(step, order)]
        activations = activation_peak(program, step, away)
        nbytes = plan.arena_bytes + activations + plan.margin_bytes
        if nbytes > plan.budget_bytes:
            why = f"arena {plan.arena_bytes} + activations {activations} + margin {plan.margin_bytes} = {nbytes}"
            early = [absence.back for absence in found if absence.back and absence.ends_too_early(step, order)]
            hint = "".join(f"; {copy} may run before it has ended" for copy in early)
            program.refuse(f"{step}: {why}, over the budget of {plan.budget_bytes}{hint}", step, *early)


def activation_peak(program: Program, step: Step, away: Sequence[str]) -> int:
    """The peak of activations in a call, without those in `away` that would be alive."""
    lives = [program.activations[name] for name in away]
    call = program.calls[step.task.name]
    return max(
        piece.transient_bytes - sum(life.nbytes for life in lives if life.producer < index < life.until)
        for index, piece in zip(program.pieces[call.name], call.pieces, strict=True)
    )


def absences(program: Program) -> Iterator[Absence]:
    """Follow each activation that is ever copied, in each cycle alone: no activation outlives its forward."""
    for name in dict.fromkeys(step.task.name for step in program.steps if step.task.is_activation):
        for steps in program.cycles:
            yield from follow(program, name, steps)


def follow(program: Program, name: str, steps: Sequence[Step]) -> Iterator[Absence]:
    """Follow one activation through one cycle: it leaves, no call uses it while it is away, it comes back."""
    absence: Absence | None = None
    piece = 0  # the first that is not issued yet
    for step in steps:
        if step.task.kind == "compute":
            piece = program.pieces[step.task.name].stop
            if absence and absence.since.index <= step.index and name in program.used_by(step.task.name):
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
