"""The DRAM tier's memory: one arena file in shared memory, cut into slots.

Covers: the bytes of slots. Does not cover: which slot holds what (``kvstore.core``) or when a slot may be reused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np

from kvstore.errors import CorruptRecord
from kvstore.format.constants import PAGE_BYTES, RECORD_HEADER_BYTES
from kvstore.format.record import Buffer, RecordHeader, decode_record, padding_is_zero
from kvstore.mapped.arena import ARENA_HEADER_BYTES, STATE_OFFSET, ArenaHeader, ArenaState, encode_arena_header
from kvstore.tiers.files import SharedFile

POPULATE_STEP_BYTES: Final = 4 << 20
"""Memory is populated in steps of this size, so that a stop does not wait for a whole slab."""

_MIB: Final = 1 << 20


def automatic_slab_bytes(capacity_bytes: int, grant_bytes: int) -> int:
    """A slab size for a capacity: near 1/64 of it, 1 MiB to 64 MiB, at most half of the grants.

    A 256th is added to a power of two, because blocks are powers of two more often than not and a record has a header:
    a slab of 16 MiB would hold three records of 4 MiB, and the tier run out of slots at three quarters of its capacity.
    """
    slab_bytes = _MIB
    while slab_bytes < 64 * _MIB and slab_bytes * 64 < capacity_bytes and slab_bytes * 4 <= grant_bytes:
        slab_bytes *= 2
    return slab_bytes + slab_bytes // 256


def slab_count(capacity_bytes: int, grant_bytes: int, slab_bytes: int) -> int:
    """Slabs that hold capacity and grants."""
    return -(-(capacity_bytes + grant_bytes) // slab_bytes)


class Arena:
    """The arena file of one incarnation.

    Args:
        path: must not exist.
        header: what its first page will say.
        mode: permissions of the file.
        gid: its group, -1 for the user's.

    Raises:
        InsufficientMemory: the first page cannot be had.
    """

    def __init__(self, path: Path, header: ArenaHeader, mode: int, gid: int = -1) -> None:
        self.header = header
        self._file = SharedFile(path, header.arena_bytes, mode, gid)
        try:
            self._file.allocate(0, PAGE_BYTES)
        except BaseException:
            self._file.close()
            raise
        encoded = encode_arena_header(header)
        self._file.map[: len(encoded)] = encoded
        self._view = memoryview(self._file.map)
        self.address = int(np.frombuffer(self._file.map, np.uint8).ctypes.data)
        """Where it is mapped in this process."""

    @property
    def path(self) -> Path:
        """The file."""
        return self._file.path

    def populate_step(self, slab: int, step: int) -> bool:
        """Populate one step of a slab; True when it was the slab's last. Releases the GIL for most of the time.

        Raises:
            InsufficientMemory: the file system is full.
        """
        begin = step * POPULATE_STEP_BYTES
        length = min(POPULATE_STEP_BYTES, self.header.slab_bytes - begin)
        offset = ARENA_HEADER_BYTES + slab * self.header.slab_bytes + begin
        self._file.allocate(offset, length)
        self._file.populate(offset, length)
        return begin + length >= self.header.slab_bytes

    def record(self, slot: int, record_bytes: int) -> memoryview:
        """Read-only view of a record; valid until the slot is reused, which whoever sends it must prevent."""
        offset = slot * PAGE_BYTES
        return self._view[offset : offset + record_bytes].toreadonly()

    def slot(self, slot: int, slot_bytes: int) -> memoryview:
        """The whole slot, writable: what a transfer reads from or writes to while nobody else writes it."""
        offset = slot * PAGE_BYTES
        return self._view[offset : offset + slot_bytes]

    def write(self, slot: int, slot_bytes: int, header: Buffer, sections: Buffer) -> None:
        """Write a record and zero the rest of its slot.

        Raises:
            ValueError: the record does not fit the slot, which was not touched.
        """
        offset = slot * PAGE_BYTES
        view = self._view
        begin = offset + RECORD_HEADER_BYTES
        end = begin + len(sections)
        rest = offset + slot_bytes - end
        if rest < 0:
            raise ValueError(f"a record of {end - offset} bytes does not fit a slot of {slot_bytes}")
        view[offset:begin] = header
        view[begin:end] = sections
        if rest:
            view[end : end + rest] = bytes(rest)

    def move(self, source: int, target: int, slot_bytes: int) -> None:
        """Copy a whole slot."""
        begin, end = source * PAGE_BYTES, target * PAGE_BYTES
        self._view[end : end + slot_bytes] = self._view[begin : begin + slot_bytes]

    def verify(self, slot: int, slot_bytes: int, record_bytes: int, key: bytes, part: int) -> RecordHeader:
        """Decode a resident record, check its checksum, its identity and its padding.

        Raises:
            CorruptRecord: naming what is wrong.
        """
        header, payload = decode_record(self.record(slot, record_bytes))
        payload.release()
        if header.key != key or header.part != part:
            raise CorruptRecord("the record in the slot is of another block")
        if not padding_is_zero(self.record(slot, slot_bytes), record_bytes):
            raise CorruptRecord("the slot's padding is not zero")
        return header

    def close(self) -> None:
        """Mark the arena dead for those that map it, remove its name, unmap."""
        self._view[STATE_OFFSET : STATE_OFFSET + 4] = int(ArenaState.DEAD).to_bytes(4, "little")
        self._view.release()
        self._file.close()
