"""Searches the draft that streams fastest: candidates of a fluid, rounded to whole items, seated in a ring and timed.

For smaller and smaller items, and for a little less and less than the true capacity:

    candidates     how many bytes of each unit stream, and the pace that this would keep
    round          which items these are
    draft          where each has its seat, which copies follow, how long a step takes

The best draft so far spares the search all candidates that could not beat it. Everything else is bounded by counts;
nothing looks at a clock, so that a plan is the same every time.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import inf

from taskgraph_offload.nouns.progress import report

from ..bound.pace import steady_pace
from ..bound.windows import Cycle
from .candidates import Candidate, candidates
from .draft import FASTER_LINK, SLOWER_LINK, Desk, Draft
from .items import Units
from .rounding import round_to_items, trim

_SET_ASIDE = (0.0, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0)  # of the capacity, in usual items
_MOST_LIMITS = 7  # to an item's bytes
_ENOUGH = 1.02  # times what is missing: less than that cannot stream through any ring
_MOST_DRAFTS = 8  # of one capacity
_LEAST_DRAFTS = 12
_LINKS = {1.0: 0.6, FASTER_LINK: 0.25, SLOWER_LINK: 0.15}  # and the part of the drafts that are made for each
_EFFORT = 22_000  # units and items in all drafts together
_MANY_LATENCIES = 0.01  # of the pace: then streaming few units wholly may be better than all a little


def search(desk: Desk, best: Draft | None = None) -> Draft | None:
    """The best draft that is found at this desk, or the one to beat."""
    drafts = max(_LEAST_DRAFTS, _EFFORT // (len(desk.stock.seconds) + len(desk.stock.items)))
    for link, part in _LINKS.items():
        best = _search(desk, best, link, int(drafts * part))
    return best


def _search(desk: Desk, best: Draft | None, link: float, drafts: int) -> Draft | None:
    """The best of so many drafts that would be good with a link so many times as fast, or the one to beat."""
    tried = 0
    for units, share in _directions(desk):
        if tried == drafts:
            break
        for candidate in _candidates(desk, units, share, best, link)[:_MOST_DRAFTS]:
            if tried < drafts and (best is None or candidate.pace < best.seconds(link)):
                best, tried = _try(desk, candidate, best), tried + 1
                report("drafts", tried, drafts)
    report("drafts", drafts, drafts)
    return best


def _directions(desk: Desk) -> Iterator[tuple[Units, float]]:
    """Where to look, the likeliest first: what may stream, and how much to spare."""
    for units in _smaller_and_smaller_items(desk):
        yield from ((units, share) for share in _SET_ASIDE)


def pace_of(desk: Desk) -> float:
    """Seconds of a step that no draft at this desk beats, where nothing is shared."""
    stock = desk.stock
    cycle = Cycle(stock.seconds, stock.everything.nbytes.tolist(), [desk.capacity] * len(stock.seconds))
    return steady_pace(cycle, desk.machine.h2d_bytes_per_second).seconds


def _smaller_and_smaller_items(desk: Desk) -> Iterator[Units]:
    """What may stream: everything, then only items smaller than before, as long as that is enough.

    A ring is at least as large as its largest item, so where small items are enough, large ones had better stay. What
    distant units share would come more than once, so it stays as long as the rest is enough.
    """
    stock, missing = desk.stock, desk.stock.nbytes - desk.capacity
    units = stock.up_to(stock.nbytes)
    if units.nbytes.sum() < missing * _ENOUGH:
        yield stock.everything
    enough = stock.sizes_enough_for(missing * _ENOUGH)
    if enough:
        smaller = (enough[-1] / enough[0]) ** (1 / _MOST_LIMITS)
        limit = float(enough[0])
        for nbytes in enough:
            if nbytes <= limit:
                yield stock.up_to(nbytes)
                limit = nbytes * smaller


def _try(desk: Desk, candidate: Candidate, best: Draft | None) -> Draft | None:
    """The best of a candidate's drafts, or the one to beat."""
    for streaming in _choices(desk, candidate):
        draft = desk.draft(streaming, inf if best is None else best.score)
        if draft is not None and (best is None or draft.score < best.score):
            best = draft
    return best


def _choices(desk: Desk, candidate: Candidate) -> Iterator[list[list[int]]]:
    """Items of each unit that stream, with bent and with even shares, and no more of them than must.

    Where latencies matter, also by whole units.
    """
    units = candidate.units
    seen = set[tuple[tuple[int, ...], ...]]()
    for chosen in _roundings(desk, candidate):
        if (key := tuple(chosen)) not in seen:
            seen.add(key)
            yield [[unit[i] for i in some] for unit, some in zip(units.items, chosen, strict=True)]


def _roundings(desk: Desk, candidate: Candidate) -> Iterator[list[tuple[int, ...]]]:
    """For each unit, the positions of the items that stream."""
    units = candidate.units
    even = units.nbytes * (candidate.streamed / units.nbytes.sum())
    many = desk.machine.latency_seconds * len(units.items) > _MANY_LATENCIES * candidate.pace
    for asked in (candidate.residency.tolist(), even.tolist()):
        chosen = round_to_items(asked, units.sizes)
        yield chosen
        yield trim(chosen, units.sizes, candidate.streamed)
        if many:
            whole = round_to_items(asked, [(int(nbytes),) for nbytes in units.nbytes])
            yield [tuple(range(len(unit))) if some else () for unit, some in zip(units.items, whole, strict=True)]


def _candidates(desk: Desk, units: Units, share: float, best: Draft | None, link: float) -> list[Candidate]:
    """The candidates when a share of a usual item is set aside."""
    missing = desk.stock.nbytes - desk.capacity
    usual = max(float(units.nbytes.sum()) / units.count, missing / len(units.items))
    most = inf if best is None else best.seconds(link)
    rate = link * desk.machine.h2d_bytes_per_second
    return candidates(units, desk.stock.seconds, rate, missing + share * usual, usual, most)
