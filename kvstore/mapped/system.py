"""The calls of the C library that compiled functions make."""

from __future__ import annotations

from typing import Any, Final

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from kvstore.format.constants import PAGE_BYTES
from kvstore.mapped.atomics import load
from kvstore.mapped.compiled import inlined
from kvstore.mapped.context import ARENA, BELL, CHUNK_BYTES, LOOK, NEXT_LOOK, PAIR, POPULATE, TOUCHED

_clock_gettime: Final = types.ExternalFunction("clock_gettime", types.int32(types.int32, types.int64))
_write: Final = types.ExternalFunction("write", types.int64(types.int32, types.int64, types.int64))
_madvise: Final = types.ExternalFunction("madvise", types.int32(types.int64, types.int64, types.int32))
_MONOTONIC: Final = 1
_SECOND_NS: Final = 1_000_000_000
_LINEAR: Final = 16
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
    """See to it that this process has the pages of a slot, all at once: a fault for each costs more than a copy.

    Only page tables are filled, since the daemon allocated the memory of what lies in a slot. A kernel that does not
    know the advice (before 5.14) leaves the faults as they are.
    """
    offset = address - load(context + ARENA)
    first = offset >> _LINEAR
    last = (offset + length - 1) >> _LINEAR
    flags = load(context + TOUCHED)
    for chunk in range(first, last + 1):
        if _load_flag(flags + chunk) == 0:
            begin = address - offset % PAGE_BYTES
            _madvise(begin, address + length - begin, types.int32(load(context + POPULATE)))
            for touched in range(chunk, last + 1):
                _raise_flag(flags + touched)
            return
