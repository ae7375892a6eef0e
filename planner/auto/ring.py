"""Seats of the streaming region: a ring. What streams lies one behind the other, and begins at 0 again at the end.

    bytes       0                                    room
    turn 1      [ unit 0 )[ unit 1 )[ unit 2 )[3, part)
    turn 2      [3, rest )[ unit 4 )[ unit 5 )[ unit 6 )
    next cycle  [ unit 0 )[ unit 1 ) ...

So every byte is overwritten about one turn after it was brought. Each cycle begins at 0, so that an item has one seat
for ever; a last turn that is nearly full wastes nothing. A unit that reaches over the end is cut there between items.
"""

from __future__ import annotations

from collections.abc import Sequence

Piece = tuple[int, int]  # an item's index, its bytes


def ring(units: Sequence[Sequence[Piece]], room: int) -> list[list[tuple[int, list[int]]]] | None:
    """For each unit: runs of items with the offset of the first one; None if a unit does not fit."""
    runs: list[list[tuple[int, list[int]]]] = []
    cursor = 0
    for pieces in units:
        total = sum(nbytes for _, nbytes in pieces)
        if total > room:
            return None
        if cursor + total <= room:
            runs.append([(cursor, [index for index, _ in pieces])] if pieces else [])
            cursor += total
            continue
        fitting = fill(pieces, room - cursor)
        rest = [(index, nbytes) for index, nbytes in pieces if index not in fitting]
        rest_bytes = sum(nbytes for _, nbytes in rest)
        if not fitting or rest_bytes > cursor:
            fitting, rest, rest_bytes = set(), list(pieces), total
        ahead = [index for index, _ in pieces if index in fitting]
        runs.append(([(cursor, ahead)] if ahead else []) + [(0, [index for index, _ in rest])])
        cursor = rest_bytes
    return runs


def fill(pieces: Sequence[Piece], room: int) -> set[int]:
    """Items that together nearly fill the room: the best of the sums that are found, the largest items first.

    >>> sorted(fill([(0, 5), (1, 4), (2, 3)], 8))
    [0, 2]
    """
    sums: dict[int, tuple[int, ...]] = {0: ()}
    for index, nbytes in sorted(pieces, key=lambda piece: -piece[1]):
        for total, chosen in list(sums.items()):
            if total + nbytes <= room and len(sums) < _MOST_SUMS:
                sums.setdefault(total + nbytes, (*chosen, index))
    return set(sums[max(sums)])


_MOST_SUMS = 256
