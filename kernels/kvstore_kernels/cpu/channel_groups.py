"""Keys and latents of ``kivi4`` and ``kivi2`` (``docs/codecs.md``): groups of tokens of one channel.

Thirty-two channels at a time, or the sixteen that are left of a row: their least and greatest numbers so far stay in
registers while tokens go by, and 32 bfloat16 are a line. A plane may have any multiple of 16 channels; where it is one
of 128, the kind's ``run`` says so.
"""

from __future__ import annotations

from typing import Final

from kvstore_kernels.cpu.code import inlined, kernel
from kvstore_kernels.cpu.kinds import Kind, code_bits, element_bytes, run_elements
from kvstore_kernels.cpu.lanes import I64, VF32, VI16, VI32, Value
from kvstore_kernels.cpu.loads import STEP, load_pair, pair_of_patterns, patterns, store_pair
from kvstore_kernels.cpu.memory import load
from kvstore_kernels.cpu.vectors import Parameters, Vectors, emitted
from kvstore_kernels.cpu.work import DIM, FOLLOWING, PLANE, ROW_COUNT, ROWS, count_void, next_plane, region

_WIDE: Final = 32
_NARROW: Final = 16
"""Channels of a tile."""

_ROWS_AHEAD: Final = 128
"""A kind's run of so many channels: a multiple of them is a row."""

_FETCH_AHEAD_ROWS: Final = 8
"""Rows of words: decoding a tile reads one line of each."""


def _token_row(v: Vectors, plane: Value, rows: Value, token: Value) -> Value:
    """Address of a token's row."""
    return v.at(plane, v.load(rows, I64, v.b.mul(token, I64(8))))


def _emit_encode(
    v: Vectors,
    kind: Kind,
    channels: int,
    plane: Value,
    following: Value,
    ahead_rows: Value,
    rows: Value,
    codes: Value,
    parameters: Value,
    dim: Value,
) -> Value:
    """Encode one group of each channel of a tile; how many of them are void.

    Args:
        v: emits.
        kind: of the kernel.
        channels: of the tile.
        plane: address of the tile's first channel of a plane.
        following: where to fetch ahead, in the plane after it: half in each pass, so that memory is busy in both.
        ahead_rows: offsets of the tokens to fetch. If the kind's run is 128, of a quarter of the group's, and four
            lines of each: four tiles fetch what they need by whole rows of 256 bytes, not each its own lines.
        rows: offsets of the group's tokens.
        codes: address of the tile's first word.
        parameters: address of the tile's first scale.
        dim: channels of the plane.
    """
    bits, steps = kind.bits, channels // STEP
    word_tokens = 16 // bits
    first = _token_row(v, plane, rows, I64(0))
    combine = (v.greatest, v.greatest_unsigned, v.least_unsigned)
    so_far = [[[v.variable(x) for _ in combine] for x in patterns(v, kind, first, step)] for step in range(steps)]

    def fetch_ahead(first_line: Value, count: int) -> None:
        """What the tile has to fetch of the plane that follows: a tile's row at a time."""
        for i in range(count):
            line = v.b.add(first_line, I64(i)) if i else first_line
            token, tile = line, I64(0)
            if kind.run == _ROWS_AHEAD:
                token, tile = v.b.lshr(line, I64(2)), v.b.and_(line, I64(3))
            at = v.at(_token_row(v, following, ahead_rows, token), v.b.mul(tile, I64(kind.row_bytes(channels))))
            v.prefetch_span(at, kind.row_bytes(channels))

    def compare(pair: Value) -> None:
        token = v.b.mul(pair, I64(2))
        fetch_ahead(pair, 1)
        pair_rows = [_token_row(v, plane, rows, v.b.add(token, I64(i))) for i in (0, 1)]
        for step in range(steps):
            first, second = (patterns(v, kind, row, step) for row in pair_rows)
            for one, other, variables in zip(first, second, so_far[step], strict=True):
                for better, variable in zip(combine, variables, strict=True):
                    v.b.store(better(v.b.load(variable), better(one, other)), variable)

    v.repeat(I64(8 * bits), compare)
    void = I64(0)
    groups: list[tuple[Parameters, Parameters]] = []
    minima = v.at(parameters, v.b.mul(dim, I64(2)))
    for step in range(steps):
        ends = [v.extremes(*(v.b.load(variable) for variable in variables)) for variables in so_far[step]]
        low, high = (pair_of_patterns(v, kind, [each[end] for each in ends]) for end in (0, 1))
        even, odd = (v.asymmetric(low[i], high[i], bits) for i in (0, 1))
        _store_halves(v, even.scale_bits, odd.scale_bits, parameters, step)
        _store_halves(v, even.minimum_bits, odd.minimum_bits, minima, step)
        void = v.b.add(void, v.b.add(v.count(even.void), v.count(odd.void)))
        groups.append((even, odd))

    def encode(word: Value) -> None:
        target = v.at(codes, v.b.mul(word, v.b.mul(dim, I64(2))))
        token = v.b.mul(word, I64(word_tokens))
        token_rows = [_token_row(v, plane, rows, v.b.add(token, I64(i))) for i in range(word_tokens)]
        fetch_ahead(v.b.add(I64(8 * bits), v.b.mul(word, I64(word_tokens // 2))), word_tokens // 2)
        for step, pair in enumerate(groups):
            numbers = []
            for row in token_rows:
                loaded = load_pair(v, kind, row, step)
                even, odd = (v.b.fmul(v.b.fsub(x, p.minimum), p.inverse) for x, p in zip(loaded, pair, strict=True))
                numbers.append((even, odd))
            v.store(v.packed(numbers, bits), target, 32 * step)

    v.repeat(I64(bits * bits), encode)
    return void


def _emit_decode(
    v: Vectors, kind: Kind, channels: int, codes: Value, parameters: Value, plane: Value, rows: Value, dim: Value
) -> None:
    """Inverse of ``_emit_encode``."""
    bits, steps = kind.bits, channels // STEP
    word_tokens = 16 // bits
    pitch = v.b.mul(dim, I64(2))
    minima = v.at(parameters, pitch)
    groups = []
    for step in range(steps):
        scales, lows = (_load_halves(v, address, step) for address in (parameters, minima))
        groups.append(list(zip(scales, lows, strict=True)))

    def decode(word: Value) -> None:
        source = v.at(codes, v.b.mul(word, pitch))
        v.prefetch(source, v.b.mul(pitch, I64(_FETCH_AHEAD_ROWS)))
        token = v.b.mul(word, I64(word_tokens))
        words = [v.load(source, VI32, 32 * step) for step in range(steps)]
        for i in range(word_tokens):
            row = _token_row(v, plane, rows, v.b.add(token, I64(i)))
            for step, pair in enumerate(groups):
                values = []
                for j, (scale, minimum) in enumerate(pair):
                    code = v.bits(words[step], 2 * bits * i + bits * j, 2**bits - 1)
                    values.append(v.b.fadd(v.b.fmul(v.b.sitofp(code, VF32), scale), minimum))
                store_pair(v, kind, (values[0], values[1]), row, step)

    v.repeat(I64(bits * bits), decode)


def _store_halves(v: Vectors, even: Value, odd: Value, address: Value, step: int) -> None:
    v.store(v.b.or_(v.b.zext(even, VI32), v.shifted(v.b.zext(odd, VI32), 16)), address, 32 * step)


def _load_halves(v: Vectors, address: Value, step: int) -> tuple[Value, Value]:
    words = v.load(address, VI32, 32 * step)
    return v.from_float16(v.b.trunc(words, VI16)), v.from_float16(v.b.trunc(v.shifted(words, -16), VI16))


@emitted
def _encode_wide(
    v: Vectors,
    kind: Kind,
    plane: Value,
    following: Value,
    ahead_rows: Value,
    rows: Value,
    codes: Value,
    parameters: Value,
    dim: Value,
) -> Value:
    return _emit_encode(v, kind, _WIDE, plane, following, ahead_rows, rows, codes, parameters, dim)


@emitted
def _encode_narrow(
    v: Vectors, kind: Kind, plane: Value, following: Value, rows: Value, codes: Value, parameters: Value, dim: Value
) -> Value:
    return _emit_encode(v, kind, _NARROW, plane, following, rows, rows, codes, parameters, dim)


@emitted
def _decode_wide(
    v: Vectors, kind: Kind, codes: Value, parameters: Value, plane: Value, rows: Value, dim: Value
) -> None:
    _emit_decode(v, kind, _WIDE, codes, parameters, plane, rows, dim)


@emitted
def _decode_narrow(
    v: Vectors, kind: Kind, codes: Value, parameters: Value, plane: Value, rows: Value, dim: Value
) -> None:
    _emit_decode(v, kind, _NARROW, codes, parameters, plane, rows, dim)


@inlined
def _encode_plane(kind: Kind, work: int, place: int) -> int:
    """Encode a plane; how many groups are void."""
    dim, bits, size = load(work + DIM), code_bits(kind), element_bytes(kind)
    plane, following, rows = load(place + PLANE), load(place + FOLLOWING), load(place + ROWS)
    codes, parameters = region(work, place, 0), region(work, place, 1)
    void = 0
    for _ in range(0, load(work + ROW_COUNT), 16 * bits):
        for c in range(0, dim - _NARROW, _WIDE):
            to, ahead_rows = following + c * size, rows
            if run_elements(kind) == _ROWS_AHEAD:
                to, ahead_rows = following + c // _ROWS_AHEAD * _ROWS_AHEAD * size, rows + c % _ROWS_AHEAD * bits
            void += _encode_wide(kind, plane + c * size, to, ahead_rows, rows, codes + 2 * c, parameters + 2 * c, dim)
        if dim % _WIDE != 0:
            c = dim - _NARROW
            at, to = plane + c * size, following + c * size
            void += _encode_narrow(kind, at, to, rows, codes + 2 * c, parameters + 2 * c, dim)
        rows += 8 * 16 * bits
        codes += bits * bits * 2 * dim
        parameters += 4 * dim
    return void


@kernel
def encode_channel_groups(kind: Kind, work: int, place: int) -> None:
    """Encode planes (``work``)."""
    while next_plane(work, place) != 0:
        count_void(work, place, _encode_plane(kind, work, place))


@kernel
def decode_channel_groups(kind: Kind, work: int, place: int) -> None:
    """Decode planes (``work``)."""
    dim, bits, size = load(work + DIM), code_bits(kind), element_bytes(kind)
    while next_plane(work, place) != 0:
        plane, rows = load(place + PLANE), load(place + ROWS)
        codes, parameters = region(work, place, 0), region(work, place, 1)
        for _ in range(0, load(work + ROW_COUNT), 16 * bits):
            for c in range(0, dim - _NARROW, _WIDE):
                _decode_wide(kind, codes + 2 * c, parameters + 2 * c, plane + c * size, rows, dim)
            if dim % _WIDE != 0:
                c = dim - _NARROW
                _decode_narrow(kind, codes + 2 * c, parameters + 2 * c, plane + c * size, rows, dim)
            rows += 8 * 16 * bits
            codes += bits * bits * 2 * dim
            parameters += 4 * dim
