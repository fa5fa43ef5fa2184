"""``fp8`` (``docs/codecs.md``): the greatest magnitude of up to 64 tokens of a plane, then their codes."""

from __future__ import annotations

from typing import Final

from kvstore_kernels.codecs.fp8 import GREATEST, GROUP_TOKENS
from kvstore_kernels.cpu.code import inlined, kernel
from kvstore_kernels.cpu.kinds import Kind
from kvstore_kernels.cpu.lanes import F16, F32, I64, VF32, VI16, VI32, WI8, Value
from kvstore_kernels.cpu.loads import STEP, load_pair, magnitude_bits, magnitudes, store_pair
from kvstore_kernels.cpu.memory import fill_zero, load
from kvstore_kernels.cpu.rows import FETCH_AHEAD_BYTES, for_each_run
from kvstore_kernels.cpu.vectors import Vectors, emitted
from kvstore_kernels.cpu.work import DIM, FOLLOWING, PLANE, ROW_COUNT, ROWS, SCRATCH, count_void, next_plane, region

# Scratch memory: a vector of the greatest magnitudes so far; the group's inverse scale.
_MAGNITUDES: Final = 0
_INVERSE: Final = 32

_GREATEST_BITS: Final = 0x43E00000
"""448 as float32."""
_NORMAL_BITS: Final = 0x3C800000
"""2^-6, the least normal E4M3 number, as float32."""
_MANTISSA_SHIFT: Final = 20
_EXPONENTS_APART: Final = (127 - 7) << 3
"""Difference of the two exponents' biases, at E4M3's place."""


@emitted
def _take_row(v: Vectors, kind: Kind, row: Value, following: Value, dim: Value, scratch: Value) -> None:
    """Compare a row with the greatest magnitudes so far; fetch half of another row ahead."""

    def take(offset: Value, steps: int) -> None:
        address = v.at(row, offset)
        v.prefetch_span(v.at(following, offset), kind.row_bytes(STEP * steps) // 2)
        values = [magnitudes(v, kind, address, step) for step in range(steps)]
        so_far = v.load(scratch, values[0].type, _MAGNITUDES)
        v.store(v.greatest_unsigned(so_far, v.tree(v.greatest_unsigned, values)), scratch, _MAGNITUDES)

    for_each_run(v, kind, dim, take)


@emitted
def _scale(v: Vectors, kind: Kind, scratch: Value, scale: Value) -> Value:
    """Store scale and inverse of a group, and forget its magnitudes; 1 if it is void."""
    greatest = v.load(scratch, magnitudes(v, kind, scratch).type, _MAGNITUDES)
    v.store(v.constant(greatest.type, 0), scratch, _MAGNITUDES)
    bits = magnitude_bits(v, kind, v.reduce("umax", greatest))
    void = v.beyond_limit(bits)
    scale_bits, inverse = v.scale(v.b.bitcast(bits, F32), GREATEST, void)
    v.store(scale_bits, scale)
    v.store(inverse, scratch, _INVERSE)
    return v.b.zext(void, I64)


def _e4m3(v: Vectors, number: Value) -> Value:
    """Code of a number, in the low eight bits of a lane: nearest even, saturated."""
    bits = v.as_ints(number)
    sign = v.bits(bits, 24, 0x80)
    magnitude = v.bits(bits, 0, 0x7FFFFFFF)
    most = v.constant(VI32, _GREATEST_BITS)
    magnitude = v.b.select(v.b.icmp_signed("<", magnitude, most), magnitude, most)
    half = (1 << (_MANTISSA_SHIFT - 1)) - 1 - (_EXPONENTS_APART << _MANTISSA_SHIFT)
    last = v.bits(magnitude, _MANTISSA_SHIFT, 1)
    normal = v.shifted(v.b.add(magnitude, v.b.add(last, v.constant(VI32, half))), -_MANTISSA_SHIFT)
    # 2^14 has its last bit at 2^-9, which is the least E4M3 number.
    small = v.as_ints(v.b.fadd(v.as_floats(magnitude), v.constant(VF32, 2.0**14)))
    is_small = v.b.icmp_signed("<", magnitude, v.constant(VI32, _NORMAL_BITS))
    return v.b.or_(v.bits(v.b.select(is_small, small, normal), 0, 255), sign)


@emitted
def _encode_row(v: Vectors, kind: Kind, row: Value, following: Value, codes: Value, scratch: Value, dim: Value) -> None:
    """Encode a row; fetch the other half of another row ahead."""
    factor = v.splat(v.load(scratch, F32, _INVERSE))

    def take(offset: Value, steps: int) -> None:
        address = v.at(row, offset)
        half_bytes = kind.row_bytes(STEP * steps) // 2
        v.prefetch_span(v.at(v.at(following, offset), half_bytes), half_bytes)
        target = v.at(codes, v.b.udiv(offset, I64(kind.row_bytes(1))))
        words = []
        for step in range(steps):
            even, odd = (_e4m3(v, v.b.fmul(x, factor)) for x in load_pair(v, kind, address, step))
            words.append(v.b.or_(even, v.shifted(odd, 8)))
        if steps == 1:
            v.store(v.b.trunc(words[0], VI16), target)
        for i in range(0, steps - 1, 2):
            v.store(v.low_halves(words[i], words[i + 1]), target, STEP * i)

    for_each_run(v, kind, dim, take)


@emitted
def _decode_row(v: Vectors, kind: Kind, codes: Value, scale: Value, row: Value, dim: Value) -> None:
    # The bits of a code, moved, are those of a float16 that is 2^8 times smaller, denormal or not.
    factor = v.splat(v.b.fmul(v.b.fpext(v.load(scale, F16), F32), v.constant(F32, 256.0)))

    def take(offset: Value, steps: int) -> None:
        address = v.at(row, offset)
        source = v.at(codes, v.b.udiv(offset, I64(kind.row_bytes(1))))
        v.prefetch(source, FETCH_AHEAD_BYTES)
        for step in range(steps):
            loaded = v.load(source, WI8, STEP * step)
            values = []
            for odd in (0, 1):
                code = v.b.zext(v.pick(loaded, loaded, range(odd, STEP, 2)), VI16)
                half = v.b.or_(v.shifted(v.bits(code, 0, 0x7F), 7), v.shifted(v.bits(code, 0, 0x80), 8))
                values.append(v.b.fmul(v.from_float16(half), factor))
            store_pair(v, kind, (values[0], values[1]), address, step)

    for_each_run(v, kind, dim, take)


@inlined
def _encode_plane(kind: Kind, work: int, place: int) -> int:
    """Encode a plane; how many groups are void."""
    tokens, dim, rows = load(work + ROW_COUNT), load(work + DIM), load(place + ROWS)
    plane, following = load(place + PLANE), load(place + FOLLOWING)
    codes, scales, scratch = region(work, place, 0), region(work, place, 1), place + SCRATCH
    void = 0
    fill_zero(scratch + _MAGNITUDES, 32)
    for first in range(0, tokens, GROUP_TOKENS):
        count = min(GROUP_TOKENS, tokens - first)
        for token in range(first, first + count):
            row = load(rows + 8 * token)
            _take_row(kind, plane + row, following + row, dim, scratch)
        empty = _scale(kind, scratch, scales)
        void += empty
        for token in range(first, first + count):
            row = load(rows + 8 * token)
            _encode_row(kind, plane + row, following + row, codes + token * dim, scratch, dim)
        if empty != 0:
            fill_zero(codes + first * dim, count * dim)
        scales += 2
    return void


@kernel
def encode_fp8(kind: Kind, work: int, place: int) -> None:
    """Encode planes (``work``)."""
    while next_plane(work, place) != 0:
        count_void(work, place, _encode_plane(kind, work, place))


@kernel
def decode_fp8(kind: Kind, work: int, place: int) -> None:
    """Decode planes (``work``)."""
    tokens, dim = load(work + ROW_COUNT), load(work + DIM)
    while next_plane(work, place) != 0:
        plane, rows = load(place + PLANE), load(place + ROWS)
        codes, scales = region(work, place, 0), region(work, place, 1)
        for token in range(tokens):
            scale = scales + token // GROUP_TOKENS * 2
            _decode_row(kind, codes + token * dim, scale, plane + load(rows + 8 * token), dim)
