"""``turbo4``, ``turbo3``, ``turbo2`` (``docs/codecs.md``): rotated vectors on Lloyd-Max levels.

A row of 128 elements is eight steps of 16; it holds one vector or several (a kind's ``group``), and its elements lie in
memory in pieces (a kind's ``run``): a row may be two tokens, or the end of one and the beginning of another. Rows are
taken sixteen at a time in four passes: sums of squares; norms; codes and products; scales. Square roots and divisions
are thus done eight at a time, and nothing waits for them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

from kvstore_kernels.codecs.turbo import DEVIATION, LEVELS, ROW, SIGNS, THRESHOLDS, VOID_ABOVE, ZERO_BELOW
from kvstore_kernels.cpu.code import inlined, kernel
from kvstore_kernels.cpu.kinds import Kind, code_bits, element_bytes, group_elements, run_elements
from kvstore_kernels.cpu.lanes import F32, I8, I16, I64, LANES, VF32, VI32, WI16, Value, float32, vector
from kvstore_kernels.cpu.loads import STEP, load_pair, store_pair
from kvstore_kernels.cpu.memory import copy, load, prefetch, store
from kvstore_kernels.cpu.rows import FETCH_AHEAD_BYTES
from kvstore_kernels.cpu.vectors import Vectors, emitted
from kvstore_kernels.cpu.work import DIM, FOLLOWING, PLANE, ROW_COUNT, ROWS, SCRATCH, count_void, next_plane, region

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


def _piece(v: Vectors, kind: Kind, pieces: Value, step: int) -> Value:
    """Address of a step's elements."""
    number, inside = divmod(STEP * step, kind.run)
    return v.at(v.load(pieces, I64, 8 * number), kind.row_bytes(inside))


def _signs(kind: Kind, step: int, odd: int) -> list[bool]:
    """Whose signs are flipped."""
    first = STEP * step % kind.group + odd
    return [bool(SIGNS[i // 8] >> i % 8 & 1) for i in range(first, first + STEP, 2)]


def _within_step(v: Vectors, even: Value, odd: Value) -> tuple[Value, Value]:
    """Of a Walsh-Hadamard transform a+b and a-b over distances 2, 4 and 8; distance 1 is between even and odd."""
    for distance in (1, 2, 4):
        lanes = [lane ^ distance for lane in range(LANES)]
        upper = [bool(lane & distance) for lane in range(LANES)]
        even, odd = (v.plus_minus(x, upper, v.pick(x, x, lanes)) for x in (even, odd))
    return even, odd


def _between_steps(add: Any, subtract: Any, steps: Sequence[Value], distances: Sequence[int]) -> list[Value]:
    """The same over whole steps: distances in steps."""
    mixed = list(steps)
    for distance in distances:
        for i in range(len(mixed)):
            if not i & distance:
                low, high = mixed[i], mixed[i + distance]
                mixed[i], mixed[i + distance] = add(low, high), subtract(low, high)
    return mixed


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
    evens, odds = [], []
    for step in range(_STEPS):
        at = _piece(v, kind, pieces, step)
        if step % 4 >= 2:
            v.prefetch_span(v.at(at, ahead), kind.row_bytes(STEP))
        even, odd = (v.flipped(x, _signs(kind, step, i)) for i, x in enumerate(load_pair(v, kind, at)))
        even, odd = _within_step(v, v.b.fadd(even, odd), v.b.fsub(even, odd))
        evens.append(even)
        odds.append(odd)
    steps = kind.group // STEP
    distances = [distance for distance in (1, 2, 4) if distance < steps]
    evens, odds = (_between_steps(v.b.fadd, v.b.fsub, half, distances) for half in (evens, odds))
    indices, negatives = [], []
    for first in range(0, _STEPS, steps):
        factor = v.splat(v.load(vectors, F32, _FACTORS + first // steps * 4))
        has_codes = v.b.fcmp_ordered(">", factor, v.constant(VF32, 0.0))
        mask = v.b.bitcast(v.b.sext(has_codes, VI32), WI16)
        products = v.constant(VI32, 0)
        for step in range(first, first + steps):
            y = v.whole_16(v.b.fmul(evens[step], factor), v.b.fmul(odds[step], factor))
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
    """Inverse of ``_encode_row``.

    Sums of levels are whole numbers below 2^24, so that the transform is exact in any order and arithmetic: two stages
    are done in int16, which cannot overflow yet, the next by the instruction that also makes them int32.
    """
    vector_steps = kind.group // STEP
    distances = [distance for distance in (1, 2, 4) if distance < vector_steps]
    levels = _between_steps(v.b.add, v.b.sub, _levels(v, kind.bits, codes, signs), distances[-2:])
    plus, minus = v.constant(WI16, 1), v.lanes([1, -1] * LANES, I16)
    group = 2 if len(distances) == 3 else 1
    root = v.constant(F32, float32(1 / math.sqrt(kind.group)))
    deviation = v.constant(F32, 1 / DEVIATION)
    for first in range(0, _STEPS, group):
        evens, odds = [], []
        for step in range(first, first + group):
            pair = (v.b.sitofp(v.pairs_dot(levels[step], signs), VF32) for signs in (plus, minus))
            even, odd = _within_step(v, *pair)
            evens.append(even)
            odds.append(odd)
        evens, odds = (_between_steps(v.b.fadd, v.b.fsub, half, [1] * (group - 1)) for half in (evens, odds))
        scale = v.from_float16(v.load(scales, I16, 2 * (first // vector_steps)))
        factor = v.splat(v.b.fmul(v.b.fmul(scale, root), deviation))
        for i, step in enumerate(range(first, first + group)):
            even, odd = (
                v.flipped(v.b.fmul(half[i], factor), _signs(kind, step, j)) for j, half in enumerate((evens, odds))
            )
            store_pair(v, kind, (even, odd), _piece(v, kind, pieces, step))


def _levels(v: Vectors, bits: int, codes: Value, signs: Value) -> list[Value]:
    """Levels of a row, 16 int16 a step.

    Of each code word the two bytes are looked up at once, their lower and their upper halves one after the other: a
    byte of the level each.
    """
    places = 2 if bits == 3 else bits
    table = [*LEVELS[bits], *(-level for level in LEVELS[bits])]
    low_bytes, high_bytes = [level & 255 for level in table], [level >> 8 & 255 for level in table]
    low_half = v.constant(WI16, 255)
    steps: dict[int, Value] = {}
    for word in range(places // 2):
        words = v.load(codes, WI16, 32 * word)
        for j in range(8 // places):
            index = v.bits(words, places * j, 0x0101 * (2**places - 1))
            if bits == 3:
                flags = v.b.zext(v.load(signs, vector(I8, STEP)), WI16)
                flags = v.b.or_(flags, v.shifted(flags, 4))
                index = v.b.or_(index, v.bits(v.shifted(flags, 2 - j), 0, 0x0404))
            low, high = v.look_up_bytes(low_bytes, index), v.look_up_bytes(high_bytes, index)
            first = word * 16 // places + j
            steps[first] = v.b.or_(v.b.and_(low, low_half), v.shifted(high, 8))
            upper = v.b.and_(high, v.constant(WI16, -256))
            steps[first + 8 // places] = v.b.or_(v.shifted(low, -8), upper)
    return [steps[step] for step in range(_STEPS)]


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
def encode_rows(
    kind: Kind,
    plane: int,
    rows: int,
    ahead: int,
    dim: int,
    row_count: int,
    codes: int,
    signs: int,
    scales: int,
    at: int,
) -> int:
    """Encode rows of 128 elements, from a plane's first token on; how many vectors are void.

    Args:
        kind: of the elements.
        plane: address of the plane.
        rows: offsets of the tokens.
        ahead: bytes to what is fetched.
        dim: channels.
        row_count: rows of 128 elements.
        codes: address of their codes.
        signs: likewise, with three bits.
        scales: likewise.
        at: scratch memory.
    """
    code_bytes = 64 if code_bits(kind) == 4 else 32
    row_pieces, row_vectors = ROW // run_elements(kind), ROW // group_elements(kind)
    void = 0
    for first in range(0, row_count, _TILE):
        count = min(_TILE, row_count - first)
        _find_pieces(kind, plane, rows, dim, first * row_pieces, count * row_pieces, at + _PIECES)
        for i in range(0, count * row_vectors, 8):
            _clear_eight(at, i)
        for i in range(count):
            _sum_squares(kind, at + _PIECES + 8 * i * row_pieces, ahead, at + _SQUARES + 4 * i * row_vectors)
        for i in range(0, count * row_vectors, 8):
            void += _normalise(at, i)
        for i in range(count):
            pieces, vectors = at + _PIECES + 8 * i * row_pieces, at + 4 * i * row_vectors
            _encode_row(kind, pieces, ahead, vectors, codes, signs)
            codes += code_bytes
            signs += 16
        for i in range(0, count * row_vectors, 8):
            _scale(kind, at, i)
        copy(scales + 2 * first * row_vectors, at + _SCALES, 2 * count * row_vectors)
    return void


@inlined
def scales_region(kind: Kind, work: int, place: int) -> int:
    """Address of the plane's scales."""
    scales: int = region(work, place, 2) if code_bits(kind) == 3 else region(work, place, 1)
    return scales


@inlined
def _encode_plane(kind: Kind, work: int, place: int) -> int:
    """Encode a plane; how many vectors are void."""
    dim, plane, rows = load(work + DIM), load(place + PLANE), load(place + ROWS)
    ahead, row_count = load(place + FOLLOWING) - plane, load(work + ROW_COUNT) * dim // ROW
    codes, signs, scales = region(work, place, 0), region(work, place, 1), scales_region(kind, work, place)
    void: int = encode_rows(kind, plane, rows, ahead, dim, row_count, codes, signs, scales, place + SCRATCH)
    return void


@emitted
def _clear_eight(v: Vectors, scratch: Value, first: Value) -> None:
    """Sums of squares of eight vectors that may not be there."""
    v.store(v.constant(VF32, 0.0), v.at(scratch, v.b.mul(first, I64(4))), _SQUARES)


@kernel
def encode_turbo(kind: Kind, work: int, place: int) -> None:
    """Encode planes (``work``)."""
    while next_plane(work, place) != 0:
        count_void(work, place, _encode_plane(kind, work, place))


@inlined
def decode_rows(
    kind: Kind, plane: int, rows: int, dim: int, row_count: int, codes: int, signs: int, scales: int, at: int
) -> None:
    """Inverse of ``encode_rows``."""
    row_pieces, pieces = ROW // run_elements(kind), at + _PIECES
    code_bytes = 64 if code_bits(kind) == 4 else 32
    for row in range(row_count):
        _find_pieces(kind, plane, rows, dim, row * row_pieces, row_pieces, pieces)
        prefetch(codes + FETCH_AHEAD_BYTES)
        prefetch(signs + FETCH_AHEAD_BYTES // 2)
        _decode_row(kind, codes, signs, scales, pieces)
        codes += code_bytes
        signs += 16
        scales += 2 * ROW // group_elements(kind)


@kernel
def decode_turbo(kind: Kind, work: int, place: int) -> None:
    """Decode planes (``work``)."""
    dim, at = load(work + DIM), place + SCRATCH
    row_count = load(work + ROW_COUNT) * dim // ROW
    while next_plane(work, place) != 0:
        codes, signs, scales = region(work, place, 0), region(work, place, 1), scales_region(kind, work, place)
        decode_rows(kind, load(place + PLANE), load(place + ROWS), dim, row_count, codes, signs, scales, at)
