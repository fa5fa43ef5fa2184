"""The store against a plain-dict model, under any order of events, with the invariants checked after each.

Covers: statuses, hits, bytes of every slot, order of eviction, limits, leaks, and that exactly the resident records are
published. The fake arena notices a slot that is used while it is read, or moved without its bytes; the fake index one
that is published too early, twice, or for a namespace that is over, and in some runs it is too small for the tier.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import pytest
from fakes.memory_executor import MemoryExecutor, spread
from fakes.retention_model import FOREVER, RetentionModel
from fakes.store_model import Identity, ModelBlock, ModelNamespace, StoreModel
from fakes.told_index import ToldIndex
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from kvstore.core.block import Record, RecordState, runs_of
from kvstore.core.events import (
    Accessed,
    ClearWanted,
    Committed,
    CommittedRecord,
    Displaced,
    Event,
    FoundCorrupt,
    GrantsReturned,
    InvalidateWanted,
    Joined,
    LeaseReleased,
    LeasesEnded,
    LeaseWanted,
    PopulationEnded,
    RemoveWanted,
    RetainWanted,
    SessionClosed,
    SessionOpened,
    SlabPopulated,
    Ticked,
)
from kvstore.core.instructions import (
    Answer,
    Count,
    Instruction,
    Leased,
    Move,
    Namespaced,
    Publish,
    Refuse,
    Retained,
    Withdraw,
)
from kvstore.core.invariants import validate_state
from kvstore.core.journal import Journal
from kvstore.core.pools import pooled
from kvstore.core.slabs import SlabAllocator
from kvstore.core.state import StoreLimits
from kvstore.core.store import Store
from kvstore.core.tenants import tenants_of
from kvstore.core.tree import ORPHAN_DEPTH
from kvstore.policy.base import PolicyContext
from kvstore.policy.lru import Lru
from kvstore.protocol.keys import ROOT_KEY
from kvstore.protocol.messages import PutStatus, Reason
from kvstore.protocol.namespace import Namespace

PAGE_BYTES = 4096
DESCRIPTIONS = (
    Namespace(name="whole"),
    Namespace(name="halves", parts=2, codec="kivi4"),
    Namespace(name="exact", codec="lossless", fidelity="exact"),
)
LEASES_PER_SESSION = 3
KEYS = [bytes([number]) * 32 for number in range(1, 31)]
SESSIONS = st.integers(0, 3)
"""A session by its place among those that are open."""
KEY_INDEXES = st.integers(0, 7) | st.integers(0, len(KEYS) - 1)
SPACES = st.integers(0, 9)
"""A namespace by its place; the last two places may be of one that was invalidated."""
SIZES = st.sampled_from([1, 1, 1, 1, 1, 2, 2, 3, 4, 8, 17, 19])
"""Record sizes in pages; those above 16 pages get geometric classes where slabs are large enough."""
FIDELITIES = st.lists(st.sampled_from([34, 85, 85, 178, 255]), min_size=1, max_size=3)
"""Effective fidelities that the records of a put have in turn."""
CODECS = st.sampled_from([1, 1, 1, 1, 1, 2, 7, 8])
RARELY = st.sampled_from([False, False, False, True])
"""Whether to do what leaves little behind."""


def natural_parent(index: int) -> bytes:
    """The tree that well-behaved clients put: a trunk with a branch every fifth key."""
    if index == 0:
        return ROOT_KEY
    return KEYS[index // 2] if index % 5 == 0 else KEYS[index - 1]


def natural_chain(index: int) -> list[int]:
    """Key indexes from the trunk's root to ``index``."""
    chain = [index]
    while chain[0]:
        chain.insert(0, KEYS.index(natural_parent(chain[0])))
    return chain


@dataclass(frozen=True)
class Arena:
    """Sizes of one run, in pages.

    ``records``: most at a time; ``buckets``: of two entries each, 0 for any number; ``quotas``: of namespaces by name;
    ``leases``, ``retained``: what may be held together.
    """

    slab_pages: int
    slabs: int
    capacity: int
    grants: int
    session_grants: float
    records: int = 1 << 62
    buckets: int = 0
    quotas: tuple[tuple[str, int], ...] = ()
    leases: int = 1 << 40
    retained: int = 1 << 40


ARENAS = st.sampled_from(
    [
        Arena(slab_pages=8, slabs=6, capacity=32, grants=16, session_grants=12),
        Arena(slab_pages=8, slabs=9, capacity=64, grants=8, session_grants=8),
        Arena(slab_pages=4, slabs=4, capacity=10, grants=6, session_grants=6),
        Arena(slab_pages=40, slabs=4, capacity=120, grants=40, session_grants=40),
        Arena(slab_pages=40, slabs=4, capacity=130, grants=30, session_grants=18.5),
        Arena(slab_pages=8, slabs=9, capacity=64, grants=8, session_grants=8, records=20),
        Arena(slab_pages=8, slabs=9, capacity=64, grants=8, session_grants=8, buckets=12),
        Arena(slab_pages=4, slabs=4, capacity=10, grants=6, session_grants=6, records=7, buckets=5),
        Arena(8, 9, 64, 8, 8, quotas=(("whole", 16), ("halves", 9)), leases=32, retained=16),
        Arena(4, 4, 10, 6, 6, quotas=(("whole", 4),), leases=5, retained=3),
        Arena(40, 4, 120, 40, 40, records=30, quotas=(("whole", 60), ("exact", 20)), leases=60, retained=30),
        Arena(8, 6, 32, 16, 12, buckets=12, leases=16, retained=8),
    ]
)


class StoreMachine(RuleBasedStateMachine):
    """Clients that do what they should, and all that they should not."""

    @initialize(
        arena=ARENAS,
        quiesce_at_once=st.sampled_from([True, True, False]),
        populated=st.sampled_from([True, True, True, False]),
    )
    def start(self, arena: Arena, quiesce_at_once: bool, populated: bool) -> None:
        self.arena = arena
        self.limits = StoreLimits(
            capacity_bytes=arena.capacity * PAGE_BYTES,
            grant_bytes=arena.grants * PAGE_BYTES,
            grant_bytes_per_session=int(arena.session_grants * PAGE_BYTES),
            leases_per_session=LEASES_PER_SESSION,
            max_records=arena.records,
            lease_bytes=arena.leases * PAGE_BYTES,
            retention_bytes=arena.retained * PAGE_BYTES,
        )
        slabs = SlabAllocator(arena.slabs, arena.slab_pages * PAGE_BYTES, 512)
        self.quotas = {name: pages * PAGE_BYTES for name, pages in arena.quotas}
        tenants = tenants_of(self.quotas).values()
        policy = pooled(Lru, PolicyContext(self.limits.capacity_bytes, lambda: 0), tenants)
        self.store = Store(self.limits, slabs, policy, Journal(), tenants=tenants)
        self.kept = RetentionModel(
            self.limits.retention_bytes, self.limits.capacity_bytes, self.quotas, self._is_still_retained
        )
        self.granted_for: dict[int, str] = {}
        self.told = ToldIndex()
        places = spread(arena.buckets) if arena.buckets else None
        self.executor = MemoryExecutor(self.store, now_ns=1, quiesce_at_once=quiesce_at_once, places=places)
        self.model = StoreModel()
        self.slot_bytes: dict[int, int] = {}
        self.displaced: list[ModelBlock] = []
        self.orphans: list[ModelBlock] = []
        self.current: dict[str, int] = {}
        self.serial = 0
        self.next_session = 100
        self.apply(SlabPopulated(0))
        if populated:
            self.population_step(arena.slabs)
        self.open_session()
        for description in range(len(DESCRIPTIONS)):
            self.join(description, [], 0)
        if populated:
            # Full at once: what happens at the limits is what matters.
            self.engine_requests(0, 0, [(29, 1), (24, 2)])
            self.engine_requests(0, 1, [(7, 1)])

    # ------------------------------------------------------------ carrying out and comparing

    def apply(self, event: Event) -> Instruction | None:
        return self.executor.apply(event)

    def _is_still_retained(self, block: ModelBlock) -> bool:
        for state in self.store.namespaces.by_id.values():
            found = state.retained.get(block.key)
            if found is not None and found.holds and state.description.name == block.space:
                return True
        return False

    def _sizes(self) -> dict[ModelBlock, int]:
        return self.model.bytes_of(self.slot_bytes)

    def _keep_budget(self, tenant: str | None) -> None:
        self.kept.keep_budget([block for _, block in self.model.blocks()], tenant, self._sizes())

    def _used_bytes(self, tenant: str) -> int:
        return sum(size for block, size in self._sizes().items() if block.tenant == tenant)

    def _quota_short(self, tenant: str | None, slot_bytes: int) -> bool:
        return tenant is not None and self._used_bytes(tenant) + slot_bytes > self.quotas[tenant]

    def _lent_to(self, tenant: str | None) -> int:
        """Bytes of slots that were lent for blocks of a tenant."""
        granted = {slot: size for held in self.model.grants.values() for slot, size in held.items()}
        return sum(size for slot, size in granted.items() if self.granted_for.get(slot) == tenant)

    def evictions(
        self,
        placed: list[ModelBlock] | None = None,
        before: int | None = None,
        tenant: str | None = None,
        slot_bytes: int = 0,
    ) -> None:
        """Take out of the model what the last event evicted, checking that each victim was the right one.

        Args:
            placed: the event was a commit, of these blocks.
            before: a slot was wanted for a block of this access.
            tenant: whose block it was; while it is at its limit only its own blocks leave.
            slot_bytes: of that slot.
        """
        left: list[int] = []
        displaced: Displaced | None = None
        for instruction in self.executor.last:
            if isinstance(instruction, Displaced):
                displaced = instruction
            elif isinstance(instruction, Move):
                self.model.slots[instruction.target] = self.model.slots.pop(instruction.source)
                self.slot_bytes[instruction.target] = instruction.slot_bytes
            elif isinstance(instruction, Withdraw) and displaced is not None:
                self._displaced(displaced, instruction.slots)
                displaced = None
            elif isinstance(instruction, Withdraw):
                for slot in instruction.slots:
                    if slot in self.model.slots:
                        namespace_id, block, _ = self.model.slots[slot]
                        left = [each for each, held in self.model.slots.items() if held[1] is block]
                        wanted = self._lent_to(tenant) + slot_bytes if slot_bytes else 0
                        full = tenant if slot_bytes and self._quota_short(tenant, wanted) else None
                        left = left if self._evicted(slot, namespace_id, block, placed, before, full) else [slot]
            elif isinstance(instruction, (Publish, Answer)) and placed is not None and left:
                # Before the last of them left there was one too many, or too much: nothing leaves without need.
                held_bytes = sum(map(self.slot_bytes.__getitem__, self.model.slots))
                left_bytes = sum(map(self.slot_bytes.__getitem__, left))
                too_much = held_bytes + left_bytes > self.limits.capacity_bytes
                assert too_much or len(self.model.slots) + len(left) > self.limits.max_records
                left = []
        assert displaced is None, f"{displaced} was not answered"

    def _short(self, slot_bytes: int, records: int) -> bool:
        held_bytes = sum(map(self.slot_bytes.__getitem__, self.model.slots))
        if held_bytes + slot_bytes > self.limits.capacity_bytes:
            return True
        return len(self.model.slots) + records > self.limits.max_records

    def _evicted(
        self,
        slot: int,
        namespace_id: int,
        block: ModelBlock,
        placed: list[ModelBlock] | None,
        before: int | None,
        tenant: str | None = None,
    ) -> bool:
        """Whether all of the block left."""
        orphans = [block for block in self.orphans if self.model.is_orphan(block)] if placed is not None else []
        legal = orphans[-1:] or self.model.victims(before, tenant)
        if legal or placed is None:
            assert any(block is victim for victim in legal), f"{block} was evicted, expected was one of {legal}"
            self.model.leave(namespace_id, block)
            return True
        # Nothing may leave: then what was just placed must, and no more than that.
        assert any(block is other for other in placed), f"{block} was evicted although nothing may be"
        stays = slot in self.model.replaced or len(block.parts) > 1
        assert stays or not block.leases, f"{block} was evicted for room although it is leased"
        if slot in self.model.replaced:
            before = self.model.replaced[slot][0]
            assert self.slot_bytes[before] < self.slot_bytes[slot], f"{block} was put back where that gains nothing"
        self.model.take_back(slot)
        return False

    def _displaced(self, event: Displaced, slots: list[int]) -> None:
        """A block left so that another has a place in the index: one of those in its way, or else itself."""
        own = self.model.slots[event.slot][1]
        others = [self.model.slots[slot][1] for slot in event.others if slot in self.model.slots]
        # What is before a leased block stays with it.
        others = [block for block in others if block is not own and not block.is_held]
        free = [block for block in others if not block.is_retained]
        legal = [block for block in free if not block.children] or free or others or [own]
        namespace_id, block, _ = self.model.slots[slots[0]]
        assert any(block is other for other in legal), f"{block} left for {own}, expected was one of {legal}"
        assert set(slots) == {slot for slot, held in self.model.slots.items() if held[1] is block}
        self.displaced.append(block)
        self.model.leave(namespace_id, block)

    def pick_session(self, place: int) -> int:
        sessions = list(self.model.grants)
        return sessions[place % len(sessions)]

    def space(self, place: int) -> ModelNamespace:
        spaces = [space for space in self.model.namespaces.values() if space.current or place >= 8]
        return spaces[place % len(spaces)]

    # ------------------------------------------------------------ population

    @precondition(lambda self: self.store.populating)
    @rule(steps=st.integers(1, 3))
    def population_step(self, steps: int) -> None:
        for _ in range(steps):
            index = self.store.slabs.usable_slabs
            if index == self.arena.slabs:
                self.apply(PopulationEnded())
                return
            self.apply(SlabPopulated(index))

    @precondition(lambda self: self.store.populating)
    @rule(really=RARELY)
    def population_ended_early(self, really: bool) -> None:
        if really:
            self.apply(PopulationEnded())

    # ------------------------------------------------------------ sessions

    @precondition(lambda self: len(self.model.grants) < 4)
    @rule()
    def open_session(self) -> None:
        self.next_session += 1
        self.apply(SessionOpened(self.next_session))
        self.model.grants[self.next_session] = {}

    @precondition(lambda self: len(self.model.grants) > 1)
    @rule(place=SESSIONS, really=RARELY)
    def close_session(self, place: int, really: bool) -> None:
        if not really:
            return
        session = self.pick_session(place)
        self.apply(SessionClosed(session))
        del self.model.grants[session]
        self._leases_ended(session)

    @rule(place=SESSIONS, really=RARELY)
    def end_leases(self, place: int, really: bool) -> None:
        """A client is going that may still write into what it was lent."""
        if really:
            session = self.pick_session(place)
            self.apply(LeasesEnded(session))
            self._leases_ended(session)

    def _leases_ended(self, session: int) -> None:
        for identity, lease in list(self.model.leases.items()):
            if lease.session == session:
                self.model.end_lease(identity)

    @rule(
        description=st.integers(0, len(DESCRIPTIONS) - 1),
        pages=st.lists(st.integers(1, 19), max_size=2),
        ahead=st.sampled_from([-2, -1, 0, 0, 0, 0, 1, 2]),
        place=SESSIONS,
    )
    def join(self, description: int, pages: list[int], ahead: int, place: int = 0) -> None:
        """Join in the current generation (``ahead`` 0), an old one, or a later one that another daemon was in."""
        name = DESCRIPTIONS[description].name
        now = self.model.namespaces.get(self.current.get(name, 0))
        generation = -1 if now is None or not ahead else max(now.generation + ahead, 0)
        record_bytes = tuple(PAGE_BYTES * count - 5 for count in pages)
        answer = self.apply(Joined(DESCRIPTIONS[description], record_bytes, generation, self.pick_session(place)))
        assert isinstance(answer, Namespaced)
        assert answer.stale == (now is not None and -1 < generation < now.generation)
        if now is not None and generation <= now.generation:
            assert answer.namespace.id == now.id
        else:
            self._advanced(DESCRIPTIONS[description], now, answer, max(generation, 0))

    def _advanced(
        self, description: Namespace, before: ModelNamespace | None, answer: Namespaced, generation: int
    ) -> None:
        state = answer.namespace
        assert state.generation == generation
        assert state.id not in self.model.namespaces, "a namespace id is used twice"
        assert state.digest == description.digest(generation)
        if before is not None:
            before.current = False
            for block in list(before.blocks.values()):
                self.model.leave(before.id, block)
        codecs = {"raw": {1}, "lossless": {1, 2, 3}, "kivi4": {1, 2, 3, 4, 5, 7}}[description.codec]
        exact = description.fidelity == "exact"
        tenant = description.name if description.name in self.quotas else None
        self.model.namespaces[state.id] = ModelNamespace(
            state.id, description.parts, state.digest, generation, frozenset(codecs), exact, tenant, description.name
        )
        self.current[description.name] = state.id

    @precondition(lambda self: len(self.model.namespaces) < 8)
    @rule(namespace=SPACES, really=RARELY)
    def invalidate(self, namespace: int, really: bool) -> None:
        if not really:
            return
        space = self.space(namespace)
        description = self.store.namespaces.by_id[space.id].description
        answer = self.apply(InvalidateWanted(space.id))
        assert isinstance(answer, Namespaced)
        if space.current:
            self._advanced(description, space, answer, space.generation + 1)
        else:
            assert answer.namespace.id == self.current[description.name]

    # ------------------------------------------------------------ writing

    @rule(
        place=SESSIONS,
        pages=SIZES,
        short=st.integers(0, PAGE_BYTES - 1),
        access=st.integers(0, 3),
        namespace=SPACES,
        parent=st.sampled_from([b"", b"", ROOT_KEY, *KEYS[:8]]),
    )
    def reserve(self, place: int, pages: int, short: int, access: int, namespace: int, parent: bytes) -> None:
        """A slot for whatever, or for a block of some request behind some block."""
        session = self.pick_session(place)
        self._reserve(session, pages * PAGE_BYTES - short, access, self.space(namespace).id, parent)

    def _reserve(
        self, session: int, record_bytes: int, access: int = 0, namespace_id: int = 0, parent_key: bytes = b""
    ) -> Record | None:
        before = sum(sum(held.values()) for held in self.model.grants.values())
        held_up = self.executor.pinned or self.executor.waiting or not self.executor.quiesce_at_once
        quiet = not (before or held_up or self.model.leases or self.store.populating)
        granted = self.executor.want_slot(session, record_bytes, access, namespace_id, parent_key)
        number = None
        if granted != Refuse(PutStatus.REJECTED, Reason.TOO_LARGE):
            number = self.model.wanted(session, access, namespace_id, parent_key)
        space = self.model.namespaces.get(namespace_id)
        tenant = None if space is None else space.tenant
        slot_bytes = self.store.slot_bytes_for(record_bytes)
        self.evictions(before=number, tenant=tenant, slot_bytes=slot_bytes)
        held = self.model.grants[session]
        fits = record_bytes <= self.store.max_record_bytes
        if isinstance(granted, Record):
            assert record_bytes <= granted.slot_bytes
            assert granted.slot_bytes - record_bytes < max(PAGE_BYTES, granted.slot_bytes // 8 + PAGE_BYTES)
            assert granted.session == session
            assert all(granted.slot not in other for other in self.model.grants.values())
            held[granted.slot] = self.slot_bytes[granted.slot] = granted.slot_bytes
            if tenant is not None:
                self.granted_for[granted.slot] = tenant
            return granted
        if tenant is not None and granted.reason is not Reason.TOO_LARGE:
            full = self._quota_short(tenant, self._lent_to(tenant) + slot_bytes)
            leased = any(block.is_held for _, block in self.model.blocks() if block.tenant == tenant)
            if granted.reason is Reason.QUOTA:
                assert granted.status is PutStatus.REJECTED
                assert slot_bytes > self.quotas[tenant] or (full and not leased and not self._lent_to(tenant))
                assert slot_bytes > self.quotas[tenant] or not self.model.victims(number, tenant)
                return None
            if full:
                quiet = False
        if granted.reason is Reason.TOO_LARGE:
            assert granted.status is PutStatus.REJECTED
            assert not fits
            return None
        assert fits
        if granted.reason is Reason.NO_ROOM:
            assert granted.status is PutStatus.REJECTED
            assert not self.store.limbo_bytes
            assert not self.model.leases
            assert self.model.victims()
            assert not self.model.victims(number), f"{granted} for {number} although one may go"
            return None
        assert granted.status is PutStatus.THROTTLED
        if granted.reason is Reason.POPULATING:
            assert self.store.populating
        elif granted.reason is Reason.ALL_HELD:
            assert self.store.limbo_bytes or self.model.leases
        elif granted.reason is Reason.MEMORY_LIMIT:
            assert self.store.slabs.usable_slabs < self.arena.slabs
        else:
            assert granted.reason is Reason.GRANT_LIMIT
            assert before
        # Nothing in the way: no grants, no limbo, no leases. Then any record that fits must get a slot.
        assert not quiet, f"{granted} although nothing is held"
        return None

    @rule(place=SESSIONS, pages=SIZES, short=st.integers(0, PAGE_BYTES - 1), count=st.integers(1, 3))
    def reserve_ahead(self, place: int, pages: int, short: int, count: int) -> None:
        """Slots for later, as mapped clients are lent them: they cost nobody anything (the executor sees to that)."""
        session, record_bytes = self.pick_session(place), pages * PAGE_BYTES - short
        for _ in range(count):
            granted = self.executor.want_slot_ahead(session, record_bytes)
            if isinstance(granted, Refuse):
                assert (granted.reason is Reason.TOO_LARGE) == (record_bytes > self.store.max_record_bytes)
                assert granted.reason in (Reason.TOO_LARGE, Reason.GRANT_LIMIT, Reason.ALL_HELD)
                if granted.reason is Reason.ALL_HELD:
                    # What would make room is not done, so there really is none.
                    assert self.store.slabs.allocate(self.store.slot_bytes_for(record_bytes)) is None
                return
            assert record_bytes <= granted.slot_bytes
            self.model.grants[session][granted.slot] = self.slot_bytes[granted.slot] = granted.slot_bytes
            self.granted_for.pop(granted.slot, None)

    @rule(
        place=SESSIONS,
        count=st.integers(1, 4),
        namespace=st.integers(0, 10),
        data=st.data(),
        access=st.integers(0, 3),
    )
    def commit(self, place: int, count: int, namespace: int, data: st.DataObject, access: int) -> None:
        """Commit whatever grants there are, under all kinds of headers."""
        session = self.pick_session(place)
        held = self.model.grants[session]
        others = [slot for other, grants in self.model.grants.items() if other != session for slot in grants]
        bogus = [1, 512, *others[:2], *list(self.model.slots)[:2]]
        namespace_id = 999 if namespace == 10 else self.space(namespace).id
        space = self.model.namespaces.get(namespace_id)
        records = []
        for slot in data.draw(st.lists(st.sampled_from([*list(held)[:count] * 5, *bogus]), min_size=1, max_size=count)):
            index = data.draw(KEY_INDEXES)
            parent = natural_parent(index)
            if data.draw(st.integers(0, 5)) == 0:
                parent = data.draw(st.sampled_from([ROOT_KEY, *KEYS]))
            digest = space.digest if space is not None and data.draw(st.integers(0, 9)) else bytes(32)
            part = data.draw(st.integers(0, (space.parts if space else 1) - (data.draw(st.integers(0, 9)) > 0)))
            slot_bytes = held.get(slot, PAGE_BYTES)
            record_bytes = slot_bytes - 100 + (101 if data.draw(st.integers(0, 9)) == 0 else 0)
            fidelity = data.draw(st.sampled_from([0, 85, 85, 254, 255, 255]))
            header = (KEYS[index], parent, digest, part, record_bytes, 7, fidelity)
            records.append(CommittedRecord(slot, *header, data.draw(CODECS)))
        self._commit(session, namespace_id, records, access)

    @rule(
        place=SESSIONS,
        namespace=SPACES,
        index=KEY_INDEXES,
        pages=SIZES,
        access=st.integers(0, 3),
        order=st.sampled_from(["chain", "reverse", "tail", "twice"]),
        fidelities=FIDELITIES,
        says=st.booleans(),
    )
    def put_chain(
        self,
        place: int,
        namespace: int,
        index: int,
        pages: int,
        access: int,
        order: str,
        fidelities: list[int],
        says: bool,
    ) -> None:
        """What a good client does: reserve and commit all parts of a chain. ``says``: of which request, behind what."""
        session, space = self.pick_session(place), self.space(namespace)
        chain = natural_chain(index)
        if order == "tail":
            chain = chain[-2:]
        elif order == "reverse":
            chain.reverse()
        elif order == "twice":
            chain = chain[-2:] * 2
        records = []
        for number in chain:
            for part in range(space.parts):
                length = pages * PAGE_BYTES - 100
                wanted = (access, space.id, natural_parent(number)) if says else ()
                granted = self._reserve(session, length, *wanted)
                if granted is None and says and records:
                    self._commit(session, space.id, records, access)
                    records = []
                    granted = self._reserve(session, length, *wanted)
                if granted is not None:
                    fidelity = 255 if space.exact else fidelities[len(records) % len(fidelities)]
                    header = (KEYS[number], natural_parent(number), space.digest, part, pages * PAGE_BYTES - 100, 7)
                    records.append(CommittedRecord(granted.slot, *header, fidelity))
        if records:
            self._commit(session, space.id, records, access)

    @rule(
        place=SESSIONS,
        namespace=SPACES,
        requests=st.lists(st.tuples(KEY_INDEXES, st.sampled_from([1, 1, 1, 2, 3])), min_size=1, max_size=4),
    )
    def engine_requests(self, place: int, namespace: int, requests: list[tuple[int, int]]) -> None:
        """Match, read, compute and put what was missing, as one access."""
        session, space = self.pick_session(place), self.space(namespace)
        for index, pages in requests:
            access = 1000 + self.serial
            self.serial += 1
            chain = natural_chain(index)
            self._read(session, space, [KEYS[number] for number in chain], access)
            records = []
            stored: list[bytes] = []
            for number in chain[len(space.leading([KEYS[number] for number in chain])) :]:
                for part in range(space.parts):
                    length = pages * PAGE_BYTES - 9
                    wanted = (access, space.id, natural_parent(number))
                    granted = self._reserve(session, length, *wanted)
                    if granted is None and records:
                        # As the daemon does: what was written comes first, then there is room again.
                        stored += self._commit(session, space.id, records, access)
                        records = []
                        granted = self._reserve(session, length, *wanted)
                    if granted is not None:
                        header = (KEYS[number], natural_parent(number), space.digest, part, length, 7)
                        records.append(CommittedRecord(granted.slot, *header, 255 if space.exact else 85))
            if records:
                stored += self._commit(session, space.id, records, access)
            if space.parts == 1 and not self.arena.buckets:
                gone = [key for key in stored if key not in space.blocks]
                assert not gone, f"the end of a chain cost it {gone}, which had been stored"

    @rule(
        place=SESSIONS,
        namespace=SPACES,
        links=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=4),
        part=st.integers(0, 1),
    )
    def put_under_any_parent(self, place: int, namespace: int, links: list[tuple[int, int]], part: int) -> None:
        """Trees that no engine would make; circles are refused."""
        session, space = self.pick_session(place), self.space(namespace)
        records = []
        for index, above in links:
            granted = self._reserve(session, PAGE_BYTES)
            if granted is not None:
                header = (KEYS[-1 - index], KEYS[-1 - above], space.digest, part % space.parts, PAGE_BYTES, 7, 255)
                records.append(CommittedRecord(granted.slot, *header))
        if records:
            self._commit(session, space.id, records, 0)

    @precondition(lambda self: self.model.blocks())
    @rule(
        place=SESSIONS,
        which=st.lists(st.tuples(st.integers(0, 30), st.sampled_from([1, 1, 2, 3, 8])), min_size=1, max_size=4),
        gain=st.sampled_from([0, 1, 60, 255]),
        leased=st.booleans(),
    )
    def put_better(self, place: int, which: list[tuple[int, int]], gain: int, leased: bool) -> None:
        """Records of blocks that are there, which may come twice: better ones, in slots of any size."""
        session = self.pick_session(place)
        records: dict[int, list[CommittedRecord]] = {}
        gains = 0
        for index, pages in which:
            granted = self._reserve(session, pages * PAGE_BYTES - 100)
            blocks = self.model.blocks()
            if granted is None or not blocks:
                continue
            gains += gain
            identity, block = blocks[index % len(blocks)]
            space = self.model.namespaces[identity]
            part, fidelity = next(iter(block.fidelities.items()))
            header = (block.key, block.parent_key, space.digest, part, pages * PAGE_BYTES - 100, 7)
            records.setdefault(identity, []).append(
                CommittedRecord(granted.slot, *header, 255 if space.exact else min(fidelity + gains, 255))
            )
        if leased:
            self.lease_all(place, True, 20)
        for identity, some in records.items():
            self._commit(session, identity, some, 0)

    def _commit(self, session: int, namespace_id: int, records: list[CommittedRecord], access: int) -> list[bytes]:
        """Keys of the records that were answered to be stored."""
        held = self.model.grants[session]
        number = self.model.access_number(session, access)
        expected: list[tuple[PutStatus, Reason, ModelBlock | None]] = []
        used: list[ModelBlock] = []
        contents: dict[int, Identity] = {}
        for record in records:
            self.serial += 1
            content = (namespace_id, record.key, record.part, self.serial)
            if record.slot in held and record.slot not in contents:
                contents[record.slot] = content
                self.executor.write(record.slot, content)
        granted = dict(held)
        self.displaced.clear()
        self.orphans.clear()
        self.model.begin_commit()
        answer = self.apply(Committed(session, namespace_id, tuple(records), access))
        assert isinstance(answer, Answer)
        told = 0
        leaving = iter([slot for left in self.executor.last if isinstance(left, Withdraw) for slot in left.slots])

        def leave(legal: list[ModelBlock]) -> None:
            slot = next(slot for slot in leaving if slot in self.model.slots)
            victim_namespace, block, _ = self.model.slots[slot]
            assert any(block is victim for victim in legal), f"{block} left, expected was one of {legal}"
            self.model.leave(victim_namespace, block)

        def fit_quota(
            slot_bytes: int, stays: ModelBlock | None, reachable: bool, uses: list[ModelBlock]
        ) -> tuple[PutStatus, Reason] | None:
            """Why the namespace's quota does not have so much room, after what leaves for it."""
            nonlocal told
            tenant = self.model.namespaces[namespace_id].tenant
            if tenant is None or not self._quota_short(tenant, slot_bytes):
                return None
            if reachable:
                self.model.put_again([*used[told:], *uses], number)
                told = len(used)
                while slot_bytes <= self.quotas[tenant] and self._quota_short(tenant, slot_bytes):
                    if stays is not None:
                        stays.leases += 1
                    legal = self.model.victims(number, tenant)
                    if stays is not None:
                        stays.leases -= 1
                    if not legal:
                        break
                    leave(legal)
            if not self._quota_short(tenant, slot_bytes):
                return None
            if any(block.is_held for _, block in self.model.blocks() if block.tenant == tenant):
                return PutStatus.THROTTLED, Reason.ALL_HELD
            return PutStatus.REJECTED, Reason.QUOTA

        def leases_full(blocks: list[ModelBlock], more: int) -> bool:
            sizes = self._sizes()
            held = [block for _, block in self.model.blocks() if block.is_held or block in blocks]
            return sum(map(sizes.__getitem__, held)) + more > self.limits.lease_bytes

        def grow(record: CommittedRecord, slot_bytes: int, block: ModelBlock) -> tuple[PutStatus, Reason] | None:
            before = [slot for slot, held in self.model.slots.items() if held[1:] == (block, record.part)]
            growth = slot_bytes - sum(map(self.slot_bytes.__getitem__, before))
            if growth <= 0:
                return None
            if block.is_held and leases_full([], growth):
                return PutStatus.THROTTLED, Reason.ALL_HELD
            return fit_quota(growth, block, block.depth < ORPHAN_DEPTH, [block])

        def make_way(record: CommittedRecord, slot_bytes: int) -> tuple[PutStatus, Reason] | None:
            """What leaves before a new block comes."""
            nonlocal told
            blocks = self.model.namespaces[namespace_id].blocks
            above: list[ModelBlock] = []
            parent = blocks.get(record.parent_key)
            while parent is not None:
                above.append(parent)
                parent = parent.parent
            waiting = [block for block in blocks.values() if block.parent_key == record.key]
            if any(block.is_held for block in waiting) and leases_full(above, slot_bytes):
                return PutStatus.THROTTLED, Reason.ALL_HELD
            reachable = self.model.reaches(namespace_id, record.parent_key)
            refusal = fit_quota(slot_bytes, blocks.get(record.parent_key), reachable, [])
            if refusal is not None:
                return refusal
            if not self._short(slot_bytes, 1) or not reachable:
                return None
            self.model.put_again(used[told:], number)
            told = len(used)
            unreached = self.model.unreached(self.orphans)
            slots = [slot for slot, (_, block, _) in self.model.slots.items() if block in unreached]
            slot_bytes -= sum(map(self.slot_bytes.__getitem__, slots))
            parent = self.model.namespaces[namespace_id].blocks.get(record.parent_key)
            while self._short(slot_bytes, 1 - len(slots)):
                if parent is not None:
                    parent.leases += 1
                legal = self.model.victims(number)
                if parent is not None:
                    parent.leases -= 1
                if not legal:
                    return None
                leave(legal)
            return None

        for record in records:
            slot_bytes = held.pop(record.slot, None)
            if slot_bytes is None:
                expected.append((PutStatus.REJECTED, Reason.BAD_RECORD, None))
                continue
            space = self.model.namespaces.get(namespace_id)
            known = space is not None and record.key in space.blocks
            way, more = partial(make_way, record, slot_bytes), partial(grow, record, slot_bytes)
            placing = self.model.place(namespace_id, record, slot_bytes, number, contents[record.slot], way, more)
            expected.append(placing)
            self.granted_for.pop(record.slot, None)
            if placing[0] is PutStatus.STORED and placing[2] is not None:
                block = placing[2]
                if not known:
                    self.kept.came(block)
                if block.is_retained:
                    self._keep_budget(block.tenant)
            # Also another part of a block that is there uses it.
            if placing[2] is not None and known:
                used.append(placing[2])
            elif placing[2] is not None:
                self.orphans.append(placing[2])
        self.model.put_again(used[told:], number)
        for block in self.model.unreached(self.orphans):
            block.number = 0
        self.evictions([block for status, _, block in expected if status is PutStatus.STORED and block is not None])
        withdrawn = {slot for told in self.executor.last if isinstance(told, Withdraw) for slot in told.slots}
        for record, got, (status, reason, block) in zip(
            records, zip(answer.statuses, answer.reasons, strict=True), expected, strict=True
        ):
            here = block is not None and block.fidelities.get(record.part, -1) >= record.fidelity
            displaced = any(block is other for other in self.displaced)
            if status in (PutStatus.STORED, PutStatus.EXISTS) and not here and not displaced:
                assert got in [(PutStatus.THROTTLED, Reason.ALL_HELD), (PutStatus.REJECTED, Reason.NO_ROOM)]
            else:
                assert got == (status, reason), f"{record} was answered {got}, expected {status, reason}"
            first = granted.pop(record.slot, None) is not None
            if first and got[0] is not PutStatus.STORED and record.slot not in withdrawn:
                self.executor.forget(record.slot)
        return [
            record.key for record, status in zip(records, answer.statuses, strict=True) if status is PutStatus.STORED
        ]

    @rule(place=SESSIONS, count=st.integers(1, 3), others=st.lists(st.integers(500, 600), max_size=2))
    def return_grants(self, place: int, count: int, others: list[int]) -> None:
        session = self.pick_session(place)
        held = self.model.grants[session]
        slots = [*list(held)[:count], *(slot for slot in others if slot not in held)]
        self.apply(GrantsReturned(session, tuple(slots)))
        for slot in slots:
            if held.pop(slot, None) is not None:
                self.granted_for.pop(slot, None)
                self.executor.forget(slot)

    # ------------------------------------------------------------ reading

    @rule(place=SESSIONS, namespace=SPACES, index=KEY_INDEXES, access=st.integers(0, 3))
    def match(self, place: int, namespace: int, index: int, access: int) -> None:
        self._read(self.pick_session(place), self.space(namespace), [KEYS[n] for n in natural_chain(index)], access)

    @rule(
        place=SESSIONS,
        namespace=SPACES,
        indexes=st.lists(KEY_INDEXES, max_size=6),
        access=st.integers(0, 3),
        chain=st.booleans(),
    )
    def match_any_keys(self, place: int, namespace: int, indexes: list[int], access: int, chain: bool) -> None:
        """Keys that need not be a chain; ``chain``: they are reported as if they were one, as matches are."""
        keys = [KEYS[index] for index in indexes]
        self._read(self.pick_session(place), self.space(namespace), keys, access, chain=chain)

    def _read(
        self, session: int, space: ModelNamespace, keys: list[bytes], access: int, *, chain: bool = False
    ) -> None:
        blocks = self.store.leading(space.id, keys)
        expected = space.leading(keys)
        assert [block.key for block in blocks] == [block.key for block in expected]
        fidelities = [fidelity for block in expected for fidelity in block.fidelities.values()]
        assert self.store.fidelity_of(blocks) == min(fidelities, default=255)
        for block, model in zip(blocks, expected, strict=True):
            for part, content in model.parts.items():
                record = self.store.find(space.id, block.key, part)
                assert record is not None
                assert self.executor.contents[record.slot] == content
        if chain and blocks:
            # The deepest hit stands for all above it, however many there are.
            self.apply(Accessed(session, access, [(blocks[-1], len(blocks))], len(keys)))
            self.model.used(expected[-1:], self.model.access_number(session, access))
            return
        runs = runs_of(blocks)
        assert sum(hits for _, hits in runs) == len(blocks)
        for deepest, hits in runs:
            for _ in range(hits - 1):
                assert deepest.parent is not None, "a run is longer than its ancestors"
                deepest = deepest.parent
        self.apply(Accessed(session, access, runs, len(keys), tuple(keys[len(blocks) :])))
        self.model.used(expected, self.model.access_number(session, access))

    @rule(namespace=SPACES, index=KEY_INDEXES, part=st.integers(0, 1))
    def transfer_begins(self, namespace: int, index: int, part: int) -> None:
        record = self.store.find(self.space(namespace).id, KEYS[index], part)
        if record is not None:
            self.executor.pin(record.slot)

    @precondition(lambda self: self.executor.pinned)
    @rule(place=st.integers(0, 9))
    def transfer_ends(self, place: int) -> None:
        self.executor.unpin(self.executor.pinned[place % len(self.executor.pinned)])

    @precondition(lambda self: self.executor.waiting)
    @rule(count=st.integers(1, 20))
    def quiesce(self, count: int) -> None:
        self.executor.quiesce(self.executor.waiting[:count])

    # ------------------------------------------------------------ leases

    @rule(place=SESSIONS, namespace=SPACES, index=KEY_INDEXES, from_root=st.booleans(), ns=st.integers(1, 9))
    def lease(self, place: int, namespace: int, index: int, from_root: bool, ns: int) -> None:
        session, space = self.pick_session(place), self.space(namespace)
        chain = natural_chain(index)
        keys = [KEYS[number] for number in (chain if from_root else chain[len(chain) // 2 :])]
        held = sum(lease.session == session for lease in self.model.leases.values())
        expected = space.leading(keys)
        answer = self.apply(LeaseWanted(session, self.store.leading(space.id, keys), ns))
        count = self.model.fitting(expected, self.limits.lease_bytes, self._sizes())
        if expected and held >= LEASES_PER_SESSION:
            assert answer == Refuse(PutStatus.THROTTLED, Reason.ALL_HELD)
        elif not count:
            assert answer == Leased(0)
        else:
            assert isinstance(answer, Leased)
            assert answer.count == count
            self.model.lease(answer.lease, session, expected[:count], self.executor.now_ns + ns)

    @rule(place=SESSIONS, really=RARELY, ns=st.integers(3, 30))
    def lease_all(self, place: int, really: bool, ns: int) -> None:
        """Nothing may be evicted any more, or as much as may be leased."""
        session = self.pick_session(place)
        for space in list(self.model.namespaces.values()) if really else []:
            held = sum(lease.session == session for lease in self.model.leases.values())
            expected = list(space.blocks.values())
            if expected and held < LEASES_PER_SESSION:
                here = self.store.namespaces.by_id[space.id].blocks
                answer = self.apply(LeaseWanted(session, [here[block.key] for block in expected], ns))
                assert isinstance(answer, Leased)
                if answer.lease:
                    self.model.lease(answer.lease, session, expected[: answer.count], self.executor.now_ns + ns)

    @precondition(lambda self: self.model.leases)
    @rule(place=SESSIONS, which=st.integers(0, 11))
    def release(self, place: int, which: int) -> None:
        """By its session or by another, which may not."""
        session = self.pick_session(place)
        identity = list(self.model.leases)[which % len(self.model.leases)]
        own = self.model.leases[identity].session == session
        assert self.apply(LeaseReleased(session, identity)) == Count(int(own))
        if own:
            self.model.end_lease(identity)
            assert self.apply(LeaseReleased(session, identity)) == Count(0)

    @rule(ns=st.integers(0, 6))
    def time_passes(self, ns: int) -> None:
        self.executor.now_ns += ns
        self.apply(Ticked())
        for identity, lease in list(self.model.leases.items()):
            if lease.expires_ns <= self.executor.now_ns:
                self.model.end_lease(identity)
        for block in self.kept.expire([block for _, block in self.model.blocks()], self.executor.now_ns):
            if block.is_held:
                self.kept.put_off(block, self.executor.now_ns)
            elif block.kept is not None:
                (identity,) = [identity for identity, other in self.model.blocks() if other is block]
                self.model.remove(identity, [block.key])
        self._retentions_are_the_model_s()

    @precondition(lambda self: self.model.blocks())
    @rule(
        which=st.lists(st.integers(0, 99), min_size=1, max_size=4),
        how=st.sampled_from(["chain", "blocks", "blocks", "all"]),
        priority=st.sampled_from([0, 30, 50, 51, 70, 70, 90, 100]),
        ttl_ns=st.sampled_from([0, 2, 5, 9]),
        drop=RARELY,
    )
    def retain(self, which: list[int], how: str, priority: int, ttl_ns: int, drop: bool) -> None:
        """Some blocks of a namespace, a chain, or all; for a time or without end."""
        blocks = self.model.blocks()
        identity, block = blocks[which[0] % len(blocks)]
        space = self.model.namespaces[identity]
        keys = list(space.blocks)
        if how == "chain":
            keys = [block.key]
            while block.parent is not None:
                block = block.parent
                keys.append(block.key)
        elif how == "blocks":
            keys = [*(keys[place % len(keys)] for place in which), KEYS[which[0] % len(KEYS)]]
        drop = drop and ttl_ns > 0
        answer = self.apply(RetainWanted(space.id, keys, priority, ttl_ns, drop))
        expires_ns = self.executor.now_ns + ttl_ns if ttl_ns else FOREVER
        named = [space.blocks[key] for key in dict.fromkeys(keys) if key in space.blocks]
        self.kept.retain(named, priority, expires_ns, drop=drop)
        self._keep_budget(space.tenant)
        found = [block.kept for block in named if block.kept is not None]
        least = max(priority, 51)
        assert answer == Retained(sum(kept.priority == priority or kept.priority >= least for kept in found), 0)
        self._retentions_are_the_model_s()

    @precondition(lambda self: any(block.kept for _, block in self.model.blocks()))
    @rule(place=SESSIONS, namespace=SPACES, index=KEY_INDEXES, pages=st.sampled_from([1, 2, 4]))
    def press_retained(self, place: int, namespace: int, index: int, pages: int) -> None:
        """Others come, for which something must leave."""
        self.engine_requests(place, namespace, [(29, pages), (24, 1), (index, 1)])

    def _retentions_are_the_model_s(self) -> None:
        for identity, space in self.model.namespaces.items():
            retained = self.store.namespaces.by_id[identity].retained
            mine = {key: block.kept for key, block in space.blocks.items() if block.kept is not None}
            told = {key: (kept.priority, kept.expires_ns, kept.drop) for key, kept in mine.items()}
            assert told == {key: (one.priority, one.expires_ns, one.drop) for key, one in retained.items()}

    # ------------------------------------------------------------ removing

    @rule(namespace=SPACES, indexes=st.lists(KEY_INDEXES, min_size=1, max_size=3), really=RARELY)
    def remove(self, namespace: int, indexes: list[int], really: bool) -> None:
        if not really:
            return
        space = self.space(namespace)
        keys = [KEYS[index] for index in indexes]
        answer = self.apply(RemoveWanted(space.id, keys))
        assert answer == Count(self.model.remove(space.id, keys))
        self._retentions_are_the_model_s()

    @rule(namespace=SPACES, really=RARELY)
    def clear(self, namespace: int, really: bool) -> None:
        if not really:
            return
        space = self.space(namespace)
        assert self.apply(ClearWanted(space.id)) == Count(len(space.blocks))
        for block in list(space.blocks.values()):
            self.model.leave(space.id, block)

    @rule()
    def remove_and_clear_of_unknown_namespace(self) -> None:
        assert self.apply(RemoveWanted(999, KEYS)) == Count(0)
        assert self.apply(ClearWanted(999)) == Count(0)
        assert self.store.leading(999, KEYS) == []

    @precondition(lambda self: self.store.records)
    @rule(place=st.integers(0, 99))
    def found_corrupt(self, place: int) -> None:
        """Of any slot: only a resident record can be corrupt."""
        slot = sorted(self.store.records)[place % len(self.store.records)]
        resident = self.store.records[slot].state is RecordState.RESIDENT
        self.apply(FoundCorrupt(slot, "tested"))
        if resident:
            namespace_id, block, _ = self.model.slots[slot]
            self.model.leave(namespace_id, block)

    # ------------------------------------------------------------ what always holds

    @invariant()
    def state_is_valid(self) -> None:
        validate_state(self.store)

    @invariant()
    def contents_are_the_model_s(self) -> None:
        store, model = self.store, self.model
        assert store.resident_bytes <= self.limits.capacity_bytes
        assert store.granted_bytes == sum(sum(held.values()) for held in model.grants.values())
        assert store.granted_bytes <= self.limits.grant_bytes
        assert store.record_count == len(model.slots) <= self.limits.max_records
        assert len(store.leases) == len(model.leases)
        for identity, space in model.namespaces.items():
            state = store.namespaces.by_id[identity]
            assert state.current == space.current
            assert set(state.blocks) == set(space.blocks)
            for key, block in space.blocks.items():
                parts = state.blocks[key].parts
                assert set(parts) == set(block.parts)
                for part, record in parts.items():
                    assert record.fidelity == block.fidelities[part]
                    assert self.executor.contents[record.slot] == block.parts[part]
                    assert self.executor.index[identity, key, part] == record.slot
        for slot in self.executor.pinned:
            assert store.records[slot].state in (RecordState.RESIDENT, RecordState.LIMBO)

    @rule(count=st.integers(1, 4) | st.just(1000), really=RARELY)
    def somebody_is_told(self, count: int, really: bool) -> None:
        """Events are sent, some or all that wait: in between, changes meet in the journal."""
        if really or count < 1000:
            self.told.follow(self.store, count)

    @invariant()
    def what_was_told_is_what_was_complete(self) -> None:
        self.told.check(self.store)

    @rule(cursor=st.integers(-2, 40), count=st.integers(1, 9))
    def snapshot_page(self, cursor: int, count: int) -> None:
        """A snapshot that begins now, or an old one that goes on."""
        self.told.read_page(self.store, cursor, count)

    @rule()
    def snapshot(self) -> None:
        """All pages together are what was told."""
        assert self.told.read_all(self.store, 3) == self.told.blocks

    def teardown(self) -> None:
        """Everything goes; nothing is left."""
        if not hasattr(self, "store"):
            return
        while self.executor.pinned:
            self.transfer_ends(0)
        for session in list(self.model.grants):
            self.apply(SessionClosed(session))
        for identity in self.model.namespaces:
            self.apply(ClearWanted(identity))
        if self.executor.waiting:
            self.executor.quiesce(self.executor.waiting)
        validate_state(self.store)
        store = self.store
        self.told.follow(store, 1 << 30)
        self.told.check(store)
        assert not self.told.blocks
        assert not store.records
        assert not store.block_count
        assert not store.policy.held()
        assert store.policy.next_victim() is None
        assert not store.leases
        assert not store.resident_bytes + store.granted_bytes + store.limbo_bytes + store.resident_record_bytes
        assert not store.slabs.classes
        assert store.slabs.free_slabs == store.slabs.usable_slabs
        assert not self.executor.index
        assert not self.executor.contents, f"slots still hold {self.executor.contents}"


StoreMachine.TestCase.settings = settings(max_examples=600, stateful_step_count=60, deadline=None)
TestStoreAgainstModel = StoreMachine.TestCase


@pytest.mark.stress
@pytest.mark.timeout(1800)
def test_store_against_model_for_long():
    long = settings(max_examples=1500, stateful_step_count=120, deadline=None, derandomize=False, database=None)
    run_state_machine_as_test(StoreMachine, settings=long)
