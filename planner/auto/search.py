"""Searches the draft that streams fastest: candidates of a fluid, rounded to whole items, seated in a ring and timed.

For smaller and smaller items, and for a little less and less than the true capacity:

    candidates     how many bytes of each unit stream, and the pace that this would keep
    round          which items these are
    draft          where each has its seat, which copies follow, how long a step takes

The best draft so far spares the search all candidates that could not beat it. Everything else is bounded by counts.
Nothing looks at a clock, so a plan is the same every time.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from math import inf

from taskgraph_offload.nouns.progress import report

from ..bound import Cycle, steady_pace
from .draft import FASTER_LINK, SLOWER_LINK, Draft, Drafter
from .fluid import Candidate, Chosen, candidates, roundings
from .stock import Streamable

_SET_ASIDE = (0.0, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0)  # of the capacity, in usual items: what the ring may waste
_MOST_LIMITS = 7  # to an item's bytes
_ENOUGH = 1.02  # times what is missing: less than that cannot stream through any ring
_MOST_DRAFTS = 8  # for one limit and one share that is set aside
_LEAST_DRAFTS = 12
_LINKS = {1.0: 0.6, FASTER_LINK: 0.25, SLOWER_LINK: 0.15}  # and the part of the drafts that are made for each
_EFFORT = 22_000  # units and items in all drafts together
_MANY_LATENCIES = 0.01  # of the pace: then streaming few units wholly may be better than all a little


def search(drafter: Drafter, best: Draft | None = None) -> Draft | None:
    """The best draft that is found, or the one to beat."""
    drafts = max(_LEAST_DRAFTS, _EFFORT // (len(drafter.stock.seconds) + len(drafter.stock.items)))
    rivals = _Search(drafter, best)
    for link, part in _LINKS.items():
        rivals.try_drafts(link, int(drafts * part))
    return rivals.best


def pace_of(drafter: Drafter) -> float:
    """Seconds of a step that no draft beats, where no two units share an item."""
    stock = drafter.stock
    cycle = Cycle(stock.seconds, stock.everything.nbytes.tolist(), [drafter.capacity] * len(stock.seconds))
    return steady_pace(cycle, drafter.machine.h2d_bytes_per_second).seconds


class _Search:
    """The best draft so far, and which choices were tried already: none of those can be better."""

    def __init__(self, drafter: Drafter, best: Draft | None) -> None:
        self.best = best
        self._drafter, self._stock = drafter, drafter.stock
        self._missing = self._stock.nbytes - drafter.capacity
        self._tried = set[Chosen]()

    def try_drafts(self, link: float, most: int) -> None:
        """Try candidates, `most` of them at most, that would be good with a link `link` times as fast."""
        tried = 0
        for streamable, share in product(self._smaller_and_smaller_items(), _SET_ASIDE):
            if tried == most:
                break
            for candidate in self._candidates(streamable, share, link)[:_MOST_DRAFTS]:
                if tried < most and (self.best is None or candidate.pace < self.best.seconds(link)):
                    self._try(candidate)
                    tried += 1
                    report("drafts", tried, most)
        report("drafts", most, most)

    def _smaller_and_smaller_items(self) -> Iterator[Streamable]:
        """What may stream: everything, then only items smaller than before, as long as that is enough.

        A ring is at least as large as its largest item, so where small items are enough, large ones should stay. What
        distant units share is copied more than once, so it stays where the rest is enough.
        """
        stock = self._stock
        if stock.up_to(stock.nbytes).nbytes.sum() < self._missing * _ENOUGH:
            yield stock.everything
        enough = stock.limits_that_leave(self._missing * _ENOUGH)
        if enough:
            smaller = (enough[-1] / enough[0]) ** (1 / _MOST_LIMITS)
            limit = float(enough[0])
            for nbytes in enough:
                if nbytes <= limit:
                    yield stock.up_to(nbytes)
                    limit = nbytes * smaller

    def _candidates(self, streamable: Streamable, share: float, link: float) -> list[Candidate]:
        """The candidates when a share of a usual item is set aside."""
        usual = max(float(streamable.nbytes.sum()) / streamable.count, self._missing / len(streamable.items))
        most = inf if self.best is None else self.best.seconds(link)
        rate = link * self._drafter.machine.h2d_bytes_per_second
        return candidates(streamable, self._stock.seconds, rate, self._missing + share * usual, usual, most)

    def _try(self, candidate: Candidate) -> None:
        """Draft all choices of a candidate, and keep what is better than the best."""
        latencies = self._drafter.machine.latency_seconds * len(candidate.streamable.items)
        for streaming in roundings(candidate, by_units=latencies > _MANY_LATENCIES * candidate.pace):
            if streaming not in self._tried:
                self._tried.add(streaming)
                draft = self._drafter.draft(streaming, inf if self.best is None else self.best.score)
                if draft is not None and (self.best is None or draft.score < self.best.score):
                    self.best = draft
