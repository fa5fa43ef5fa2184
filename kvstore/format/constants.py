"""Magic numbers, sizes and persisted enumerations. Do not change a value once it was released."""

from __future__ import annotations

from enum import IntEnum
from typing import Final

PAGE_BYTES: Final = 4096
"""Slots begin at, and are multiples of, this: an O_DIRECT buffer and a DMA page."""

RECORD_MAGIC: Final = b"KVRECORD"
RECORD_VERSION: Final = 1
RECORD_HEADER_BYTES: Final = 256
MAX_SECTIONS: Final = 4
MAX_DIMENSIONS: Final = 6
DTYPE_BYTES: Final = 24
MAX_RECORD_BYTES: Final = 1 << 32
FIDELITY_EXACT: Final = 255
"""Fidelity is one byte: 255 is exact, less is further from the original."""


class CodecId(IntEnum):
    """Codecs by the id that records carry (``docs/codecs.md``); 0 is reserved for preallocated zeros."""

    RAW = 1
    LOSSLESS = 2
    LOSSLESS_ZSTD = 3
    FP8 = 4
    INT8 = 5
    INT4 = 6
    KIVI4 = 7
    KIVI2 = 8
    TURBO4 = 9
    TURBO3 = 10
    TURBO2 = 11
    TURBO4_3 = 12
    TURBO3_2 = 13
    CENTRED4 = 14
    CENTRED3 = 15
    CENTRED2 = 16
    CENTRED4_3 = 17
    CENTRED4_2 = 18
    CENTRED3_2 = 19

    @property
    def text(self) -> str:
        """The codec's name outside of Python: ``lossless-zstd``, ``turbo4-3``."""
        return self.name.lower().replace("_", "-")


CODECS_BY_NAME: Final[dict[str, CodecId]] = {codec.text: codec for codec in CodecId}

CODEC_FIDELITY: Final[dict[CodecId, int]] = {
    CodecId.RAW: FIDELITY_EXACT,
    CodecId.LOSSLESS: FIDELITY_EXACT,
    CodecId.LOSSLESS_ZSTD: FIDELITY_EXACT,
    CodecId.FP8: 127,
    CodecId.INT8: 178,
    CodecId.INT4: 84,
    CodecId.KIVI4: 85,
    CodecId.KIVI2: 34,
    CodecId.TURBO4: 82,
    CodecId.TURBO3: 59,
    CodecId.TURBO2: 36,
    CodecId.TURBO4_3: 59,
    CodecId.TURBO3_2: 36,
    CodecId.CENTRED4: 82,
    CodecId.CENTRED3: 59,
    CodecId.CENTRED2: 36,
    CodecId.CENTRED4_3: 59,
    CodecId.CENTRED4_2: 36,
    CodecId.CENTRED3_2: 36,
}
"""How near each codec comes to the original, by which codecs are compared. A record carries a number of its own."""

EXACT_CODECS: Final = frozenset(codec for codec, fidelity in CODEC_FIDELITY.items() if fidelity == FIDELITY_EXACT)
LOSSLESS_CHUNK_VALUES: Final = 65_536
"""Values of which a lossless record compresses each byte plane by itself."""

DTYPE_SIZES: Final[dict[str, int]] = {
    "uint8": 1,
    "int8": 1,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "bfloat16": 2,
    "float16": 2,
    "float32": 4,
}
"""Logical dtypes of this version, with bytes an element. Opaque payloads are ``uint8`` of one dimension."""

LOSSY_DTYPES: Final = frozenset({"bfloat16", "float16", "float32"})
"""Of these a lossy codec may make a record; what an engine quantised itself is stored exactly."""
