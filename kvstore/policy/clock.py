"""CLOCK: a queue in which a block that was used since it was last looked at gets a second chance.

Corbató, "A paging experiment with the Multics system" (1968). Blocks enter at the tail. One that reaches the victim end
and was used goes round once more, and must be used again to do so another time.
"""

from __future__ import annotations

from typing import Final

from kvstore.policy.base import Evictable
from kvstore.policy.fifo import Fifo
from kvstore.policy.parking import FLAG

_USED: Final = FLAG


class Clock(Fifo):
    """One flag a block. A use and, amortised, a victim are O(1)."""

    name = "clock"

    def _use(self, block: Evictable) -> None:
        block.access |= _USED

    def _spare(self, block: Evictable) -> bool:
        if not block.access & _USED:
            return False
        block.access ^= _USED
        self._order.move_to_end(block)
        return True
