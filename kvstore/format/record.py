"""The record: 256 bytes of header that say what the sections behind it are.

Covers: encoding a header, the strict decoder, checksums and zero padding. Does not cover: what the sections
mean to a codec. All integers are little-endian; the table of offsets is in ``docs/record.md``.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Final

import msgspec
import xxhash

from kvstore.errors import CorruptRecord, InvalidArgument
from kvstore.format.constants import (
    DTYPE_BYTES,
    DTYPE_SIZES,
    EXACT_CODECS,
    FIDELITY_EXACT,
    LOSSLESS_CHUNK_VALUES,
    LOSSY_DTYPES,
    MAX_DIMENSIONS,
    MAX_RECORD_BYTES,
    MAX_SECTIONS,
    PAGE_BYTES,
    RECORD_HEADER_BYTES,
    RECORD_MAGIC,
    RECORD_VERSION,
    CodecId,
)

Buffer = bytes | bytearray | memoryview
"""One contiguous run of bytes."""

# magic 8 | version u16 | header bytes u16 | part u16 | codec u16 | record bytes u64 | key 32 | parent 32 |
# namespace digest 32 | codec parameter digest 16 | logical dtype 24 | shape 6 x u32 | tokens u32 |
# dimensions u8 | sections u8 | fidelity u8 | lineage loss u8 | section bytes 4 x u64 | payload checksum u64 |
# reserved 16 | header checksum u64
_LAYOUT: Final = struct.Struct("<8sHHHHQ32s32s32s16s24s6IIBBBB4QQ16sQ")
_KEY: Final = slice(24, 56)
_CHECKSUM: Final = struct.Struct("<Q")
_CHECKED_BYTES: Final = RECORD_HEADER_BYTES - 8
_NO_PARAMETERS: Final = bytes(16)
_LOSSY_SECTIONS: Final = 2
"""Of a lossy record: keys and values, or latents and rotary keys."""
_MOST_LOSSY_RATIO: Final = 16
"""No lossy codec makes less than a sixteenth of a block: two bits and a scale of a float32."""
_ZEROS: Final = bytes(1 << 16)
_CODECS: Final = {int(codec): codec for codec in CodecId}
_DTYPES: Final = {name.encode("ascii").ljust(DTYPE_BYTES, b"\0"): name for name in DTYPE_SIZES}
assert _LAYOUT.size == RECORD_HEADER_BYTES


class RecordHeader(msgspec.Struct, frozen=True):
    """What a record says of itself.

    Attributes:
        key, parent_key: 32 bytes each; the parent is 32 zero bytes for a first block.
        namespace_digest: 32 bytes, of one generation of a namespace.
        part: shard and KV group within the block.
        codec: the numerics of the sections.
        codec_parameters: 16-byte digest of the codec's parameters, zeros for ``raw``.
        fidelity: what the codec kept: 255 exact, less is further away.
        dtype: logical dtype before encoding (``DTYPE_SIZES``).
        shape: logical shape before encoding, 1 to 6 dimensions.
        token_count: tokens of the block, 0 where unknown.
        section_bytes: lengths of 1 to 4 sections that follow the header without gaps.
        payload_checksum: xxh3_64 over all sections in order.
        lineage: fidelity of what the block was computed on: 255 where all blocks before it were exact, else the lowest
            effective fidelity among those that the engine had loaded.
    """

    key: bytes
    parent_key: bytes
    namespace_digest: bytes
    part: int
    codec: CodecId
    codec_parameters: bytes
    fidelity: int
    dtype: str
    shape: tuple[int, ...]
    token_count: int
    section_bytes: tuple[int, ...]
    payload_checksum: int
    lineage: int = FIDELITY_EXACT

    @property
    def effective_fidelity(self) -> int:
        """How near the record is to what the model gives without any loss: the lower one of codec and lineage."""
        return min(self.fidelity, self.lineage)

    @property
    def record_bytes(self) -> int:
        """Header and sections, without the padding of a slot."""
        return RECORD_HEADER_BYTES + sum(self.section_bytes)


def checksum(*sections: Buffer) -> int:
    """xxh3_64 of the sections as if they were joined."""
    if len(sections) == 1:
        return xxhash.xxh3_64_intdigest(sections[0])
    state = xxhash.xxh3_64()
    for section in sections:
        state.update(section)
    return state.intdigest()


def record_header(
    *,
    key: bytes,
    parent_key: bytes,
    namespace_digest: bytes,
    part: int,
    codec: CodecId,
    codec_parameters: bytes,
    fidelity: int,
    dtype: str,
    shape: Sequence[int],
    section_bytes: Sequence[int],
    payload_checksum: int,
    token_count: int = 0,
    lineage: int = FIDELITY_EXACT,
) -> RecordHeader:
    """Header of a record whose sections a codec made; see ``RecordHeader`` for the arguments.

    ``encode_header`` checks them.
    """
    return RecordHeader(
        key=key,
        parent_key=parent_key,
        namespace_digest=namespace_digest,
        part=part,
        codec=codec,
        codec_parameters=codec_parameters,
        fidelity=fidelity,
        dtype=dtype,
        shape=tuple(shape),
        token_count=token_count,
        section_bytes=tuple(section_bytes),
        payload_checksum=payload_checksum,
        lineage=lineage,
    )


def raw_header(
    *,
    key: bytes,
    parent_key: bytes,
    namespace_digest: bytes,
    part: int,
    payload: Buffer,
    dtype: str = "uint8",
    shape: Sequence[int] | None = None,
    token_count: int = 0,
    lineage: int = FIDELITY_EXACT,
) -> RecordHeader:
    """Header of a ``raw`` record: one section, the payload itself, as exact as what it was computed on."""
    length = memoryview(payload).nbytes
    return record_header(
        key=key,
        parent_key=parent_key,
        namespace_digest=namespace_digest,
        part=part,
        codec=CodecId.RAW,
        codec_parameters=_NO_PARAMETERS,
        fidelity=FIDELITY_EXACT,
        dtype=dtype,
        shape=(length,) if shape is None else shape,
        section_bytes=(length,),
        payload_checksum=checksum(payload),
        token_count=token_count,
        lineage=lineage,
    )


def encode_header(header: RecordHeader) -> bytes:
    """The 256 bytes of a header.

    Raises:
        InvalidArgument: the header describes no record that the decoder would accept.
    """
    dimensions, sections = len(header.shape), len(header.section_bytes)
    try:
        packed = _LAYOUT.pack(
            RECORD_MAGIC,
            RECORD_VERSION,
            RECORD_HEADER_BYTES,
            header.part,
            header.codec,
            header.record_bytes,
            header.key,
            header.parent_key,
            header.namespace_digest,
            header.codec_parameters,
            header.dtype.encode("ascii"),
            *header.shape,
            *(0,) * (MAX_DIMENSIONS - dimensions),
            header.token_count,
            dimensions,
            sections,
            header.fidelity,
            FIDELITY_EXACT - header.lineage,
            *header.section_bytes,
            *(0,) * (MAX_SECTIONS - sections),
            header.payload_checksum,
            bytes(16),
            0,
        )
    except (struct.error, UnicodeEncodeError) as error:
        raise InvalidArgument(f"no record can hold this header: {error}") from None
    encoded = packed[:_CHECKED_BYTES] + _CHECKSUM.pack(xxhash.xxh3_64_intdigest(packed[:_CHECKED_BYTES]))
    try:
        decoded = decode_header(encoded)
    except CorruptRecord as error:
        raise InvalidArgument(f"no record can hold this header: {error}") from None
    if decoded != header:
        raise InvalidArgument("no record can hold this header: keys and digests must have their full lengths")
    return encoded


def header_key(data: Buffer) -> bytes:
    """The key that 256 bytes of header are of, if they are a header: nothing is checked."""
    return bytes(memoryview(data).cast("B")[_KEY])


def decode_header(data: Buffer) -> RecordHeader:
    """Strictly decode the first 256 bytes of a record.

    The bytes are copied out first, so memory that changes underneath cannot pass one check and fail another.

    Raises:
        CorruptRecord: too short, wrong magic, version, checksum, or any field outside its bounds.
    """
    whole = type(data) is bytes and len(data) == RECORD_HEADER_BYTES
    raw = bytes(data) if whole else bytes(memoryview(data).cast("B")[:RECORD_HEADER_BYTES])
    if len(raw) != RECORD_HEADER_BYTES:
        raise CorruptRecord(f"a record begins with {RECORD_HEADER_BYTES} bytes of header, got {len(raw)}")
    fields = _LAYOUT.unpack(raw)
    magic, version, header_bytes, part, codec, record_bytes = fields[:6]
    key, parent_key, namespace_digest, codec_parameters, dtype_raw = fields[6:11]
    shape, token_count = fields[11:17], fields[17]
    dimensions, sections, fidelity, lineage_loss = fields[18:22]
    section_bytes, payload_checksum, reserved_tail, header_checksum = fields[22:26], *fields[26:29]
    if magic != RECORD_MAGIC:
        raise CorruptRecord("no record here: wrong magic")
    if version != RECORD_VERSION or header_bytes != RECORD_HEADER_BYTES:
        raise CorruptRecord(f"record version {version} with {header_bytes} header bytes is not known to this version")
    if xxhash.xxh3_64_intdigest(raw[:_CHECKED_BYTES]) != header_checksum:
        raise CorruptRecord("the header's checksum is wrong")
    if reserved_tail != _NO_PARAMETERS:
        raise CorruptRecord("reserved header bytes are not zero")
    if not any(key):
        raise CorruptRecord("the record's key is the root")
    if key == parent_key:
        raise CorruptRecord("the record is its own parent")
    codec_id = _CODECS.get(codec)
    if codec_id is None:
        raise CorruptRecord(f"unknown codec id {codec}")
    dtype = _DTYPES.get(dtype_raw)
    if dtype is None:
        raise CorruptRecord(f"unknown logical dtype {dtype_raw.rstrip(bytes(1)).decode('ascii', 'replace')!r}")
    if not 1 <= dimensions <= MAX_DIMENSIONS or any(shape[dimensions:]) or not all(shape[:dimensions]):
        raise CorruptRecord(f"impossible shape {shape} of {dimensions} dimensions")
    lengths = section_bytes[:sections]
    if not 1 <= sections <= MAX_SECTIONS or any(section_bytes[sections:]) or not all(lengths):
        raise CorruptRecord(f"impossible sections {section_bytes}, {sections} of them")
    if record_bytes > MAX_RECORD_BYTES or record_bytes != RECORD_HEADER_BYTES + sum(section_bytes):
        raise CorruptRecord(f"the record's {record_bytes} bytes are not its header and sections")
    elements = 1
    for extent in shape[:dimensions]:
        elements *= extent
    problem = _codec_problem(codec_id, dtype, elements, lengths)
    if not problem and (codec_id in EXACT_CODECS) != (fidelity == FIDELITY_EXACT):
        problem = f"fidelity {fidelity} is not that of {codec_id.text}"
    if not problem and (codec_id is CodecId.RAW) != (codec_parameters == _NO_PARAMETERS):
        problem = f"the digest of parameters is not one of {codec_id.text}"
    if problem:
        raise CorruptRecord(problem)
    return RecordHeader(
        key=key,
        parent_key=parent_key,
        namespace_digest=namespace_digest,
        part=part,
        codec=codec_id,
        codec_parameters=codec_parameters,
        fidelity=fidelity,
        dtype=dtype,
        shape=shape[:dimensions],
        token_count=token_count,
        section_bytes=lengths,
        payload_checksum=payload_checksum,
        lineage=FIDELITY_EXACT - lineage_loss,
    )


def _codec_problem(codec: CodecId, dtype: str, elements: int, lengths: tuple[int, ...]) -> str:
    """Why a codec cannot have made sections of these lengths from so many elements; "" where it can.

    Whoever decodes may rely on the block being no larger than a record may be: nothing is allocated for more.
    """
    element_bytes = DTYPE_SIZES[dtype]
    logical_bytes = elements * element_bytes
    if codec is CodecId.RAW:
        right = len(lengths) == 1 and lengths[0] == logical_bytes
        return "" if right else "a raw record's payload is not its dtype times its shape"
    if logical_bytes > MAX_RECORD_BYTES:
        return f"a block of {logical_bytes} bytes is larger than a record may be"
    payload_bytes = sum(lengths)
    if codec in EXACT_CODECS:
        # For each chunk and byte plane a length of four bytes, and at least one byte; never more than as it is.
        table_bytes = -(-elements // LOSSLESS_CHUNK_VALUES) * element_bytes * 4
        right = len(lengths) == 1 and table_bytes * 5 // 4 <= payload_bytes <= table_bytes + logical_bytes
    elif dtype not in LOSSY_DTYPES:
        return f"a lossy codec makes no record of {dtype}"
    else:
        right = len(lengths) == _LOSSY_SECTIONS and payload_bytes <= logical_bytes <= payload_bytes * _MOST_LOSSY_RATIO
    return "" if right else f"sections of {lengths} bytes are not {codec.text} of a block of {logical_bytes}"


def decode_record(data: Buffer) -> tuple[RecordHeader, memoryview]:
    """Decode a whole record without padding and verify its payload.

    Returns:
        The header and a view of all sections, valid as long as ``data`` is and does not change.

    Raises:
        CorruptRecord: as ``decode_header``, or the length or the payload's checksum is wrong.
    """
    view = memoryview(data).cast("B")
    header = decode_header(view)
    if view.nbytes != header.record_bytes:
        raise CorruptRecord(f"{view.nbytes} bytes given for a record of {header.record_bytes}")
    payload = view[RECORD_HEADER_BYTES:]
    if checksum(payload) != header.payload_checksum:
        raise CorruptRecord("the payload's checksum is wrong")
    return header, payload


def padded_bytes(record_bytes: int) -> int:
    """Bytes of the smallest exact slot for a record."""
    return -(-record_bytes // PAGE_BYTES) * PAGE_BYTES


def padding_is_zero(slot: Buffer, record_bytes: int) -> bool:
    """Whether all bytes of a slot behind its record are zero."""
    rest = memoryview(slot).cast("B")[record_bytes:]
    return all(
        rest[at : at + len(_ZEROS)].tobytes() == _ZEROS[: min(len(_ZEROS), rest.nbytes - at)]
        for at in range(0, rest.nbytes, len(_ZEROS))
    )
