"""``turbo4``, ``turbo3``, ``turbo2`` (``docs/codecs.md``): rotated vectors on Lloyd-Max levels.

The elements of a row (``turbo_rows``) lie in memory in pieces (a kind's ``run``): a row may be two tokens, or the end
of one and the beginning of another.
"""

from __future__ import annotations

from typing import Final

from kvstore_kernels.codecs.turbo import ROW
from kvstore_kernels.cpu.code import inlined, kernel
from kvstore_kernels.cpu.kinds import Kind, code_bits, element_bytes, group_elements, run_elements
from kvstore_kernels.cpu.lanes import I16, I64, Value
from kvstore_kernels.cpu.loads import STEP, Pair, load_pair, store_pair
from kvstore_kernels.cpu.memory import copy, load, prefetch, store
from kvstore_kernels.cpu.rows import FETCH_AHEAD_BYTES
from kvstore_kernels.cpu.turbo_rows import (
    SCALES,
    SQUARES,
    STEPS,
    TILE,
    TILE_BYTES,
    clear_squares,
    encode_steps,
    factor_of_scale,
    flips,
    make_norms,
    make_scales,
    sum_of_squares,
    transformed,
)
from kvstore_kernels.cpu.vectors import Vectors, emitted
from kvstore_kernels.cpu.work import DIM, FOLLOWING, PLANE, ROW_COUNT, ROWS, SCRATCH, count_void, next_plane, region

__all__ = ["decode_turbo", "encode_turbo", "find_pieces", "step_address"]

# Scratch memory: a tile; for each of its rows the addresses of its pieces.
_PIECES: Final = TILE_BYTES


def step_address(v: Vectors, kind: Kind, pieces: Value, step: int) -> Value:
    """Address of a step's elements."""
    number, inside = divmod(STEP * step, kind.run)
    return v.at(v.load(pieces, I64, 8 * number), kind.row_bytes(inside))


@emitted
def _sum_squares(v: Vectors, kind: Kind, pieces: Value, ahead: Value, squares: Value) -> None:
    """Store the sum of squares of each vector of a row; fetch half of the row ``ahead`` bytes further."""

    def load_step(step: int) -> Pair:
        at = step_address(v, kind, pieces, step)
        if step % 4 < 2:
            v.prefetch_span(v.at(at, ahead), kind.row_bytes(STEP))
        return load_pair(v, kind, at)

    steps = kind.group // STEP
    for first in range(0, STEPS, steps):
        squared = sum_of_squares(v, (load_step(step) for step in range(first, first + steps)))
        v.store(squared, squares, 4 * (first // steps))


@emitted
def _encode_row(
    v: Vectors, kind: Kind, pieces: Value, ahead: Value, vectors: Value, codes: Value, signs: Value
) -> None:
    """``encode_steps`` of a row; fetch the other half of the row ahead.

    Args:
        v: emits.
        kind: of the kernel.
        pieces: addresses of the row's pieces.
        ahead: bytes to the row that is fetched.
        vectors: scratch memory, moved to the row's first vector.
        codes: of the row.
        signs: of the row, with three bits.
    """

    def load_step(step: int) -> Pair:
        at = step_address(v, kind, pieces, step)
        if step % 4 >= 2:
            v.prefetch_span(v.at(at, ahead), kind.row_bytes(STEP))
        even, odd = load_pair(v, kind, at)
        return v.flipped(even, flips(kind, step, 0)), v.flipped(odd, flips(kind, step, 1))

    encode_steps(v, kind, load_step, vectors, codes, signs)


@emitted
def _decode_row(v: Vectors, kind: Kind, codes: Value, signs: Value, scales: Value, pieces: Value) -> None:
    """Inverse of ``_encode_row``."""
    for steps in transformed(v, kind, codes, signs):
        factor = factor_of_scale(v, kind, v.load(scales, I16, 2 * (steps[0][0] * STEP // kind.group)))
        for step, (even, odd) in steps:
            even, odd = (v.flipped(v.b.fmul(half, factor), flips(kind, step, i)) for i, half in enumerate((even, odd)))
            store_pair(v, kind, (even, odd), step_address(v, kind, pieces, step))


@inlined
def find_pieces(kind: Kind, plane: int, rows: int, dim: int, piece: int, count: int, table: int) -> None:
    """Store addresses of pieces, from the plane's number ``piece`` on."""
    row_pieces = dim // run_elements(kind)
    token = piece // row_pieces
    inside = piece - token * row_pieces
    for i in range(count):
        store(table + 8 * i, plane + load(rows + 8 * token) + inside * run_elements(kind) * element_bytes(kind))
        inside += 1
        if inside == row_pieces:
            token, inside = token + 1, 0


@inlined
def _encode_plane(kind: Kind, work: int, place: int) -> int:
    """Encode a plane; how many vectors are void."""
    dim, rows = load(work + DIM), load(place + ROWS)
    plane, ahead = load(place + PLANE), load(place + FOLLOWING) - load(place + PLANE)
    codes, signs, scales = region(work, place, 0), region(work, place, 1), region(work, place, 1)
    if code_bits(kind) == 3:
        scales = region(work, place, 2)
    code_bytes = 64 if code_bits(kind) == 4 else 32
    row_pieces, row_vectors = ROW // run_elements(kind), ROW // group_elements(kind)
    row_count = load(work + ROW_COUNT) * dim // ROW
    scratch = place + SCRATCH
    void = 0
    for first in range(0, row_count, TILE):
        count = min(TILE, row_count - first)
        find_pieces(kind, plane, rows, dim, first * row_pieces, count * row_pieces, scratch + _PIECES)
        clear_squares(scratch, count * row_vectors)
        for i in range(count):
            pieces = scratch + _PIECES + 8 * i * row_pieces
            _sum_squares(kind, pieces, ahead, scratch + SQUARES + 4 * i * row_vectors)
        void += make_norms(scratch, count * row_vectors)
        for i in range(count):
            pieces, vectors = scratch + _PIECES + 8 * i * row_pieces, scratch + 4 * i * row_vectors
            _encode_row(kind, pieces, ahead, vectors, codes, signs)
            codes += code_bytes
            signs += 16
        make_scales(kind, scratch, count * row_vectors)
        copy(scales + 2 * first * row_vectors, scratch + SCALES, 2 * count * row_vectors)
    return void


@kernel
def encode_turbo(kind: Kind, work: int, place: int) -> None:
    """Encode planes (``work``)."""
    while next_plane(work, place) != 0:
        count_void(work, place, _encode_plane(kind, work, place))


@kernel
def decode_turbo(kind: Kind, work: int, place: int) -> None:
    """Decode planes (``work``)."""
    dim, pieces = load(work + DIM), place + SCRATCH + _PIECES
    row_count, row_pieces = load(work + ROW_COUNT) * dim // ROW, ROW // run_elements(kind)
    code_bytes = 64 if code_bits(kind) == 4 else 32
    while next_plane(work, place) != 0:
        plane, rows = load(place + PLANE), load(place + ROWS)
        codes, signs, scales = region(work, place, 0), region(work, place, 1), region(work, place, 1)
        if code_bits(kind) == 3:
            scales = region(work, place, 2)
        for row in range(row_count):
            find_pieces(kind, plane, rows, dim, row * row_pieces, row_pieces, pieces)
            prefetch(codes + FETCH_AHEAD_BYTES)
            prefetch(signs + FETCH_AHEAD_BYTES // 2)
            _decode_row(kind, codes, signs, scales, pieces)
            codes += code_bytes
            signs += 16
            scales += 2 * ROW // group_elements(kind)
