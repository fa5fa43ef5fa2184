"""Explicit vector code for compiled functions: operations on eight 32-bit lanes, written with llvmlite.

LLVM finds vectors in plain loops of conversions and additions, but neither in minima of floats nor in the butterfly of
a transform; said outright they are four to six times as fast. Everything is LLVM's generic vector code, which becomes
AVX2, AVX-512 or NEON; the few instructions that it cannot say (``pairs_dot``, ``packed``, ``look_up``, ``plus_minus``)
have a twin in generic code, which a machine without AVX2 gets.

Addresses are int64. Nothing needs alignment, but streaming stores, whose target must be aligned to 32 bytes.
"""

from __future__ import annotations

import inspect
import struct
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.errors import TypingError
from numba.extending import intrinsic

from kvstore_kernels.cpu.kinds import KindType

__all__ = ["LANES", "Parameters", "Vectors", "emitted", "float32", "vector"]

I1: Final = ir.IntType(1)
I8: Final = ir.IntType(8)
I16: Final = ir.IntType(16)
I32: Final = ir.IntType(32)
I64: Final = ir.IntType(64)
F16: Final = ir.HalfType()
F32: Final = ir.FloatType()

LANES: Final = 8
VI32: Final = ir.VectorType(I32, LANES)
VI16: Final = ir.VectorType(I16, LANES)
VF16: Final = ir.VectorType(F16, LANES)
VF32: Final = ir.VectorType(F32, LANES)
WI8: Final = ir.VectorType(I8, 2 * LANES)
WI16: Final = ir.VectorType(I16, 2 * LANES)
WI32: Final = ir.VectorType(I32, 2 * LANES)

LIMIT_BITS: Final = 0x47700000
"""61440 as float32: a group with a greater magnitude is void."""
FLOOR: Final = struct.unpack("<e", b"\xa8\x00")[0]
"""The least scale."""
_MAGIC: Final = 12582912.0
"""1.5 * 2^23: adding it leaves a number, rounded to nearest even, in the low bits."""

Value = Any
"""A value of llvmlite's builder, of whose types a checker knows nothing."""


def vector(element: Any, count: int) -> Any:
    """A vector type."""
    return ir.VectorType(element, count)


def float32(number: float) -> float:
    """The nearest float32."""
    return float(struct.unpack("<f", struct.pack("<f", number))[0])


class Parameters(NamedTuple):
    """Of groups with a scale and a minimum; all but the flags are 0 where void, and so are the codes then."""

    void: Value
    scale_bits: Value
    inverse: Value
    minimum_bits: Value
    minimum: Value


class Vectors:
    """Emits operations through a builder.

    Args:
        builder: of the function that is being compiled.
        features: the target's, as LLVM lists them.
    """

    def __init__(self, builder: Any, features: str) -> None:
        self.b = builder
        self._avx2 = "+avx2" in features.split(",")
        self._fma = "+fma" in features.split(",")

    # Constants, memory

    @property
    def no(self) -> Value:
        """A false bit."""
        return I1(0)

    def constant(self, kind: Any, number: float) -> Value:
        """A number, in all lanes of a vector type."""
        if isinstance(kind, ir.VectorType):
            return ir.Constant(kind, [ir.Constant(kind.element, number) for _ in range(kind.count)])
        return ir.Constant(kind, number)

    def lanes(self, numbers: Sequence[float], element: Any = I32) -> Value:
        """A constant vector."""
        return ir.Constant(ir.VectorType(element, len(numbers)), [ir.Constant(element, number) for number in numbers])

    def at(self, address: Value, offset: int | Value) -> Value:
        """``address + offset`` bytes."""
        if isinstance(offset, int):
            return self.b.add(address, I64(offset)) if offset else address
        return self.b.add(address, offset)

    def load(self, address: Value, kind: Any, offset: int | Value = 0) -> Value:
        """Any type, from any address."""
        value = self.b.load(self.b.inttoptr(self.at(address, offset), kind.as_pointer()))
        value.align = 1
        return value

    def store(self, value: Value, address: Value, offset: int | Value = 0, *, streaming: bool = False) -> None:
        """Any type, to any address; past the cache if ``streaming``, to an address aligned to 32."""
        stored = self.b.store(value, self.b.inttoptr(self.at(address, offset), value.type.as_pointer()))
        stored.align = 32 if streaming else 1
        if streaming:
            stored.set_metadata("nontemporal", self.b.module.add_metadata([I32(1)]))

    def repeat(self, count: Value, body: Callable[[Value], None]) -> None:
        """A loop; ``body`` gets the number of the round, int64."""
        with cgutils.for_range(self.b, count) as loop:
            body(loop.index)

    def variable(self, initial: Value) -> Any:
        """A place whose value changes in loops; LLVM keeps it in a register."""
        place = cgutils.alloca_once_value(self.b, initial)
        self.b.store(initial, place)
        return place

    # Lanes

    def splat(self, value: Value, count: int = LANES) -> Value:
        """A scalar in all lanes."""
        undefined = ir.Constant(ir.VectorType(value.type, count), ir.Undefined)
        first = self.b.insert_element(undefined, value, I32(0))
        return self.b.shuffle_vector(first, undefined, self.constant(ir.VectorType(I32, count), 0))

    def pick(self, first: Value, second: Value, numbers: Sequence[int]) -> Value:
        """Lanes by number out of two vectors side by side."""
        return self.b.shuffle_vector(first, second, self.lanes(numbers))

    def joined(self, first: Value, second: Value) -> Value:
        """Two vectors as one."""
        return self.pick(first, second, range(2 * first.type.count))

    def halves(self, value: Value) -> tuple[Value, Value]:
        """A vector as two."""
        half = value.type.count // 2
        return self.pick(value, value, range(half)), self.pick(value, value, range(half, 2 * half))

    def lane(self, value: Value, number: int) -> Value:
        """One lane."""
        return self.b.extract_element(value, I32(number))

    def tree(self, combine: Callable[[Value, Value], Value], values: Sequence[Value]) -> Value:
        """Combine a power of two of values, the first half with the second, until one is left."""
        values = list(values)
        while len(values) > 1:
            half = len(values) // 2
            values = [combine(values[i], values[i + half]) for i in range(half)]
        return values[0]

    def across(self, combine: Callable[[Value, Value], Value], value: Value) -> Value:
        """Combine the lanes of a vector, the first half with the second, until one is left: a scalar."""
        count = value.type.count
        distance = count // 2
        while distance:
            value = combine(value, self.pick(value, value, [lane ^ distance for lane in range(count)]))
            distance //= 2
        return self.lane(value, 0)

    # Integers

    def least(self, left: Value, right: Value) -> Value:
        """Signed minimum."""
        return self.b.select(self.b.icmp_signed("<", left, right), left, right)

    def greatest(self, left: Value, right: Value) -> Value:
        """Signed maximum."""
        return self.b.select(self.b.icmp_signed(">", left, right), left, right)

    def greatest_unsigned(self, left: Value, right: Value) -> Value:
        """Unsigned maximum."""
        return self.b.select(self.b.icmp_unsigned(">", left, right), left, right)

    def bits(self, value: Value, low: int, mask: int) -> Value:
        """``value >> low & mask``, logical."""
        shifted = self.b.lshr(value, self.constant(value.type, low)) if low else value
        return self.b.and_(shifted, self.constant(value.type, mask))

    def any_of(self, values: Sequence[Value]) -> Value:
        """All values or-ed together."""
        result = values[0]
        for value in values[1:]:
            result = self.b.or_(result, value)
        return result

    def shifted(self, value: Value, bits: int) -> Value:
        """Shifted left, or right (logical) where ``bits`` is negative."""
        if bits == 0:
            return value
        amount = self.constant(value.type, abs(bits))
        return self.b.shl(value, amount) if bits > 0 else self.b.lshr(value, amount)

    def ordered(self, value: Value) -> Value:
        """Bits of floats as integers of the same order; its own inverse.

        Reductions of integers become one instruction a vector, those of floats a chain of scalars.
        """
        width = value.type.element.width if isinstance(value.type, ir.VectorType) else value.type.width
        sign = self.b.ashr(value, self.constant(value.type, width - 1))
        return self.b.xor(value, self.b.lshr(sign, self.constant(value.type, 1)))

    def low_halves(self, first: Value, second: Value) -> Value:
        """The low 16 bits of two vectors of eight as one of sixteen."""
        return self.b.trunc(self.joined(first, second), WI16)

    # Floats

    def as_floats(self, value: Value) -> Value:
        """32-bit lanes, reinterpreted."""
        return self.b.bitcast(value, VF32)

    def as_ints(self, value: Value) -> Value:
        """Float lanes, reinterpreted."""
        return self.b.bitcast(value, VI32)

    def clamp(self, value: Value, high: float) -> Value:
        """To 0..high; a NaN becomes 0."""
        low, limit = self.constant(value.type, 0.0), self.constant(value.type, high)
        value = self.b.select(self.b.fcmp_ordered(">", value, low), value, low)
        return self.b.select(self.b.fcmp_ordered("<", value, limit), value, limit)

    def rounded(self, value: Value) -> Value:
        """To nearest even, in the low bits (two's complement) of 32; above them is what the magic number leaves."""
        return self.as_ints(self.b.fadd(value, self.constant(value.type, _MAGIC)))

    def float16(self, value: Value) -> Value:
        """Rounded to float16."""
        return self.b.fptrunc(value, VF16 if isinstance(value.type, ir.VectorType) else F16)

    def to_float16(self, value: Value) -> tuple[Value, Value]:
        """Rounded to float16: its bits and its value; a zero becomes positive."""
        half = self.float16(value)
        bits = self.b.bitcast(half, VI16 if isinstance(half.type, ir.VectorType) else I16)
        zero = self.constant(bits.type, 0)
        magnitude = self.b.and_(bits, self.constant(bits.type, 0x7FFF))
        bits = self.b.select(self.b.icmp_unsigned("==", magnitude, zero), zero, bits)
        return bits, self.from_float16(bits)

    def from_float16(self, bits: Value) -> Value:
        """Value of float16 bits."""
        vector = isinstance(bits.type, ir.VectorType)
        return self.b.fpext(self.b.bitcast(bits, VF16 if vector else F16), VF32 if vector else F32)

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

    def call(self, name: str, result: Any, *args: Value) -> Value:
        """An intrinsic of LLVM."""
        kind = ir.FunctionType(result, [arg.type for arg in args])
        return self.b.call(cgutils.get_or_insert_function(self.b.module, kind, name), args)

    def reduce(self, operation: str, value: Value) -> Value:
        """All lanes of integers combined (``"add"``, ``"smin"``, ``"smax"``, ``"umax"``): a scalar."""
        kind = value.type
        return self.call(f"llvm.vector.reduce.{operation}.v{kind.count}i{kind.element.width}", kind.element, value)

    def count(self, flags: Value) -> Value:
        """How many of eight bits are set, int64."""
        return self.b.zext(self.call("llvm.ctpop.i8", I8, self.b.bitcast(flags, I8)), I64)

    def prefetch(self, address: Value, offset: int | Value = 0) -> None:
        """Begin to fetch a line into the nearest cache; never faults."""
        pointer = I8.as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [pointer, I32, I32, I32])
        function = self.b.module.declare_intrinsic("llvm.prefetch", (pointer,), kind)
        self.b.call(function, [self.b.inttoptr(self.at(address, offset), pointer), I32(0), I32(3), I32(1)])

    def prefetch_span(self, address: Value, length: int) -> None:
        """Begin to fetch the lines of so many bytes."""
        for line in range(0, max(length, 1), 64):
            self.prefetch(address, line)

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
        """Of sixteen int16 how many thresholds are below each, and the level of that number."""
        index, level = self.constant(WI16, 0), self.constant(WI16, levels[0])
        for number, threshold in enumerate(thresholds):
            above = self.b.sext(self.b.icmp_signed(">", magnitude, self.constant(WI16, threshold)), WI16)
            index = self.b.sub(index, above)
            step = self.constant(WI16, levels[number + 1] - levels[number])
            level = self.b.add(level, self.b.and_(above, step))
        return index, level

    def look_up(self, table: Sequence[float], indices: Value) -> Value:
        """Eight numbers out of a table of eight by 32-bit indices, of which the low three bits count."""
        if self._avx2:
            return self.call("llvm.x86.avx2.permps", VF32, self.lanes(table, F32), indices)
        return self.look_up_generic(table, indices)

    def look_up_generic(self, table: Sequence[float], indices: Value) -> Value:
        """The same without AVX2."""
        choices = [self.constant(VF32, number) for number in table]
        for bit in range(3):
            chosen = self.b.icmp_signed("!=", self.bits(indices, bit, 1), self.constant(VI32, 0))
            choices = [self.b.select(chosen, choices[i + 1], choices[i]) for i in range(0, len(choices), 2)]
        return choices[0]

    def plus_minus(self, value: Value, negative: Sequence[bool], addend: Value) -> Value:
        """``addend + value``, or ``addend - value`` in lanes that are ``negative``."""
        if self._fma:
            signs = self.lanes([-1.0 if minus else 1.0 for minus in negative], F32)
            return self.call("llvm.fma.v8f32", VF32, value, signs, addend)  # exact product: one rounding either way
        return self.b.fadd(addend, self.flipped(value, negative))

    def flipped(self, value: Value, negative: Sequence[bool]) -> Value:
        """Signs flipped in lanes that are ``negative``."""
        signs = self.lanes([-(1 << 31) if minus else 0 for minus in negative])
        return self.as_floats(self.b.xor(self.as_ints(value), signs))


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
