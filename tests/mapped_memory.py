"""Index, arena and client file in plain memory, driven by the compiled functions themselves: no daemon, no files."""

from __future__ import annotations

import hashlib
import struct

import numpy as np
import numpy.typing as npt

from kvstore.format.record import encode_header, raw_header
from kvstore.mapped import context as fields
from kvstore.mapped.client_file import CLIENT_FILE_BYTES, HAZARD_OFFSET, STATE_OFFSET
from kvstore.mapped.index_file import (
    BUCKET_OFFSET,
    NAMESPACE_ENTRY_BYTES,
    NAMESPACE_OFFSET,
)
from kvstore.mapped.index_file import STATE_OFFSET as EPOCH_OFFSET
from kvstore.mapped.index_writer import move, publish, replace, rescan, withdraw

Words = npt.NDArray[np.int64]
DIGEST = bytes(range(32))
_RECORD = struct.Struct("<32sQQQQ")
_LIVE_RAW = 1 << 48 | 1 << 32


def key_of(number: int) -> bytes:
    return hashlib.sha256(number.to_bytes(8, "little")).digest()


def aligned(words: int, alignment: int = 4096) -> tuple[Words, int]:
    """Zeroed words whose first lies on a border; and its address."""
    memory = np.zeros(words + alignment // 8, np.int64)
    skipped = (-int(memory.ctypes.data) % alignment) // 8
    view = memory[skipped : skipped + words]
    return view, int(view.ctypes.data)


class MappedMemory:
    """What daemon and one client share, with slots of one page or more.

    Attributes:
        context: address of the client's context.
    """

    namespace = 3

    def __init__(self, pages: int = 256, buckets: int = 8, verify_every: int = 0, parts: int = 1) -> None:
        self.pages = pages
        self.bucket_count = buckets
        self.index, self.index_at = aligned((BUCKET_OFFSET + 512 * buckets) // 8)
        self.arena, self.arena_at = aligned(pages * 512)
        self.file, self.file_at = aligned(CLIENT_FILE_BYTES // 8)
        self.entries = np.zeros(pages, np.int64)
        self.entries_at = int(self.entries.ctypes.data)
        self.buckets_at = self.index_at + BUCKET_OFFSET
        self.seed = 0x1234_5678_9ABC_DEF
        self.index[EPOCH_OFFSET // 8] = 1
        self.set_namespace(1)
        self.file[STATE_OFFSET // 8] = 1
        self.hazards = np.array([self.file_at + HAZARD_OFFSET], np.int64)
        self._recent = np.zeros(2 * fields.RECENT_TARGETS, np.int64)
        self._window = np.zeros(fields.WINDOW * fields.WINDOW_WORDS, np.int64)
        self._touched = np.zeros(pages * 4096 // fields.CHUNK_BYTES + 2, np.uint8)
        template = encode_header(
            raw_header(key=key_of(0), parent_key=bytes(32), namespace_digest=DIGEST, part=0, payload=b"\0")
        )
        self._template = np.frombuffer(template, np.int64).copy()
        self.words = np.zeros(fields.CONTEXT_BYTES // 8, np.int64)
        self.context = int(self.words.ctypes.data)
        for field, value in (
            (fields.BUCKETS, self.buckets_at),
            (fields.BUCKET_COUNT, buckets),
            (fields.SEED, self.seed),
            (fields.ARENA, self.arena_at),
            (fields.ARENA_BYTES, pages * 4096),
            (fields.EPOCH, self.index_at + EPOCH_OFFSET),
            (fields.NAMESPACE, self.index_at + NAMESPACE_OFFSET + self.namespace * NAMESPACE_ENTRY_BYTES),
            (fields.FILE, self.file_at),
            (fields.NAMESPACE_ID, self.namespace),
            (fields.PARTS, parts),
            (fields.VERIFY_EVERY, verify_every),
            (fields.RECENT, int(self._recent.ctypes.data)),
            (fields.KEYS, int(self._window.ctypes.data)),
            (fields.HEADER, int(self._template.ctypes.data)),
            (fields.NEXT_LOOK, 1 << 62),
            (fields.BELL, -1),
            (fields.TOUCHED, int(self._touched.ctypes.data)),
            (fields.POPULATE, 23),
        ):
            self.set(field, value)

    def set(self, field: int, value: int) -> None:
        self.words[field // 8] = value

    def get(self, field: int) -> int:
        return int(self.words[field // 8])

    def set_namespace(self, state: int) -> None:
        self.index[(NAMESPACE_OFFSET + self.namespace * NAMESPACE_ENTRY_BYTES) // 8] = state

    def bytes_at(self, slot: int, length: int) -> memoryview:
        return self.arena.data.cast("B")[slot * 4096 : slot * 4096 + length]

    def write(self, slot: int, key: bytes, payload: bytes, parent: bytes = bytes(32), part: int = 0) -> int:
        """A whole record into a slot; its payload's checksum."""
        header = raw_header(key=key, parent_key=parent, namespace_digest=DIGEST, part=part, payload=payload)
        self.bytes_at(slot, 256 + len(payload))[:] = encode_header(header) + payload
        return header.payload_checksum

    def _entry(
        self, slot: int, key: bytes, payload_bytes: int, checksum: int, part: int, codec: int, fidelity: int
    ) -> Words:
        identity = self.namespace | part << 16 | codec << 32 | 1 << 48 | fidelity << 56
        return np.frombuffer(
            bytearray(_RECORD.pack(key, slot | (256 + payload_bytes) << 32, identity, checksum, 0)), np.int64
        )

    def publish(
        self,
        slot: int,
        key: bytes,
        payload_bytes: int,
        checksum: int = 0,
        part: int = 0,
        codec: int = 1,
        fidelity: int = 255,
    ) -> bool:
        """Make a slot readable; False where both buckets are full."""
        words = self._entry(slot, key, payload_bytes, checksum, part, codec, fidelity)
        full = publish(self.buckets_at, self.bucket_count, self.seed, self.entries_at, int(words.ctypes.data), 1)
        assert full == 1 - int(words[7])
        return not full

    def put(self, slot: int, key: bytes, payload: bytes, parent: bytes = bytes(32), part: int = 0) -> bool:
        return self.publish(slot, key, len(payload), self.write(slot, key, payload, parent, part), part)

    def replace(self, source: int, slot: int, key: bytes, payload: bytes, *, part: int = 0, fidelity: int = 255) -> int:
        """Write a record and let it take the place of the one in ``source``; 0 where there is none."""
        words = self._entry(slot, key, len(payload), self.write(slot, key, payload, part=part), part, 1, fidelity)
        replaced: int = replace(self.buckets_at, self.entries_at, source, int(words.ctypes.data))
        return replaced

    def withdraw(self, *slots: int) -> list[int]:
        """Those of the slots that a hazard names."""
        return self._held(withdraw, (self.buckets_at,), slots)

    def rescan(self, *slots: int) -> list[int]:
        return self._held(rescan, (), slots)

    def _held(self, function: object, first: tuple[int, ...], slots: tuple[int, ...]) -> list[int]:
        assert callable(function)
        words = np.array(slots, np.int64)
        where = (self.entries_at, self.pages, int(self.hazards.ctypes.data), len(self.hazards))
        held = function(*first, *where, int(words.ctypes.data), len(words))
        named = [-int(slot) - 1 for slot in words if slot < 0]
        assert held == len(named)
        return named

    def move(self, source: int, target: int, length: int) -> int:
        self.bytes_at(target, length)[:] = self.bytes_at(source, length)
        moved: int = move(self.buckets_at, self.entries_at, source, target)
        return moved
