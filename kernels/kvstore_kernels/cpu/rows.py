"""A row of any number of channels that is a multiple of 16, in runs of 64 and what is left over."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from kvstore_kernels.cpu.kinds import Kind
from kvstore_kernels.cpu.lanes import I64, Value
from kvstore_kernels.cpu.loads import STEP
from kvstore_kernels.cpu.vectors import Vectors

__all__ = ["FETCH_AHEAD_BYTES", "RUN", "for_each_run"]

RUN: Final = 64
"""Channels that are handled together."""

FETCH_AHEAD_BYTES: Final = 2048
"""How far ahead of decoding the codes are fetched. Stores past the cache leave the processor's own prefetching behind:
without this, decoding has half the speed.
"""


def for_each_run(v: Vectors, kind: Kind, dim: Value, body: Callable[[Value, int], None]) -> None:
    """Emit ``body(bytes from the row's start, vectors of 16)`` for runs of 64 channels, then for those of 16."""
    runs = v.b.udiv(dim, I64(RUN))
    rest = v.b.udiv(v.b.urem(dim, I64(RUN)), I64(STEP))
    start = v.b.mul(runs, I64(kind.row_bytes(RUN)))
    v.repeat(runs, lambda number: body(v.b.mul(number, I64(kind.row_bytes(RUN))), RUN // STEP))
    v.repeat(rest, lambda number: body(v.b.add(start, v.b.mul(number, I64(kind.row_bytes(STEP)))), 1))
