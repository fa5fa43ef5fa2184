"""First bytes of the SSD tier's files: the slab file's page, and the header of a log or checkpoint.

Covers: encoding, the strict decoder, file names. Does not cover: the frames behind the header (``ssd_log``). All
integers are little-endian; ``docs/ssd-format.md`` has the tables and the order of writes and syncs.
"""

from __future__ import annotations

import re
import struct
from typing import Final

import msgspec
import xxhash

from kvstore.errors import CorruptRecord
from kvstore.format.constants import PAGE_BYTES

SSD_FORMAT_VERSION: Final = 1
SLABS_NAME: Final = "slabs"
FIRST_SSD_PAGE: Final = 1
"""Page of the slab file's first slab; the page before it is the header."""

SLABS_MAGIC: Final = b"KVSSDSLB"
LOG_MAGIC: Final = b"KVSSDLOG"
CHECKPOINT_MAGIC: Final = b"KVSSDCKP"
FILE_HEADER_BYTES: Final = 64
STORE_ID_BYTES: Final = 16

# magic 8 | version u16 | header bytes u16 | page bytes u32 | slab bytes u64 | store id 16 | reserved 16 | checksum u64
_SLABS: Final = struct.Struct("<8sHHIQ16s16sQ")
# magic 8 | version u16 | header bytes u16 | reserved u32 | number u64 | store id 16 | reserved 16 | checksum u64
_NUMBERED: Final = struct.Struct("<8sHHIQ16s16sQ")
_CHECKSUM: Final = struct.Struct("<Q")
_NAME: Final = re.compile(r"(log|checkpoint)-([0-9a-f]{16})")
assert _SLABS.size == _NUMBERED.size == FILE_HEADER_BYTES


class OtherFormat(CorruptRecord):
    """The file is one of ours, of a version that this code does not know."""


class SlabsHeader(msgspec.Struct, frozen=True):
    """What the slab file's first page says: how it is cut, and which store it belongs to."""

    slab_bytes: int
    store_id: bytes


class NumberedHeader(msgspec.Struct, frozen=True):
    """What a log or checkpoint says of itself: its number, and the store that it belongs to."""

    magic: bytes
    number: int
    store_id: bytes


def log_name(number: int) -> str:
    """Name of a log's file."""
    return f"log-{number:016x}"


def checkpoint_name(number: int) -> str:
    """Name of a checkpoint's file."""
    return f"checkpoint-{number:016x}"


def parse_name(name: str) -> tuple[str, int] | None:
    """``("log" | "checkpoint", number)`` of a file's name, None where it is neither."""
    found = _NAME.fullmatch(name)
    return None if found is None else (found[1], int(found[2], 16))


def _sealed(packed: bytes) -> bytes:
    return packed[:-8] + _CHECKSUM.pack(xxhash.xxh3_64_intdigest(packed[:-8]))


def encode_slabs_header(header: SlabsHeader) -> bytes:
    """The slab file's first page, 4096 bytes."""
    packed = _SLABS.pack(
        SLABS_MAGIC,
        SSD_FORMAT_VERSION,
        FILE_HEADER_BYTES,
        PAGE_BYTES,
        header.slab_bytes,
        header.store_id,
        bytes(16),
        0,
    )
    return _sealed(packed).ljust(PAGE_BYTES, b"\0")


def encode_numbered_header(header: NumberedHeader) -> bytes:
    """The first 64 bytes of a log or checkpoint."""
    packed = _NUMBERED.pack(
        header.magic, SSD_FORMAT_VERSION, FILE_HEADER_BYTES, 0, header.number, header.store_id, bytes(16), 0
    )
    return _sealed(packed)


def _check(data: bytes, magic: bytes, what: str) -> None:
    """Raises what is wrong with a header's frame."""
    if len(data) < FILE_HEADER_BYTES:
        raise CorruptRecord(f"{what} ends within its header")
    if data[:8] != magic:
        raise CorruptRecord(f"{what} has a wrong magic")
    version = int.from_bytes(data[8:10], "little")
    if version != SSD_FORMAT_VERSION:
        raise OtherFormat(f"{what} is of format {version}; this version knows {SSD_FORMAT_VERSION}")
    if xxhash.xxh3_64_intdigest(data[: FILE_HEADER_BYTES - 8]) != int.from_bytes(data[56:64], "little"):
        raise CorruptRecord(f"the header's checksum of {what} is wrong")


def decode_slabs_header(data: bytes) -> SlabsHeader:
    """Strictly decode the slab file's first page.

    Raises:
        OtherFormat: it is of another version.
        CorruptRecord: it is no such page.
    """
    _check(data, SLABS_MAGIC, "the slab file")
    _, _, header_bytes, page_bytes, slab_bytes, store_id, reserved, _ = _SLABS.unpack_from(data)
    if header_bytes != FILE_HEADER_BYTES:
        raise CorruptRecord(f"the slab file's header has {header_bytes} bytes, not {FILE_HEADER_BYTES}")
    if page_bytes != PAGE_BYTES:
        raise OtherFormat(f"the slab file has pages of {page_bytes} bytes; this version has {PAGE_BYTES}")
    if any(reserved):
        raise CorruptRecord("reserved bytes of the slab file's header are not zero")
    if not slab_bytes or slab_bytes % PAGE_BYTES:
        raise CorruptRecord(f"slabs of {slab_bytes} bytes are impossible")
    if len(data) < PAGE_BYTES:
        raise CorruptRecord("the slab file ends within its first page")
    if any(data[FILE_HEADER_BYTES:PAGE_BYTES]):
        raise CorruptRecord("the slab file's first page is not zero behind its header")
    return SlabsHeader(slab_bytes, store_id)


def decode_numbered_header(data: bytes, magic: bytes) -> NumberedHeader:
    """Strictly decode the first 64 bytes of a log or checkpoint.

    Raises:
        OtherFormat: it is of another version.
        CorruptRecord: it is no such header.
    """
    _check(data, magic, "the file")
    _, _, header_bytes, reserved, number, store_id, rest, _ = _NUMBERED.unpack_from(data)
    if header_bytes != FILE_HEADER_BYTES or reserved or any(rest):
        raise CorruptRecord("reserved bytes of the header are not zero")
    return NumberedHeader(magic, number, store_id)
