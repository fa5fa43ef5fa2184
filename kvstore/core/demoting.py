"""Blocks that leave DRAM for the tier below: retired ahead, called back when they are used, written when asked for.

Nothing here writes: ``Demote`` says what is to be written, ``Demoted`` what was. See ADR 19.
"""

from __future__ import annotations

from typing import Final

from kvstore.core.block import Block, Record
from kvstore.core.events import (
    Demoted,
    PersistWanted,
    SsdChanged,
)
from kvstore.core.instructions import (
    Demote,
    Instruction,
)
from kvstore.core.retaining import Retaining
from kvstore.core.ssd_record import SsdState
from kvstore.core.state import RESERVE_SHARE
from kvstore.core.tenants import Tenant
from kvstore.core.tree import ORPHAN_DEPTH

RETIRED_AT_ONCE: Final = 64
"""Most blocks that are retired by one event."""


class Demoting(Retaining):
    """What of the store concerns the tier below."""

    def _has_room(self, slot_bytes: int, records: int) -> bool:
        """Whether all that is granted, and so much more, can be committed before something is written below."""
        retired, limits = self.retired, self.limits
        room = limits.capacity_bytes - self.resident_bytes + retired.clean_bytes
        if self.granted_bytes + slot_bytes > room:
            return False
        return self.granted_count + records <= limits.max_records - self.record_count + retired.clean_records

    def _quota_has_room(self, tenant: Tenant, slot_bytes: int) -> bool:
        """As ``_has_room``, for what is granted for a tenant within its quota."""
        return tenant.granted_bytes + slot_bytes <= tenant.limit_bytes - tenant.slot_bytes + tenant.clean_bytes

    def _may_stay(self, block: Block) -> bool:
        """Whether the room of a retired block, and of those above it, is not promised to those that write."""
        slot_bytes, records = self.retired.clean_above(block)
        tenant = block.namespace.tenant
        return self._has_room(slot_bytes, records) and (tenant is None or self._quota_has_room(tenant, slot_bytes))

    def has_free_room(self, slot_bytes: int, session: int) -> bool:
        """Whether a slot can be filled for which nothing has to leave, now or to keep room for puts of others.

        What the session was granted already is filled, too.
        """
        limits = self.limits
        mine_bytes = self.sessions[session].granted_bytes
        kept_bytes = max(self._reserve_bytes, self.granted_bytes - mine_bytes)
        free_bytes = limits.capacity_bytes - self.resident_bytes - mine_bytes - slot_bytes
        return free_bytes >= kept_bytes and limits.max_records - self.record_count > self.granted_count + 1

    def _victim_for_slot(self, number: int | None, tenant: Tenant | None = None) -> Block | None:
        """The block that leaves next for a slot: of those that were retired, or where nothing is demoted any.

        ``tenant``: whose block.
        """
        first = self.retired.first() if tenant is None else tenant.first_retired()
        if first is None:
            return None if self.demotes else self._next_victim(number, tenant)
        return first if self.retired.is_clean(first) else None

    def _retire_ahead(self, wanted_bytes: int = 0) -> list[Instruction]:
        """Have what leaves next written below before its room is needed."""
        if not self.demotes:
            return []
        reserve = max(self._reserve_bytes, self.granted_bytes + wanted_bytes)
        short = reserve - (self.limits.capacity_bytes - self.resident_bytes + self.retired.slot_bytes)
        records_left = self.limits.max_records - self.record_count + self.retired.records
        wanted = max(min(RETIRED_AT_ONCE, self.limits.max_records // RESERVE_SHARE), self.granted_count + 1)
        demote: list[Instruction] = []
        if short > 0 or records_left < wanted:
            demote += self._retire(max(short, 0), max(wanted - records_left, 0))
        for tenant in self.tenants.values():
            kept_bytes = min(self._reserve_bytes, tenant.limit_bytes // RESERVE_SHARE)
            demote += self._retire_of(tenant, max(kept_bytes, tenant.granted_bytes))
        return demote

    def _retire_of(self, tenant: Tenant, wanted_bytes: int) -> list[Instruction]:
        """Have so much of a tenant's quota free, or held by blocks that may leave soon."""
        short = wanted_bytes - (tenant.limit_bytes - tenant.slot_bytes + tenant.retired_bytes)
        return self._retire(short, 0, tenant) if short > 0 else []

    def _retire(self, slot_bytes: int, records: int = 0, tenant: Tenant | None = None) -> list[Instruction]:
        """Retire blocks with so many bytes and records, or as many as there may be at once; of a tenant, or any."""
        assert self.ssd is not None
        bytes_aim, records_aim = self.retired.slot_bytes + slot_bytes, self.retired.records + records
        demote: list[Record] = []
        accesses: list[int] = []
        for _ in range(RETIRED_AT_ONCE):
            enough = self.retired.slot_bytes >= bytes_aim and self.retired.records >= records_aim
            block = None if enough else self._next_victim(None, tenant)
            if block is None:
                break
            access = self.policy.used(block)
            parent = block.parent
            if block.namespace.retained:
                self.retention.left(block, forget=False, gave_way=True)
            self.policy.discard(block, evicted=True)
            # Nobody can reach an orphan: it is not worth writing.
            missing = self.missing_below(block) if block.depth < ORPHAN_DEPTH else []
            if missing and not self.admission.admits(block, self._access, scarce=self.ssd.scarce):
                self.counters.not_admitted_blocks += 1
                missing = []
            self.retired.add(block, {record.part for record in missing})
            if parent is not None and parent.namespace.retained:
                self.retention.may_leave(parent)
            demote += missing
            accesses += [access] * len(missing)
        return [Demote(demote, accesses)] if demote else []

    def _note_born(self, block: Block, access: int) -> None:
        """Say by which turn a new block was put."""
        block.born = access
        parent = block.parent
        if parent is not None:
            block.turn = parent.turn if parent.born == access else parent.turn + 1
        elif block.depth and block.depth < ORPHAN_DEPTH:
            # Its parent is below: put by a turn before.
            block.turn = 2
        below = block.namespace.ssd
        if below is not None and block.key in below.tree.blocks:
            self.admission.used((block.key,), access)

    def _touch(self, block: Block, hits: int, number: int) -> None:
        """A block, and some above it, were used."""
        if not block.retired:
            self.policy.touch(block, hits, number)
        elif self._may_stay(block):
            # Else its room is promised to those that write; it has a copy below, which stays fresh.
            self._revive(block, number)

    def _touch_below(self, deepest: Block, hits: int, number: int) -> None:
        """What was used in DRAM stays as fresh on the SSD: the deepest block of it that has a copy there."""
        below = deepest.namespace.ssd
        if self.ssd is None or below is None or not below.tree.blocks:
            return
        for steps, (key, block) in enumerate(deepest.namespace.upward(deepest.key)):
            if block is not None and steps >= hits:
                return
            copy = below.tree.blocks.get(key)
            if copy is not None:
                self.ssd.touch(copy, number, max(hits - steps, 1))
                return

    def _call_back(self, block: Block) -> bool:
        """See ``Retaining``."""
        may = self._may_stay(block)
        if may:
            self._revive(block, self._access)
        return may

    def _revive(self, block: Block, number: int) -> None:
        """A retired block, and those above it, were used: they stay."""
        chain: list[Block] = []
        above: Block | None = block
        while above is not None and above.retired:
            chain.append(above)
            above = above.parent
        for revived in reversed(chain):
            self.retired.take(revived)
            self.admission.used((revived.key,), number)
            self.policy.insert(revived, number)
            if revived.namespace.retained:
                self._retained_came(revived)

    def _stay(self, block: Block, number: int) -> list[int]:
        """Have a retired block stay, with what goes on behind it; slots of what leaves instead.

        Where the room of those above is promised to others, the first that has a copy below leaves, be it that block.
        """
        slots: list[int] = []
        if not self._may_stay(block):
            above: Block | None = block
            while above is not None and above.retired and not self.retired.is_clean(above):
                above = above.parent
            if above is not None and above.retired:
                slots = self._evict(above)
        if block.parts:
            self._revive(block, number)
        return slots

    def _demoted(self, event: Demoted) -> list[Instruction]:
        better: list[Record] = []
        for stored in event.records:
            namespace = self.namespaces.by_id.get(stored.namespace.state)
            block = None if namespace is None else namespace.blocks.get(stored.key)
            if block is None or not block.retired:
                continue
            record = block.parts.get(stored.part)
            if stored.state is SsdState.STORED and record is not None and record.fidelity > stored.fidelity:
                # It took the other's place here while that was written.
                better.append(record)
            else:
                self.retired.stored(block, stored.part)
        for block in event.given_up:
            if block in self.retired:
                self.retired.clean(block)
        demote = [Demote(better, [self._access] * len(better))] if better and self.demotes else []
        return [*demote, *self._retire_ahead()]

    def _ssd_changed(self, event: SsdChanged) -> list[Instruction]:
        self.demotes = event.writable
        if not event.writable:
            self.retired.clean_all()
        return self._retire_ahead()

    def _persist_wanted(self, event: PersistWanted) -> list[Instruction]:
        namespace = self.namespaces.by_id.get(event.namespace_id)
        records: list[Record] = []
        seen: set[bytes] = set()
        for key in event.keys if namespace is not None and self.demotes else ():
            assert namespace is not None
            path: list[Block] = []
            for at, block in namespace.upward(key):
                if at in seen:
                    break
                seen.add(at)
                if block is not None:
                    path.append(block)
            # The first blocks of a chain first: what comes behind is of no use without them.
            for above in reversed(path):
                records += self.missing_below(above)
        return [Demote(records, [self._access] * len(records))] if records else []
