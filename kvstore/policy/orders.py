"""The two orders in which segments with resident blocks may leave: by index, and least recently used.

Both are kept all the time, so that the policy can change from one to the other at once. A segment whose last resident
block has children or a lease is parked when it reaches the victim end: out of both orders until it is brought back.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from kvstore.policy.base import Evictable
from kvstore.policy.by_index import ByIndex
from kvstore.policy.hazards import Hazards
from kvstore.policy.segments import Segment


class Orders:
    """Segments, and at the end of one of them the next victim. Each call is O(1) amortised, or O(log buckets).

    Attributes:
        by_index: segments without resident children, some of them perhaps with leases.
        recency: all segments with resident blocks, but for those that are parked or under use.
        front: where victims came from last, while that is still the first segment; else None.
    """

    __slots__ = ("_aside", "_aside_before", "by_index", "front", "front_before", "recency")

    def __init__(self, hazards: Hazards) -> None:
        self.by_index = ByIndex(hazards)
        self.recency: OrderedDict[Segment, None] = OrderedDict()
        self.front: Segment | None = None
        self.front_before: int | None = None
        self._aside: list[Segment] = []
        self._aside_before = 0

    def has(self, segment: Segment) -> bool:
        """Whether a segment is in both."""
        return segment in self.by_index and segment in self.recency

    def first(self, before: int | None, *, ranked: bool) -> Evictable | None:
        """The victim by one of the orders, if any block may leave for the request ``before``."""
        if self._aside and (before is None or before > self._aside_before):
            aside, self._aside = self._aside, []
            for held_back in aside:
                if held_back.blocks:
                    self.bring_back(held_back)
        while True:
            segment = self.by_index.first() if ranked else next(iter(self.recency), None)
            if segment is None:
                return None
            tip = segment.blocks[-1]
            if tip.children or tip.leases:
                self.remove(segment)
            elif before is not None and segment.access >= before:
                if not ranked:
                    return None
                self.by_index.remove(segment)
                self._aside.append(segment)
                self._aside_before = before
            else:
                self.front, self.front_before = segment, before
                return tip

    def used(self, path: Sequence[Segment]) -> None:
        """A request used the segments of this path, from the top, and they have their ranks."""
        self.front = None
        by_index, recency = self.by_index, self.recency
        for segment in reversed(path):
            by_index.remove(segment)
            if segment.blocks:
                recency[segment] = None
                recency.move_to_end(segment)
        self._add_leaf(path[-1])

    def used_above(self, segment: Segment) -> None:
        """A segment counts as used just now, without having been."""
        if segment in self.recency:
            self.front = None
            self.recency.move_to_end(segment)

    def begun(self, segment: Segment) -> None:
        """A segment came to be that no request used."""
        if segment.blocks:
            self.front = None
            self.recency[segment] = None
            self._add_leaf(segment)

    def remove(self, segment: Segment) -> None:
        """Take a segment out of both."""
        self.front = None
        self.by_index.remove(segment)
        self.recency.pop(segment, None)

    def bring_back(self, segment: Segment) -> None:
        """A parked segment's last block may leave again: it is as old as it was."""
        self.front = None
        self.by_index.add(segment)
        if segment not in self.recency:
            self.recency[segment] = None
            self.recency.move_to_end(segment, last=False)

    def _add_leaf(self, segment: Segment) -> None:
        if segment.blocks:
            tip = segment.blocks[-1]
            if not tip.children and not tip.leases:
                self.by_index.add(segment)
