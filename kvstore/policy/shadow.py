"""Mini-simulation: what least recently used, and the order by index, would hit on the requests that come.

Two shadow caches of the tier's size, without blocks: of each segment they know how many of its first blocks they would
hold. A request costs them a few steps for each segment of its path, however many blocks that has, so they follow every
request and nothing is sampled. Only what the policy forgot, or never saw, they cannot know of.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Final

from kvstore.policy.by_index import ByIndex
from kvstore.policy.hazards import Hazards
from kvstore.policy.segments import Segment

_LEAD: Final = 0.001
"""A lead that is worth a change, as a share of the blocks asked for."""
_CLEAR_LEAD: Final = 1.0
"""Standard deviations by which a lead of the longer comparison is clear."""
_MEMORY_AT_LEAST_BLOCKS: Final = 4000
_LONG_MEMORY: Final = 4
"""Half-life of the short comparison, in blocks asked for, or the cache's capacity if that is more; and how many times
as long the other one is."""
_EVIDENCE: Final = 0.25
"""Part of the short half-life that must have been asked for before an order is called better."""
_LOSS: Final = 3.0
_SPREAD_MEMORY: Final = 0.25
"""A loss since the lead was highest is clear at so many standard deviations of the differences of late: of that part of
the short half-life."""


class LruShadow:
    """Least recently used, tail first. ``Segment.lru``: blocks that it holds."""

    def __init__(self) -> None:
        self._order: OrderedDict[Segment, None] = OrderedDict()
        self._blocks = 0

    def use(self, path: Sequence[Segment]) -> None:
        """A request used these segments and holds all of their blocks; ``path``: from the top."""
        order = self._order
        for segment in reversed(path):
            length = len(segment.keys)
            self._blocks += length - segment.lru
            segment.lru = length
            order[segment] = None
            order.move_to_end(segment)

    def again(self, path: Sequence[Segment]) -> None:
        """All blocks of these segments are held, and used again; ``path``: from the tip."""
        for segment in path:
            self._order.move_to_end(segment)

    def cut(self, upper: Segment, lower: Segment) -> None:
        """A segment was cut in two; the upper part is about to be used."""
        if upper.lru:
            self._order[upper] = None
        if not lower.lru:
            self._order.pop(lower, None)

    def fit(self, capacity_blocks: int) -> None:
        """Evict what is more than the capacity."""
        order = self._order
        while self._blocks > capacity_blocks:
            segment = next(iter(order))
            left = min(self._blocks - capacity_blocks, segment.lru)
            segment.lru -= left
            self._blocks -= left
            if not segment.lru:
                del order[segment]

    def forget(self, segment: Segment) -> None:
        """A segment is not known any more."""
        if segment.lru:
            self._blocks -= segment.lru
            segment.lru = 0
            del self._order[segment]


class RankedShadow:
    """Leaves with the lowest index first. ``Segment.ranked``: blocks that it holds."""

    def __init__(self, hazards: Hazards, root: Segment) -> None:
        self.order = ByIndex(hazards)
        self._root = root
        self._blocks = 0

    def use(self, path: Sequence[Segment], capacity_blocks: int | None) -> None:
        """A request used these segments: others leave for what is missing of them, and the tail where none is left."""
        order = self.order
        order.remove(path[-1])
        for segment in path:
            length = len(segment.keys)
            held = segment.ranked
            if held != length:
                if not held:
                    parent = segment.parent
                    if parent is not None and parent is not self._root:
                        parent.ranked_children += 1
                        order.remove(parent)
                self._blocks += length - held
                segment.ranked = length
        if capacity_blocks is not None:
            self._fit(capacity_blocks)
            place = len(path) - 1
            while self._blocks > capacity_blocks and place >= 0:
                self._take(path[place], self._blocks - capacity_blocks)
                place -= 1
        for segment in reversed(path):
            if segment.ranked:
                if not segment.ranked_children:
                    order.add(segment)
                break

    def forget(self, segment: Segment) -> None:
        """A segment without children is not known any more."""
        self.order.remove(segment)
        if segment.ranked:
            parent = self._take(segment, segment.ranked)
            if parent is not None:
                self.order.add(parent)

    def _fit(self, capacity_blocks: int) -> None:
        order = self.order
        while self._blocks > capacity_blocks:
            segment = order.first()
            if segment is None:
                return
            parent = self._take(segment, self._blocks - capacity_blocks)
            if not segment.ranked:
                order.remove(segment)
                if parent is not None:
                    order.add(parent)

    def _take(self, segment: Segment, blocks: int) -> Segment | None:
        """Take so many blocks of a segment, or all; its parent if that became a leaf of the shadow."""
        left = min(blocks, segment.ranked)
        segment.ranked -= left
        self._blocks -= left
        parent = segment.parent
        if segment.ranked or not left or parent is None or parent is self._root:
            return None
        parent.ranked_children -= 1
        return None if parent.ranked_children or not parent.ranked else parent


class _Lead:
    """Hits of one order less those of the other, of late: the sum, that of squares, and blocks asked for."""

    __slots__ = ("asked", "hits", "squares")

    def __init__(self) -> None:
        self.hits = 0.0
        self.squares = 0.0
        self.asked = 0.0

    def note(self, difference: int, asked: int, half_life_blocks: float) -> None:
        kept = 0.5 ** (asked / half_life_blocks)
        self.hits = self.hits * kept + difference
        self.squares = self.squares * kept + difference * difference
        self.asked = self.asked * kept + asked

    def above(self, deviations: float) -> bool:
        """Whether it is more than chance: differences are taken for independent, with no mean."""
        return self.hits > 0.0 and self.hits * self.hits > deviations * deviations * self.squares

    def reset(self) -> None:
        self.hits = self.squares = self.asked = 0.0


class Contest:
    """Which order is the better one; a lead must be clear before it changes anything.

    While the order by index is followed it is watched for the load's change: as soon as it has lost clearly more than
    chance since its lead was highest (Page, "Continuous inspection schemes", 1954), it is left, and what it won before
    counts no more: the load that it was good for is over.

    Attributes:
        ranked: the order by index is; at first it is not.
    """

    def __init__(self) -> None:
        self.ranked = False
        self._long = _Lead()
        self._short = _Lead()
        self._spread = _Lead()
        self._lost_hits = 0.0

    def note(self, lru_hits: int, ranked_hits: int, asked: int, capacity_blocks: int) -> None:
        """The shadows hit so many of the blocks that a request asked for."""
        memory_blocks = max(_MEMORY_AT_LEAST_BLOCKS, capacity_blocks)
        difference = ranked_hits - lru_hits
        long, short = self._long, self._short
        short.note(difference, asked, memory_blocks)
        long.note(difference, asked, _LONG_MEMORY * memory_blocks)
        self._spread.note(difference, asked, _SPREAD_MEMORY * memory_blocks)
        if not self.ranked:
            self.ranked = (
                long.asked >= _EVIDENCE * memory_blocks
                and long.above(_CLEAR_LEAD)
                and long.hits > _LEAD * long.asked
                and short.hits >= 0.0
            )
            self._lost_hits = 0.0
            return
        self._lost_hits = max(0.0, self._lost_hits - difference)
        if self._lost_hits * self._lost_hits > _LOSS * _LOSS * self._spread.squares:
            self.ranked = False
            long.reset()
            short.reset()
        elif long.hits < 0.0:
            self.ranked = False
