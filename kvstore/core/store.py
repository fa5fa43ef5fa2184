"""The store's state machine: every change of the DRAM tier's contents is decided here, without I/O.

``Store.handle(event, now_ns)`` takes one (batched) event and gives the instructions that carry it out, in order.
Reads (``find``, ``leading``) change nothing; that a client read something comes back as an ``Accessed`` event.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from kvstore.core.block import TRANSITIONS, Block, Record, RecordState
from kvstore.core.events import (
    Accessed,
    ClearWanted,
    Committed,
    CommittedRecord,
    Demoted,
    Displaced,
    Event,
    FoundCorrupt,
    GrantsReturned,
    InvalidateWanted,
    Joined,
    LeaseReleased,
    LeasesEnded,
    LeaseWanted,
    PersistWanted,
    PopulationEnded,
    Quiesced,
    RemoveWanted,
    SessionClosed,
    SessionOpened,
    SlabPopulated,
    SlotWanted,
    SsdChanged,
    Ticked,
)
from kvstore.core.instructions import (
    Answer,
    Count,
    Demote,
    EndNamespace,
    Grant,
    Instruction,
    Leased,
    Move,
    Namespaced,
    Publish,
    Refuse,
    Replace,
    TryAgain,
    Withdraw,
)
from kvstore.core.journal import Journal
from kvstore.core.leases import Leases
from kvstore.core.namespaces import MOST_RESTORED, Namespaces, NamespaceState
from kvstore.core.retired import Retired
from kvstore.core.slabs import Slab, SlabAllocator
from kvstore.core.ssd import SsdStore
from kvstore.core.ssd_record import SsdBlock, SsdState
from kvstore.core.story import Story
from kvstore.core.tree import ORPHAN_DEPTH, descendants
from kvstore.errors import InvalidTransition
from kvstore.format.constants import FIDELITY_EXACT, PAGE_BYTES
from kvstore.policy.admission import Admission, AdmitAll
from kvstore.policy.base import BEFORE_ALL, EvictionPolicy
from kvstore.protocol.keys import ROOT_KEY
from kvstore.protocol.messages import PutStatus, Reason

ACCESS_IDS: Final = 65_536
"""Engine requests remembered so that their match, gets and puts count as one access a key."""

LIMBO_PATIENCE_NS: Final = 100_000_000
"""How long a slot in limbo is expected to come back by itself; a reader that stopped must not keep others waiting."""

_MOST_SLOT_BYTES: Final = (1 << 32) - PAGE_BYTES
"""An index entry has 32 bits for a record's length."""

RETIRED_AT_ONCE: Final = 64
"""Most blocks that are retired by one event."""

_RESERVE_SHARE: Final = 4
"""What is kept free or clean for puts is at most this part of the capacity."""

EVICTION_BATCH: Final = 64
"""Victims chosen at once when room must be made for a slot size."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreLimits:
    """Hard limits, all in bytes of slots unless named otherwise.

    Attributes:
        capacity_bytes: what resident records may occupy together.
        grant_bytes: what granted slots may occupy together, outside the capacity.
        grant_bytes_per_session: of these, what one client may hold.
        leases_per_session: leases that one client may hold.
        max_records: resident records, for which the index has room.
    """

    capacity_bytes: int
    grant_bytes: int
    grant_bytes_per_session: int
    leases_per_session: int = 4096
    max_records: int = 1 << 62


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


@dataclass(slots=True)
class SessionState:
    """What a client holds."""

    id: int
    grants: dict[int, Record] = field(default_factory=dict)
    granted_bytes: int = 0
    namespaces: set[NamespaceState] = field(default_factory=set)


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


class Store:
    """The state of the DRAM tier.

    Args:
        limits: hard limits.
        slabs: the arena's slots; the store alone allocates from it.
        policy: chooses what leaves.
        journal: is told of each block that becomes complete or stops being so; None where nobody wants to know.
        ssd: the tier below, None where there is none.
        admission: what is written below; None: everything.
    """

    def __init__(
        self,
        limits: StoreLimits,
        slabs: SlabAllocator,
        policy: EvictionPolicy,
        journal: Journal | None = None,
        ssd: SsdStore | None = None,
        admission: Admission | None = None,
    ) -> None:
        self.limits = limits
        self.slabs = slabs
        self.policy = policy
        self.journal = journal
        self.ssd = ssd
        self.admission = admission or AdmitAll()
        self.retired = Retired()
        self.demotes = False
        """Whether what leaves is written below first."""
        self.namespaces = Namespaces()
        self.leases = Leases()
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
        self._reserve_bytes = min(limits.grant_bytes, limits.capacity_bytes // _RESERVE_SHARE)
        if ssd is not None:
            self._access = ssd.access
            ssd.on_evicted = lambda key, used: self.admission.evicted(key, used, self._access)
            for below in ssd.restored_namespaces(MOST_RESTORED):
                self.namespaces.restore(below)
        self._handlers: dict[type, Callable[[Any], list[Instruction]]] = {
            SlabPopulated: self._slab_populated,
            PopulationEnded: self._population_ended,
            SessionOpened: self._session_opened,
            SessionClosed: self._session_closed,
            LeasesEnded: self._leases_ended,
            Joined: self._joined,
            SlotWanted: self._slot_wanted,
            Committed: self._committed,
            GrantsReturned: self._grants_returned,
            Accessed: self._accessed,
            LeaseWanted: self._lease_wanted,
            LeaseReleased: self._lease_released,
            RemoveWanted: self._remove_wanted,
            ClearWanted: self._clear_wanted,
            InvalidateWanted: self._invalidate_wanted,
            Displaced: self._displaced,
            FoundCorrupt: self._found_corrupt,
            Quiesced: self._quiesced,
            Ticked: self._ticked,
            Demoted: self._demoted,
            SsdChanged: self._ssd_changed,
            PersistWanted: self._persist_wanted,
        }

    # -------------------------------------------------------------- reading

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

    # -------------------------------------------------------------- events

    def handle(self, event: Event, now_ns: int) -> list[Instruction]:
        """Take one event; the instructions must be carried out in order.

        Raises:
            InvalidTransition: a bug; the message carries the story of the key.
        """
        self._now_ns = now_ns
        return self._handlers[type(event)](event)

    def _slab_populated(self, event: SlabPopulated) -> list[Instruction]:
        self.slabs.make_usable(event.index)
        return []

    def _population_ended(self, event: PopulationEnded) -> list[Instruction]:
        self.populating = False
        return []

    def _session_opened(self, event: SessionOpened) -> list[Instruction]:
        self.sessions[event.session] = SessionState(event.session)
        return []

    def _leases_ended(self, event: LeasesEnded | SessionClosed) -> list[Instruction]:
        self._released(self.leases.end_session(event.session))
        return []

    def _released(self, blocks: Iterable[Block | SsdBlock]) -> None:
        """The last lease on each of them ended."""
        for block in blocks:
            if isinstance(block, Block):
                self.policy.released(block)
            elif self.ssd is not None:
                self.ssd.policy.released(block)

    def _session_closed(self, event: SessionClosed) -> list[Instruction]:
        session = self.sessions.pop(event.session)
        self._leases_ended(event)
        slots = [self._to_limbo(record, "its client is gone") for record in session.grants.values()]
        for namespace in session.namespaces:
            namespace.members -= 1
            self.namespaces.note_idle(namespace)
        return [*([Withdraw(slots)] if slots else []), *self._forget_namespaces()]

    def _forget_namespaces(self) -> list[Instruction]:
        for below in self.ssd.take_emptied() if self.ssd is not None else ():
            emptied = self.namespaces.by_id.get(below.state)
            if emptied is not None:
                self.namespaces.note_idle(emptied)
        forgotten = self.namespaces.forget_idle()
        for state in forgotten:
            if state.ssd is not None and self.ssd is not None:
                del self.ssd.namespaces[state.ssd.number]
        return [EndNamespace(state.id) for state in forgotten]

    def _enter(self, session: int, namespace: NamespaceState) -> None:
        """A session joins a namespace, in which it may be already."""
        joined = self.sessions[session].namespaces if session else None
        if joined is not None and namespace not in joined:
            joined.add(namespace)
            namespace.members += 1

    def _joined(self, event: Joined) -> list[Instruction]:
        for record_bytes in event.record_bytes:
            self.slabs.declare(record_bytes)
        namespace = self.namespaces.join(event.description)
        if -1 < event.generation < namespace.generation:
            return [Namespaced(namespace, stale=True)]
        if event.generation > namespace.generation:
            return self._advance(namespace, event.generation, event.session)
        self._enter(event.session, namespace)
        return [*self._forget_namespaces(), Namespaced(namespace)]

    def _invalidate_wanted(self, event: InvalidateWanted) -> list[Instruction]:
        namespace = self.namespaces.by_id[event.namespace_id]
        if not namespace.current:
            successor = self.namespaces.current_of(namespace)
            self._enter(event.session, successor)
            return [Namespaced(successor)]
        return self._advance(namespace, namespace.generation + 1, event.session)

    def _advance(self, namespace: NamespaceState, generation: int, session: int) -> list[Instruction]:
        # First what may fail for want of ids: the blocks are not lost for nothing then.
        successor = self.namespaces.advance(namespace, generation)
        withdrawn = self._withdraw_all(list(namespace.blocks.values()))
        if successor.ssd is not None and self.ssd is not None:
            self.ssd.advance(successor.ssd, generation)
            successor.ssd.state = successor.id
        self.namespaces.note_idle(namespace)
        self._enter(session, successor)
        return [EndNamespace(namespace.id), *withdrawn, Namespaced(successor)]

    def _slot_wanted(self, event: SlotWanted) -> list[Instruction]:
        if event.record_bytes > self._max_slot_bytes:
            return [Refuse(PutStatus.REJECTED, Reason.TOO_LARGE)]
        slot_bytes = event.slot_bytes or self.slot_bytes_for(event.record_bytes)
        session = self.sessions[event.session]
        number = None if event.ahead else self._number_of_wanted(event)
        if session.granted_bytes + slot_bytes > self.limits.grant_bytes_per_session:
            return [Refuse(PutStatus.THROTTLED, Reason.GRANT_LIMIT)]
        if self.granted_bytes + slot_bytes > self.limits.grant_bytes:
            return [Refuse(PutStatus.THROTTLED, Reason.GRANT_LIMIT)]
        if self.demotes and not self._has_room(slot_bytes, 1):
            retired = [] if event.ahead else self._retire_ahead(slot_bytes)
            return [*retired, Refuse(PutStatus.THROTTLED, Reason.DEMOTING if self.retired else Reason.ALL_HELD)]
        slot = self.slabs.allocate(slot_bytes)
        if slot is None:
            return (
                [Refuse(PutStatus.THROTTLED, Reason.ALL_HELD)] if event.ahead else self._make_room(slot_bytes, number)
            )
        record = Record(slot, slot_bytes, event.session)
        self.records[slot] = record
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
            parent = None if namespace is None else namespace.blocks.get(parent_key)
            if parent is None:
                below = namespace is not None and namespace.depth_below(parent_key) + 1 < ORPHAN_DEPTH
                return number if below else BEFORE_ALL
            if parent.depth >= ORPHAN_DEPTH:
                return BEFORE_ALL
            if not parent.retired:
                # What leaves is not called back: of a chain longer than the tier that would be all that can leave.
                self.policy.touch(parent, 1, number)
        return number

    def _touch(self, block: Block, hits: int, number: int) -> None:
        """A block, and some above it, were used."""
        if not block.retired:
            self.policy.touch(block, hits, number)
        elif self._has_room(*self.retired.clean_above(block)):
            # Else its room is promised to those that write; it has a copy below, which stays fresh.
            self._revive(block, number)

    def _make_room(self, slot_bytes: int, number: int | None) -> list[Instruction]:
        """Get a slab or a slot of this size: move records together, or evict what was used before an access."""
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
        slots = self._evict_for_slot(slot_bytes, number)
        if slots:
            return [Withdraw(slots), TryAgain()]
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

    def _evict_for_slot(self, slot_bytes: int, number: int | None) -> list[int]:
        """Evict until a slot of this size, or a slab's worth of another size, comes free; the slots."""
        slots: list[int] = []
        missing: dict[int, int] = {}
        for _ in range(EVICTION_BATCH):
            victim = self._victim_for_slot(number)
            if victim is None:
                break
            enough = False
            for record in victim.parts.values():
                size = record.slot_bytes
                if size not in missing:
                    missing[size] = self.slabs.slots_short_of_a_slab(size)
                missing[size] -= 1
                enough = enough or size == slot_bytes or missing[size] == 0
            slots += self._evict(victim)
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

    def _committed(self, event: Committed) -> list[Instruction]:
        session = self.sessions[event.session]
        namespace = self.namespaces.by_id.get(event.namespace_id)
        access = self._access_number(event.session, event.access)
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
                if self._over_capacity() and record is not None:
                    # What leaves for a later one was stored all the same.
                    left += self._fit_capacity(placing, [record])
                    self._answer_for_evicted(event, len(statuses) - 1, statuses, reasons)
                placing.orphans.clear()
        self._touch_placed(placing)
        instructions: list[Instruction] = []
        placed = placing.placed
        if self._over_capacity():
            left += self._fit_capacity(placing, placed)
            if None in [record.block for record in placed] or not all(block.parts for block, _ in placing.touched):
                self._answer_for_evicted(event, 0, statuses, reasons)
        if left:
            instructions.append(Withdraw(left))
            placed = [record for record in placed if record.state is RecordState.RESIDENT]
        if placing.worse or placing.gone:
            instructions += self._retire_worse(placing)
            placed = [record for record in placed if record not in placing.worse]
        if placed:
            instructions.append(Publish(placed))
        if self.demotes:
            instructions += self._retire_ahead()
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
            block = Block(namespace, commit.key, commit.parent_key)
            namespace.adopt(block)
            if self.ssd is not None:
                self.retired.adopted(block)
                self._note_born(block, access)
            self.policy.insert(block, access)
            if block.depth >= ORPHAN_DEPTH and not placing.promoted:
                # Nobody can reach it: it may have room that is free, and nothing leaves for it.
                self.policy.condemn([block])
                placing.orphans.append(block)
            elif block.children:
                for below in descendants(block):
                    self.policy.touch(below, 1, access)
            self.block_count += 1
        else:
            placing.touched.append((block, access))
        record.block, record.part, record.session = block, commit.part, 0
        record.record_bytes, record.checksum = commit.record_bytes, commit.checksum
        record.codec, record.fidelity = commit.codec, commit.fidelity
        self._change(record, RecordState.RESIDENT, commit.key, "committed")
        self.granted_bytes -= record.slot_bytes
        self.granted_count -= 1
        if before is not None:
            self._displace(before, record, placing)
        self._attach(record)
        return PutStatus.STORED, Reason.NONE

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

    def _attach(self, record: Record) -> None:
        """Make a resident record its block's, and count it."""
        block = record.block
        assert block is not None
        block.parts[record.part] = record
        block.slot_bytes += record.slot_bytes
        namespace = block.namespace
        namespace.slot_bytes += record.slot_bytes
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
        namespace = block.namespace
        namespace.slot_bytes -= record.slot_bytes
        if record.fidelity < FIDELITY_EXACT:
            namespace.lossy_records -= 1
        self._count_resident(record, -1)
        if self.journal is not None:
            self.journal.note(block)

    def _count_resident(self, record: Record, by: int = 1) -> None:
        self.resident_bytes += by * record.slot_bytes
        self.resident_record_bytes += by * record.record_bytes
        self.record_count += by

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

    def _over_capacity(self) -> bool:
        return self.resident_bytes > self.limits.capacity_bytes or self.record_count > self.limits.max_records

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
                    self._detach(record)
                    self._attach(before)
                    slots.append(self._to_limbo(record, "no room", counted=False))
            elif len(block.parts) == 1:
                slots += self._evict(block)
            else:
                # Its other parts may be leased, and were there before.
                self._detach(record)
                slots.append(self._to_limbo(record, "no room", counted=False))
        return slots

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

    def _grants_returned(self, event: GrantsReturned) -> list[Instruction]:
        session = self.sessions[event.session]
        for slot in event.slots:
            record = session.grants.pop(slot, None)
            if record is not None:
                session.granted_bytes -= record.slot_bytes
                self._to_free(record, b"", "returned")
        return []

    def _accessed(self, event: Accessed) -> list[Instruction]:
        number = self._access_number(event.session, event.access)
        if event.missing:
            self.admission.used(event.missing, number)
        for deepest, hits in event.runs:
            if isinstance(deepest, SsdBlock):
                if deepest.parts and self.ssd is not None:
                    self.ssd.touch(deepest, number)
            elif deepest.parts:
                self._touch(deepest, hits, number)
                self._touch_below(deepest, hits, number)
        return []

    def _touch_below(self, deepest: Block, hits: int, number: int) -> None:
        """What was used in DRAM stays as fresh on the SSD: the deepest block of it that has a copy there."""
        below = deepest.namespace.ssd
        if self.ssd is None or below is None or not below.tree.blocks:
            return
        block: Block | None = deepest
        for _ in range(hits):
            assert block is not None
            copy = below.tree.blocks.get(block.key)
            if copy is None and block.parent is None:
                copy = below.tree.blocks.get(block.parent_key)
                block = None
            if copy is not None:
                self.ssd.touch(copy, number)
                return
            if block is None:
                return
            block = block.parent

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

    def _lease_wanted(self, event: LeaseWanted) -> list[Instruction]:
        blocks = [block for block in event.blocks if block.parts]
        for block in blocks:
            if isinstance(block, Block) and block.retired:
                self._revive(block, self._access)
        if not blocks:
            return [Leased(0)]
        if self.leases.count_of(event.session) >= self.limits.leases_per_session:
            return [Refuse(PutStatus.THROTTLED, Reason.ALL_HELD)]
        return [Leased(self.leases.take(event.session, blocks, self._now_ns + event.duration_ns))]

    def _lease_released(self, event: LeaseReleased) -> list[Instruction]:
        freed = self.leases.end(event.lease, event.session)
        self._released(freed or ())
        return [Count(0 if freed is None else 1)]

    def _remove_wanted(self, event: RemoveWanted) -> list[Instruction]:
        namespace = self.namespaces.by_id.get(event.namespace_id)
        if namespace is None:
            return [Count(0)]
        slots: list[int] = []
        orphaned: list[Block] = []
        removed = 0
        for key in event.keys:
            below = self.ssd is not None and namespace.ssd is not None and self.ssd.remove_key(namespace.ssd, key)
            block = namespace.blocks.get(key)
            if block is not None:
                orphaned += block.children or ()
                slots += self._unlink(block, "removed")
            elif below:
                orphaned += namespace.orphans.get(key, ())
            removed += block is not None or below
        # Only now, because some of them were removed as well: a whole chain costs no more than its length.
        # What is retired is nobody's child, and no policy's.
        stay = [block for block in orphaned if block.parts and not block.retired]
        condemned = [below for block in stay for below in (block, *descendants(block))]
        if condemned:
            self.policy.condemn(sorted(condemned, key=lambda block: block.depth))
        self.counters.removed_blocks += removed
        return [Withdraw(slots), Count(removed)] if slots else [Count(removed)]

    def _clear_wanted(self, event: ClearWanted) -> list[Instruction]:
        namespace = self.namespaces.by_id.get(event.namespace_id)
        blocks = [] if namespace is None else list(namespace.blocks.values())
        below = 0
        if namespace is not None and namespace.ssd is not None and self.ssd is not None:
            below = sum(key not in namespace.blocks for key in namespace.ssd.tree.blocks)
            self.ssd.empty(namespace.ssd)
        return [*self._withdraw_all(blocks), Count(len(blocks) + below)]

    def _displaced(self, event: Displaced) -> list[Instruction]:
        record = self.records[event.slot]
        if record.block is None:
            return []
        others = [other.block for slot in event.others if (other := self.records.get(slot)) and other.block]
        free = [block for block in others if block is not record.block and not block.leases]
        # Better one that nothing depends on; better any other than the one that was just put.
        leaves = [block for block in free if not block.children]
        for block in leaves or free:
            return [Withdraw(self._evict(block)), Publish([record])]
        return [Withdraw(self._evict(record.block))]

    def _found_corrupt(self, event: FoundCorrupt) -> list[Instruction]:
        record = self.records.get(event.slot)
        if record is None or record.state is not RecordState.RESIDENT or record.block is None:
            return []
        self.counters.corrupt_records += 1
        return [Withdraw(self._unlink(record.block, f"corrupt: {event.why}"))]

    def _quiesced(self, event: Quiesced) -> list[Instruction]:
        for slot in event.slots:
            record = self.records[slot]
            self._change(record, RecordState.FREE, b"", "quiesced")
            self.limbo_bytes -= record.slot_bytes
            del self._limbo_since_ns[record.slot_bytes][slot]
            del self.records[slot]
            self.slabs.free(slot)
        return []

    def _ticked(self, event: Ticked) -> list[Instruction]:
        self._released(self.leases.expire(self._now_ns))
        return [*self._forget_namespaces(), *self._retire_ahead()]

    # -------------------------------------------------------------- changes of state

    def _next_victim(self, before: int | None = None) -> Block | None:
        victim = self.policy.next_victim(before)
        assert victim is None or isinstance(victim, Block)
        return victim

    def _evict(self, block: Block) -> list[int]:
        """Its slots, to be withdrawn."""
        self.counters.evicted_blocks += 1
        self.counters.evicted_bytes += block.slot_bytes
        if self.ssd is None:
            return self._unlink(block, "evicted")
        on_its_way = block.retired and not self.retired.is_clean(block)
        if not on_its_way and self.missing_below(block):
            self.counters.dropped_blocks += 1
        slots = self._unlink(block, "evicted")
        # What is being written goes on to be.
        block.retired = on_its_way
        return slots

    # -------------------------------------------------------------- the tier below

    def _has_room(self, slot_bytes: int, records: int) -> bool:
        """Whether all that is granted, and so much more, can be committed before something is written below."""
        retired, limits = self.retired, self.limits
        room = limits.capacity_bytes - self.resident_bytes + retired.clean_bytes
        if self.granted_bytes + slot_bytes > room:
            return False
        return self.granted_count + records <= limits.max_records - self.record_count + retired.clean_records

    def _victim_for_slot(self, number: int | None) -> Block | None:
        """The block that leaves next for a slot: of those that were retired, or where nothing is demoted any."""
        first = self.retired.first()
        if first is None:
            return None if self.demotes else self._next_victim(number)
        return first if self.retired.is_clean(first) else None

    def missing_below(self, block: Block) -> list[Record]:
        """Records of a block of which the SSD has none that is as good."""
        namespace = block.namespace
        assert self.ssd is not None
        return [
            record
            for part, record in block.parts.items()
            if not self.ssd.holds(namespace.ssd, block.key, part, record.fidelity)
        ]

    def _retire_ahead(self, wanted_bytes: int = 0) -> list[Instruction]:
        """Have what leaves next written below before its room is needed."""
        if not self.demotes:
            return []
        reserve = max(self._reserve_bytes, self.granted_bytes + wanted_bytes)
        short = reserve - (self.limits.capacity_bytes - self.resident_bytes + self.retired.slot_bytes)
        records_left = self.limits.max_records - self.record_count + self.retired.records
        wanted = max(min(RETIRED_AT_ONCE, self.limits.max_records // _RESERVE_SHARE), self.granted_count + 1)
        if short <= 0 and records_left >= wanted:
            return []
        return self._retire(max(short, 0), max(wanted - records_left, 0))

    def _retire(self, slot_bytes: int, records: int = 0) -> list[Instruction]:
        """Retire blocks with so many bytes and records, or as many as there may be at once."""
        assert self.ssd is not None
        bytes_aim, records_aim = self.retired.slot_bytes + slot_bytes, self.retired.records + records
        demote: list[Record] = []
        accesses: list[int] = []
        for _ in range(RETIRED_AT_ONCE):
            enough = self.retired.slot_bytes >= bytes_aim and self.retired.records >= records_aim
            block = None if enough else self._next_victim()
            if block is None:
                break
            access = self.policy.used(block)
            self.policy.discard(block)
            # Nobody can reach an orphan: it is not worth writing.
            missing = self.missing_below(block) if block.depth < ORPHAN_DEPTH else []
            if missing and not self.admission.admits(block, self._access, scarce=self.ssd.scarce):
                self.counters.not_admitted_blocks += 1
                missing = []
            self.retired.add(block, {record.part for record in missing})
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

    def _stay(self, block: Block, number: int) -> list[int]:
        """Have a retired block stay, with what goes on behind it; slots of what leaves instead.

        Where the room of those above is promised to others, the first that has a copy below leaves, be it that block.
        """
        slots: list[int] = []
        if not self._has_room(*self.retired.clean_above(block)):
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
            at = key
            while at not in seen:
                seen.add(at)
                block = namespace.blocks.get(at)
                below = None if namespace.ssd is None else namespace.ssd.tree.blocks.get(at)
                if block is not None:
                    path.append(block)
                    at = block.parent_key
                elif below is not None:
                    # Of a chain that goes through memory its beginning may be there only, and its middle below only.
                    at = below.parent_key
            # The first blocks of a chain first: what comes behind is of no use without them.
            for above in reversed(path):
                records += self.missing_below(above)
        return [Demote(records, [self._access] * len(records))] if records else []

    def _withdraw_all(self, blocks: list[Block]) -> list[Instruction]:
        slots = [slot for block in blocks for slot in self._unlink(block, "cleared")]
        self.counters.removed_blocks += len(blocks)
        if self.journal is not None and not self.block_count:
            self.journal.emptied()
        return [Withdraw(slots)] if slots else []

    def _unlink(self, block: Block, cause: str) -> list[int]:
        """Take a block out of the tree and the policy, its records into limbo; their slots."""
        if block.retired:
            self.retired.take(block)
        else:
            self.policy.discard(block)
        if self.ssd is not None:
            self.retired.part_from(block)
        namespace = block.namespace
        namespace.remove(block)
        if not namespace.blocks:
            self.namespaces.note_idle(namespace)
        namespace.slot_bytes -= block.slot_bytes
        self.block_count -= 1
        if namespace.lossy_records:
            namespace.lossy_records -= sum(record.fidelity < FIDELITY_EXACT for record in block.parts.values())
        slots = [self._to_limbo(record, cause) for record in block.parts.values()]
        block.parts = {}
        block.slot_bytes = 0
        if self.journal is not None:
            self.journal.note(block)
        return slots

    def _to_limbo(self, record: Record, cause: str, *, counted: bool = True) -> int:
        """Its slot, to be withdrawn. ``counted``: its bytes are, as those of a grant or of a resident record."""
        if record.state is RecordState.GRANTED:
            self.granted_bytes -= record.slot_bytes
            self.granted_count -= 1
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
