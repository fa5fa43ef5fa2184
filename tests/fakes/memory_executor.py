"""Carries out the store's instructions on slots and an index that hold objects, and sees every misuse of them."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from kvstore.core.block import Record, RecordState
from kvstore.core.events import Displaced, Event, Quiesced, SlotWanted
from kvstore.core.instructions import (
    Demote,
    EndNamespace,
    Grant,
    Instruction,
    Move,
    Publish,
    Refuse,
    Replace,
    TryAgain,
    Withdraw,
)
from kvstore.core.store import Store

Identity = tuple[int, bytes, int]
"""What an index entry is looked up with: namespace id, key, part."""

EMPTY: Final = "empty"
"""What a slot holds that nobody wrote since it was free."""

MAX_TRIES: Final = 10_000


def spread(buckets: int) -> Callable[[Identity], tuple[int, int]]:
    """Two buckets of ``buckets`` for each identity, the same ones in every run."""

    def places(identity: Identity) -> tuple[int, int]:
        namespace_id, key, part = identity
        number = zlib.crc32(b"%d %d " % (namespace_id, part) + key)
        return number % buckets, number // buckets % buckets

    return places


@dataclass
class MemoryExecutor:
    """An arena of objects with pins, and an index of what is published.

    Attributes:
        store: the state.
        now_ns: the time that events carry.
        contents: what each slot holds; a slot that is not there was never written or is free again.
        index: slot of each published record by its identity.
        ended: namespace ids whose generation is over.
        places: the two buckets of an identity, each of which has room for ``bucket_entries``; None: room for all.
        quiesce_at_once: answer ``Quiesced`` for slots that nobody pins as soon as they are withdrawn; else they wait
            for ``quiesce``.
        demote: takes records that are to be written below.
        last: instructions of the last event, those of its repetitions included; a ``Displaced`` stands before its own.
    """

    store: Store
    now_ns: int = 0
    contents: dict[int, object] = field(default_factory=dict)
    index: dict[Identity, int] = field(default_factory=dict)
    ended: set[int] = field(default_factory=set)
    places: Callable[[Identity], tuple[int, int]] | None = None
    bucket_entries: int = 2
    quiesce_at_once: bool = True
    demote: Callable[[Demote], None] | None = None
    last: list[Instruction | Displaced] = field(default_factory=list)
    _entries: dict[int, Identity] = field(default_factory=dict)
    _buckets: dict[int, set[int]] = field(default_factory=dict)
    _bucket_of: dict[int, int] = field(default_factory=dict)
    _pins: Counter[int] = field(default_factory=Counter)
    _pinned: dict[int, object] = field(default_factory=dict)
    _withdrawn: set[int] = field(default_factory=set)

    def apply(self, event: Event) -> Instruction | None:
        """Give an event to the store and carry out what it wants; its answer, where it has one."""
        self.last = []
        answer = self._apply(event)
        self._require_published()
        return answer

    def _apply(self, event: Event) -> Instruction | None:
        answer: Instruction | None = None
        for instruction in self.store.handle(event, self.now_ns):
            assert answer is None, f"{instruction} stands behind the answer {answer}"
            self.last.append(instruction)
            if isinstance(instruction, Withdraw):
                self._withdraw(instruction.slots)
            elif isinstance(instruction, Publish):
                self._publish(instruction.records)
            elif isinstance(instruction, Replace):
                self._replace(instruction)
            elif isinstance(instruction, Move):
                self._move(instruction)
            elif isinstance(instruction, Demote):
                assert self.demote is not None
                self.demote(instruction)
            elif isinstance(instruction, EndNamespace):
                self._end_namespace(instruction.namespace_id)
            else:
                answer = instruction
        return answer

    def _require_published(self) -> None:
        """Exactly the resident records can be found in the index, once an event is carried out."""
        published, resident = len(self.index), self.store.record_count
        assert published == resident, f"{published} records are published, {resident} are resident"

    def want_slot(
        self, session: int, record_bytes: int, access: int = 0, namespace_id: int = 0, parent_key: bytes = b""
    ) -> Record | Refuse:
        """A granted slot, or why there is none."""
        self.last = []
        wanted = SlotWanted(session, record_bytes, access=access, namespace_id=namespace_id, parent_key=parent_key)
        for _ in range(MAX_TRIES):
            answer = self._apply(wanted)
            self._require_published()
            if isinstance(answer, Grant):
                self._require_free(answer.record.slot)
                return answer.record
            if isinstance(answer, Refuse):
                return answer
            assert isinstance(answer, TryAgain), f"{answer} is no answer to SlotWanted"
        raise AssertionError(f"no answer after {MAX_TRIES} tries for a slot")

    def want_slot_ahead(self, session: int, record_bytes: int) -> Record | Refuse:
        """A granted slot for later, for which nothing is done; or why there is none."""
        answer = self.apply(SlotWanted(session, record_bytes, ahead=True))
        assert self.last == [answer], f"{self.last} was done for a slot that nobody needs yet"
        if isinstance(answer, Grant):
            self._require_free(answer.record.slot)
            return answer.record
        assert isinstance(answer, Refuse), f"{answer} is no answer to SlotWanted for later"
        return answer

    def _require_free(self, slot: int) -> None:
        assert slot not in self.contents, f"slot {slot} is granted but holds {self.contents[slot]}"
        assert slot not in self._pins, f"slot {slot} is granted while a transfer reads it"
        assert slot not in self._withdrawn, f"slot {slot} is granted while it waits to be quiesced"
        assert slot not in self._entries, f"slot {slot} is granted while {self._entries[slot]} is published in it"

    def write(self, slot: int, content: object) -> None:
        """A client writes a granted slot."""
        assert self.store.records[slot].state is RecordState.GRANTED
        assert slot not in self._pins
        self.contents[slot] = content

    def pin(self, slot: int) -> None:
        """A transfer reads a slot until ``unpin``."""
        self._pins[slot] += 1
        self._pinned[slot] = self.contents[slot]

    def unpin(self, slot: int) -> None:
        """A transfer is over; it must have read the same all the time."""
        assert self.contents[slot] == self._pinned[slot], f"slot {slot} changed while it was read"
        self._pins[slot] -= 1
        if not self._pins[slot]:
            del self._pins[slot], self._pinned[slot]
            if slot in self._withdrawn and self.quiesce_at_once:
                self.quiesce([slot])

    @property
    def pinned(self) -> list[int]:
        """Slots that transfers read."""
        return sorted(self._pins)

    @property
    def waiting(self) -> list[int]:
        """Withdrawn slots that could be quiesced now."""
        return sorted(self._withdrawn - set(self._pins))

    def quiesce(self, slots: list[int]) -> None:
        """Answer ``Quiesced`` for withdrawn slots."""
        for slot in slots:
            assert slot not in self._pins
            self._withdrawn.remove(slot)
            self.contents.pop(slot, None)
        assert self.store.handle(Quiesced(slots), self.now_ns) == []

    def _withdraw(self, slots: list[int]) -> None:
        assert slots, "an empty Withdraw"
        for slot in slots:
            assert self.store.records[slot].state is RecordState.LIMBO
            assert slot not in self._withdrawn, f"slot {slot} is withdrawn twice"
            if slot in self._entries:
                namespace_id = self._unpublish(slot)[0]
                state = self.store.namespaces.by_id.get(namespace_id)
                current = state is not None and state.current
                assert current or namespace_id in self.ended, f"namespace {namespace_id} was not ended before its slots"
        self._withdrawn.update(slots)
        if self.quiesce_at_once:
            free = [slot for slot in slots if slot not in self._pins]
            if free:
                self.quiesce(free)

    def _replace(self, replace: Replace) -> None:
        record = replace.record
        assert self._entries.get(replace.slot) == self._identity(record), f"{replace} is of another block"
        assert record.state is RecordState.RESIDENT
        assert self.store.records[replace.slot].state is RecordState.LIMBO
        assert record.slot in self.contents, f"slot {record.slot} is published and was never written"
        assert record.slot not in self._entries, f"slot {record.slot} is published twice"
        bucket = self._bucket_of.get(replace.slot)
        self._enter(self._unpublish(replace.slot), record.slot, bucket)

    def _move(self, move: Move) -> None:
        assert move.target not in self.contents, f"slot {move.target} is written but holds something"
        assert move.target not in self._pins
        assert move.source not in self._withdrawn, f"slot {move.source} is copied after it was withdrawn"
        self.contents[move.target] = self.contents[move.source]
        assert move.source in self._entries, f"slot {move.source} is moved although it is not published"
        bucket = self._bucket_of.get(move.source)
        identity = self._unpublish(move.source)
        assert self._identity(self.store.records[move.target]) == identity
        self._enter(identity, move.target, bucket)

    # -------------------------------------------------------------- the index

    @staticmethod
    def _identity(record: Record) -> Identity:
        assert record.block is not None, f"slot {record.slot} is of no block"
        return record.block.namespace.id, record.block.key, record.part

    def _publish(self, records: list[Record]) -> None:
        assert records, "an empty Publish"
        left = []
        for record in records:
            identity, slot = self._identity(record), record.slot
            assert self.store.records.get(slot) is record, f"slot {slot} is published and not the store's"
            assert record.state is RecordState.RESIDENT, f"slot {slot} is published as {record.state.name}"
            assert slot in self.contents, f"slot {slot} is published and was never written"
            assert slot not in self._entries, f"slot {slot} is published twice"
            assert identity not in self.index, f"{identity} is published in two slots"
            assert identity[0] not in self.ended, f"{identity} is published in a namespace that is over"
            if self.places is None:
                self._enter(identity, slot, None)
                continue
            emptiest = min(self.places(identity), key=lambda bucket: len(self._buckets.get(bucket, ())))
            if len(self._buckets.get(emptiest, ())) < self.bucket_entries:
                self._enter(identity, slot, emptiest)
            else:
                left.append(record)
        for record in left:
            # Making room for an earlier one may have cost this one its place.
            if record.block is not None:
                assert self.places is not None
                buckets = dict.fromkeys(self.places(self._identity(record)))
                others = [slot for bucket in buckets for slot in sorted(self._buckets.get(bucket, ()))]
                displaced = Displaced(record.slot, others)
                self.last.append(displaced)
                assert self._apply(displaced) is None

    def _enter(self, identity: Identity, slot: int, bucket: int | None) -> None:
        self.index[identity] = slot
        self._entries[slot] = identity
        if bucket is not None:
            self._buckets.setdefault(bucket, set()).add(slot)
            self._bucket_of[slot] = bucket

    def _unpublish(self, slot: int) -> Identity:
        identity = self._entries.pop(slot)
        del self.index[identity]
        if slot in self._bucket_of:
            self._buckets[self._bucket_of.pop(slot)].discard(slot)
        return identity

    def _end_namespace(self, namespace_id: int) -> None:
        assert namespace_id not in self.ended, f"namespace {namespace_id} ends twice"
        state = self.store.namespaces.by_id.get(namespace_id)
        assert state is None or not state.current
        self.ended.add(namespace_id)

    def forget(self, slot: int) -> None:
        """A grant came back without being published."""
        self.contents.pop(slot, None)
