"""The calls of the C library that compiled functions make."""

from __future__ import annotations

from typing import Any, Final

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from kvstore.mapped.atomics import load
from kvstore.mapped.compiled import inlined
from kvstore.mapped.context import ARENA, ARENA_BYTES, BELL, CHUNK_BYTES, LOOK, NEXT_LOOK, PAIR, POPULATE, TOUCHED

_clock_gettime: Final = types.ExternalFunction("clock_gettime", types.int32(types.int32, types.int64))
_write: Final = types.ExternalFunction("write", types.int64(types.int32, types.int64, types.int64))
_madvise: Final = types.ExternalFunction("madvise", types.int32(types.int64, types.int64, types.int32))
_MONOTONIC: Final = 1
_SECOND_NS: Final = 1_000_000_000
_LINEAR: Final = 20
assert CHUNK_BYTES == 1 << _LINEAR


@intrinsic
def _load_flag(typing_context: Any, address: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = builder.inttoptr(args[0], ir.IntType(8).as_pointer())
        return builder.zext(builder.load_atomic(pointer, "monotonic", 1), ir.IntType(64))

    return types.int64(types.int64), generate


@intrinsic
def _raise_flag(typing_context: Any, address: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = builder.inttoptr(args[0], ir.IntType(8).as_pointer())
        builder.store_atomic(ir.IntType(8)(1), pointer, "monotonic", 1)
        return context.get_dummy_value()

    return types.void(types.int64), generate


@inlined
def now_ns(context: int) -> int:
    """CLOCK_MONOTONIC, where the kernel offers it without a system call. Uses ``PAIR``: hold the interpreter lock."""
    _clock_gettime(types.int32(_MONOTONIC), context + PAIR)
    return load(context + PAIR) * _SECOND_NS + load(context + PAIR + 8)


@inlined
def ring_bell(context: int) -> None:
    """Write a byte into the doorbell. A full FIFO has woken the daemon already; one without a reader is a dead one's.

    It does not wait: the descriptor is non-blocking. Here, so that nothing can come between publishing and ringing.
    """
    _write(types.int32(load(context + BELL)), context + PAIR, 1)


@inlined
def look_is_due(context: int, now: int) -> int:
    """``LOOK`` where the daemon's lock was not looked at for a while, else 0."""
    return LOOK if now >= load(context + NEXT_LOOK) else 0


@inlined
def touch(context: int, address: int, length: int) -> None:
    """See to it that this process has the pages of a slot, by the chunk: a fault for each page costs more than a copy.

    Slots lie in slabs whose memory the daemon has allocated, so nothing is allocated here but page tables. A kernel
    that does not know the advice (before 5.14) leaves the faults as they are.
    """
    first = (address - load(context + ARENA)) >> _LINEAR
    last = (address - load(context + ARENA) + length - 1) >> _LINEAR
    for chunk in range(first, last + 1):
        flag = load(context + TOUCHED) + chunk
        if _load_flag(flag) == 0:
            begin = chunk << _LINEAR
            size = min(CHUNK_BYTES, load(context + ARENA_BYTES) - begin)
            _madvise(load(context + ARENA) + begin, size, types.int32(load(context + POPULATE)))
            _raise_flag(flag)
