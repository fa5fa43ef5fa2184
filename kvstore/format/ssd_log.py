"""Frames of the SSD tier's index log and checkpoints, and the entries in them.

Covers: encoding entries, closing them into a frame, reading a file's frames up to where they end or tear. Does not
cover: what entries mean together (``kvstore.core.ssd_replay``). A frame is written and synced as a whole: it counts
whole or not at all.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from enum import IntEnum
from typing import Final, NamedTuple

import xxhash

from kvstore.errors import CorruptRecord

FRAME_MAGIC: Final = 0x46_53_56_4B
"""``KVSF`` in the file."""

FRAME_HEADER_BYTES: Final = 32
MAX_FRAME_BYTES: Final = 64 << 20
MAX_DESCRIPTION_BYTES: Final = 1 << 16

# magic u32 | payload bytes u32 | sequence u64 | entries u32 | reserved u32 | checksum u64
_FRAME: Final = struct.Struct("<IIQIIQ")
# kind u8 | fidelity u8 | codec u16 | part u16 | reserved u16 | namespace u32 | slot pages u32 | tokens u32 |
# home pages u32 | slot u64 | record bytes u64 | checksum u64 | access u64 | key 32 | parent 32
_PUT: Final = struct.Struct("<BBHHHIIIIQQQQ32s32s")
_FREE: Final = struct.Struct("<B7xQ")
_TOUCH: Final = struct.Struct("<B7xQQ")
# kind u8 | reserved 1 | description bytes u16 | namespace u32 | generation u64
_NAMESPACE: Final = struct.Struct("<BxHIQ")
_EMPTY: Final = struct.Struct("<B3xI")
_END: Final = struct.Struct("<B7xQ")
PUT_BYTES: Final = _PUT.size
assert _FRAME.size == FRAME_HEADER_BYTES
assert PUT_BYTES % 8 == 0


class EntryKind(IntEnum):
    """What an entry says. Persisted."""

    NAMESPACE = 1
    """A namespace has this number and generation; a later generation than before empties it."""
    PUT = 2
    """A record lies in a slot; what lay there, and what was there of its key and part, is over."""
    FREE = 3
    """A slot's record is over."""
    TOUCH = 4
    """A slot's block was used."""
    EMPTY = 5
    """All records of a namespace are over."""
    END = 6
    """A checkpoint is complete: how many puts it holds."""


class PutEntry(NamedTuple):
    """A record in a slot.

    Attributes:
        slot, slot_pages: its first page in the slab file, and how many it has.
        home_pages: of the slot that the record has in memory.
        access: when its block was last used.
    """

    fidelity: int
    codec: int
    part: int
    namespace: int
    slot_pages: int
    token_count: int
    home_pages: int
    slot: int
    record_bytes: int
    checksum: int
    access: int
    key: bytes
    parent_key: bytes


class FreeEntry(NamedTuple):
    """A slot's record is over."""

    slot: int


class TouchEntry(NamedTuple):
    """A slot's block was used."""

    slot: int
    access: int


class NamespaceEntry(NamedTuple):
    """A namespace's number in these files, its generation, its canonical description."""

    namespace: int
    generation: int
    description: bytes


class EmptyEntry(NamedTuple):
    """A namespace's records are over."""

    namespace: int


class EndEntry(NamedTuple):
    """The end of a checkpoint with so many puts."""

    puts: int


Entry = PutEntry | FreeEntry | TouchEntry | NamespaceEntry | EmptyEntry | EndEntry


def encode_entry(entry: Entry) -> bytes:
    """An entry's bytes, a multiple of 8.

    Raises:
        struct.error: a number does not fit its field: a bug.
    """
    if isinstance(entry, PutEntry):
        fidelity, codec, part, *rest = entry
        return _PUT.pack(EntryKind.PUT, fidelity, codec, part, 0, *rest)
    if isinstance(entry, FreeEntry):
        return _FREE.pack(EntryKind.FREE, entry.slot)
    if isinstance(entry, TouchEntry):
        return _TOUCH.pack(EntryKind.TOUCH, entry.slot, entry.access)
    if isinstance(entry, NamespaceEntry):
        length = len(entry.description)
        head = _NAMESPACE.pack(EntryKind.NAMESPACE, length, entry.namespace, entry.generation)
        return head + entry.description + bytes(-length % 8)
    if isinstance(entry, EmptyEntry):
        return _EMPTY.pack(EntryKind.EMPTY, entry.namespace)
    return _END.pack(EntryKind.END, entry.puts)


def encode_frame(sequence: int, entries: list[bytes]) -> bytes:
    """Close encoded entries into the frame of that number of a file; numbers begin at 0."""
    payload = b"".join(entries)
    head = _FRAME.pack(FRAME_MAGIC, len(payload), sequence, len(entries), 0, 0)[:-8]
    state = xxhash.xxh3_64(head)
    state.update(payload)
    return head + state.intdigest().to_bytes(8, "little") + payload


class Frames:
    """The frames of a log or checkpoint behind its header, up to the first that is not whole.

    Iterating gives each frame's entries. Afterwards ``end`` is the offset behind the last whole frame,
    ``next_sequence`` the number of the one that would follow, and ``problem`` says why reading ended before the data
    did ("" where it did not).

    Args:
        data: the whole file.
        begin: where the first frame begins.
    """

    def __init__(self, data: bytes, begin: int) -> None:
        self._data = memoryview(data)
        self.end = begin
        self.next_sequence = 0
        self.problem = ""

    def __iter__(self) -> Iterator[list[Entry]]:
        while self.end < len(self._data):
            try:
                entries, end = self._frame(self.end)
            except CorruptRecord as error:
                self.problem = str(error)
                return
            self.end = end
            self.next_sequence += 1
            yield entries

    def skip(self) -> bool:
        """After a problem: go on with the next whole frame; False where there is none."""
        magic = FRAME_MAGIC.to_bytes(4, "little")
        data = bytes(self._data)
        at = data.find(magic, self.end + 1)
        while at >= 0:
            if at + FRAME_HEADER_BYTES <= len(data):
                before = self.next_sequence
                self.next_sequence = _FRAME.unpack_from(data, at)[2]
                try:
                    self._frame(at)
                except CorruptRecord:
                    self.next_sequence = before
                else:
                    self.end, self.problem = at, ""
                    return True
            at = data.find(magic, at + 1)
        return False

    def _frame(self, begin: int) -> tuple[list[Entry], int]:
        data = self._data
        if len(data) - begin < FRAME_HEADER_BYTES:
            raise CorruptRecord(f"the file ends within the frame at {begin}")
        magic, payload_bytes, sequence, count, reserved, checksum = _FRAME.unpack_from(data, begin)
        if magic != FRAME_MAGIC:
            raise CorruptRecord(f"no frame begins at {begin}")
        if payload_bytes > MAX_FRAME_BYTES or reserved:
            raise CorruptRecord(f"the frame at {begin} is impossible")
        at = begin + FRAME_HEADER_BYTES
        end = at + payload_bytes
        if end > len(data):
            raise CorruptRecord(f"the file ends within the frame at {begin}")
        state = xxhash.xxh3_64(data[begin : begin + FRAME_HEADER_BYTES - 8])
        state.update(data[at:end])
        if state.intdigest() != checksum:
            raise CorruptRecord(f"the checksum of the frame at {begin} is wrong")
        if sequence != self.next_sequence:
            raise CorruptRecord(f"the frame at {begin} has number {sequence}, not {self.next_sequence}")
        entries = decode_entries(data[at:end])
        if len(entries) != count:
            raise CorruptRecord(f"the frame at {begin} has {len(entries)} entries, not {count}")
        return entries, end


def decode_entries(payload: memoryview) -> list[Entry]:
    """All entries of a frame.

    Raises:
        CorruptRecord: an entry is of no known kind, or the payload ends within one.
    """
    entries: list[Entry] = []
    at, end = 0, len(payload)
    try:
        while at < end:
            kind = payload[at]
            if kind == EntryKind.PUT:
                _, fidelity, codec, part, _, *rest = _PUT.unpack_from(payload, at)
                entries.append(PutEntry(fidelity, codec, part, *rest))
                at += PUT_BYTES
            elif kind == EntryKind.FREE:
                entries.append(FreeEntry(_FREE.unpack_from(payload, at)[1]))
                at += _FREE.size
            elif kind == EntryKind.TOUCH:
                _, slot, access = _TOUCH.unpack_from(payload, at)
                entries.append(TouchEntry(slot, access))
                at += _TOUCH.size
            elif kind == EntryKind.NAMESPACE:
                _, length, namespace, generation = _NAMESPACE.unpack_from(payload, at)
                at += _NAMESPACE.size
                description = bytes(payload[at : at + length])
                if len(description) != length:
                    raise CorruptRecord("a frame ends within a namespace's description")
                entries.append(NamespaceEntry(namespace, generation, description))
                at += length + -length % 8
            elif kind == EntryKind.EMPTY:
                entries.append(EmptyEntry(_EMPTY.unpack_from(payload, at)[1]))
                at += _EMPTY.size
            elif kind == EntryKind.END:
                entries.append(EndEntry(_END.unpack_from(payload, at)[1]))
                at += _END.size
            else:
                raise CorruptRecord(f"an entry is of unknown kind {kind}")
    except struct.error:
        raise CorruptRecord("a frame ends within an entry") from None
    return entries
