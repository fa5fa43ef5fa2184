"""Replays requests on a store without I/O: what must hit and what must leave, nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fakes.memory_executor import MemoryExecutor

from kvstore.core.block import Record, runs_of
from kvstore.core.events import (
    Accessed,
    Committed,
    CommittedRecord,
    Joined,
    PopulationEnded,
    SessionOpened,
    SlabPopulated,
)
from kvstore.core.instructions import Answer, Namespaced
from kvstore.core.slabs import SlabAllocator
from kvstore.core.state import StoreLimits
from kvstore.core.store import Store
from kvstore.policy.base import PolicyContext
from kvstore.policy.registry import make_policy
from kvstore.protocol.keys import ROOT_KEY
from kvstore.protocol.messages import PutStatus
from kvstore.protocol.namespace import Namespace

_SLAB_SLOTS = 64
_PAGE_BYTES = 4096


class StoreReplay:
    """A store of ``capacity_blocks`` one-page blocks, and room for ``longest_blocks`` grants outside of it.

    ``named``: missing keys that a report names, at most.
    """

    def __init__(
        self,
        capacity_blocks: int,
        longest_blocks: int,
        policy: str = "lru",
        clock: Callable[[], int] = lambda: 0,
        named: int = 1 << 16,
    ) -> None:
        self._named = named
        slabs = -(-(capacity_blocks + longest_blocks) // _SLAB_SLOTS)
        grant_bytes = longest_blocks * _PAGE_BYTES
        limits = StoreLimits(
            capacity_bytes=capacity_blocks * _PAGE_BYTES, grant_bytes=grant_bytes, grant_bytes_per_session=grant_bytes
        )
        self.store = Store(
            limits,
            SlabAllocator(slabs, _SLAB_SLOTS * _PAGE_BYTES, 512),
            make_policy(policy, PolicyContext(limits.capacity_bytes, clock)),
        )
        self.executor = MemoryExecutor(self.store)
        for index in range(slabs):
            self.executor.apply(SlabPopulated(index))
        self.executor.apply(PopulationEnded())
        self.executor.apply(SessionOpened(1))
        answer = self.executor.apply(Joined(Namespace(name="replay")))
        assert isinstance(answer, Namespaced)
        self.namespace = answer.namespace
        self._access = 0
        self.stored = 0

    def request(self, keys: Sequence[bytes]) -> int:
        """Match, read and check what hits, put what is missing; the number of leading hits."""
        self._access += 1
        store, executor, namespace = self.store, self.executor, self.namespace
        blocks = store.leading(namespace.id, list(keys))
        hits = len(blocks)
        for block in blocks:
            assert executor.contents[block.parts[0].slot] is block.key
        report = Accessed(
            1,
            self._access,
            runs_of(blocks),
            len(keys),
            tuple(keys[hits : hits + self._named]),
            namespace_id=namespace.id,
            missed=len(keys) - hits,
            matched=True,
        )
        executor.apply(report)
        records = []
        for index in range(hits, len(keys)):
            granted = executor.want_slot(1, 4000)
            assert isinstance(granted, Record), f"{granted} for block {index} of {len(keys)}"
            executor.write(granted.slot, keys[index])
            parent = keys[index - 1] if index else ROOT_KEY
            records.append(CommittedRecord(granted.slot, keys[index], parent, namespace.digest, 0, 4000, 0, 0))
        if records:
            answer = executor.apply(Committed(1, namespace.id, tuple(records), self._access))
            assert isinstance(answer, Answer)
            self.stored += answer.statuses.count(PutStatus.STORED)
            for record, status in zip(records, answer.statuses, strict=True):
                assert (status is PutStatus.STORED) == (record.key in namespace.blocks)
        return hits
