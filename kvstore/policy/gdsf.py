"""GDSF: greedy dual with frequency, the classic of web caches, with a cost of one for every block.

Cherkasova, "Improving WWW proxies performance with Greedy-Dual-Size-Frequency caching policy" (HP Labs, 1998). A
block's rank is its uses over its bytes, plus the age of the cache when it was last used; the age is the rank of what
was evicted last, so a count is worth less the longer ago it was earned. ``gdsf`` forgets the count of a block that
leaves, ``gdsf-kept`` has it again when the block comes back.
"""

from __future__ import annotations

from kvstore.policy.base import Evictable, PolicyContext
from kvstore.policy.lfu import Lfu, LfuKept
from kvstore.policy.ranking import Rank


class Gdsf(Lfu):
    """Each use and each victim is O(log n). No ghosts. Another size counts from the next use on."""

    name = "gdsf"

    def __init__(self, context: PolicyContext) -> None:
        super().__init__(context)
        self._age = 0.0

    def _rank(self, block: Evictable) -> Rank:
        count, _ = super()._rank(block)
        return (self._age + count / block.slot_bytes, 0)

    def _leave(self, block: Evictable, *, evicted: bool) -> None:
        if evicted:
            self._age = max(self._age, self._entries[block][0][0])
        super()._leave(block, evicted=evicted)


class GdsfKept(LfuKept, Gdsf):
    """As ``Gdsf``, with the ghosts of ``LfuKept``."""

    name = "gdsf-kept"
