"""Decide which modules are blocks, and where to cut the forward into calls and pieces.

Looks at module names and at what was recorded. Never runs anything.

    segments    |enter a  |enter a.0  |exit a.0  |exit a  |enter b ...        one per module entered or left
    regions     |------------ a -----------------|- glue -|--- b ----         inside a block, or between two
    pieces      |---- a ----|------- a.0 --------|- a:after -|- b ---         a segment that meets weights begins one
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import groupby
from typing import Any

from torch import Tensor, nn

from taskgraph_offload.errors import SettingsError
from taskgraph_offload.nouns.names import START
from taskgraph_offload.nouns.trace import INPUT, Activation, Boundary, Call, Piece, Weight, call_name

from .recorder import Life, Segment

LISTS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)
SMALL_LIST_ITEM = 1 / 16  # a list item with at most this share of the bytes is never looked into
LARGE_MODULE = 1 / 2  # a module outside lists with more than this share is always looked into
LEFT_OUT = 1 / 1000  # the smallest candidates, with at most this share together, stay between the blocks


@dataclass
class Needs:
    """The weights that each called module reads or writes: while it runs, and in its own code, its children's aside."""

    inside: dict[str, set[str]] = field(default_factory=dict)
    own: dict[str, set[str]] = field(default_factory=dict)
    called_within: dict[str, set[str]] = field(default_factory=dict)  # the modules that were running at its calls

    @staticmethod
    def of(segments: Sequence[Segment]) -> Needs:
        needs, stack = Needs(), [""]
        for segment in segments:
            follow(stack, segment.boundary)
            weights = {*segment.reads, *segment.writes}
            needs.own.setdefault(stack[-1], set()).update(weights)
            needs.called_within.setdefault(stack[-1], set()).update(stack[:-1])
            for module in stack:
                needs.inside.setdefault(module, set()).update(weights)
        return needs

    @staticmethod
    def owned(model: nn.Module, names_of: Callable[[Tensor], Sequence[str]]) -> Needs:
        """What modules would need if each were called and read what it owns: a guess, for where nothing was run."""
        needs = Needs()
        for name, module in model.named_modules():
            if not isinstance(module, nn.ModuleList | nn.ModuleDict):
                direct = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
                tensors = [*module.parameters(), *module.buffers()]
                needs.inside[name] = {weight for tensor in tensors for weight in names_of(tensor)}
                needs.own[name] = {weight for tensor in direct for weight in names_of(tensor)}
        return needs


def choose_blocks(model: nn.Module, needs: Needs, weights: Mapping[str, Weight]) -> list[str]:
    """The modules whose calls are units, none within another.

    Walking down from the root, a called module that needs weights stays whole if it has no such modules below it, or
    if at least half of its bytes are read by its own code; otherwise
    - an item of a ModuleList, Sequential or ModuleDict stays whole, unless it has more than 1/16 of all bytes and
      holds a further list of two or more composite modules of one class (a stage of a UNet, made of blocks);
    - any other module stays whole if it has at most half of all bytes, a Sequential if it has at most 1/16, and holds
      no list with a composite module at all (an encoder is walked into, however small).
    What does not stay whole is walked into. The smallest modules found, with at most 1/1000 of the bytes together,
    are left between the blocks. The root is a block only if nothing else is.
    """
    return _Chooser(model, needs, weights).choose()


def check_patterns(patterns: Any) -> None:
    """Raise if `blocks=` is not a list of name patterns."""
    if isinstance(patterns, str) or not isinstance(patterns, Collection):
        example = patterns if isinstance(patterns, str) else "layers.*"
        raise SettingsError(f"blocks={patterns!r}: give a list of name patterns, as in blocks=[{example!r}]")
    if not patterns:
        raise SettingsError("blocks=[] names no module; give name patterns, as in blocks=['layers.*'], or leave it out")
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise SettingsError(f"blocks= holds {pattern!r}; give name patterns only, as in blocks=['layers.*']")


def match_blocks(patterns: Sequence[str], needs: Needs) -> list[str]:
    """The called modules whose names match; of two within each other, the outer one."""
    called = [name for name in needs.own if name]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in called):
            example = ", ".join(repr(name) for name in called[:3]) or "none at all"
            raise SettingsError(
                f"blocks pattern {pattern!r} matches no module that the forward calls; it calls {example}"
            )
    return _outermost([name for name in called if any(fnmatchcase(name, pattern) for pattern in patterns)], needs)


@dataclass
class _Chooser:
    model: nn.Module
    needs: Needs
    weights: Mapping[str, Weight]

    def choose(self) -> list[str]:
        self.names = {id(module): name for name, module in self.model.named_modules()}
        self.total = max(self._bytes(self.needs.inside.get("", set())), 1)
        found = _outermost(list(dict.fromkeys(self._walk("", self.model, False))), self.needs)
        sizes = {name: self._bytes(self.needs.inside[name]) for name in found}
        kept = [name for name in found if sizes[name] > _largest_left_out(sizes, self.total * LEFT_OUT)]
        return kept or ([""] if "" in self.needs.own else [])

    def _walk(self, name: str, module: nn.Module, is_list_item: bool) -> Iterator[str]:
        if name and self.needs.inside.get(name) and self._stays_whole(name, module, is_list_item):
            yield name
            return
        for child in module.children():
            yield from self._walk(self.names[id(child)], child, isinstance(module, LISTS))

    def _stays_whole(self, name: str, module: nn.Module, is_list_item: bool) -> bool:
        inside, own = self._bytes(self.needs.inside[name]), self._bytes(self.needs.own.get(name, set()))
        if own * 2 >= inside or not self._is_composite(module):
            return True
        if is_list_item:
            return inside <= self.total * SMALL_LIST_ITEM or not self._holds_list(module, alike=2)
        limit = SMALL_LIST_ITEM if isinstance(module, LISTS) else LARGE_MODULE
        return inside <= self.total * limit and not self._holds_list(module, alike=1)

    def _needs_weights(self, module: nn.Module) -> bool:
        return bool(self.needs.inside.get(self.names[id(module)]))

    def _is_composite(self, module: nn.Module) -> bool:
        return any(self._needs_weights(below) for below in module.modules() if below is not module)

    def _holds_list(self, module: nn.Module, alike: int) -> bool:
        """Whether a list below holds so many composite modules of one class."""
        for below in module.modules():
            if isinstance(below, LISTS):
                kinds = Counter(type(item) for item in below.children() if self._is_composite(item))
                if any(count >= alike for count in kinds.values()):
                    return True
        return False

    def _bytes(self, names: set[str]) -> int:
        return sum(self.weights[name].nbytes for name in names)


@dataclass
class Region:
    """A run of segments inside one call of a block, or between two calls (`block` is None)."""

    block: str | None
    boundary: Boundary
    segments: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Folded:
    """Calls, and for each segment the index of its piece."""

    calls: tuple[Call, ...]
    piece_of_segment: tuple[int, ...]


def fold(segments: Sequence[Segment], blocks: Sequence[str]) -> Folded:
    """Fold recorded segments into calls of blocks, and what runs between them."""
    calls: list[Call] = []
    names: list[str] = []
    runs: list[list[int]] = []
    for region in _kept(list(_regions(segments, set(blocks))), segments):
        parts = _parts(region, segments) if region.block is not None else [region.segments]
        boundaries = [region.boundary] + [segments[part[0]].boundary for part in parts[1:]]
        pieces = tuple(
            _piece(place, [segments[i] for i in part]) for place, part in zip(boundaries, parts, strict=True)
        )
        names.append(_name(region, names))
        calls.append(Call(names[-1], region.block, pieces))
        runs += parts
    piece_of = {segment: piece for piece, run in enumerate(runs) for segment in run}
    return Folded(tuple(calls), tuple(piece_of[i] for i in range(len(segments))))


def lasting(folded: Folded, lives: Sequence[Life]) -> tuple[Activation, ...]:
    """The activations that live across calls, in the order in which they were made."""
    call_of = [i for i, call in enumerate(folded.calls) for _ in call.pieces]
    made: Counter[str] = Counter()
    found = []
    for life in lives:
        producer = INPUT if life.producer == INPUT else folded.piece_of_segment[life.producer]
        until = len(call_of) if life.end is None else folded.piece_of_segment[life.end] + 1
        if not life.nbytes or (producer != INPUT and call_of[producer] == call_of[until - 1]):
            continue
        maker = "input" if producer == INPUT else folded.calls[call_of[producer]].name
        uses = tuple(sorted({folded.piece_of_segment[use] for use in life.uses}))
        found.append(Activation(f"{maker}/{made[maker]}", life.nbytes, producer, uses, until))
        made[maker] += 1
    return tuple(found)


def always_resident(calls: Sequence[Call]) -> dict[str, str]:
    """The weights that cannot stream, and why."""
    between = dict.fromkeys(
        (name for call in calls if call.block is None for name in call.reads), "read between blocks"
    )
    return between | dict.fromkeys((name for call in calls for name in call.writes), "changed by the forward")


def _regions(segments: Sequence[Segment], blocks: set[str]) -> Iterator[Region]:
    region, depth = Region(None, segments[0].boundary), 0
    for index, segment in enumerate(segments):
        place = segment.boundary
        if region.block is None and place.side == "enter" and place.module in blocks:
            yield region
            region, depth = Region(place.module, place), 1
        elif region.block == place.module:
            depth += 1 if place.side == "enter" else -1
            if depth == 0:
                yield region
                region = Region(None, place)
        region.segments.append(index)
    yield region


def _kept(regions: Sequence[Region], segments: Sequence[Segment]) -> list[Region]:
    """Regions between blocks that do nothing go to the call before them, or at the start, after them."""
    kept: list[Region] = []
    waiting: list[int] = []
    for region in regions:
        idle = region.block is None and not any(segments[i].works for i in region.segments)
        if not idle:
            region.segments[:0] = waiting
            waiting = []
            kept.append(region)
        elif kept:
            kept[-1].segments += region.segments
        else:
            waiting += region.segments
    return kept or [Region(None, segments[0].boundary, waiting)]


def _parts(region: Region, segments: Sequence[Segment]) -> list[list[int]]:
    parts: list[list[int]] = []
    busy = False  # whether the part so far has done anything
    for index in region.segments:
        if not parts or (busy and segments[index].uses_weights):
            parts.append([])
            busy = False
        parts[-1].append(index)
        busy = busy or segments[index].works
    return parts


def _piece(boundary: Boundary, run: Sequence[Segment]) -> Piece:
    return Piece(
        boundary,
        reads=tuple(dict.fromkeys(name for segment in run for name in segment.reads)),
        writes=tuple(dict.fromkeys(name for segment in run for name in segment.writes)),
        flops=sum(segment.flops for segment in run),
        flop_bytes=sum(segment.flop_bytes for segment in run),
        other_bytes=sum(segment.other_bytes for segment in run),
        transient_bytes=max(segment.peak_bytes for segment in run),
    )


def _name(region: Region, names: Sequence[str]) -> str:
    """A name of the call that none before it has."""
    if region.block is not None:
        return call_name(region.block or "model", region.boundary.occurrence, names)
    return call_name(f"{names[-1]}:after" if names else START, 0, names)


def follow(stack: list[str], boundary: Boundary) -> None:
    """Keep the stack of running modules; the root is at its bottom from the start."""
    if boundary.side == "enter" and boundary != Boundary(""):
        stack.append(boundary.module)
    elif boundary.side == "exit" and len(stack) > 1:
        stack.pop()


def _outermost(found: Sequence[str], needs: Needs) -> list[str]:
    """Without the modules that were called within another one of them."""
    return [name for name in found if not (needs.called_within.get(name, set()) - {name}) & set(found)]


def _largest_left_out(sizes: Mapping[str, int], allowance: float) -> int:
    """The largest size up to which all modules together stay within the allowance."""
    together, limit = 0, 0
    for size, same in groupby(sorted(sizes.values())):
        together += size * len(list(same))
        if together > allowance:
            break
        limit = size
    return limit
