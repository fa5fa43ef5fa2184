"""Keys of ``centred4``, ``centred3``, ``centred2`` (``docs/codecs.md``): less their mean, then as turbo.

A group of tokens is made a tile of float32 first, in the thread's own memory: it is gone over once for the mean, once
for which vectors are far from it, once for the strength of channels, and then it is turbo's. Sums over tokens are taken
of eight channels side by side, and the tokens one after the other, as the contract has it.
"""

from __future__ import annotations

from typing import Final

from kvstore_kernels.codecs.centred import GREATEST_EXPONENT, LEAST_EXPONENT, MOST_TOKENS
from kvstore_kernels.codecs.turbo import ROW, VOID_ABOVE
from kvstore_kernels.cpu.code import inlined, kernel
from kvstore_kernels.cpu.kinds import Kind, code_bits, element_bytes, group_elements, of_float32
from kvstore_kernels.cpu.lanes import F16, F32, I8, I32, I64, LANES, VF32, VI16, VI32, Value, vector
from kvstore_kernels.cpu.loads import STEP, load_pair, store_pair
from kvstore_kernels.cpu.memory import load, store
from kvstore_kernels.cpu.turbo import decode_rows, encode_rows, scales_region
from kvstore_kernels.cpu.vectors import Vectors, emitted
from kvstore_kernels.cpu.work import (
    DIM,
    FOLLOWING,
    PLANE,
    ROW_COUNT,
    ROWS,
    SCRATCH,
    TILE,
    count_void,
    next_plane,
    region,
)

_MEAN_QUOTIENT: Final = 127
_VALUE_BYTES: Final = 4
_ROOT_BITS: Final = 0x3504F3
"""Bits of the fraction of the square root of two, float32."""
_BIAS: Final = 127
_MANTISSA_BITS: Final = 23
_VOID: Final = -1.0
"""Instead of the sum of squares of a void vector: below that of any other."""
_DECODED_TOKENS: Final = 8
"""Tokens that are decoded together: always whole rows of 128 elements."""
_LEAST_VECTOR: Final = 16


def tile_bytes(dim: int) -> int:
    """Memory of a thread: means and factors of channels, offsets of tokens, what is known of vectors, the tile."""
    return _tile_at(dim) + MOST_TOKENS * dim * _VALUE_BYTES


def _tile_at(dim: int) -> int:
    """Where the tile begins, behind means, factors, offsets, sums of squares (or scales) and flags."""
    vectors = MOST_TOKENS * dim // _LEAST_VECTOR
    return 2 * dim * _VALUE_BYTES + 8 * MOST_TOKENS + vectors * _VALUE_BYTES + vectors


@inlined
def _means(tile: int) -> int:
    return tile


@inlined
def _factors(tile: int, dim: int) -> int:
    return tile + dim * _VALUE_BYTES


@inlined
def _offsets(tile: int, dim: int) -> int:
    return tile + 2 * dim * _VALUE_BYTES


@inlined
def _squares(tile: int, dim: int) -> int:
    return tile + 2 * dim * _VALUE_BYTES + 8 * MOST_TOKENS


@inlined
def _flags(tile: int, dim: int) -> int:
    return tile + 2 * dim * _VALUE_BYTES + 8 * MOST_TOKENS + MOST_TOKENS * dim // _LEAST_VECTOR * _VALUE_BYTES


@inlined
def _values(tile: int, dim: int) -> int:
    return tile + 2 * dim * _VALUE_BYTES + 8 * MOST_TOKENS + MOST_TOKENS * dim // _LEAST_VECTOR * (_VALUE_BYTES + 1)


def _sum_of_squares(v: Vectors, pairs: list[tuple[Value, Value]]) -> Value:
    """Of a vector, in the order of turbo."""
    sums = [v.b.fadd(v.b.fmul(even, even), v.b.fmul(odd, odd)) for even, odd in pairs]
    return v.across(v.b.fadd, v.tree(v.b.fadd, sums))


@emitted
def _take_vector(v: Vectors, kind: Kind, source: Value, ahead: Value, target: Value, squares: Value) -> Value:
    """Make a vector float32, and zeros where it is void; store its sum of squares. 1 if it is void."""
    v.prefetch_span(v.at(source, ahead), kind.row_bytes(kind.group))
    pairs = [load_pair(v, kind, source, step) for step in range(kind.group // STEP)]
    total = _sum_of_squares(v, pairs)
    good = v.b.fcmp_ordered("<=", total, v.constant(F32, VOID_ABOVE))
    v.store(v.b.select(good, total, v.constant(F32, _VOID)), squares)
    kept = v.splat(v.b.sext(good, I32))
    own = _own(kind)
    for step, pair in enumerate(pairs):
        even, odd = (v.as_floats(v.b.and_(v.as_ints(half), kept)) for half in pair)
        store_pair(v, own, (even, odd), target, step)
    return v.b.zext(v.b.not_(good), I64)


def _own(kind: Kind) -> Kind:
    """Of the tile's numbers."""
    return Kind("float32", bits=kind.bits, group=kind.group, run=kind.run)


def _over_tokens(v: Vectors, values: Value, row_bytes: Value, count: Value, *, squares: bool) -> Value:
    """Sum of eight channels, or of their squares, over tokens in their order."""

    def number(token: Value) -> Value:
        x = v.load(v.at(values, v.b.mul(token, row_bytes)), VF32)
        return v.b.fmul(x, x) if squares else x

    total = v.variable(number(I64(0)))
    v.repeat(
        v.b.sub(count, I64(1)),
        lambda i: v.b.store(v.b.fadd(v.b.load(total), number(v.b.add(i, I64(1)))), total),
    )
    return v.b.load(total)


@emitted
def _average(v: Vectors, values: Value, row_bytes: Value, count: Value, mean: Value, greatest: Value) -> Value:
    """Store the mean of eight channels; the bits of the greatest magnitude so far and of these."""
    one = v.b.fdiv(v.constant(F32, 1.0), v.b.sitofp(count, F32))
    average = v.b.fmul(_over_tokens(v, values, row_bytes, count, squares=False), v.splat(one))
    v.store(average, mean)
    bits = v.reduce("umax", v.b.and_(v.as_ints(average), v.constant(VI32, 0x7FFFFFFF)))
    bits = v.b.zext(bits, I64)
    return v.b.select(v.b.icmp_unsigned(">", bits, greatest), bits, greatest)


@emitted
def _quantise_mean(v: Vectors, mean: Value, greatest: Value, scale_at: Value, code_at: Value) -> None:
    """Replace the means of eight channels by what their codes say, and store codes and scale."""
    extent = v.b.bitcast(v.b.trunc(greatest, I32), F32)
    bits, inverse = v.scale(extent, _MEAN_QUOTIENT, v.no)
    v.store(bits, scale_at)
    magic = v.constant(VF32, 12582912.0)
    quotient = v.b.fmul(v.load(mean, VF32), v.splat(inverse))
    whole = v.b.fsub(v.b.fadd(quotient, magic), magic)
    codes = v.b.fptosi(whole, VI32)
    v.store(v.b.trunc(codes, vector(I8, LANES)), code_at)
    scale = v.splat(v.b.fpext(v.b.bitcast(bits, F16), F32))
    v.store(v.b.fmul(v.b.sitofp(codes, VF32), scale), mean)


@emitted
def _centre_vector(v: Vectors, kind: Kind, values: Value, means: Value, squares: Value) -> Value:
    """Take the means off a vector, but not where it is far from them: 1 then."""
    own = _own(kind)
    steps = range(kind.group // STEP)
    given = [load_pair(v, own, values, step) for step in steps]
    centred = [
        tuple(v.b.fsub(x, m) for x, m in zip(pair, load_pair(v, own, means, step), strict=True))
        for step, pair in enumerate(given)
    ]
    far = v.b.fcmp_ordered("<", v.load(squares, F32), _sum_of_squares(v, [(even, odd) for even, odd in centred]))
    with v.b.if_then(v.b.not_(far), likely=True):
        for step, (even, odd) in enumerate(centred):
            store_pair(v, own, (even, odd), values, step)
    return v.b.zext(far, I64)


def _power(v: Vectors, half_octaves: Value) -> Value:
    """``2**(n / 2)`` of eight int32, float32: powers of two, and the root's fraction where n is odd."""
    exponent = v.b.add(v.b.ashr(half_octaves, v.constant(VI32, 1)), v.constant(VI32, _BIAS))
    odd = v.b.sub(v.constant(VI32, 0), v.bits(half_octaves, 0, 1))
    fraction = v.b.and_(odd, v.constant(VI32, _ROOT_BITS))
    return v.as_floats(v.b.or_(v.shifted(exponent, _MANTISSA_BITS), fraction))


def _bounded(v: Vectors, exponents: Value) -> Value:
    least, most = v.constant(VI32, LEAST_EXPONENT), v.constant(VI32, GREATEST_EXPONENT)
    exponents = v.b.select(v.b.icmp_signed("<", exponents, least), least, exponents)
    return v.b.select(v.b.icmp_signed(">", exponents, most), most, exponents)


@emitted
def _even_out(v: Vectors, values: Value, row_bytes: Value, count: Value, exponent_at: Value) -> None:
    """Divide eight channels by the root of their strength, in half octaves, and store those."""
    strength = _over_tokens(v, values, row_bytes, count, squares=True)
    binary = v.b.sub(v.b.ashr(v.as_ints(strength), v.constant(VI32, _MANTISSA_BITS)), v.constant(VI32, _BIAS))
    exponents = _bounded(v, v.b.ashr(v.b.add(binary, v.constant(VI32, 1)), v.constant(VI32, 1)))
    v.store(v.b.trunc(exponents, vector(I8, LANES)), exponent_at)
    factor = _power(v, v.b.sub(v.constant(VI32, 0), exponents))

    def scale(token: Value) -> None:
        at = v.at(values, v.b.mul(token, row_bytes))
        v.store(v.b.fmul(v.load(at, VF32), factor), at)

    v.repeat(count, scale)


@emitted
def _mark_far(v: Vectors, scales: Value, flags: Value) -> None:
    """Set the signs of eight scales whose vectors are far."""
    far = v.shifted(v.b.zext(v.load(flags, vector(I8, LANES)), VI16), 15)
    v.store(v.b.or_(v.load(scales, VI16), far), scales)


@emitted
def _split_scales(v: Vectors, scales: Value, magnitudes: Value, flags: Value) -> None:
    """Inverse of ``_mark_far``, to other places."""
    bits = v.load(scales, VI16)
    v.store(v.bits(bits, 0, 0x7FFF), magnitudes)
    v.store(v.b.trunc(v.bits(bits, 15, 1), vector(I8, LANES)), flags)


@emitted
def _store_flag(v: Vectors, flag: Value, address: Value) -> None:
    v.store(v.b.trunc(flag, I8), address)


@emitted
def _take_channels(v: Vectors, mean_at: Value, factor_at: Value, scale_at: Value, code_at: Value, at: Value) -> None:
    """Means and factors of eight channels, from what is stored of them."""
    scale = v.splat(v.b.fpext(v.load(scale_at, F16), F32))
    codes = v.b.sext(v.load(code_at, vector(I8, LANES)), VI32)
    v.store(v.b.fmul(v.b.sitofp(codes, VF32), scale), mean_at)
    v.store(_power(v, _bounded(v, v.b.sext(v.load(at, vector(I8, LANES)), VI32))), factor_at)


@emitted
def _give_vector(
    v: Vectors, kind: Kind, values: Value, means: Value, factors: Value, flag_at: Value, target: Value
) -> None:
    """Store a vector with its strength, and with the means unless it is far."""
    own = _own(kind)
    near = v.b.icmp_signed("==", v.load(flag_at, I8), I8(0))
    mask = v.splat(v.b.sext(near, I32))
    for step in range(kind.group // STEP):
        made = []
        numbers = (load_pair(v, own, address, step) for address in (values, factors, means))
        for x, factor, mean in zip(*numbers, strict=True):
            x = v.b.fmul(x, factor)
            centred = v.b.fadd(x, mean)
            chosen = v.b.or_(v.b.and_(v.as_ints(centred), mask), v.b.and_(v.as_ints(x), v.b.not_(mask)))
            made.append(v.as_floats(chosen))
        store_pair(v, kind, (made[0], made[1]), target, step)


@inlined
def _parameters(kind: Kind, work: int, place: int) -> tuple[int, int, int]:
    """Addresses of the plane's mean scales, mean codes and exponents."""
    first = 3 if code_bits(kind) == 3 else 2
    return region(work, place, first), region(work, place, first + 1), region(work, place, first + 2)


@inlined
def _group_tokens(tokens: int) -> int:
    return MOST_TOKENS if tokens % MOST_TOKENS == 0 else MOST_TOKENS // 2


@inlined
def _fill_offsets(tile: int, dim: int) -> None:
    """Offsets of the tile's tokens, for turbo."""
    for token in range(MOST_TOKENS):
        store(_offsets(tile, dim) + 8 * token, token * dim * _VALUE_BYTES)


@inlined
def _encode_group(
    kind: Kind, work: int, place: int, rows: int, group: int, count: int, codes: int, signs: int, scales: int
) -> int:
    """Encode a group of ``count`` tokens of the place's plane; how many vectors are void."""
    dim, tile = load(work + DIM), place + load(work + TILE)
    plane = load(place + PLANE)
    ahead = load(place + FOLLOWING) - plane
    means, squares, flags, values = _means(tile), _squares(tile, dim), _flags(tile, dim), _values(tile, dim)
    mean_scales, mean_codes, exponents = _parameters(kind, work, place)
    mean_scales, mean_codes, exponents = mean_scales + 2 * group, mean_codes + group * dim, exponents + group * dim
    size = group_elements(kind)
    row_bytes = dim * _VALUE_BYTES
    token_vectors = dim // size
    vectors = count * token_vectors
    void = 0
    for token in range(count):
        row = plane + load(rows + 8 * token)
        for i in range(token_vectors):
            at = token * token_vectors + i
            target = values + at * size * _VALUE_BYTES
            void += _take_vector(kind, row + i * size * element_bytes(kind), ahead, target, squares + 4 * at)
    greatest = 0
    for c in range(0, dim, LANES):
        greatest = _average(values + 4 * c, row_bytes, count, means + 4 * c, greatest)
    for c in range(0, dim, LANES):
        _quantise_mean(means + 4 * c, greatest, mean_scales, mean_codes + c)
    for i in range(vectors):
        at = values + i * size * _VALUE_BYTES
        far = _centre_vector(kind, at, means + i % token_vectors * size * _VALUE_BYTES, squares + 4 * i)
        _store_flag(far, flags + i)
    for c in range(0, dim, LANES):
        _even_out(values + 4 * c, row_bytes, count, exponents + c)
    own, offsets, row_count = of_float32(kind), _offsets(tile, dim), count * dim // ROW
    encode_rows(own, values, offsets, 0, dim, row_count, codes, signs, scales, place + SCRATCH)
    for i in range(0, vectors, LANES):
        _mark_far(scales + 2 * i, flags + i)
    return void


@kernel
def encode_centred(kind: Kind, work: int, place: int) -> None:
    """Encode planes (``work``)."""
    dim, tokens = load(work + DIM), load(work + ROW_COUNT)
    count = _group_tokens(tokens)
    code_bytes = count * dim * (2 if code_bits(kind) == 3 else code_bits(kind)) // 8
    _fill_offsets(place + load(work + TILE), dim)
    while next_plane(work, place) != 0:
        codes, signs, scales = region(work, place, 0), region(work, place, 1), scales_region(kind, work, place)
        rows = load(place + ROWS)
        void = 0
        for group in range(tokens // count):
            void += _encode_group(kind, work, place, rows, group, count, codes, signs, scales)
            rows += 8 * count
            codes += code_bytes
            signs += count * dim // 8
            scales += 2 * count * dim // group_elements(kind)
        count_void(work, place, void)


@inlined
def _decode_group(
    kind: Kind, work: int, place: int, rows: int, group: int, count: int, codes: int, signs: int, scales: int
) -> None:
    """Inverse of ``_encode_group``."""
    dim, tile, plane = load(work + DIM), place + load(work + TILE), load(place + PLANE)
    means, factors = _means(tile), _factors(tile, dim)
    magnitudes, flags, values = _squares(tile, dim), _flags(tile, dim), _values(tile, dim)
    mean_scales, mean_codes, exponents = _parameters(kind, work, place)
    for c in range(0, dim, LANES):
        channel = group * dim + c
        at = exponents + channel
        _take_channels(means + 4 * c, factors + 4 * c, mean_scales + 2 * group, mean_codes + channel, at)
    size = group_elements(kind)
    token_vectors = dim // size
    for i in range(0, count * token_vectors, LANES):
        _split_scales(scales + 2 * i, magnitudes + 2 * i, flags + i)
    own, offsets, row_count = of_float32(kind), _offsets(tile, dim), _DECODED_TOKENS * dim // ROW
    code_bytes = row_count * (64 if code_bits(kind) == 4 else 32)
    for first in range(0, count, _DECODED_TOKENS):
        decode_rows(own, values, offsets, dim, row_count, codes, signs, magnitudes, place + SCRATCH)
        codes += code_bytes
        signs += row_count * 16
        magnitudes += 2 * _DECODED_TOKENS * token_vectors
        for token in range(_DECODED_TOKENS):
            row = plane + load(rows + 8 * (first + token))
            for i in range(token_vectors):
                at, channel = token * token_vectors + i, i * size
                source, flag = values + at * size * _VALUE_BYTES, flags + first * token_vectors + at
                target = row + channel * element_bytes(kind)
                _give_vector(kind, source, means + 4 * channel, factors + 4 * channel, flag, target)


@kernel
def decode_centred(kind: Kind, work: int, place: int) -> None:
    """Decode planes (``work``)."""
    dim, tokens = load(work + DIM), load(work + ROW_COUNT)
    count = _group_tokens(tokens)
    code_bytes = count * dim * (2 if code_bits(kind) == 3 else code_bits(kind)) // 8
    _fill_offsets(place + load(work + TILE), dim)
    while next_plane(work, place) != 0:
        codes, signs, scales = region(work, place, 0), region(work, place, 1), scales_region(kind, work, place)
        rows = load(place + ROWS)
        for group in range(tokens // count):
            _decode_group(kind, work, place, rows, group, count, codes, signs, scales)
            rows += 8 * count
            codes += code_bytes
            signs += count * dim // 8
            scales += 2 * count * dim // group_elements(kind)
