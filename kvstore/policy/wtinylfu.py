"""W-TinyLFU: a small LRU window in front of a segmented LRU, which a block enters only if it is used more than another.

Einziger, Friedman and Manes, "TinyLFU: a highly efficient cache admission policy" (ACM Transactions on Storage, 2017).
New blocks enter the window, a hundredth of the capacity. What reaches the window's end goes on to the main lists if it
was asked for more often than what would have to leave them for it; else it leaves itself. In the main lists a block is
on probation until it is used, then protected, for which there are four fifths of them. All counts are halved after uses
of ten times the capacity, and from then on after half as many. All lists are weighed by bytes.

Variants: uses are counted exactly, not in a sketch. A prefix can only leave tail first, so while a path is stored that
is longer than the window, none of its blocks can be the one that leaves. Its next block then gets a place only where
the main lists' own next victim is not used any more, as it has been used once itself; else the path loses its tail
again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Final

from kvstore.policy.base import Evictable, PolicyContext
from kvstore.policy.ghosts import GHOST_BYTES
from kvstore.policy.parking import CONDEMNED, FLAG, PARKED, Parking
from kvstore.policy.ranking import MOST_KEPT

_PROBATION: Final = FLAG
_PROTECTED: Final = FLAG << 1
_MAIN: Final = _PROBATION | _PROTECTED
_WINDOW_SHARE: Final = 100
_HALVED_AFTER: Final = 10

_Order = OrderedDict[Evictable, None]


class WTinyLfu(Parking):
    """A use and, amortised, a victim are O(1). Ghosts: the counts of 2**18 blocks that left, 256 bytes each."""

    name = "w-tinylfu"

    def __init__(self, context: PolicyContext) -> None:
        super().__init__(context)
        self._window: _Order = OrderedDict()
        self._probation: _Order = OrderedDict()
        self._protected: _Order = OrderedDict()
        self._window_bytes = 0
        self._main_bytes = 0
        self._protected_bytes = 0
        self._most_window_bytes = max(1, context.capacity_bytes // _WINDOW_SHARE)
        self._most_protected_bytes = (context.capacity_bytes - self._most_window_bytes) * 4 // 5
        self._counts: dict[Evictable, int] = {}
        self._kept: OrderedDict[Hashable, int] = OrderedDict()
        self._counted_bytes = 0
        self._storing = False
        self._full = False
        """Somebody asked for a victim, and nothing was removed since: the main lists have no room to give away."""

    def _enter(self, block: Evictable) -> None:
        self._counts[block] = self._kept.pop(block.key, 0)
        self._count(block)
        self._window[block] = None
        self._window_bytes += block.slot_bytes
        if not self._full:
            most_main_bytes = self._capacity_bytes - self._most_window_bytes
            while self._window and self._window_bytes > self._most_window_bytes and self._main_bytes < most_main_bytes:
                self._admit(next(iter(self._window)))

    def _use(self, block: Evictable) -> None:
        self._count(block)
        mark = block.access
        if mark & PARKED:
            self._unpark_to(block)
        else:
            self._take(block)
        if mark & _PROBATION:
            block.access ^= _MAIN
            self._protected_bytes += block.slot_bytes
        self._order_of(block)[block] = None
        while self._protected_bytes > self._most_protected_bytes and self._protected:
            oldest, _ = self._protected.popitem(last=False)
            self._protected_bytes -= oldest.slot_bytes
            oldest.access ^= _MAIN
            self._probation[oldest] = None

    def next_victim(self, before: int | None = None) -> Evictable | None:
        """See ``EvictionPolicy``. None also where it turns away what is being stored: see the module."""
        self._storing = before is not None
        return super().next_victim(before)

    def _first(self) -> Evictable | None:
        self._full = True
        full_window = self._window_bytes >= self._most_window_bytes
        if full_window and self._window:
            return next(iter(self._window))
        rival = self._rival()
        if rival is None:
            return next(iter(self._window), None)
        if full_window and self._storing and self._counts[rival]:
            return None
        return rival

    def _spare(self, block: Evictable) -> bool:
        if block.access & _MAIN:
            return False
        rival = self._rival()
        if rival is None or self._counts[block] <= self._counts[rival]:
            return False
        self._admit(block)
        return True

    def _rival(self) -> Evictable | None:
        """What would leave the main lists next."""
        while True:
            rival = next(iter(self._probation or self._protected), None)
            if rival is None or not (rival.children or rival.leases):
                return rival
            self._take(rival)
            rival.access |= PARKED

    def _admit(self, block: Evictable) -> None:
        """Move a block from the window to probation."""
        del self._window[block]
        self._window_bytes -= block.slot_bytes
        self._main_bytes += block.slot_bytes
        block.access |= _PROBATION
        self._probation[block] = None

    def _count(self, block: Evictable) -> None:
        self._counts[block] += 1
        self._counted_bytes += block.slot_bytes
        if self._counted_bytes >= _HALVED_AFTER * self._capacity_bytes:
            self._counted_bytes //= 2
            for held, count in self._counts.items():
                self._counts[held] = count // 2
            self._kept = OrderedDict((key, count // 2) for key, count in self._kept.items() if count > 1)

    def _order_of(self, block: Evictable) -> _Order:
        mark = block.access
        return self._probation if mark & _PROBATION else self._protected if mark & _PROTECTED else self._window

    def _take(self, block: Evictable) -> None:
        del self._order_of(block)[block]

    def _bring_back(self, block: Evictable) -> None:
        order = self._order_of(block)
        order[block] = None
        order.move_to_end(block, last=False)

    def _leave(self, block: Evictable, *, evicted: bool) -> None:
        count = self._counts.pop(block)
        if not evicted:
            self._full = False
        elif count:
            self._kept[block.key] = count
            self._kept.move_to_end(block.key)
            if len(self._kept) > MOST_KEPT:
                self._kept.popitem(last=False)
        self._weigh(block, -block.slot_bytes)

    def _weigh(self, block: Evictable, more_bytes: int) -> None:
        if block.access & _MAIN:
            self._main_bytes += more_bytes
            if block.access & _PROTECTED:
                self._protected_bytes += more_bytes
        else:
            self._window_bytes += more_bytes

    def resized(self, block: Evictable, before_bytes: int) -> None:
        """See ``EvictionPolicy``."""
        if not block.access & CONDEMNED:
            self._weigh(block, block.slot_bytes - before_bytes)

    def ghost_bytes(self) -> int:
        """See ``EvictionPolicy``."""
        return len(self._kept) * GHOST_BYTES
