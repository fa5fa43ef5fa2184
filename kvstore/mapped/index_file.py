"""The index file: which record lies in which slot, for clients that read without asking. ``docs/mapped.md``.

Covers: the layout and the header of the file. Does not cover: reading and writing entries (``bucket``,
``index_reader``, ``index_writer``). Only the daemon writes the file; clients map it read-only.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from kvstore.errors import CorruptRecord
from kvstore.format.constants import PAGE_BYTES

INDEX_MAGIC: Final = b"KVINDEX\0"
MAPPED_LAYOUT: Final = 1
"""Version of everything that client and daemon share in memory: index, client file, orderings. A client that knows
another one does not map, and asks over ZeroMQ."""

# magic 8 | layout u32 | reserved u32 | incarnation | bucket count | namespace count | hash seed | arena bytes |
# verify every | hazard bytes a client
_LAYOUT: Final = struct.Struct("<8sIIQQQQQQQ")

STATE_OFFSET: Final = 128
"""A word of its own line: ``IndexState``."""

NAMESPACE_OFFSET: Final = PAGE_BYTES
NAMESPACE_ENTRY_BYTES: Final = 64
NAMESPACE_COUNT: Final = 1 << 16
# state u64 | generation u64 | parts u64 | reserved u64 | digest 32
NAMESPACE_LAYOUT: Final = struct.Struct("<QQQQ32s")

BUCKET_OFFSET: Final = NAMESPACE_OFFSET + NAMESPACE_ENTRY_BYTES * NAMESPACE_COUNT
BUCKET_BYTES: Final = 512
BUCKET_ENTRIES: Final = 7
ENTRY_BYTES: Final = 64
LOAD_FACTOR: Final = 0.5

# An entry's words, in bytes from its beginning.
ENTRY_SEQUENCE: Final = 0
ENTRY_KEY: Final = 8
ENTRY_PLACE: Final = 40
"""slot u32 | record length u32 << 32."""
ENTRY_IDENTITY: Final = 48
"""namespace u16 | part u16 << 16 | codec u16 << 32 | state u8 << 48 | effective fidelity u8 << 56."""
ENTRY_CHECKSUM: Final = 56

PART_SHIFT: Final = 16
CODEC_SHIFT: Final = 32
STATE_SHIFT: Final = 48
FIDELITY_SHIFT: Final = 56
WHO_MASK: Final = (1 << 32) - 1
"""Namespace and part of the identity word: what a key is looked up with."""


class IndexState(IntEnum):
    """Whether the daemon that made the file answers for it. Persisted."""

    LIVE = 1
    DEAD = 2


class NamespaceWord(IntEnum):
    """State of one namespace id. Persisted."""

    NONE = 0
    CURRENT = 1
    OVER = 2
    """It was invalidated; ids are never given out twice."""


class EntryState(IntEnum):
    """State of an entry. Persisted."""

    EMPTY = 0
    LIVE = 1


@dataclass(frozen=True, slots=True)
class IndexHeader:
    """What the first page of an index file says.

    Attributes:
        incarnation: of the daemon.
        bucket_count: buckets of 512 bytes.
        hash_seed: random; makes bucket and tag of a key differ from daemon to daemon.
        arena_bytes: size of the arena file that slots lie in.
        verify_every: check the checksum of every n-th mapped read; 0 for none.
        hazard_bytes: what one client may hold with hazards.
    """

    incarnation: int
    bucket_count: int
    hash_seed: int
    arena_bytes: int
    verify_every: int
    hazard_bytes: int

    @property
    def index_bytes(self) -> int:
        """Size of the whole file."""
        return BUCKET_OFFSET + BUCKET_BYTES * self.bucket_count


def bucket_count_for(max_records: int) -> int:
    """Buckets for a number of records at half load, at which an overflow was never seen in a million insertions."""
    return max(int(max_records / (BUCKET_ENTRIES * LOAD_FACTOR)) + 1, 2)


def encode_index_header(header: IndexHeader) -> bytes:
    """The bytes of the header; the state word is apart."""
    return _LAYOUT.pack(
        INDEX_MAGIC,
        MAPPED_LAYOUT,
        0,
        header.incarnation,
        header.bucket_count,
        NAMESPACE_COUNT,
        header.hash_seed,
        header.arena_bytes,
        header.verify_every,
        header.hazard_bytes,
    )


def decode_index_header(data: bytes | memoryview, file_bytes: int) -> IndexHeader:
    """Read the header of an index file.

    Args:
        data: at least the first page.
        file_bytes: size of the file: nothing outside it may be touched.

    Raises:
        CorruptRecord: it is no index, one of another layout, or not as large as it says.
    """
    if len(data) < _LAYOUT.size:
        raise CorruptRecord(f"no index: {len(data)} bytes")
    magic, layout, reserved, incarnation, buckets, namespaces, seed, arena_bytes, verify_every, hazard_bytes = (
        _LAYOUT.unpack(bytes(data[: _LAYOUT.size]))
    )
    if magic != INDEX_MAGIC:
        raise CorruptRecord("no index: wrong magic")
    if layout != MAPPED_LAYOUT:
        raise CorruptRecord(f"the daemon's mapped layout is {layout}, this client knows {MAPPED_LAYOUT}")
    if reserved or namespaces != NAMESPACE_COUNT or not buckets:
        raise CorruptRecord("an index with an impossible header")
    header = IndexHeader(incarnation, buckets, seed, arena_bytes, verify_every, hazard_bytes)
    if header.index_bytes != file_bytes:
        raise CorruptRecord(f"an index of {file_bytes} bytes whose header says {header.index_bytes}")
    return header
