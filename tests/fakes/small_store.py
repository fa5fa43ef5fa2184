"""A store of one-page slots with a client that puts and reads blocks by letter."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from fakes.memory_executor import Identity, MemoryExecutor

from kvstore.core.block import Block, Record, runs_of
from kvstore.core.events import (
    Accessed,
    ClearWanted,
    Committed,
    CommittedRecord,
    Joined,
    LeaseWanted,
    PopulationEnded,
    RemoveWanted,
    SessionOpened,
    SlabPopulated,
)
from kvstore.core.instructions import Answer, Leased, Namespaced
from kvstore.core.namespaces import NamespaceState
from kvstore.core.pools import pooled
from kvstore.core.slabs import SlabAllocator
from kvstore.core.ssd import SsdStore
from kvstore.core.state import StoreLimits
from kvstore.core.store import Store
from kvstore.core.tenants import tenants_of
from kvstore.policy.base import PolicyContext
from kvstore.policy.registry import make_policy
from kvstore.protocol.keys import ROOT_KEY
from kvstore.protocol.messages import PutStatus, Reason
from kvstore.protocol.namespace import Namespace

PAGE_BYTES = 4096
SESSION = 1
FIRST_PAGE = 512


def key_of(letter: str) -> bytes:
    """A key that can be read in a failure."""
    return letter.encode().ljust(32, b"_")


class SmallStore:
    """``put("abc")`` puts a chain of three blocks; ``at`` goes on behind a block.

    Args:
        capacity_pages, grant_pages: of the store.
        slab_pages: of each slab.
        slabs: how many; as many as capacity and grants need where nothing is said.
        parts: of the namespace.
        namespace: another one than ``Namespace(name="small", parts=parts)``.
        records: most at a time.
        places: the two buckets of each index entry, see ``MemoryExecutor``.
        ssd: the tier below.
        policy: by name.
        quotas: pages that tenants may have, by name.
        lease_pages, retention_pages: that may be leased, and retained, together.
    """

    def __init__(
        self,
        capacity_pages: int = 8,
        grant_pages: int = 8,
        *,
        slab_pages: int = 4,
        slabs: int = 0,
        parts: int = 1,
        records: int = 1 << 62,
        places: Callable[[Identity], tuple[int, int]] | None = None,
        namespace: Namespace | None = None,
        ssd: SsdStore | None = None,
        policy: str = "lru",
        quotas: Mapping[str, int] | None = None,
        lease_pages: int = 1 << 40,
        retention_pages: int = 1 << 40,
    ) -> None:
        slabs = slabs or -(-(capacity_pages + grant_pages) // slab_pages)
        limits = StoreLimits(
            capacity_bytes=capacity_pages * PAGE_BYTES,
            grant_bytes=grant_pages * PAGE_BYTES,
            grant_bytes_per_session=grant_pages * PAGE_BYTES,
            max_records=records,
            lease_bytes=lease_pages * PAGE_BYTES,
            retention_bytes=retention_pages * PAGE_BYTES,
        )
        tenants = tenants_of({name: pages * PAGE_BYTES for name, pages in (quotas or {}).items()}).values()
        context = PolicyContext(limits.capacity_bytes, lambda: self.executor.now_ns)
        chosen = pooled(partial(make_policy, policy), context, tenants)
        allocator = SlabAllocator(slabs, slab_pages * PAGE_BYTES, FIRST_PAGE)
        self.store = Store(limits, allocator, chosen, ssd=ssd, tenants=tenants)
        self.executor = MemoryExecutor(self.store, places=places)
        for index in range(slabs):
            self.executor.apply(SlabPopulated(index))
        self.executor.apply(PopulationEnded())
        self.executor.apply(SessionOpened(SESSION))
        self.namespace = self.join(Namespace(name="small", parts=parts) if namespace is None else namespace)

    def join(self, description: Namespace) -> NamespaceState:
        answer = self.executor.apply(Joined(description, session=SESSION))
        assert isinstance(answer, Namespaced)
        return answer.namespace

    def grant(self, pages: int = 1) -> int:
        granted = self.executor.want_slot(SESSION, pages * PAGE_BYTES - 1)
        assert isinstance(granted, Record), f"{granted}"
        return granted.slot

    def record(
        self,
        letter: str,
        parent: str = "",
        *,
        part: int = 0,
        pages: int = 1,
        fidelity: int = 255,
        codec: int = 1,
        slot: int = 0,
    ) -> CommittedRecord:
        """A granted and written record, ready to be committed; ``slot``: one that was granted before."""
        slot = slot or self.grant(pages)
        self.executor.write(slot, (letter, part, fidelity))
        above = key_of(parent) if parent else ROOT_KEY
        length = pages * PAGE_BYTES - 1
        digest = self.namespace.digest
        return CommittedRecord(slot, key_of(letter), above, digest, part, length, 0, fidelity, codec)

    def commit(self, *records: CommittedRecord, access: int = 0) -> list[tuple[PutStatus, Reason]]:
        answer = self.executor.apply(Committed(SESSION, self.namespace.id, records, access))
        assert isinstance(answer, Answer)
        for record in records:
            if record.slot not in self.store.records:
                self.executor.forget(record.slot)
        return list(zip(answer.statuses, answer.reasons, strict=True))

    def put(
        self, letters: str, *, at: str = "", access: int = 0, pages: int = 1, fidelity: int = 255
    ) -> list[tuple[PutStatus, Reason]]:
        parents = [at, *letters]
        records = [
            self.record(letter, parents[index], pages=pages, fidelity=fidelity) for index, letter in enumerate(letters)
        ]
        return self.commit(*records, access=access)

    def blocks(self, letters: str) -> list[Block]:
        return [self.namespace.blocks[key_of(letter)] for letter in letters]

    def touch(self, letters: str) -> None:
        self.executor.apply(Accessed(SESSION, 0, runs_of(self.blocks(letters)), len(letters)))

    def remove(self, letters: str) -> None:
        self.executor.apply(RemoveWanted(self.namespace.id, [key_of(letter) for letter in letters]))

    def clear_all(self) -> None:
        self.executor.apply(ClearWanted(self.namespace.id))

    def lease(self, letters: str, duration_ns: int = 10**9) -> int:
        answer = self.executor.apply(LeaseWanted(SESSION, self.blocks(letters), duration_ns))
        assert isinstance(answer, Leased)
        return answer.lease

    def resident(self) -> str:
        return "".join(sorted(key.rstrip(b"_").decode() for key in self.namespace.blocks))

    def hits(self, letters: Sequence[str]) -> int:
        return len(self.store.leading(self.namespace.id, [key_of(letter) for letter in letters]))
