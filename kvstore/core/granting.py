"""Slots lent for writing: what is free, what has to leave for them, and who waits."""

from __future__ import annotations

from typing import Final

from kvstore.core.block import Record, RecordState
from kvstore.core.demoting import Demoting
from kvstore.core.events import (
    GrantsReturned,
    SlotWanted,
)
from kvstore.core.instructions import (
    Grant,
    Instruction,
    Move,
    Refuse,
    TryAgain,
    Withdraw,
)
from kvstore.core.slabs import Slab
from kvstore.core.tenants import Tenant
from kvstore.core.watching import Cause
from kvstore.policy.base import BEFORE_ALL
from kvstore.protocol.keys import ROOT_KEY
from kvstore.protocol.messages import PutStatus, Reason

LIMBO_PATIENCE_NS: Final = 100_000_000
"""How long a slot in limbo is expected to come back by itself; a reader that stopped must not keep others waiting."""

EVICTION_BATCH: Final = 64
"""Victims chosen at once when room must be made for a slot size."""


class Granting(Demoting):
    """What of the store concerns grants."""

    def _slot_wanted(self, event: SlotWanted) -> list[Instruction]:
        if event.record_bytes > self._max_slot_bytes:
            return [Refuse(PutStatus.REJECTED, Reason.TOO_LARGE)]
        slot_bytes = event.slot_bytes or self.slot_bytes_for(event.record_bytes)
        session = self.sessions[event.session]
        number = None if event.ahead else self._number_of_wanted(event)
        tenant = self._tenant_of(event.namespace_id) if self.tenants else None
        if session.granted_bytes + slot_bytes > self.limits.grant_bytes_per_session:
            return [Refuse(PutStatus.THROTTLED, Reason.GRANT_LIMIT)]
        if self.granted_bytes + slot_bytes > self.limits.grant_bytes:
            return [Refuse(PutStatus.THROTTLED, Reason.GRANT_LIMIT)]
        if tenant is not None:
            if slot_bytes > tenant.limit_bytes:
                tenant.refused_puts += 1
                return [Refuse(PutStatus.REJECTED, Reason.QUOTA)]
            if self.demotes and not event.ahead and not self._quota_has_room(tenant, slot_bytes):
                return [*self._retire_of(tenant, tenant.granted_bytes + slot_bytes), self._quota_used_up(tenant)]
        if self.demotes and not self._has_room(slot_bytes, 1):
            retired = [] if event.ahead else self._retire_ahead(slot_bytes)
            return [*retired, Refuse(PutStatus.THROTTLED, Reason.DEMOTING if self.retired else Reason.ALL_HELD)]
        slot = self.slabs.allocate(slot_bytes)
        if slot is None:
            return (
                [Refuse(PutStatus.THROTTLED, Reason.ALL_HELD)]
                if event.ahead
                else self._make_room(slot_bytes, number, tenant)
            )
        record = Record(slot, slot_bytes, event.session)
        self.records[slot] = record
        if tenant is not None:
            record.tenant = tenant
            tenant.granted_bytes += slot_bytes
        session.grants[slot] = record
        session.granted_bytes += slot_bytes
        self.granted_bytes += slot_bytes
        self.granted_count += 1
        return [Grant(record)]

    def _number_of_wanted(self, event: SlotWanted) -> int | None:
        """Number of the access that a slot is for; None where nobody says. To go on behind a block is a use of it."""
        parent_key = event.parent_key
        if not event.access and not parent_key:
            return None
        number = self._access_number(event.session, event.access)
        if parent_key and parent_key != ROOT_KEY:
            namespace = self.namespaces.by_id.get(event.namespace_id)
            if namespace is None or not namespace.reaches(parent_key):
                return BEFORE_ALL
            parent = namespace.blocks.get(parent_key)
            if parent is not None and not parent.retired:
                # What leaves is not called back: of a chain longer than the tier that would be all that can leave.
                self.policy.touch(parent, 1, number)
        return number

    def _tenant_of(self, namespace_id: int) -> Tenant | None:
        namespace = self.namespaces.by_id.get(namespace_id)
        return None if namespace is None else namespace.tenant

    def _quota_used_up(self, tenant: Tenant) -> Refuse:
        """Why a tenant gets no slot for which nothing of it can leave now."""
        if tenant.retired_bytes:
            return Refuse(PutStatus.THROTTLED, Reason.DEMOTING)
        tenant.refused_puts += 1
        if tenant.leased_bytes:
            return Refuse(PutStatus.THROTTLED, Reason.ALL_HELD)
        if tenant.granted_bytes:
            return Refuse(PutStatus.THROTTLED, Reason.GRANT_LIMIT)
        return Refuse(PutStatus.REJECTED, Reason.QUOTA)

    def _make_room(self, slot_bytes: int, number: int | None, tenant: Tenant | None) -> list[Instruction]:
        """Get a slab or a slot of this size: move records together, or evict what was used before an access.

        Where it is for a tenant at its limit, only its own blocks leave.
        """
        if self.populating:
            return [Refuse(PutStatus.THROTTLED, Reason.POPULATING)]
        waiting = self._limbo_since_ns.get(slot_bytes)
        if waiting and self._now_ns - next(iter(waiting.values())) < LIMBO_PATIENCE_NS:
            # A slot of this size comes back by itself: evicting more would only empty the tier meanwhile.
            return [Refuse(PutStatus.THROTTLED, Reason.ALL_HELD)]
        for slab in self.slabs.vacatable(slot_bytes):
            instructions = self._vacate(slab)
            if instructions:
                return [*instructions, TryAgain()]
        slots = self._evict_for_slot(slot_bytes, number, tenant)
        if slots:
            return [Withdraw(slots), TryAgain()]
        if tenant is not None and tenant.short_of(tenant.granted_bytes + slot_bytes):
            return [self._quota_used_up(tenant)]
        if self.demotes:
            # What is on its way comes first; a slab of it is enough for a slot of any size.
            enough = self.retired.slot_bytes >= self.slabs.slab_bytes
            demote = [] if enough else self._retire(slot_bytes)
            if len(self.retired):
                return [*demote, Refuse(PutStatus.THROTTLED, Reason.DEMOTING)]
        if self.limbo_bytes or self.leases:
            return [Refuse(PutStatus.THROTTLED, Reason.ALL_HELD)]
        if self._next_victim() is not None:
            return [Refuse(PutStatus.REJECTED, Reason.NO_ROOM)]
        all_there = self.slabs.usable_slabs == len(self.slabs.slabs)
        return [Refuse(PutStatus.THROTTLED, Reason.GRANT_LIMIT if all_there else Reason.MEMORY_LIMIT)]

    def _evict_for_slot(self, slot_bytes: int, number: int | None, tenant: Tenant | None) -> list[int]:
        """Evict until a slot of this size, or a slab's worth of another size, comes free; the slots.

        A tenant that is at its limit has its own blocks leave for what it was lent, and for this slot.
        """
        slots: list[int] = []
        missing: dict[int, int] = {}
        for _ in range(EVICTION_BATCH):
            full = tenant if tenant is not None and tenant.short_of(tenant.granted_bytes + slot_bytes) else None
            victim = self._victim_for_slot(number, full)
            if victim is None:
                break
            enough = False
            for record in victim.parts.values():
                size = record.slot_bytes
                if size not in missing:
                    missing[size] = self.slabs.slots_short_of_a_slab(size)
                missing[size] -= 1
                enough = enough or size == slot_bytes or missing[size] == 0
            slots += self._evict(victim, Cause.EVICTED if full is None else Cause.QUOTA)
            if enough:
                break
        return slots

    def _vacate(self, slab: Slab) -> list[Instruction]:
        """Move all records out of a slab into the rest of its class; [] if one of them cannot be moved."""
        held = [self.records[slot] for slot in slab.cut_slots() if slot in self.records]
        if any(record.state is not RecordState.RESIDENT for record in held):
            return []
        self.slabs.drain(slab)
        moves: list[Instruction] = []
        for record in held:
            target = self.slabs.allocate(record.slot_bytes)
            assert target is not None
            copy = Record(target, record.slot_bytes, 0)
            copy.block, copy.part, copy.record_bytes = record.block, record.part, record.record_bytes
            copy.checksum, copy.codec, copy.fidelity = record.checksum, record.codec, record.fidelity
            copy.state = RecordState.RESIDENT
            self.records[target] = copy
            assert record.block is not None
            record.block.parts[record.part] = copy
            told = (self._now_ns, record.block.key, copy.part, target, RecordState.GRANTED, copy.state, "moved here")
            self.story.add(told)
            moves.append(Move(record.slot, target, record.slot_bytes))
            self._count_resident(copy)
            self._to_limbo(record, "moved away")
        self.counters.moved_records += len(held)
        return [*moves, Withdraw([record.slot for record in held])]

    def _grants_returned(self, event: GrantsReturned) -> list[Instruction]:
        session = self.sessions[event.session]
        for slot in event.slots:
            record = session.grants.pop(slot, None)
            if record is not None:
                session.granted_bytes -= record.slot_bytes
                self._to_free(record, b"", "returned")
        return []
