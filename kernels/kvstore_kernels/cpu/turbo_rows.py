"""Rows of turbo codes (``docs/codecs.md``), wherever their elements come from and go to.

A row of 128 elements is eight steps of 16; it holds one vector or several (a kind's ``group``). Rows are encoded
sixteen at a time in four passes: sums of squares; norms; codes and products; scales. Square roots and divisions are
thus done eight at a time, and nothing waits for them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Final

from kvstore_kernels.codecs.turbo import DEVIATION, LEVELS, ROW, SIGNS, THRESHOLDS, VOID_ABOVE, ZERO_BELOW
from kvstore_kernels.cpu.code import inlined
from kvstore_kernels.cpu.kinds import Kind
from kvstore_kernels.cpu.lanes import F32, I8, I16, I64, LANES, VF32, VI32, WI16, Value, float32, vector
from kvstore_kernels.cpu.loads import STEP, Pair
from kvstore_kernels.cpu.vectors import Vectors, emitted

__all__ = [
    "SCALES",
    "SQUARES",
    "STEPS",
    "TILE",
    "TILE_BYTES",
    "clear_squares",
    "encode_steps",
    "factor_of_scale",
    "flips",
    "make_norms",
    "make_scales",
    "sum_of_squares",
    "transformed",
]

STEPS: Final = ROW // STEP
TILE: Final = 16
"""Rows of a tile."""
_MOST_VECTORS: Final = TILE * ROW // STEP
"""Vectors of a tile, of the shortest."""

# Scratch memory of a tile: for each vector sum of squares, factor to the normalised coordinates, norm, product of
# coordinates and levels, scale.
SQUARES: Final = 0
_FACTORS: Final = SQUARES + 4 * _MOST_VECTORS
_NORMS: Final = _FACTORS + 4 * _MOST_VECTORS
_PRODUCTS: Final = _NORMS + 4 * _MOST_VECTORS
SCALES: Final = _PRODUCTS + 4 * _MOST_VECTORS
TILE_BYTES: Final = SCALES + 2 * _MOST_VECTORS


def flips(kind: Kind, step: int, odd: int) -> list[bool]:
    """Whose signs are flipped, of a step's even or odd elements."""
    first = STEP * step % kind.group + odd
    return [bool(SIGNS[i // 8] >> i % 8 & 1) for i in range(first, first + STEP, 2)]


def sum_of_squares(v: Vectors, steps: Iterable[Pair]) -> Value:
    """Of a vector: a scalar."""
    sums = [v.b.fadd(v.b.fmul(even, even), v.b.fmul(odd, odd)) for even, odd in steps]
    return v.across(v.b.fadd, v.tree(v.b.fadd, sums))


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
def _normalise(v: Vectors, scratch: Value, first: Value) -> Value:
    """Norms and factors of eight vectors, both 0 for those without codes; how many are void."""
    at = v.at(scratch, v.b.mul(first, I64(4)))
    squares = v.load(at, VF32, SQUARES)
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
    v.store(bits, v.at(scratch, v.b.mul(first, I64(2))), SCALES)


def encode_steps(
    v: Vectors, kind: Kind, load: Callable[[int], Pair], vectors: Value, codes: Value, signs: Value
) -> None:
    """Store codes and products of a row.

    Args:
        v: emits.
        kind: of the kernel.
        load: gives the elements of a step, their signs flipped.
        vectors: scratch memory, moved to the row's first vector.
        codes: of the row.
        signs: of the row, with three bits.
    """
    evens, odds = [], []
    for step in range(STEPS):
        even, odd = load(step)
        even, odd = _within_step(v, v.b.fadd(even, odd), v.b.fsub(even, odd))
        evens.append(even)
        odds.append(odd)
    steps = kind.group // STEP
    distances = [distance for distance in (1, 2, 4) if distance < steps]
    evens, odds = (_between_steps(v.b.fadd, v.b.fsub, half, distances) for half in (evens, odds))
    indices, negatives = [], []
    for first in range(0, STEPS, steps):
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
    for word in range(STEPS // word_steps):
        parts = [v.shifted(indices[word * word_steps + j], places * j) for j in range(word_steps)]
        v.store(v.natural_16(v.any_of(parts)), codes, 32 * word)
    if bits == 3:
        parts = [v.bits(negative, 15 - j, 1 << j) for j, negative in enumerate(negatives)]
        v.store(v.b.trunc(v.natural_16(v.any_of(parts)), vector(I8, STEP)), signs)


def transformed(v: Vectors, kind: Kind, codes: Value, signs: Value) -> Iterator[list[tuple[int, Pair]]]:
    """Numbers of a row out of its codes, transformed: steps, some at a time, each with its number.

    Sums of levels are whole numbers below 2^24, so that the transform is exact in any order and arithmetic: two stages
    are done in int16, which cannot overflow yet, the next by the instruction that also makes them int32.
    """
    vector_steps = kind.group // STEP
    distances = [distance for distance in (1, 2, 4) if distance < vector_steps]
    levels = _between_steps(v.b.add, v.b.sub, _levels(v, kind.bits, codes, signs), distances[-2:])
    plus, minus = v.constant(WI16, 1), v.lanes([1, -1] * LANES, I16)
    group = 2 if len(distances) == 3 else 1
    for first in range(0, STEPS, group):
        evens, odds = [], []
        for step in range(first, first + group):
            pair = (v.b.sitofp(v.pairs_dot(levels[step], signs), VF32) for signs in (plus, minus))
            even, odd = _within_step(v, *pair)
            evens.append(even)
            odds.append(odd)
        evens, odds = (_between_steps(v.b.fadd, v.b.fsub, half, [1] * (group - 1)) for half in (evens, odds))
        yield list(zip(range(first, first + group), zip(evens, odds, strict=True), strict=True))


def factor_of_scale(v: Vectors, kind: Kind, bits: Value) -> Value:
    """What turns the numbers of ``transformed`` into those of a vector, by the bits of its scale."""
    root, deviation = v.constant(F32, float32(1 / math.sqrt(kind.group))), v.constant(F32, 1 / DEVIATION)
    return v.splat(v.b.fmul(v.b.fmul(v.from_float16(bits), root), deviation))


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
    return [steps[step] for step in range(STEPS)]


@emitted
def _clear_eight(v: Vectors, scratch: Value, first: Value) -> None:
    """Sums of squares of eight vectors that may not be there."""
    v.store(v.constant(VF32, 0.0), v.at(scratch, v.b.mul(first, I64(4))), SQUARES)


@inlined
def clear_squares(scratch: int, count: int) -> None:
    """Before sums of squares of so many vectors are stored: those up to the next eight are there too."""
    for i in range(0, count, 8):
        _clear_eight(scratch, i)


@inlined
def make_norms(scratch: int, count: int) -> int:
    """Norms and factors by the sums of squares; how many vectors are void."""
    void = 0
    for i in range(0, count, 8):
        void += _normalise(scratch, i)
    return void


@inlined
def make_scales(kind: Kind, scratch: int, count: int) -> None:
    """Scales by the norms and products."""
    for i in range(0, count, 8):
        _scale(kind, scratch, i)
