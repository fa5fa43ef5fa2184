"""``int4`` and the values of ``kivi2`` (``docs/codecs.md``): groups of channels of one token.

Over tiles of 16 groups in three passes: least and greatest numbers, parameters, codes. A division and a horizontal
reduction a group, between its loads and its codes, would stall them; the second and third pass find everything in the
nearest cache.

A kind's ``run`` of 64 channels holds one group of 64 (four bits) or two of 32 (two bits), in lane order; where the
channels of a plane are no multiple of 64, a run is one group of 32 or 16, in natural order.
"""

from __future__ import annotations

from typing import Final

from kvstore_kernels.cpu.code import inlined, kernel
from kvstore_kernels.cpu.kinds import Kind, code_bits, element_bytes, group_elements, run_elements
from kvstore_kernels.cpu.lanes import F16, F32, I8, I16, I32, I64, LANES, VF32, VI32, Value, vector
from kvstore_kernels.cpu.loads import STEP, load_pair, patterns, store_pair, values_of_patterns
from kvstore_kernels.cpu.memory import fill_zero, load, prefetch
from kvstore_kernels.cpu.rows import FETCH_AHEAD_BYTES
from kvstore_kernels.cpu.vectors import Vectors, emitted
from kvstore_kernels.cpu.work import (
    DIM,
    ROW_COUNT,
    SCRATCH,
    count_void,
    next_plane,
    region,
    row_address,
    row_ahead,
    row_place,
)

_TILE: Final = 16
"""Groups of a tile."""
_FETCH_AHEAD_TILES: Final = 4
_LANE_ORDER_RUN: Final = 64
_PARAMETER_BYTES: Final = 4

# Scratch memory: for each eight groups 32 bytes with bits of their least numbers and as many with the greatest;
# float32 minima; inverse scales; pairs of float16 scales and minima.
_ENDS: Final = 0
_MINIMA: Final = _ENDS + 8 * _TILE
_INVERSES: Final = _MINIMA + 4 * _TILE
_PARAMETERS: Final = _INVERSES + 4 * _TILE
_EIGHT_ENDS_BYTES: Final = 64
_GREATEST: Final = 32


@emitted
def _extremes(v: Vectors, kind: Kind, run: Value, ahead: Value, scratch: Value, number: Value) -> None:
    """Store bits of the least and the greatest element of each group of a run; fetch half of another run ahead."""
    v.prefetch_span(ahead, kind.row_bytes(kind.run) // 2)
    steps = kind.group // STEP
    for group in range(kind.run // kind.group):
        vectors = [x for step in range(steps) for x in patterns(v, kind, run, group * steps + step)]
        of_tile = v.b.add(number, I64(group))
        eight = v.b.mul(v.b.lshr(of_tile, I64(3)), I64(_EIGHT_ENDS_BYTES))
        one = v.b.mul(v.b.and_(of_tile, I64(LANES - 1)), I64(kind.element_bytes))
        at = v.at(v.at(scratch, eight), one)
        most, least = (
            v.reduce("smax", v.tree(v.greatest, vectors)),
            v.reduce("umax", v.tree(v.greatest_unsigned, vectors)),
        )
        v.store(least, at, _ENDS)
        v.store(most, at, _ENDS + _GREATEST)
        zero = v.constant(most.type, 0)
        one_sign = v.b.or_(v.b.icmp_signed("<", most, zero), v.b.icmp_signed(">=", least, zero))
        with v.b.if_then(one_sign, likely=False):
            next_to_zero = v.reduce("umin", v.tree(v.least_unsigned, vectors))
            least, most = v.extremes(most, least, next_to_zero)
            v.store(least, at, _ENDS)
            v.store(most, at, _ENDS + _GREATEST)


@emitted
def _parameters(v: Vectors, kind: Kind, scratch: Value, first: Value) -> Value:
    """Minima, inverse scales and parameters of eight groups; how many of them are void."""
    eight = v.at(scratch, v.b.mul(first, I64(_EIGHT_ENDS_BYTES // LANES)))
    low, high = (values_of_patterns(v, kind, v.at(eight, at)) for at in (_ENDS, _ENDS + _GREATEST))
    parameters = v.asymmetric(low, high, kind.bits)
    at = v.at(scratch, v.b.mul(first, I64(4)))
    v.store(parameters.minimum, at, _MINIMA)
    v.store(parameters.inverse, at, _INVERSES)
    scale, minimum = (v.b.zext(half, VI32) for half in (parameters.scale_bits, parameters.minimum_bits))
    v.store(v.b.or_(scale, v.shifted(minimum, 16)), at, _PARAMETERS)
    return v.count(parameters.void)


@emitted
def _encode_run(
    v: Vectors,
    kind: Kind,
    run: Value,
    ahead: Value,
    codes: Value,
    parameters: Value,
    scratch: Value,
    number: Value,
) -> None:
    """Encode a run and store its parameters; fetch the other half of another run ahead."""
    half_bytes = kind.row_bytes(kind.run) // 2
    v.prefetch_span(v.at(ahead, half_bytes), half_bytes)
    at = v.at(scratch, v.b.mul(number, I64(4)))
    for group in range(kind.run // kind.group):
        v.store(v.load(at, I32, 4 * group + _PARAMETERS), parameters, _PARAMETER_BYTES * group)
    numbers = []
    for group in range(kind.run // kind.group):
        minimum, inverse = (v.splat(v.load(at, F32, 4 * group + table)) for table in (_MINIMA, _INVERSES))
        for step in range(group * kind.group // STEP, (group + 1) * kind.group // STEP):
            even, odd = (v.b.fmul(v.b.fsub(x, minimum), inverse) for x in load_pair(v, kind, run, step))
            numbers.append((even, odd))
    if kind.run == _LANE_ORDER_RUN:
        words = v.packed(numbers, kind.bits)
        v.store(words if kind.bits == 4 else v.b.trunc(words, vector(I16, LANES)), codes)
        return
    for step, pair in enumerate(numbers):
        v.store(_natural(v, v.packed([pair], kind.bits), kind.bits), codes, STEP * kind.bits // 8 * step)


@emitted
def _decode_run(v: Vectors, kind: Kind, codes: Value, parameters: Value, run: Value) -> None:
    steps = kind.run // STEP
    if kind.run == _LANE_ORDER_RUN:
        words = v.load(codes, VI32) if kind.bits == 4 else v.b.zext(v.load(codes, vector(I16, LANES)), VI32)
        pairs = [v.shifted(words, -2 * kind.bits * step) for step in range(steps)]
    else:
        pairs = [_of_natural(v, codes, kind.bits, STEP * kind.bits // 8 * step) for step in range(steps)]
    for group in range(kind.run // kind.group):
        half = (v.load(parameters, F16, _PARAMETER_BYTES * group + at) for at in (0, 2))
        scale, minimum = (v.splat(v.b.fpext(number, F32)) for number in half)
        for step in range(group * kind.group // STEP, (group + 1) * kind.group // STEP):
            values = []
            for low in (0, kind.bits):
                code = v.b.sitofp(v.bits(pairs[step], low, 2**kind.bits - 1), VF32)
                values.append(v.b.fadd(v.b.fmul(code, scale), minimum))
            store_pair(v, kind, (values[0], values[1]), run, step)


def _natural(v: Vectors, pairs: Value, bits: int) -> Value:
    """Codes of neighbours in eight lanes as bytes without gaps."""
    if bits == 4:
        return v.b.trunc(pairs, vector(I8, LANES))
    even, odd = (v.pick(pairs, pairs, range(first, LANES, 2)) for first in (0, 1))
    return v.b.trunc(v.b.or_(even, v.shifted(odd, 2 * bits)), vector(I8, LANES // 2))


def _of_natural(v: Vectors, codes: Value, bits: int, offset: int) -> Value:
    """Inverse of ``_natural``; above the codes of a lane are those of others."""
    if bits == 4:
        return v.b.zext(v.load(codes, vector(I8, LANES), offset), VI32)
    fours = v.b.zext(v.load(codes, vector(I8, LANES // 2), offset), vector(I32, LANES // 2))
    return v.pick(fours, v.shifted(fours, -2 * bits), [lane // 2 + LANES // 2 * (lane % 2) for lane in range(LANES)])


@inlined
def _encode_plane(kind: Kind, work: int, place: int) -> int:
    """Encode a plane; how many groups are void."""
    row_count, scratch = load(work + ROW_COUNT), place + SCRATCH
    codes, parameters = region(work, place, 0), region(work, place, 1)
    run_groups = run_elements(kind) // group_elements(kind)
    run_bytes = run_elements(kind) * element_bytes(kind)
    code_bytes = run_elements(kind) * code_bits(kind) // 8
    row_runs = load(work + DIM) // run_elements(kind)
    row_groups = row_runs * run_groups
    tile_rows = max(1, _TILE // row_groups)
    void = 0
    for first in range(0, row_count, tile_rows):
        end = min(first + tile_rows, row_count)
        count = (end - first) * row_groups
        if count % 8 != 0:
            fill_zero(scratch + _ENDS, _MINIMA - _ENDS)
        group = 0
        for i in range(first, end):
            row, ahead = row_address(work, place, i), row_ahead(work, place, i + _FETCH_AHEAD_TILES * tile_rows)
            for run in range(0, row_runs * run_bytes, run_bytes):
                _extremes(kind, row + run, ahead + run, scratch, group)
                group += run_groups
        for group in range(0, count, 8):
            void += _parameters(kind, scratch, group)
        group = 0
        for i in range(first, end):
            row, ahead = row_address(work, place, i), row_ahead(work, place, i + _FETCH_AHEAD_TILES * tile_rows)
            number = row_place(work, i)
            row_codes, row_parameters = codes + number * row_runs * code_bytes, parameters + number * row_groups * 4
            for run in range(0, row_runs * run_bytes, run_bytes):
                _encode_run(kind, row + run, ahead + run, row_codes, row_parameters, scratch, group)
                row_codes += code_bytes
                row_parameters += run_groups * 4
                group += run_groups
    return void


@kernel
def encode_token_groups(kind: Kind, work: int, place: int) -> None:
    """Encode planes (``work``)."""
    while next_plane(work, place) != 0:
        count_void(work, place, _encode_plane(kind, work, place))


@kernel
def decode_token_groups(kind: Kind, work: int, place: int) -> None:
    """Decode planes (``work``)."""
    row_count, row_runs = load(work + ROW_COUNT), load(work + DIM) // run_elements(kind)
    run_bytes = run_elements(kind) * element_bytes(kind)
    code_bytes = run_elements(kind) * code_bits(kind) // 8
    parameter_bytes = run_elements(kind) // group_elements(kind) * _PARAMETER_BYTES
    while next_plane(work, place) != 0:
        all_codes, all_parameters = region(work, place, 0), region(work, place, 1)
        for i in range(row_count):
            row, runs = row_address(work, place, i), row_place(work, i) * row_runs
            codes, parameters = all_codes + runs * code_bytes, all_parameters + runs * parameter_bytes
            prefetch(parameters + FETCH_AHEAD_BYTES // 4)
            for run in range(0, row_runs * run_bytes, run_bytes):
                prefetch(codes + FETCH_AHEAD_BYTES)
                _decode_run(kind, codes, parameters, row + run)
                codes += code_bytes
                parameters += parameter_bytes
