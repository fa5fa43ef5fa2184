"""The hit rate of tail-first LRU at every capacity, from one pass over the requests.

LRU keeps the blocks that were used last, so one number says at which capacities a use is a hit: its *stack distance*,
the blocks that were used since the last use of this one. Inside a request blocks count as used deepest first, as the
daemon's LRU has it: a parent is never older than its child, and the leading blocks that are hit are exactly those
whose distance is below the capacity. Source: Mattson et al., "Evaluation techniques for storage hierarchies" (1970);
the tree over positions is Fenwick's.

Covers: distances (``LruStack``) and the curve they give (``HitCurve``), of any number of blocks of equal size. Does not
cover: a curve in bounded memory while requests come, which is ``kvstore.policy.curve``.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Final, Generic, TypeVar

__all__ = ["FIRST_USE", "HitCurve", "LruStack", "lru_curves"]

FIRST_USE: Final = -1
"""Stands for the distance of a block that was not used before."""

_SMALLEST_POSITIONS: Final = 1 << 10

Key = TypeVar("Key", bound=Hashable)


class LruStack(Generic[Key]):
    """Stack distances, request by request: O(log n) a block for n blocks that are kept, O(n) memory."""

    def __init__(self) -> None:
        self._positions: OrderedDict[Key, int] = OrderedDict()
        self._tree = [0] * (_SMALLEST_POSITIONS + 1)
        self._next = 1

    def __len__(self) -> int:
        """Blocks that are kept."""
        return len(self._positions)

    def access(self, keys: Sequence[Key]) -> list[int]:
        """One request uses these blocks, parents first, each once.

        Returns:
            For each the number of other blocks that were used more recently before this request, or ``FIRST_USE``.
        """
        positions, tree = self._positions, self._tree
        newer: list[int] = []
        for key in keys:
            at = positions.get(key)
            if at is None:
                newer.append(FIRST_USE)
                continue
            distance = len(positions)
            while at:
                distance -= tree[at]
                at &= at - 1
            newer.append(distance)
        if self._next + len(keys) >= len(tree):
            self._renumber(len(keys))
            tree = self._tree
        at, last = self._next, len(tree)
        self._next += len(keys)
        for key in reversed(keys):
            before = positions.get(key)
            if before is not None:
                while before < last:
                    tree[before] -= 1
                    before += before & -before
                positions.move_to_end(key)
            positions[key] = at
            place = at
            while place < last:
                tree[place] += 1
                place += place & -place
            at += 1
        return newer

    def _renumber(self, room: int) -> None:
        """Give the blocks the lowest positions in the same order; at least as many as there are come free."""
        kept = len(self._positions)
        for at, key in enumerate(self._positions, 1):
            self._positions[key] = at
        size = max(_SMALLEST_POSITIONS, 2 * (kept + room))
        # Node i of a Fenwick tree over ones covers as many places as its lowest bit says, up to the last block.
        self._tree = [0, *(max(0, min(kept, at) - (at - (at & -at))) for at in range(1, size + 1))]
        self._next = kept + 1


@dataclass(frozen=True, slots=True)
class HitCurve:
    """Hit rates at capacities in blocks.

    Attributes:
        accesses: uses of blocks, the first ones included.
        hits: at each capacity from 0 on; the last entry holds for all larger ones.
    """

    accesses: int
    hits: Sequence[int]

    def hit_rate(self, capacity_blocks: int) -> float:
        """0 to 1; 0 where nothing was used."""
        return self.hits_at(capacity_blocks) / self.accesses if self.accesses else 0.0

    def hits_at(self, capacity_blocks: int) -> int:
        """Uses that are hits at a capacity."""
        return self.hits[min(max(capacity_blocks, 0), len(self.hits) - 1)]


def lru_curves(requests: Iterable[Sequence[Key]], split: int) -> tuple[HitCurve, HitCurve]:
    """Exact curves of all requests, and of those from number ``split`` on (the cache is not emptied in between).

    Args:
        requests: the full blocks of each, parents first.
        split: number of the first request of the second curve, counted from 0.
    """
    distances: LruStack[Key] = LruStack()
    halves: tuple[dict[int, int], dict[int, int]] = ({}, {})
    accesses = [0, 0]
    for number, keys in enumerate(requests):
        half = number >= split
        accesses[half] += len(keys)
        counts = halves[half]
        for distance in distances.access(keys):
            counts[distance] = counts.get(distance, 0) + 1
    first, second = halves
    both = {distance: first.get(distance, 0) + second.get(distance, 0) for distance in first.keys() | second.keys()}
    return _curve(both, sum(accesses)), _curve(second, accesses[1])


def _curve(counts: dict[int, int], accesses: int) -> HitCurve:
    counts.pop(FIRST_USE, None)
    return HitCurve(
        accesses, [0, *accumulate(counts.get(distance, 0) for distance in range(max(counts, default=-1) + 1))]
    )
