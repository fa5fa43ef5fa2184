"""What comes and goes, and what could not come: taken down for the causes of misses, many at a time.

A block that leaves is packed into a buffer, which costs less than a tuple and keeps nothing alive; the buffer goes into
the ghosts as a whole. See ``kvstore.core.misses`` for what is made of it.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from typing import Final, TypedDict

import numpy as np

from kvstore.core.block import Block
from kvstore.core.events import CommittedRecord
from kvstore.core.ghosts import BRANCHED, DEPARTURE, DEPTH_SHIFT, Ghosts
from kvstore.core.namespaces import NamespaceState
from kvstore.core.ssd_record import SsdBlock, SsdNamespace
from kvstore.core.state import StoreState
from kvstore.core.tree import ORPHAN_DEPTH
from kvstore.core.watching import Cause
from kvstore.protocol.keys import ROOT_KEY
from kvstore.protocol.messages import Reason, TierId
from kvstore.protocol.misses import MissCause

_AT_ONCE: Final = 1024
"""Blocks that left which are taken down together, at most."""

_FEW: Final = 12
"""Up to so many are taken down one by one."""

MOST_REFUSED: Final = 4096
"""Blocks behind which there was no slot, as far as is remembered."""

_STEP: Final = DEPARTURE.size
_ROOM: Final = _AT_ONCE * _STEP
_EVICTED: Final = Cause.EVICTED
_LEFT: Final = {cause: MissCause.REMOVED if cause is Cause.CLEARED else MissCause(cause.value) for cause in Cause}
_pack: Final = DEPARTURE.pack_into


class Departures:
    """Takes them down. Must be told of the SSD's changes too.

    Args:
        store: whose blocks come and go.
        limit_bytes: memory for ghosts, at least ``SMALLEST_BYTES``.

    Attributes:
        ghosts: what is remembered; up to date after ``settle``.
    """

    def __init__(self, store: StoreState, limit_bytes: int) -> None:
        self.ghosts = Ghosts(limit_bytes)
        self._store = store
        self._gone = bytearray(_ROOM)
        self._end = 0
        """Bytes of ``_gone`` that are used."""
        self._came: list[bytes] = []
        self._came_hashes = array("q")
        self._came_to: list[tuple[NamespaceState, int]] = []
        """Namespaces of runs of them."""
        self._refused: dict[tuple[int, bytes], tuple[NamespaceState, Reason, int]] = {}
        self._evicted = self.ghosts.form_of(MissCause.EVICTED, TierId.DRAM, store.policy.name)
        self._behind: OrderedDict[tuple[int, bytes], tuple[Reason, int]] = OrderedDict()

    # -------------------------------------------------------------- what comes and goes

    def committed(
        self, namespace: NamespaceState, records: Sequence[CommittedRecord], reasons: Sequence[Reason]
    ) -> None:
        """See ``Explainer``."""
        keys = [record.key for record in records]
        self._came += keys
        self._came_hashes.extend(map(hash, keys))
        self._came_to.append((namespace, len(keys)))
        if reasons.count(Reason.NONE) < len(records):
            for record, reason in zip(records, reasons, strict=True):
                if reason is not Reason.NONE:
                    self.refused(namespace, record.key, reason)
        if len(self._came) >= _AT_ONCE:
            self.settle()

    def orphaned(self, block: Block) -> None:
        """See ``Explainer``."""
        self.settle()
        place = self.ghosts.find(block.namespace.salt, block.parent_key)
        if place >= 0:
            self.ghosts.branch(place)

    def left(self, block: Block, cause: Cause) -> None:
        """See ``Explainer``."""
        namespace, key = block.namespace, block.key
        if namespace.ssd is not None and self._is_below(block):
            return
        if cause is not _EVICTED:
            self._note(namespace, key, self.ghosts.form_of(_LEFT[cause], TierId.DRAM, **_seen(block)))
            return
        end = self._end
        # The bytes are whole pages: their lowest bit is free.
        out_bytes = block.slot_bytes | block.branched
        _pack(self._gone, end, hash(key) ^ namespace.salt, block.depth, self._store._now_ns, out_bytes, key)
        self._end = end = end + _STEP
        if end == _ROOM:
            self.settle()

    def _is_below(self, block: Block) -> bool:
        """Whether a block that leaves DRAM is complete below."""
        ssd = block.namespace.ssd
        copy = None if ssd is None else ssd.tree.blocks.get(block.key)
        if copy is None:
            return False
        copy.branched = copy.branched or block.branched
        return len(copy.parts) == block.namespace.parts

    def stored_ssd(self, block: SsdBlock) -> None:
        """A block became readable on the SSD, with its first part."""
        namespace = self._store.namespaces.by_id.get(block.namespace.state)
        if namespace is not None:
            self._came.append(block.key)
            self._came_hashes.append(hash(block.key))
            self._came_to.append((namespace, 1))
            if len(self._came) >= _AT_ONCE:
                self.settle()

    def left_ssd(self, block: SsdBlock, cause: Cause) -> None:
        """A block leaves the SSD; it is still linked, and its parts are still there."""
        namespace = self._store.namespaces.by_id.get(block.namespace.state)
        above = None if namespace is None else namespace.blocks.get(block.key)
        if above is not None:
            above.branched = above.branched or block.branched
            return
        ssd = self._store.ssd
        assert ssd is not None
        evicted = cause is _EVICTED
        policy, out_bytes = (ssd.policy.name, block.slot_bytes) if evicted else ("", 0)
        form = self.ghosts.form_of(_LEFT[cause], TierId.SSD, policy, **_seen(block))
        self._note(block.namespace, block.key, form, out_bytes)

    def _note(self, namespace: NamespaceState | SsdNamespace, key: bytes, form: int, out_bytes: int = 0) -> None:
        """Take down a departure with its form, which is told from a depth by being negative."""
        _pack(self._gone, self._end, hash(key) ^ namespace.salt, ~form, self._store.now_ns, out_bytes, key)
        self._end += _STEP
        if self._end == _ROOM:
            self.settle()

    def policy_changed(self) -> None:
        """See ``Explainer``."""
        self.settle()
        self._evicted = self.ghosts.form_of(MissCause.EVICTED, TierId.DRAM, self._store.policy.name)

    # -------------------------------------------------------------- what did not succeed

    def refused(self, namespace: NamespaceState, key: bytes, reason: Reason) -> None:
        """See ``Explainer``."""
        if reason is not Reason.STALE_NAMESPACE:
            self._refused[namespace.salt, key] = namespace, reason, self._store.now_ns
            if len(self._refused) >= _AT_ONCE:
                self.settle()

    def refused_behind(self, namespace: NamespaceState, parent_key: bytes, reason: Reason) -> None:
        """See ``Explainer``."""
        if parent_key != ROOT_KEY:
            self._behind.pop((namespace.salt, parent_key), None)
            self._behind[namespace.salt, parent_key] = reason, self._store.now_ns
            if len(self._behind) > MOST_REFUSED:
                self._behind.popitem(last=False)

    def failed_load(self, namespace: NamespaceState, key: bytes) -> None:
        """See ``Explainer``."""
        if key in namespace.blocks:
            return
        block = None if namespace.ssd is None else namespace.ssd.tree.blocks.get(key)
        self._note(namespace, key, self.ghosts.form_of(MissCause.FAILED_LOAD, TierId.SSD, **_seen(block)))

    # -------------------------------------------------------------- taking down

    def settle(self) -> None:
        """Take down what came and went since the last time; together that costs a fraction of one by one."""
        if self._end:
            self._add()
        if self._came:
            keys, hashes, runs = self._came, self._came_hashes, self._came_to
            self._came, self._came_hashes, self._came_to = [], array("q"), []
            self._settle_came(keys, hashes, runs)
        if self._refused:
            refused, self._refused = self._refused, {}
            self._settle_refused(refused)

    def _add(self) -> None:
        """Take down what left."""
        end, self._end = self._end, 0
        if end <= _FEW * _STEP:
            for mixed, form, since_ns, out_bytes, key in DEPARTURE.iter_unpack(memoryview(self._gone)[:end]):
                whole = ~form if form < 0 else form << DEPTH_SHIFT | (out_bytes & 1) * BRANCHED | self._evicted
                self.ghosts.add_one(mixed, whole, since_ns, out_bytes & ~1, key)
            return
        rows = np.frombuffer(self._gone, np.int64, end // 8).reshape(-1, _STEP // 8)
        forms, out = rows[:, 1], rows[:, 3]
        rows[:, 1] = np.where(forms < 0, ~forms, forms << DEPTH_SHIFT | (out & 1) * BRANCHED | self._evicted)
        rows[:, 3] = out & ~1
        self.ghosts.add(rows)

    def _settle_came(self, keys: list[bytes], hashes: array[int], runs: list[tuple[NamespaceState, int]]) -> None:
        """Of what came that which has a ghost is back, unless it left once more since."""
        ghosts = self.ghosts
        if len(keys) <= _FEW:
            at = 0
            for namespace, count in runs:
                for key in keys[at : at + count]:
                    place = ghosts.find(namespace.salt, key)
                    if place >= 0:
                        self._came_back(namespace, key, place)
                at += count
            return
        counts = [count for _, count in runs]
        salts = np.array([namespace.salt for namespace, _ in runs], np.int64)
        found = ghosts.find_many(np.frombuffer(hashes, np.int64) ^ np.repeat(salts, counts))
        ends = np.cumsum(counts) if found else None
        seen: set[int] = set()
        for index, place in found:
            # Of a key's places the last one is found first.
            if index not in seen and ghosts.key(place) == keys[index]:
                seen.add(index)
                assert ends is not None
                self._came_back(runs[int(np.searchsorted(ends, index, "right"))][0], keys[index], place)

    def _came_back(self, namespace: NamespaceState, key: bytes, place: int) -> None:
        """A ghost was stored again."""
        block = namespace.blocks.get(key)
        copy = None if namespace.ssd is None else namespace.ssd.tree.blocks.get(key)
        if block is None and copy is None:
            self.ghosts.left_again(place)
        elif self.ghosts.came_back(place):
            if block is not None:
                block.branched = True
            if copy is not None:
                copy.branched = True

    def _settle_refused(self, refused: dict[tuple[int, bytes], tuple[NamespaceState, Reason, int]]) -> None:
        ghosts = self.ghosts
        for (salt, key), (namespace, reason, since_ns) in refused.items():
            if key in namespace.blocks or (namespace.ssd is not None and key in namespace.ssd.tree.blocks):
                continue
            place = ghosts.find(salt, key)
            if place >= 0:
                ghosts.refused(place, reason, since_ns)
                continue
            form = ghosts.form_of(MissCause.NOT_STORED, TierId.NONE, reason=reason, depth=ORPHAN_DEPTH)
            _pack(self._gone, self._end, hash(key) ^ salt, ~form, since_ns, 0, key)
            self._end += _STEP
        if self._end:
            self._add()


class _Seen(TypedDict):
    depth: int
    branched: bool


def _seen(block: Block | SsdBlock | None) -> _Seen:
    """What of a block is remembered with a form; None: nothing is known of it."""
    if block is None:
        return _Seen(depth=ORPHAN_DEPTH, branched=False)
    return _Seen(depth=block.depth, branched=block.branched)
