"""Loads, stores, fences and copies on raw addresses, for compiled functions only.

Shared words are 64 bits and naturally aligned; addresses and values are int64 everywhere (numba turns a mixture of
int64 and uint64 into floats). The memory model is LLVM's (C++11's). What each operation becomes:

| here | x86-64 | arm64 |
|---|---|---|
| ``load``, ``store`` (relaxed) | mov | ldr, str |
| ``load_acquire`` | mov | ldar |
| ``store_release`` | mov | stlr |
| ``fence_acquire`` | nothing (loads stay in order) | dmb ishld |
| ``fence_release`` | nothing (stores stay in order) | dmb ish |
| ``fence_full`` | lock or, or mfence | dmb ish |
| ``exchange`` | xchg (a full fence) | ldaxr/stlxr or swpal |
| ``fence_streams`` | sfence | dmb ish |

On x86-64 only one reordering exists for ordinary memory, a store passing behind a later load of another address:
``fence_full`` stands where that would break a protocol. Non-temporal stores (``copy_streaming``) are outside that
order: they are followed by ``fence_streams`` before anything is published. The reasoning for each use stands beside
it, and in ``docs/mapped.md``.
"""

from __future__ import annotations

import platform
from typing import Any, Final

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.errors import TypingError
from numba.extending import intrinsic

_I8: Final = ir.IntType(8)
_I32: Final = ir.IntType(32)
_I64: Final = ir.IntType(64)
_I128: Final = ir.IntType(128)
_LINE: Final = ir.VectorType(_I64, 8)
"""64 bytes: LLVM splits it into what the processor has."""

IS_X86: Final = platform.machine().lower() in ("x86_64", "amd64")
LINE_BYTES: Final = 64
_CHUNK_LINES: Final = 4


def _make_load(ordering: str, width: ir.IntType) -> Any:
    @intrinsic
    def load_word(typing_context: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            pointer = builder.inttoptr(args[0], width.as_pointer())
            value = builder.load_atomic(pointer, ordering, width.width // 8)
            return value if width is _I64 else builder.zext(value, _I64)

        return types.int64(types.int64), generate

    return load_word


def _make_store(ordering: str, width: ir.IntType) -> Any:
    @intrinsic
    def store_word(typing_context: Any, address: Any, value: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            pointer = builder.inttoptr(args[0], width.as_pointer())
            word = args[1] if width is _I64 else builder.trunc(args[1], width)
            builder.store_atomic(word, pointer, ordering, width.width // 8)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), generate

    return store_word


def _make_fence(ordering: str) -> Any:
    @intrinsic
    def fence(typing_context: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            builder.fence(ordering)
            return context.get_dummy_value()

        return types.void(), generate

    return fence


load = _make_load("monotonic", _I64)
load_acquire = _make_load("acquire", _I64)
load_u32 = _make_load("monotonic", _I32)
"""32 bits, zero-extended."""
store = _make_store("monotonic", _I64)
store_release = _make_store("release", _I64)
store_u32 = _make_store("monotonic", _I32)
fence_acquire = _make_fence("acquire")
fence_release = _make_fence("release")
fence_full = _make_fence("seq_cst")


@intrinsic
def exchange(typing_context: Any, address: Any, value: Any) -> Any:
    """Atomically put a value into a word; its old value. Acquire and release."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.atomic_rmw("xchg", builder.inttoptr(args[0], _I64.as_pointer()), args[1], "acq_rel")

    return types.int64(types.int64, types.int64), generate


@intrinsic
def fence_streams(typing_context: Any) -> Any:
    """Order earlier non-temporal stores before every later store.

    A release fence is no instruction on x86-64, where non-temporal stores wait in buffers of their own: only sfence,
    mfence or a locked instruction empties them. On arm64 a non-temporal store is a store like any other to ``dmb``.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if IS_X86:
            sfence = builder.module.declare_intrinsic("llvm.x86.sse.sfence", (), ir.FunctionType(ir.VoidType(), []))
            builder.call(sfence, [])
        builder.fence("release")
        return context.get_dummy_value()

    return types.void(), generate


def _make_prefetch(locality: int) -> Any:
    @intrinsic
    def fetch(typing_context: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            pointer = _I8.as_pointer()
            function = builder.module.declare_intrinsic(
                "llvm.prefetch", (pointer,), ir.FunctionType(ir.VoidType(), [pointer, _I32, _I32, _I32])
            )
            builder.call(function, [builder.inttoptr(args[0], pointer), _I32(0), _I32(locality), _I32(1)])
            return context.get_dummy_value()

        return types.void(types.int64), generate

    return fetch


prefetch = _make_prefetch(3)
"""Begin to fetch a line that will be read in a moment; never faults."""

prefetch_l2 = _make_prefetch(2)
"""The same, only as near as the second level: for what a long copy reads some lines later."""


@intrinsic
def copy(typing_context: Any, target: Any, source: Any, length: Any) -> Any:
    """``memcpy``. What a racing writer changes meanwhile arrives torn; callers find out by a sequence afterwards."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = _I8.as_pointer()
        to, source_pointer = builder.inttoptr(args[0], pointer), builder.inttoptr(args[1], pointer)
        cgutils.raw_memcpy(builder, to, source_pointer, args[2], 1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


@intrinsic
def fill_zero(typing_context: Any, target: Any, length: Any) -> Any:
    """``memset`` to zero."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        cgutils.memset(builder, builder.inttoptr(args[0], _I8.as_pointer()), args[1], 0)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic
def stream_lines(typing_context: Any, target: Any, source: Any) -> Any:
    """Copy 256 bytes with non-temporal stores; the target must be aligned to 64 (else a fault), the source need not."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = _LINE.as_pointer()
        lines = []
        for index in range(_CHUNK_LINES):
            line = builder.load(builder.inttoptr(builder.add(args[1], _I64(LINE_BYTES * index)), pointer))
            line.align = 1
            lines.append(line)
        for index, line in enumerate(lines):
            at = builder.inttoptr(builder.add(args[0], _I64(LINE_BYTES * index)), pointer)
            stored = builder.store(line, at, align=LINE_BYTES)
            stored.set_metadata("nontemporal", builder.module.add_metadata([_I32(1)]))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic(prefer_literal=True)
def stack_words(typing_context: Any, count: Any) -> Any:
    """Address of so many words (a constant) on the stack of the compiled function, valid until it returns."""
    if not isinstance(count, types.IntegerLiteral):
        raise TypingError("stack_words takes a constant")
    words = count.literal_value

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.ptrtoint(cgutils.alloca_once(builder, ir.ArrayType(_I64, words)), _I64)

    return types.int64(count), generate


@intrinsic
def address_of(typing_context: Any, buffer: Any) -> Any:
    """Address of the first byte of a ``bytes``, ``memoryview`` or array argument, valid while the caller holds it."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        view = cgutils.create_struct_proxy(signature.args[0])(context, builder, value=args[0])
        return builder.ptrtoint(view.data, _I64)

    return types.int64(buffer), generate


@intrinsic
def shift_right(typing_context: Any, value: Any, bits: Any) -> Any:
    """Logical shift of 64 bits (``>>`` on int64 copies the sign)."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.lshr(args[0], args[1])

    return types.int64(types.int64, types.int64), generate


@intrinsic
def multiply_fold(typing_context: Any, left: Any, right: Any) -> Any:
    """Both halves of the unsigned 128-bit product, xored."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        wide = builder.mul(builder.zext(args[0], _I128), builder.zext(args[1], _I128))
        return builder.xor(builder.trunc(wide, _I64), builder.trunc(builder.lshr(wide, _I128(64)), _I64))

    return types.int64(types.int64, types.int64), generate
