"""Explicit vector code for compiled functions: what codecs have in common, and the way to call it from numba.

LLVM finds vectors in plain loops of conversions and additions, but neither in minima of floats nor in the butterfly of
a transform; said outright they are four to six times as fast. The few instructions that generic code cannot say (in
``pairs_dot``, ``packed``, ``whole_8``, ``whole_16``, ``quantised``, ``bfloat16``, ``look_up_bytes``, ``plus_minus``)
have a twin in generic code, which machines without AVX2, or without AVX-512 for bfloat16, get.

Vectors are of 256 bits. What would be one of 512 beside them is avoided: where there are such, some processors do less
at a time with all others.
"""

from __future__ import annotations

import inspect
import struct
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

from numba import types
from numba.core.errors import TypingError
from numba.extending import intrinsic

from kvstore_kernels.cpu.kinds import KindType
from kvstore_kernels.cpu.lanes import F32, I8, I64, LANES, VF32, VI32, WBF16, WI16, Lanes, Value, float32, vector

__all__ = ["Parameters", "Vectors", "emitted"]

LIMIT_BITS: Final = 0x47700000
"""61440 as float32: a group with a greater magnitude is void."""
FLOOR: Final = struct.unpack("<e", b"\xa8\x00")[0]
"""The least scale."""


class Parameters(NamedTuple):
    """Of groups with a scale and a minimum; all but the flags are 0 where void, and so are the codes then."""

    void: Value
    scale_bits: Value
    inverse: Value
    minimum_bits: Value
    minimum: Value


class Vectors(Lanes):
    """Emits operations through a builder.

    Args:
        builder: of the function that is being compiled.
        features: the target's, as LLVM lists them.
    """

    def __init__(self, builder: Any, features: str) -> None:
        super().__init__(builder)
        self._avx2 = "+avx2" in features.split(",")
        self._fma = "+fma" in features.split(",")
        self._bfloat16 = {"+avx512bf16", "+avx512vl", "+avx512bw"} <= set(features.split(","))

    # Parameters of groups

    def scale(self, extent: Value, quotient: int, void: Value) -> tuple[Value, Value]:
        """Scale of groups: its float16 bits and its inverse, both 0 where void.

        Args:
            extent: greatest magnitude, or difference of the greatest and the least number, float32.
            quotient: what the extent is mapped to.
            void: one bit a lane.
        """
        kind = extent.type
        _, scale = self.to_float16(self.b.fmul(extent, self.constant(kind, float32(1 / quotient))))
        floor = self.constant(kind, FLOOR)
        scale = self.b.select(self.b.fcmp_ordered(">", scale, floor), scale, floor)
        bits, _ = self.to_float16(scale)
        inverse = self.b.fdiv(self.constant(kind, 1.0), scale)
        return (
            self.b.select(void, self.constant(bits.type, 0), bits),
            self.b.select(void, self.constant(kind, 0.0), inverse),
        )

    def extremes(self, greatest: Value, greatest_unsigned: Value, least_unsigned: Value) -> tuple[Value, Value]:
        """The least and the greatest of floats, by bits, out of three reductions of their bits as integers.

        Reductions of integers are one instruction a vector, those of floats a chain of scalars. Positive floats have
        the order of signed integers, so that the signed maximum is the greatest if any is positive; negative ones have
        the reverse, so that the unsigned maximum is the least if any is negative. Where all have one sign, the other
        end is the one next to zero, the unsigned minimum. A NaN is beyond all others at the end of its sign.
        """
        zero = self.constant(greatest.type, 0)
        least = self.b.select(self.b.icmp_signed("<", greatest_unsigned, zero), greatest_unsigned, least_unsigned)
        most = self.b.select(self.b.icmp_signed(">=", greatest, zero), greatest, least_unsigned)
        return least, most

    def asymmetric(self, low: Value, high: Value, bits: int) -> Parameters:
        """Parameters of groups by their least and greatest numbers, float32."""
        void = self.b.or_(*(self.beyond_limit(self.bits(self.as_ints(end), 0, 0x7FFFFFFF)) for end in (low, high)))
        scale_bits, inverse = self.scale(self.b.fsub(high, low), 2**bits - 1, void)
        minimum_bits, minimum = self.to_float16(low)
        return Parameters(
            void,
            scale_bits,
            inverse,
            self.b.select(void, self.constant(minimum_bits.type, 0), minimum_bits),
            self.b.select(void, self.constant(minimum.type, 0.0), minimum),
        )

    def beyond_limit(self, magnitude_bits: Value) -> Value:
        """Whether float32 bits without a sign are NaN, infinite or above the limit of groups."""
        return self.b.icmp_unsigned(">", magnitude_bits, self.constant(magnitude_bits.type, LIMIT_BITS))

    # Instructions with a twin in generic code

    def pairs_dot(self, left: Value, right: Value) -> Value:
        """Of 16 int16: products of neighbours, added in pairs, eight int32."""
        if self._avx2:
            return self.call("llvm.x86.avx2.pmadd.wd", VI32, left, right)
        return self.pairs_dot_generic(left, right)

    def pairs_dot_generic(self, left: Value, right: Value) -> Value:
        """The same without AVX2."""
        sixteen = self.constant(VI32, 16)

        def parts(value: Value) -> tuple[Value, Value]:
            words = self.b.bitcast(value, VI32)
            return self.b.ashr(self.b.shl(words, sixteen), sixteen), self.b.ashr(words, sixteen)

        (left_even, left_odd), (right_even, right_odd) = parts(left), parts(right)
        return self.b.add(self.b.mul(left_even, right_even), self.b.mul(left_odd, right_odd))

    def packed(self, numbers: Sequence[tuple[Value, Value]], bits: int) -> Value:
        """Pairs of floats rounded, clamped to codes and packed, eight words of 32 bits.

        Args:
            numbers: even and odd ones; pair k has ``2 * bits`` bits of each word from ``2 * bits * k`` on, the even
                number's below the odd's. Two or four or eight pairs. A NaN becomes 0.
            bits: of a code, 4 or 2.
        """
        if not self._avx2:
            return self.packed_generic(numbers, bits)
        greatest = self.constant(WI16, 2**bits - 1)
        half_pairs = 16 // (2 * bits)
        halves = []
        for first in range(0, len(numbers), half_pairs):
            parts = []
            for k, pair in enumerate(numbers[first : first + half_pairs]):
                # Of each four words the even codes, then the odd ones: the order that packing leaves.
                whole = (self.call("llvm.x86.avx.cvt.ps2dq.256", VI32, number) for number in pair)
                codes = self.call("llvm.x86.avx2.packusdw", WI16, *whole)
                codes = self.b.select(self.b.icmp_unsigned("<", codes, greatest), codes, greatest)
                parts.append(self.shifted(codes, 2 * bits * k))
            half = self.any_of(parts)
            odd = self.pick(half, half, [lane ^ 4 for lane in range(2 * LANES)])
            halves.append(self.b.or_(half, self.shifted(odd, bits)))
        high = halves[1] if len(halves) == 2 else self.constant(WI16, 0)
        places = [8 * (word // 4) + word % 4 for word in range(LANES)]
        words = self.pick(halves[0], high, [place + 2 * LANES * h for place in places for h in (0, 1)])
        return self.b.bitcast(words, VI32)

    def packed_generic(self, numbers: Sequence[tuple[Value, Value]], bits: int) -> Value:
        """The same without AVX2."""
        parts = []
        for k, pair in enumerate(numbers):
            even, odd = (self.rounded(self.clamp(number, float(2**bits - 1))) for number in pair)
            both = self.bits(self.b.or_(even, self.shifted(odd, bits)), 0, 2 ** (2 * bits) - 1)
            parts.append(self.shifted(both, 2 * bits * k))
        return self.any_of(parts)

    def whole_8(self, first: tuple[Value, Value], second: tuple[Value, Value]) -> Value:
        """Two pairs of floats within -128..127 rounded, as 32 bytes in their order: 16 int16. Garbage for NaN."""
        if self._avx2:
            halves = (self.whole_16(*pair) for pair in (first, second))
            packed = self.call("llvm.x86.avx2.packsswb", vector(I8, 4 * LANES), *halves)
            in_lane = [4 * odd + i + 8 * step for step in (0, 1) for i in range(4) for odd in (0, 1)]
            places = (in_lane[:8], in_lane[8:])
            order = [16 * lane + place for step in places for lane in (0, 1) for place in step]
            return self.b.bitcast(self.pick(packed, packed, order), WI16)
        words = []
        for pair in (first, second):
            even, odd = (self.bits(self.rounded(number), 0, 255) for number in pair)
            words.append(self.b.or_(even, self.shifted(odd, 8)))
        return self.low_halves(*words)

    def whole_16(self, even: Value, odd: Value) -> Value:
        """Pairs of floats rounded to int16, in an order that ``natural_16`` turns into theirs. Not for NaN."""
        if self._avx2:
            whole = (self.call("llvm.x86.avx.cvt.ps2dq.256", VI32, number) for number in (even, odd))
            return self.call("llvm.x86.avx2.packssdw", WI16, *whole)
        low = self.bits(self.rounded(even), 0, 0xFFFF)
        return self.b.bitcast(self.b.or_(low, self.shifted(self.rounded(odd), 16)), WI16)

    def natural_16(self, value: Value) -> Value:
        """Sixteen int16 in the order of ``whole_16`` in natural order."""
        if not self._avx2:
            return value
        lanes = [first + 4 * odd + i for first in (0, LANES) for i in range(4) for odd in (0, 1)]
        return self.pick(value, value, lanes)

    def quantised(self, magnitude: Value, thresholds: Sequence[int], levels: Sequence[int]) -> tuple[Value, Value]:
        """Of sixteen positive int16 how many thresholds are below each, and the level of that number.

        Few thresholds are compared with one by one. Many are found by the upper byte, as long as no two thresholds
        have one in common: it tells how many thresholds are surely below, and with which lower byte to compare.
        """
        found = [threshold for threshold in thresholds if threshold >> 8 < 15]
        if not self._avx2 or len(found) < 4:
            return self._compared(magnitude, thresholds, levels)
        below = [sum(threshold >> 8 < byte for threshold in found) for byte in range(16)]
        last = [next((threshold & 255 for threshold in found if threshold >> 8 == byte), 255) for byte in range(16)]
        byte = self.b.lshr(magnitude, self.constant(WI16, 8))
        most = self.constant(WI16, 15)
        byte = self.b.select(self.b.icmp_unsigned("<", byte, most), byte, most)
        byte = self.b.or_(byte, self.constant(WI16, -0x8000))  # the upper byte looks up a zero
        index = self.look_up_bytes(below, byte)
        low = self.b.and_(magnitude, self.constant(WI16, 255))
        comparisons = [(low, self.look_up_bytes(last, byte))]
        comparisons += [(magnitude, self.constant(WI16, each)) for each in thresholds if each not in found]
        for number, threshold in comparisons:
            index = self.b.sub(index, self.b.sext(self.b.icmp_signed(">", number, threshold), WI16))
        table = [byte for level in levels for byte in level.to_bytes(2, "little")]
        places = self.b.add(self.b.mul(index, self.constant(WI16, 0x0202)), self.constant(WI16, 0x0100))
        return index, self.look_up_bytes(table, places)

    def _compared(self, magnitude: Value, thresholds: Sequence[int], levels: Sequence[int]) -> tuple[Value, Value]:
        index, level = self.constant(WI16, 0), self.constant(WI16, levels[0])
        for number, threshold in enumerate(thresholds):
            above = self.b.sext(self.b.icmp_signed(">", magnitude, self.constant(WI16, threshold)), WI16)
            index = self.b.sub(index, above)
            step = self.constant(WI16, levels[number + 1] - levels[number])
            level = self.b.add(level, self.b.and_(above, step))
        return index, level

    def bfloat16(self, even: Value, odd: Value) -> Value:
        """Pairs of floats rounded to bfloat16, in their order: int16. Neither NaN nor denormal."""
        if self._bfloat16:
            both = self.call("llvm.x86.avx512bf16.cvtne2ps2bf16.256", WBF16, odd, even)
            halves = self.b.bitcast(both, WI16)
            return self.pick(halves, halves, [lane // 2 + LANES * (lane % 2) for lane in range(2 * LANES)])
        low, high = (self._rounded_above(value) for value in (even, odd))
        upper = self.constant(VI32, -1 << 16)
        return self.b.bitcast(self.b.or_(self.shifted(low, -16), self.b.and_(high, upper)), WI16)

    def _rounded_above(self, value: Value) -> Value:
        """Rounded to bfloat16, which is in the upper half of each lane; the lower half is garbage."""
        bits = self.as_ints(value)
        odd = self.bits(bits, 16, 1)
        return self.b.add(bits, self.b.add(odd, self.constant(VI32, 0x7FFF)))

    def look_up_bytes(self, table: Sequence[int], indices: Value) -> Value:
        """32 bytes out of a table of up to sixteen, as int16; with AVX2 0 where an index has its top bit set."""
        table = [*table, *([0] * (16 - len(table)))]
        if self._avx2:
            entries = self.lanes([byte - 256 * (byte > 127) for byte in table * 2], I8)
            found = self.call("llvm.x86.avx2.pshuf.b", entries.type, entries, self.b.bitcast(indices, entries.type))
            return self.b.bitcast(found, WI16)
        kind = vector(I8, 4 * LANES)
        places = self.b.bitcast(indices, kind)
        choices = [self.constant(kind, byte - 256 * (byte > 127)) for byte in table]
        for bit in range(4):
            chosen = self.b.icmp_signed("!=", self.bits(places, bit, 1), self.constant(kind, 0))
            choices = [self.b.select(chosen, choices[i + 1], choices[i]) for i in range(0, len(choices), 2)]
        return self.b.bitcast(choices[0], WI16)

    def plus_minus(self, value: Value, negative: Sequence[bool], addend: Value) -> Value:
        """``addend + value``, or ``addend - value`` in lanes that are ``negative``."""
        if self._fma:
            signs = self.lanes([-1.0 if minus else 1.0 for minus in negative], F32)
            return self.call("llvm.fma.v8f32", VF32, value, signs, addend)  # exact product: one rounding either way
        return self.b.fadd(addend, self.flipped(value, negative))


def emitted(emit: Callable[..., Value | None]) -> Any:
    """Make a function of ``(Vectors, *values)`` callable from compiled functions.

    Arguments are int64, but for a kind, which ``emit`` gets as a ``Kind``. The result is int64: what ``emit`` returns,
    or 0 where it returns None.
    """

    def declare(typing_context: Any, *kinds: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            _, _, features = context.codegen().magic_tuple()
            pairs = zip(kinds, args, strict=True)
            values = [kind.kind if isinstance(kind, KindType) else value for kind, value in pairs]
            result = emit(Vectors(builder, features), *values)
            return I64(0) if result is None else result

        accepted = [kind if isinstance(kind, KindType) else types.int64 for kind in kinds]
        if any(isinstance(kind, types.Float) for kind in kinds):
            raise TypingError(f"{emit.__name__} takes whole numbers, got {kinds}")
        return types.int64(*accepted), generate

    # Numba counts the arguments by the signature, and inspect asks this attribute for it.
    parameters = list(inspect.signature(emit).parameters.values())
    context = inspect.Parameter("typing_context", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    declare.__signature__ = inspect.Signature([context, *parameters[1:]])  # type: ignore[attr-defined]
    declare.__name__ = emit.__name__
    return intrinsic(declare)
