"""Words, copies and counters on raw addresses, for compiled functions only. Addresses and values are int64."""

from __future__ import annotations

import platform

from llvmlite import ir
from numba.core import cgutils

from kvstore_kernels.cpu.lanes import I8, I32, I64, Value
from kvstore_kernels.cpu.vectors import Vectors, emitted

__all__ = [
    "add_atomic",
    "copy",
    "copy_bytes",
    "fence_streams",
    "fill_zero",
    "load",
    "load_u32",
    "prefetch",
    "store",
]


@emitted
def load(v: Vectors, address: Value) -> Value:
    """64 bits."""
    return v.load(address, I64)


@emitted
def load_u32(v: Vectors, address: Value) -> Value:
    """32 bits, zero-extended."""
    return v.b.zext(v.load(address, I32), I64)


@emitted
def store(v: Vectors, address: Value, value: Value) -> None:
    """64 bits."""
    v.store(value, address)


@emitted
def add_atomic(v: Vectors, address: Value, value: Value) -> Value:
    """Add to a word that other threads add to; what it was before."""
    return v.b.atomic_rmw("add", v.b.inttoptr(address, I64.as_pointer()), value, "seq_cst")


@emitted
def prefetch(v: Vectors, address: Value) -> None:
    """Begin to fetch a line that will be read soon; never faults."""
    v.prefetch(address)


@emitted
def fence_streams(v: Vectors) -> None:
    """Order stores past the cache before all later ones: on x86-64 no other fence does."""
    if platform.machine().lower() in ("x86_64", "amd64"):
        v.b.call(v.b.module.declare_intrinsic("llvm.x86.sse.sfence", (), ir.FunctionType(ir.VoidType(), [])), [])
    v.b.fence("release")


@emitted
def copy(v: Vectors, target: Value, source: Value, length: Value) -> None:
    """``memcpy``."""
    pointer = I8.as_pointer()
    cgutils.raw_memcpy(v.b, v.b.inttoptr(target, pointer), v.b.inttoptr(source, pointer), length, 1)


@emitted
def fill_zero(v: Vectors, target: Value, length: Value) -> None:
    """``memset`` to zero."""
    cgutils.memset(v.b, v.b.inttoptr(target, I8.as_pointer()), length, 0)


@emitted
def copy_bytes(v: Vectors, size: Value, target: Value, source: Value) -> None:
    """One element of 1, 2 or 4 bytes."""
    for width in (1, 2, 4):
        with v.b.if_then(v.b.icmp_signed("==", size, I64(width))):
            v.store(v.load(source, ir.IntType(8 * width)), target)
