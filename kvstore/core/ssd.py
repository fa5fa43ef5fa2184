"""The SSD tier's state machine: which record lies in which slot of the slab file, and what the log must say; no I/O.

A record's life: its slot is taken (``begin``), its bytes are written, its group is logged (``begin_group``,
``end_group``), and only then it can be found. When it leaves, its slot is used again only after a later group has
logged that. Whoever carries out the I/O calls these methods in that order; ``docs/ssd-format.md`` says why.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Final

from kvstore.core.slabs import SlabAllocator
from kvstore.core.ssd_record import SSD_TRANSITIONS, SsdBlock, SsdNamespace, SsdRecord, SsdState
from kvstore.errors import InvalidTransition
from kvstore.format.constants import PAGE_BYTES
from kvstore.format.ssd_log import EmptyEntry, Entry, FreeEntry, NamespaceEntry, PutEntry, TouchEntry
from kvstore.policy.base import EvictionPolicy

EVICTION_BATCH: Final = 256
"""Victims chosen at once when room must be made for a slot size."""

SLOTS_AHEAD: Final = 96
"""Slots of a size in demand, and records, that are kept free or on their way to be: what is written while a group is
synced."""

MOST_FREES: Final = 8192
"""Most ends of records that one frame says."""

MOST_TOUCHES: Final = 65_536
"""Touches that wait for the next group; more are left out: the order of the least used suffers after a crash."""


@dataclass(slots=True)
class SsdCounters:
    """Counts since the start."""

    stored_records: int = 0
    stored_bytes: int = 0
    evicted_blocks: int = 0
    evicted_bytes: int = 0
    removed_blocks: int = 0
    corrupt_records: int = 0
    no_room: int = 0


@dataclass(slots=True, eq=False)
class Group:
    """What one frame of the log says: records that become readable with it, and records that are over with it.

    ``covered``: those among the latter that go with their whole namespace.
    """

    puts: list[SsdRecord] = field(default_factory=list)
    frees: list[SsdRecord] = field(default_factory=list)
    covered: list[SsdRecord] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)
    number: int = 0


class SsdStore:
    """The state of the SSD tier.

    Args:
        slabs: the slab file's slots; this alone allocates from it.
        policy: chooses what leaves; of its own, not the DRAM tier's.
        max_records: records at a time, for which the log and the checkpoints have room.
    """

    def __init__(self, slabs: SlabAllocator, policy: EvictionPolicy, max_records: int) -> None:
        self.slabs = slabs
        self.policy = policy
        self.max_records = max_records
        self.namespaces: dict[int, SsdNamespace] = {}
        self.counters = SsdCounters()
        self.resident_bytes = 0
        self.record_bytes = 0
        self.writing_bytes = 0
        self.leaving_bytes = 0
        self.block_count = 0
        self.record_count = 0
        self.access = 0
        """The highest access number that the log knows of."""
        self.records: dict[int, SsdRecord] = {}
        self.growing = False
        """Whether slabs are still to come: until they are there nothing leaves for want of them."""
        self.on_evicted: Callable[[bytes, int], None] = lambda key, used: None
        """Is told of each block that leaves for others, and when it was last used."""
        self._last_number = 0
        self._leaving: dict[SsdRecord, None] = {}
        """Over and in the log, whose end is not in a group yet."""
        self._covered: dict[SsdRecord, None] = {}
        """As these, with the end of their whole namespace."""
        self._said: list[Entry] = []
        self._touched: dict[SsdBlock, int] = {}
        self.coming: Counter[int] = Counter()
        """Slots by size that are on their way to be free, but for those of slabs that are emptied."""
        self.leaving_count = 0
        self._emptied: dict[SsdNamespace, None] = {}
        self._groups = 0
        self._groups_done = 0

    @property
    def scarce(self) -> bool:
        """Whether others must leave for what is written."""
        return not self.growing and not self.slabs.free_slabs

    # -------------------------------------------------------------- namespaces

    def namespace(self, description: bytes, generation: int) -> SsdNamespace:
        """A namespace that gets its first block here."""
        self._last_number += 1
        found = SsdNamespace(self._last_number, description, generation)
        self.namespaces[found.number] = found
        return found

    def take_emptied(self) -> list[SsdNamespace]:
        """Namespaces that had nothing stored or on its way any more at some time since the last call."""
        emptied = list(self._emptied)
        self._emptied.clear()
        return emptied

    def advance(self, namespace: SsdNamespace, generation: int) -> None:
        """A namespace is in a later generation: all its records are over."""
        self._end_all(namespace)
        namespace.begin_generation(generation)
        if namespace.told:
            self._said.append(NamespaceEntry(namespace.number, generation, namespace.description))

    def empty(self, namespace: SsdNamespace) -> int:
        """All records of a namespace are over; how many blocks."""
        count = len(namespace.tree.blocks)
        self.counters.removed_blocks += count
        said = bool(count) or any(record.logged for record in namespace.writing.values())
        self._end_all(namespace)
        if said:
            self._said.append(EmptyEntry(namespace.number))
        return count

    def _end_all(self, namespace: SsdNamespace) -> None:
        namespace.ended += 1
        for record in list(namespace.writing.values()):
            self._cancel(record)
        ended = list(namespace.tree.blocks.values())
        records = [record for block in ended for record in block.parts.values()]
        for block in ended:
            self._unlink(block)
        for record in records:
            if self._leaving.pop(record, 0) is None:
                self._covered[record] = None

    # -------------------------------------------------------------- writing

    def holds(self, namespace: SsdNamespace | None, key: bytes, part: int, fidelity: int) -> bool:
        """Whether a record that is as good is stored."""
        record = None if namespace is None else namespace.stored(key, part)
        return record is not None and record.fidelity >= fidelity

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

        ``depth`` and ``access``: its block's depth, and the access number of its last use. Precondition: nothing of
        that key and part is being written.
        """
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
        return record

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
        if not namespace.writing and not namespace.tree.blocks:
            self._emptied[namespace] = None

    # -------------------------------------------------------------- groups

    @property
    def something_to_log(self) -> bool:
        """Whether the next group has something to say even without records that were written."""
        return bool(self._leaving or self._covered or self._said)

    @property
    def position(self) -> int:
        """Number of the group that will say what happened until now; see ``synced``."""
        more = max(-(-len(self._leaving) // MOST_FREES), 1)
        return self._groups + more if self.something_to_log else self._groups

    @property
    def synced(self) -> int:
        """Number of the last group that is in the log with all before it."""
        return self._groups_done

    def begin_group(self, written: list[SsdRecord]) -> Group:
        """What the next frame says: these records, whose bytes are durable, and everything that ended until now."""
        group = Group()
        self._groups += 1
        group.number = self._groups
        entries: list[Entry] = []
        for record in written:
            if record.state is not SsdState.WRITING:
                continue
            namespace = record.namespace
            if not namespace.told:
                namespace.told = True
                entries.append(NamespaceEntry(namespace.number, namespace.generation, namespace.description))
            record.logged = True
            group.puts.append(record)
        # First what ended: a slot's new record must not be ended by the end of the one before.
        freed = list(islice(self._leaving, MOST_FREES))
        for record in freed:
            del self._leaving[record]
        group.covered = list(self._covered)
        self._covered.clear()
        entries += self._said
        self._said = []
        group.frees = freed
        entries += [FreeEntry(record.slot) for record in freed]
        for record in group.puts:
            entries.append(self.put_entry(record, record.access))
        for block, access in self._touched.items():
            for stored in block.parts.values():
                entries.append(TouchEntry(stored.slot, access))
                break
        self._touched.clear()
        group.entries = entries
        return group

    def put_entry(self, record: SsdRecord, access: int) -> PutEntry:
        """The log's entry of a record whose block was last used then."""
        return PutEntry(
            record.fidelity,
            record.codec,
            record.part,
            record.namespace.number,
            record.slot_bytes // PAGE_BYTES,
            record.token_count,
            record.home_bytes // PAGE_BYTES,
            record.slot,
            record.record_bytes,
            record.checksum,
            access,
            record.key,
            record.parent_key,
        )

    def end_group(self, group: Group) -> list[SsdRecord]:
        """The frame is durable; the records that can be read now, and those that never will: nobody needs to wait."""
        ended = [record for record in group.puts if record.state is SsdState.WRITING]
        for record in ended:
            self._store(record)
        self._groups_done = group.number
        for entry in group.entries:
            if type(entry) is NamespaceEntry and entry.namespace in self.namespaces:
                self.namespaces[entry.namespace].logged_generation = entry.generation
        for record in (*group.frees, *group.covered):
            record.logged = False
            self._settle(record)
        return ended

    def fail_group(self, group: Group) -> None:
        """It is unknown whether the frame is durable: its records are over, and what it said must be said again."""
        for record in group.puts:
            if record.state is SsdState.WRITING:
                self._cancel(record)
        self._leaving.update(dict.fromkeys(group.frees))
        self._covered.update(dict.fromkeys(group.covered))
        again = [entry for entry in group.entries if isinstance(entry, NamespaceEntry | EmptyEntry)]
        self._said[:0] = again

    def _store(self, record: SsdRecord) -> None:
        """Make a record readable, unless its parents would form a circle."""
        namespace, key = record.namespace, record.key
        block = namespace.tree.blocks.get(key)
        if block is not None and block.parent_key != record.parent_key:
            # The same key behind another block: the later one counts.
            self._unlink(block)
            block = None
        if block is None and namespace.tree.closes_circle(key, record.parent_key):
            self._writing_over(record)
            self._leave(record)
            return
        self._change(record, SsdState.STORED)
        if block is None:
            block = SsdBlock(namespace, key, record.parent_key)
            self._insert(block, record.access, record.depth)
        before = block.parts.get(record.part)
        if before is not None:
            self._detach(block, before)
            self._leave(before)
        block.parts[record.part] = record
        self._count(block, record, 1)
        self._writing_over(record)
        self.counters.stored_records += 1
        self.counters.stored_bytes += record.record_bytes

    def _insert(self, block: SsdBlock, access: int, orphan_depth: int) -> None:
        block.used = access
        block.namespace.tree.insert(block, orphan_depth)
        self.policy.insert(block, access)
        self.block_count += 1

    # -------------------------------------------------------------- use

    def touch(self, block: SsdBlock, access: int) -> None:
        """A block, and so its ancestors, was used, here or in DRAM."""
        if access > self.access:
            self.access = access
        if access <= block.used:
            return
        block.used = access
        self.policy.touch(block, 1, access)
        if len(self._touched) < MOST_TOUCHES or block in self._touched:
            self._touched[block] = access

    # -------------------------------------------------------------- leaving

    def remove(self, block: SsdBlock) -> None:
        """A block is removed; children keep their depth."""
        self.counters.removed_blocks += 1
        self._unlink(block)

    def remove_key(self, namespace: SsdNamespace, key: bytes) -> bool:
        """A block is removed, by key, and what of it is being written; whether any of it was stored."""
        namespace.ended += 1
        if namespace.writing:
            for place in [place for place in namespace.writing if place[0] == key]:
                self._cancel(namespace.writing[place])
        block = namespace.tree.blocks.get(key)
        if block is not None:
            self.remove(block)
        return block is not None

    def corrupt(self, record: SsdRecord) -> None:
        """A stored record's bytes are not what was written: it is over."""
        if record.state is not SsdState.STORED:
            return
        self.counters.corrupt_records += 1
        block = record.namespace.tree.blocks[record.key]
        self._detach(block, record)
        self._leave(record)
        if not block.parts:
            self._drop(block)

    def evict(self, block: SsdBlock) -> None:
        """A block leaves for others."""
        self.counters.evicted_blocks += 1
        self.counters.evicted_bytes += block.slot_bytes
        self.on_evicted(block.key, block.used)
        self._unlink(block)

    def _keep_ahead(self, slot_bytes: int) -> None:
        """Evict as much as is needed for the next slots of a size, so that writers need not wait for groups."""
        slots = self.slabs.classes.get(slot_bytes // PAGE_BYTES)
        slab_slots = max(self.slabs.slab_bytes // slot_bytes, 1)
        wanted = min(SLOTS_AHEAD, max(len(self.slabs.slabs) * slab_slots // 8, 1))
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

    def _block_of(self, record: SsdRecord) -> SsdBlock:
        return record.namespace.tree.blocks[record.key]

    def _unlink(self, block: SsdBlock) -> None:
        self._let_all_leave(block)
        self._drop(block)

    def _let_all_leave(self, block: SsdBlock) -> None:
        for record in list(block.parts.values()):
            self._detach(block, record)
            self._leave(record)

    def _drop(self, block: SsdBlock) -> None:
        """A block without records leaves the tree."""
        self.policy.discard(block)
        namespace = block.namespace
        namespace.tree.remove(block)
        if not namespace.writing and not namespace.tree.blocks:
            self._emptied[namespace] = None
        self._touched.pop(block, None)
        self.block_count -= 1

    def _detach(self, block: SsdBlock, record: SsdRecord) -> None:
        del block.parts[record.part]
        self._count(block, record, -1)

    def _count(self, block: SsdBlock, record: SsdRecord, by: int) -> None:
        block.slot_bytes += by * record.slot_bytes
        block.namespace.slot_bytes += by * record.slot_bytes
        self.resident_bytes += by * record.slot_bytes
        self.record_bytes += by * record.record_bytes
        self.record_count += by

    def _leave(self, record: SsdRecord) -> None:
        self._change(record, SsdState.LEAVING)
        self.leaving_bytes += record.slot_bytes
        self.leaving_count += 1
        if not self.slabs.slab_of(record.slot).draining:
            self.coming[record.slot_bytes] += 1
        if record.logged:
            self._leaving[record] = None
        else:
            self._settle(record)

    def _settle(self, record: SsdRecord) -> None:
        """Give a slot back once its end is durable and nobody reads or writes it."""
        if record.state is not SsdState.LEAVING or record.logged or record.busy:
            return
        self._change(record, SsdState.FREE)
        self.leaving_bytes -= record.slot_bytes
        self.leaving_count -= 1
        if not self.slabs.slab_of(record.slot).draining:
            self.coming[record.slot_bytes] -= 1
        del self.records[record.slot]
        self.slabs.free(record.slot)

    def _change(self, record: SsdRecord, after: SsdState) -> None:
        if (record.state, after) not in SSD_TRANSITIONS:
            raise InvalidTransition(
                f"SSD slot {record.slot} of key {record.key.hex()}: {record.state.name} -> {after.name} must never "
                "happen"
            )
        record.state = after

    # -------------------------------------------------------------- reading

    def hold(self, record: SsdRecord) -> None:
        """A transfer reads a record: its slot is not used again before ``let_go``."""
        record.busy += 1

    def let_go(self, record: SsdRecord) -> None:
        """A transfer is over."""
        record.busy -= 1
        self._settle(record)

    # -------------------------------------------------------------- checkpoints and recovery

    def snapshot(self) -> tuple[list[NamespaceEntry], list[tuple[SsdRecord, int]]]:
        """Everything that a checkpoint says: namespaces as the log has them, stored records with their last uses.

        A later generation that the log does not have durably would be taken for that of earlier records in it.
        """
        namespaces = [
            NamespaceEntry(namespace.number, namespace.logged_generation, namespace.description)
            for namespace in self.namespaces.values()
            if namespace.logged_generation >= 0
        ]
        records = [
            (record, block.used)
            for namespace in self.namespaces.values()
            for block in namespace.tree.blocks.values()
            for record in block.parts.values()
        ]
        records.sort(key=lambda pair: pair[1])
        return namespaces, records

    def restore(self, namespaces: list[NamespaceEntry], puts: list[PutEntry]) -> int:
        """Take over what a log and its checkpoint say, oldest use first; how many records.

        Records that contradict others leave: of two blocks of a key the one that was used later stays, of two
        namespaces of a description the later one. A namespace of which nothing is left is not taken over.

        Precondition: empty, all slabs usable that hold slots, ``puts`` agree with each other about slots.
        """
        known = {entry.namespace: self._restored(entry) for entry in namespaces}
        latest = {namespace.description: number for number, namespace in sorted(known.items())}
        self.slabs.restore((put.slot, put.slot_pages * PAGE_BYTES) for put in puts)
        found: dict[SsdNamespace, dict[bytes, SsdBlock]] = {}
        for put in puts:
            namespace = known[put.namespace]
            record = self._restored_record(namespace, put)
            if latest[namespace.description] != put.namespace:
                self._leave(record)
                continue
            blocks = found.setdefault(namespace, {})
            block = blocks.get(put.key)
            if block is None or block.parent_key != put.parent_key:
                if block is not None:
                    self._let_all_leave(block)
                block = blocks[put.key] = SsdBlock(namespace, put.key, put.parent_key)
            block.used = put.access
            block.parts[put.part] = record
            self._count(block, record, 1)
        for namespace, blocks in found.items():
            for block in namespace.tree.fill(list(blocks.values())):
                del blocks[block.key]
                self._let_all_leave(block)
            for block in blocks.values():
                self.policy.insert(block, block.used)
            self.block_count += len(blocks)
        for number in latest.values():
            namespace = known[number]
            if namespace.tree.blocks or namespace.generation:
                self.namespaces[number] = namespace
        self.access = max((put.access for put in puts), default=0)
        return self.record_count

    def _restored(self, entry: NamespaceEntry) -> SsdNamespace:
        namespace = SsdNamespace(entry.namespace, entry.description, entry.generation)
        namespace.told = True
        namespace.logged_generation = entry.generation
        self._last_number = max(self._last_number, entry.namespace)
        return namespace

    def _restored_record(self, namespace: SsdNamespace, put: PutEntry) -> SsdRecord:
        record = SsdRecord(namespace, put.key, put.parent_key, put.part)
        record.slot, record.slot_bytes = put.slot, put.slot_pages * PAGE_BYTES
        record.home_bytes = put.home_pages * PAGE_BYTES
        record.record_bytes, record.checksum = put.record_bytes, put.checksum
        record.codec, record.fidelity, record.token_count = put.codec, put.fidelity, put.token_count
        record.logged = True
        record.state = SsdState.STORED
        self.records[put.slot] = record
        return record

    def restored_namespaces(self, most: int) -> list[SsdNamespace]:
        """At most so many namespaces, those that were used last; all others are over."""
        last_used = {
            namespace: max((block.used for block in namespace.tree.blocks.values()), default=0)
            for namespace in self.namespaces.values()
        }
        kept = sorted(last_used, key=last_used.__getitem__)
        for namespace in kept[: max(len(kept) - most, 0)]:
            self.empty(namespace)
            del self.namespaces[namespace.number]
        return list(self.namespaces.values())

    def blocks(self) -> Iterator[SsdBlock]:
        """All blocks."""
        for namespace in self.namespaces.values():
            yield from namespace.tree.blocks.values()
