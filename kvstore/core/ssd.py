"""The SSD tier's state machine: which record lies in which slot of the slab file, and what the log must say; no I/O.

A record's life: its slot is taken (``begin``), its bytes are written, its group is logged (``begin_group``,
``end_group``), and only then it can be found. When it leaves, its slot is used again only after a later group has
logged that. Whoever carries out the I/O calls these methods in that order; ``docs/ssd-format.md`` says why.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import islice
from typing import Final

from kvstore.core.ssd_record import SsdBlock, SsdNamespace, SsdRecord, SsdState
from kvstore.core.ssd_restore import SsdRestoring
from kvstore.core.ssd_room import SsdRoom
from kvstore.core.watching import Cause
from kvstore.format.ssd_log import EmptyEntry, Entry, FreeEntry, NamespaceEntry, TouchEntry

MOST_FREES: Final = 8192
"""Most ends of records that one frame says."""

MOST_TOUCHES: Final = 65_536
"""Touches that wait for the next group; more are left out: the order of the least used suffers after a crash."""


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


class SsdStore(SsdRoom, SsdRestoring):
    """The state of the SSD tier. See ``SsdBook`` for its arguments."""

    def namespace(self, description: bytes, generation: int) -> SsdNamespace:
        """A namespace that gets its first block here."""
        self._last_number += 1
        found = SsdNamespace(self._last_number, description, generation, self.tenants)
        self.namespaces[found.number] = found
        return found

    def take_emptied(self) -> list[SsdNamespace]:
        """Namespaces that had nothing stored or on its way any more at some time since the last call."""
        emptied = list(self._emptied)
        self._emptied.clear()
        return emptied

    def advance(self, namespace: SsdNamespace, generation: int) -> None:
        """A namespace is in a later generation: all its records are over."""
        self._end_all(namespace, Cause.INVALIDATED)
        namespace.begin_generation(generation)
        if namespace.told:
            self._said.append(NamespaceEntry(namespace.number, generation, namespace.description))

    def empty(self, namespace: SsdNamespace) -> int:
        """All records of a namespace are over; how many blocks."""
        count = len(namespace.tree.blocks)
        self.counters.removed_blocks += count
        said = bool(count) or any(record.logged for record in namespace.writing.values())
        self._end_all(namespace, Cause.CLEARED)
        if said:
            self._said.append(EmptyEntry(namespace.number))
        return count

    def _end_all(self, namespace: SsdNamespace, cause: Cause) -> None:
        namespace.ended += 1
        for record in list(namespace.writing.values()):
            self._cancel(record)
        ended = list(namespace.tree.blocks.values())
        records = [record for block in ended for record in block.parts.values()]
        for block in ended:
            self._unlink(block, cause)
        for record in records:
            if self._leaving.pop(record, 0) is None:
                self._covered[record] = None

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
        new = block is None
        if block is None:
            block = SsdBlock(namespace, key, record.parent_key)
            block.used = record.access
            namespace.tree.insert(block, record.depth)
            self.block_count += 1
        held_bytes = block.slot_bytes
        before = block.parts.get(record.part)
        if before is not None:
            self._detach(block, before)
            self._leave(before)
        block.parts[record.part] = record
        self._count(block, record, 1)
        if new:
            self.policy.insert(block, record.access)
            self.on_stored(block)
        else:
            self.policy.resized(block, held_bytes)
        self._writing_over(record)
        self.counters.stored_records += 1
        self.counters.stored_bytes += record.record_bytes

    def touch(self, block: SsdBlock, access: int, hits: int = 1) -> None:
        """A block, and so the ``hits - 1`` ancestors next above it, were used, here or in DRAM."""
        if access > self.access:
            self.access = access
        if access <= block.used:
            return
        block.used = access
        self.policy.touch(block, hits, access)
        if len(self._touched) < MOST_TOUCHES or block in self._touched:
            self._touched[block] = access

    def remove(self, block: SsdBlock, cause: Cause = Cause.REMOVED) -> None:
        """A block is removed; children keep their depth."""
        self.counters.removed_blocks += 1
        self._unlink(block, cause)

    def remove_key(self, namespace: SsdNamespace, key: bytes, cause: Cause = Cause.REMOVED) -> bool:
        """A block is removed, by key, and what of it is being written; whether any of it was stored."""
        namespace.ended += 1
        if namespace.writing:
            for place in [place for place in namespace.writing if place[0] == key]:
                self._cancel(namespace.writing[place])
        block = namespace.tree.blocks.get(key)
        if block is not None:
            self.remove(block, cause)
        return block is not None

    def corrupt(self, record: SsdRecord) -> None:
        """A stored record's bytes are not what was written: it is over."""
        if record.state is not SsdState.STORED:
            return
        self.counters.corrupt_records += 1
        block = record.namespace.tree.blocks[record.key]
        if len(block.parts) == 1:
            self._unlink(block, Cause.CORRUPT)
            return
        held_bytes = block.slot_bytes
        self._detach(block, record)
        self._leave(record)
        self.policy.resized(block, held_bytes)

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
