"""What one forward of a model needs: weights, the calls that read them, and the activations between.

Nouns only. `planner.capture` makes a trace from a model, `Trace.from_units` makes one from plain numbers.
This module never looks at a model and never decides anything.

A forward is a sequence of pieces. A piece is the operators between two module boundaries. A call is one or more pieces
in a row. Every operator of the forward belongs to exactly one call:

    boundary   |enter blocks.0     |enter blocks.0.ff   |exit blocks.0    |enter blocks.1
    pieces  ---|----- attention ---|------- ff ---------|--- glue --------|---------- ...
    calls   ---|---------------- blocks.0 --------------| blocks.0:after  |-- blocks.1 ...
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Container, Iterable, Mapping
from dataclasses import astuple, dataclass, field
from functools import cached_property
from itertools import chain, repeat
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from .machine import Machine

INPUT = -1  # the `producer` of an activation that the caller passed in


@dataclass(frozen=True, slots=True)
class Weight:
    """One parameter or buffer, by the bytes it occupies: tied weights are one weight with several names."""

    name: str
    nbytes: int
    dtype: str = ""
    shape: tuple[int, ...] = ()
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Boundary:
    """A place in the forward: the `occurrence`-th time (from 0) that `module` is entered or left in a cycle."""

    module: str
    side: Literal["enter", "exit"] = "enter"
    occurrence: int = 0


@dataclass(frozen=True, slots=True)
class Piece:
    """Operators in a row that start at a module boundary. A forward is never cut inside a piece.

    Operators that count FLOPs move `flop_bytes`; the others (a norm, a copy) move `other_bytes`. `transient_bytes` is
    the peak of all activations, inputs included, while the piece runs. `seconds`, if known, replaces the estimate.
    """

    boundary: Boundary
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    flops: int = 0
    flop_bytes: int = 0
    other_bytes: int = 0
    transient_bytes: int = 0
    seconds: float | None = None

    def cost(self, machine: Machine) -> float:
        """Seconds on a machine: measured or given; else estimated by the roofline."""
        if self.seconds is not None:
            return self.seconds
        arithmetic = max(self.flops / machine.compute_flops, self.flop_bytes / machine.memory_bytes_per_second)
        return arithmetic + self.other_bytes / machine.memory_bytes_per_second


@dataclass(frozen=True)
class Call:
    """One execution of a block in the traced forward; or the code between two blocks, then `block` is None.

    `name` is unique in the cycle: `blocks.3`, its second call `blocks.3#2`, the code behind it `blocks.3:after`.
    `component` is the part of a pipeline that the call belongs to.
    """

    name: str
    block: str | None
    pieces: tuple[Piece, ...]
    component: str = ""

    @cached_property
    def reads(self) -> tuple[str, ...]:
        """The weights that the call reads or writes, each once, in the order of first use."""
        found: dict[str, None] = {}
        for piece in self.pieces:
            found |= dict.fromkeys(piece.reads + piece.writes)
        return tuple(found)

    @cached_property
    def writes(self) -> tuple[str, ...]:
        """The weights that the call changes."""
        return tuple(dict.fromkeys(chain.from_iterable(map(attrgetter("writes"), self.pieces))))

    @property
    def boundary(self) -> Boundary:
        """Where the call begins; it lasts until the next call begins."""
        return self.pieces[0].boundary

    @cached_property
    def flops(self) -> int:
        return sum(map(attrgetter("flops"), self.pieces))

    @cached_property
    def moved_bytes(self) -> int:
        """Bytes that the call's operators read and write."""
        return sum(piece.flop_bytes + piece.other_bytes for piece in self.pieces)

    @cached_property
    def transient_bytes(self) -> int:
        """The peak of all activations that exist while the call runs, used by it or not."""
        peak: int = max(map(attrgetter("transient_bytes"), self.pieces))
        return peak

    def cost(self, machine: Machine) -> float:
        """Seconds of compute on a machine."""
        return sum(map(Piece.cost, self.pieces, repeat(machine)))


@dataclass(frozen=True, slots=True)
class Activation:
    """A storage that lives across calls. `producer` and `uses` are indices of pieces, counted through all calls.

    `until` is the first piece at which it is gone; what the forward returns has the number of all pieces here.
    """

    name: str
    nbytes: int
    producer: int
    uses: tuple[int, ...]
    until: int


@dataclass(frozen=True)
class Trace:
    """What a forward needs: weights, calls in order, activations that live across calls.

    `source` says how it was made: "fake" (traced on fake tensors), "real" (one real run), "symbolic" (order only, costs
    are guesses) or "units" (plain numbers). `fixed` maps each weight that must stay on the device to the reason.

    A program is the trace of a whole request: `program` has the components of its calls in order, and how often in a
    row each of them runs. Each call is in `calls` once.

    >>> trace = Trace.from_units([{"name": "a", "seconds": 1.0, "tensors": [100, 200]}])
    >>> trace.weight_bytes, trace.calls[0].reads
    (300, ('a.0', 'a.1'))
    """

    weights: Mapping[str, Weight]
    calls: tuple[Call, ...]
    activations: tuple[Activation, ...] = ()
    model: str = "units"
    entry: str = "forward"
    source: Literal["fake", "real", "symbolic", "units"] = "units"
    fixed: Mapping[str, str] = field(default_factory=dict)
    program: tuple[tuple[str, int], ...] = ()

    @property
    def cycle(self) -> str:
        """What one cycle is called: a step of a model, or a request."""
        return "request" if self.program else "step"

    @cached_property
    def order(self) -> tuple[Call, ...]:
        """The calls of a cycle in order: each once; in a program, as often as its component runs."""
        if not self.program:
            return self.calls
        return tuple(chain.from_iterable(self.calls_of[component] * times for component, times in self.program))

    @cached_property
    def iterations(self) -> tuple[int, ...]:
        """For each call in `order`: how often in a row its component has run before."""
        if not self.program:
            return (0,) * len(self.calls)
        found: list[int] = []
        for component, times in self.program:
            for iteration in range(times):
                found += [iteration] * len(self.calls_of[component])
        return tuple(found)

    @cached_property
    def calls_of(self) -> Mapping[str, tuple[Call, ...]]:
        """The calls of each component, in order."""
        found: dict[str, list[Call]] = defaultdict(list)
        for call in self.calls:
            found[call.component].append(call)
        return dict(zip(found, map(tuple, found.values()), strict=True))

    @cached_property
    def weight_bytes(self) -> int:
        """Bytes of all weights, also of those that the forward never reads."""
        return sum(map(attrgetter("nbytes"), self.weights.values()))

    @cached_property
    def activation_bytes(self) -> int:
        """The highest peak of activations in the cycle."""
        peak: int = max(map(attrgetter("transient_bytes"), self.calls))
        return peak

    @cached_property
    def flops(self) -> int:
        return sum(map(attrgetter("flops"), self.calls))

    @cached_property
    def readers(self) -> Mapping[str, tuple[int, ...]]:
        """For each weight that is read: the places in `order` of the calls that read it."""
        lists: dict[str, list[int]] = defaultdict(list)
        for index, call in enumerate(self.order):
            for name in call.reads:
                lists[name].append(index)
        return dict(zip(lists, map(tuple, lists.values()), strict=True))

    @cached_property
    def call_of_piece(self) -> tuple[int, ...]:
        """For each piece, counted through all calls: the index of its call."""
        found: list[int] = []
        for index, call in enumerate(self.calls):
            found += [index] * len(call.pieces)
        return tuple(found)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of everything that the trace says."""
        weights = [[getattr(weight, name) for name in Weight.__slots__] for weight in self.weights.values()]
        calls = [[call.name, call.block, call.component, list(map(astuple, call.pieces))] for call in self.calls]
        lives = list(map(astuple, self.activations))
        whole = [self.model, self.entry, self.source, dict(self.fixed), weights, calls, lives]
        whole += [self.program] if self.program else []
        return hashlib.sha256(json.dumps(whole, separators=(",", ":")).encode()).hexdigest()[:32]

    def coverage(self) -> Coverage:
        """How many bytes stream with the blocks, how many always stay, and why."""
        never = [name for name in self.weights if name not in self.readers]
        return Coverage(
            total_bytes=self.weight_bytes,
            fixed_bytes=sum(self.weights[name].nbytes for name in self.fixed),
            unread_bytes=sum(self.weights[name].nbytes for name in never),
            reasons=dict(self.fixed),
        )

    @staticmethod
    def from_units(units: Iterable[Mapping[str, Any]]) -> Trace:
        """Build a trace from plain numbers, without a model.

        A unit is a dict: `name`, `seconds` of compute, `tensors` (a list of bytes, or a dict of name to bytes: a name
        that two units share is one weight), and optionally `transient_bytes`, `tensor_seconds` (the part of `seconds`
        that each tensor's operator takes: the unit can then be cut finer) and `component`.

        >>> Trace.from_units([{"name": "a", "seconds": 1, "tensors": {"x": 8}}] * 2).readers
        {'x': (0, 1)}
        """
        from .units import trace_from_units

        return trace_from_units(units)


@dataclass(frozen=True, slots=True)
class Coverage:
    """How much of a model's weights can stream, and what cannot."""

    total_bytes: int
    fixed_bytes: int
    unread_bytes: int
    reasons: Mapping[str, str]

    @property
    def block_bytes(self) -> int:
        """Bytes that are read inside blocks only, and so can stream."""
        return self.total_bytes - self.fixed_bytes - self.unread_bytes

    @property
    def share(self) -> float:
        """Of the bytes that are ever read, the share that can stream; 0 if there are weights but none is read."""
        read = self.total_bytes - self.unread_bytes
        return self.block_bytes / read if read else float(not self.total_bytes)

    def __str__(self) -> str:
        lines = [f"{self.block_bytes:,} of {self.total_bytes:,} bytes in blocks ({self.share:.2%} of what is read)"]
        lines += [f"  always resident: {name}: {reason}" for name, reason in self.reasons.items()]
        if self.unread_bytes:
            lines.append(f"  not read by the traced forward: {self.unread_bytes:,} bytes")
        return "\n".join(lines)


def call_name(block: str, occurrence: int, taken: Container[str] = ()) -> str:
    """Name a block's call: `blocks.3`, then `blocks.3#2`, `blocks.3#3`; the next number if a name is taken.

    >>> call_name("a", 0), call_name("a", 1), call_name("a", 1, {"a#2"})
    ('a', 'a#2', 'a#3')
    """
    name = block if occurrence == 0 else f"{block}#{occurrence + 1}"
    return name if name not in taken else call_name(block, occurrence + 1, taken)
