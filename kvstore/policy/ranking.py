"""What policies have in common that give each block a rank, of which the lowest leaves first.

A rank is worked out when a block enters and each time it is used, and never in between. The heap is lazy: an entry is
stale when it is not its block's own any more, and when more than two thirds are stale it is made anew. What policies of
this family know of blocks that left is bounded by ``MOST_KEPT`` keys, oldest out first. They are for simulations: a
daemon's policies need no heap.
"""

from __future__ import annotations

import heapq
from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Hashable
from typing import Final

from kvstore.policy.base import Evictable, PolicyContext
from kvstore.policy.ghosts import GHOST_BYTES
from kvstore.policy.parking import PARKED, Parking

MOST_KEPT: Final = 1 << 18
_COMPACT_FROM: Final = 64

Rank = tuple[float, float]
"""What decides first, and what decides among equal ones; then the last use does."""
_Entry = tuple[Rank, int, Evictable]


class Ranking(Parking):
    """Base of these policies. Each use and each victim is O(log n)."""

    def __init__(self, context: PolicyContext) -> None:
        super().__init__(context)
        self._entries: dict[Evictable, _Entry] = {}
        self._heap: list[_Entry] = []
        self._uses = 0
        self._parked = 0

    @abstractmethod
    def _rank(self, block: Evictable) -> Rank:
        """The rank of a block that entered or is used again, just now."""

    def _enter(self, block: Evictable) -> None:
        self._push(block)

    def _use(self, block: Evictable) -> None:
        if block.access & PARKED:
            self._uses += 1
            self._entries[block] = (self._rank(block), self._uses, block)
        else:
            self._push(block)

    def _first(self) -> Evictable | None:
        heap, entries = self._heap, self._entries
        while heap:
            entry = heap[0]
            block = entry[2]
            if entries.get(block) is entry and not block.access & PARKED:
                return block
            heapq.heappop(heap)
        return None

    def _take(self, block: Evictable) -> None:
        self._parked += 1

    def _bring_back(self, block: Evictable) -> None:
        self._parked -= 1
        # Its entry may be in the heap still; a second one that is equal does no harm.
        heapq.heappush(self._heap, self._entries[block])

    def _leave(self, block: Evictable, *, evicted: bool) -> None:
        self._parked -= 1
        del self._entries[block]

    def _push(self, block: Evictable) -> None:
        self._uses += 1
        entry = self._entries[block] = (self._rank(block), self._uses, block)
        heap = self._heap
        heapq.heappush(heap, entry)
        if len(heap) > _COMPACT_FROM + 3 * len(self._entries):
            self._heap = [entry for entry in self._entries.values() if not entry[2].access & PARKED]
            heapq.heapify(self._heap)


class Kept:
    """What is known of keys whose blocks left: a number and a time for each."""

    __slots__ = ("_values",)

    def __init__(self) -> None:
        self._values: OrderedDict[Hashable, tuple[float, int]] = OrderedDict()

    def take(self, key: Hashable) -> tuple[float, int]:
        """What is known of a key that comes back, and is known here no more; zeros where nothing is."""
        return self._values.pop(key, (0.0, 0))

    def keep(self, key: Hashable, number: float, time_ns: int = 0) -> None:
        """Note what is known of a key that leaves."""
        self._values[key] = (number, time_ns)
        self._values.move_to_end(key)
        if len(self._values) > MOST_KEPT:
            self._values.popitem(last=False)

    @property
    def memory_bytes(self) -> int:
        """What they take, about."""
        return len(self._values) * GHOST_BYTES
