"""Commits: where a record that was written belongs, what it takes the place of, and what leaves for it."""

from __future__ import annotations

from kvstore.core.block import Block, Record, RecordState
from kvstore.core.demoting import Demoting
from kvstore.core.events import (
    Committed,
    CommittedRecord,
    Displaced,
)
from kvstore.core.instructions import (
    Answer,
    Instruction,
    Publish,
    Replace,
    Withdraw,
)
from kvstore.core.namespaces import NamespaceState
from kvstore.core.tenants import Tenant
from kvstore.core.tree import ORPHAN_DEPTH, descendants
from kvstore.core.watching import Cause
from kvstore.format.constants import FIDELITY_EXACT
from kvstore.protocol.messages import PutStatus, Reason


class _Placing:
    """What the commits of one event did so far.

    Attributes:
        touched: blocks that were there before, with the access that used them.
        placed: records that got a place, in order.
        worse: by each of them that took the place of a published record, that record. It stays published, and can have
            its place back, until it is sure that there is room for the better one.
        gone: slots of records that had their place for a moment within the event.
        orphans: new blocks that nobody could reach when they were placed.
        told: how many of ``touched`` the policy knows of.
        promoted: see ``Committed``.
    """

    __slots__ = ("gone", "orphans", "placed", "promoted", "told", "touched", "worse")

    def __init__(self, *, promoted: bool) -> None:
        self.promoted = promoted
        self.touched: list[tuple[Block, int]] = []
        self.placed: list[Record] = []
        self.worse: dict[Record, Record] = {}
        self.gone: list[int] = []
        self.orphans: list[Block] = []
        self.told = 0


class Placing(Demoting):
    """What of the store concerns commits."""

    def _committed(self, event: Committed) -> list[Instruction]:
        session = self.sessions[event.session]
        namespace = self.namespaces.by_id.get(event.namespace_id)
        access = self._access_number(event.session, event.access)
        if event.used:
            access = min(access, event.used)
        statuses: list[PutStatus] = []
        reasons: list[Reason] = []
        placing = _Placing(promoted=event.promoted)
        left: list[int] = []
        for commit in event.records:
            if event.separate:
                self._access = access = self._access + 1
            record = session.grants.pop(commit.slot, None)
            if record is None:
                status, reason = PutStatus.REJECTED, Reason.BAD_RECORD
            else:
                session.granted_bytes -= record.slot_bytes
                status, reason = self._place(record, commit, namespace, access, placing, left)
                if status is PutStatus.STORED:
                    placing.placed.append(record)
                else:
                    self._to_free(record, commit.key, status.name)
            statuses.append(status)
            reasons.append(reason)
            if event.separate:
                if placing.orphans:
                    self._condemn_orphans(placing)
                if self._over_capacity() and record is not None:
                    # What leaves for a later one was stored all the same.
                    left += self._fit_capacity(placing, [record])
                    self._answer_for_evicted(event, len(statuses) - 1, statuses, reasons)
                placing.orphans.clear()
        self._touch_placed(placing)
        if placing.orphans:
            self._condemn_orphans(placing)
        instructions: list[Instruction] = []
        placed = placing.placed
        if self._over_capacity():
            left += self._fit_capacity(placing, placed)
        if left:
            here = None not in [record.block for record in placed] and all(block.parts for block, _ in placing.touched)
            if not here and not event.separate:
                self._answer_for_evicted(event, 0, statuses, reasons)
            instructions.append(Withdraw(left))
            placed = [record for record in placed if record.state is RecordState.RESIDENT]
        if placing.worse or placing.gone:
            instructions += self._retire_worse(placing)
            placed = [record for record in placed if record not in placing.worse]
        if placed:
            instructions.append(Publish(placed))
        if self.demotes:
            instructions += self._retire_ahead()
        if self.explainer is not None and namespace is not None:
            self.explainer.committed(namespace, event.records, reasons)
        instructions.append(Answer(statuses, reasons))
        return instructions

    def _place(
        self,
        record: Record,
        commit: CommittedRecord,
        namespace: NamespaceState | None,
        access: int,
        placing: _Placing,
        left: list[int],
    ) -> tuple[PutStatus, Reason]:
        """Place one committed record, or say why not. ``left``: gets slots that leave for it."""
        if namespace is None or not namespace.current:
            return PutStatus.REJECTED, Reason.STALE_NAMESPACE
        if commit.namespace_digest != namespace.digest or commit.record_bytes > record.slot_bytes:
            return PutStatus.REJECTED, Reason.BAD_RECORD
        if commit.part >= namespace.parts:
            return PutStatus.REJECTED, Reason.BAD_PART
        if commit.codec not in namespace.codecs:
            return PutStatus.REJECTED, Reason.OTHER_CODEC
        if namespace.exact and commit.fidelity < FIDELITY_EXACT:
            return PutStatus.REJECTED, Reason.NOT_EXACT
        block = namespace.blocks.get(commit.key)
        before: Record | None = None
        if block is not None:
            before = block.parts.get(commit.part)
            if before is not None and commit.fidelity <= before.fidelity:
                placing.touched.append((block, access))
                return PutStatus.EXISTS, Reason.NONE
            if commit.parent_key != block.parent_key:
                placing.touched.append((block, access))
                return PutStatus.REJECTED, Reason.BAD_PARENT
            if block.retired:
                left += self._stay(block, access)
                if not block.parts:
                    block = before = None
        if block is None:
            parent = namespace.blocks.get(commit.parent_key)
            if parent is not None and parent.retired:
                left += self._stay(parent, access)
            if namespace.closes_circle(commit.key, commit.parent_key):
                return PutStatus.REJECTED, Reason.BAD_PARENT
            if namespace.tenant is not None or self.leases.held_bytes:
                refusal = self._no_place(record.slot_bytes, commit, namespace, access, placing, left)
                if refusal is not None:
                    return refusal
            block = Block(namespace, commit.key, commit.parent_key)
            if self._short_of(record.slot_bytes, 1) and (placing.promoted or namespace.reaches(commit.parent_key)):
                left += self._make_way(block, record.slot_bytes, access, placing)
            namespace.adopt(block)
            if self.ssd is not None:
                self.retired.adopted(block)
                self._note_born(block, access)
            self.block_count += 1
            self._settle(record, block, commit)
            self._attach(record)
            self._admit(block, access, placing)
            return PutStatus.STORED, Reason.NONE
        placing.touched.append((block, access))
        if block.leases or namespace.tenant is not None:
            growth = record.slot_bytes - (0 if before is None else before.slot_bytes)
            refusal = self._no_room_to_grow(growth, block, access, placing, left)
            if refusal is not None:
                return refusal
        held_bytes = block.slot_bytes
        self._settle(record, block, commit)
        if before is not None:
            self._displace(before, record, placing)
        self._attach(record)
        self.policy.resized(block, held_bytes)
        return PutStatus.STORED, Reason.NONE

    def _settle(self, record: Record, block: Block, commit: CommittedRecord) -> None:
        """A granted record is its block's from now on."""
        record.block, record.part, record.session = block, commit.part, 0
        record.record_bytes, record.checksum = commit.record_bytes, commit.checksum
        record.codec, record.fidelity = commit.codec, commit.fidelity
        self._change(record, RecordState.RESIDENT, commit.key, "committed")
        self.granted_bytes -= record.slot_bytes
        self.granted_count -= 1
        if record.tenant is not None:
            record.tenant.take_back(record)

    def _make_way(self, block: Block, slot_bytes: int, access: int, placing: _Placing) -> list[int]:
        """Have others leave for a new block that is in no tree yet, but neither its parent nor what was used later.

        Their slots. Nothing leaves for one that nobody can reach.
        """
        if len(placing.touched) > placing.told:
            self._touch_placed(placing)
        parent = block.namespace.blocks.get(block.parent_key)
        if parent is not None:
            # Until it has this child: the last of those that it has may leave.
            parent.leases += 1
        slots: list[int] = []
        records = 1
        for orphan in placing.orphans:
            if orphan.depth >= ORPHAN_DEPTH:
                # Nothing leaves for those either that nobody can reach yet.
                slot_bytes -= orphan.slot_bytes
                records -= len(orphan.parts)
        while self._short_of(slot_bytes, records):
            victim = self.retired.first() if self.ssd is not None else None
            if victim is None:
                victim = self._next_victim(access)
            if victim is None:
                break
            slots += self._evict(victim)
        if parent is not None:
            parent.leases -= 1
            self._released([parent])
        return slots

    def _no_place(
        self,
        slot_bytes: int,
        commit: CommittedRecord,
        namespace: NamespaceState,
        access: int,
        placing: _Placing,
        left: list[int],
    ) -> tuple[PutStatus, Reason] | None:
        """Why a new block gets no place whatever may leave; None where it gets one. ``left``: gets slots that leave."""
        parent = namespace.blocks.get(commit.parent_key)
        if self.leases and commit.key in namespace.orphans:
            more = self.leases.adopting_bytes(namespace.orphans[commit.key], parent, slot_bytes)
            if more and not self.leases.has_room(more):
                # As the parent of leased blocks it could not leave, and what cannot leave has its limit.
                return PutStatus.THROTTLED, Reason.ALL_HELD
        tenant = namespace.tenant
        if tenant is None or not tenant.short_of(slot_bytes):
            return None
        if placing.promoted or namespace.reaches(commit.parent_key):
            self._fit_quota(tenant, slot_bytes, parent, access, placing, left)
        return self._over_quota(tenant) if tenant.short_of(slot_bytes) else None

    def _no_room_to_grow(
        self, growth: int, block: Block, access: int, placing: _Placing, left: list[int]
    ) -> tuple[PutStatus, Reason] | None:
        """Why a block that is there may not get a larger record or another one, as ``_no_place``."""
        if growth <= 0:
            return None
        if block.held and not self.leases.has_room(growth):
            return PutStatus.THROTTLED, Reason.ALL_HELD
        tenant = block.namespace.tenant
        if tenant is None or not tenant.short_of(growth):
            return None
        if block.depth < ORPHAN_DEPTH or placing.promoted:
            self._fit_quota(tenant, growth, block, access, placing, left)
        return self._over_quota(tenant) if tenant.short_of(growth) else None

    def _fit_quota(
        self,
        tenant: Tenant,
        slot_bytes: int,
        stays: Block | None,
        access: int,
        placing: _Placing,
        left: list[int],
    ) -> None:
        """Have a tenant's own blocks leave, as far as may be, until so much more fits into its quota."""
        self._touch_placed(placing)
        if stays is not None:
            stays.leases += 1
        while slot_bytes <= tenant.limit_bytes and tenant.short_of(slot_bytes):
            victim = tenant.first_retired() or self._next_victim(access, tenant)
            if victim is None:
                break
            left += self._evict(victim, Cause.QUOTA)
        if stays is not None:
            stays.leases -= 1
            self._released([stays])

    def _over_quota(self, tenant: Tenant) -> tuple[PutStatus, Reason]:
        tenant.refused_puts += 1
        if tenant.leased_bytes:
            return PutStatus.THROTTLED, Reason.ALL_HELD
        return PutStatus.REJECTED, Reason.QUOTA

    def _admit(self, block: Block, access: int, placing: _Placing) -> None:
        """Tell of a new block, which has its record and its place in the tree."""
        self.policy.insert(block, access)
        if block.depth >= ORPHAN_DEPTH and not placing.promoted:
            placing.orphans.append(block)
            if self.explainer is not None:
                self.explainer.orphaned(block)
        elif block.children:
            for below in descendants(block):
                self.policy.touch(below, 1, access)
        if block.children and self.leases.held_bytes:
            self.leases.adopted(block)
        if block.namespace.retained:
            self._retained_came(block)
        for watcher in self.watchers:
            watcher.stored(block, access, promoted=placing.promoted)

    def _displace(self, before: Record, record: Record, placing: _Placing) -> None:
        """Take a worse record's place away."""
        self._detach(before)
        if before not in placing.placed:
            placing.worse[record] = before
            return
        # It was never published: as if it had not been, but for its slot, which goes with the others.
        placing.placed.remove(before)
        placing.gone.append(before.slot)
        if before in placing.worse:
            placing.worse[record] = placing.worse.pop(before)
        self._to_limbo(before, "replaced", counted=False)

    def _retire_worse(self, placing: _Placing) -> list[Instruction]:
        """Let records go whose place better ones took; a reader finds the old one or the new one, and never nothing."""
        instructions: list[Instruction] = []
        for record, before in placing.worse.items():
            if record.state is RecordState.RESIDENT:
                self.counters.replaced_records += 1
                instructions.append(Replace(before.slot, record))
            placing.gone.append(before.slot)
            self._to_limbo(before, "replaced", counted=False)
        return [*instructions, Withdraw(placing.gone)]

    def _touch_placed(self, placing: _Placing) -> None:
        """Tell the policy which blocks that were there before were put again, unless nobody can reach them."""
        for block, number in placing.touched[placing.told :]:
            if block.parts and block.depth < ORPHAN_DEPTH:
                self._touch(block, 1, number)
        placing.told = len(placing.touched)

    def _fit_capacity(self, placing: _Placing, placed: list[Record]) -> list[int]:
        """Evict until resident records fit; where nothing else may leave, what was just placed must. Their slots."""
        slots: list[int] = []
        self._touch_placed(placing)
        newest_first = reversed(placed)
        while self._over_capacity():
            victim = self._placed_orphan(placing) if placing.orphans else None
            if victim is None and self.ssd is not None:
                victim = self.retired.first()
            if victim is None:
                victim = self._next_victim()
            if victim is not None:
                slots += self._evict(victim)
                continue
            record = next(newest_first)
            block = record.block
            if block is None:
                continue
            before = placing.worse.get(record)
            if before is not None:
                # What was there has its place back where that helps.
                if before.slot_bytes < record.slot_bytes and self.resident_bytes > self.limits.capacity_bytes:
                    del placing.worse[record]
                    held_bytes = block.slot_bytes
                    self._detach(record)
                    self._attach(before)
                    self.policy.resized(block, held_bytes)
                    slots.append(self._to_limbo(record, "no room", counted=False))
            elif len(block.parts) == 1:
                slots += self._evict(block)
            else:
                # Its other parts may be leased, and were there before.
                held_bytes = block.slot_bytes
                self._detach(record)
                self.policy.resized(block, held_bytes)
                slots.append(self._to_limbo(record, "no room", counted=False))
        return slots

    def _condemn_orphans(self, placing: _Placing) -> None:
        """What nobody can reach may have room that is free, and nothing leaves for it."""
        self.policy.condemn([block for block in placing.orphans if block.parts and block.depth >= ORPHAN_DEPTH])

    def _placed_orphan(self, placing: _Placing) -> Block | None:
        """The last new block that nobody can reach: nothing leaves for it, not even others of its kind."""
        for block in reversed(placing.orphans):
            if block.parts and block.depth >= ORPHAN_DEPTH and not block.children and not block.leases:
                return block
        return None

    def _answer_for_evicted(
        self, event: Committed, first: int, statuses: list[PutStatus], reasons: list[Reason]
    ) -> None:
        """What did not stay, although it was placed or had been there before, is no success; from ``first`` on."""
        held = bool(self.leases)
        for index in range(first, len(statuses)):
            commit = event.records[index]
            if statuses[index] not in (PutStatus.STORED, PutStatus.EXISTS):
                continue
            record = self.find(event.namespace_id, commit.key, commit.part)
            if record is None or record.fidelity < commit.fidelity:
                below = self.namespaces.by_id[event.namespace_id].ssd
                if self.ssd is not None and self.ssd.holds(below, commit.key, commit.part, commit.fidelity):
                    continue
                statuses[index] = PutStatus.THROTTLED if held else PutStatus.REJECTED
                reasons[index] = Reason.ALL_HELD if held else Reason.NO_ROOM

    def _displaced(self, event: Displaced) -> list[Instruction]:
        record = self.records[event.slot]
        if record.block is None:
            return []
        others = [other.block for slot in event.others if (other := self.records.get(slot)) and other.block]
        others = [block for block in others if block is not record.block]
        free = [block for block in others if not block.leases]
        # Better one that nothing depends on; better any other, also one that is retained, than the one just put.
        leaves = [block for block in free if not block.children]
        for block in leaves or free or [block for block in others if not block.held]:
            return [Withdraw(self._evict(block)), Publish([record])]
        return [Withdraw(self._evict(record.block))]
