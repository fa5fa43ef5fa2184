"""An order of segments by their Gittins index, the lowest first, among equals the one longest there.

Segments of one rank and age bin are a bucket; a heap keeps the buckets. When the table of indices changes only the heap
is built anew: there are few buckets, however many segments.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from math import log2
from typing import Final

from kvstore.policy.hazards import Hazards
from kvstore.policy.segments import Segment

_SIZES_PER_OCTAVE: Final = 4


class ByIndex:
    """Segments that may leave. Adding and removing is O(1) amortised, the first O(log buckets)."""

    __slots__ = ("_buckets", "_hazards", "_heap", "_places", "_stride")

    def __init__(self, hazards: Hazards) -> None:
        self._hazards = hazards
        self._stride = len(hazards.index)
        self._places: dict[Segment, int] = {}
        self._buckets: dict[int, OrderedDict[Segment, None]] = {}
        self._heap: list[tuple[float, int]] = []

    def __contains__(self, segment: Segment) -> bool:
        return segment in self._places

    def add(self, segment: Segment) -> None:
        """Put a segment at the end of its bucket; does nothing for one that is in the order."""
        if segment in self._places:
            return
        place = self._places[segment] = segment.rank + segment.bin
        segment.orders += 1
        bucket = self._buckets.get(place)
        if bucket is None:
            bucket = self._buckets[place] = OrderedDict()
            heapq.heappush(self._heap, (self._score(place), place))
        bucket[segment] = None

    def remove(self, segment: Segment) -> None:
        """Take a segment out; does nothing for one that is not in the order."""
        place = self._places.pop(segment, None)
        if place is not None:
            segment.orders -= 1
            # An empty bucket stays until it is the first, or the heap is built anew.
            del self._buckets[place][segment]

    def moved(self, segment: Segment) -> None:
        """A segment came to another age bin."""
        places = self._places
        before = places.get(segment)
        if before is None:
            return
        buckets = self._buckets
        del buckets[before][segment]
        place = places[segment] = segment.rank + segment.bin
        bucket = buckets.get(place)
        if bucket is None:
            bucket = buckets[place] = OrderedDict()
            heapq.heappush(self._heap, (self._score(place), place))
        bucket[segment] = None

    def again(self, segment: Segment) -> None:
        """A segment goes to the end of its bucket; does nothing for one that is not in the order."""
        place = self._places.get(segment)
        if place is not None:
            self._buckets[place].move_to_end(segment)

    def first(self) -> Segment | None:
        """The segment with the lowest index; it stays."""
        heap = self._heap
        while heap:
            place = heap[0][1]
            bucket = self._buckets[place]
            if bucket:
                return next(iter(bucket))
            heapq.heappop(heap)
            del self._buckets[place]
        return None

    def rescore(self) -> None:
        """The table of indices changed."""
        self._buckets = {place: bucket for place, bucket in self._buckets.items() if bucket}
        self._heap = [(self._score(place), place) for place in self._buckets]
        heapq.heapify(self._heap)

    def _score(self, place: int) -> float:
        size, at = divmod(place, self._stride)
        return self._hazards.index[at] * float(2.0 ** (-size / _SIZES_PER_OCTAVE))


def rank_of_size(slot_bytes: int, usual_bytes: int, hazards: Hazards) -> int:
    """What a segment's rank is raised by for the size of its blocks: hits are counted by block, and room by byte.

    0 for the usual size, which is also that of segments of which no block is there.
    """
    return round(_SIZES_PER_OCTAVE * log2(slot_bytes / usual_bytes)) * len(hazards.index)
