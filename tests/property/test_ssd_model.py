"""DRAM and the SSD below it against plain dicts, under any order of requests, writes, groups, failures and crashes.

Covers: no byte of another key or of a removed one, in either tier and after any crash; what the log holds durably is
there after it; blocks that are on their way out can be read; room that was promised to writers is there when they
commit; slots of the SSD are not written before the end of what lay there is in the log. After each step all invariants
are checked. The log's frames are the real bytes.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from fakes.memory_executor import MemoryExecutor
from fakes.ssd_twin import LOST, SsdTwin
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

from kvstore.core.block import Block, Record, RecordState, runs_of
from kvstore.core.events import (
    Accessed,
    ClearWanted,
    Committed,
    CommittedRecord,
    GrantsReturned,
    Hinted,
    InvalidateWanted,
    Joined,
    LeaseReleased,
    LeaseWanted,
    PersistWanted,
    PopulationEnded,
    RemoveWanted,
    RetainWanted,
    SessionOpened,
    SlabPopulated,
    Ticked,
)
from kvstore.core.instructions import Answer, Count, Leased, Namespaced, Retained
from kvstore.core.invariants import validate_state
from kvstore.core.namespaces import NamespaceState
from kvstore.core.pools import pooled
from kvstore.core.slabs import SlabAllocator
from kvstore.core.ssd_record import SsdBlock, SsdRecord, SsdState
from kvstore.core.state import StoreLimits
from kvstore.core.store import Store
from kvstore.core.tenants import tenants_of
from kvstore.policy.base import PolicyContext
from kvstore.policy.lru import Lru
from kvstore.protocol.keys import ROOT_KEY
from kvstore.protocol.messages import PutStatus
from kvstore.protocol.namespace import Namespace

PAGE_BYTES = 4096
SESSION = 7
DESCRIPTIONS = (Namespace(name="whole"), Namespace(name="halves", parts=2, codec="kivi4"))
KEYS = [bytes([number]) * 32 for number in range(1, 25)]
INDEXES = st.integers(0, len(KEYS) - 1)
SPACES = st.integers(0, 1)
RARELY = st.sampled_from([False, False, False, True])
Place = tuple[str, int, bytes, int]
"""Namespace, generation, key, part."""


def parent_of(index: int) -> bytes:
    """A trunk with a branch every fourth key."""
    if index == 0:
        return ROOT_KEY
    return KEYS[index // 3] if index % 4 == 0 else KEYS[index - 1]


def chain_to(index: int) -> list[int]:
    chain = [index]
    while parent_of(chain[0]) != ROOT_KEY:
        chain.insert(0, KEYS.index(parent_of(chain[0])))
    return chain


@dataclass(frozen=True)
class Sizes:
    """Of one run, in pages.

    ``leases``, ``orphans``: whether there are any; others lose what they were promised. ``quota``, ``ssd_quota``: of
    one namespace in either tier, 0 for none; slots that were lent for another one are used for it.
    """

    capacity: int = 16
    grants: int = 6
    slab_pages: int = 4
    records: int = 1 << 62
    ssd_slabs: int = 16
    ssd_records: int = 1 << 30
    record_pages: tuple[int, ...] = (1, 1, 1, 2)
    leases: bool = False
    orphans: bool = False
    quota: int = 0
    ssd_quota: int = 0
    retained: int = 8


SIZES = st.sampled_from(
    [
        Sizes(),
        Sizes(ssd_slabs=5),
        Sizes(record_pages=(1,), records=9),
        Sizes(record_pages=(1, 1, 2, 4), ssd_slabs=8),
        Sizes(capacity=32, grants=8, record_pages=(1, 2, 3), ssd_slabs=6, ssd_records=12),
        Sizes(leases=True),
        Sizes(leases=True, orphans=True, ssd_slabs=4, ssd_records=9),
        Sizes(orphans=True, capacity=8, grants=4),
        Sizes(quota=7, ssd_quota=20, retained=6),
        Sizes(quota=12, leases=True, orphans=True, ssd_quota=9, record_pages=(1, 1, 2)),
    ]
)


class SsdMachine(RuleBasedStateMachine):
    """A client, the tier's threads, its log, and what breaks them."""

    @initialize(sizes=SIZES)
    def start(self, sizes: Sizes) -> None:
        self.sizes = sizes
        quotas = {DESCRIPTIONS[0].name: sizes.ssd_quota * PAGE_BYTES} if sizes.ssd_quota else {}
        self.twin = SsdTwin(sizes.ssd_slabs, sizes.slab_pages, sizes.ssd_records, quotas)
        self.alive: dict[Place, set[object]] = defaultdict(set)
        self.ending: list[tuple[Place, object, int]] = []
        self.serial = 0
        self.generations = dict.fromkeys((description.name for description in DESCRIPTIONS), 0)
        self.begin_life()

    def begin_life(self) -> None:
        sizes = self.sizes
        limits = StoreLimits(
            capacity_bytes=sizes.capacity * PAGE_BYTES,
            grant_bytes=sizes.grants * PAGE_BYTES,
            grant_bytes_per_session=sizes.grants * PAGE_BYTES,
            max_records=sizes.records,
            lease_bytes=sizes.capacity * PAGE_BYTES // 2,
            retention_bytes=sizes.retained * PAGE_BYTES,
        )
        slabs = -(-(sizes.capacity + sizes.grants) // sizes.slab_pages) + 3
        allocator = SlabAllocator(slabs, sizes.slab_pages * PAGE_BYTES, 512)
        quotas = {DESCRIPTIONS[0].name: sizes.quota * PAGE_BYTES} if sizes.quota else {}
        tenants = tenants_of(quotas).values()
        policy = pooled(Lru, PolicyContext(limits.capacity_bytes, lambda: 0), tenants)
        self.store = Store(limits, allocator, policy, ssd=self.twin.ssd, tenants=tenants)
        self.executor = MemoryExecutor(self.store, now_ns=1)
        for index in range(slabs):
            self.executor.apply(SlabPopulated(index))
        self.executor.apply(PopulationEnded())
        self.executor.apply(SessionOpened(SESSION))
        self.spaces = [self._join(description) for description in DESCRIPTIONS]
        self.twin.attach(self.executor)
        self.granted: list[int] = []
        self.leases: list[int] = []
        self.excused = sizes.leases or sizes.orphans or sizes.quota > 0
        """Whether room that was promised may be gone."""

    def _join(self, description: Namespace) -> NamespaceState:
        generation = self.generations[description.name]
        answer = self.executor.apply(Joined(description, generation=generation, session=SESSION))
        assert isinstance(answer, Namespaced)
        assert not answer.stale, "the namespace is in a later generation than it ever was"
        return answer.namespace

    def place(self, space: NamespaceState, key: bytes, part: int) -> Place:
        return space.description.name, space.generation, key, part

    # ------------------------------------------------------------ requests

    @rule(space=SPACES, index=INDEXES, length=st.integers(1, 5), fidelity=st.sampled_from([85, 178, 255]), parts=SPACES)
    def put(self, space: int, index: int, length: int, fidelity: int, parts: int) -> None:
        """The end of a chain, or the whole of it; with its first part, or with both."""
        state = self.spaces[space]
        fidelity = 255 if state.description.codec == "raw" else fidelity
        chain = chain_to(index)
        known = set(state.blocks) | set(state.ssd.tree.blocks if state.ssd is not None else ())
        if self.sizes.orphans:
            chain = chain[-length:]
        else:
            while chain and KEYS[chain[0]] in known and len(chain) > length:
                chain.pop(0)
        for one in chain:
            parent = parent_of(one)
            if not self.sizes.orphans and parent != ROOT_KEY and parent not in self._known(state):
                return
            for part in range(min(parts + 1, state.parts)):
                slot = self._grant(state, one, parent)
                if slot is None:
                    return
                self._commit(state, [(slot, one, part, fidelity)])

    def _known(self, state: NamespaceState) -> set[bytes]:
        return set(state.blocks) | set(state.ssd.tree.blocks if state.ssd is not None else ())

    def _grant(self, state: NamespaceState, index: int, parent: bytes) -> int | None:
        pages = self.sizes.record_pages[index % len(self.sizes.record_pages)]
        granted = self.executor.want_slot(SESSION, pages * PAGE_BYTES, 0, state.id, parent)
        if isinstance(granted, Record):
            return granted.slot
        assert granted.status is PutStatus.THROTTLED or self.excused or not self.twin.writable, granted
        return None

    def _commit(self, state: NamespaceState, wanted: list[tuple[int, int, int, int]]) -> None:
        """Slot, key, part and fidelity of each."""
        records = []
        contents = {}
        for slot, index, part, fidelity in wanted:
            self.serial += 1
            content = (*self.place(state, KEYS[index], part), self.serial)
            self.executor.write(slot, content)
            contents[slot] = content
            length = self.store.records[slot].slot_bytes
            digest = state.digest
            records.append(
                CommittedRecord(slot, KEYS[index], parent_of(index), digest, part, length, self.serial, fidelity)
            )
        dropped = self.store.counters.dropped_blocks
        writable = self.twin.writable
        answer = self.executor.apply(Committed(SESSION, state.id, tuple(records)))
        assert isinstance(answer, Answer)
        for record, status, reason in zip(records, answer.statuses, answer.reasons, strict=True):
            held = self.store.records.get(record.slot)
            if held is None:
                self.executor.forget(record.slot)
            if status is PutStatus.STORED:
                self.alive[self.place(state, record.key, record.part)].add(contents[record.slot])
            elif status is not PutStatus.EXISTS:
                assert self.excused or not writable, f"a granted slot's commit was answered {status!r}, {reason!r}"
        # Unless its copy left the SSD since, or it got none when nothing could be written.
        counters = self.twin.ssd.counters
        lost = self.twin.failures or counters.evicted_blocks or counters.corrupt_records
        excused = self.excused or not writable or lost
        assert excused or self.store.counters.dropped_blocks == dropped, (
            "a block left DRAM without a copy although the SSD is written"
        )

    @rule(space=SPACES, index=INDEXES)
    def grant_for_later(self, space: int, index: int) -> None:
        slot = self._grant(self.spaces[space], index, b"")
        if slot is not None:
            self.granted.append(slot)

    @precondition(lambda self: self.granted)
    @rule(space=SPACES, index=INDEXES, count=st.integers(1, 4), returned=RARELY)
    def use_grants(self, space: int, index: int, count: int, returned: bool) -> None:
        """Commit slots that were granted earlier, as far as their blocks can be reached."""
        slots, self.granted = self.granted[:count], self.granted[count:]
        if returned:
            self.executor.apply(GrantsReturned(SESSION, tuple(slots)))
            return
        state = self.spaces[space]
        chain = [one for one in chain_to(index) if KEYS[one] not in state.blocks or state.parts > 1]
        known = self._known(state)
        wanted: list[tuple[int, int, int, int]] = []
        for one in chain[: len(slots)]:
            if not self.sizes.orphans and parent_of(one) not in known | {ROOT_KEY}:
                break
            known.add(KEYS[one])
            wanted.append((slots.pop(0), one, 0, 255))
        if slots:
            self.executor.apply(GrantsReturned(SESSION, tuple(slots)))
        if wanted:
            self._commit(state, wanted)

    @rule(space=SPACES, index=INDEXES)
    def read(self, space: int, index: int) -> None:
        """Match a chain in both tiers, check all bytes, and report what was used."""
        state = self.spaces[space]
        found = self.store.leading_in_tiers(state.id, [KEYS[one] for one in chain_to(index)])
        for block in found:
            parts = set(block.parts)
            if isinstance(block, SsdBlock) and block.key in state.blocks:
                parts |= set(state.blocks[block.key].parts)
            assert parts == set(range(state.parts))
        above = [block for block in found if isinstance(block, Block)]
        below = [block for block in found if isinstance(block, SsdBlock)]
        runs: list[tuple[Block | SsdBlock, int]] = [*runs_of(above), *[(block, 1) for block in below[-1:]]]
        self.executor.apply(Accessed(SESSION, 0, runs, len(chain_to(index))))

    @rule(space=SPACES, index=INDEXES)
    def promote(self, space: int, index: int) -> None:
        """Bring the first block of a chain that is below only up."""
        state = self.spaces[space]
        if state.ssd is None:
            return
        for one in chain_to(index):
            copy = state.ssd.tree.blocks.get(KEYS[one])
            if copy is None or KEYS[one] in state.blocks:
                continue
            for record in list(copy.parts.values()):
                granted = self.executor.want_slot(SESSION, record.record_bytes)
                if not isinstance(granted, Record):
                    return
                if record.state is not SsdState.STORED:
                    self.executor.apply(GrantsReturned(SESSION, (granted.slot,)))
                    return
                content = self.twin.contents[record.slot]
                self._check(state.description.name, state.generation, record, content)
                self.executor.write(granted.slot, content)
                commit = CommittedRecord(
                    granted.slot,
                    record.key,
                    record.parent_key,
                    state.digest,
                    record.part,
                    record.record_bytes,
                    record.checksum,
                    record.fidelity,
                )
                self.executor.apply(Committed(SESSION, state.id, (commit,), promoted=True))
                if granted.slot not in self.store.records:
                    self.executor.forget(granted.slot)
            return

    @precondition(lambda self: self.sizes.leases)
    @rule(space=SPACES, index=INDEXES, for_ns=st.integers(1, 30))
    def lease(self, space: int, index: int, for_ns: int) -> None:
        state = self.spaces[space]
        blocks = self.store.leading_in_tiers(state.id, [KEYS[one] for one in chain_to(index)])
        answer = self.executor.apply(LeaseWanted(SESSION, blocks, for_ns))
        assert isinstance(answer, Leased)
        if answer.lease:
            self.leases.append(answer.lease)

    @precondition(lambda self: self.leases)
    @rule(place=st.integers(0, 9))
    def release(self, place: int) -> None:
        self.executor.apply(LeaseReleased(SESSION, self.leases.pop(place % len(self.leases))))

    @rule(
        space=SPACES,
        index=INDEXES,
        chain=st.booleans(),
        priority=st.sampled_from([0, 30, 50, 60, 80, 100]),
        ttl_ns=st.sampled_from([0, 5, 20]),
    )
    def retain(self, space: int, index: int, chain: bool, priority: int, ttl_ns: int) -> None:
        """Wherever the blocks are. What is retained changes who leaves, and nothing of what is promised."""
        state = self.spaces[space]
        keys = [KEYS[one] for one in (chain_to(index) if chain else [index])]
        answer = self.executor.apply(RetainWanted(state.id, keys, priority, ttl_ns))
        assert isinstance(answer, Retained)
        assert answer.count <= sum(key in state.blocks for key in keys)
        assert answer.count + answer.waiting <= sum(key in self._known(state) for key in keys)

    @rule(space=SPACES, index=INDEXES, soon=st.booleans())
    def hint(self, space: int, index: int, soon: bool) -> None:
        state = self.spaces[space]
        keys = [KEYS[one] for one in chain_to(index)]
        found = self.store.leading_in_tiers(state.id, keys)
        assert self.executor.apply(Hinted(state.id, keys, soon, 10)) == Count(len(found))

    @rule(passed_ns=st.integers(0, 9))
    def tick(self, passed_ns: int) -> None:
        self.executor.now_ns += passed_ns
        self.executor.apply(Ticked())

    @rule(space=SPACES, index=INDEXES)
    def persist(self, space: int, index: int) -> None:
        """A durable put's end: a chain is written, logged, and then it is on the SSD, whatever happens next."""
        state = self.spaces[space]
        if not self.twin.writable:
            return
        keys = [KEYS[one] for one in chain_to(index)]
        self.executor.apply(PersistWanted(state.id, keys))
        if self.excused:
            return
        evicted = self.twin.ssd.counters.evicted_blocks
        there = [
            (key, part, record.fidelity)
            for key in keys
            if key in state.blocks
            for part, record in state.blocks[key].parts.items()
        ]
        self.twin.settle()
        if self.twin.ssd.counters.evicted_blocks != evicted:
            return
        for key, part, fidelity in there:
            assert self.twin.ssd.holds(state.ssd, key, part, fidelity), f"{key[:1].hex()} is not durable"

    # ------------------------------------------------------------ removals

    def _gone(self, places: list[Place]) -> None:
        """Nothing of these may come back once the log says so durably."""
        for place in places:
            for content in self.alive.pop(place, set()):
                self.ending.append((place, content, self.twin.ssd.position))

    @rule(space=SPACES, indexes=st.lists(INDEXES, min_size=1, max_size=3), really=RARELY)
    def remove(self, space: int, indexes: list[int], really: bool) -> None:
        if not really:
            return
        state = self.spaces[space]
        keys = [KEYS[index] for index in dict.fromkeys(indexes)]
        self.executor.apply(RemoveWanted(state.id, keys))
        assert not self._known(state) & set(keys)
        self._gone([self.place(state, key, part) for key in keys for part in range(state.parts)])

    @rule(space=SPACES, really=RARELY)
    def clear(self, space: int, really: bool) -> None:
        if not really:
            return
        state = self.spaces[space]
        self.executor.apply(ClearWanted(state.id))
        assert not self._known(state)
        self._gone([place for place in self.alive if place[:2] == (state.description.name, state.generation)])

    @rule(space=SPACES, really=RARELY)
    def invalidate(self, space: int, really: bool) -> None:
        if not really:
            return
        state = self.spaces[space]
        answer = self.executor.apply(InvalidateWanted(state.id, SESSION))
        assert isinstance(answer, Namespaced)
        self._gone([place for place in self.alive if place[:2] == (state.description.name, state.generation)])
        self.spaces[space] = answer.namespace
        self.generations[state.description.name] = answer.namespace.generation

    # ------------------------------------------------------------ the SSD's own

    @rule(most=st.integers(1, 4))
    def pump(self, most: int) -> None:
        self.twin.pump(most)

    @precondition(lambda self: self.twin.flying)
    @rule(place=st.integers(0, 9), count=st.integers(1, 4))
    def finish_writes(self, place: int, count: int) -> None:
        for _ in range(min(count, len(self.twin.flying))):
            self.twin.finish_write(place)

    @precondition(lambda self: self.twin.group is None and self.twin.writable)
    @rule()
    def begin_group(self) -> None:
        if self.twin.written or self.twin.ssd.something_to_log:
            self.twin.begin_group()

    @precondition(lambda self: self.twin.group is not None)
    @rule()
    def end_group(self) -> None:
        self.twin.end_group()

    @rule()
    def settle(self) -> None:
        if self.twin.writable and not self.sizes.leases:
            self.twin.settle()
            assert not self.store.retired or self.store.retired.clean_bytes == self.store.retired.slot_bytes, (
                "what is on its way out waits for ever"
            )

    @precondition(lambda self: self.twin.flying and self.twin.writable and self.twin.group is None)
    @rule(place=st.integers(0, 9), really=RARELY)
    def fail_write(self, place: int, really: bool) -> None:
        if really:
            self.twin.fail_write(place)

    @precondition(lambda self: self.twin.group is not None)
    @rule(torn=st.integers(0, 3000), really=RARELY)
    def fail_group(self, torn: int, really: bool) -> None:
        if really:
            self.twin.fail_group(torn)

    @precondition(lambda self: not self.twin.writable and not self.twin.flying)
    @rule()
    def resume(self) -> None:
        self.twin.resume()

    @precondition(lambda self: self.twin.group is None and self.twin.writable and not self.twin.checkpoint_due)
    @rule(really=RARELY)
    def begin_log(self, really: bool) -> None:
        if really:
            self.twin.begin_log()

    @precondition(lambda self: self.twin.checkpoint_due)
    @rule()
    def checkpoint(self) -> None:
        self.twin.checkpoint()

    @rule(place=st.integers(0, 30), hold=st.booleans())
    def found_corrupt(self, place: int, hold: bool) -> None:
        """A read finds a stored record damaged; it holds the slot meanwhile."""
        stored = self.twin.stored()
        if place < len(stored) and place % 5 == 0:
            ssd, record = self.twin.ssd, stored[place]
            if hold:
                ssd.hold(record)
            ssd.corrupt(record)
            if hold:
                ssd.let_go(record)

    @rule(torn=st.integers(0, 3000), really=RARELY)
    def crash(self, torn: int, really: bool) -> None:
        if not really:
            return
        before = self.twin.ssd
        durable = {self._copy(record) for record in self.twin.stored()}
        # What was about to become durable, and what was not said durably to be over.
        maybe = {self._copy(record) for record in before.records.values() if record.logged}
        synced = before.synced
        ssd = self.twin.crash(torn)
        found = {self._copy(record) for record in self.twin.stored()}
        assert durable <= found, f"durable and lost: {durable - found}"
        assert found <= durable | maybe, f"over and back: {found - durable - maybe}"
        # What was removed and not acknowledged may be back.
        for place, content, position in self.ending:
            if position > synced:
                self.alive[place].add(content)
        self.ending.clear()
        self.begin_life()
        assert self.store.ssd is ssd

    def _copy(self, record: SsdRecord) -> tuple[object, ...]:
        return record.namespace.description, record.key, record.parent_key, record.part, record.slot, record.checksum

    # ------------------------------------------------------------ what must hold

    def _check(self, name: str, generation: int, record: Record | SsdRecord, content: object) -> None:
        key = record.key if isinstance(record, SsdRecord) else record.block.key if record.block is not None else b""
        assert content != LOST, f"{key[:1].hex()} is stored and its bytes are lost"
        alive = self.alive[name, generation, key, record.part]
        assert content in alive, f"{key[:1].hex()} part {record.part} is {content}, which it never was or is no more"
        assert isinstance(content, tuple)
        assert content[-1] == record.checksum

    @invariant()
    def holds(self) -> None:
        validate_state(self.store)
        for state in self.spaces:
            name, generation = state.description.name, state.generation
            for block in state.blocks.values():
                for part, record in block.parts.items():
                    assert self.store.find(state.id, block.key, part) is record
                    assert record.state is RecordState.RESIDENT
                    self._check(name, generation, record, self.executor.contents[record.slot])
            if state.ssd is not None:
                assert state.ssd.generation == generation
                for copy in state.ssd.tree.blocks.values():
                    for record in copy.parts.values():
                        self._check(name, generation, record, self.twin.contents[record.slot])
        # What was lent while nothing could be written was lent without that promise.
        if self.store.demotes and not self.excused and not self.twin.failures:
            assert self.store._has_room(0, 0), "more is granted than can be committed"


def test_ssd_and_dram_agree_with_the_model():
    run_state_machine_as_test(SsdMachine, settings=settings(max_examples=250, stateful_step_count=60, deadline=None))
