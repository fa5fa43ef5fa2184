"""Codecs: what a block's KV becomes in a record, to the bit, as ``docs/codecs.md`` says.

One file a method, each with the exact sizes, the source and a reference implementation in plain torch. The fast
implementations in ``kvstore_kernels.cpu`` and ``kvstore_kernels.cuda`` give the same bytes. Importing this package
loads the standard library only; encoding and decoding load torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from kvstore_kernels.codecs.base import EXACT, FIDELITY_EXACT, Codec, Encoded, PlanesCodec
from kvstore_kernels.codecs.centred import CentredKey
from kvstore_kernels.codecs.fp8 import Fp8
from kvstore_kernels.codecs.int4 import Int4
from kvstore_kernels.codecs.int8 import Int8
from kvstore_kernels.codecs.kivi import Kivi2Value, KiviKey
from kvstore_kernels.codecs.lossless import Lossless, Lz4, Zstd
from kvstore_kernels.codecs.method import LOSSY_DTYPES, Region
from kvstore_kernels.codecs.raw import Raw
from kvstore_kernels.codecs.turbo import Turbo

__all__ = [
    "CODECS",
    "EXACT",
    "FIDELITY_EXACT",
    "LOSSY_DTYPES",
    "Codec",
    "Encoded",
    "Region",
    "codec_of_id",
    "get_codec",
]

_FP8: Final = Fp8()
_INT8: Final = Int8()
_INT4: Final = Int4("int4")
_TURBO: Final = {bits: Turbo(bits) for bits in (4, 3, 2)}
_CENTRED: Final = {bits: CentredKey(bits) for bits in (4, 3, 2)}

CODECS: Final[Mapping[str, Codec]] = MappingProxyType(
    {
        codec.name: codec
        for codec in (
            Raw("raw", 1, FIDELITY_EXACT, ""),
            Lossless("lossless", 2, Lz4()),
            Lossless("lossless-zstd", 3, Zstd()),
            PlanesCodec("fp8", 4, 127, channel=_FP8, token=_FP8),
            PlanesCodec("int8", 5, 178, channel=_INT8, token=_INT8),
            PlanesCodec("int4", 6, 84, channel=_INT4, token=_INT4),
            PlanesCodec("kivi4", 7, 85, channel=KiviKey("kivi4k", 4), token=Int4("kivi4v")),
            PlanesCodec("kivi2", 8, 34, channel=KiviKey("kivi2k", 2), token=Kivi2Value()),
            PlanesCodec("turbo4", 9, 82, channel=_TURBO[4], token=_TURBO[4]),
            PlanesCodec("turbo3", 10, 59, channel=_TURBO[3], token=_TURBO[3]),
            PlanesCodec("turbo2", 11, 36, channel=_TURBO[2], token=_TURBO[2]),
            PlanesCodec("turbo4-3", 12, 59, channel=_TURBO[4], token=_TURBO[3]),
            PlanesCodec("turbo3-2", 13, 36, channel=_TURBO[3], token=_TURBO[2]),
            PlanesCodec("centred4", 14, 82, channel=_CENTRED[4], token=_TURBO[4]),
            PlanesCodec("centred3", 15, 59, channel=_CENTRED[3], token=_TURBO[3]),
            PlanesCodec("centred2", 16, 36, channel=_CENTRED[2], token=_TURBO[2]),
            PlanesCodec("centred4-3", 17, 59, channel=_CENTRED[4], token=_TURBO[3]),
            PlanesCodec("centred4-2", 18, 36, channel=_CENTRED[4], token=_TURBO[2]),
            PlanesCodec("centred3-2", 19, 36, channel=_CENTRED[3], token=_TURBO[2]),
        )
    }
)
"""All codecs by name, in the order of their ids."""

_BY_ID: Final = {codec.id: codec for codec in CODECS.values()}


def get_codec(name: str) -> Codec:
    """The codec of a name.

    Raises:
        ValueError: there is none; lists those that there are.
    """
    codec = CODECS.get(name)
    if codec is None:
        raise ValueError(f"unknown codec {name!r}; known are {', '.join(CODECS)}")
    return codec


def codec_of_id(codec_id: int) -> Codec:
    """The codec of an id in a record's header.

    Raises:
        ValueError: there is none in this version.
    """
    codec = _BY_ID.get(codec_id)
    if codec is None:
        raise ValueError(f"unknown codec id {codec_id}; this version knows 1 to {max(_BY_ID)}")
    return codec
