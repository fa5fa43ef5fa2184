"""LRFU: uses are counted, and a use is worth half as much after each half-life, here 300 seconds.

Lee, Choi, Kim, Noh, Min, Cho and Kim, "LRFU: a spectrum of policies that subsumes the least recently used and least
frequently used policies" (IEEE Transactions on Computers, 2001). A block's count is kept when it leaves. On a use at t
it becomes ``1 + count * 2 ** (-(t - last use) / 300 s)``. The rank is ``ln(count) + ln(2) / 300 s * t``: counts taken
at different times can be compared by it, so no block is ranked anew while it is not used.
"""

from __future__ import annotations

from math import log
from typing import Final

from kvstore.policy.base import Evictable, PolicyContext
from kvstore.policy.ranking import Kept, Rank, Ranking

_HALF_LIFE_NS: Final = 300 * 1_000_000_000
_FADING: Final = log(2) / _HALF_LIFE_NS


class Lrfu(Ranking):
    """Each use and each victim is O(log n). Ghosts: the counts of 2**18 blocks that left, 256 bytes each."""

    name = "lrfu-300"

    def __init__(self, context: PolicyContext) -> None:
        super().__init__(context)
        self._clock = context.clock
        self._counts: dict[Evictable, tuple[float, int]] = {}
        self._kept = Kept()

    def _enter(self, block: Evictable) -> None:
        self._counts[block] = self._kept.take(block.key)
        super()._enter(block)

    def _rank(self, block: Evictable) -> Rank:
        now_ns = self._clock()
        count, last_ns = self._counts[block]
        count = 1 + count * 2.0 ** (-(now_ns - last_ns) / _HALF_LIFE_NS)
        self._counts[block] = (count, now_ns)
        return (log(count) + _FADING * now_ns, 0)

    def _leave(self, block: Evictable, *, evicted: bool) -> None:
        super()._leave(block, evicted=evicted)
        count, last_ns = self._counts.pop(block)
        if evicted:
            self._kept.keep(block.key, count, last_ns)

    def ghost_bytes(self) -> int:
        """See ``EvictionPolicy``."""
        return self._kept.memory_bytes
