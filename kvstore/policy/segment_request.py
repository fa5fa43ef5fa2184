"""The engine request that is under way, as ``kvstore.policy.adaptive`` gets to know it call by call."""

from __future__ import annotations

from kvstore.policy.base import Evictable
from kvstore.policy.segments import Segment


class SegmentRequest:
    """One request.

    Attributes:
        access: its number.
        path: segments it used so far, from the top.
        again: how many of them had been used by it before: its calls were mixed with those of another.
        place: in the last of them, the last known block that it used.
        block: the last block that it used.
        settled: its known part is complete.
        grown: the last segment is a new one.
        fresh: new blocks.
        mark: of the next block, where it goes on in the last segment and nothing is known below; else 0.
        asked, lru_hits, ranked_hits: known blocks, and those of them that the shadows held.
    """

    __slots__ = (
        "access",
        "again",
        "asked",
        "block",
        "fresh",
        "grown",
        "lru_hits",
        "mark",
        "path",
        "place",
        "ranked_hits",
        "settled",
    )

    def __init__(self, access: int, place: int, block: Evictable | None) -> None:
        self.access = access
        self.path: list[Segment] = []
        self.place = place
        self.block = block
        self.again = 0
        self.settled = False
        self.grown = False
        self.mark = 0
        self.fresh = 0
        self.asked = 0
        self.lru_hits = 0
        self.ranked_hits = 0

    def count_shadow_hits(self) -> None:
        """The shadows' usable prefix hits of the known part, as they are before the request changes them."""
        lru_whole = ranked_whole = True
        for segment in self.path[self.again :]:
            length = len(segment.keys)
            self.asked += length
            if lru_whole:
                self.lru_hits += segment.lru
                lru_whole = segment.lru == length
            if ranked_whole:
                self.ranked_hits += segment.ranked
                ranked_whole = segment.ranked == length
