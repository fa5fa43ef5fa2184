"""The CPU codecs beside ``memmove``: encoding and decoding, contiguous and paged, with one and more threads.

The KV is larger than a core's caches; each side works on so many blocks in a call, the sides in turns and on different
parts of the KV. All bytes are counted as the unquantised KV has them. Everything is checked, outside of the timing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Final

from kvstore.cli.bench.codecs_memory import CONTIGUOUS, KVMemory
from kvstore.cli.bench.codecs_sides import Decode, Encode, Memmove, MemmoveAll
from kvstore.cli.bench.codecs_store import CODEC, measure_store
from kvstore.cli.bench.codecs_work import CodecWork, Payloads, has_reference
from kvstore.cli.bench.local_reads import MEMMOVE
from kvstore.cli.bench.local_sides import Walk, take_turns
from kvstore.cli.bench.local_sustained import machine_busy_ns
from kvstore.cli.bench.machine import machine_facts
from kvstore.cli.bench.report import Report, Row, percentile
from kvstore.errors import InvalidArgument
from kvstore_kernels.codecs import CODECS, LOSSY_DTYPES, get_codec
from kvstore_kernels.layout import KVLayout

__all__ = ["BASELINE", "CodecExtent", "aim", "measure_codecs", "thread_counts"]

BASELINE: Final = (
    "ctypes.memmove of the same KV by one thread from one private numpy array to another, in turns: in calls of the "
    "same size or of all of it in one call, whichever is faster"
)

_LAYERS, _KV_HEADS, _HEAD_DIM, _BLOCK_TOKENS = 8, 8, 128, 64
_CALL_BYTES: Final = 32 << 20
_MIB: Final = 1 << 20
_MOST_THREADS: Final = 256

_ROTATED_ENCODE, _ROTATED_DECODE = 0.16, 0.33
_LIMITS: Final = {
    ("encode", "int8"): 0.6,
    ("encode", "int4"): 0.6,
    ("encode", "kivi4"): 0.5,
    ("decode", "int8"): 0.9,
    ("decode", "int4"): 0.9,
    ("decode", "kivi4"): 0.6,
} | {
    (op, name): limit
    for op, limit in (("encode", _ROTATED_ENCODE), ("decode", _ROTATED_DECODE))
    for name in CODECS
    if name.startswith(("turbo", "centred"))
}
_MEMORY_BOUND: Final = 0.5
"""A codec that is as fast as this with one thread is bound by memory with two: they must be as fast as one memmove."""

_SCALE_LIMIT: Final = 1.7


@dataclass(frozen=True, slots=True)
class CodecExtent:
    """How much is measured.

    Attributes:
        total_bytes: of the KV.
        codecs: names.
        threads: numbers of threads, each measured.
        rounds: calls of each side; all sides take turns.
        dtype: of the KV.
        call_bytes: KV of the blocks of a call.
        with_store: whether the way through a daemon is measured, where its codec is among ``codecs``.

    Raises:
        InvalidArgument: an unknown codec or dtype, or less KV than a call works on.
    """

    total_bytes: int = 256 << 20
    codecs: Sequence[str] = tuple(CODECS)
    threads: Sequence[int] = (1, 2)
    rounds: int = 20
    dtype: str = "bfloat16"
    call_bytes: int = _CALL_BYTES
    with_store: bool = True
    layout: KVLayout = field(init=False)

    def __post_init__(self) -> None:
        if self.dtype not in LOSSY_DTYPES:
            raise InvalidArgument(f"--dtype: {self.dtype!r} is none of {', '.join(LOSSY_DTYPES)}")
        layout = KVLayout(_LAYERS, _KV_HEADS, _HEAD_DIM, self.dtype, _BLOCK_TOKENS)
        object.__setattr__(self, "layout", layout)
        try:
            for name in self.codecs:
                get_codec(name).check(layout)
        except ValueError as wrong:
            raise InvalidArgument(f"--codec: {wrong}") from None
        if not self.codecs:
            raise InvalidArgument("--codec: give at least one codec")
        if self.total_bytes < self.call_bytes:
            raise InvalidArgument(
                f"--mib: {self.total_bytes // _MIB} MiB are less than the {self.call_bytes // _MIB} MiB of one call"
            )

    @property
    def call_blocks(self) -> int:
        """Blocks of a call."""
        return max(1, self.call_bytes // self.layout.block_bytes)

    @property
    def calls(self) -> int:
        """Calls that all blocks take."""
        return self.total_bytes // (self.call_blocks * self.layout.block_bytes)

    @property
    def steps(self) -> int:
        """How often ``measure_codecs`` says that a round is done."""
        return (len(self.codecs) + (self.with_store and CODEC in self.codecs)) * self.rounds


def measure_codecs(extent: CodecExtent, on_round: Callable[[], None] = lambda: None) -> Report:
    """Measure codecs, one after the other.

    Args:
        extent: how much.
        on_round: called ``extent.steps`` times.

    Raises:
        InsufficientMemory: there is not enough for the KV in all its forms.
        KVStoreError: a codec gave wrong bytes or numbers.
    """
    machine = machine_facts()
    codecs = [get_codec(name) for name in extent.codecs]
    memory = KVMemory(extent.layout, extent.calls * extent.call_blocks)
    most_bytes = max(sum(codec.max_section_bytes(extent.layout)) for codec in codecs)
    payloads = Payloads(most_bytes, memory.blocks)
    rows: list[Row] = []
    through_store: list[Row] = []
    copies = Memmove(memory, extent.call_blocks), MemmoveAll(memory, extent.call_blocks)
    for codec in codecs:
        work = CodecWork(codec, memory, payloads)
        rows += _measure_codec(work, extent, copies, on_round)
        if codec.name == CODEC and extent.with_store:
            through_store = measure_store(work, extent.rounds, on_round)
    rows += [*(_copy_row(copy, extent) for copy in copies), *through_store]
    if not has_reference():
        rows.append(Row(op="reference", batch=1, note="not compared with: torch is not installed"))
    return Report(machine=machine, baseline=BASELINE, rows=rows)


def _copy_row(copy: Memmove, extent: CodecExtent) -> Row:
    """What memmove itself reached, over the turns of all codecs."""
    median_ns = median(copy.times_ns)
    call_bytes = extent.call_blocks * extent.layout.block_bytes
    return Row(
        op=MEMMOVE,
        size_bytes=copy.call_bytes,
        batch=1,
        cache="cold",
        memory=CONTIGUOUS,
        threads=1,
        samples=len(copy.times_ns),
        median_us=round(median_ns * copy.call_bytes / call_bytes / 1000, 2),
        gb_per_s=round(call_bytes / median_ns, 3),
    )


def _measure_codec(
    work: CodecWork, extent: CodecExtent, copies: Sequence[Memmove], on_round: Callable[[], None]
) -> list[Row]:
    memory, call_blocks = work.memory, extent.call_blocks
    before = len(copies[0].times_ns)
    sides = [
        kind(work, form, call_blocks, threads)
        for kind in (Encode, Decode)
        for form in (memory.contiguous, memory.paged)
        for threads in extent.threads
    ]
    walk = Walk(extent.calls, 1)
    busy_ns, own_ns, started = machine_busy_ns(), time.process_time_ns(), time.perf_counter_ns()
    for _ in range(extent.rounds):
        take_turns([*copies, *sides], walk, 1, 1)
        on_round()
    others_ns = machine_busy_ns() - busy_ns - (time.process_time_ns() - own_ns)
    others_share = round(max(others_ns / (time.perf_counter_ns() - started), 0.0), 2)
    baseline_ns = min(median(copy.times_ns[before:]) for copy in copies)
    rows: list[Row] = []
    one_thread: dict[tuple[str, str], float] = {}
    for side in sides:
        op, ours_ns = type(side).__name__.lower(), median(side.times_ns)
        ratio = baseline_ns / ours_ns
        if side.threads == 1:
            one_thread[op, side.form.name] = ratio
        alone = one_thread.get((op, side.form.name))
        rows.append(
            Row(
                op=op,
                codec=work.codec.name,
                size_bytes=extent.layout.block_bytes,
                batch=call_blocks,
                cache="cold",
                memory=side.form.name,
                threads=side.threads,
                samples=len(side.times_ns),
                median_us=round(ours_ns / 1000, 2),
                p99_us=round(percentile(sorted(side.times_ns), 0.99) / 1000, 2),
                gb_per_s=round(call_blocks * extent.layout.block_bytes / ours_ns, 3),
                baseline=MEMMOVE,
                baseline_median_us=round(baseline_ns / 1000, 2),
                ratio=round(ratio, 4),
                limit=aim(op, work.codec.name, side.threads, alone),
                others_share=others_share,
                scale=round(ratio / alone, 4) if alone is not None and side.threads > 1 else None,
            )
        )
    return rows


def thread_counts(text: str) -> tuple[int, ...]:
    """Numbers of threads from what a user wrote, ``"1,2"``, ascending.

    Raises:
        InvalidArgument: it is something else.
    """
    try:
        counts = sorted({int(part) for part in text.split(",")})
    except ValueError:
        counts = []
    if not counts or not 1 <= counts[0] <= counts[-1] <= _MOST_THREADS:
        raise InvalidArgument(f"--threads: write numbers of 1 to {_MOST_THREADS} with commas between, such as 1,2")
    return tuple(counts)


def aim(op: str, codec: str, threads: int, one_thread_ratio: float | None) -> float | None:
    """The least ratio to memmove that is aimed at, None where nothing is.

    Args:
        op: ``"encode"`` or ``"decode"``.
        codec: its name.
        threads: that do it.
        one_thread_ratio: what one thread reached in the same run, None where that was not measured.
    """
    limit = _LIMITS.get((op, codec))
    if limit is None or threads == 1:
        return limit
    if threads > 2 or one_thread_ratio is None:
        return None
    return round(_SCALE_LIMIT * one_thread_ratio, 4) if one_thread_ratio < _MEMORY_BOUND else 1.0
