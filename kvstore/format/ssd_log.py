"""Frames of the SSD tier's index log and checkpoints, and the entries in them.

Covers: encoding entries, closing them into a frame, reading a file's frames up to where they end or tear. Does not
cover: what entries mean together (``kvstore.core.ssd_replay``). A frame is written and synced as a whole: it counts
whole or not at all. Its checksums begin with a number of its file: what lay on the disk before, or what a client had
written into a key, is never taken for one.
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

# magic u32 | payload bytes u32 | sequence u64 | entries u32 | check of these u32 | checksum u64
_FRAME: Final = struct.Struct("<IIQIIQ")
_FRAME_HEAD: Final = struct.Struct("<IIQI")
# kind u8 | fidelity u8 | codec u16 | part u16 | reserved u16 | namespace u32 | slot pages u32 | tokens u32 |
# home pages u32 | slot u64 | record bytes u64 | checksum u64 | access u64 | key 32 | parent 32
_PUT: Final = struct.Struct("<BBHHHIIIIQQQQ32s32s")
# kind u8 and seven zeros, then what it is about
_FREE: Final = struct.Struct("<QQ")
_TOUCH: Final = struct.Struct("<QQQ")
# kind u8 | zero u8 | description bytes u16 | namespace u32 | generation u64
_NAMESPACE: Final = struct.Struct("<BBHIQ")
# kind u8 | zeros 3 | namespace u32
_EMPTY: Final = struct.Struct("<II")
_END: Final = struct.Struct("<QQ")
PUT_BYTES: Final = _PUT.size
assert _FRAME.size == FRAME_HEADER_BYTES
assert PUT_BYTES % 8 == 0


class EntryKind(IntEnum):
    """What an entry says. Persisted."""

    NAMESPACE = 1
    """A namespace has this number and generation from here on; records that there were of it are over."""
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
        head = _NAMESPACE.pack(EntryKind.NAMESPACE, 0, length, entry.namespace, entry.generation)
        return head + entry.description + bytes(-length % 8)
    if isinstance(entry, EmptyEntry):
        return _EMPTY.pack(EntryKind.EMPTY, entry.namespace)
    return _END.pack(EntryKind.END, entry.puts)


def frame_seed(header: bytes) -> int:
    """What the checksums of a file's frames begin with: XXH3-64 of the file's header."""
    return xxhash.xxh3_64_intdigest(header)


def encode_frame(seed: int, sequence: int, entries: list[bytes]) -> bytes:
    """Close encoded entries into the frame of that number of a file; numbers begin at 0. ``seed``: of that file."""
    payload = b"".join(entries)
    head = _FRAME_HEAD.pack(FRAME_MAGIC, len(payload), sequence, len(entries))
    head += _check_of(head, seed).to_bytes(4, "little")
    return head + _checksum_of(head, payload, seed).to_bytes(8, "little") + payload


def _check_of(head: bytes | memoryview, seed: int) -> int:
    """Of a frame's header: whether it is one is known without its payload."""
    return xxhash.xxh3_64_intdigest(head, seed) & 0xFFFFFFFF


def _checksum_of(head: bytes | memoryview, payload: bytes | memoryview, seed: int) -> int:
    state = xxhash.xxh3_64(head, seed)
    state.update(payload)
    return state.intdigest()


class Frames:
    """The frames of a log or checkpoint behind its header, up to the first that is not whole.

    Iterating gives each frame's entries. Afterwards ``end`` is the offset behind the last whole frame,
    ``next_sequence`` the number of the one that would follow, and ``problem`` says why reading ended before the data
    did ("" where it did not).

    Args:
        data: the whole file.
        begin: where the first frame begins, and the header ends.
    """

    def __init__(self, data: bytes, begin: int) -> None:
        self._data = memoryview(data)
        self._seed = frame_seed(data[:begin])
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
        """After a problem: go on with the next whole frame of a later number; False where there is none."""
        magic = FRAME_MAGIC.to_bytes(4, "little")
        data = bytes(self._data)
        at = data.find(magic, self.end)
        while at >= 0:
            try:
                sequence = self._head(at)[0]
                if sequence >= self.next_sequence:
                    self._payload(at)
                    self.end, self.next_sequence, self.problem = at, sequence, ""
                    return True
            except CorruptRecord:
                pass
            at = data.find(magic, at + 1)
        return False

    def _head(self, begin: int) -> tuple[int, int, int, int]:
        """Number, entries, end, and checksum of the frame that begins there."""
        data = self._data
        if len(data) - begin < FRAME_HEADER_BYTES:
            raise CorruptRecord(f"the file ends within the frame at {begin}")
        magic, payload_bytes, sequence, count, check, checksum = _FRAME.unpack_from(data, begin)
        if magic != FRAME_MAGIC or check != _check_of(data[begin : begin + _FRAME_HEAD.size], self._seed):
            raise CorruptRecord(f"no frame begins at {begin}")
        end = begin + FRAME_HEADER_BYTES + payload_bytes
        if end > len(data):
            raise CorruptRecord(f"the file ends within the frame at {begin}")
        return sequence, count, end, checksum

    def _payload(self, begin: int) -> tuple[list[Entry], int]:
        """A whole frame's entries, and where it ends."""
        data = self._data
        _, count, end, checksum = self._head(begin)
        head, payload = data[begin : begin + _FRAME_HEAD.size + 4], data[begin + FRAME_HEADER_BYTES : end]
        if checksum != _checksum_of(head, payload, self._seed):
            raise CorruptRecord(f"the checksum of the frame at {begin} is wrong")
        entries = decode_entries(payload)
        if len(entries) != count:
            raise CorruptRecord(f"the frame at {begin} has {len(entries)} entries, not {count}")
        return entries, end

    def _frame(self, begin: int) -> tuple[list[Entry], int]:
        sequence = self._head(begin)[0]
        if sequence != self.next_sequence:
            raise CorruptRecord(f"the frame at {begin} has number {sequence}, not {self.next_sequence}")
        return self._payload(begin)


def decode_entries(payload: memoryview) -> list[Entry]:
    """All entries of a frame.

    Raises:
        CorruptRecord: an entry is of no known kind, bytes that must be zero are not, or the payload ends within one.
    """
    entries: list[Entry] = []
    at, end = 0, len(payload)
    zeros: object = 0
    try:
        while at < end:
            kind = payload[at]
            if kind == EntryKind.PUT:
                _, fidelity, codec, part, zeros, *rest = _PUT.unpack_from(payload, at)
                entries.append(PutEntry(fidelity, codec, part, *rest))
                at += PUT_BYTES
            elif kind == EntryKind.FREE:
                first, slot = _FREE.unpack_from(payload, at)
                zeros = first - kind
                entries.append(FreeEntry(slot))
                at += _FREE.size
            elif kind == EntryKind.TOUCH:
                first, slot, access = _TOUCH.unpack_from(payload, at)
                zeros = first - kind
                entries.append(TouchEntry(slot, access))
                at += _TOUCH.size
            elif kind == EntryKind.NAMESPACE:
                _, zeros, length, namespace, generation = _NAMESPACE.unpack_from(payload, at)
                at += _NAMESPACE.size
                description = bytes(payload[at : at + length])
                padding = bytes(payload[at + length : at + length + -length % 8])
                if len(description) + len(padding) != length + -length % 8:
                    raise CorruptRecord("a frame ends within a namespace's description")
                zeros = zeros or any(padding)
                entries.append(NamespaceEntry(namespace, generation, description))
                at += length + -length % 8
            elif kind == EntryKind.EMPTY:
                first, namespace = _EMPTY.unpack_from(payload, at)
                zeros = first - kind
                entries.append(EmptyEntry(namespace))
                at += _EMPTY.size
            elif kind == EntryKind.END:
                first, puts = _END.unpack_from(payload, at)
                zeros = first - kind
                entries.append(EndEntry(puts))
                at += _END.size
            else:
                raise CorruptRecord(f"an entry is of unknown kind {kind}")
            if zeros:
                raise CorruptRecord(f"an entry of kind {kind} has bytes that must be zero and are not")
    except struct.error:
        raise CorruptRecord("a frame ends within an entry") from None
    return entries
