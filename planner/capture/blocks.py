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
    chooser = _Chooser(model, usage, weights)
    sizes: dict[str, int] = {}
    for name in _outermost(list(dict.fromkeys(chooser.walk("", model, False))), usage):
        sizes[name] = chooser.bytes_of(usage.inside[name])
    return _without_the_smallest(sizes, chooser.total * LEFT_OUT) or ([""] if "" in usage.own else [])


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


class _Chooser:
    """The search of `choose_blocks`."""

    def __init__(self, model: nn.Module, usage: Usage, weights: Mapping[str, Weight]) -> None:
        self.usage, self.weights = usage, weights
        self.total = max(self.bytes_of(usage.inside.get("", set())), 1)
        self._names: dict[int, str] = {}
        for name, module in model.named_modules():
            self._names[id(module)] = name

    def walk(self, name: str, module: nn.Module, is_list_item: bool) -> Iterator[str]:
        if name and self.usage.inside.get(name) and self._stays_whole(name, module, is_list_item):
            yield name
            return
        for child in module.children():
            yield from self.walk(self._names[id(child)], child, isinstance(module, LISTS))

    def _stays_whole(self, name: str, module: nn.Module, is_list_item: bool) -> bool:
        inside, own = self.bytes_of(self.usage.inside[name]), self.bytes_of(self.usage.own.get(name, set()))
        if own * 2 >= inside or not self._is_composite(module):
            return True
        if is_list_item:
            return inside <= self.total * SMALL_LIST_ITEM or not self._holds_list(module, alike=2)
        limit = SMALL_LIST_ITEM if isinstance(module, LISTS) else LARGE_MODULE
        return inside <= self.total * limit and not self._holds_list(module, alike=1)

    def _uses_weights(self, module: nn.Module) -> bool:
        return bool(self.usage.inside.get(self._names[id(module)]))

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

    def bytes_of(self, names: Iterable[str]) -> int:
        """The bytes of some weights."""
        total = 0
        for name in names:
            total += self.weights[name].nbytes
        return total


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
    works: bool = False  # whether one of the records does anything


@dataclass(frozen=True)
class Folded:
    """The calls of a forward, for each piece the index of its call, and for each record the index of its piece."""

    calls: tuple[Call, ...]
    call_of_piece: list[int]
    piece_of_record: list[int]


def fold(records: Sequence[Record], blocks: Sequence[str]) -> Folded:
    """Fold records into calls: one for each time that a block runs, and one for what runs between two."""
    calls: list[Call] = []
    names: list[str] = []
    call_of_piece: list[int] = []
    piece_of_record = [0] * len(records)
    for region in _kept(list(_regions(records, set(blocks))), records):
        pieces: list[Piece] = []
        for part in _parts(region, records):
            for index in part:
                piece_of_record[index] = len(call_of_piece)
            pieces.append(_piece(records[part[0]].boundary if pieces else region.boundary, part, records))
            call_of_piece.append(len(calls))
        names.append(_name(region, names))
        calls.append(Call(names[-1], region.block, tuple(pieces)))
    return Folded(tuple(calls), call_of_piece, piece_of_record)


def lasting(folded: Folded, lifetimes: Sequence[Lifetime]) -> tuple[Activation, ...]:
    """The activations that live across calls, in the order in which they were made."""
    call_of, piece_of = folded.call_of_piece, folded.piece_of_record
    made: Counter[str] = Counter()
    found = []
    for lifetime in lifetimes:
        producer = INPUT if lifetime.producer == INPUT else piece_of[lifetime.producer]
        until = len(call_of) if lifetime.end is None else piece_of[lifetime.end] + 1
        if not lifetime.nbytes or (producer != INPUT and call_of[producer] == call_of[until - 1]):
            continue
        maker = "input" if producer == INPUT else folded.calls[call_of[producer]].name
        uses = tuple(sorted(set(map(piece_of.__getitem__, lifetime.uses))))
        found.append(Activation(f"{maker}/{made[maker]}", lifetime.nbytes, producer, uses, until))
        made[maker] += 1
    return tuple(found)


def always_resident(calls: Sequence[Call]) -> dict[str, str]:
    """The weights that cannot stream, and why."""
    between: dict[str, str] = {}
    changed: dict[str, str] = {}
    for call in calls:
        if call.block is None:
            between.update(dict.fromkeys(call.reads, "read between blocks"))
        changed.update(dict.fromkeys(call.writes, "changed by the forward"))
    return between | changed


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
        region.works = region.works or record.works
    yield region


def _kept(regions: Sequence[Region], records: Sequence[Record]) -> list[Region]:
    """Join regions between blocks that do nothing to the region before them, or the first ones to the next region."""
    kept: list[Region] = []
    waiting: list[int] = []
    for region in regions:
        if region.block is not None or region.works:
            region.records[:0] = waiting
            waiting = []
            kept.append(region)
        elif kept:
            kept[-1].records += region.records
        else:
            waiting += region.records
    return kept or [Region(None, records[0].boundary, waiting)]


def _parts(region: Region, records: Sequence[Record]) -> list[list[int]]:
    """Cut a block's call before each record that uses weights, unless nothing has run since the last cut."""
    if region.block is None:
        return [region.records]
    parts: list[list[int]] = []
    busy = False  # whether the part so far has done anything
    for index in region.records:
        if not parts or (busy and records[index].uses_weights):
            parts.append([])
            busy = False
        parts[-1].append(index)
        busy = busy or records[index].works
    return parts


def _piece(boundary: Boundary, part: Sequence[int], records: Sequence[Record]) -> Piece:
    """All records of a part together."""
    whole = Record(boundary)
    for index in part:
        record = records[index]
        whole.reads |= record.reads
        whole.writes |= record.writes
        whole.flops += record.flops
        whole.flop_bytes += record.flop_bytes
        whole.other_bytes += record.other_bytes
        whole.peak_bytes = max(whole.peak_bytes, record.peak_bytes)
    return Piece(
        boundary,
        tuple(whole.reads),
        tuple(whole.writes),
        flops=whole.flops,
        flop_bytes=whole.flop_bytes,
        other_bytes=whole.other_bytes,
        transient_bytes=whole.peak_bytes,
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


def _without_the_smallest(sizes: Mapping[str, int], allowance: float) -> list[str]:
    """The modules without the smallest ones: all up to that size together stay within the allowance."""
    together, limit = 0, 0
    for size, count in sorted(Counter(sizes.values()).items()):
        together += size * count
        if together > allowance:
            break
        limit = size
    return [name for name in sizes if sizes[name] > limit]
