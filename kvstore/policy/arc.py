"""ARC: blocks used once and blocks used more often in two LRU lists, whose shares follow what comes back.

Megiddo and Modha, "ARC: a self-tuning, low overhead replacement cache" (FAST 2003). Each list has ghosts of what left
it. A block that comes back while its ghost is there says that its list was too short: the target share of the first
list grows or shrinks by what one list's ghosts are worth beside the other's.

A variant: room is made before it is known which block comes, so its ghost moves the target only for the next one. On a
real trace one hit in five thousand differs by that. All lists are weighed by bytes. What is parked belongs to its list
and counts for it. Blocks of one request are used deepest first, so that a prefix leaves tail first.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

from kvstore.policy.base import Evictable, PolicyContext
from kvstore.policy.ghosts import Ghosts
from kvstore.policy.parking import CONDEMNED, FLAG, PARKED, Parking

_OFTEN: Final = FLAG
"""The block is in the second list."""


class Arc(Parking):
    """A use and, amortised, a victim are O(1).

    Ghosts: of both lists together as many slot bytes as the capacity, 256 bytes each.
    """

    name = "arc"

    def __init__(self, context: PolicyContext) -> None:
        super().__init__(context)
        self._once: OrderedDict[Evictable, None] = OrderedDict()
        self._often: OrderedDict[Evictable, None] = OrderedDict()
        self._once_bytes = 0
        self._often_bytes = 0
        self._once_ghosts = Ghosts()
        self._often_ghosts = Ghosts()
        self._target_bytes = 0.0

    def _enter(self, block: Evictable) -> None:
        size, key = block.slot_bytes, block.key
        of_once, of_often = self._once_ghosts, self._often_ghosts
        if key in of_once:
            grown = self._target_bytes + size * max(1.0, of_often.slot_bytes / of_once.slot_bytes)
            self._target_bytes = min(float(self._capacity_bytes), grown)
            of_once.take(key)
        elif key in of_often:
            shrunk = self._target_bytes - size * max(1.0, of_once.slot_bytes / of_often.slot_bytes)
            self._target_bytes = max(0.0, shrunk)
            of_often.take(key)
        else:
            self._once[block] = None
            self._once_bytes += size
            return
        block.access |= _OFTEN
        self._often[block] = None
        self._often_bytes += size

    def _use(self, block: Evictable) -> None:
        mark = block.access
        if mark & PARKED:
            self._unpark_to(block)
        elif mark & _OFTEN:
            self._often.move_to_end(block)
            return
        else:
            del self._once[block]
        if not mark & _OFTEN:
            self._once_bytes -= block.slot_bytes
            self._often_bytes += block.slot_bytes
            block.access |= _OFTEN
        self._often[block] = None

    def _first(self) -> Evictable | None:
        if self._once and (self._once_bytes > self._target_bytes or not self._often):
            return next(iter(self._once))
        return next(iter(self._often or self._once), None)

    def _take(self, block: Evictable) -> None:
        del (self._often if block.access & _OFTEN else self._once)[block]

    def _bring_back(self, block: Evictable) -> None:
        order = self._often if block.access & _OFTEN else self._once
        order[block] = None
        order.move_to_end(block, last=False)

    def _leave(self, block: Evictable, *, evicted: bool) -> None:
        size = block.slot_bytes
        if block.access & _OFTEN:
            self._often_bytes -= size
            ghosts = self._often_ghosts
        else:
            self._once_bytes -= size
            ghosts = self._once_ghosts
        if evicted:
            ghosts.add(block.key, size)
            # The first list and its ghosts are never more than the capacity, all four lists never more than twice that.
            self._once_ghosts.shrink(max(0, self._capacity_bytes - self._once_bytes))
            both_bytes = self._once_bytes + self._often_bytes + self._once_ghosts.slot_bytes
            self._often_ghosts.shrink(max(0, 2 * self._capacity_bytes - both_bytes))

    def resized(self, block: Evictable, before_bytes: int) -> None:
        """See ``EvictionPolicy``."""
        if block.access & CONDEMNED:
            return
        if block.access & _OFTEN:
            self._often_bytes += block.slot_bytes - before_bytes
        else:
            self._once_bytes += block.slot_bytes - before_bytes

    def ghost_bytes(self) -> int:
        """See ``EvictionPolicy``."""
        return self._once_ghosts.memory_bytes + self._often_ghosts.memory_bytes
