"""LFU: the block with the fewest uses leaves first; among equals the one whose last use is the oldest.

Counts never fade, so what was popular once stays. ``lfu`` forgets the count of a block that leaves, ``lfu-kept`` has it
again when the block comes back.
"""

from __future__ import annotations

from kvstore.policy.base import Evictable, PolicyContext
from kvstore.policy.ranking import Kept, Rank, Ranking


class Lfu(Ranking):
    """Each use and each victim is O(log n). No ghosts."""

    name = "lfu"

    def __init__(self, context: PolicyContext) -> None:
        super().__init__(context)
        self._counts: dict[Evictable, float] = {}

    def _rank(self, block: Evictable) -> Rank:
        count = self._counts[block] = self._counts.get(block, 0) + 1
        return (count, 0)

    def _leave(self, block: Evictable, *, evicted: bool) -> None:
        super()._leave(block, evicted=evicted)
        del self._counts[block]


class LfuKept(Lfu):
    """As ``Lfu``. Ghosts: the counts of 2**18 blocks that left, 256 bytes each."""

    name = "lfu-kept"

    def __init__(self, context: PolicyContext) -> None:
        super().__init__(context)
        self._kept = Kept()

    def _enter(self, block: Evictable) -> None:
        self._counts[block], _ = self._kept.take(block.key)
        super()._enter(block)

    def _leave(self, block: Evictable, *, evicted: bool) -> None:
        if evicted:
            self._kept.keep(block.key, self._counts[block])
        super()._leave(block, evicted=evicted)

    def ghost_bytes(self) -> int:
        """See ``EvictionPolicy``."""
        return self._kept.memory_bytes
