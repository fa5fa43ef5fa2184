"""SIEVE: a queue and a hand that moves over it; a block that was used stays where it is when the hand passes it.

Zhang, Yang, Yue, Vigfusson and Rashmi, "SIEVE is simpler than LRU" (NSDI 2024). New blocks enter at the head. The hand
goes from the tail to the head and from there to the tail again; it clears the flag of what was used, and what was not
used since it last came by leaves. Unlike CLOCK, survivors do not move, so a scan passes through without mixing with
them.

The queue is kept in two parts, behind the hand and ahead of it: moving the hand over a block moves the block from one
to the other, and at the head the two change places.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

from kvstore.policy.base import Evictable, PolicyContext
from kvstore.policy.parking import FLAG, Parking

_USED: Final = FLAG


class Sieve(Parking):
    """One flag a block. A use and, amortised, a victim are O(1)."""

    name = "sieve"

    def __init__(self, context: PolicyContext) -> None:
        super().__init__(context)
        self._ahead: OrderedDict[Evictable, None] = OrderedDict()
        self._behind: OrderedDict[Evictable, None] = OrderedDict()

    def _enter(self, block: Evictable) -> None:
        self._ahead[block] = None

    def _use(self, block: Evictable) -> None:
        block.access |= _USED

    def _first(self) -> Evictable | None:
        return next(iter(self._ahead), None)

    def _spare(self, block: Evictable) -> bool:
        if not block.access & _USED:
            return False
        block.access ^= _USED
        self._behind[block] = None
        self._take(block)
        return True

    def _take(self, block: Evictable) -> None:
        if block in self._ahead:
            del self._ahead[block]
            if not self._ahead:
                # The hand is at the head: it goes on from the tail, before anything new comes.
                self._ahead, self._behind = self._behind, self._ahead
        else:
            del self._behind[block]

    def _bring_back(self, block: Evictable) -> None:
        self._ahead[block] = None
        self._ahead.move_to_end(block, last=False)
