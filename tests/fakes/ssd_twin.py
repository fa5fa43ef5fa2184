"""The I/O of the SSD tier in memory: slots that hold objects, logs and checkpoints of real frames, groups, crashes.

What ``kvstore.server.ssd_demotion``, ``ssd_groups`` and ``ssd_recovery`` do, one step at a time and in any order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from fakes.memory_executor import MemoryExecutor

from kvstore.core.block import Block, Record, RecordState
from kvstore.core.events import Demoted, SsdChanged
from kvstore.core.instructions import Demote
from kvstore.core.pools import pooled
from kvstore.core.slabs import SlabAllocator
from kvstore.core.ssd import Group, SsdStore
from kvstore.core.ssd_invariants import validate_ssd
from kvstore.core.ssd_record import SsdNamespace, SsdRecord, SsdState
from kvstore.core.ssd_replay import Replayed
from kvstore.core.tenants import tenants_of
from kvstore.format.constants import PAGE_BYTES
from kvstore.format.ssd_files import CHECKPOINT_MAGIC, FILE_HEADER_BYTES, LOG_MAGIC, NumberedHeader
from kvstore.format.ssd_files import encode_numbered_header as encode_header
from kvstore.format.ssd_log import EndEntry, Entry, Frames, encode_entry, encode_frame, frame_seed
from kvstore.policy.base import PolicyContext
from kvstore.policy.lru import Lru

STORE_ID = bytes(range(16))
LOST = "lost"
"""What a slot holds whose write was not synced before a crash."""


@dataclass
class File:
    """A log or checkpoint: its header, then whole frames, then maybe what is left of one."""

    magic: bytes
    number: int
    data: bytearray = field(default_factory=bytearray)
    frames: int = 0

    def __post_init__(self) -> None:
        self.data += encode_header(NumberedHeader(self.magic, self.number, STORE_ID))

    def frame(self, entries: list[Entry]) -> bytes:
        seed = frame_seed(bytes(self.data[:FILE_HEADER_BYTES]))
        return encode_frame(seed, self.frames, [encode_entry(entry) for entry in entries])

    def append(self, entries: list[Entry]) -> None:
        self.data += self.frame(entries)
        self.frames += 1


@dataclass
class _Waiting:
    record: Record
    block: Block
    part: int
    slot: int
    slot_bytes: int
    access: int
    ended: int


class SsdTwin:
    """The tier's files and what is on its way to them; ``attach`` before use.

    Attributes:
        contents: what each slot of the slab file holds.
        flying: records that are being written, with what.
        written: records whose bytes were written.
        group: what is being logged, and the records that it was begun with.
        failures: of writes and groups since the start or the last crash.
        files: the checkpoint, if there is one, and the logs behind it.
    """

    def __init__(
        self, slabs: int, slab_pages: int, max_records: int = 1 << 30, quotas: Mapping[str, int] | None = None
    ) -> None:
        self.slabs, self.slab_pages, self.max_records = slabs, slab_pages, max_records
        self.quotas = quotas or {}
        self.contents: dict[int, object] = {}
        self.unsynced: set[int] = set()
        self.files: list[File] = [File(LOG_MAGIC, 0)]
        self.ssd = self._store()
        self._clear()

    def _clear(self) -> None:
        self.queue: deque[_Waiting] = deque()
        self.flying: dict[SsdRecord, tuple[object, int]] = {}
        self.written: list[SsdRecord] = []
        self.group: tuple[Group, list[SsdRecord]] | None = None
        self.writable = True
        self.failures = 0
        self.checkpoint_due = False

    def _store(self) -> SsdStore:
        tenants = tenants_of(self.quotas).values()
        policy = pooled(Lru, PolicyContext(self.slabs * self.slab_pages * PAGE_BYTES, lambda: 0), tenants)
        return SsdStore(self._allocator(), policy, self.max_records, tenants)

    def _allocator(self) -> SlabAllocator:
        slabs = SlabAllocator(self.slabs, self.slab_pages * PAGE_BYTES, 1, most_joined=1)
        for index in range(self.slabs):
            slabs.make_usable(index)
        return slabs

    def attach(self, executor: MemoryExecutor) -> None:
        """Write below what this store wants written; it has ``ssd`` below it."""
        self.executor = executor
        executor.demote = self.demote
        executor.apply(SsdChanged(writable=True))

    # -------------------------------------------------------------- writing

    def demote(self, instruction: Demote) -> None:
        assert self.writable, "something is to be written although that fails"
        for record, access in zip(instruction.records, instruction.accesses, strict=True):
            assert record.block is not None
            self.executor.pin(record.slot)
            below = record.block.namespace.ssd
            ended = record.block.namespace.ended if below is None else below.ended
            self.queue.append(
                _Waiting(record, record.block, record.part, record.slot, record.slot_bytes, access, ended)
            )

    def pump(self, most: int = 1 << 30) -> int:
        """Begin to write what waits; how many."""
        begun = 0
        given_up: list[Block] = []
        while self.queue and begun < most:
            waiting = self.queue[0]
            block = waiting.block
            namespace = block.namespace
            below = namespace.ssd
            if namespace.current and below is None:
                below = namespace.ssd = self.ssd.namespace(namespace.canonical, namespace.generation)
                below.state, below.ended = namespace.id, namespace.ended
            if below is None or not self._wanted(waiting, below):
                self._drop()
                continue
            place = (block.key, waiting.part)
            if place in below.writing or self.ssd.holds(below, *place, waiting.record.fidelity):
                self._drop()
                if (
                    block.retired
                    and block.parts
                    and not any((block.key, part) in below.writing for part in block.parts)
                ):
                    given_up.append(block)
                continue
            if waiting.slot_bytes > self.ssd.slabs.slab_bytes:
                self._drop()
                given_up.append(block)
                continue
            record = self.ssd.begin(
                below, block.key, block.parent_key, waiting.part, waiting.slot_bytes, block.depth, waiting.access
            )
            if record is None and self.ssd.over_quota(below, waiting.slot_bytes):
                self._drop()
                given_up.append(block)
                continue
            if record is None:
                break
            assert record.slot not in self.unsynced or record.slot in self.contents
            self.queue.popleft()
            source = waiting.record
            record.record_bytes, record.checksum = source.record_bytes, source.checksum
            record.codec, record.fidelity = source.codec, source.fidelity
            self.flying[record] = (self.executor.contents[waiting.slot], waiting.slot)
            begun += 1
        if given_up:
            self.executor.apply(Demoted([], given_up))
        return begun

    @staticmethod
    def _wanted(waiting: _Waiting, below: SsdNamespace) -> bool:
        block = waiting.block
        if block.parts:
            return block.parts.get(waiting.part) is waiting.record or waiting.record.state is not RecordState.RESIDENT
        return block.retired and below.ended == waiting.ended

    def _drop(self) -> None:
        self.executor.unpin(self.queue.popleft().slot)

    def finish_write(self, place: int = 0) -> SsdRecord:
        """One of the writes on its way ends."""
        record = list(self.flying)[place % len(self.flying)]
        content, slot = self.flying.pop(record)
        self.contents[record.slot] = content
        self.unsynced.add(record.slot)
        self.executor.unpin(slot)
        if self.writable:
            self.written.append(record)
        else:
            self.ssd.fail(record)
            self.ssd.written(record)
        return record

    def fail_write(self, place: int = 0) -> None:
        """One of the writes on its way fails; what its slot holds is not known."""
        record = list(self.flying)[place % len(self.flying)]
        _, slot = self.flying.pop(record)
        self.contents[record.slot] = LOST
        self.executor.unpin(slot)
        self.ssd.fail(record)
        self.ssd.written(record)
        self.degrade()

    def degrade(self) -> None:
        """Nothing is written any more."""
        self.writable = False
        self.failures += 1
        for record in self.written:
            self.ssd.fail(record)
            self.ssd.written(record)
        self.written.clear()
        while self.queue:
            self._drop()
        self.executor.apply(SsdChanged(writable=False))

    def resume(self) -> None:
        """Another log is begun, and everything can be written again."""
        assert self.group is None
        self.begin_log()
        self.writable = True
        self.executor.apply(SsdChanged(writable=True))

    # -------------------------------------------------------------- groups

    def begin_group(self) -> None:
        """The slab file is synced; the frame is on its way."""
        assert self.group is None
        written, self.written = self.written, []
        if written:
            self.unsynced.clear()
        self.group = (self.ssd.begin_group(written), written)

    def end_group(self) -> list[SsdRecord]:
        """The frame is durable."""
        assert self.group is not None
        (group, written), self.group = self.group, None
        self.files[-1].append(group.entries)
        ended = self.ssd.end_group(group)
        for record in written:
            self.ssd.written(record)
        if ended:
            self.executor.apply(Demoted(ended))
        return ended

    def fail_group(self, torn: int) -> None:
        """Nobody knows what of the frame is durable: so many bytes of it are, or all."""
        assert self.group is not None
        (group, written), self.group = self.group, None
        self._tear(group, torn)
        self.ssd.fail_group(group)
        for record in written:
            self.ssd.fail(record)
            self.ssd.written(record)
        self.degrade()

    def _tear(self, group: Group, torn: int) -> None:
        self.files[-1].data += self.files[-1].frame(group.entries)[:torn]

    def settle(self) -> None:
        """Write and log all that waits."""
        for _ in range(10_000):
            self.pump()
            while self.flying:
                self.finish_write()
            if self.group is None:
                if not self.written and not self.ssd.something_to_log and not self.queue:
                    return
                self.begin_group()
            self.end_group()
        raise AssertionError("what waits is never written")

    # -------------------------------------------------------------- checkpoints, crashes

    def begin_log(self) -> None:
        """Another log takes the place of the one that is appended to."""
        assert self.group is None
        self.files.append(File(LOG_MAGIC, self.files[-1].number + 1))
        self.checkpoint_due = True

    def checkpoint(self) -> None:
        """What holds now takes the place of all logs before the last one."""
        self.checkpoint_due = False
        last = self.files[-1]
        file = File(CHECKPOINT_MAGIC, last.number)
        namespaces, records = self.ssd.snapshot()
        file.append(list(namespaces))
        for begin in range(0, len(records), 3):
            file.append([self.ssd.put_entry(record, used) for record, used in records[begin : begin + 3]])
        file.append([EndEntry(len(records))])
        self.files = [file, last]

    def replay(self, data: list[bytes]) -> Replayed:
        """What files say together."""
        state = Replayed()
        for file in data:
            frames = Frames(file, FILE_HEADER_BYTES)
            for entries in frames:
                state.take(entries)
            assert not frames.skip(), "something is taken for a frame behind a torn one"
        return state

    def crash(self, torn: int) -> SsdStore:
        """The machine stops while so many bytes of the frame that was on its way are there; the state afterwards."""
        if self.group is not None:
            self._tear(self.group[0], torn)
        for slot in self.unsynced:
            self.contents[slot] = LOST
        self.unsynced.clear()
        state = self.replay([bytes(file.data) for file in self.files])
        puts = state.settle(self.slab_pages * PAGE_BYTES, 1, self.slabs)
        assert not state.dropped, "records contradict each other"
        self.files.append(File(LOG_MAGIC, self.files[-1].number + 1))
        self.ssd = self._store()
        self.ssd.restore(list(state.namespaces.values()), puts)
        validate_ssd(self.ssd)
        self._clear()
        return self.ssd

    def stored(self) -> list[SsdRecord]:
        """All records that can be read."""
        return [record for record in self.ssd.records.values() if record.state is SsdState.STORED]
