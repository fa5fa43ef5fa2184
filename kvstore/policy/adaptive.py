"""Adaptive eviction: what is least likely to be asked for soon leaves first, or what was used longest ago.

Blocks that were last used together are a segment (``segments``). For classes of segments the policy learns, also from
blocks that left, how likely a return is at each age (``hazards``). Among the leaves of the prefix tree the segment with
the lowest Gittins index leaves first, from its tip. Two shadow caches (``shadow``) hit what this order and what least
recently used would hit on the same requests; the policy follows the one that hits more, and until there is a clear
lead, least recently used. The idea is this project's; docs/eviction.md says what it was tried on.

A request comes as one touch and some inserts. It is *settled* at its first new block, when it is known how far its
path was known, and *finished* when the next one begins: only then its segments get their class and place in the orders.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from kvstore.policy.base import BEFORE_ALL, Evictable, PolicyContext
from kvstore.policy.by_index import rank_of_size
from kvstore.policy.condemned import Condemned
from kvstore.policy.hazards import Hazards
from kvstore.policy.orders import Orders
from kvstore.policy.remembered import Remembered
from kvstore.policy.segment_class import ABANDONED, GROUPS, TAIL, SegmentClasses, begin_session, note_return
from kvstore.policy.segment_request import SegmentRequest
from kvstore.policy.segments import GONE, Segment, Segments
from kvstore.policy.shadow import Contest, LruShadow, RankedShadow

_REFIT_AFTER: Final = 25
_REFIT_AFTER_AT_MOST: Final = 400
_REFIT_GROWTH: Final = 1 / 12
"""Requests between two fits of the tables: as a share of those seen so far, within bounds."""

_REPEAT_S: Final = 0.05
"""Another use of a whole segment within that time tells nothing new."""


class Adaptive:
    """See the module. A block costs O(1) amortised; a request that many steps as its path has segments."""

    name = "adaptive"

    def __init__(self, context: PolicyContext) -> None:
        self._clock = context.clock
        self._segments = segments = Segments()
        self._hazards = hazards = Hazards(GROUPS, self._moved, pooled=(TAIL, ABANDONED))
        self._classes = SegmentClasses()
        self._orders = Orders(hazards)
        self._lru = LruShadow()
        self._ranked = RankedShadow(hazards, segments.root)
        self._contest = Contest()
        self._remembered = Remembered(segments, hazards, self._classes, self._lru, self._ranked)
        self._condemned = Condemned()
        self._request: SegmentRequest | None = None
        self._now_s = 0.0
        self._held = 0
        self._capacity_blocks: int | None = None
        self._requests = 0
        self._refit_at = _REFIT_AFTER
        self._sizes: dict[int, int] = {}

    @property
    def ranked(self) -> bool:
        """Whether the order by index is followed now; else least recently used."""
        return self._contest.ranked

    @property
    def following(self) -> str:
        """See ``Choosing``: by what was learned of returns, or as LRU, until that is clearly better."""
        return "learned" if self._contest.ranked else "lru"

    def insert(self, block: Evictable, access: int) -> None:
        """See ``EvictionPolicy``."""
        self._held += 1
        request = self._request
        if (
            request is not None
            and request.mark
            and request.block is block.parent
            and request.access == access
            and not block.children
        ):
            # Most blocks of most requests: what ``Segments.append`` does.
            segment = request.path[-1]
            block.access = request.mark
            segment.keys.append(block.key)
            segment.blocks.append(block)
            request.mark += 1
            request.fresh += 1
            request.block = block
        else:
            self._insert(block, access)

    def touch(self, deepest: Evictable, hits: int, access: int) -> None:
        """See ``EvictionPolicy``. A use is a use of all ancestors, segment by segment."""
        if self._condemned.blocks:
            self._condemned.pardon(deepest)
        segment, place = self._segments.locate(deepest)
        request = self._request
        if segment.access >= access:
            same = request is not None and request.access == access and not request.settled
            if request is not None and same and request.path[-1:] == [segment] and place > request.place:
                request.place, request.block = place, deepest
            return
        whole = place + 1 == len(segment.keys)
        if not whole or self._clock() * 1e-9 - segment.used_s >= _REPEAT_S or not self._repeat(segment, access):
            self._begin(access, segment, place, deepest)

    def discard(self, block: Evictable, *, evicted: bool = False) -> None:
        """See ``EvictionPolicy``."""
        if evicted and self._held != self._capacity_blocks:
            self._note_full()
        self._held -= 1
        front = self._orders.front
        if front is not None:
            blocks = front.blocks
            if len(blocks) > 1 and blocks[-1] is block and not self._condemned.blocks:
                # Its parent is next, and the orders stay as they are.
                blocks.pop()
                block.access = GONE
                return
        if self._condemned.blocks:
            self._condemned.discard(block)
        segments = self._segments
        segment, place = segments.locate(block)
        if self._request is not None and segment.access == self._request.access:
            self._finish()
            segment, place = segments.locate(block)
        if place + 1 < len(segment.blocks):
            # Only its first blocks may be resident.
            segment = self._cut_unused(segment, place + 1)
        segment.blocks.pop()
        block.access = GONE
        parent = block.parent
        if segment.blocks:
            if parent is not None and not self._orders.has(segment):
                self._unpark_parent(parent, segment)
            return
        self._orders.remove(segment)
        if parent is not None and segments.holds(parent):
            self._unpark_parent(parent, segments.locate(parent)[0])
        if segment.parent is None and not segment.children:
            self._remembered.forget(segment, self._now_s)

    def resized(self, block: Evictable, before_bytes: int) -> None:
        """See ``EvictionPolicy``. Its size counts when it is used again."""

    def condemn(self, blocks: Sequence[Evictable]) -> None:
        """See ``EvictionPolicy``."""
        self._orders.front = None
        for block in blocks:
            self._condemned.add(block)

    def released(self, block: Evictable) -> None:
        """See ``EvictionPolicy``."""
        request = self._request
        if request is not None and request.block is block:
            # It is in no order until the request is finished.
            return
        if block.children or block.leases or not self._segments.holds(block):
            return
        if self._condemned.blocks:
            self._condemned.released(block)
        segment, place = self._segments.locate(block)
        if place + 1 == len(segment.blocks):
            self._unpark(segment)

    def next_victim(self, before: int | None = None) -> Evictable | None:
        """See ``EvictionPolicy``."""
        orders = self._orders
        front = orders.front
        if front is not None and before == orders.front_before:
            tip = front.blocks[-1]
            if not tip.children and not tip.leases:
                return tip
        if before is not None and before <= BEFORE_ALL:
            return None
        victim = self._condemned.first() if self._condemned.blocks else None
        if victim is None:
            victim = orders.first(before, ranked=self._contest.ranked)
        request = self._request
        if victim is None and request is not None and (before is None or before > request.access):
            self._finish()
            victim = orders.first(before, ranked=self._contest.ranked)
        return victim

    def used(self, block: Evictable) -> int:
        """See ``EvictionPolicy``."""
        return self._segments.locate(block)[0].access

    def held(self) -> int:
        """See ``EvictionPolicy``."""
        return self._held

    def ghost_bytes(self) -> int:
        """See ``EvictionPolicy``."""
        return self._remembered.bytes(self._held, len(self._orders.recency))

    def _insert(self, block: Evictable, access: int) -> None:
        segments = self._segments
        if block.children:
            below = [child for child in block.children if segments.holds(child)]
            if below:
                self._adopt(block, below, access)
                return
        parent = block.parent
        request = self._request
        if request is None or request.access != access or parent is None or request.block is not parent:
            if parent is not None and segments.holds(parent):
                request = self._begin(access, *segments.locate(parent), parent)
            else:
                request = self._begin(access, None, -1, None)
        if not request.settled:
            if self._goes_on(request, block):
                return
            self._settle(request)
        path = request.path
        if path and not path[-1].children:
            segment = path[-1]
            segments.append(segment, block)
        else:
            segment = segments.start(block, path[-1] if path else segments.root if not block.depth else None)
            segment.access = access
            path.append(segment)
            request.grown = True
        request.mark = block.access + 1
        request.fresh += 1
        request.block = block

    def _goes_on(self, request: SegmentRequest, block: Evictable) -> bool:
        """Whether a block is the one that followed this path before; if so it is there again."""
        path = request.path
        last = path[-1] if path else None if block.depth else self._segments.root
        if last is None:
            return False
        place = request.place + 1
        if place < len(last.keys):
            if last.keys[place] != block.key or len(last.blocks) != place:
                return False
        else:
            child = last.children.get(block.key) if last.children else None
            if child is None or child.blocks:
                return False
            last, place = child, 0
            child.access = request.access
            path.append(child)
        self._segments.revive(last, block)
        request.place = place
        request.block = block
        return True

    def _begin(self, access: int, segment: Segment | None, place: int, block: Evictable | None) -> SegmentRequest:
        """A request uses the blocks of ``segment`` to ``place``, and all above it."""
        if self._request is not None:
            self._finish()
            if block is not None:
                segment, place = self._segments.locate(block)
        now_s = self._clock() * 1e-9
        if now_s > self._now_s:
            self._now_s = now_s
            self._hazards.advance(now_s)
        request = self._request = SegmentRequest(access, place, block)
        if segment is not None:
            if place + 1 == len(segment.blocks):
                # It may not leave for its own request.
                self._orders.remove(segment)
            path, root = request.path, self._segments.root
            above: Segment | None = segment
            while above is not None and above is not root:
                path.append(above)
                if above.access < access:
                    above.access = access
                else:
                    request.again += 1
                above = above.parent
            path.reverse()
        return request

    def _settle(self, request: SegmentRequest) -> None:
        """The known part of a request's path is complete: count returns, and cut where it ends."""
        request.settled = True
        path, now_s = request.path, self._now_s
        if not path:
            return
        lower = path[-1]
        if request.place + 1 < len(lower.keys):
            path[-1] = self._cut(lower, request.place + 1, returned=len(path) > request.again)
        request.count_shadow_hits()
        for place, segment in enumerate(path):
            if segment.cell >= 0:
                new_use = place >= request.again
                gap_s = now_s - segment.used_s
                self._hazards.leave(segment, now_s, 1.0 if new_use else 0.0)
                if new_use:
                    note_return(segment, gap_s)

    def _finish(self) -> None:
        """Nothing more comes of a request: its segments get their classes and places."""
        request = self._request
        assert request is not None
        self._request = None
        if not request.settled:
            self._settle(request)
        path, now_s = request.path, self._now_s
        if not path:
            return
        self._segments.known_keys += request.fresh
        tip = path[-1]
        whole_again = request.again == len(path)
        if request.grown:
            begin_session(path)
        tip.fresh = request.fresh + (tip.fresh if whole_again else 0)
        classes, hazards = self._classes, self._hazards
        classes.begin(path, tip.fresh)
        size = self._rank_of_size(tip.blocks[-1].slot_bytes) if tip.blocks else 0
        for segment in path:
            segment.abandoned = False
            hazards.enter(segment, classes.of(segment), now_s)
            segment.rank += size
        self._orders.used(path)
        self._remembered.used(path)
        self._lru.use(path)
        capacity_blocks = self._capacity_blocks
        self._ranked.use(path, capacity_blocks)
        if capacity_blocks is not None:
            self._lru.fit(capacity_blocks)
            self._contest.note(request.lru_hits, request.ranked_hits, request.asked + request.fresh, capacity_blocks)
        self._remembered.trim(self._held, len(self._orders.recency), now_s)
        if not whole_again:
            self._requests += 1
            if self._requests >= self._refit_at:
                self._refit()

    def _refit(self) -> None:
        step = min(_REFIT_AFTER_AT_MOST, max(_REFIT_AFTER, int(self._requests * _REFIT_GROWTH)))
        self._refit_at = self._requests + step
        self._hazards.refit(self._now_s)
        self._orders.by_index.rescore()
        self._ranked.order.rescore()

    def _repeat(self, segment: Segment, access: int) -> bool:
        """A segment was used a moment ago, as were all above it: move it to the end of its orders. False if not so."""
        path = []
        root = self._segments.root
        above: Segment | None = segment
        while above is not None and above is not root:
            length = len(above.keys)
            if above.lru != length or above.ranked != length or above.cell < 0:
                return False
            path.append(above)
            above = above.parent
        for above in path:
            if above.access < access:
                above.access = access
            self._orders.used_above(above)
        self._orders.by_index.again(segment)
        self._ranked.order.again(segment)
        self._lru.again(path)
        return True

    def _adopt(self, block: Evictable, below: Sequence[Evictable], access: int) -> None:
        """A block came above resident ones."""
        if self._request is not None:
            self._finish()
        segments = self._segments
        segment, place = segments.locate(below[0])
        if len(below) == 1 and place == 0 and segment.parent is None and segment.access >= access:
            segments.prepend(segment, block)
        else:
            segment = segments.start(block, None)
            segments.known_keys += 1
            segment.access = access
            for child in below:
                lower, place = segments.locate(child)
                if place == 0 and lower.parent is None:
                    self._link(lower, segment)
            self._finish_alone(segment)
        parent = block.parent
        if parent is not None and segments.holds(parent):
            upper, place = segments.locate(parent)
            if place + 1 < len(upper.keys):
                upper = self._cut_unused(upper, place + 1)
            self._link(segment, upper)
        elif not block.depth:
            self._link(segment, segments.root)

    def _link(self, segment: Segment, parent: Segment) -> None:
        root = self._segments.root
        if not self._segments.link(segment, parent):
            return
        if segment.ranked and parent is not root:
            parent.ranked_children += 1
            self._ranked.order.remove(parent)
        # Its uses were uses of what is above.
        above: Segment | None = parent
        while above is not None and above is not root and above.access < segment.access:
            above.access = segment.access
            self._orders.used_above(above)
            above = above.parent

    def _finish_alone(self, segment: Segment) -> None:
        """A segment came to be without a request that used it, or not just now."""
        self._hazards.enter(segment, self._classes.of(segment), self._now_s)
        self._remembered.used((segment,))
        self._orders.begun(segment)

    def _cut(self, segment: Segment, length: int, *, returned: bool) -> Segment:
        """A request leaves a segment after so many blocks; the new one above, which is not at risk yet."""
        share = length / len(segment.keys)
        upper = self._segments.cut(segment, length)
        self._lru.cut(upper, segment)
        by_index, shadow = self._orders.by_index, self._ranked.order
        if segment.cell >= 0:
            if returned:
                note_return(upper, self._now_s - segment.used_s)
            was_in, was_in_shadow = segment in by_index, segment in shadow
            by_index.remove(segment)
            shadow.remove(segment)
            self._hazards.leave(segment, self._now_s, share if returned else 0.0)
            segment.abandoned = returned
            self._hazards.enter(segment, self._classes.of(segment), self._now_s)
            if was_in and segment.blocks:
                by_index.add(segment)
            if was_in_shadow:
                shadow.add(segment if segment.ranked else upper)
        if not segment.blocks:
            self._orders.remove(segment)
        return upper

    def _cut_unused(self, segment: Segment, length: int) -> Segment:
        upper = self._cut(segment, length, returned=False)
        self._finish_alone(upper)
        return upper

    def _unpark_parent(self, parent: Evictable, segment: Segment) -> None:
        """A child of this block, the last one of the segment, is about to be gone."""
        if not parent.leases and len(parent.children or ()) <= 1 and segment.blocks[-1] is parent:
            self._unpark(segment)

    def _unpark(self, segment: Segment) -> None:
        request = self._request
        # What a request used last is in no order until it is finished.
        if request is None or request.block is not segment.blocks[-1]:
            self._orders.bring_back(segment)

    def _moved(self, segment: Segment) -> None:
        self._orders.by_index.moved(segment)
        self._ranked.order.moved(segment)

    def _note_full(self) -> None:
        """A block is evicted: that many fit."""
        capacity_blocks = self._capacity_blocks
        if capacity_blocks is None:
            self._capacity_blocks = self._held
        else:
            step = (self._held - capacity_blocks) // 16
            self._capacity_blocks = capacity_blocks + (step or (1 if self._held > capacity_blocks else -1))

    def _rank_of_size(self, slot_bytes: int) -> int:
        rank = self._sizes.get(slot_bytes)
        if rank is None:
            usual_bytes = next(iter(self._sizes), slot_bytes)
            rank = self._sizes[slot_bytes] = rank_of_size(slot_bytes, usual_bytes, self._hazards)
        return rank
