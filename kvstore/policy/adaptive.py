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

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from typing import Final

from kvstore.policy.base import BEFORE_ALL, Evictable, PolicyContext
from kvstore.policy.by_index import ByIndex, rank_of_size
from kvstore.policy.condemned import Condemned
from kvstore.policy.hazards import Cell, Hazards
from kvstore.policy.segments import GONE, KEY_BYTES, SEGMENT_BYTES, Segment, Segments
from kvstore.policy.shadow import Contest, LruShadow, RankedShadow

TAIL: Final = 0
SHARED: Final = 1
ABANDONED: Final = 2
GROUPS: Final = 3
"""Segments at whose end one session may go on; above several; left behind by the last request that came by."""

_POPULAR_FROM: Final = 16
"""Known children from which on a segment is a prompt of its own."""
_PROMPTS: Final = 8
_EDITED_BELOW: Final = 4
"""With fewer children a new branch is taken for an edit of the same turn."""

_TURNS: Final = 6
_FANS: Final = (2, 3, 4, 5, 8, 16)
_GAPS: Final = (2, 3, 5, 9)
_FRESH: Final = (0.07, 0.14, 0.28, 0.56, 1.12)
"""New blocks of a request, as a share of what requests have in the mean."""
_GAPS_S: Final = (0.0, 3.0, 10.0, 30.0, 60.0, 120.0, 240.0)
_MEAN_GAPS_S: Final = tuple(0.5 * 2.0**octave for octave in range(13))
_FRESH_SHARES: Final = (0.05, 0.1, 0.2, 0.4, 0.7, 0.99)
_MEAN_GAP_WEIGHT: Final = 1 / 8
_MEAN_FRESH_WEIGHT: Final = 1 / 500

GHOSTS_AT_LEAST: Final = 65_536
GHOSTS_PER_BLOCK: Final = 4
"""Keys remembered of blocks that left: that many for each resident one, or the number above if that is more."""
_GHOST_AGE_S: Final = 5760.0
_TRIM_STEPS: Final = 64

_REFIT_AFTER: Final = 25
_REFIT_AFTER_AT_MOST: Final = 400
_REFIT_GROWTH: Final = 1 / 12
"""Requests between two fits of the tables: as a share of those seen so far, within bounds."""

_REPEAT_S: Final = 0.05
"""Another use of a whole segment within that time tells nothing new."""


class _Request:
    """The engine request that is under way.

    Attributes:
        access: its number.
        path: segments it used so far, from the top.
        again: how many of them had been used by it before: its calls were mixed with those of another.
        place: in the last of them, the last block that it used; ``block``: that block.
        settled: new blocks began. ``grown``: the last segment is a new one. ``fresh``: new blocks.
        mark: of the next block, where it goes on in the last segment and nothing is known below; else 0.
        asked, lru_hits, ranked_hits: known blocks, and those that the shadows hold.
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

    def __init__(self, access: int, path: list[Segment], place: int, block: Evictable | None) -> None:
        self.access = access
        self.path = path
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


class Adaptive:
    """See the module. A block costs O(1) amortised; a request that many steps as its path has segments."""

    name = "adaptive"

    def __init__(self, context: PolicyContext) -> None:
        self._clock = context.clock
        self._segments = Segments()
        self._hazards = Hazards(GROUPS, self._moved, pooled=(TAIL, ABANDONED))
        self._ranking = ByIndex(self._hazards)
        self._recency: OrderedDict[Segment, None] = OrderedDict()
        self._known: OrderedDict[Segment, None] = OrderedDict()
        self._lru = LruShadow()
        self._ranked = RankedShadow(self._hazards, self._segments.root)
        self._contest = Contest()
        self._condemned = Condemned()
        self._aside: list[Segment] = []
        self._aside_before = 0
        self._request: _Request | None = None
        # The segment that victims come from, while the orders stay as they are.
        self._front: Segment | None = None
        self._front_before: int | None = None
        self._now_s = 0.0
        self._held = 0
        self._capacity_blocks: int | None = None
        self._requests = 0
        self._mean_fresh = 0.0
        self._prompts = 0
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
        front = self._front
        if front is not None:
            blocks = front.blocks
            if len(blocks) > 1 and blocks[-1] is block and not self._condemned.blocks:
                # Its parent is next, and the orders stay as they are.
                blocks.pop()
                block.access = GONE
                return
            self._front = None
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
        if not segment.blocks:
            self._recency.pop(segment, None)
            self._ranking.remove(segment)
            if parent is not None and segments.holds(parent):
                self._unpark_parent(parent, segments.locate(parent)[0])
            if segment.parent is None and not segment.children:
                self._forget(segment)
        elif parent is not None and segment not in self._recency:
            self._unpark_parent(parent, segment)

    def resized(self, block: Evictable, before_bytes: int) -> None:
        """See ``EvictionPolicy``. Its size counts when it is used again."""

    def condemn(self, blocks: Sequence[Evictable]) -> None:
        """See ``EvictionPolicy``."""
        self._front = None
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
        front = self._front
        if front is not None and before == self._front_before:
            tip = front.blocks[-1]
            if not tip.children and not tip.leases:
                return tip
        if before is not None and before <= BEFORE_ALL:
            return None
        if self._condemned.blocks:
            victim = self._condemned.first()
            if victim is not None:
                return victim
        if self._aside and (before is None or before > self._aside_before):
            aside, self._aside = self._aside, []
            for segment in aside:
                if segment.blocks:
                    self._unpark(segment)
        victim = self._first(before)
        if victim is None and self._request is not None and (before is None or before > self._request.access):
            self._finish()
            victim = self._first(before)
        return victim

    def used(self, block: Evictable) -> int:
        """See ``EvictionPolicy``."""
        return self._segments.locate(block)[0].access

    def held(self) -> int:
        """See ``EvictionPolicy``."""
        return self._held

    def ghost_bytes(self) -> int:
        """See ``EvictionPolicy``."""
        ghost_segments = max(0, len(self._segments) - len(self._recency))
        return self._ghosts() * KEY_BYTES + ghost_segments * SEGMENT_BYTES

    def _ghosts(self) -> int:
        return max(0, self._segments.known_keys - self._held)

    def _first(self, before: int | None) -> Evictable | None:
        ranked = self._contest.ranked
        while True:
            segment = self._ranking.first() if ranked else next(iter(self._recency), None)
            if segment is None:
                return None
            tip = segment.blocks[-1]
            if tip.children or tip.leases:
                # Back when its last child left or its last lease ended.
                self._ranking.remove(segment)
                self._recency.pop(segment, None)
            elif before is not None and segment.access >= before:
                if not ranked:
                    return None
                self._ranking.remove(segment)
                self._aside.append(segment)
                self._aside_before = before
            else:
                self._front, self._front_before = segment, before
                return tip

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

    def _goes_on(self, request: _Request, block: Evictable) -> bool:
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

    def _begin(self, access: int, segment: Segment | None, place: int, block: Evictable | None) -> _Request:
        """A request uses the blocks of ``segment`` to ``place``, and all above it."""
        self._front = None
        if self._request is not None:
            self._finish()
            if block is not None:
                segment, place = self._segments.locate(block)
        now_s = self._clock() * 1e-9
        if now_s > self._now_s:
            self._now_s = now_s
            self._hazards.advance(now_s)
        path: list[Segment] = []
        request = self._request = _Request(access, path, place, block)
        if segment is not None:
            if place + 1 == len(segment.blocks):
                # It may not leave for its own request.
                self._recency.pop(segment, None)
                self._ranking.remove(segment)
            root = self._segments.root
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

    def _settle(self, request: _Request) -> None:
        """The known part of a request's path is complete: count returns, and cut where it ends."""
        request.settled = True
        path, now_s = request.path, self._now_s
        if not path:
            return
        lower = path[-1]
        if request.place + 1 < len(lower.keys):
            path[-1] = self._cut(lower, request.place + 1, returned=len(path) > request.again)
        lru_whole = ranked_whole = True
        for place, segment in enumerate(path):
            length = len(segment.keys)
            if place >= request.again:
                request.asked += length
                if lru_whole:
                    request.lru_hits += segment.lru
                    lru_whole = segment.lru == length
                if ranked_whole:
                    request.ranked_hits += segment.ranked
                    ranked_whole = segment.ranked == length
            if segment.cell >= 0:
                gone_s = now_s - segment.used_s
                self._hazards.leave(segment, now_s, 1.0 if place >= request.again else 0.0)
                if place >= request.again:
                    _note_gap(segment, gone_s)
                    if not segment.children:
                        segment.turn += 1

    def _finish(self) -> None:
        """Nothing more comes of a request: its segments get their classes and places."""
        request = self._request
        assert request is not None
        self._request = self._front = None
        if not request.settled:
            self._settle(request)
        path, now_s = request.path, self._now_s
        if not path:
            return
        self._segments.known_keys += request.fresh
        tip = path[-1]
        fresh = request.fresh
        if request.grown:
            self._begin_session(path)
        elif request.again == len(path):
            fresh += tip.fresh
        tip.fresh = fresh
        self._mean_fresh += (fresh - self._mean_fresh) * max(_MEAN_FRESH_WEIGHT, 1 / (1 + self._requests))
        share = fresh / sum([len(segment.keys) for segment in path])
        prompt = 0
        for segment in path:
            if segment.children and len(segment.children) >= _POPULAR_FROM:
                prompt = segment.prompt or self._new_prompt(segment)
        mean_fresh = self._mean_fresh or 1.0
        hazards, ranking, recency, known = self._hazards, self._ranking, self._recency, self._known
        size = self._rank_of_size(tip.blocks[-1].slot_bytes) if tip.blocks else 0
        for segment in reversed(path):
            segment.abandoned = False
            hazards.enter(segment, _cell(segment, mean_fresh, share, prompt), now_s)
            segment.rank += size
            ranking.remove(segment)
            known[segment] = None
            known.move_to_end(segment)
            if segment.blocks:
                recency[segment] = None
                recency.move_to_end(segment)
        if tip.blocks:
            block = tip.blocks[-1]
            if not block.children and not block.leases:
                ranking.add(tip)
        self._lru.use(path)
        capacity_blocks = self._capacity_blocks
        self._ranked.use(path, capacity_blocks)
        if capacity_blocks is not None:
            self._lru.fit(capacity_blocks)
            self._contest.note(request.lru_hits, request.ranked_hits, request.asked + request.fresh, capacity_blocks)
        self._trim()
        if request.again == len(path):
            return
        self._requests += 1
        if self._requests >= self._refit_at:
            step = min(_REFIT_AFTER_AT_MOST, max(_REFIT_AFTER, int(self._requests * _REFIT_GROWTH)))
            self._refit_at = self._requests + step
            hazards.refit(now_s)
            ranking.rescore()
            self._ranked.order.rescore()

    def _new_prompt(self, segment: Segment) -> int:
        if self._prompts < _PROMPTS:
            self._prompts += 1
            segment.prompt = self._prompts
        return segment.prompt

    @staticmethod
    def _begin_session(path: Sequence[Segment]) -> None:
        """The last segment is new: a session of its own, or an edit of one that went on otherwise."""
        tip = path[-1]
        tip.turn, tip.gap_s = 1, -1.0
        if len(path) > 1:
            above = path[-2]
            if len(above.children or ()) < _EDITED_BELOW:
                tip.turn, tip.gap_s = above.turn, above.gap_s

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
        self._front = None
        recency = self._recency
        for above in path:
            if above.access < access:
                above.access = access
            if above in recency:
                recency.move_to_end(above)
        self._ranking.again(segment)
        self._ranked.order.again(segment)
        self._lru.again(path)
        return True

    def _adopt(self, block: Evictable, below: Sequence[Evictable], access: int) -> None:
        """A block came above resident ones."""
        self._front = None
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
            if above in self._recency:
                self._recency.move_to_end(above)
            above = above.parent

    def _finish_alone(self, segment: Segment) -> None:
        """A segment came to be without a request that used it, or not just now."""
        self._hazards.enter(segment, _cell(segment, self._mean_fresh or 1.0, 0.0, 0), self._now_s)
        self._known[segment] = None
        if segment.blocks:
            self._recency[segment] = None
            tip = segment.blocks[-1]
            if not tip.children and not tip.leases:
                self._ranking.add(segment)

    def _cut(self, segment: Segment, length: int, *, returned: bool) -> Segment:
        """A request leaves a segment after so many blocks; the new one above, which is not at risk yet."""
        share = length / len(segment.keys)
        upper = self._segments.cut(segment, length)
        self._lru.cut(upper, segment)
        order = self._ranked.order
        if segment.cell >= 0:
            if returned:
                _note_gap(upper, self._now_s - segment.used_s)
            in_ranking, in_shadow = segment in self._ranking, segment in order
            self._ranking.remove(segment)
            order.remove(segment)
            self._hazards.leave(segment, self._now_s, share if returned else 0.0)
            segment.abandoned = returned
            self._hazards.enter(segment, _cell(segment, self._mean_fresh or 1.0, 0.0, 0), self._now_s)
            if in_ranking and segment.blocks:
                self._ranking.add(segment)
            if in_shadow:
                (order.add(segment) if segment.ranked else order.add(upper))
        if not segment.blocks:
            self._recency.pop(segment, None)
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
        self._front = None
        request = self._request
        if request is not None and request.path and request.path[-1] is segment:
            return
        self._ranking.add(segment)
        if segment not in self._recency:
            self._recency[segment] = None
            self._recency.move_to_end(segment, last=False)

    def _moved(self, segment: Segment) -> None:
        self._ranking.moved(segment)
        self._ranked.order.moved(segment)

    def _note_full(self) -> None:
        """A block is evicted: that many fit."""
        capacity_blocks = self._capacity_blocks
        if capacity_blocks is None:
            self._capacity_blocks = self._held
        else:
            step = (self._held - capacity_blocks) // 16
            self._capacity_blocks = capacity_blocks + (step or (1 if self._held > capacity_blocks else -1))

    def _trim(self) -> None:
        """Forget what was used longest ago; the rest of a path is always younger than what is below it."""
        bound = max(GHOSTS_AT_LEAST, GHOSTS_PER_BLOCK * self._held)
        known = self._known
        oldest_s = self._now_s - _GHOST_AGE_S
        for _ in range(_TRIM_STEPS):
            segment = next(iter(known), None)
            if segment is None or (self._ghosts() <= bound and segment.used_s > oldest_s):
                return
            if segment.blocks or segment.children or segment.lru or segment.ranked:
                known.move_to_end(segment)
                if self._ghosts() <= bound:
                    return
            else:
                self._forget(segment)

    def _forget(self, segment: Segment) -> None:
        del self._known[segment]
        self._lru.forget(segment)
        self._ranked.forget(segment)
        self._hazards.leave(segment, self._now_s, 0.0)
        self._segments.forget(segment)

    def _rank_of_size(self, slot_bytes: int) -> int:
        rank = self._sizes.get(slot_bytes)
        if rank is None:
            usual_bytes = next(iter(self._sizes), slot_bytes)
            rank = self._sizes[slot_bytes] = rank_of_size(slot_bytes, usual_bytes, self._hazards)
        return rank


def _note_gap(segment: Segment, gap_s: float) -> None:
    segment.gap_s = gap_s
    segment.gaps += 1
    segment.mean_gap_s += (gap_s - segment.mean_gap_s) * max(_MEAN_GAP_WEIGHT, 1 / segment.gaps)


def _cell(segment: Segment, mean_fresh: float, share: float, prompt: int) -> Cell:
    """A segment's class.

    Args:
        segment: it was used just now, or what is left of it begins a life of its own.
        mean_fresh: new blocks that requests have in the mean.
        share: of the request's blocks, the new ones.
        prompt: that the request began with.
    """
    children = segment.children
    if children:
        stratum = bisect_right(_MEAN_GAPS_S, segment.mean_gap_s)
        return (SHARED, stratum, bisect_right(_FANS, len(children)), bisect_right(_GAPS, segment.gaps))
    if segment.abandoned:
        return (ABANDONED, 0, bisect_right(_FRESH, len(segment.keys) / mean_fresh))
    return (
        TAIL,
        bisect_right(_GAPS_S, segment.gap_s),
        min(segment.turn, _TURNS) - 1,
        bisect_right(_FRESH, segment.fresh / mean_fresh),
        bisect_right(_FRESH_SHARES, share),
        prompt,
    )
