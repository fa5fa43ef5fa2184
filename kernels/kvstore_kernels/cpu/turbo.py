"""``turbo4``, ``turbo3``, ``turbo2`` (``docs/codecs.md``): rotated vectors on Lloyd-Max levels.

A row of 128 elements is eight steps of 16; it holds one vector or several (a kind's ``group``), and its elements lie in
memory in pieces (a kind's ``run``): a row may be two tokens, or the end of one and the beginning of another. Rows are
taken sixteen at a time in four passes: sums of squares; norms; codes and products; scales. Square roots and divisions
are thus done eight at a time, and nothing waits for them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from kvstore_kernels.codecs.turbo import DEVIATION, LEVELS, ROW, SIGNS, THRESHOLDS, VOID_ABOVE, ZERO_BELOW
from kvstore_kernels.cpu.code import inlined, kernel
from kvstore_kernels.cpu.kinds import Kind, code_bits, element_bytes, group_elements, run_elements
from kvstore_kernels.cpu.loads import STEP, load_pair, store_pair
from kvstore_kernels.cpu.memory import copy, load, prefetch, store
from kvstore_kernels.cpu.rows import FETCH_AHEAD_BYTES
from kvstore_kernels.cpu.vectors import (
    F32,
    I8,
    I16,
    I64,
    LANES,
    VF32,
    VI32,
    WI16,
    Value,
    Vectors,
    emitted,
    float32,
    vector,
)
from kvstore_kernels.cpu.work import DIM, FOLLOWING, PLANE, ROWS, SCRATCH, TOKENS, count_void, next_plane, region

_STEPS: Final = ROW // STEP
_TILE: Final = 16
"""Rows of a tile."""
_MOST_VECTORS: Final = _TILE * ROW // STEP
"""Vectors of a tile, of the shortest."""

# Scratch memory: for each row the addresses of its pieces; for each vector sum of squares, factor to the normalised
# coordinates, norm, product of coordinates and levels, scale.
_PIECES: Final = 0
_PIECES_BYTES: Final = 8 * _STEPS
_SQUARES: Final = _PIECES + _TILE * _PIECES_BYTES
_FACTORS: Final = _SQUARES + 4 * _MOST_VECTORS
_NORMS: Final = _FACTORS + 4 * _MOST_VECTORS
_PRODUCTS: Final = _NORMS + 4 * _MOST_VECTORS
_SCALES: Final = _PRODUCTS + 4 * _MOST_VECTORS

Pairs = list[tuple[Value, Value]]
"""For each step the even elements and the odd ones."""


def _piece(v: Vectors, kind: Kind, pieces: Value, step: int) -> Value:
    """Address of a step's elements."""
    number, inside = divmod(STEP * step, kind.run)
    return v.at(v.load(pieces, I64, 8 * number), kind.row_bytes(inside))


def _signs(kind: Kind, step: int, odd: int) -> list[bool]:
    """Whose signs are flipped."""
    first = STEP * step % kind.group + odd
    return [bool(SIGNS[i // 8] >> i % 8 & 1) for i in range(first, first + STEP, 2)]


def _butterfly(v: Vectors, kind: Kind, pairs: Pairs) -> Pairs:
    """Walsh-Hadamard transform of each vector of a row: a+b and a-b over distances 1, 2, 4 and so on."""
    pairs = [(v.b.fadd(even, odd), v.b.fsub(even, odd)) for even, odd in pairs]
    for distance in (1, 2, 4):
        lanes = [lane ^ distance for lane in range(LANES)]
        upper = [bool(lane & distance) for lane in range(LANES)]
        pairs = [
            (v.plus_minus(even, upper, v.pick(even, even, lanes)), v.plus_minus(odd, upper, v.pick(odd, odd, lanes)))
            for even, odd in pairs
        ]
    distance = 1
    while STEP * distance < kind.group:
        mixed = list(pairs)
        for i in range(_STEPS):
            if not i & distance:
                low, high = pairs[i], pairs[i + distance]
                mixed[i] = (v.b.fadd(low[0], high[0]), v.b.fadd(low[1], high[1]))
                mixed[i + distance] = (v.b.fsub(low[0], high[0]), v.b.fsub(low[1], high[1]))
        pairs = mixed
        distance *= 2
    return pairs


@emitted
def _sum_squares(v: Vectors, kind: Kind, pieces: Value, ahead: Value, squares: Value) -> None:
    """Store the sum of squares of each vector of a row; fetch half of the row ``ahead`` bytes further."""
    steps = kind.group // STEP
    for first in range(0, _STEPS, steps):
        sums = []
        for step in range(first, first + steps):
            at = _piece(v, kind, pieces, step)
            if step % 4 < 2:
                v.prefetch_span(v.at(at, ahead), kind.row_bytes(STEP))
            even, odd = load_pair(v, kind, at)
            sums.append(v.b.fadd(v.b.fmul(even, even), v.b.fmul(odd, odd)))
        v.store(v.across(v.b.fadd, v.tree(v.b.fadd, sums)), squares, 4 * (first // steps))


@emitted
def _normalise(v: Vectors, scratch: Value, first: Value) -> Value:
    """Norms and factors of eight vectors, both 0 for those without codes; how many are void."""
    at = v.at(scratch, v.b.mul(first, I64(4)))
    squares = v.load(at, VF32, _SQUARES)
    zero = v.constant(VF32, 0.0)
    void = v.b.not_(v.b.fcmp_ordered("<=", squares, v.constant(VF32, VOID_ABOVE)))
    empty = v.b.or_(void, v.b.fcmp_ordered("<", squares, v.constant(VF32, ZERO_BELOW)))
    norm = v.call("llvm.sqrt.v8f32", VF32, squares)
    factor = v.b.fdiv(v.constant(VF32, float(DEVIATION)), norm)
    v.store(v.b.select(empty, zero, norm), at, _NORMS)
    v.store(v.b.select(empty, zero, factor), at, _FACTORS)
    return v.count(void)


@emitted
def _scale(v: Vectors, kind: Kind, scratch: Value, first: Value) -> None:
    """Scales of eight vectors."""
    at = v.at(scratch, v.b.mul(first, I64(4)))
    norm = v.load(at, VF32, _NORMS)
    product = v.b.sitofp(v.load(at, VI32, _PRODUCTS), VF32)
    scale = v.b.fdiv(v.b.fmul(norm, v.constant(VF32, float32(math.sqrt(kind.group) * DEVIATION**2))), product)
    empty = v.b.fcmp_ordered("==", norm, v.constant(VF32, 0.0))
    bits, _ = v.to_float16(v.b.select(empty, v.constant(VF32, 0.0), scale))
    v.store(bits, v.at(scratch, v.b.mul(first, I64(2))), _SCALES)


@emitted
def _encode_row(
    v: Vectors, kind: Kind, pieces: Value, ahead: Value, vectors: Value, codes: Value, signs: Value
) -> None:
    """Store codes and products of a row; fetch the other half of the row ahead.

    Args:
        v: emits.
        kind: of the kernel.
        pieces: addresses of the row's pieces.
        ahead: bytes to the row that is fetched.
        vectors: scratch memory, moved to the row's first vector.
        codes: of the row.
        signs: of the row, with three bits.
    """
    pairs: Pairs = []
    for step in range(_STEPS):
        at = _piece(v, kind, pieces, step)
        if step % 4 >= 2:
            v.prefetch_span(v.at(at, ahead), kind.row_bytes(STEP))
        even, odd = load_pair(v, kind, at)
        pairs.append((v.flipped(even, _signs(kind, step, 0)), v.flipped(odd, _signs(kind, step, 1))))
    pairs = _butterfly(v, kind, pairs)
    steps = kind.group // STEP
    indices, negatives = [], []
    for first in range(0, _STEPS, steps):
        factor = v.splat(v.load(vectors, F32, _FACTORS + first // steps * 4))
        has_codes = v.b.fcmp_ordered(">", factor, v.constant(VF32, 0.0))
        mask = v.b.bitcast(v.b.sext(has_codes, VI32), WI16)
        products = v.constant(VI32, 0)
        for step in range(first, first + steps):
            y = v.whole_16(*(v.b.fmul(x, factor) for x in pairs[step]))
            magnitude = v.call("llvm.abs.v16i16", WI16, y, v.no)
            index, level = v.quantised(magnitude, THRESHOLDS[kind.bits], LEVELS[kind.bits])
            products = v.b.add(products, v.pairs_dot(magnitude, level))
            indices.append(v.b.and_(index, mask))
            negatives.append(v.b.and_(y, mask))
        v.store(v.reduce("add", products), vectors, _PRODUCTS + first // steps * 4)
    _store_codes(v, kind.bits, indices, negatives, codes, signs)


def _store_codes(
    v: Vectors, bits: int, indices: Sequence[Value], negatives: Sequence[Value], codes: Value, signs: Value
) -> None:
    """Pack a row.

    Args:
        v: emits.
        bits: of a code.
        indices: of the levels, 16 int16 a step.
        negatives: int16 that are negative where the number is.
        codes: where to.
        signs: where to with three bits.
    """
    if bits != 3:
        top = 1 << (bits - 1)
        indices = [
            v.b.or_(index, v.bits(negative, 16 - bits, top)) for index, negative in zip(indices, negatives, strict=True)
        ]
    places = 2 if bits == 3 else bits
    word_steps = 16 // places
    for word in range(_STEPS // word_steps):
        parts = [v.shifted(indices[word * word_steps + j], places * j) for j in range(word_steps)]
        v.store(v.natural_16(v.any_of(parts)), codes, 32 * word)
    if bits == 3:
        parts = [v.bits(negative, 15 - j, 1 << j) for j, negative in enumerate(negatives)]
        v.store(v.b.trunc(v.natural_16(v.any_of(parts)), vector(I8, STEP)), signs)


@emitted
def _decode_row(v: Vectors, kind: Kind, codes: Value, signs: Value, scales: Value, pieces: Value) -> None:
    """Inverse of ``_encode_row``."""
    bits, steps = kind.bits, kind.group // STEP
    levels = [level / DEVIATION for level in LEVELS[bits]]
    pairs: Pairs = []
    for step in range(_STEPS):
        places = 2 if bits == 3 else bits
        word_steps = 16 // places
        words = v.load(codes, VI32, 32 * (step // word_steps))
        both = []
        for half in (0, 16):
            index = v.shifted(words, -(half + places * (step % word_steps)))
            if bits == 4:
                # The sign is above the three bits that count.
                value = v.as_ints(v.look_up(levels, index))
                sign = v.b.and_(v.shifted(index, 28), v.constant(VI32, -1 << 31))
                value = v.as_floats(v.b.xor(value, sign))
            elif bits == 3:
                flags = v.b.zext(v.load(signs, vector(I16, LANES)), VI32)
                sign = v.b.and_(v.shifted(flags, 2 - half // 2 - step), v.constant(VI32, 4))
                value = v.look_up([*levels, *(-level for level in levels)], v.b.or_(v.bits(index, 0, 3), sign))
            else:
                value = v.look_up([*levels, *(-level for level in levels)] * 2, index)
            both.append(value)
        pairs.append((both[0], both[1]))
    pairs = _butterfly(v, kind, pairs)
    root = v.constant(F32, float32(1 / math.sqrt(kind.group)))
    for step in range(_STEPS):
        scale = v.from_float16(v.load(scales, I16, 2 * (step // steps)))
        factor = v.splat(v.b.fmul(scale, root))
        even, odd = (v.flipped(v.b.fmul(x, factor), _signs(kind, step, i)) for i, x in enumerate(pairs[step]))
        store_pair(v, kind, (even, odd), _piece(v, kind, pieces, step))


@inlined
def _find_pieces(kind: Kind, plane: int, rows: int, dim: int, piece: int, count: int, table: int) -> None:
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
    row_count = load(work + TOKENS) * dim // ROW
    scratch = place + SCRATCH
    void = 0
    for first in range(0, row_count, _TILE):
        count = min(_TILE, row_count - first)
        _find_pieces(kind, plane, rows, dim, first * row_pieces, count * row_pieces, scratch + _PIECES)
        for i in range(0, count * row_vectors, 8):
            _clear_eight(scratch, i)
        for i in range(count):
            pieces = scratch + _PIECES + 8 * i * row_pieces
            _sum_squares(kind, pieces, ahead, scratch + _SQUARES + 4 * i * row_vectors)
        for i in range(0, count * row_vectors, 8):
            void += _normalise(scratch, i)
        for i in range(count):
            pieces, vectors = scratch + _PIECES + 8 * i * row_pieces, scratch + 4 * i * row_vectors
            _encode_row(kind, pieces, ahead, vectors, codes, signs)
            codes += code_bytes
            signs += 16
        for i in range(0, count * row_vectors, 8):
            _scale(kind, scratch, i)
        copy(scales + 2 * first * row_vectors, scratch + _SCALES, 2 * count * row_vectors)
    return void


@emitted
def _clear_eight(v: Vectors, scratch: Value, first: Value) -> None:
    """Sums of squares of eight vectors that may not be there."""
    v.store(v.constant(VF32, 0.0), v.at(scratch, v.b.mul(first, I64(4))), _SQUARES)


@kernel
def encode_turbo(kind: Kind, work: int, place: int) -> None:
    """Encode planes (``work``)."""
    while next_plane(kind, work, place) != 0:
        count_void(work, place, _encode_plane(kind, work, place))


@kernel
def decode_turbo(kind: Kind, work: int, place: int) -> None:
    """Decode planes (``work``)."""
    dim, pieces = load(work + DIM), place + SCRATCH + _PIECES
    row_count, row_pieces = load(work + TOKENS) * dim // ROW, ROW // run_elements(kind)
    code_bytes = 64 if code_bits(kind) == 4 else 32
    while next_plane(kind, work, place) != 0:
        plane, rows = load(place + PLANE), load(place + ROWS)
        codes, signs, scales = region(work, place, 0), region(work, place, 1), region(work, place, 1)
        if code_bits(kind) == 3:
            scales = region(work, place, 2)
        for row in range(row_count):
            _find_pieces(kind, plane, rows, dim, row * row_pieces, row_pieces, pieces)
            prefetch(codes + FETCH_AHEAD_BYTES)
            prefetch(signs + FETCH_AHEAD_BYTES // 2)
            _decode_row(kind, codes, signs, scales, pieces)
            codes += code_bytes
            signs += 16
            scales += 2 * ROW // group_elements(kind)
