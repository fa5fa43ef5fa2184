"""Groups of tokens of ``centred`` keys: their means, which vectors are far from them, and strengths of channels.

Channels are taken a vector at a time, from the first token to the last, so that their sums stay in registers. Of
sixteen channels the parameters are together: means and factors, of the even ones and the odd ones. There are as many
again with other means, for far vectors: zeros, or what changes no number when it is added.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from kvstore_kernels.codecs.centred import GREATEST_EXPONENT, LEAST_EXPONENT
from kvstore_kernels.codecs.turbo import VOID_ABOVE
from kvstore_kernels.cpu.kinds import Kind
from kvstore_kernels.cpu.lanes import F16, F32, I16, I64, VF32, VI16, VI32, Value
from kvstore_kernels.cpu.loads import STEP, Pair, load_pair
from kvstore_kernels.cpu.turbo_rows import flips, sum_of_squares
from kvstore_kernels.cpu.vectors import Vectors, emitted

__all__ = [
    "FACTORS",
    "MEANS",
    "PARAMETER_BYTES",
    "centre_vectors",
    "elements_of",
    "less_means",
    "load_parameters",
    "make_factors",
    "parameters_of",
    "quantise_means",
    "strengths_again",
    "sum_again",
    "take_vectors",
]

_GREATEST_CODE: Final = 127
_SQRT_2_MANTISSA: Final = 0x3504F3

# Parameters of sixteen channels: means and factors. Before they are made, the sums that they are made of.
MEANS: Final = 0
FACTORS: Final = 64
PARAMETER_BYTES: Final = 8
"""Of a channel."""

# Encoding: a vector's channels of all tokens


def elements_of(v: Vectors, kind: Kind, source: Value) -> list[Pair]:
    """Of a vector, in steps."""
    return [load_pair(v, kind, source, step) for step in range(kind.group // STEP)]


def less_means(v: Vectors, elements: Sequence[Pair], parameters: Value) -> list[Pair]:
    """A vector less the means of its channels."""
    pairs = []
    for step, pair in enumerate(elements):
        even, odd = (v.b.fsub(x, mean) for x, mean in zip(pair, parameters_of(v, parameters, step, MEANS), strict=True))
        pairs.append((even, odd))
    return pairs


def parameters_of(v: Vectors, parameters: Value, step: int, which: int) -> Pair:
    """``MEANS`` or ``FACTORS`` of a step's channels."""
    at = 16 * PARAMETER_BYTES * step + which
    return v.load(parameters, VF32, at), v.load(parameters, VF32, at + 32)


def _store_parameters(v: Vectors, pair: Pair, parameters: Value, step: int, which: int) -> None:
    for odd, value in enumerate(pair):
        v.store(value, parameters, 16 * PARAMETER_BYTES * step + which + 32 * odd)


def _squared(v: Vectors, pairs: Sequence[Pair]) -> list[Pair]:
    return [(v.b.fmul(even, even), v.b.fmul(odd, odd)) for even, odd in pairs]


def _add_up(
    v: Vectors, kind: Kind, tokens: Value, terms: Callable[[Value], Sequence[Pair]], sums: Value, which: int
) -> None:
    """Add up, token after token, what ``terms`` gives of a vector's channels, and store it among the parameters."""
    zero = v.constant(VF32, 0.0)
    so_far = [(v.variable(zero), v.variable(zero)) for _ in range(kind.group // STEP)]

    def add(token: Value) -> None:
        for pair, variables in zip(terms(token), so_far, strict=True):
            for value, variable in zip(pair, variables, strict=True):
                v.b.store(v.b.fadd(v.b.load(variable), value), variable)

    v.repeat(tokens, add)
    for step, (even, odd) in enumerate(so_far):
        _store_parameters(v, (v.b.load(even), v.b.load(odd)), sums, step, which)


@emitted
def take_vectors(
    v: Vectors,
    kind: Kind,
    plane: Value,
    rows: Value,
    tokens: Value,
    pitch: Value,
    ahead: Value,
    zeros: Value,
    sources: Value,
    squares: Value,
    parameters: Value,
) -> Value:
    """Store sums of squares and sums of channels; how many vectors are void. Fetch half of other vectors ahead.

    Args:
        v: emits.
        kind: of the kernel.
        plane: address of the vector's first channel of a plane.
        rows: offsets of the group's tokens.
        tokens: of the group.
        pitch: vectors of a token.
        ahead: bytes to the vectors that are fetched.
        zeros: address of a vector's.
        sources: addresses of the vectors' elements, stored here; of void ones that of the zeros.
        squares: of the vectors, stored here.
        parameters: of the vector's channels; the sums are stored among them, with void vectors as they are.
    """
    void_count = v.variable(I64(0))

    def take(token: Value) -> list[Pair]:
        number = v.b.mul(token, pitch)
        source = v.at(plane, v.load(rows, I64, v.b.mul(token, I64(8))))
        v.prefetch_span(v.at(source, ahead), kind.row_bytes(kind.group) // 2)
        elements = elements_of(v, kind, source)
        squared = sum_of_squares(v, elements)
        void = _is_void(v, squared)
        v.store(squared, squares, v.b.mul(number, I64(4)))
        v.store(v.b.select(void, zeros, source), sources, v.b.mul(number, I64(8)))
        v.b.store(v.b.add(v.b.load(void_count), v.b.zext(void, I64)), void_count)
        return elements

    _add_up(v, kind, tokens, take, parameters, MEANS)
    return v.b.load(void_count)


def _is_void(v: Vectors, squares: Value) -> Value:
    return v.b.not_(v.b.fcmp_ordered("<=", squares, F32(VOID_ABOVE)))


@emitted
def sum_again(v: Vectors, kind: Kind, tokens: Value, pitch: Value, sources: Value, parameters: Value) -> None:
    """Sums of channels where there are void vectors."""

    def take(token: Value) -> list[Pair]:
        return elements_of(v, kind, v.load(sources, I64, v.b.mul(v.b.mul(token, pitch), I64(8))))

    _add_up(v, kind, tokens, take, parameters, MEANS)


@emitted
def quantise_means(v: Vectors, tokens: Value, dim: Value, parameters: Value, scale_at: Value, codes: Value) -> None:
    """Means out of sums of channels, scale and codes; in the parameters without means zeros."""
    steps, step_bytes = v.b.udiv(dim, I64(STEP)), I64(STEP * PARAMETER_BYTES)
    share = v.splat(v.b.fdiv(F32(1.0), v.b.uitofp(tokens, F32)))
    greatest = v.variable(v.constant(VI32, 0))

    def divide(step: Value) -> None:
        at = v.at(parameters, v.b.mul(step, step_bytes))
        even, odd = (v.b.fmul(x, share) for x in parameters_of(v, at, 0, MEANS))
        _store_parameters(v, (even, odd), at, 0, MEANS)
        for mean in (even, odd):
            v.b.store(v.greatest(v.b.load(greatest), v.bits(v.as_ints(mean), 0, 0x7FFFFFFF)), greatest)

    v.repeat(steps, divide)
    extent = v.b.bitcast(v.reduce("umax", v.b.load(greatest)), F32)
    scale_bits, inverse = v.scale(extent, _GREATEST_CODE, v.no)
    v.store(scale_bits, scale_at)
    scale, inverse = v.splat(v.from_float16(scale_bits)), v.splat(inverse)
    zero = v.constant(VF32, 0.0)

    def quantise(step: Value) -> None:
        at = v.at(parameters, v.b.mul(step, step_bytes))
        even, odd = (v.whole(v.b.fmul(mean, inverse)) for mean in parameters_of(v, at, 0, MEANS))
        _store_parameters(v, (v.b.fmul(even, scale), v.b.fmul(odd, scale)), at, 0, MEANS)
        _store_parameters(v, (zero, zero), v.at(at, v.b.mul(dim, I64(PARAMETER_BYTES))), 0, MEANS)
        _store_bytes(v, v.b.fptosi(even, VI32), v.b.fptosi(odd, VI32), v.at(codes, v.b.mul(step, I64(STEP))))

    v.repeat(steps, quantise)


def _store_bytes(v: Vectors, even: Value, odd: Value, address: Value) -> None:
    v.store(v.b.trunc(v.b.or_(v.bits(even, 0, 255), v.shifted(odd, 8)), VI16), address)


def _load_bytes(v: Vectors, address: Value) -> Pair:
    word = v.b.sext(v.load(address, VI16), VI32)
    return v.b.ashr(v.shifted(word, 24), v.constant(VI32, 24)), v.b.ashr(word, v.constant(VI32, 8))


@emitted
def centre_vectors(
    v: Vectors,
    kind: Kind,
    tokens: Value,
    pitch: Value,
    sources: Value,
    squares: Value,
    parameters: Value,
    others: Value,
    chosen: Value,
    signs: Value,
) -> Value:
    """Store which vectors are far, and the strengths of channels as if none were; how many are.

    Args:
        v: emits.
        kind: of the kernel.
        tokens: of the group.
        pitch: vectors of a token.
        sources: addresses of the vectors' elements.
        squares: their sums of squares.
        parameters: of the vector's channels; the strengths are stored among them.
        others: bytes from there to the parameters without means.
        chosen: addresses of the vectors' parameters, stored here.
        signs: of the vectors' scales, stored here.
    """
    far_count = v.variable(I64(0))

    def take(token: Value) -> list[Pair]:
        number = v.b.mul(token, pitch)
        source = v.load(sources, I64, v.b.mul(number, I64(8)))
        centred = less_means(v, elements_of(v, kind, source), parameters)
        whole = v.load(squares, F32, v.b.mul(number, I64(4)))
        far = v.b.or_(_is_void(v, whole), v.b.fcmp_ordered("<", whole, sum_of_squares(v, centred)))
        v.store(v.b.select(far, v.at(parameters, others), parameters), chosen, v.b.mul(number, I64(8)))
        v.store(v.b.shl(v.b.zext(far, I16), I16(15)), signs, v.b.mul(number, I64(2)))
        v.b.store(v.b.add(v.b.load(far_count), v.b.zext(far, I64)), far_count)
        return _squared(v, centred)

    _add_up(v, kind, tokens, take, parameters, FACTORS)
    return v.b.load(far_count)


@emitted
def strengths_again(
    v: Vectors, kind: Kind, tokens: Value, pitch: Value, sources: Value, chosen: Value, parameters: Value
) -> None:
    """Strengths of channels where there are far vectors."""

    def take(token: Value) -> list[Pair]:
        at = v.b.mul(v.b.mul(token, pitch), I64(8))
        elements = elements_of(v, kind, v.load(sources, I64, at))
        return _squared(v, less_means(v, elements, v.load(chosen, I64, at)))

    _add_up(v, kind, tokens, take, parameters, FACTORS)


@emitted
def make_factors(v: Vectors, kind: Kind, parameters: Value, others: Value, exponents: Value) -> None:
    """Exponents and factors of a vector's channels out of their strengths; factors flip signs too."""
    for step in range(kind.group // STEP):
        codes, factors = [], []
        for odd, strength in enumerate(parameters_of(v, parameters, step, FACTORS)):
            above = v.b.sub(v.bits(v.as_ints(strength), 23, 255), v.constant(VI32, 126))
            exponent = _bounded(v, v.b.ashr(above, v.constant(VI32, 1)))
            codes.append(exponent)
            factors.append(_root_power(v, v.b.neg(exponent), flips(kind, step, odd)))
        _store_bytes(v, codes[0], codes[1], v.at(exponents, STEP * step))
        for table in (parameters, v.at(parameters, others)):
            _store_parameters(v, (factors[0], factors[1]), table, step, FACTORS)


def _bounded(v: Vectors, exponents: Value) -> Value:
    most = v.constant(VI32, GREATEST_EXPONENT)
    exponents = v.greatest(exponents, v.constant(VI32, LEAST_EXPONENT))
    return v.b.select(v.b.icmp_signed("<", exponents, most), exponents, most)


def _root_power(v: Vectors, exponents: Value, negative: Sequence[bool]) -> Value:
    """``2^(exponent / 2)``, rounded, negative in some lanes."""
    octaves = v.b.add(v.b.ashr(exponents, v.constant(VI32, 1)), v.constant(VI32, 127))
    odd = v.b.sub(v.constant(VI32, 0), v.bits(exponents, 0, 1))
    mantissa = v.b.and_(odd, v.constant(VI32, _SQRT_2_MANTISSA))
    return v.flipped(v.as_floats(v.b.or_(v.shifted(octaves, 23), mantissa)), negative)


@emitted
def load_parameters(
    v: Vectors, kind: Kind, scale_at: Value, codes: Value, exponents: Value, parameters: Value, others: Value
) -> None:
    """Parameters of a vector's channels out of their codes; factors flip signs too."""
    scale = v.splat(v.b.fpext(v.load(scale_at, F16), F32))
    nothing = v.constant(VF32, -0.0)
    for step in range(kind.group // STEP):
        even, odd = (v.b.fmul(v.b.sitofp(code, VF32), scale) for code in _load_bytes(v, v.at(codes, STEP * step)))
        _store_parameters(v, (even, odd), parameters, step, MEANS)
        factors = [
            _root_power(v, _bounded(v, exponent), flips(kind, step, i))
            for i, exponent in enumerate(_load_bytes(v, v.at(exponents, STEP * step)))
        ]
        _store_parameters(v, (nothing, nothing), v.at(parameters, others), step, MEANS)
        for table in (parameters, v.at(parameters, others)):
            _store_parameters(v, (factors[0], factors[1]), table, step, FACTORS)
