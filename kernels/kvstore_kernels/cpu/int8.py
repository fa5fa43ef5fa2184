"""``int8`` (``docs/codecs.md``): the greatest magnitude of a row, its scale, its codes.

A row is finished before the next one begins: while its division waits, the processor is busy with the rows after it.
"""

from __future__ import annotations

from typing import Final

from kvstore_kernels.cpu.code import kernel
from kvstore_kernels.cpu.kinds import Kind
from kvstore_kernels.cpu.lanes import F16, F32, I64, LANES, VF32, VI16, VI32, Value
from kvstore_kernels.cpu.loads import STEP, load_pair, magnitude_bits, magnitudes, store_pair
from kvstore_kernels.cpu.memory import fill_zero, load
from kvstore_kernels.cpu.rows import FETCH_AHEAD_BYTES, for_each_run
from kvstore_kernels.cpu.vectors import Vectors, emitted
from kvstore_kernels.cpu.work import (
    DIM,
    ROW_COUNT,
    count_void,
    next_plane,
    region,
    row_address,
    row_ahead,
    row_place,
)

GREATEST: Final = 127
_FETCH_AHEAD_ROWS: Final = 16


@emitted
def _encode_row(v: Vectors, kind: Kind, row: Value, ahead: Value, codes: Value, scale_at: Value, dim: Value) -> Value:
    """Encode a row and fetch another one ahead; 1 if it is void, and then its codes are still to be made zero."""
    greatest = v.variable(v.constant(magnitudes(v, kind, row).type, 0))

    def compare(offset: Value, steps: int) -> None:
        address = v.at(row, offset)
        v.prefetch_span(v.at(ahead, offset), kind.row_bytes(STEP * steps))
        values = [magnitudes(v, kind, address, step) for step in range(steps)]
        v.b.store(v.greatest_unsigned(v.b.load(greatest), v.tree(v.greatest_unsigned, values)), greatest)

    for_each_run(v, kind, dim, compare)
    bits = magnitude_bits(v, kind, v.reduce("umax", v.b.load(greatest)))
    void = v.beyond_limit(bits)
    scale, inverse = v.scale(v.b.bitcast(bits, F32), GREATEST, void)
    v.store(scale, scale_at)
    factor = v.splat(inverse)

    def encode(offset: Value, steps: int) -> None:
        address = v.at(row, offset)
        target = v.at(codes, v.b.udiv(offset, I64(kind.row_bytes(1))))
        numbers = []
        for step in range(steps):
            even, odd = (v.b.fmul(x, factor) for x in load_pair(v, kind, address, step))
            numbers.append((even, odd))
        if steps == 1:
            both = v.whole_8(numbers[0], numbers[0])
            v.store(v.pick(both, both, range(LANES)), target)
        for i in range(0, steps - 1, 2):
            v.store(v.whole_8(numbers[i], numbers[i + 1]), target, STEP * i)

    for_each_run(v, kind, dim, encode)
    return v.b.zext(void, I64)


@emitted
def _decode_row(v: Vectors, kind: Kind, codes: Value, scale: Value, row: Value, dim: Value) -> None:
    factor = v.splat(v.b.fpext(v.load(scale, F16), F32))

    def take(offset: Value, steps: int) -> None:
        address = v.at(row, offset)
        source = v.at(codes, v.b.udiv(offset, I64(kind.row_bytes(1))))
        v.prefetch(source, FETCH_AHEAD_BYTES)
        for step in range(steps):
            word = v.b.sext(v.load(source, VI16, STEP * step), VI32)
            pair = v.b.ashr(v.shifted(word, 24), v.constant(VI32, 24)), v.b.ashr(word, v.constant(VI32, 8))
            even, odd = (v.b.fmul(v.b.sitofp(code, VF32), factor) for code in pair)
            store_pair(v, kind, (even, odd), address, step)

    for_each_run(v, kind, dim, take)


@kernel
def encode_int8(kind: Kind, work: int, place: int) -> None:
    """Encode planes (``work``)."""
    count, dim = load(work + ROW_COUNT), load(work + DIM)
    while next_plane(work, place) != 0:
        codes, scales = region(work, place, 0), region(work, place, 1)
        void = 0
        for i in range(count):
            number, row = row_place(work, i), row_address(work, place, i)
            target, ahead = codes + number * dim, row_ahead(work, place, i + _FETCH_AHEAD_ROWS)
            if _encode_row(kind, row, ahead, target, scales + 2 * number, dim) != 0:
                fill_zero(target, dim)
                void += 1
        count_void(work, place, void)


@kernel
def decode_int8(kind: Kind, work: int, place: int) -> None:
    """Decode planes (``work``)."""
    count, dim = load(work + ROW_COUNT), load(work + DIM)
    while next_plane(work, place) != 0:
        codes, scales = region(work, place, 0), region(work, place, 1)
        for i in range(count):
            number, row = row_place(work, i), row_address(work, place, i)
            _decode_row(kind, codes + number * dim, scales + 2 * number, row, dim)
