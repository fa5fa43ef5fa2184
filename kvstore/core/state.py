"""What the store holds, and the changes that all its rooms make: attach, detach, unlink, limbo; no decisions."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

from kvstore.core.block import TRANSITIONS, Block, Record, RecordState
from kvstore.core.instructions import (
    Instruction,
    Withdraw,
)
from kvstore.core.journal import Journal
from kvstore.core.leases import Leases
from kvstore.core.namespaces import MOST_RESTORED, Namespaces, NamespaceState
from kvstore.core.pools import Pools
from kvstore.core.retention import ALL, NORMAL, Retention
from kvstore.core.retired import Retired
from kvstore.core.slabs import SlabAllocator
from kvstore.core.ssd import SsdStore
from kvstore.core.ssd_record import SsdBlock
from kvstore.core.story import Story
from kvstore.core.tenants import NO_LIMIT, Tenant
from kvstore.core.watching import Cause, Explainer, Watcher
from kvstore.errors import InvalidTransition
from kvstore.format.constants import FIDELITY_EXACT, PAGE_BYTES
from kvstore.policy.admission import Admission, AdmitAll
from kvstore.policy.base import Evictable, EvictionPolicy
from kvstore.protocol.messages import Reason

ACCESS_IDS: Final = 65_536
"""Engine requests remembered so that their match, gets and puts count as one access a key."""

_MOST_SLOT_BYTES: Final = (1 << 32) - PAGE_BYTES
"""An index entry has 32 bits for a record's length."""

_EVICTED: Final = Cause.EVICTED
_QUOTA: Final = Cause.QUOTA

RESERVE_SHARE: Final = 4
"""What is kept free or clean for puts is at most this part of the capacity."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreLimits:
    """Hard limits, all in bytes of slots unless named otherwise.

    Attributes:
        capacity_bytes: what resident records may occupy together.
        grant_bytes: what granted slots may occupy together, outside the capacity.
        grant_bytes_per_session: of these, what one client may hold.
        leases_per_session: leases that one client may hold.
        max_records: resident records, for which the index has room.
        lease_bytes: what leases may hold together.
        ssd_lease_bytes: likewise on the SSD.
        retention_bytes: what may be retained together.
    """

    capacity_bytes: int
    grant_bytes: int
    grant_bytes_per_session: int
    leases_per_session: int = 4096
    max_records: int = 1 << 62
    lease_bytes: int = NO_LIMIT
    ssd_lease_bytes: int = NO_LIMIT
    retention_bytes: int = NO_LIMIT


@dataclass(slots=True)
class StoreCounters:
    """Counts since the start."""

    evicted_blocks: int = 0
    evicted_bytes: int = 0
    dropped_blocks: int = 0
    not_admitted_blocks: int = 0
    removed_blocks: int = 0
    moved_records: int = 0
    replaced_records: int = 0
    corrupt_records: int = 0
    switched_policies: int = 0


@dataclass(slots=True)
class SessionState:
    """What a client holds."""

    id: int
    grants: dict[int, Record] = field(default_factory=dict)
    granted_bytes: int = 0
    namespaces: set[NamespaceState] = field(default_factory=set)


class StoreState:
    """The state of the DRAM tier, and what lies below it.

    Args:
        limits: hard limits.
        slabs: the arena's slots; the store alone allocates from it.
        policy: chooses what leaves.
        journal: is told of each block that becomes complete or stops being so; None where nobody wants to know.
        ssd: the tier below, None where there is none.
        admission: what is written below; None: everything.
        tenants: those with a quota in DRAM; ``policy`` must know them, see ``kvstore.core.pools``.
    """

    def __init__(
        self,
        limits: StoreLimits,
        slabs: SlabAllocator,
        policy: EvictionPolicy,
        journal: Journal | None = None,
        ssd: SsdStore | None = None,
        admission: Admission | None = None,
        tenants: Iterable[Tenant] = (),
    ) -> None:
        self.limits = limits
        self.slabs = slabs
        self.policy = policy
        self.journal = journal
        self.ssd = ssd
        self.admission = admission or AdmitAll()
        self.watchers: list[Watcher] = []
        self.explainer: Explainer | None = None
        self.retired = Retired()
        self.demotes = False
        """Whether what leaves is written below first."""
        self.tenants = {tenant.name: tenant for tenant in tenants}
        self.namespaces = Namespaces(self.tenants)
        self.leases = Leases(limits.lease_bytes, limits.ssd_lease_bytes)
        self.retention = Retention(
            limits.retention_bytes, limits.capacity_bytes, self.tenants.values(), lambda block: self._released([block])
        )
        self.sessions: dict[int, SessionState] = {}
        self.records: dict[int, Record] = {}
        self.counters = StoreCounters()
        self.story = Story()
        self.resident_bytes = 0
        self.resident_record_bytes = 0
        self.granted_bytes = 0
        self.granted_count = 0
        self.limbo_bytes = 0
        self.block_count = 0
        self.record_count = 0
        self.populating = True
        limit_bytes = min(limits.capacity_bytes, limits.grant_bytes, limits.grant_bytes_per_session)
        self._max_slot_bytes = min(slabs.slab_bytes, limit_bytes // PAGE_BYTES * PAGE_BYTES, _MOST_SLOT_BYTES)
        self._limbo_since_ns: dict[int, dict[int, int]] = {}
        """When each slot in limbo went there, oldest first, by slot size."""
        self._accesses: OrderedDict[tuple[int, int], int] = OrderedDict()
        self._access = 0
        self._now_ns = 0
        self._reserve_bytes = min(limits.grant_bytes, limits.capacity_bytes // RESERVE_SHARE)
        if ssd is not None:
            self._access = ssd.access
            ssd.on_evicted = lambda key, used: self.admission.evicted(key, used, self._access)
            for below in ssd.restored_namespaces(MOST_RESTORED):
                self.namespaces.restore(below)

    # -------------------------------------------------------------- reading

    @property
    def access(self) -> int:
        """Number of the last engine request."""
        return self._access

    @property
    def now_ns(self) -> int:
        """When the last event came."""
        return self._now_ns

    @property
    def max_record_bytes(self) -> int:
        """The largest record that can ever be stored; whole pages."""
        return self._max_slot_bytes

    def slot_bytes_for(self, record_bytes: int) -> int:
        """Size of the slot that a record would get, if it is not too large."""
        return min(self.slabs.slot_bytes_for(record_bytes), self._max_slot_bytes)

    def find(self, namespace_id: int, key: bytes, part: int) -> Record | None:
        """The resident record of one part of a block, or None."""
        namespace = self.namespaces.by_id.get(namespace_id)
        block = None if namespace is None else namespace.blocks.get(key)
        return None if block is None else block.parts.get(part)

    def leading(self, namespace_id: int, keys: list[bytes]) -> list[Block]:
        """The longest run of complete blocks from the first key on."""
        namespace = self.namespaces.by_id.get(namespace_id)
        return [] if namespace is None else namespace.leading(keys)

    def leading_in_tiers(self, namespace_id: int, keys: list[bytes]) -> list[Block | SsdBlock]:
        """The longest run of blocks from the first key on that are complete in DRAM or below."""
        namespace = self.namespaces.by_id.get(namespace_id)
        return [] if namespace is None else namespace.leading_in_tiers(keys)

    def fidelity_of(self, blocks: Sequence[Block | SsdBlock]) -> int:
        """The lowest effective fidelity among the records of blocks of one namespace, 255 for none."""
        if not blocks:
            return FIDELITY_EXACT
        first = blocks[0]
        if self.ssd is None and isinstance(first, Block) and not first.namespace.lossy_records:
            return FIDELITY_EXACT
        return min([record.fidelity for block in blocks for record in block.parts.values()])

    def missing_below(self, block: Block) -> list[Record]:
        """Records of a block of which the SSD has none that is as good."""
        namespace = block.namespace
        assert self.ssd is not None
        return [
            record
            for part, record in block.parts.items()
            if not self.ssd.holds(namespace.ssd, block.key, part, record.fidelity)
        ]

    # -------------------------------------------------------------- changes

    def tell_refused(self, namespace_id: int, key: bytes, reason: Reason) -> None:
        """A put of a block was refused before its record was committed."""
        namespace = self.namespaces.by_id.get(namespace_id)
        if self.explainer is not None and namespace is not None:
            self.explainer.refused(namespace, key, reason)

    def tell_refused_behind(self, namespace_id: int, parent_key: bytes, reason: Reason) -> None:
        """There was no slot for a block behind this one."""
        namespace = self.namespaces.by_id.get(namespace_id)
        if self.explainer is not None and namespace is not None:
            self.explainer.refused_behind(namespace, parent_key, reason)

    def tell_failed_load(self, namespace: NamespaceState, key: bytes) -> None:
        """A block below could not be brought up."""
        if self.explainer is not None:
            self.explainer.failed_load(namespace, key)

    def _access_number(self, session: int, access: int) -> int:
        """One number for all events of one engine request; numbers only grow."""
        if access:
            number = self._accesses.get((session, access))
            if number is not None:
                return number
        self._access += 1
        if access:
            self._accesses[session, access] = self._access
            if len(self._accesses) > ACCESS_IDS:
                self._accesses.popitem(last=False)
        return self._access

    def _attach(self, record: Record) -> None:
        """Make a resident record its block's, and count it."""
        block = record.block
        assert block is not None
        block.parts[record.part] = record
        block.slot_bytes += record.slot_bytes
        if block.leases:
            self._held_resized(block, record.slot_bytes)
        namespace = block.namespace
        namespace.slot_bytes += record.slot_bytes
        if namespace.tenant is not None:
            namespace.tenant.slot_bytes += record.slot_bytes
        if record.fidelity < FIDELITY_EXACT:
            namespace.lossy_records += 1
        self.resident_bytes += record.slot_bytes
        self.resident_record_bytes += record.record_bytes
        self.record_count += 1
        if self.journal is not None:
            self.journal.note(block)

    def _detach(self, record: Record) -> None:
        """Inverse of ``_attach``: the record stays as it is, but belongs to nothing and is not counted."""
        block = record.block
        assert block is not None
        del block.parts[record.part]
        block.slot_bytes -= record.slot_bytes
        if block.leases:
            self._held_resized(block, -record.slot_bytes)
        namespace = block.namespace
        namespace.slot_bytes -= record.slot_bytes
        if namespace.tenant is not None:
            namespace.tenant.slot_bytes -= record.slot_bytes
        if record.fidelity < FIDELITY_EXACT:
            namespace.lossy_records -= 1
        self._count_resident(record, -1)
        if self.journal is not None:
            self.journal.note(block)

    def _count_resident(self, record: Record, by: int = 1) -> None:
        self.resident_bytes += by * record.slot_bytes
        self.resident_record_bytes += by * record.record_bytes
        self.record_count += by

    def _short_of(self, slot_bytes: int, records: int) -> bool:
        """Whether something must leave before so much more fits."""
        limits = self.limits
        if self.resident_bytes + slot_bytes > limits.capacity_bytes:
            return True
        return self.record_count + records > limits.max_records

    def _over_capacity(self) -> bool:
        return self.resident_bytes > self.limits.capacity_bytes or self.record_count > self.limits.max_records

    def _held_resized(self, block: Block, by: int) -> None:
        self.leases.resized(block, by)
        if block.namespace.retained:
            self.retention.resized(block, by)
            self.retention.keep_budget(block.namespace)

    def _released(self, blocks: Iterable[Block | SsdBlock]) -> None:
        """They are held by no lease any more, or by no retention."""
        for block in blocks:
            if type(block) is Block:
                if not block.leases:
                    self.policy.released(block)
                if block.namespace.retained:
                    self.retention.may_leave(block)
            elif self.ssd is not None:
                self.ssd.policy.released(block)

    def _next_victim(self, before: int | None = None, tenant: Tenant | None = None) -> Block | None:
        """The block that leaves next: of low priority, else as the policy has it, else of those that are retained.

        Args:
            before: as in ``EvictionPolicy``.
            tenant: whose blocks; None: anybody's.
        """
        victim: Evictable | None = None
        if self.retention.low_blocks:
            victim = self.retention.next_victim(NORMAL, before, self.policy.used, tenant)
        if victim is None:
            victim = self.policy.next_victim(before) if tenant is None else self._victim_of(tenant, before)
            if victim is None:
                victim = self.retention.next_victim(ALL, before, self.policy.used, tenant)
        assert victim is None or isinstance(victim, Block)
        return victim

    def _victim_of(self, tenant: Tenant, before: int | None) -> Evictable | None:
        assert isinstance(self.policy, Pools)
        return self.policy.victim_of(tenant, before)

    def _evict(self, block: Block, cause: Cause = _EVICTED) -> list[int]:
        """Its slots, to be withdrawn."""
        self.counters.evicted_blocks += 1
        self.counters.evicted_bytes += block.slot_bytes
        if cause is not _EVICTED and block.namespace.tenant is not None:
            block.namespace.tenant.evicted_blocks += 1
        if self.ssd is None:
            return self._unlink(block, cause)
        on_its_way = block.retired and not self.retired.is_clean(block)
        if not on_its_way and self.missing_below(block):
            self.counters.dropped_blocks += 1
        slots = self._unlink(block, cause)
        # What is being written goes on to be.
        block.retired = on_its_way
        return slots

    def _withdraw_all(self, blocks: list[Block], cause: Cause) -> list[Instruction]:
        slots = [slot for block in blocks for slot in self._unlink(block, cause)]
        self.counters.removed_blocks += len(blocks)
        if self.journal is not None and not self.block_count:
            self.journal.emptied()
        return [Withdraw(slots)] if slots else []

    def _unlink(self, block: Block, cause: Cause, why: str = "") -> list[int]:
        """Take a block out of the tree and the policy, its records into limbo; their slots. ``why``: more of it."""
        if self.explainer is not None:
            self.explainer.left(block, cause)
        for watcher in self.watchers:
            watcher.left(block, cause)
        namespace = block.namespace
        evicted = cause is _EVICTED or cause is _QUOTA
        parent: Block | None = None
        freed: Sequence[Block | SsdBlock] = ()
        if block.leases or namespace.retained:
            parent = block.parent
            freed = self.leases.left(block)
            # What leaves for others may come back from below.
            self.retention.left(block, forget=not evicted or self.ssd is None, gave_way=evicted)
        if block.retired:
            self.retired.take(block)
        else:
            self.policy.discard(block, evicted=evicted)
        if self.ssd is not None:
            self.retired.part_from(block)
        namespace.remove(block)
        if not namespace.blocks:
            self.namespaces.note_idle(namespace)
        namespace.slot_bytes -= block.slot_bytes
        if namespace.tenant is not None:
            namespace.tenant.slot_bytes -= block.slot_bytes
        self.block_count -= 1
        if namespace.lossy_records:
            namespace.lossy_records -= sum(record.fidelity < FIDELITY_EXACT for record in block.parts.values())
        told = why or cause
        slots = [self._to_limbo(record, told) for record in block.parts.values()]
        block.parts = {}
        block.slot_bytes = 0
        if self.journal is not None:
            self.journal.note(block)
        if parent is not None:
            self._released(freed)
            self.retention.may_leave(parent)
        return slots

    def _to_limbo(self, record: Record, cause: str, *, counted: bool = True) -> int:
        """Its slot, to be withdrawn. ``counted``: its bytes are, as those of a grant or of a resident record."""
        if record.state is RecordState.GRANTED:
            self.granted_bytes -= record.slot_bytes
            self.granted_count -= 1
            if record.tenant is not None:
                record.tenant.take_back(record)
        elif counted:
            self.resident_bytes -= record.slot_bytes
            self.resident_record_bytes -= record.record_bytes
            self.record_count -= 1
        key = b"" if record.block is None else record.block.key
        self._change(record, RecordState.LIMBO, key, cause)
        self.limbo_bytes += record.slot_bytes
        self._limbo_since_ns.setdefault(record.slot_bytes, {})[record.slot] = self._now_ns
        record.block = None
        return record.slot

    def _to_free(self, record: Record, key: bytes, cause: str) -> None:
        """A grant that was never published: its slot can be used again at once."""
        self._change(record, RecordState.FREE, key, cause)
        self.granted_bytes -= record.slot_bytes
        self.granted_count -= 1
        if record.tenant is not None:
            record.tenant.take_back(record)
        del self.records[record.slot]
        self.slabs.free(record.slot)

    def _change(self, record: Record, after: RecordState, key: bytes, cause: str) -> None:
        before = record.state
        if (before, after) not in TRANSITIONS:
            raise InvalidTransition(
                f"slot {record.slot} of key {key.hex() or '?'}: {before.name} -> {after.name} ({cause}) must never "
                f"happen; its story: {self.story.tell(key, record.slot) or 'nothing remembered'}"
            )
        record.state = after
        self.story.add((self._now_ns, key, record.part, record.slot, before, after, cause))
