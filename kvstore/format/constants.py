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
    """Codecs by the id that records carry; 0 is reserved for preallocated zeros."""

    RAW = 1


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
