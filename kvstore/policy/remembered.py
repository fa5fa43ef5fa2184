"""What is remembered of blocks that left, and its bound.

Ghosts are keys of known segments without blocks. At most so many keys, and so many segments, are kept for each resident
block, or a fixed number if that is more, and none that was not used for long: what is forgotten is what was used
longest ago. The rest of a path is always younger than what is below it, so no segment goes before those below it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Final

from kvstore.policy.hazards import Hazards
from kvstore.policy.segment_class import SegmentClasses
from kvstore.policy.segments import KEY_BYTES, SEGMENT_BYTES, Segment, Segments
from kvstore.policy.shadow import LruShadow, RankedShadow

GHOSTS_AT_LEAST: Final = 65_536
GHOSTS_PER_BLOCK: Final = 4
"""Keys remembered of blocks that left: that many for each resident one, or the number above if that is more."""
SEGMENTS_AT_LEAST: Final = 16_384
"""Segments without blocks: that many, or as many as there are resident blocks."""
GHOST_AGE_S: Final = 5760.0
_TRIM_STEPS: Final = 64
"""Segments looked at for each request, at most."""


class Remembered:
    """All known segments, by their last use; drops old ones from the tree, the table and the shadows."""

    __slots__ = ("_classes", "_hazards", "_lru", "_order", "_ranked", "_segments")

    def __init__(
        self, segments: Segments, hazards: Hazards, classes: SegmentClasses, lru: LruShadow, ranked: RankedShadow
    ) -> None:
        self._classes = classes
        self._segments = segments
        self._hazards = hazards
        self._lru = lru
        self._ranked = ranked
        self._order: OrderedDict[Segment, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._order)

    def used(self, path: Sequence[Segment]) -> None:
        """A request used the segments of this path, from the top."""
        order = self._order
        for segment in reversed(path):
            order[segment] = None
            order.move_to_end(segment)

    def keys(self, held: int) -> int:
        """Keys remembered, where so many blocks are resident."""
        return max(0, self._segments.known_keys - held)

    def bytes(self, held: int, segments_with_blocks: int) -> int:
        """Memory that they take, about."""
        return self.keys(held) * KEY_BYTES + max(0, len(self._order) - segments_with_blocks) * SEGMENT_BYTES

    def trim(self, held: int, segments_with_blocks: int, now_s: float) -> None:
        """Forget what is beyond the bound, some of it at a time."""
        most_keys = max(GHOSTS_AT_LEAST, GHOSTS_PER_BLOCK * held)
        most_segments = max(SEGMENTS_AT_LEAST, held) + segments_with_blocks
        oldest_s = now_s - GHOST_AGE_S
        for _ in range(_TRIM_STEPS):
            segment = next(iter(self._order), None)
            if segment is None:
                return
            many = self.keys(held) > most_keys or len(self._order) > most_segments
            if not many and segment.used_s > oldest_s:
                return
            if not (segment.blocks or segment.children or segment.lru or segment.ranked):
                self.forget(segment, now_s)
                continue
            self._order.move_to_end(segment)
            if not many:
                return

    def forget(self, segment: Segment, now_s: float) -> None:
        """Drop a segment without resident blocks and children. It is censored, not counted as not having returned."""
        del self._order[segment]
        self._lru.forget(segment)
        self._ranked.forget(segment)
        self._hazards.leave(segment, now_s, 0.0)
        self._classes.forgotten(segment)
        self._segments.forget(segment)
