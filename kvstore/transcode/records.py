"""Whole records from one codec to another and back.

Covers: the bytes of both, which are on ``docs/transcoding.md``. Does not cover: where they lie. Functions may run in
any thread; what a thread needs beside the result is at most ``SCRATCH_BYTES`` and the states of its compressors, kept
for its next call. Compressors, kernels and checksums of more than a few KiB run without the interpreter lock.
"""

from __future__ import annotations

import math
import struct
import threading
from collections.abc import Iterator
from typing import Final

import msgspec
import numpy as np
import numpy.typing as npt
import zstandard

from kvstore.errors import CorruptRecord, InvalidArgument
from kvstore.format.constants import DTYPE_SIZES, PAGE_BYTES, RECORD_HEADER_BYTES, CodecId
from kvstore.format.record import Buffer, RecordHeader, checksum, decode_record, encode_header, padded_bytes
from kvstore.transcode.pairs import CHECKSUM_BYTES, VALUE_BYTES, Mark, Pair, mark_of, pair_of, restored_bytes
from kvstore_kernels.codecs import codec_of_id
from kvstore_kernels.codecs.lossless import CHUNK_VALUES, STORED, Compressor, Lossless, Zstd, planes_of_section
from kvstore_kernels.cpu.byte_planes import join_planes, split_planes
from kvstore_kernels.cpu.kinds import Kind

__all__ = ["SCRATCH_BYTES", "restore", "transcode"]

SCRATCH_BYTES: Final = CHUNK_VALUES * max(VALUE_BYTES)
"""Byte planes of one chunk of values."""

_KINDS: Final = {1: Kind("uint8"), 2: Kind("bfloat16"), 4: Kind("float32")}
"""A kernel that takes values apart needs only their width."""

_OPAQUE: Final = "uint8"
"""Of this dtype are payloads of which the store knows nothing, whatever numbers they hold."""

_SAMPLE_BYTES: Final = 16 << 10
_NO_PARAMETERS: Final = bytes(16)
_CHECKSUM: Final = struct.Struct("<Q")

_SPEEDY: Final = zstandard.ZstdCompressionParameters(
    window_log=17,
    hash_log=6,
    chain_log=6,
    search_log=1,
    min_match=7,
    strategy=zstandard.STRATEGY_FAST,
    write_content_size=True,
)
"""Long matches only, looked for in a table of 64: exponents have entropy to gain and next to no matches. On a plane of
exponents this is more than twice as fast as level 1."""


class _SpeedyZstd(Zstd):
    """Frames that any ``lossless-zstd`` decoder takes, made quickly; for one thread."""

    def __init__(self) -> None:
        self._context = zstandard.ZstdCompressor(compression_params=_SPEEDY)

    def compress(self, plane: Buffer) -> bytes:
        """As ``Compressor.compress``."""
        return self._context.compress(plane)


class _Thread(threading.local):
    """What a thread keeps: room for planes, and compressors by codec."""

    def __init__(self) -> None:
        self.planes = np.empty(SCRATCH_BYTES, np.uint8)
        self.compressors: dict[CodecId, Compressor] = {CodecId.LOSSLESS_ZSTD: _SpeedyZstd()}

    def compressor(self, codec: CodecId) -> Compressor:
        """The one of a codec."""
        return self.compressors.get(codec) or _lossless(codec).compressor


_THREAD: Final = _Thread()


class _Section:
    """A section that is being written behind the room for a header.

    Args:
        out: the record.
        planes: how many there will be.
        most_bytes: of the record.
    """

    def __init__(self, out: memoryview, planes: int, most_bytes: int) -> None:
        self._out = out
        self._most_bytes = most_bytes
        self._entries: list[int] = []
        self._at = RECORD_HEADER_BYTES + 4 * planes

    def add(self, plane: Buffer, compressed: bytes) -> bool:
        """Add a plane, compressed where that made it shorter; False where there is no room for it."""
        plane_bytes = memoryview(plane).nbytes
        short = len(compressed) < plane_bytes
        length = len(compressed) if short else plane_bytes
        if self._at + length > self._most_bytes:
            return False
        self._out[self._at : self._at + length] = compressed if short else plane
        self._at += length
        self._entries.append(length if short else length | STORED)
        return True

    def finish(self, header: RecordHeader, codec: CodecId, parameters: bytes, trailer: bytes) -> memoryview | None:
        """The whole record with a header like that of the original; None where there is no room for it."""
        end = self._at + len(trailer)
        if end > self._most_bytes:
            return None
        struct.pack_into(f"<{len(self._entries)}I", self._out, RECORD_HEADER_BYTES, *self._entries)
        self._out[self._at : end] = trailer
        return _with_header(self._out[:end], header, codec, parameters)


def transcode(record: Buffer, pair: Pair | str, out: memoryview | None = None) -> memoryview | None:
    """A record in the other codec of a pair. Key, parent, namespace, part, dtype, shape, tokens and lineage stay.

    Whether its namespace may have such a record says ``Pair.applies_to``. The memory of ``record`` may be written to by
    others meanwhile: what comes of that is refused by ``restore``, or by readers.

    Args:
        record: a whole one without padding; its payload's checksum is verified.
        pair: or its name.
        out: writable memory for what comes of it, which is shorter than ``record`` by a page or more; new memory where
            it is None. Bytes behind the result are unspecified.

    Returns:
        The record, a view of ``out``. None where the record stays as it is: it is not of the pair's source, or would
        not take at least one page of 4096 bytes less.

    Raises:
        CorruptRecord: ``record`` is damaged.
        InvalidArgument: there is no such pair, or ``out`` is too small.
    """
    pair = pair_of(pair) if isinstance(pair, str) else pair
    header, payload = decode_record(record)
    if header.codec is not pair.source or header.codec_parameters != _own_parameters(pair.source):
        return None
    most_bytes = padded_bytes(header.record_bytes) - PAGE_BYTES
    if most_bytes < PAGE_BYTES:
        return None
    target = _memory(out, most_bytes)
    compressor = _THREAD.compressor(pair.target)
    if pair.source is not CodecId.RAW:
        return _recompressed(header, payload, pair, compressor, target, most_bytes)
    value_bytes = _value_bytes(header, payload, compressor)
    chunks = -(-payload.nbytes // (CHUNK_VALUES * value_bytes))
    section = _Section(target, chunks * value_bytes, most_bytes)
    for plane in _split(payload, value_bytes):
        if not section.add(plane, compressor.compress(plane)):
            return None
    original = _CHECKSUM.pack(header.payload_checksum)
    return section.finish(header, pair.target, pair.parameters(value_bytes), original)


def restore(record: Buffer, out: memoryview | None = None) -> memoryview:
    """The record that ``transcode`` was given, byte for byte; one that needs no restoring as it is.

    Args:
        record: a whole one without padding; its payload's checksum is verified.
        out: writable memory of ``restored_bytes(header)`` or more; new memory where it is None. It stays as it is where
            nothing has to be restored (``mark_of``).

    Returns:
        A view of ``out``, or of ``record`` where nothing has to be restored.

    Raises:
        CorruptRecord: ``record`` is damaged, or what comes out is not what went in.
        InvalidArgument: ``out`` is too small.
    """
    header, payload = decode_record(record)
    mark = mark_of(header)
    if mark is None:
        return memoryview(record).cast("B")
    record_bytes = restored_bytes(header)
    target = _memory(out, record_bytes)[:record_bytes]
    original = target[RECORD_HEADER_BYTES:]
    try:
        _join(payload[:-CHECKSUM_BYTES], mark, original)
    except ValueError as error:
        raise CorruptRecord(f"a record of {mark.pair.name} cannot be restored: {error}") from None
    restored = _with_header(target, header, mark.pair.source, _NO_PARAMETERS)
    if checksum(original) != _CHECKSUM.unpack(payload[-CHECKSUM_BYTES:])[0]:
        raise CorruptRecord(f"a record of {mark.pair.name} gives other bytes than it was made of")
    return restored


def _recompressed(
    header: RecordHeader, payload: memoryview, pair: Pair, compressor: Compressor, target: memoryview, most_bytes: int
) -> memoryview | None:
    """Planes of a lossless record compressed anew; what is not restored carries the codec's own parameters."""
    width = DTYPE_SIZES[header.dtype]
    values = math.prod(header.shape)
    source = _THREAD.compressor(pair.source)
    section = _Section(target, -(-values // CHUNK_VALUES) * width, most_bytes)
    try:
        for data, stored, plane_bytes in planes_of_section(payload, width, values):
            plane = data if stored else source.decompress(data, plane_bytes)
            if not section.add(plane, compressor.compress(plane)):
                return None
    except ValueError as error:
        raise CorruptRecord(f"a record of {header.codec.text} cannot be decoded: {error}") from None
    return section.finish(header, pair.target, _own_parameters(pair.target), b"")


def _split(payload: memoryview, value_bytes: int) -> Iterator[memoryview]:
    """Byte planes of a payload's chunks, each valid until the next chunk's."""
    planes, kind = _THREAD.planes, _KINDS[value_bytes]
    source, values = _address(payload), payload.nbytes // value_bytes
    for first in range(0, values, CHUNK_VALUES):
        count = min(CHUNK_VALUES, values - first)
        split_planes(kind, source + first * value_bytes, planes.ctypes.data, count)
        for plane in range(value_bytes):
            yield planes[plane * count : (plane + 1) * count].data


def _join(section: memoryview, mark: Mark, original: memoryview) -> None:
    """Inverse of ``_split`` and compression.

    Raises:
        ValueError: the section is not one of ``original``'s length.
    """
    width = mark.value_bytes
    values, odd = divmod(original.nbytes, width)
    if odd:
        raise ValueError(f"{original.nbytes} bytes are not whole values of {width}")
    compressor, kind = _THREAD.compressor(mark.pair.target), _KINDS[width]
    target = _address(original)
    planes: list[npt.NDArray[np.uint8]] = []
    for data, stored, plane_bytes in planes_of_section(section, width, values):
        planes.append(np.frombuffer(data if stored else compressor.decompress(data, plane_bytes), np.uint8))
        if len(planes) == width:
            addresses = np.array([plane.ctypes.data for plane in planes], np.int64)
            join_planes(kind, target, addresses.ctypes.data, plane_bytes)
            target += plane_bytes * width
            planes.clear()


def _value_bytes(header: RecordHeader, payload: memoryview, compressor: Compressor) -> int:
    """Bytes of the values that a payload is taken apart by: of its dtype, or for opaque ones what a sample suggests."""
    if header.dtype != _OPAQUE:
        return DTYPE_SIZES[header.dtype]
    begin = max(0, payload.nbytes - _SAMPLE_BYTES) // 2 & -max(VALUE_BYTES)
    sample = payload[begin : begin + _SAMPLE_BYTES]
    fitting = [width for width in VALUE_BYTES if payload.nbytes % width == 0 and sample.nbytes % width == 0]
    return min(fitting, key=lambda width: sum(_shorter(plane, compressor) for plane in _split(sample, width)))


def _shorter(plane: memoryview, compressor: Compressor) -> int:
    """Bytes that a plane takes."""
    return min(plane.nbytes, len(compressor.compress(plane)))


def _with_header(record: memoryview, original: RecordHeader, codec: CodecId, parameters: bytes) -> memoryview:
    """Put a header before a section that is there: the original's, of another codec."""
    header = msgspec.structs.replace(
        original,
        codec=codec,
        codec_parameters=parameters,
        section_bytes=(record.nbytes - RECORD_HEADER_BYTES,),
        payload_checksum=checksum(record[RECORD_HEADER_BYTES:]),
    )
    record[:RECORD_HEADER_BYTES] = encode_header(header)
    return record


def _memory(out: memoryview | None, least_bytes: int) -> memoryview:
    """Writable bytes, new ones where none are given."""
    if out is None:
        return np.empty(least_bytes, np.uint8).data
    view = out.cast("B")
    if view.readonly or view.nbytes < least_bytes:
        kind = "read-only memory" if view.readonly else "memory"
        raise InvalidArgument(f"out must be writable memory of {least_bytes} bytes, got {kind} of {view.nbytes}")
    return view


def _address(view: memoryview) -> int:
    return int(np.frombuffer(view, np.uint8).ctypes.data)


def _lossless(codec: CodecId) -> Lossless:
    found = codec_of_id(codec)
    assert isinstance(found, Lossless)
    return found


def _own_parameters(codec: CodecId) -> bytes:
    """What a writer of a codec puts into headers, unlike a pair."""
    return _NO_PARAMETERS if codec is CodecId.RAW else codec_of_id(codec).digest
