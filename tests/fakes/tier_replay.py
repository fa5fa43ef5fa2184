"""Replays requests on DRAM over an SSD without I/O: what must hit in either, and how often blocks are written."""

from __future__ import annotations

from collections.abc import Sequence

from fakes.memory_executor import MemoryExecutor
from fakes.ssd_twin import SsdTwin

from kvstore.core.block import Block, Record
from kvstore.core.events import (
    Accessed,
    Committed,
    CommittedRecord,
    Joined,
    PopulationEnded,
    SessionOpened,
    SlabPopulated,
)
from kvstore.core.instructions import Answer, Namespaced, Refuse
from kvstore.core.slabs import SlabAllocator
from kvstore.core.ssd_record import SsdBlock
from kvstore.core.state import StoreLimits
from kvstore.core.store import Store
from kvstore.policy.admission import make_admission
from kvstore.policy.lru import Lru
from kvstore.protocol.keys import ROOT_KEY
from kvstore.protocol.messages import PutStatus, Reason
from kvstore.protocol.namespace import Namespace

_SLAB_SLOTS = 64
_PAGE_BYTES = 4096
_GRANTS = 64
_CLIENT, _PROMOTING = 1, 2


class TierReplay:
    """A store of ``dram_blocks`` one-page blocks over a tier of ``ssd_blocks``.

    Attributes:
        inserted: blocks that were put and stored.
    """

    def __init__(self, dram_blocks: int, ssd_blocks: int, admission: str = "all") -> None:
        self.twin = SsdTwin(-(-ssd_blocks // _SLAB_SLOTS), _SLAB_SLOTS)
        slabs = -(-(dram_blocks + _GRANTS) // _SLAB_SLOTS)
        grant_bytes = _GRANTS * _PAGE_BYTES
        limits = StoreLimits(
            capacity_bytes=dram_blocks * _PAGE_BYTES, grant_bytes=grant_bytes, grant_bytes_per_session=grant_bytes
        )
        allocator = SlabAllocator(slabs, _SLAB_SLOTS * _PAGE_BYTES, 512)
        self.store = Store(limits, allocator, Lru(), None, self.twin.ssd, make_admission(admission))
        self.executor = MemoryExecutor(self.store)
        for index in range(slabs):
            self.executor.apply(SlabPopulated(index))
        self.executor.apply(PopulationEnded())
        for session in (_CLIENT, _PROMOTING):
            self.executor.apply(SessionOpened(session))
        answer = self.executor.apply(Joined(Namespace(name="replay")))
        assert isinstance(answer, Namespaced)
        self.namespace = answer.namespace
        self.twin.attach(self.executor)
        self._access = 0
        self.inserted = 0

    @property
    def writes(self) -> int:
        """Records that became readable on the SSD."""
        return self.twin.ssd.counters.stored_records

    def request(self, keys: Sequence[bytes]) -> int:
        """Match, bring up what is below, put what is missing; the number of leading hits in both tiers."""
        self._access += 1
        blocks = self.store.leading_in_tiers(self.namespace.id, list(keys))
        hits = len(blocks)
        runs: list[tuple[Block | SsdBlock, int]] = []
        for kind in (Block, SsdBlock):
            deepest = [index for index in range(hits) if isinstance(blocks[index], kind)]
            if deepest:
                runs.append((blocks[deepest[-1]], deepest[-1] + 1))
        self.executor.apply(Accessed(_CLIENT, self._access, runs, len(keys), tuple(keys[hits : hits + 16])))
        for block in blocks:
            if isinstance(block, SsdBlock) and block.parts and block.key not in self.namespace.blocks:
                self._commit(_PROMOTING, block.key, block.parent_key)
        for index in range(hits, len(keys)):
            self.inserted += self._commit(_CLIENT, keys[index], keys[index - 1] if index else ROOT_KEY)
        self.twin.settle()
        return hits

    def _commit(self, session: int, key: bytes, parent: bytes) -> bool:
        """One block gets a slot and is committed; whether it was stored."""
        granted = self._slot(session)
        self.executor.write(granted.slot, key)
        commit = CommittedRecord(granted.slot, key, parent, self.namespace.digest, 0, 4000, 0, 255)
        promoted = session == _PROMOTING
        answer = self.executor.apply(Committed(session, self.namespace.id, (commit,), self._access, promoted=promoted))
        assert isinstance(answer, Answer)
        return answer.statuses[0] is PutStatus.STORED

    def _slot(self, session: int) -> Record:
        for _ in range(1000):
            granted = self.executor.want_slot(session, 4000, self._access)
            if isinstance(granted, Record):
                return granted
            assert isinstance(granted, Refuse)
            assert granted.reason is Reason.DEMOTING, f"no slot: {granted}"
            self.twin.settle()
        raise AssertionError("room is never made")
