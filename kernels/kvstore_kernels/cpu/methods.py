"""The compiled functions of each method that a codec encodes planes by."""

from __future__ import annotations

import math
from typing import Final

from kvstore_kernels.codecs import EXACT
from kvstore_kernels.cpu import work
from kvstore_kernels.cpu.centred import decode_centred, encode_centred, scratch_bytes
from kvstore_kernels.cpu.channel_groups import decode_channel_groups, encode_channel_groups
from kvstore_kernels.cpu.exact import decode_exact, encode_exact
from kvstore_kernels.cpu.fp8 import decode_fp8, encode_fp8
from kvstore_kernels.cpu.int8 import decode_int8, encode_int8
from kvstore_kernels.cpu.kinds import Kind
from kvstore_kernels.cpu.sections import Kernel, Method, Order
from kvstore_kernels.cpu.token_groups import decode_token_groups, encode_token_groups
from kvstore_kernels.cpu.turbo import decode_turbo, encode_turbo
from kvstore_kernels.layout import Planes

__all__ = ["method_of"]


_KERNELS: Final[dict[str, tuple[Kernel, Kernel]]] = {
    EXACT: (encode_exact, decode_exact),
    "fp8": (encode_fp8, decode_fp8),
    "int8": (encode_int8, decode_int8),
    "int4": (encode_token_groups, decode_token_groups),
    "kivi4v": (encode_token_groups, decode_token_groups),
    "kivi2v": (encode_token_groups, decode_token_groups),
    "kivi4k": (encode_channel_groups, decode_channel_groups),
    "kivi2k": (encode_channel_groups, decode_channel_groups),
    "turbo4": (encode_turbo, decode_turbo),
    "turbo3": (encode_turbo, decode_turbo),
    "turbo2": (encode_turbo, decode_turbo),
    "centred4k": (encode_centred, decode_centred),
    "centred3k": (encode_centred, decode_centred),
    "centred2k": (encode_centred, decode_centred),
}
_BITS: Final = {
    "int4": 4,
    "kivi4v": 4,
    "kivi2v": 2,
    "kivi4k": 4,
    "kivi2k": 2,
    "turbo4": 4,
    "turbo3": 3,
    "turbo2": 2,
    "centred4k": 4,
    "centred3k": 3,
    "centred2k": 2,
}

_ORDERS: Final[dict[Kernel, tuple[Order, Order]]] = {
    encode_int8: (Order.MEMORY, Order.PLACES),
    encode_token_groups: (Order.PLACES, Order.PLACES),
}
"""Encoding reads ahead best along memory, but where tiles of rows would be written to as many streams as heads, often a
power of two apart. Decoding reads codes, in order of places.
"""


def method_of(name: str, planes: Planes) -> Method:
    """Functions of a method, by the name that ``Codec.plane_codec`` gives."""
    encode, decode = _KERNELS[name]
    bits = _BITS.get(name, 0)
    group = run = 0
    if encode is encode_token_groups:
        group = next(size for size in ((64, 32, 16) if bits == 4 else (32, 16)) if planes.dim % size == 0)
        run = 64 if planes.dim % 64 == 0 else group
    if encode is encode_channel_groups and planes.dim % 128 == 0:
        run = 128
    if encode in (encode_turbo, encode_centred):
        group = math.gcd(planes.dim, 128)
        run = 64 if planes.dim % 64 == 0 else 16
    kind = Kind(planes.dtype, bits=bits, group=group, run=run)
    scratch = scratch_bytes(planes.dim) if encode is encode_centred else work.SCRATCH_BYTES
    return Method(encode, decode, kind, *_ORDERS.get(encode, (Order.PLANE, Order.PLANE)), scratch)
