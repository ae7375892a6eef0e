"""Decide which modules are blocks, and where to cut the forward into calls and pieces.

Looks at module names and at what was recorded. Never runs anything.

    records     |enter a  |enter a.0  |exit a.0  |exit a  |enter b ...        one per module entered or left
    regions     |------------ a -----------------|- glue -|--- b ----         inside a block, or between two
    pieces      |---- a ----|------- a.0 --------|- a:after -|- b ---         a record that uses weights begins one
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import groupby

from torch import Tensor, nn

from taskgraph_offload.errors import SettingsError
from taskgraph_offload.nouns.names import START, above
from taskgraph_offload.nouns.trace import INPUT, Activation, Boundary, Call, Piece, Weight, call_name

from .recorder import ROOT, Lifetime, Record

LISTS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)
SMALL_LIST_ITEM = 1 / 16  # a list item with at most this share of the bytes is never looked into
LARGE_MODULE = 1 / 2  # a module outside lists with more than this share is always looked into
LEFT_OUT = 1 / 1000  # the smallest modules found, with at most this share together, are no blocks


@dataclass
class Usage:
    """The weights that each called module uses: in all (`inside`), and in its own code without its children (`own`).

    `called_within` are the modules that were running when the module was called.
    """

    inside: dict[str, set[str]] = field(default_factory=dict)
    own: dict[str, set[str]] = field(default_factory=dict)
    called_within: dict[str, set[str]] = field(default_factory=dict)

    @staticmethod
    def of(records: Sequence[Record]) -> Usage:
        """The usage that a run showed."""
        usage = Usage()
        for record, running in zip(records, _running(records), strict=True):
            weights = {*record.reads, *record.writes}
            usage.own.setdefault(running[-1], set()).update(weights)
            usage.called_within.setdefault(running[-1], set()).update(running[:-1])
            for module in running:
                usage.inside.setdefault(module, set()).update(weights)
        return usage

    @staticmethod
    def guessed(model: nn.Module, names_of: Callable[[Tensor], Sequence[str]]) -> Usage:
        """A guess without a run: each module is called and uses the weights that it owns."""
        usage = Usage()
        for name, module in model.named_modules():
            if not isinstance(module, nn.ModuleList | nn.ModuleDict):
                direct = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
                tensors = [*module.parameters(), *module.buffers()]
                usage.inside[name] = {weight for tensor in tensors for weight in names_of(tensor)}
                usage.own[name] = {weight for tensor in direct for weight in names_of(tensor)}
        return usage


def choose_blocks(model: nn.Module, usage: Usage, weights: Mapping[str, Weight]) -> list[str]:
    """The modules that are blocks, none within another.

    The search goes down from the root. A called module that uses weights is a block if no module below it uses any,
    or if its own code uses at least half of its bytes. Otherwise
    - an item of a ModuleList, Sequential or ModuleDict is a block, unless it has more than 1/16 of all bytes and
      holds another list of two or more composite modules of one class (a stage of a UNet, made of blocks);
    - another module is a block if it has at most half of all bytes (a Sequential: at most 1/16) and holds no list
      with a composite module (so the search goes into an encoder, however small).
    In a module that is no block, the search goes on. The smallest modules found, with at most 1/1000 of the bytes
    together, are no blocks: their weights stay resident. The root is a block only if nothing else is.
    """
    return _Chooser(model, usage, weights).choose()


def match_blocks(patterns: Sequence[str], usage: Usage) -> list[str]:
    """The called modules whose names match. If one match is called within another, only the outer one."""
    called = [name for name in usage.own if name]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in called):
            example = ", ".join(repr(name) for name in called[:3]) or "none at all"
            raise SettingsError(
                f"blocks pattern {pattern!r} matches no module that the forward calls; it calls {example}"
            )
    return _outermost([name for name in called if any(fnmatchcase(name, pattern) for pattern in patterns)], usage)


@dataclass
class _Chooser:
    model: nn.Module
    usage: Usage
    weights: Mapping[str, Weight]

    def choose(self) -> list[str]:
        self.names = {id(module): name for name, module in self.model.named_modules()}
        self.total = max(self._bytes(self.usage.inside.get("", set())), 1)
        found = _outermost(list(dict.fromkeys(self._walk("", self.model, False))), self.usage)
        sizes = {name: self._bytes(self.usage.inside[name]) for name in found}
        kept = [name for name in found if sizes[name] > _largest_left_out(sizes, self.total * LEFT_OUT)]
        return kept or ([""] if "" in self.usage.own else [])

    def _walk(self, name: str, module: nn.Module, is_list_item: bool) -> Iterator[str]:
        if name and self.usage.inside.get(name) and self._stays_whole(name, module, is_list_item):
            yield name
            return
        for child in module.children():
            yield from self._walk(self.names[id(child)], child, isinstance(module, LISTS))

    def _stays_whole(self, name: str, module: nn.Module, is_list_item: bool) -> bool:
        inside, own = self._bytes(self.usage.inside[name]), self._bytes(self.usage.own.get(name, set()))
        if own * 2 >= inside or not self._is_composite(module):
            return True
        if is_list_item:
            return inside <= self.total * SMALL_LIST_ITEM or not self._holds_list(module, alike=2)
        limit = SMALL_LIST_ITEM if isinstance(module, LISTS) else LARGE_MODULE
        return inside <= self.total * limit and not self._holds_list(module, alike=1)

    def _uses_weights(self, module: nn.Module) -> bool:
        return bool(self.usage.inside.get(self.names[id(module)]))

    def _is_composite(self, module: nn.Module) -> bool:
        return any(self._uses_weights(below) for below in module.modules() if below is not module)

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


def add_unread(records: Sequence[Record], blocks: Collection[str], weights: Iterable[Weight]) -> None:
    """Count weights that this run did not read, but another may, as read while their nearest module that ran runs.

        blocks.3         enter router exit   enter experts.1 exit      the router did not pick experts 0, 2 and 3
        read here, too   |----------- all of experts.* -----------|

    Only inside blocks. Elsewhere such a weight would have to stay resident.
    """
    running = _running(records)
    ran = {module for modules in running for module in modules}
    read = {name for record in records for name in (*record.reads, *record.writes)}
    for weight in weights:
        owner = None if weight.name in read else _owner(weight, ran, blocks)
        for record, modules in zip(records, running, strict=True):
            if owner in modules:
                record.reads[weight.name] = None


def _owner(weight: Weight, ran: Collection[str], blocks: Collection[str]) -> str | None:
    """The nearest module above a weight that ran, if it is a block or inside one."""
    for name in (weight.name, *weight.aliases):
        modules = list(above(name))
        nearest = next((place for place, module in enumerate(modules) if module in ran), None)
        if nearest is not None and any(module in blocks for module in modules[nearest:]):
            return modules[nearest]
    return None


@dataclass
class Region:
    """Neighbouring records inside one call of a block, or between two calls (`block` is None), by index."""

    block: str | None
    boundary: Boundary
    records: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Folded:
    """The calls of a forward, and for each record the index of its piece."""

    calls: tuple[Call, ...]
    piece_of_record: tuple[int, ...]


def fold(records: Sequence[Record], blocks: Sequence[str]) -> Folded:
    """Fold records into calls: one for each time that a block runs, and one for what runs between two."""
    calls: list[Call] = []
    names: list[str] = []
    parts_of_pieces: list[list[int]] = []
    for region in _kept(list(_regions(records, set(blocks))), records):
        parts = _parts(region, records) if region.block is not None else [region.records]
        boundaries = [region.boundary] + [records[part[0]].boundary for part in parts[1:]]
        pieces = tuple(_piece(place, [records[i] for i in part]) for place, part in zip(boundaries, parts, strict=True))
        names.append(_name(region, names))
        calls.append(Call(names[-1], region.block, pieces))
        parts_of_pieces += parts
    piece_of = {record: piece for piece, part in enumerate(parts_of_pieces) for record in part}
    return Folded(tuple(calls), tuple(piece_of[i] for i in range(len(records))))


def lasting(folded: Folded, lifetimes: Sequence[Lifetime]) -> tuple[Activation, ...]:
    """The activations that live across calls, in the order in which they were made."""
    call_of = [i for i, call in enumerate(folded.calls) for _ in call.pieces]
    made: Counter[str] = Counter()
    found = []
    for lifetime in lifetimes:
        producer = INPUT if lifetime.producer == INPUT else folded.piece_of_record[lifetime.producer]
        until = len(call_of) if lifetime.end is None else folded.piece_of_record[lifetime.end] + 1
        if not lifetime.nbytes or (producer != INPUT and call_of[producer] == call_of[until - 1]):
            continue
        maker = "input" if producer == INPUT else folded.calls[call_of[producer]].name
        uses = tuple(sorted({folded.piece_of_record[use] for use in lifetime.uses}))
        found.append(Activation(f"{maker}/{made[maker]}", lifetime.nbytes, producer, uses, until))
        made[maker] += 1
    return tuple(found)


def always_resident(calls: Sequence[Call]) -> dict[str, str]:
    """The weights that cannot stream, and why."""
    between = dict.fromkeys(
        (name for call in calls if call.block is None for name in call.reads), "read between blocks"
    )
    return between | dict.fromkeys((name for call in calls for name in call.writes), "changed by the forward")


def _regions(records: Sequence[Record], blocks: set[str]) -> Iterator[Region]:
    region, depth = Region(None, records[0].boundary), 0
    for index, record in enumerate(records):
        place = record.boundary
        if region.block is None and place.side == "enter" and place.module in blocks:
            yield region
            region, depth = Region(place.module, place), 1
        elif region.block == place.module:
            depth += 1 if place.side == "enter" else -1
            if depth == 0:
                yield region
                region = Region(None, place)
        region.records.append(index)
    yield region


def _kept(regions: Sequence[Region], records: Sequence[Record]) -> list[Region]:
    """Join regions between blocks that do nothing to the region before them, or the first ones to the next region."""
    kept: list[Region] = []
    waiting: list[int] = []
    for region in regions:
        idle = region.block is None and not any(records[i].works for i in region.records)
        if not idle:
            region.records[:0] = waiting
            waiting = []
            kept.append(region)
        elif kept:
            kept[-1].records += region.records
        else:
            waiting += region.records
    return kept or [Region(None, records[0].boundary, waiting)]


def _parts(region: Region, records: Sequence[Record]) -> list[list[int]]:
    """Cut a region before each record that uses weights, unless nothing has run since the last cut."""
    parts: list[list[int]] = []
    busy = False  # whether the part so far has done anything
    for index in region.records:
        if not parts or (busy and records[index].uses_weights):
            parts.append([])
            busy = False
        parts[-1].append(index)
        busy = busy or records[index].works
    return parts


def _piece(boundary: Boundary, part: Sequence[Record]) -> Piece:
    return Piece(
        boundary,
        reads=tuple(dict.fromkeys(name for record in part for name in record.reads)),
        writes=tuple(dict.fromkeys(name for record in part for name in record.writes)),
        flops=sum(record.flops for record in part),
        flop_bytes=sum(record.flop_bytes for record in part),
        other_bytes=sum(record.other_bytes for record in part),
        transient_bytes=max(record.peak_bytes for record in part),
    )


def _name(region: Region, names: Sequence[str]) -> str:
    """A name for the call that no call before it has."""
    if region.block is not None:
        return call_name(region.block or "model", region.boundary.occurrence, names)
    return call_name(f"{names[-1]}:after" if names else START, 0, names)


def _running(records: Sequence[Record]) -> list[tuple[str, ...]]:
    """For each record, the modules that run in it, the outermost first. The root always runs."""
    stack, found = [""], []
    for record in records:
        if record.boundary.side == "enter" and record.boundary != ROOT:
            stack.append(record.boundary.module)
        elif record.boundary.side == "exit" and len(stack) > 1:
            stack.pop()
        found.append(tuple(stack))
    return found


def _outermost(found: Sequence[str], usage: Usage) -> list[str]:
    """Without the modules that were called within another one of them."""
    return [name for name in found if not (usage.called_within.get(name, set()) - {name}) & set(found)]


def _largest_left_out(sizes: Mapping[str, int], allowance: float) -> int:
    """The largest size up to which all modules together stay within the allowance."""
    together, limit = 0, 0
    for size, same in groupby(sorted(sizes.values())):
        together += size * len(list(same))
        if together > allowance:
            break
        limit = size
    return limit
