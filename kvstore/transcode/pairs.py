"""The pairs of codecs that records are transcoded between, and the marks in headers of what was.

Covers: which pairs there are, which namespaces they are for, what a header says. Does not cover: the bytes
(``kvstore.transcode.records``). Importing this loads no kernels.

All pairs are exact to exact. A lossy codec needs planes of heads and tokens, and a record's shape does not say which of
its axes they are; a codec on top of a lossy one would need a quality that was measured for the two together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from hashlib import sha256
from types import MappingProxyType
from typing import Final, NamedTuple

from kvstore.errors import InvalidArgument
from kvstore.format.constants import DTYPE_SIZES, LOSSLESS_CHUNK_VALUES, RECORD_HEADER_BYTES, CodecId
from kvstore.format.record import RecordHeader
from kvstore.protocol.namespace import Namespace

__all__ = ["CHECKSUM_BYTES", "PAIRS", "VALUE_BYTES", "Mark", "Pair", "mark_of", "pair_of", "restored_bytes"]

VALUE_BYTES: Final = (1, 2, 4)
"""Bytes of the values that an opaque payload may be of."""

CHECKSUM_BYTES: Final = 8
"""Of the original payload, at the end of the section of a pair that is restored."""


@dataclass(frozen=True, slots=True)
class Pair:
    """What records of one codec become.

    Attributes:
        name: ``"source>target"``.
        source: codec of the records that are transcoded; others are left as they are.
        target: codec of what they become.
        restored: whether what comes of it is for ``restore`` alone, which gives the original record back, byte for
            byte. Otherwise it is an ordinary record of the target codec, which readers decode.
    """

    name: str
    source: CodecId
    target: CodecId
    restored: bool

    def applies_to(self, namespace: Namespace) -> bool:
        """Whether a namespace can have records for this pair, and may have what it makes of them.

        What is restored before anybody reads it need not be of a codec that the namespace allows.
        """
        return self.source in namespace.codecs and (self.restored or self.target in namespace.codecs)

    def parameters(self, value_bytes: int) -> bytes:
        """16-byte digest of what ``restore`` has to know: the header's ``codec_parameters`` where ``restored``."""
        text = (
            f"{self.name} version=1 value_bytes={value_bytes} chunk={LOSSLESS_CHUNK_VALUES} rotate=1 planes=little "
            "checksum=xxh3"
        )
        return sha256(text.encode("ascii")).digest()[:16]


class Mark(NamedTuple):
    """What a header says of a record that has to be restored.

    Attributes:
        pair: that made it.
        value_bytes: of the values whose bytes were taken apart.
    """

    pair: Pair
    value_bytes: int


def _pair(source: CodecId, target: CodecId, *, restored: bool) -> Pair:
    return Pair(f"{source.text}>{target.text}", source, target, restored)


PAIRS: Final = MappingProxyType(
    {
        pair.name: pair
        for pair in (
            _pair(CodecId.RAW, CodecId.LOSSLESS, restored=True),
            _pair(CodecId.RAW, CodecId.LOSSLESS_ZSTD, restored=True),
            # Not restored: that would compress by lz4 again, slower than reading the bytes it saves, and another lz4
            # would give other bytes. Only tensor stores write lossless records, and they read both.
            _pair(CodecId.LOSSLESS, CodecId.LOSSLESS_ZSTD, restored=False),
        )
    }
)
"""All pairs by name."""

_MARKS: Final = {
    pair.parameters(value_bytes): Mark(pair, value_bytes)
    for pair in PAIRS.values()
    if pair.restored
    for value_bytes in VALUE_BYTES
}


def pair_of(name: str) -> Pair:
    """The pair of a name.

    Raises:
        InvalidArgument: there is none; lists those that there are.
    """
    pair = PAIRS.get(name)
    if pair is None:
        raise InvalidArgument(f"unknown pair of codecs {name!r} to transcode; there are {', '.join(PAIRS)}")
    return pair


def mark_of(header: RecordHeader) -> Mark | None:
    """How a record has to be restored before it is served, None where it is as it was put."""
    mark = _MARKS.get(header.codec_parameters)
    return mark if mark is not None and mark.pair.target is header.codec else None


def restored_bytes(header: RecordHeader) -> int:
    """Bytes of the record that ``restore`` gives: what a slot in memory must have room for, without padding."""
    if mark_of(header) is None:
        return header.record_bytes
    return RECORD_HEADER_BYTES + math.prod(header.shape) * DTYPE_SIZES[header.dtype]
