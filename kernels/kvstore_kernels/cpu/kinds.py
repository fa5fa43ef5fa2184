"""What a kernel is compiled for: the numba type of its first argument says it.

A ``Kind`` holds the dtype of an engine's KV and some constants of a codec. Numba compiles a kernel once for each kind
that it is called with, and the code that emits vector operations asks the type. So one kernel serves bfloat16, float16
and float32, or 4, 3 and 2 bits, as if it had been written for each, and only what is used is compiled.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import NativeValue, intrinsic, models, register_model, typeof_impl, unbox

from kvstore_kernels.layout import ELEMENT_BYTES

__all__ = ["Kind", "KindType", "code_bits", "element_bytes", "group_elements", "run_elements"]


@dataclass(frozen=True, slots=True)
class Kind:
    """Constants of a compiled kernel.

    Attributes:
        dtype: of the engine's KV.
        streaming: whether KV is stored past the cache, to addresses aligned to 64 bytes.
        bits: of a code, 0 where a kernel knows it.
        group: elements of a group, 0 where a kernel knows it.
        run: elements that are sure to lie side by side and are handled together, 0 where a kernel knows it.
    """

    dtype: str
    streaming: bool = False
    bits: int = 0
    group: int = 0
    run: int = 0

    @property
    def element_bytes(self) -> int:
        """Bytes of an element."""
        return ELEMENT_BYTES[self.dtype]

    def row_bytes(self, elements: int) -> int:
        """Bytes of so many elements side by side."""
        return elements * self.element_bytes


class KindType(types.Type):  # type: ignore[misc]
    """Numba's type of a kind; each kind has one of its own."""

    def __init__(self, kind: Kind) -> None:
        self.kind = kind
        super().__init__(name=repr(kind))


register_model(KindType)(models.OpaqueModel)


@functools.cache
def _type_of(kind: Kind) -> KindType:
    return KindType(kind)


@typeof_impl.register(Kind)  # type: ignore[untyped-decorator]
def _typeof_kind(value: Kind, context: Any) -> KindType:
    return _type_of(value)


@unbox(KindType)  # type: ignore[untyped-decorator]
def _unbox_kind(kind: KindType, value: Any, context: Any) -> NativeValue:
    return NativeValue(context.context.get_dummy_value())


def _make_constant(name: str) -> Any:
    """A function of a kind for compiled functions: one of its numbers, a constant to LLVM."""

    @intrinsic  # type: ignore[untyped-decorator]
    def constant(typing_context: Any, kind: Any) -> Any:
        value = getattr(kind.kind, name)

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return ir.Constant(ir.IntType(64), value)

        return types.int64(kind), generate

    return constant


element_bytes = _make_constant("element_bytes")
code_bits = _make_constant("bits")
group_elements = _make_constant("group")
run_elements = _make_constant("run")
