"""Segments: runs of blocks that were last used together, resident or remembered, as a compressed prefix tree.

Every path of a request is made of whole segments. Where a request leaves a segment before its end, or goes on behind
a block in its middle, the segment is cut in two. Of a segment's keys the first so many are of resident blocks; the
others left (ghosts). Blocks without a resident parent whose place is unknown are segments that hang nowhere.

A block's mark is its segment's number and its level: levels count up along a segment, and only their differences mean
anything. So cutting a segment rewrites the marks of the upper half only, which the request has just walked along.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Final

from kvstore.policy.base import Evictable

GONE: Final = -1
"""Mark of a block that is not held."""

_LEVEL_BITS: Final = 32
_LEVEL_MASK: Final = (1 << _LEVEL_BITS) - 1
_FIRST_LEVEL: Final = 1 << (_LEVEL_BITS - 1)

SEGMENT_BYTES: Final = 1100
"""Memory that a segment takes with its entries in tables and orders, about."""
KEY_BYTES: Final = 73
"""Memory of a remembered key: 32 bytes as an object, and its place in a list."""


class Segment:
    """A run of keys. ``Segments`` keeps the tree's links; the rest are notes of those who use it.

    Attributes:
        number: of the segment, in its blocks' marks.
        keys: of its blocks, from the top.
        blocks: the resident ones, always the first of them.
        level: level of the first block.
        parent: the segment above, whose last block is the first one's parent; the root for first blocks; None where it
            hangs nowhere.
        children: known segments below, by their first key; None where there never was one.
        access: engine request that last used it.
        abandoned: the last request that came by left above it.
        turn, gap_s, fresh: the chat turn, seconds since the use before (-1 if none), and new blocks of the last
            request.
        returns, mean_gap_s: how often it came back, and after how many seconds in the mean.
        prompt: number of a prompt that is common to many, 0 for none.
        cell, bin, rank, used_s: see ``kvstore.policy.hazards``. Cell is -1 while it is not at risk.
        orders: orders by index that it is in.
        lru, ranked: blocks of it that are in the shadow caches; ``ranked_children``: children with such in the second.
    """

    __slots__ = (
        "abandoned",
        "access",
        "bin",
        "blocks",
        "cell",
        "children",
        "fresh",
        "gap_s",
        "keys",
        "level",
        "lru",
        "mean_gap_s",
        "number",
        "orders",
        "parent",
        "prompt",
        "rank",
        "ranked",
        "ranked_children",
        "returns",
        "turn",
        "used_s",
    )

    def __init__(self, number: int, level: int) -> None:
        self.number = number
        self.level = level
        self.keys: list[Hashable] = []
        self.blocks: list[Evictable] = []
        self.parent: Segment | None = None
        self.children: dict[Hashable, Segment] | None = None
        self.access = 0
        self.abandoned = False
        self.turn = 1
        self.gap_s = -1.0
        self.returns = 0
        self.mean_gap_s = 0.0
        self.prompt = 0
        self.fresh = 0
        self.cell = -1
        self.bin = 0
        self.rank = 0
        self.used_s = 0.0
        self.orders = 0
        self.lru = 0
        self.ranked = 0
        self.ranked_children = 0


class Segments:
    """The tree, and which segment a block belongs to.

    Attributes:
        root: above all first blocks; it has no keys.
        known_keys: keys of all segments together; those that ``append`` and ``start`` bring are the caller's to count.
    """

    def __init__(self) -> None:
        self.root = Segment(0, 0)
        self.known_keys = 0
        self._by_number: dict[int, Segment] = {}
        self._last_number = 0

    def __len__(self) -> int:
        return len(self._by_number)

    def holds(self, block: Evictable) -> bool:
        """Whether the block is one of a segment's resident blocks, and its mark not another policy's."""
        mark = block.access
        segment = self._by_number.get(mark >> _LEVEL_BITS)
        if segment is None:
            return False
        place = (mark & _LEVEL_MASK) - segment.level
        return 0 <= place < len(segment.blocks) and segment.blocks[place] is block

    def locate(self, block: Evictable) -> tuple[Segment, int]:
        """A held block's segment, and its place in that."""
        mark = block.access
        segment = self._by_number[mark >> _LEVEL_BITS]
        return segment, (mark & _LEVEL_MASK) - segment.level

    def start(self, block: Evictable, parent: Segment | None) -> Segment:
        """A new segment of one block, below the last block of ``parent`` unless another begins with that key there."""
        segment = self._new()
        self.append(segment, block)
        if parent is not None:
            self.link(segment, parent)
        return segment

    def append(self, segment: Segment, block: Evictable) -> None:
        """A block with a key that is not known goes on where a segment ends. Precondition: all of it is resident."""
        segment.keys.append(block.key)
        self.revive(segment, block)

    def revive(self, segment: Segment, block: Evictable) -> None:
        """A block came back that is the first of the segment's keys without one."""
        blocks = segment.blocks
        block.access = segment.number << _LEVEL_BITS | segment.level + len(blocks)
        blocks.append(block)

    def prepend(self, segment: Segment, block: Evictable) -> None:
        """A block came that is the parent of the first one of a segment that hangs nowhere."""
        segment.level -= 1
        segment.keys.insert(0, block.key)
        segment.blocks.insert(0, block)
        block.access = segment.number << _LEVEL_BITS | segment.level
        self.known_keys += 1

    def link(self, segment: Segment, parent: Segment) -> bool:
        """Hang a segment below another's last block; False if one with the same first key is there."""
        if parent.children is None:
            parent.children = {}
        if parent.children.setdefault(segment.keys[0], segment) is not segment:
            return False
        segment.parent = parent
        return True

    def cut(self, segment: Segment, length: int) -> Segment:
        """Cut off a segment's first keys, at least one and not all; the new segment above it. Cost: that many blocks.

        What is noted of the segment is noted of the new one as well, but for its place in tables and orders.
        """
        upper = self._new()
        upper.level = segment.level
        segment.level += length
        upper.keys, segment.keys = segment.keys[:length], segment.keys[length:]
        upper.blocks, segment.blocks = segment.blocks[:length], segment.blocks[length:]
        mark = upper.number << _LEVEL_BITS | upper.level
        for place, block in enumerate(upper.blocks):
            block.access = mark + place
        upper.access = segment.access
        upper.abandoned = segment.abandoned
        upper.turn = segment.turn
        upper.gap_s = segment.gap_s
        upper.returns = segment.returns
        upper.mean_gap_s = segment.mean_gap_s
        upper.fresh = segment.fresh
        upper.used_s = segment.used_s
        upper.lru = min(segment.lru, length)
        segment.lru -= upper.lru
        upper.ranked = min(segment.ranked, length)
        segment.ranked -= upper.ranked
        upper.ranked_children = 1 if segment.ranked else 0
        parent = segment.parent
        upper.parent = parent
        if parent is not None:
            assert parent.children is not None
            parent.children[upper.keys[0]] = upper
        segment.parent = upper
        upper.children = {segment.keys[0]: segment}
        return upper

    def forget(self, segment: Segment) -> None:
        """Drop a segment without resident blocks and children."""
        parent = segment.parent
        if parent is not None:
            assert parent.children is not None
            del parent.children[segment.keys[0]]
            segment.parent = None
        self.known_keys -= len(segment.keys)
        del self._by_number[segment.number]

    def _new(self) -> Segment:
        self._last_number = number = self._last_number + 1
        segment = self._by_number[number] = Segment(number, _FIRST_LEVEL)
        return segment
