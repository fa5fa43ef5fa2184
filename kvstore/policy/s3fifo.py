"""S3-FIFO: a small queue that most blocks leave soon, a main queue for those that are used again, and ghosts.

Yang, Zhang, Qiu, Yue and Rashmi, "FIFO queues are all you need for cache eviction" (SOSP 2023). New blocks enter the
small queue, a tenth of the capacity. Of what reaches its end, blocks that were used twice meanwhile go on to the main
queue, the others leave as ghosts; one whose ghost is still there when it comes back enters the main queue. There a
block that was used goes round again, up to three times for as many uses.

The queues are weighed by bytes. What is parked belongs to its queue and counts for it.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

from kvstore.policy.base import Evictable, PolicyContext
from kvstore.policy.ghosts import Ghosts
from kvstore.policy.parking import CONDEMNED, FLAG, Parking

_MAIN: Final = FLAG
_USE: Final = FLAG << 1
_USES: Final = _USE * 3
"""A count of up to three."""
_PROMOTED_AT: Final = 2 * _USE
_SMALL_SHARE: Final = 10


class S3Fifo(Parking):
    """A use and, amortised, a victim are O(1).

    Ghosts: as many slot bytes as the main queue may have, that is nine tenths of the capacity, 256 bytes each.
    """

    name = "s3fifo"

    def __init__(self, context: PolicyContext) -> None:
        super().__init__(context)
        self._small: OrderedDict[Evictable, None] = OrderedDict()
        self._main: OrderedDict[Evictable, None] = OrderedDict()
        self._small_bytes = 0
        self._most_small_bytes = max(1, context.capacity_bytes // _SMALL_SHARE)
        self._ghosts = Ghosts()

    def _enter(self, block: Evictable) -> None:
        if self._ghosts.take(block.key):
            block.access |= _MAIN
            self._main[block] = None
        else:
            self._small[block] = None
            self._small_bytes += block.slot_bytes

    def _use(self, block: Evictable) -> None:
        if block.access & _USES != _USES:
            block.access += _USE

    def _first(self) -> Evictable | None:
        if self._small and (self._small_bytes >= self._most_small_bytes or not self._main):
            return next(iter(self._small))
        return next(iter(self._main or self._small), None)

    def _spare(self, block: Evictable) -> bool:
        uses = block.access & _USES
        if block.access & _MAIN:
            if not uses:
                return False
            block.access -= _USE
            self._main.move_to_end(block)
            return True
        if uses < _PROMOTED_AT:
            return False
        del self._small[block]
        self._small_bytes -= block.slot_bytes
        block.access = block.access - uses | _MAIN
        self._main[block] = None
        return True

    def _take(self, block: Evictable) -> None:
        del (self._main if block.access & _MAIN else self._small)[block]

    def _bring_back(self, block: Evictable) -> None:
        queue = self._main if block.access & _MAIN else self._small
        queue[block] = None
        queue.move_to_end(block, last=False)

    def _leave(self, block: Evictable, *, evicted: bool) -> None:
        if not block.access & _MAIN:
            self._small_bytes -= block.slot_bytes
            if evicted:
                self._ghosts.add(block.key, block.slot_bytes)
                self._ghosts.shrink(self._capacity_bytes - self._most_small_bytes)

    def resized(self, block: Evictable, before_bytes: int) -> None:
        """See ``EvictionPolicy``."""
        if not block.access & (_MAIN | CONDEMNED):
            self._small_bytes += block.slot_bytes - before_bytes

    def ghost_bytes(self) -> int:
        """See ``EvictionPolicy``."""
        return self._ghosts.memory_bytes
