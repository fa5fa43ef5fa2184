"""Vector code written with llvmlite: loads and stores, lanes, and arithmetic on them.

Everything here is LLVM's generic vector code, which becomes AVX2, AVX-512 or NEON.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import Any, Final

from llvmlite import ir
from numba.core import cgutils

I1: Final = ir.IntType(1)
I8: Final = ir.IntType(8)
I16: Final = ir.IntType(16)
I32: Final = ir.IntType(32)
I64: Final = ir.IntType(64)
F16: Final = ir.HalfType()
F32: Final = ir.FloatType()


class _BFloat16(ir.types.Type):  # type: ignore[misc]
    """LLVM's type of bfloat16, which llvmlite lacks; only what an instruction gives has it."""

    def _to_string(self) -> str:
        return "bfloat"


LANES: Final = 8
VI32: Final = ir.VectorType(I32, LANES)
VI16: Final = ir.VectorType(I16, LANES)
VF16: Final = ir.VectorType(F16, LANES)
VF32: Final = ir.VectorType(F32, LANES)
WI8: Final = ir.VectorType(I8, 2 * LANES)
WI16: Final = ir.VectorType(I16, 2 * LANES)
WBF16: Final = ir.VectorType(_BFloat16(), 2 * LANES)
WI32: Final = ir.VectorType(I32, 2 * LANES)

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


class Lanes:
    """Emits operations through a builder.

    Addresses are int64. Nothing needs alignment, but streaming stores, whose target must be aligned to 32 bytes.

    Args:
        builder: of the function that is being compiled.
    """

    def __init__(self, builder: Any) -> None:
        self.b = builder

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

    def greatest(self, left: Value, right: Value) -> Value:
        """Signed maximum."""
        return self.b.select(self.b.icmp_signed(">", left, right), left, right)

    def least_unsigned(self, left: Value, right: Value) -> Value:
        """Unsigned minimum."""
        return self.b.select(self.b.icmp_unsigned("<", left, right), left, right)

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

    def low_halves(self, first: Value, second: Value) -> Value:
        """The low 16 bits of two vectors of eight as one of sixteen."""
        return self.b.trunc(self.pick(first, second, range(2 * LANES)), WI16)

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

    def whole(self, value: Value) -> Value:
        """To nearest even, as floats; of less than 2^22."""
        return self.b.fsub(self.as_floats(self.rounded(value)), self.constant(value.type, _MAGIC))

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

    def flipped(self, value: Value, negative: Sequence[bool]) -> Value:
        """Signs flipped in lanes that are ``negative``."""
        signs = self.lanes([-(1 << 31) if minus else 0 for minus in negative])
        return self.as_floats(self.b.xor(self.as_ints(value), signs))

    # Calls

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
