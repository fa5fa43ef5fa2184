"""Least recently used, tail first and leaves only.

The victim is, among resident blocks without resident children and leases, the one whose last engine request is the
oldest; among blocks of one request the deepest. A block's use is a use of its ancestors, so a parent is never older
than its child: a block that leaves hands its access number up to its parent, and a request costs one touch, of its
deepest block.

Structure: one group of blocks an access number, and a heap of the numbers. Victims come from the first group, the
*front*, until it has none; most others leave from its end and come to the end of the newest, which is all that is done
for them. Only a block that may be chosen needs a place in a group; one with children or leases is parked with its
number when the front reaches it, and comes back when the last child or lease is gone. Entries left behind in groups are
recognised by the block's ``access`` and thrown out when more than half of a group is stale, as are the numbers of empty
groups. The order by depth is settled by one sort when the group reaches the front. See also O'Neil et al., "The LRU-K
page replacement algorithm" (1993) for the family; the tail-first rule is this project's.
"""

from __future__ import annotations

import heapq
from bisect import insort_right
from collections.abc import Sequence
from operator import attrgetter
from typing import Final

from kvstore.policy.base import Evictable, PolicyContext

_CONDEMNED: Final = 0
"""Group that leaves before all others; access numbers begin at 1."""
_GONE: Final = -1
_PARKED: Final = -2
"""A block's ``access`` is the number of its group; ``_PARKED - number`` while it is in none; else ``_GONE``."""
_COMPACT_FROM: Final = 8
_COMPACT_NUMBERS_FROM: Final = 64

_depth: Final = attrgetter("depth")


class _Group:
    """Blocks of one access number.

    Attributes:
        number: the access number.
        blocks: its blocks, and entries of others that left.
        stale: those entries. A block that came back may stand in the list twice; one of them counts as stale.
        sorted_at: value of ``Lru._deepened`` at the last sort by depth, -1 for none.
    """

    __slots__ = ("blocks", "number", "sorted_at", "stale")

    def __init__(self, number: int) -> None:
        self.number = number
        self.blocks: list[Evictable] = []
        self.stale = 0
        self.sorted_at = -1


class Lru:
    """Tail-first LRU. A touch is O(1) amortised, a victim O(log n), whatever the shape of the tree."""

    name = "lru"

    def __init__(self, context: PolicyContext | None = None) -> None:
        self._groups: dict[int, _Group] = {}
        self._numbers: list[int] = []
        self._held = 0
        self._deepened = 0
        # Shortcuts to groups: the first one, sorted, if it is known, and the one that was made last.
        self._front: _Group | None = None
        self._newest: _Group | None = None

    def insert(self, block: Evictable, access: int) -> None:
        """See ``EvictionPolicy``."""
        self._held += 1
        newest = self._newest
        if block.children:
            # It adopted orphans: they, and all below them, are deeper now than they were.
            self._deepened += 1
            self._front = None
            block.access = _PARKED - access
        elif newest is not None and newest.number == access and newest.sorted_at < 0:
            newest.blocks.append(block)
            block.access = access
        else:
            self._enter(block, access)

    def touch(self, deepest: Evictable, hits: int, access: int) -> None:
        """See ``EvictionPolicy``. Ancestors are handed the number as blocks leave: O(1) whatever ``hits`` is."""
        number = deepest.access
        if number < 0:
            if _PARKED - number < access:
                deepest.access = _PARKED - access
        elif number < access:
            self._leave(deepest)
            if deepest.children:
                deepest.access = _PARKED - access
            else:
                self._enter(deepest, access)

    def discard(self, block: Evictable, *, evicted: bool = False) -> None:
        """See ``EvictionPolicy``."""
        self._held -= 1
        number = block.access
        parent = block.parent
        front = self._front
        if front is not None and front.number == number and (parent is None or parent.access >= number):
            blocks = front.blocks
            if blocks[-1] is block:
                del blocks[-1]
                block.access = _GONE
                return
        if number < 0:
            number = _PARKED - number
        if parent is not None:
            # Before the block leaves its group, because the parent often takes its place there.
            self._hand_up(parent, number)
        if block.access >= 0:
            self._leave(block)
        block.access = _GONE

    def resized(self, block: Evictable, before_bytes: int) -> None:
        """See ``EvictionPolicy``. Sizes do not matter."""

    def condemn(self, blocks: Sequence[Evictable]) -> None:
        """See ``EvictionPolicy``."""
        for block in blocks:
            if block.access == _CONDEMNED:
                continue
            if block.access >= 0:
                self._leave(block)
            if block.children or block.leases:
                block.access = _PARKED - _CONDEMNED
            else:
                self._enter(block, _CONDEMNED)

    def released(self, block: Evictable) -> None:
        """See ``EvictionPolicy``."""
        if block.access <= _PARKED and not block.children and not block.leases:
            self._enter(block, _PARKED - block.access)

    def used(self, block: Evictable) -> int:
        """See ``EvictionPolicy``."""
        return block.access if block.access >= 0 else _PARKED - block.access

    def held(self) -> int:
        """See ``EvictionPolicy``."""
        return self._held

    def ghost_bytes(self) -> int:
        """See ``EvictionPolicy``. Nothing is remembered."""
        return 0

    def next_victim(self, before: int | None = None) -> Evictable | None:
        """See ``EvictionPolicy``."""
        front = self._front
        if front is not None and front.blocks:
            block = front.blocks[-1]
            number = front.number
            if block.access == number and not block.children and not block.leases:
                return block if before is None or number < before else None
        return self._search(before)

    def _search(self, before: int | None) -> Evictable | None:
        numbers, groups = self._numbers, self._groups
        self._front = None
        while numbers:
            number = numbers[0]
            if before is not None and number >= before:
                return None
            group = groups.get(number)
            if group is not None:
                victim = self._victim_of(group)
                if victim is not None:
                    self._front = group
                    return victim
                self._drop(group)
            heapq.heappop(numbers)
        return None

    def _victim_of(self, group: _Group) -> Evictable | None:
        blocks, number = group.blocks, group.number
        if group.sorted_at != self._deepened:
            blocks.sort(key=_depth)
            group.sorted_at = self._deepened
        while blocks:
            block = blocks[-1]
            if block.access == number:
                if not block.children and not block.leases:
                    return block
                block.access = _PARKED - number
            else:
                group.stale -= 1
            blocks.pop()
        return None

    def _hand_up(self, parent: Evictable, number: int) -> None:
        """A child with this number leaves: its uses were its parent's, which may be a leaf now."""
        mark = parent.access
        if mark >= 0:
            if mark < number:
                self._leave(parent)
                self._enter(parent, number)
            return
        number = max(number, _PARKED - mark)
        if len(parent.children or ()) > 1 or parent.leases:
            parent.access = _PARKED - number
        else:
            self._enter(parent, number)

    def _enter(self, block: Evictable, number: int) -> None:
        group = self._groups.get(number)
        if group is None:
            numbers = self._numbers
            if len(numbers) > _COMPACT_NUMBERS_FROM + 2 * len(self._groups):
                numbers[:] = sorted(self._groups)
            group = self._groups[number] = self._newest = _Group(number)
            heapq.heappush(numbers, number)
            if self._front is not None and number < self._front.number:
                self._front = None
        blocks = group.blocks
        if blocks and group.sorted_at == self._deepened and block.depth < blocks[-1].depth:
            insort_right(blocks, block, key=_depth)
        else:
            blocks.append(block)
        block.access = number

    def _leave(self, block: Evictable) -> None:
        """Take a block out of its group; the caller gives it another mark."""
        number = block.access
        group = self._groups[number]
        blocks = group.blocks
        block.access = _GONE
        if blocks[-1] is block:
            del blocks[-1]
        else:
            group.stale += 1
        if group.stale == len(blocks):
            self._drop(group)
        elif len(blocks) > _COMPACT_FROM and group.stale * 2 > len(blocks):
            blocks[:] = dict.fromkeys(other for other in blocks if other.access == number)
            group.stale = 0

    def _drop(self, group: _Group) -> None:
        """Forget a group of which nothing is left; its number is thrown out later."""
        del self._groups[group.number]
        if self._front is group:
            self._front = None
        if self._newest is group:
            self._newest = None
