"""LengthAware: the block with the fewest uses leaves first, among equals the one deepest in its prefix.

A reading of what Qin et al., "Mooncake: trading more storage for less computation" (FAST 2025), call LengthAwareCache:
like LFU, with preference to evict blocks that stand late in requests.
"""

from __future__ import annotations

from kvstore.policy.base import Evictable
from kvstore.policy.lfu import Lfu
from kvstore.policy.ranking import Rank


class LengthAware(Lfu):
    """Each use and each victim is O(log n). No ghosts."""

    name = "length-aware"

    def _rank(self, block: Evictable) -> Rank:
        count, _ = super()._rank(block)
        return (count, -block.depth)
