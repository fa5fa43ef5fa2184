"""Least recently used, tail first and leaves only.

The victim is, among resident blocks without resident children and leases, the one whose last engine request is the
oldest; among blocks of one request the deepest. A block's use is a use of its ancestors, so a parent is never older
than its child: that is settled lazily, when an old parent reaches the front, and a request costs one touch, of its
deepest block.

Structure: one group of blocks an access number, and a heap of the numbers. A touch moves a block in O(1); entries left
behind in old groups are recognised by the block's ``access`` and thrown out when more than half of a group is stale.
Within a group the order by depth is settled by one sort when the group reaches the front. See also
O'Neil et al., "The LRU-K page replacement algorithm" (1993) for the family; the tail-first rule is this project's.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import Final

from kvstore.policy.base import Evictable

_CONDEMNED: Final = 0
"""Group that leaves before all others; access numbers begin at 1."""
_GONE: Final = -1
_PARKED: Final = -2
_COMPACT_FROM: Final = 32


class _Group:
    __slots__ = ("blocks", "live", "ordered")

    def __init__(self) -> None:
        self.blocks: list[Evictable] = []
        self.live = 0
        self.ordered = True


def _depth(block: Evictable) -> int:
    return block.depth


def _access(block: Evictable) -> int:
    return block.access


class Lru:
    """Tail-first LRU; O(1) amortised for each block touched, O(log n) for each victim."""

    name = "lru"

    def __init__(self) -> None:
        self._groups: dict[int, _Group] = {}
        self._numbers: list[int] = []
        self._parked: dict[Evictable, int] = {}
        self._held = 0

    def insert(self, block: Evictable, access: int) -> None:
        """See ``EvictionPolicy``."""
        self._held += 1
        self._enter(block, access)

    def touch(self, deepest: Evictable, hits: int, access: int) -> None:
        """See ``EvictionPolicy``. Ancestors follow when they reach the front, so this is O(1) whatever ``hits`` is."""
        if deepest.access < access:
            self._leave(deepest)
            self._enter(deepest, access)

    def discard(self, block: Evictable) -> None:
        """See ``EvictionPolicy``."""
        self._held -= 1
        self._leave(block)
        block.access = _GONE
        parent = block.parent
        if parent is not None and parent.access == _PARKED:
            self.released(parent)

    def condemn(self, blocks: Sequence[Evictable]) -> None:
        """See ``EvictionPolicy``."""
        for block in blocks:
            self._leave(block)
            self._enter(block, _CONDEMNED)

    def released(self, block: Evictable) -> None:
        """See ``EvictionPolicy``."""
        current: Evictable | None = block
        while self._parked and current is not None:
            if current.access == _PARKED and not current.leases:
                self._enter(current, self._parked.pop(current))
            current = current.parent

    def held(self) -> int:
        """See ``EvictionPolicy``."""
        return self._held

    def next_victim(self) -> Evictable | None:
        """See ``EvictionPolicy``."""
        while self._numbers:
            number = self._numbers[0]
            group = self._groups.get(number)
            if group is None:
                heapq.heappop(self._numbers)
                continue
            victim = self._victim_of(group, number)
            if victim is not None:
                return victim
        return None

    def _victim_of(self, group: _Group, number: int) -> Evictable | None:
        blocks = group.blocks
        if not group.ordered:
            blocks.sort(key=_depth)
            group.ordered = True
        while blocks:
            block = blocks[-1]
            if block.access != number:
                blocks.pop()
            elif block.children:
                self._raise_to_descendants(block, number)
            elif block.leases:
                self._leave(block)
                self._parked[block] = number
                block.access = _PARKED
            else:
                return block
        self._groups.pop(number, None)
        return None

    def _raise_to_descendants(self, block: Evictable, number: int) -> None:
        """Give a parent at the front, and the path below it, the access of a more recent descendant.

        The path follows the most recent child for as long as that is more recent still: one step where a whole request
        used the chain, all of it where each block was used by a request of its own. What lies deeper is settled when
        the parent reaches the front again. Where every child is held by leases, the parent is parked with them.
        """
        path = [block]
        newest = number
        child = block
        while child.children:
            child = max(child.children, key=_access)
            if child.access <= newest:
                break
            path.append(child)
            newest = child.access
        if newest == number:
            self._leave(block)
            self._parked[block] = number
            block.access = _PARKED
            return
        for above in path[:-1]:
            self._leave(above)
            self._enter(above, newest)

    def _enter(self, block: Evictable, number: int) -> None:
        group = self._groups.get(number)
        if group is None:
            group = self._groups[number] = _Group()
            heapq.heappush(self._numbers, number)
        blocks = group.blocks
        if blocks and block.depth < blocks[-1].depth:
            group.ordered = False
        blocks.append(block)
        group.live += 1
        block.access = number

    def _leave(self, block: Evictable) -> None:
        number = block.access
        if number == _PARKED:
            del self._parked[block]
            return
        group = self._groups[number]
        group.live -= 1
        block.access = _GONE
        if not group.live:
            del self._groups[number]
        elif len(group.blocks) > _COMPACT_FROM and group.live * 2 < len(group.blocks):
            group.blocks[:] = [other for other in group.blocks if other.access == number]
