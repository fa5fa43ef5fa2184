"""First page of the arena file: what it is, whose it is, and how it is cut. See ``docs/mapped.md``."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from kvstore.errors import CorruptRecord
from kvstore.format.constants import PAGE_BYTES

ARENA_MAGIC: Final = b"KVARENA\0"
ARENA_VERSION: Final = 1
ARENA_HEADER_BYTES: Final = 2 << 20
"""Offset of the first slab: one huge page, of which only the first 4 KiB are used (and allocated)."""

# magic 8 | version u32 | state u32 | incarnation u64 | slab bytes u64 | slab count u64 | daemon's pid u64
_LAYOUT: Final = struct.Struct("<8sIIQQQQ")
STATE_OFFSET: Final = 12


class ArenaState(IntEnum):
    """Whether a daemon still answers for an arena. Persisted."""

    LIVE = 1
    DEAD = 2


@dataclass(frozen=True, slots=True)
class ArenaHeader:
    """What the first page of an arena says."""

    incarnation: int
    slab_bytes: int
    slab_count: int
    pid: int
    state: ArenaState = ArenaState.LIVE

    @property
    def arena_bytes(self) -> int:
        """Size of the whole file."""
        return ARENA_HEADER_BYTES + self.slab_bytes * self.slab_count


FIRST_SLAB_PAGE: Final = ARENA_HEADER_BYTES // PAGE_BYTES


def encode_arena_header(header: ArenaHeader) -> bytes:
    """The used bytes of the first page."""
    return _LAYOUT.pack(
        ARENA_MAGIC,
        ARENA_VERSION,
        header.state,
        header.incarnation,
        header.slab_bytes,
        header.slab_count,
        header.pid,
    )


def decode_arena_header(data: bytes | memoryview) -> ArenaHeader:
    """Read the first page of an arena.

    Raises:
        CorruptRecord: it is no arena, or one of another version.
    """
    if len(data) < _LAYOUT.size:
        raise CorruptRecord(f"no arena: {len(data)} bytes")
    magic, version, state, incarnation, slab_bytes, slab_count, pid = _LAYOUT.unpack(bytes(data[: _LAYOUT.size]))
    if magic != ARENA_MAGIC:
        raise CorruptRecord("no arena: wrong magic")
    if version != ARENA_VERSION:
        raise CorruptRecord(f"arena version {version} is not known to this version")
    if state not in (ArenaState.LIVE, ArenaState.DEAD) or slab_bytes % PAGE_BYTES or not slab_bytes or not slab_count:
        raise CorruptRecord("an arena with an impossible header")
    return ArenaHeader(incarnation, slab_bytes, slab_count, pid, ArenaState(state))
