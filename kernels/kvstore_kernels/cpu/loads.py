"""Vectors of an engine's elements: sixteen at a time, as float32 of the even ones and of the odd ones.

Even and odd instead of first and second half: a 32-bit lane holds two bfloat16, and one operation each takes them
apart; and codes of neighbours go into one byte without moving lanes.
"""

from __future__ import annotations

from typing import Final

from kvstore_kernels.cpu.kinds import Kind
from kvstore_kernels.cpu.lanes import F16, F32, I32, LANES, VF32, VI16, VI32, WI16, Value
from kvstore_kernels.cpu.vectors import Vectors

__all__ = [
    "STEP",
    "Pair",
    "load_pair",
    "magnitude_bits",
    "magnitudes",
    "pair_of_patterns",
    "patterns",
    "rounded_pair",
    "store_pair",
    "values_of_patterns",
]

STEP: Final = 2 * LANES
"""Elements that are loaded and stored together."""

_EVEN: Final = range(0, STEP, 2)
_ODD: Final = range(1, STEP, 2)
_INTERLEAVED: Final = [lane // 2 + LANES * (lane % 2) for lane in range(STEP)]

Pair = tuple[Value, Value]


def load_pair(v: Vectors, kind: Kind, address: Value, step: int = 0) -> Pair:
    """Sixteen elements at ``address + 16 * step`` elements: the even ones and the odd ones, float32."""
    at = kind.row_bytes(STEP * step)
    if kind.dtype == "bfloat16":
        return _of_bfloat16(v, v.load(address, VI32, at))
    if kind.dtype == "float16":
        return _of_float16(v, v.load(address, WI16, at))
    first, second = v.load(address, VF32, at), v.load(address, VF32, at + 4 * LANES)
    return v.pick(first, second, _EVEN), v.pick(first, second, _ODD)


def store_pair(v: Vectors, kind: Kind, pair: Pair, address: Value, step: int = 0) -> None:
    """Store sixteen elements, rounded to nearest even."""
    at = kind.row_bytes(STEP * step)
    even, odd = pair
    if kind.dtype == "float32":
        for half, lanes in enumerate((_INTERLEAVED[:LANES], _INTERLEAVED[LANES:])):
            v.store(v.pick(even, odd, lanes), address, at + 4 * LANES * half, streaming=kind.streaming)
        return
    v.store(rounded_pair(v, kind, pair), address, at, streaming=kind.streaming)


def rounded_pair(v: Vectors, kind: Kind, pair: Pair) -> Value:
    """Sixteen elements of 16 bits in their order, rounded to nearest even: int16. Neither NaN nor denormal."""
    if kind.dtype == "float16":
        low, high = (v.b.zext(v.b.bitcast(v.float16(value), VI16), VI32) for value in pair)
        return v.b.bitcast(v.b.or_(low, v.shifted(high, 16)), WI16)
    return v.bfloat16(*pair)


def magnitudes(v: Vectors, kind: Kind, address: Value, step: int = 0) -> Value:
    """Sixteen elements as unsigned integers in the order of their magnitudes, a NaN above all: one vector."""
    at = kind.row_bytes(STEP * step)
    if kind.dtype != "float32":
        elements = v.load(address, WI16, at)
        return v.b.and_(elements, v.constant(WI16, 0x7FFF))
    halves = (v.load(address, VI32, at + 4 * LANES * half) for half in (0, 1))
    return v.greatest_unsigned(*(v.b.and_(half, v.constant(VI32, 0x7FFFFFFF)) for half in halves))


def magnitude_bits(v: Vectors, kind: Kind, magnitude: Value) -> Value:
    """Of a magnitude as above, scalar: the float32's bits, i32."""
    if kind.dtype == "float32":
        return magnitude
    if kind.dtype == "bfloat16":
        return v.b.shl(v.b.zext(magnitude, I32), I32(16))
    return v.b.bitcast(v.b.fpext(v.b.bitcast(magnitude, F16), F32), I32)


def patterns(v: Vectors, kind: Kind, address: Value, step: int = 0) -> list[Value]:
    """Sixteen elements as their bits: one vector of int16, or two of int32 (even, odd)."""
    if kind.dtype != "float32":
        return [v.load(address, WI16, kind.row_bytes(STEP * step))]
    return [v.as_ints(half) for half in load_pair(v, kind, address, step)]


def pair_of_patterns(v: Vectors, kind: Kind, vectors: list[Value]) -> Pair:
    """The elements of ``patterns``, as ``load_pair`` gives them."""
    if kind.dtype == "float32":
        return v.as_floats(vectors[0]), v.as_floats(vectors[1])
    if kind.dtype == "bfloat16":
        return _of_bfloat16(v, v.b.bitcast(vectors[0], VI32))
    return _of_float16(v, vectors[0])


def values_of_patterns(v: Vectors, kind: Kind, address: Value) -> Value:
    """Eight patterns of single elements, stored side by side: float32."""
    if kind.dtype == "float32":
        return v.load(address, VF32)
    elements = v.load(address, VI16)
    if kind.dtype == "bfloat16":
        return v.as_floats(v.shifted(v.b.zext(elements, VI32), 16))
    return v.from_float16(elements)


def _of_bfloat16(v: Vectors, words: Value) -> Pair:
    even = v.b.shl(words, v.constant(VI32, 16))
    odd = v.b.and_(words, v.constant(VI32, -1 << 16))
    return v.as_floats(even), v.as_floats(odd)


def _of_float16(v: Vectors, elements: Value) -> Pair:
    return v.from_float16(v.pick(elements, elements, _EVEN)), v.from_float16(v.pick(elements, elements, _ODD))
