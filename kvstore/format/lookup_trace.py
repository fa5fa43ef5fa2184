"""Recordings of lookups: one file's header, its frames, and the requests in them.

Covers: encoding requests (``LookupEncoder``), closing them into a frame, reading a file up to where it ends or tears
(``LookupDecoder``). Does not cover: files, see ``kvstore.tiers.recordings``; what is simulated of them, see
``kvstore.simulator.recording``. ``docs/trace-format.md`` is the specification.

Keys are not in a recording. A block is known by 4 bytes of a keyed hash of its key and by the block in front of it, and
the hash's key is never written: who has guessed a prompt cannot find out whether it was asked for.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from typing import Final, NamedTuple

import xxhash

from kvstore.errors import CorruptRecord

__all__ = [
    "FILE_HEADER_BYTES",
    "MAX_BLOCKS_PER_LOOKUP",
    "SALT_BYTES",
    "Lookup",
    "LookupDecoder",
    "LookupEncoder",
    "LookupFileHeader",
    "NamespaceFacts",
    "RecordedLookup",
    "decode_header",
    "encode_header",
]

FILE_HEADER_BYTES: Final = 64
FRAME_HEADER_BYTES: Final = 16
MAX_FRAME_BYTES: Final = 1 << 22
"""Most payload bytes of a frame."""
MAX_BLOCKS_PER_LOOKUP: Final = 1 << 16
MAX_NODES: Final = 1 << 18
"""Blocks that encoder and decoder know at a time, at most."""
SALT_BYTES: Final = 32

_MAGIC: Final = b"KVLOOKUP"
_VERSION: Final = 1
_HASH_BYTES: Final = 4
# magic 8 | version u16 | header bytes u16 | zero u32 | recording 16 | sequence u32 | zero u32 | started u64 | dram u64
_HEADER: Final = struct.Struct("<8sHHI16sIIQQ")
_CHECKSUM: Final = struct.Struct("<Q")
# payload bytes u32 | entries u32 | checksum u64, of these two and the payload
_FRAME: Final = struct.Struct("<IIQ")
_FRAME_HEAD: Final = struct.Struct("<II")
_MAX_VARINT_BYTES: Final = 10
_MAX_NAME_BYTES: Final = 64

_FORGET, _NAMESPACE, _LOOKUP = 0, 1, 2
"""Kinds of entries. Persisted."""


class LookupFileHeader(NamedTuple):
    """What a file begins with.

    Attributes:
        recording: 16 bytes, the same in all files of a recording.
        sequence: of the file in it, from 0.
        started_unix_ns: when the recording began, the same in all its files.
        dram_bytes: what blocks might take of the daemon's memory then, 0 where that is unknown.
    """

    recording: bytes
    sequence: int
    started_unix_ns: int
    dram_bytes: int = 0


class NamespaceFacts(NamedTuple):
    """What there is to know of a namespace; its name is not recorded.

    Attributes:
        number: in the recording, from 0.
        block_tokens: tokens a block, 0 where its clients do not say.
        slot_bytes: that its largest block took in DRAM so far, 0 where there was none.
        codec: of its blocks.
    """

    number: int
    block_tokens: int
    slot_bytes: int
    codec: str


class Lookup(NamedTuple):
    """One request to record.

    Attributes:
        time_ms: since the recording began, not before the last one's.
        namespace: where it was asked.
        keys: of its blocks from the first on, as far as they are known.
        asked: blocks asked for, at least as many.
        hits: leading blocks that were there, in any tier.
        below: those of them that were not in DRAM.
    """

    time_ms: int
    namespace: NamespaceFacts
    keys: Sequence[bytes]
    asked: int
    hits: int
    below: int


class RecordedLookup(NamedTuple):
    """One request as it is read.

    Attributes:
        time_ms: since the recording began.
        namespace: number.
        blocks: nodes from the first block on; a node is known by its number in the ``chains`` that were read into.
        asked, hits, below: as in ``Lookup``.
    """

    time_ms: int
    namespace: int
    blocks: tuple[int, ...]
    asked: int
    hits: int
    below: int


def encode_header(header: LookupFileHeader) -> bytes:
    """The first 64 bytes of a file."""
    head = _HEADER.pack(
        _MAGIC,
        _VERSION,
        FILE_HEADER_BYTES,
        0,
        header.recording,
        header.sequence,
        0,
        header.started_unix_ns,
        header.dram_bytes,
    )
    return head + _CHECKSUM.pack(xxhash.xxh3_64_intdigest(head))


def decode_header(data: bytes) -> LookupFileHeader:
    """Read a file's header.

    Raises:
        CorruptRecord: it is none, is damaged, or of a version that this code does not know.
    """
    if len(data) < FILE_HEADER_BYTES or not data.startswith(_MAGIC):
        raise CorruptRecord("it is no recording of lookups")
    head = data[: _HEADER.size]
    _, version, header_bytes, zero, recording, sequence, zero_too, started_unix_ns, dram_bytes = _HEADER.unpack(head)
    if version != _VERSION:
        raise CorruptRecord(f"it is a recording of version {version}; this program knows version {_VERSION}")
    (checksum,) = _CHECKSUM.unpack_from(data, _HEADER.size)
    if checksum != xxhash.xxh3_64_intdigest(head):
        raise CorruptRecord("the recording's header is damaged")
    if header_bytes != FILE_HEADER_BYTES or zero or zero_too:
        raise CorruptRecord("the recording's header has what version 1 does not know")
    return LookupFileHeader(recording, sequence, started_unix_ns, dram_bytes)


class LookupEncoder:
    """Encodes the requests of one file; it knows the blocks that are in it already.

    Args:
        salt: ``SALT_BYTES`` random bytes, the same for all files of a recording and written nowhere.
        max_nodes: blocks to know at a time: with more it forgets them all and begins anew.
    """

    def __init__(self, salt: bytes, max_nodes: int = MAX_NODES) -> None:
        self._salt = salt
        self._max_nodes = max_nodes
        self._nodes: dict[int, int] = {}
        self._roots: dict[int, tuple[int, NamespaceFacts]] = {}
        self._count = 0
        self._time_ms = 0
        self._entries = 0
        self._payload = bytearray()

    @property
    def waiting_bytes(self) -> int:
        """Of entries that are in no frame yet."""
        return len(self._payload)

    def add(self, lookup: Lookup) -> None:
        """Encode a request. Its keys must be of ``MAX_BLOCKS_PER_LOOKUP`` blocks at most."""
        if self._count + len(lookup.keys) + 1 > self._max_nodes:
            self._nodes.clear()
            self._roots.clear()
            self._count = 0
            self._put(_FORGET)
        at = self._root(lookup.namespace)
        nodes, salt = self._nodes, self._salt
        hashes = [
            int.from_bytes(blake2b(key, digest_size=_HASH_BYTES, key=salt).digest(), "little") for key in lookup.keys
        ]
        known = 0
        for value in hashes:
            below = nodes.get(at << 32 | value)
            if below is None:
                break
            at = below
            known += 1
        new = hashes[known:]
        # A clock that went back is none: all times are differences.
        elapsed_ms = max(0, lookup.time_ms - self._time_ms)
        self._time_ms += elapsed_ms
        unnamed = max(0, lookup.asked - len(lookup.keys))
        self._put(_LOOKUP, elapsed_ms, at, len(new), unnamed, lookup.hits, lookup.below)
        for value in new:
            self._payload += value.to_bytes(_HASH_BYTES, "little")
            nodes[at << 32 | value] = self._count
            at = self._count
            self._count += 1

    def frame(self) -> bytes:
        """All entries since the last frame, to be written as a whole; nothing where there are none."""
        if not self._payload:
            return b""
        payload = bytes(self._payload)
        head = _FRAME_HEAD.pack(len(payload), self._entries)
        self._payload.clear()
        self._entries = 0
        return head + _CHECKSUM.pack(xxhash.xxh3_64_intdigest(head + payload)) + payload

    def _root(self, namespace: NamespaceFacts) -> int:
        """The node that a namespace's first blocks follow; tells of the namespace where it is new or has changed."""
        root, told = self._roots.get(namespace.number, (-1, None))
        if told != namespace:
            if root < 0:
                root = self._count
                self._count += 1
            self._roots[namespace.number] = root, namespace
            name = namespace.codec.encode()[:_MAX_NAME_BYTES]
            self._put(_NAMESPACE, root, namespace.number, namespace.block_tokens, namespace.slot_bytes, len(name))
            self._payload += name
        return root

    def _put(self, *values: int) -> None:
        payload = self._payload
        for value in values:
            while value > 0x7F:
                payload.append(value & 0x7F | 0x80)
                value >>= 7
            payload.append(value)
        self._entries += 1


class LookupDecoder:
    """Reads the files of a recording, one after the other, in the order of their sequence.

    Attributes:
        namespaces: by number, as last told of.
        damage: of the file read last: where and why reading ended before its end; "" where it did not.
    """

    def __init__(self) -> None:
        self.namespaces: dict[int, NamespaceFacts] = {}
        self.damage = ""
        self._chains: dict[tuple[int, int], int] = {}

    @property
    def distinct_blocks(self) -> int:
        """Different blocks in all files read so far."""
        return len(self._chains)

    def lookups(self, data: bytes) -> Iterator[RecordedLookup]:
        """The requests of a file, up to its end or to where it is damaged or torn.

        Args:
            data: all of the file.

        Raises:
            CorruptRecord: its header is no header.
        """
        decode_header(data)
        self.damage = ""
        at = FILE_HEADER_BYTES
        state = _FileState()
        while at < len(data):
            try:
                payload, entries = _frame_at(data, at)
                # All of a frame or nothing: what is wrong in it is found before anything is given.
                decoded = list(self._entries(payload, entries, state))
            except CorruptRecord as why:
                self.damage = f"{why}, at byte {at:,} of {len(data):,}"
                return
            yield from decoded
            at += FRAME_HEADER_BYTES + len(payload)

    def _entries(self, payload: bytes, entries: int, state: _FileState) -> Iterator[RecordedLookup]:
        reader = _Reader(payload)
        for _ in range(entries):
            kind = reader.varint()
            if kind == _LOOKUP:
                yield self._lookup(reader, state)
            elif kind == _NAMESPACE:
                self._namespace(reader, state)
            elif kind == _FORGET:
                state.forget()
            else:
                raise CorruptRecord(f"an entry is of the unknown kind {kind}")
        if reader.at != len(payload):
            raise CorruptRecord("a frame has more bytes than entries")

    def _namespace(self, reader: _Reader, state: _FileState) -> None:
        root, number, block_tokens, slot_bytes, name_bytes = (reader.varint() for _ in range(5))
        if name_bytes > _MAX_NAME_BYTES:
            raise CorruptRecord(f"a codec's name has {name_bytes} bytes")
        try:
            codec = reader.take(name_bytes).decode()
        except UnicodeDecodeError:
            raise CorruptRecord("a codec's name is no text") from None
        if root == len(state.nodes):
            state.add(-1 - number, -1, number)
        elif root > len(state.nodes) or state.nodes[root] != -1 - number:
            raise CorruptRecord(f"namespace {number} begins at a block")
        self.namespaces[number] = NamespaceFacts(number, block_tokens, slot_bytes, codec)

    def _lookup(self, reader: _Reader, state: _FileState) -> RecordedLookup:
        elapsed_ms, last, new, unnamed, hits, below = (reader.varint() for _ in range(6))
        if last >= len(state.nodes):
            raise CorruptRecord(f"a request goes on from block {last}, of which nothing was told")
        if new + len(state.nodes) > MAX_NODES or new > MAX_BLOCKS_PER_LOOKUP:
            raise CorruptRecord(f"a request has {new} new blocks")
        state.time_ms += elapsed_ms
        node, path, namespace = state.nodes[last], state.path(last), state.namespaces[last]
        blocks = [*path]
        chains = self._chains
        for _ in range(new):
            value = int.from_bytes(reader.take(_HASH_BYTES), "little")
            node = chains.setdefault((node, value), len(chains))
            blocks.append(node)
            state.add(node, last, namespace)
            last = len(state.nodes) - 1
        asked = len(blocks) + unnamed
        if hits > asked or below > hits:
            raise CorruptRecord(f"a request of {asked} blocks hits {hits}, {below} of them below DRAM")
        return RecordedLookup(state.time_ms, namespace, tuple(blocks), asked, hits, below)


class _FileState:
    """What is known in a file at a place: nodes by their number in the file."""

    def __init__(self) -> None:
        self.time_ms = 0
        self.nodes: list[int] = []
        self.namespaces: list[int] = []
        self._parents: list[int] = []

    def add(self, node: int, parent: int, namespace: int) -> None:
        self.nodes.append(node)
        self.namespaces.append(namespace)
        self._parents.append(parent)

    def path(self, at: int) -> list[int]:
        """Blocks from a prefix's first one to one that is known; none where that is a namespace's beginning."""
        found = []
        while self._parents[at] >= 0:
            found.append(self.nodes[at])
            at = self._parents[at]
        found.reverse()
        return found

    def forget(self) -> None:
        self.nodes.clear()
        self.namespaces.clear()
        self._parents.clear()


class _Reader:
    """Takes values from a frame's payload."""

    def __init__(self, payload: bytes) -> None:
        self.at = 0
        self._payload = payload

    def take(self, count: int) -> bytes:
        taken = self._payload[self.at : self.at + count]
        if len(taken) < count:
            raise CorruptRecord("an entry ends behind its frame")
        self.at += count
        return taken

    def varint(self) -> int:
        value = shift = 0
        for _ in range(_MAX_VARINT_BYTES):
            if self.at >= len(self._payload):
                raise CorruptRecord("an entry ends behind its frame")
            byte = self._payload[self.at]
            self.at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7
        raise CorruptRecord("a number has more than 10 bytes")


def _frame_at(data: bytes, at: int) -> tuple[bytes, int]:
    """Payload and number of entries of a frame."""
    if at + FRAME_HEADER_BYTES > len(data):
        raise CorruptRecord("the file is torn in a frame's header")
    payload_bytes, entries, checksum = _FRAME.unpack_from(data, at)
    begin = at + FRAME_HEADER_BYTES
    if not 0 < payload_bytes <= MAX_FRAME_BYTES:
        raise CorruptRecord(f"a frame claims {payload_bytes} bytes")
    if begin + payload_bytes > len(data):
        raise CorruptRecord("the file is torn in a frame")
    payload = data[begin : begin + payload_bytes]
    if checksum != xxhash.xxh3_64_intdigest(data[at : at + _FRAME_HEAD.size] + payload):
        raise CorruptRecord("a frame's checksum is wrong")
    return payload, entries
