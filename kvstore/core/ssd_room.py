"""Slots of the slab file: which record gets one, and what has to leave for it."""

from __future__ import annotations

from typing import Final

from kvstore.core.pools import Pools
from kvstore.core.ssd_book import SsdBook
from kvstore.core.ssd_record import SsdBlock, SsdNamespace, SsdRecord, SsdState
from kvstore.core.tenants import Tenant
from kvstore.core.watching import Cause
from kvstore.format.constants import PAGE_BYTES

EVICTION_BATCH: Final = 256
"""Victims chosen at once when room must be made for a slot size."""

SLOTS_AHEAD: Final = 96
"""Slots of a size in demand, and records, that are kept free or on their way to be: what is written while a group is
synced."""


class SsdRoom(SsdBook):
    """What of the SSD's state concerns room."""

    @property
    def scarce(self) -> bool:
        """Whether others must leave for what is written."""
        return not self.growing and not self.slabs.free_slabs

    @property
    def stuck(self) -> bool:
        """Whether room that there is none of is not on its way either."""
        return not (self.growing or self.leaving_bytes or self.writing_bytes)

    def begin(
        self,
        namespace: SsdNamespace,
        key: bytes,
        parent_key: bytes,
        part: int,
        slot_bytes: int,
        depth: int,
        access: int,
    ) -> SsdRecord | None:
        """Take a slot for a record; None where there is none yet: room is being made, try again after the next group.

        None as well where ``over_quota``, and where that stays so as long as nothing else of the tenant can leave.

        ``depth`` and ``access``: its block's depth, and the access number of its last use. Precondition: nothing of
        that key and part is being written.
        """
        if self.over_limit(namespace, slot_bytes) and not self._fit_quota(
            namespace, slot_bytes, parent_key, depth, access
        ):
            return None
        self._keep_records_ahead()
        if len(self.records) >= self.max_records:
            return None
        slot = self.slabs.allocate(slot_bytes)
        self._keep_ahead(slot_bytes)
        if slot is None:
            self.counters.no_room += 1
            return None
        record = SsdRecord(namespace, key, parent_key, part)
        record.slot, record.slot_bytes, record.home_bytes = slot, slot_bytes, slot_bytes
        record.depth, record.access = depth, access
        record.busy = 1
        self.records[slot] = record
        namespace.writing[key, part] = record
        self.writing_bytes += slot_bytes
        if namespace.tenant is not None:
            namespace.tenant.slot_bytes += slot_bytes
        return record

    def over_limit(self, namespace: SsdNamespace, slot_bytes: int) -> bool:
        """Whether something of a namespace's tenant must leave before so much more fits into its quota."""
        return namespace.tenant is not None and namespace.tenant.short_of(slot_bytes)

    def over_quota(self, namespace: SsdNamespace, slot_bytes: int) -> bool:
        """Whether a record is more than its tenant's quota has room for, and nothing of it is on its way."""
        if not self.over_limit(namespace, slot_bytes):
            return False
        tenant = namespace.tenant
        return not any(other.writing for other in self.namespaces.values() if other.tenant is tenant)

    def _fit_quota(self, namespace: SsdNamespace, slot_bytes: int, parent_key: bytes, depth: int, access: int) -> bool:
        """Have a tenant's own blocks leave until a record fits into its quota; whether it does.

        Of a chain that is longer than the quota the beginning stays, in whichever order it is written.
        """
        tenant = namespace.tenant
        assert tenant is not None
        assert isinstance(self.policy, Pools)
        parent = namespace.tree.blocks.get(parent_key)
        if parent is not None:
            parent.leases += 1
        while slot_bytes <= tenant.limit_bytes and tenant.short_of(slot_bytes):
            victim = self.policy.victim_of(tenant)
            assert victim is None or isinstance(victim, SsdBlock)
            if victim is None or (victim.used == access and victim.depth <= depth):
                break
            self._evict_for_quota(tenant, victim)
        if parent is not None:
            parent.leases -= 1
            if not parent.leases:
                self.policy.released(parent)
        return not tenant.short_of(slot_bytes)

    def _evict_for_quota(self, tenant: Tenant, victim: SsdBlock) -> None:
        self.evict(victim, Cause.QUOTA)
        tenant.evicted_blocks += 1

    def keep_quotas(self) -> None:
        """Have blocks leave of tenants whose quotas are less than what was found of them at the start."""
        for tenant in self.tenants.values():
            assert isinstance(self.policy, Pools)
            while tenant.short_of(0):
                victim = self.policy.victim_of(tenant)
                assert isinstance(victim, SsdBlock)
                self._evict_for_quota(tenant, victim)

    def written(self, record: SsdRecord) -> None:
        """Its bytes were written, or will not be: nothing touches its slot any more."""
        record.busy -= 1
        self._settle(record)

    def fail(self, record: SsdRecord) -> None:
        """It will not be stored."""
        if record.state is SsdState.WRITING:
            self._cancel(record)

    def _cancel(self, record: SsdRecord) -> None:
        self._writing_over(record)
        self._leave(record)

    def _writing_over(self, record: SsdRecord) -> None:
        namespace = record.namespace
        del namespace.writing[record.key, record.part]
        self.writing_bytes -= record.slot_bytes
        if namespace.tenant is not None:
            namespace.tenant.slot_bytes -= record.slot_bytes
        if not namespace.writing and not namespace.tree.blocks:
            self._emptied[namespace] = None

    def evict(self, block: SsdBlock, cause: Cause = Cause.EVICTED) -> None:
        """A block leaves for others."""
        self.counters.evicted_blocks += 1
        self.counters.evicted_bytes += block.slot_bytes
        self.on_evicted(block.key, block.used)
        self._unlink(block, cause)

    def _keep_ahead(self, slot_bytes: int) -> None:
        """Evict as much as is needed for the next slots of a size, so that writers need not wait for groups."""
        slots = self.slabs.classes.get(slot_bytes // PAGE_BYTES)
        slab_slots = max(self.slabs.slab_bytes // slot_bytes, 1)
        wanted = min(SLOTS_AHEAD, max(self.slabs.usable_slabs * slab_slots // 8, 1))
        slabs = self.slabs.free_slabs + self.slabs.draining_slabs
        there = (0 if slots is None else slots.free_slots) + slabs * slab_slots
        if not self.growing and there + self.coming[slot_bytes] < wanted:
            self._evict_for(slot_bytes, wanted - there - self.coming[slot_bytes])

    def _keep_records_ahead(self) -> None:
        """Likewise for the number of records."""
        wanted = min(SLOTS_AHEAD, max(self.max_records // 8, 1))
        there = self.max_records - len(self.records) + self.leaving_count
        if there < wanted:
            self._evict_for(0, wanted - there)

    def _evict_for(self, slot_bytes: int, count: int) -> None:
        """Evict until so many slots of a size (0: of any) are on their way.

        Slots of other sizes are emptied slab by slab, as soon as a class has a slab's worth of them free.
        """
        for _ in range(EVICTION_BATCH):
            victim = self.policy.next_victim()
            if victim is None or count <= 0:
                return
            assert isinstance(victim, SsdBlock)
            sizes = [record.slot_bytes for record in victim.parts.values()]
            self.evict(victim)
            for size in sizes:
                if size == slot_bytes or not slot_bytes:
                    count -= 1
                elif self._reclaim(size):
                    count -= max(self.slabs.slab_bytes // slot_bytes, 1)

    def _reclaim(self, slot_bytes: int) -> bool:
        """Empty the emptiest slab of a size, where as many slots of that size are free or on their way as it has."""
        slots = self.slabs.classes.get(slot_bytes // PAGE_BYTES)
        if slots is None or slots.free_slots + self.coming[slot_bytes] < self.slabs.slab_bytes // slot_bytes:
            return False
        slabs = sorted((slab for slab in slots.slabs.values() if not slab.draining), key=lambda slab: slab.used)
        for slab in slabs:
            held = [self.records[slot] for slot in slab.cut_slots() if slot in self.records]
            stored = [self._block_of(record) for record in held if record.state is SsdState.STORED]
            if any(record.state is SsdState.WRITING for record in held) or any(block.leases for block in stored):
                continue
            self.slabs.drain(slab)
            self.coming[slot_bytes] -= sum(record.state is SsdState.LEAVING for record in held)
            for block in dict.fromkeys(stored):
                self.evict(block)
            return True
        return False
