"""Keys of ``centred4``, ``centred3``, ``centred2`` and mixtures (``docs/codecs.md``): turbo codes less a mean.

A group of tokens is taken in four passes over its elements, which stay in the cache: sums of squares and of channels;
the same of what is left without the mean; what is encoded, scaled, a tile of rows at a time; its codes. The second pass
takes no vector for far, and only where one is, the strengths of its channels are added up again. What a void vector's
elements and a far vector's means are, is said by addresses: there are zeros.
"""

from __future__ import annotations

import math
from typing import Final

from kvstore_kernels.codecs.centred import MOST_TOKENS
from kvstore_kernels.codecs.turbo import ROW
from kvstore_kernels.cpu.centred_groups import (
    FACTORS,
    MEANS,
    PARAMETER_BYTES,
    centre_vectors,
    elements_of,
    less_means,
    load_parameters,
    make_factors,
    parameters_of,
    quantise_means,
    strengths_again,
    sum_again,
    take_vectors,
)
from kvstore_kernels.cpu.code import inlined, kernel
from kvstore_kernels.cpu.kinds import Kind, code_bits, element_bytes, group_elements, run_elements
from kvstore_kernels.cpu.lanes import I16, I64, VF32, VI16, Value
from kvstore_kernels.cpu.loads import STEP, Pair, store_pair
from kvstore_kernels.cpu.memory import fill_zero, load, prefetch, store
from kvstore_kernels.cpu.rows import FETCH_AHEAD_BYTES
from kvstore_kernels.cpu.turbo import find_pieces, step_address
from kvstore_kernels.cpu.turbo_rows import (
    SCALES,
    SQUARES,
    TILE,
    TILE_BYTES,
    encode_steps,
    factor_of_scale,
    make_norms,
    make_scales,
    sum_of_squares,
    transformed,
)
from kvstore_kernels.cpu.vectors import Vectors, emitted
from kvstore_kernels.cpu.work import DIM, FOLLOWING, PLANE, ROW_COUNT, ROWS, SCRATCH, count_void, next_plane, region

__all__ = ["decode_centred", "encode_centred", "scratch_bytes"]

# Scratch memory: a tile of turbo; of a row that is decoded the addresses of its pieces, and where in the parameters its
# vectors begin; the tile's elements; zeros; parameters with means and, as many, without; of each vector of the group
# the addresses of its elements and of its parameters, its sum of squares, the sign of its scale.
_PIECES: Final = TILE_BYTES
_PLACES: Final = _PIECES + 8 * ROW // STEP
_SCALED: Final = _PLACES + 8 * ROW // STEP
_ROW_BYTES: Final = 4 * ROW
_ZEROS: Final = _SCALED + TILE * _ROW_BYTES
_PARAMETERS: Final = _ZEROS + _ROW_BYTES
_VECTOR_BYTES: Final = 8 + 8 + 4 + 2


def scratch_bytes(dim: int) -> int:
    """Scratch memory for planes of so many channels."""
    vectors = MOST_TOKENS * dim // math.gcd(dim, ROW)
    return -(-(_PARAMETERS + 2 * PARAMETER_BYTES * dim + _VECTOR_BYTES * vectors) // 64) * 64


# Encoding: a row


@emitted
def _scale_row(
    v: Vectors, kind: Kind, sources: Value, chosen: Value, ahead: Value, scaled: Value, squares: Value
) -> None:
    """Store what is encoded, its signs flipped, and sums of squares; fetch the other half of other vectors ahead."""
    steps = kind.group // STEP
    for vector in range(ROW // kind.group):
        source, parameters = (v.load(table, I64, 8 * vector) for table in (sources, chosen))
        half_bytes = kind.row_bytes(kind.group) // 2
        v.prefetch_span(v.at(v.at(source, ahead), half_bytes), half_bytes)
        pairs = []
        for step, pair in enumerate(less_means(v, elements_of(v, kind, source), parameters)):
            factors = parameters_of(v, parameters, step, FACTORS)
            even, odd = (v.b.fmul(x, factor) for x, factor in zip(pair, factors, strict=True))
            at = 4 * STEP * (steps * vector + step)
            v.store(even, scaled, at)
            v.store(odd, scaled, at + 32)
            pairs.append((even, odd))
        v.store(sum_of_squares(v, pairs), squares, 4 * vector)


@emitted
def _encode_row(v: Vectors, kind: Kind, scaled: Value, vectors: Value, codes: Value, signs: Value) -> None:
    """``encode_steps`` of what ``_scale_row`` has stored."""

    def load_step(step: int) -> Pair:
        return v.load(scaled, VF32, 4 * STEP * step), v.load(scaled, VF32, 4 * STEP * step + 32)

    encode_steps(v, kind, load_step, vectors, codes, signs)


@emitted
def _store_scales(v: Vectors, made: Value, signs: Value, scales: Value) -> None:
    """Scales of eight vectors with their signs."""
    v.store(v.b.or_(v.load(made, VI16), v.load(signs, VI16)), scales)


@emitted
def _decode_row(
    v: Vectors,
    kind: Kind,
    codes: Value,
    signs: Value,
    scales: Value,
    pieces: Value,
    places: Value,
    parameters: Value,
    others: Value,
) -> None:
    """Decode a row.

    Args:
        v: emits.
        kind: of the kernel.
        codes: of the row.
        signs: of the row, with three bits.
        scales: of the row's vectors.
        pieces: addresses of the row's pieces.
        places: bytes from the first channel's parameters to those of each vector.
        parameters: of all channels.
        others: bytes from there to the parameters of far vectors.
    """
    vector_steps = kind.group // STEP
    for steps in transformed(v, kind, codes, signs):
        vector = steps[0][0] // vector_steps
        scale = v.load(scales, I16, 2 * vector)
        far = v.b.select(v.b.icmp_signed("<", scale, I16(0)), others, I64(0))
        at = v.at(v.at(parameters, v.load(places, I64, 8 * vector)), far)
        factor = factor_of_scale(v, kind, v.bits(scale, 0, 0x7FFF))
        for step, pair in steps:
            values = []
            factors, means = (parameters_of(v, at, step % vector_steps, which) for which in (FACTORS, MEANS))
            for x, of_channel, mean in zip(pair, factors, means, strict=True):
                values.append(v.b.fadd(v.b.fmul(v.b.fmul(x, factor), of_channel), mean))
            store_pair(v, kind, (values[0], values[1]), step_address(v, kind, pieces, step))


@inlined
def _group_tokens(work: int) -> int:
    tokens = MOST_TOKENS
    if load(work + ROW_COUNT) % MOST_TOKENS != 0:
        tokens = MOST_TOKENS // 2
    return tokens


@inlined
def _encode_plane(kind: Kind, work: int, place: int) -> int:
    """Encode a plane; how many vectors are void."""
    dim, tokens, scratch = load(work + DIM), _group_tokens(work), place + SCRATCH
    plane, ahead, rows = load(place + PLANE), load(place + FOLLOWING) - load(place + PLANE), load(place + ROWS)
    scales = 2 if code_bits(kind) == 3 else 1
    codes, signs, row_scales = region(work, place, 0), region(work, place, 1), region(work, place, scales)
    mean_scales, mean_codes = region(work, place, scales + 1), region(work, place, scales + 2)
    exponents = region(work, place, scales + 3)
    code_bytes = 64 if code_bits(kind) == 4 else 32
    pitch, row_vectors = dim // group_elements(kind), ROW // group_elements(kind)
    vector_bytes, table_bytes = group_elements(kind) * element_bytes(kind), group_elements(kind) * PARAMETER_BYTES
    others, vectors = dim * PARAMETER_BYTES, tokens * pitch
    parameters = scratch + _PARAMETERS
    sources = parameters + 2 * others
    chosen, squares = sources + 8 * vectors, sources + 16 * vectors
    far_signs = squares + 4 * vectors
    void = 0
    for _ in range(0, load(work + ROW_COUNT), tokens):
        for i in range(pitch):
            at, table = plane + i * vector_bytes, parameters + i * table_bytes
            source, squared = sources + 8 * i, squares + 4 * i
            count = take_vectors(kind, at, rows, tokens, pitch, ahead, scratch + _ZEROS, source, squared, table)
            if count != 0:
                sum_again(kind, tokens, pitch, source, table)
                void += count
        quantise_means(tokens, dim, parameters, mean_scales, mean_codes)
        for i in range(pitch):
            table, source = parameters + i * table_bytes, sources + 8 * i
            choice, sign = chosen + 8 * i, far_signs + 2 * i
            if centre_vectors(kind, tokens, pitch, source, squares + 4 * i, table, others, choice, sign) != 0:
                strengths_again(kind, tokens, pitch, source, choice, table)
            make_factors(kind, table, others, exponents + i * group_elements(kind))
        for first in range(0, vectors, TILE * row_vectors):
            count = min(TILE * row_vectors, vectors - first)
            for i in range(0, count, row_vectors):
                vector, scaled = first + i, scratch + _SCALED + i * group_elements(kind) * 4
                at = scratch + SQUARES + 4 * i
                _scale_row(kind, sources + 8 * vector, chosen + 8 * vector, ahead, scaled, at)
            make_norms(scratch, count)
            for i in range(0, count, row_vectors):
                _encode_row(kind, scratch + _SCALED + i * group_elements(kind) * 4, scratch + 4 * i, codes, signs)
                codes += code_bytes
                signs += 16
            make_scales(kind, scratch, count)
            for i in range(0, count, 8):
                _store_scales(scratch + SCALES + 2 * i, far_signs + 2 * (first + i), row_scales)
                row_scales += 16
        rows += 8 * tokens
        mean_scales += 2
        mean_codes += dim
        exponents += dim
    return void


@kernel
def encode_centred(kind: Kind, work: int, place: int) -> None:
    """Encode planes (``work``)."""
    fill_zero(place + SCRATCH + _ZEROS, _ROW_BYTES)
    while next_plane(work, place) != 0:
        count_void(work, place, _encode_plane(kind, work, place))


@inlined
def _decode_plane(kind: Kind, work: int, place: int) -> None:
    dim, tokens, scratch = load(work + DIM), _group_tokens(work), place + SCRATCH
    plane, rows = load(place + PLANE), load(place + ROWS)
    scales = 2 if code_bits(kind) == 3 else 1
    codes, signs, row_scales = region(work, place, 0), region(work, place, 1), region(work, place, scales)
    mean_scales, mean_codes = region(work, place, scales + 1), region(work, place, scales + 2)
    exponents = region(work, place, scales + 3)
    code_bytes = 64 if code_bits(kind) == 4 else 32
    row_vectors, row_pieces = ROW // group_elements(kind), ROW // run_elements(kind)
    pieces, places, parameters = scratch + _PIECES, scratch + _PLACES, scratch + _PARAMETERS
    others, table_bytes = dim * PARAMETER_BYTES, group_elements(kind) * PARAMETER_BYTES
    for _ in range(0, load(work + ROW_COUNT), tokens):
        for channel in range(0, dim, group_elements(kind)):
            table = parameters + channel * PARAMETER_BYTES
            load_parameters(kind, mean_scales, mean_codes + channel, exponents + channel, table, others)
        at = 0
        for row in range(tokens * dim // ROW):
            find_pieces(kind, plane, rows, dim, row * row_pieces, row_pieces, pieces)
            for i in range(row_vectors):
                store(places + 8 * i, at)
                at += table_bytes
                if at == others:
                    at = 0
            prefetch(codes + FETCH_AHEAD_BYTES)
            prefetch(signs + FETCH_AHEAD_BYTES // 2)
            _decode_row(kind, codes, signs, row_scales, pieces, places, parameters, others)
            codes += code_bytes
            signs += 16
            row_scales += 2 * row_vectors
        rows += 8 * tokens
        mean_scales += 2
        mean_codes += dim
        exponents += dim


@kernel
def decode_centred(kind: Kind, work: int, place: int) -> None:
    """Decode planes (``work``)."""
    while next_plane(work, place) != 0:
        _decode_plane(kind, work, place)
