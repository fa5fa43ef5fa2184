"""The store's state machine: every change of the DRAM tier's contents is decided here, without I/O.

``Store.handle(event, now_ns)`` takes one (batched) event and gives the instructions that carry it out, in order.
Reads (``find``, ``leading``) change nothing; that a client read something comes back as an ``Accessed`` event.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from kvstore.core.block import Block, RecordState
from kvstore.core.events import (
    Accessed,
    AdmissionChanged,
    ClearWanted,
    Committed,
    Demoted,
    Displaced,
    Event,
    FoundCorrupt,
    GrantsReturned,
    Hinted,
    InvalidateWanted,
    Joined,
    LeaseReleased,
    LeasesEnded,
    LeaseWanted,
    PersistWanted,
    PolicyChanged,
    PopulationEnded,
    Quiesced,
    RemoveWanted,
    RetainWanted,
    SessionClosed,
    SessionOpened,
    SlabPopulated,
    SlotWanted,
    SsdChanged,
    Ticked,
)
from kvstore.core.granting import Granting
from kvstore.core.instructions import (
    Count,
    EndNamespace,
    Instruction,
    Leased,
    Namespaced,
    Refuse,
    Withdraw,
)
from kvstore.core.journal import Journal
from kvstore.core.namespaces import NamespaceState
from kvstore.core.placing import Placing
from kvstore.core.slabs import SlabAllocator
from kvstore.core.ssd import SsdStore
from kvstore.core.ssd_record import SsdBlock
from kvstore.core.state import SessionState, StoreLimits
from kvstore.core.tenants import Tenant
from kvstore.core.watching import Cause
from kvstore.policy.admission import Admission
from kvstore.policy.base import EvictionPolicy
from kvstore.policy.handover import hand_over
from kvstore.protocol.messages import PutStatus, Reason


class Store(Granting, Placing):
    """The state of the DRAM tier, by events. See ``StoreState`` for its arguments."""

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
        super().__init__(limits, slabs, policy, journal, ssd, admission, tenants)
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
            PolicyChanged: self._policy_changed,
            AdmissionChanged: self._admission_changed,
            RetainWanted: self._retain_wanted,
            Hinted: self._hinted,
        }

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
            self.retention.forget(state)
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
        self.retention.forget(namespace)
        withdrawn = self._withdraw_all(list(namespace.blocks.values()), Cause.INVALIDATED)
        if successor.ssd is not None and self.ssd is not None:
            self.ssd.advance(successor.ssd, generation)
            successor.ssd.state = successor.id
        self.namespaces.note_idle(namespace)
        self._enter(session, successor)
        return [EndNamespace(namespace.id), *withdrawn, Namespaced(successor)]

    def _accessed(self, event: Accessed) -> list[Instruction]:
        number = self._access_number(event.session, event.access)
        if event.missing:
            self.admission.used(event.missing, number)
        for watcher in self.watchers:
            watcher.accessed(event.namespace_id, number, event.runs, event.asked, event.missing)
        if self.explainer is not None:
            self.explainer.reported(event, number)
        for deepest, hits in event.runs:
            if isinstance(deepest, SsdBlock):
                if deepest.parts and self.ssd is not None:
                    self.ssd.touch(deepest, number, hits)
            elif deepest.parts:
                self._touch(deepest, hits, number)
                self._touch_below(deepest, hits, number)
        return []

    def _lease_wanted(self, event: LeaseWanted) -> list[Instruction]:
        blocks = [block for block in event.blocks if block.parts]
        for block in blocks:
            if isinstance(block, Block) and block.retired:
                self._revive(block, self._access)
        if not blocks:
            return [Leased(0)]
        if self.leases.count_of(event.session) >= self.limits.leases_per_session:
            return [Refuse(PutStatus.THROTTLED, Reason.ALL_HELD)]
        taken, count = self.leases.fitting(blocks)
        if not count:
            self.leases.refused += 1
            return [Leased(0)]
        self.leases.cut += count < len(blocks)
        return [Leased(self.leases.take(event.session, taken, self._now_ns + event.duration_ns), count)]

    def _lease_released(self, event: LeaseReleased) -> list[Instruction]:
        freed = self.leases.end(event.lease, event.session)
        self._released(freed or ())
        return [Count(0 if freed is None else 1)]

    def _remove_wanted(self, event: RemoveWanted) -> list[Instruction]:
        namespace = self.namespaces.by_id.get(event.namespace_id)
        if namespace is None:
            return [Count(0)]
        slots, removed = self._remove_keys(namespace, event.keys, Cause.REMOVED)
        return [Withdraw(slots), Count(removed)] if slots else [Count(removed)]

    def _clear_wanted(self, event: ClearWanted) -> list[Instruction]:
        namespace = self.namespaces.by_id.get(event.namespace_id)
        blocks = [] if namespace is None else list(namespace.blocks.values())
        below = 0
        if namespace is not None:
            self.retention.forget(namespace)
            namespace.ended += 1
        if namespace is not None and namespace.ssd is not None and self.ssd is not None:
            below = sum(key not in namespace.blocks for key in namespace.ssd.tree.blocks)
            self.ssd.empty(namespace.ssd)
        return [*self._withdraw_all(blocks, Cause.CLEARED), Count(len(blocks) + below)]

    def _found_corrupt(self, event: FoundCorrupt) -> list[Instruction]:
        record = self.records.get(event.slot)
        if record is None or record.state is not RecordState.RESIDENT or record.block is None:
            return []
        self.counters.corrupt_records += 1
        return [Withdraw(self._unlink(record.block, Cause.CORRUPT, f"corrupt: {event.why}"))]

    def _quiesced(self, event: Quiesced) -> list[Instruction]:
        for slot in event.slots:
            record = self.records[slot]
            self._change(record, RecordState.FREE, b"", "quiesced")
            self.limbo_bytes -= record.slot_bytes
            del self._limbo_since_ns[record.slot_bytes][slot]
            del self.records[slot]
            self.slabs.free(slot)
        return []

    def _policy_changed(self, event: PolicyChanged) -> list[Instruction]:
        """All blocks are handed over, in the order in which they were used; O(n log n)."""
        if event.ssd:
            if self.ssd is not None:
                hand_over(self.ssd.policy, event.policy, self.ssd.blocks())
                self.ssd.policy = event.policy
        else:
            held = [block for state in self.namespaces.by_id.values() for block in state.blocks.values()]
            hand_over(self.policy, event.policy, [block for block in held if not block.retired])
            self.policy = event.policy
        self.counters.switched_policies += 1
        if self.explainer is not None:
            self.explainer.policy_changed()
        return []

    def _admission_changed(self, event: AdmissionChanged) -> list[Instruction]:
        self.admission = event.admission
        return []

    def _ticked(self, event: Ticked) -> list[Instruction]:
        self._released(self.leases.expire(self._now_ns))
        return [*self._end_retentions(), *self._forget_namespaces(), *self._retire_ahead()]
