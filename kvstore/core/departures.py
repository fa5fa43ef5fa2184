"""What comes and goes, and what could not come: taken down for the causes of misses, many at a time.

A block that leaves is packed into a buffer, which costs less than a tuple and keeps nothing alive; the buffer goes into
the ghosts as a whole. See ``kvstore.core.misses`` for what is made of it.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from typing import Final

import numpy as np

from kvstore.core.block import Block
from kvstore.core.ghosts import BRANCHED, DEPARTURE, DEPTH_SHIFT, Ghosts
from kvstore.core.namespaces import NamespaceState
from kvstore.core.ssd_record import SsdBlock, SsdNamespace
from kvstore.core.state import StoreState
from kvstore.core.tree import ORPHAN_DEPTH
from kvstore.core.watching import Cause
from kvstore.policy.base import EvictionPolicy
from kvstore.protocol.keys import ROOT_KEY
from kvstore.protocol.messages import Reason, TierId
from kvstore.protocol.misses import MissCause

_AT_ONCE: Final = 512
"""Blocks that left which are taken down together, at most."""

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
        self._came: list[Block | SsdBlock] = []
        self._came_hashes = array("q")
        self._refused: dict[tuple[int, bytes], tuple[NamespaceState, Reason, int]] = {}
        self._policy: EvictionPolicy | None = None
        self._evicted = 0
        self._behind: OrderedDict[tuple[int, bytes], tuple[Reason, int]] = OrderedDict()

    # -------------------------------------------------------------- what comes and goes

    def stored(self, block: Block) -> None:
        """See ``Explainer``."""
        namespace = block.namespace
        self._came.append(block)
        self._came_hashes.append(hash(block.key) ^ namespace.salt)
        if block.parent is None and block.parent_key != ROOT_KEY:
            self._branch(namespace, block.parent_key)
        if namespace.ssd is not None:
            copy = namespace.ssd.tree.blocks.get(block.key)
            if copy is not None and copy.branched:
                block.branched = True
        if len(self._came) >= _AT_ONCE:
            self.settle()

    def left(self, block: Block, cause: Cause) -> None:
        """See ``Explainer``."""
        namespace, key, store = block.namespace, block.key, self._store
        if namespace.ssd is not None:
            copy = namespace.ssd.tree.blocks.get(key)
            if copy is not None:
                copy.branched = copy.branched or block.branched
                if len(copy.parts) == namespace.parts:
                    # It is there still.
                    return
        if store.policy is not self._policy:
            self._know_policy()
        form = block.depth << DEPTH_SHIFT
        if block.branched:
            form |= BRANCHED
        if cause is _EVICTED:
            form |= self._evicted
            out_bytes = block.slot_bytes
        else:
            form |= self.ghosts.form_of(_LEFT[cause], TierId.DRAM)
            out_bytes = 0
        end = self._end
        _pack(self._gone, end, hash(key) ^ namespace.salt, form, store._now_ns, out_bytes, key)
        self._end = end = end + _STEP
        if end == _ROOM:
            self.settle()

    def stored_ssd(self, block: SsdBlock) -> None:
        """A block became readable on the SSD, with its first part."""
        self._came.append(block)
        self._came_hashes.append(hash(block.key) ^ block.namespace.salt)
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
        evicted = cause is Cause.EVICTED
        policy, out_bytes = (ssd.policy.name, block.slot_bytes) if evicted else ("", 0)
        form = self.ghosts.form_of(_LEFT[cause], TierId.SSD, policy, depth=block.depth, branched=block.branched)
        self._note(block.namespace, block.key, form, out_bytes)

    def _note(self, namespace: NamespaceState | SsdNamespace, key: bytes, form: int, out_bytes: int = 0) -> None:
        _pack(self._gone, self._end, hash(key) ^ namespace.salt, form, self._store.now_ns, out_bytes, key)
        self._end += _STEP
        if self._end == _ROOM:
            self.settle()

    def _know_policy(self) -> None:
        """What leaves from now on another policy chose."""
        self._policy = self._store.policy
        self._evicted = self.ghosts.form_of(MissCause.EVICTED, TierId.DRAM, self._policy.name)

    def _branch(self, namespace: NamespaceState, parent_key: bytes) -> None:
        """A block came whose parent is not in its tier: wherever that is, it has a block behind it."""
        other: Block | SsdBlock | None = namespace.blocks.get(parent_key)
        if other is None and namespace.ssd is not None:
            other = namespace.ssd.tree.blocks.get(parent_key)
        if other is not None:
            other.branched = True
            return
        self.settle()
        place = self.ghosts.find(namespace.salt, parent_key)
        if place >= 0:
            self.ghosts.branch(place)

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
        depth, branched = (ORPHAN_DEPTH, False) if block is None else (block.depth, block.branched)
        form = self.ghosts.form_of(MissCause.FAILED_LOAD, TierId.SSD, depth=depth, branched=branched)
        self._note(namespace, key, form)

    # -------------------------------------------------------------- taking down

    def settle(self) -> None:
        """Take down what came and went since the last time; together that costs a fraction of one by one."""
        if self._end:
            end, self._end = self._end, 0
            self.ghosts.add(memoryview(self._gone)[:end])
        if self._came:
            came, hashes = self._came, self._came_hashes
            self._came, self._came_hashes = [], array("q")
            self._settle_came(came, hashes)
        if self._refused:
            refused, self._refused = self._refused, {}
            self._settle_refused(refused)

    def _settle_came(self, came: list[Block | SsdBlock], hashes: array[int]) -> None:
        """Of what came that which has a ghost is back, unless it left once more since."""
        ghosts = self.ghosts
        seen: set[int] = set()
        for index, place in ghosts.find_many(np.frombuffer(hashes, np.int64)):
            block = came[index]
            # Of a key's places the last one is found first.
            if index in seen or ghosts.key(place) != block.key:
                continue
            seen.add(index)
            if not block.parts:
                ghosts.left_again(place)
            elif ghosts.came_back(place):
                block.branched = True

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
            _pack(self._gone, self._end, hash(key) ^ salt, form, since_ns, 0, key)
            self._end += _STEP
        if self._end:
            end, self._end = self._end, 0
            ghosts.add(memoryview(self._gone)[:end])
