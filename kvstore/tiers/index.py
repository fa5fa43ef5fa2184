"""The DRAM tier's index in shared memory: what lets clients read without asking. See ``docs/mapped.md``.

Covers: the file, and the compiled calls that write it. Does not cover: which record is readable (``kvstore.core``).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from kvstore.core.block import Record
from kvstore.format.constants import PAGE_BYTES
from kvstore.mapped.index_file import (
    BUCKET_OFFSET,
    CODEC_SHIFT,
    FIDELITY_SHIFT,
    NAMESPACE_ENTRY_BYTES,
    NAMESPACE_LAYOUT,
    NAMESPACE_OFFSET,
    PART_SHIFT,
    STATE_OFFSET,
    STATE_SHIFT,
    EntryState,
    IndexHeader,
    IndexState,
    NamespaceWord,
    encode_index_header,
)
from kvstore.mapped.index_writer import PUBLISH_WORDS, candidates, move, publish, replace, rescan, withdraw
from kvstore.tiers.files import SharedFile

_RECORD: Final = struct.Struct("<32sQQQQ")
_KEY: Final = struct.Struct("<4q")
_STATE: Final = struct.Struct("<Q")
_LIVE: Final = int(EntryState.LIVE) << STATE_SHIFT
_STEP: Final = 512
"""Records published, or slots withdrawn, by one call."""

_RESULT: Final = PUBLISH_WORDS - 1
_CANDIDATES: Final = 14

Words = npt.NDArray[np.int64]


class Index:
    """The index file of one incarnation.

    Args:
        path: must not exist.
        header: what its first page will say.
        mode: permissions of the file; others than the daemon get to read it at most.
        gid: its group, -1 for the user's.

    Raises:
        InsufficientMemory: there is no room for it. The whole file gets its memory here, so that neither the daemon nor
            a client can fault on it later.
    """

    def __init__(self, path: Path, header: IndexHeader, mode: int, gid: int = -1) -> None:
        self.header = header
        self._file = SharedFile(path, header.index_bytes, mode & 0o644, gid)
        try:
            self._file.allocate(0, header.index_bytes)
            self._file.populate(0, header.index_bytes)
            self._file.lock_for_life()
        except BaseException:
            self._file.close()
            raise
        memory = self._file.map
        encoded = encode_index_header(header)
        memory[: len(encoded)] = encoded
        memory[STATE_OFFSET : STATE_OFFSET + 8] = _STATE.pack(IndexState.LIVE)
        self._words: Words | None = np.frombuffer(memory, np.int64)
        self._buckets = int(self._words.ctypes.data) + BUCKET_OFFSET
        self._slot_count = header.arena_bytes // PAGE_BYTES
        # Touched only where slots begin.
        self._entries: Words = np.zeros(self._slot_count, np.int64)
        self._entries_at = int(self._entries.ctypes.data)
        self._records: Words = np.zeros(_STEP * PUBLISH_WORDS, np.int64)
        self._records_at = int(self._records.ctypes.data)
        self._record_bytes = self._records.data.cast("B")
        self._slots: Words = np.zeros(_STEP, np.int64)
        self._slots_at = int(self._slots.ctypes.data)
        self._hazards: Words = np.zeros(0, np.int64)
        self._hazards_at = 0
        self.overflows = 0

    @property
    def path(self) -> Path:
        """The file."""
        return self._file.path

    def watch_hazards(self, addresses: Sequence[int]) -> None:
        """Say where the hazard words of all clients are; each must stay valid until it is not named any more."""
        self._hazards = np.array(addresses, np.int64)
        self._hazards_at = int(self._hazards.ctypes.data)

    # -------------------------------------------------------------- namespaces

    def begin_namespace(self, identity: int, generation: int, parts: int, digest: bytes) -> None:
        """Let clients read a namespace's records; may be called again."""
        at = NAMESPACE_OFFSET + identity * NAMESPACE_ENTRY_BYTES
        packed = NAMESPACE_LAYOUT.pack(NamespaceWord.CURRENT, generation, parts, 0, digest)
        # The state last: a client looks at an id that it was given after this returned.
        self._file.map[at + 8 : at + len(packed)] = packed[8:]
        self._file.map[at : at + 8] = packed[:8]

    def end_namespace(self, identity: int) -> None:
        """Tell clients that a namespace's generation is over, before its entries go."""
        assert self._words is not None
        # One aligned store of a word; on its way to other processors before the entries' changes, which release it.
        self._words[(NAMESPACE_OFFSET + identity * NAMESPACE_ENTRY_BYTES) // 8] = int(NamespaceWord.OVER)

    # -------------------------------------------------------------- records

    def publish(self, records: Sequence[Record]) -> list[Record]:
        """Make records readable; those for which both buckets are full are returned."""
        left: list[Record] = []
        for begin in range(0, len(records), _STEP):
            some = records[begin : begin + _STEP]
            at = 0
            for record in some:
                self._pack(record, at)
                at += _RECORD.size
            header = self.header
            full = publish(
                self._buckets, header.bucket_count, header.hash_seed, self._entries_at, self._records_at, len(some)
            )
            if full:
                self.overflows += full
                results = self._records[_RESULT : len(some) * PUBLISH_WORDS : PUBLISH_WORDS].tolist()
                left += [record for record, result in zip(some, results, strict=True) if not result]
        return left

    def replace(self, slot: int, record: Record) -> None:
        """Let readers of a published record find another one of its block and part in its place."""
        self._pack(record, 0)
        replaced = replace(self._buckets, self._entries_at, slot, self._records_at)
        assert replaced, f"slot {slot} was to be replaced and is not published"

    def _pack(self, record: Record, at: int) -> None:
        block = record.block
        assert block is not None
        identity = (
            block.namespace.id
            | record.part << PART_SHIFT
            | record.codec << CODEC_SHIFT
            | _LIVE
            | record.fidelity << FIDELITY_SHIFT
        )
        place = record.slot | record.record_bytes << 32
        _RECORD.pack_into(self._record_bytes, at, block.key, place, identity, record.checksum, 0)

    def others(self, record: Record) -> list[int]:
        """The slots of the records in both buckets of one that found no room."""
        block = record.block
        assert block is not None
        word0, word1, word2, word3 = _KEY.unpack(block.key)
        who = block.namespace.id | record.part << PART_SHIFT
        header = self.header
        where = (self._buckets, header.bucket_count, header.hash_seed)
        count = candidates(*where, word0, word1, word2, word3, who, self._slots_at)
        found: list[int] = self._slots[: min(count, _CANDIDATES)].tolist()
        return found

    def withdraw(self, slots: list[int]) -> list[int]:
        """Make slots unreadable; those of them that a client reads in place at this moment."""
        return self._held(slots, first=True)

    def still_read(self, slots: list[int]) -> list[int]:
        """Of slots that were withdrawn earlier, those that a client still reads in place."""
        return self._held(slots, first=False)

    def _held(self, slots: list[int], *, first: bool) -> list[int]:
        held: list[int] = []
        for begin in range(0, len(slots), _STEP):
            some = slots[begin : begin + _STEP] if len(slots) > _STEP else slots
            count = len(some)
            self._slots[:count] = some
            where = (self._hazards_at, len(self._hazards), self._slots_at, count)
            if first:
                hazarded = withdraw(self._buckets, self._entries_at, self._slot_count, *where)
            else:
                hazarded = rescan(self._entries_at, self._slot_count, *where)
            if hazarded:
                held += [-slot - 1 for slot in self._slots[:count].tolist() if slot < 0]
        return held

    def move(self, source: int, target: int) -> None:
        """Let a record's readers find it in another slot, to which it was copied."""
        move(self._buckets, self._entries_at, source, target)

    def sequence(self, slot: int) -> int:
        """Sequence of a slot's entry, -1 where it has none."""
        number = int(self._entries[slot]) if 0 <= slot < self._slot_count else 0
        if number <= 0:
            return -1
        assert self._words is not None
        return int(self._words[(BUCKET_OFFSET // 8) + 8 * number])

    def close(self) -> None:
        """Tell clients that nobody answers for the file any more, remove its name, unmap."""
        if self._words is not None:
            self._words[STATE_OFFSET // 8] = int(IndexState.DEAD)
            self._words = None
        self._file.close()
