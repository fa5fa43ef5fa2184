"""Why lookups miss: remembers what left, and gives each key that was not there a cause.

Covers: causes and their counts (``MissStats``), what is remembered for them. Does not cover: the story of a single key,
see ``kvstore.core.stories``.

A miss is counted once an engine request: by its match, or where it has none by its gets. So the counts add up to what
matches asked for and did not find, and what other gets did not find.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Sequence
from typing import Final

from kvstore.core.block import Block
from kvstore.core.departures import Departures
from kvstore.core.events import Accessed
from kvstore.core.ghosts import GHOST_BYTES
from kvstore.core.namespaces import NamespaceState
from kvstore.core.ssd_record import SsdBlock
from kvstore.core.state import ACCESS_IDS, StoreState
from kvstore.protocol.messages import TierId
from kvstore.protocol.misses import MissCause
from kvstore.protocol.statistics import CauseStats, MissStats

MOST_EXPLAINED: Final = 4096
"""Keys of one report that get a cause of their own; those behind them are counted with the last one's."""

_STEPS: Final = 64
"""Places between two ghosts whose bytes are added up one by one."""

SMALLEST_EXTRA: Final = 6
LARGEST_EXTRA: Final = 5
EXTRA_MULTIPLES: Final = tuple(2.0**power for power in range(-SMALLEST_EXTRA, LARGEST_EXTRA + 1))
"""Upper bounds of ``Misses.extra``, as multiples of the tier's capacity; what is more comes behind them."""

_CARRIED_ON: Final = frozenset({MissCause.DIVERGED, MissCause.NOT_STORED})
"""Causes of a key that was never seen which those behind it share: they were never seen because of it."""


class Misses(Departures):
    """See the module, and ``kvstore.core.watching.Explainer``. Is told of the SSD's changes too, see ``watch``.

    Args:
        store: whose lookups are explained.
        limit_bytes: memory for ghosts, at least ``SMALLEST_BYTES``.

    Attributes:
        blocks, requests: by cause; of a request the cause of its first missing key counts.
        extra: of blocks that were evicted, how many would have been kept by so many more bytes, see
            ``EXTRA_MULTIPLES``.
    """

    def __init__(self, store: StoreState, limit_bytes: int) -> None:
        super().__init__(store, limit_bytes)
        self.blocks: Counter[MissCause] = Counter()
        self.requests: Counter[MissCause] = Counter()
        self.extra = [0] * (len(EXTRA_MULTIPLES) + 1)
        self._counted = array("q", bytes(8 * ACCESS_IDS))
        """By access number: the number, and whether it was that of a match."""

    @classmethod
    def watch(cls, store: StoreState, limit_bytes: int) -> Misses:
        """Explain the misses of a store from now on."""
        misses = cls(store, limit_bytes)
        store.explainer = misses
        if store.ssd is not None:
            store.ssd.on_left = misses.left_ssd
            store.ssd.on_stored = misses.stored_ssd
        return misses

    def statistics(self, now_ns: int) -> MissStats:
        """See ``MissStats``."""
        self.settle()
        ghosts = self.ghosts
        return MissStats(
            requests=self.requests.total(),
            blocks=self.blocks.total(),
            causes={
                cause.value: CauseStats(requests=self.requests[cause], blocks=self.blocks[cause])
                for cause in MissCause
                if self.blocks[cause]
            },
            multiples=list(EXTRA_MULTIPLES),
            extra_blocks=list(self.extra),
            ghosts=len(ghosts),
            ghost_bytes=ghosts.used_bytes,
            ghost_limit_bytes=ghosts.places * GHOST_BYTES,
            oldest_ghost_s=(now_ns - ghosts.oldest_ns) / 1e9 if len(ghosts) else 0.0,
        )

    # -------------------------------------------------------------- lookups

    def reported(self, report: Accessed, access: int) -> None:
        """See ``Explainer``."""
        missing = report.missing
        missed = report.missed if report.missed >= 0 else len(missing)
        first = self._is_first(access, report.matched, missed)
        if first is None or not missed:
            return
        namespace = self._store.namespaces.by_id.get(report.namespace_id)
        if namespace is None or not namespace.current:
            self._count([(MissCause.INVALIDATED, -1)], missed, first)
            return
        above: Block | SsdBlock | None = None
        if report.matched:
            for deepest, length in report.runs:
                if length == report.asked - missed and deepest.parts:
                    above = deepest
        some = missing[: min(missed, MOST_EXPLAINED)]
        found = self.causes(namespace, some, above, matched=report.matched, refused=report.refused)
        self._count(found or [(MissCause.NEVER_SEEN, -1)], missed, first)

    def _is_first(self, access: int, matched: bool, missed: int) -> bool | None:
        """Whether nothing of this engine request was counted yet; None where nothing of this report is to be."""
        at = access % ACCESS_IDS
        last = self._counted[at]
        if matched:
            self._counted[at] = access << 1 | 1
        elif last == access << 1 | 1:
            return None
        elif missed:
            self._counted[at] = access << 1
        return last >> 1 != access

    def _count(self, found: list[tuple[MissCause, int]], missed: int, first: bool) -> None:
        if first:
            self.requests[found[0][0]] += 1
        blocks = self.blocks
        if len(found) < 4:
            for cause, _ in found:
                blocks[cause] += 1
        else:
            blocks.update([cause for cause, _ in found])
        blocks[found[-1][0]] += missed - len(found)
        places = [place for cause, place in found if cause is MissCause.EVICTED and place >= 0]
        if places:
            self._count_extra(places)

    def _count_extra(self, places: list[int]) -> None:
        """Blocks of a request left mostly together, tail first: each one's bytes follow from the one before it."""
        ghosts = self.ghosts
        out = ghosts.out
        last = -1
        extra_bytes = 0
        lowest = TierId.DRAM if self._store.ssd is None else TierId.SSD
        for place in places:
            # What left memory without a copy below was none of the SSD's to keep.
            if not out[place] or ghosts.tier(place) is not lowest:
                continue
            if 0 < last - place <= _STEPS:
                extra_bytes += ghosts.bytes_between(place, last)
            elif last >= 0 and 0 <= place - last <= _STEPS:
                extra_bytes -= ghosts.bytes_between(last, place)
            else:
                extra_bytes = ghosts.extra_bytes(place)
            last = place
            capacity_bytes = self._capacity_bytes(ghosts.tier(place))
            # Rounded up: as many 64ths of the capacity as it takes.
            parts = -(-(extra_bytes << SMALLEST_EXTRA) // max(capacity_bytes, 1))
            self.extra[min((parts - 1).bit_length(), len(EXTRA_MULTIPLES))] += 1

    def _capacity_bytes(self, tier: TierId) -> int:
        ssd = self._store.ssd
        if tier is TierId.SSD and ssd is not None:
            return ssd.slabs.slab_bytes * len(ssd.slabs.slabs)
        return self._store.limits.capacity_bytes

    def causes(
        self,
        namespace: NamespaceState,
        keys: Sequence[bytes],
        above: Block | SsdBlock | bytes | None,
        *,
        matched: bool,
        refused: int = 0,
    ) -> list[tuple[MissCause, int]]:
        """Why each key is a miss, and its ghost's place, -1 where it has none. Nothing is counted.

        Args:
            namespace: a current one.
            keys: that were not there, or of no use where they are, in the order in which they were asked for.
            above: the block before the first of them, or its key; None where it is unknown, or there is none.
            matched: they are a chain, and each is of use only with all before it.
            refused: so many of the first keys are below, and were not worth loading.
        """
        self.settle()
        ghosts = self.ghosts
        salt = namespace.salt
        below = {} if namespace.ssd is None else namespace.ssd.tree.blocks
        blocks = namespace.blocks
        previous = above.key if isinstance(above, (Block, SsdBlock)) else above or b""
        seen = bool(previous)
        gap: MissCause | None = None
        found: list[tuple[MissCause, int]] = []
        for key in keys:
            place = ghosts.find(salt, key)
            if key in blocks or key in below:
                if refused > len(found):
                    cause = MissCause.RECOMPUTE
                else:
                    cause = self._there(namespace, key, place, gap if matched else None)
                seen = True
            elif place >= 0:
                cause = ghosts.cause(place)
                seen = True
            elif not matched or not seen:
                cause = gap if matched and gap in _CARRIED_ON else MissCause.NEVER_SEEN
            else:
                cause = self._unseen(namespace, previous)
                seen = False
            gap = cause
            previous = key
            found.append((cause, place))
        return found

    def _there(self, namespace: NamespaceState, key: bytes, place: int, gap: MissCause | None) -> MissCause:
        """Why a block of which there is something was a miss. ``gap``: the cause of what is missing before it."""
        block = namespace.blocks.get(key)
        if (block is None or not block.complete) and namespace.below(key) is None:
            return MissCause.PART_MISSING
        if gap is not None:
            # It is there, and of no use without what is before it.
            return gap
        if block is None or not block.complete:
            return MissCause.FAILED_LOAD
        # It came after it was looked up, and before the daemon was told.
        return MissCause.NEVER_SEEN if place < 0 else self.ghosts.cause(place)

    def _unseen(self, namespace: NamespaceState, parent_key: bytes) -> MissCause:
        """Why a block was never seen that would be behind one that was."""
        if (namespace.salt, parent_key) in self._behind:
            return MissCause.NOT_STORED
        return MissCause.DIVERGED if self.branches(namespace, parent_key) else MissCause.NEVER_SEEN

    def branches(self, namespace: NamespaceState, key: bytes) -> bool:
        """Whether a block has or had blocks behind it."""
        block = namespace.blocks.get(key)
        if key in namespace.orphans or (block is not None and block.branched):
            return True
        if namespace.ssd is not None:
            tree = namespace.ssd.tree
            copy = tree.blocks.get(key)
            if key in tree.orphans or (copy is not None and copy.branched):
                return True
        place = self.ghosts.find(namespace.salt, key)
        return place >= 0 and self.ghosts.branched(place)
