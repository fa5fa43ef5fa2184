"""``int8`` (``docs/codecs.md``): greatest magnitudes of 16 rows, their scales, their codes.

In three passes, because a division and a horizontal reduction a row, between its loads and its codes, would stall them;
the second and third pass find everything in the nearest cache.
"""

from __future__ import annotations

from typing import Final

from kvstore_kernels.cpu.code import inlined, kernel
from kvstore_kernels.cpu.kinds import Kind
from kvstore_kernels.cpu.lanes import F16, F32, I64, VF32, VI16, VI32, WI16, WI32, Value
from kvstore_kernels.cpu.loads import STEP, load_pair, magnitude_bits, magnitudes, store_pair
from kvstore_kernels.cpu.memory import copy, fill_zero, load, load_u32, prefetch
from kvstore_kernels.cpu.rows import FETCH_AHEAD_BYTES, for_each_run
from kvstore_kernels.cpu.vectors import Vectors, emitted
from kvstore_kernels.cpu.work import (
    DIM,
    FOLLOWING,
    PLANE,
    ROWS,
    SCRATCH,
    TOKENS,
    count_void,
    next_plane,
    region,
)

GREATEST: Final = 127
_TILE: Final = 16
"""Rows of a tile."""

# Scratch memory: greatest magnitudes, inverse scales, scales.
_MAGNITUDES: Final = 0
_INVERSES: Final = 4 * _TILE
_SCALES: Final = 8 * _TILE


@emitted
def _row_magnitude(v: Vectors, kind: Kind, row: Value, following: Value, dim: Value, out: Value) -> None:
    """Store the float32 bits of a row's greatest magnitude; fetch another row ahead."""
    zero = v.constant(magnitudes(v, kind, row).type, 0)
    greatest = v.variable(zero)

    def take(offset: Value, steps: int) -> None:
        address = v.at(row, offset)
        v.prefetch_span(v.at(following, offset), steps * kind.row_bytes(STEP))
        values = [magnitudes(v, kind, address, step) for step in range(steps)]
        v.b.store(v.greatest_unsigned(v.b.load(greatest), v.tree(v.greatest_unsigned, values)), greatest)

    for_each_run(v, kind, dim, take)
    v.store(magnitude_bits(v, kind, v.reduce("umax", v.b.load(greatest))), out)


@emitted
def _scales(v: Vectors, scratch: Value, first: Value) -> Value:
    """Scales of eight rows; how many rows are void."""
    at = v.at(scratch, v.b.mul(first, I64(4)))
    greatest = v.load(at, VI32, _MAGNITUDES)
    void = v.beyond_limit(greatest)
    scale, inverse = v.scale(v.as_floats(greatest), GREATEST, void)
    v.store(inverse, at, _INVERSES)
    v.store(scale, v.at(scratch, v.b.mul(first, I64(2))), _SCALES)
    return v.count(void)


@emitted
def _encode_row(v: Vectors, kind: Kind, row: Value, codes: Value, inverse: Value, dim: Value) -> None:
    factor = v.splat(v.load(inverse, F32))

    def take(offset: Value, steps: int) -> None:
        address = v.at(row, offset)
        target = v.at(codes, v.b.udiv(offset, I64(kind.row_bytes(1))))
        words = []
        for step in range(steps):
            even, odd = (v.rounded(v.b.fmul(x, factor)) for x in load_pair(v, kind, address, step))
            words.append(v.b.or_(v.bits(even, 0, 255), v.shifted(odd, 8)))
        if steps == 1:
            v.store(v.b.trunc(words[0], VI16), target)
        for i in range(0, steps - 1, 2):
            v.store(v.low_halves(words[i], words[i + 1]), target, STEP * i)

    for_each_run(v, kind, dim, take)


@emitted
def _decode_row(v: Vectors, kind: Kind, codes: Value, scale: Value, row: Value, dim: Value) -> None:
    factor = v.splat(v.b.fpext(v.load(scale, F16), F32))

    def take(offset: Value, steps: int) -> None:
        address = v.at(row, offset)
        source = v.at(codes, v.b.udiv(offset, I64(kind.row_bytes(1))))
        words = []
        if steps == 1:
            words.append(v.b.zext(v.load(source, VI16), VI32))
        for i in range(0, steps - 1, 2):
            words += v.halves(v.b.zext(v.load(source, WI16, STEP * i), WI32))
        for step, word in enumerate(words):
            codes_of = (v.b.ashr(v.shifted(word, left), v.constant(VI32, 24)) for left in (24, 16))
            even, odd = (v.b.fmul(v.b.sitofp(code, VF32), factor) for code in codes_of)
            store_pair(v, kind, (even, odd), address, step)

    for_each_run(v, kind, dim, take)


@inlined
def _encode_plane(kind: Kind, work: int, place: int) -> int:
    """Encode a plane; how many groups are void."""
    tokens, dim, rows = load(work + TOKENS), load(work + DIM), load(place + ROWS)
    plane, following = load(place + PLANE), load(place + FOLLOWING)
    codes, scales, scratch = region(work, place, 0), region(work, place, 1), place + SCRATCH
    void = 0
    for first in range(0, tokens, _TILE):
        count = min(_TILE, tokens - first)
        fill_zero(scratch + _MAGNITUDES, 4 * _TILE)
        for i in range(count):
            row = load(rows + 8 * (first + i))
            _row_magnitude(kind, plane + row, following + row, dim, scratch + _MAGNITUDES + 4 * i)
        for i in range(0, count, 8):
            void += _scales(scratch, i)
        copy(scales + 2 * first, scratch + _SCALES, 2 * count)
        for i in range(count):
            target, inverse = codes + (first + i) * dim, scratch + _INVERSES + 4 * i
            _encode_row(kind, plane + load(rows + 8 * (first + i)), target, inverse, dim)
            if load_u32(inverse) == 0:
                fill_zero(target, dim)
    return void


@kernel
def encode_int8(kind: Kind, work: int, place: int) -> None:
    """Encode planes (``work``)."""
    while next_plane(work, place) != 0:
        count_void(work, place, _encode_plane(kind, work, place))


@kernel
def decode_int8(kind: Kind, work: int, place: int) -> None:
    """Decode planes (``work``)."""
    tokens, dim = load(work + TOKENS), load(work + DIM)
    while next_plane(work, place) != 0:
        plane, rows = load(place + PLANE), load(place + ROWS)
        codes, scales = region(work, place, 0), region(work, place, 1)
        prefetch(scales + 2 * tokens)
        for token in range(tokens):
            source = codes + token * dim
            for line in range(FETCH_AHEAD_BYTES, FETCH_AHEAD_BYTES + dim, 64):
                prefetch(source + line)
            _decode_row(kind, source, scales + 2 * token, plane + load(rows + 8 * token), dim)
