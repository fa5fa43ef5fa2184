"""What both sides of an index stage must agree on: keys and sizes, how the arena is cut, where the files are."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from kvstore.cli.own_directory import fresh_path, own_directory
from kvstore.cli.stress.pattern import KeyTable
from kvstore.format.constants import PAGE_BYTES, RECORD_HEADER_BYTES

__all__ = ["COUNTING_ONLY", "NAMESPACE_ID", "SHAPES", "ReaderFiles", "Shape", "stage_directory"]

KIB: Final = 1 << 10
MIB: Final = 1 << 20
NAMESPACE_ID: Final = 1
COUNTING_ONLY: Final = 1 << 62
"""``verify_every`` of an index whose readers count copies and verify none."""


def pages_for(payload_bytes: int) -> int:
    """Pages of the slot of a record."""
    return -(-(RECORD_HEADER_BYTES + payload_bytes) // PAGE_BYTES)


@dataclass(frozen=True, slots=True)
class Shape:
    """Keys and regions of an index stage. A region is cut into slots of one size, and anew when it is empty.

    Attributes:
        lengths: payload sizes, which the keys have in turn.
        key_count: keys that may be asked for; about half of them find a slot.
        region_pages, regions: the arena.
        bucket_count: of the index; few, so that entries are used again and buckets overflow.
    """

    name: str
    lengths: tuple[int, ...]
    key_count: int
    region_pages: int
    regions: int
    bucket_count: int

    def keys(self) -> KeyTable:
        """The keys, in every process the same."""
        return KeyTable(self.name, [self.lengths[number % len(self.lengths)] for number in range(self.key_count)])

    @property
    def max_length(self) -> int:
        """Of the largest payload."""
        return max(self.lengths)


SHAPES: Final = {
    shape.name: shape
    for shape in (
        Shape("64 KiB", (64 * KIB,), 64, 4 * pages_for(64 * KIB), 8, 6),
        Shape("1 MiB", (MIB,), 32, pages_for(MIB), 16, 3),
        Shape("mixed", (64 * KIB, MIB, 60 * KIB + 8, 200 * KIB), 96, pages_for(MIB), 8, 12),
        Shape("tight", (64 * KIB,), 16, pages_for(64 * KIB), 8, 2),
    )
}
"""By name. ``tight``: 8 slots only, so that what goes wrong at a reuse goes wrong soon."""


class ReaderFiles(msgspec.Struct):
    """What a reader needs to map an index stage's files."""

    arena: str
    index: str
    doorbell: str
    session: str
    incarnation: int


def stage_directory() -> AbstractContextManager[Path]:
    """A stage's own directory, in the memory file system where there is one."""
    memory = "/dev/shm"
    return own_directory(fresh_path("kvstore-stress-", memory if os.path.isdir(memory) else None))
