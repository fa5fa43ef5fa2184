"""Transcoding of records and restoring them beside ``memmove``: one thread, one record in a call, as a tier does it.

The records hold the KV of the codecs' benchmark, as their dtype and once more as opaque bytes. All are larger together
than a core's caches; the sides take turns on different ones. All bytes are counted as the record has them that is in
memory. Each record is restored and compared before anything is timed, and the last one of each turn after it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from ctypes import memmove
from dataclasses import dataclass, field
from statistics import median
from time import perf_counter_ns
from typing import Final

import numpy as np
import numpy.typing as npt

from kvstore.cli.bench.codecs_memory import KVMemory
from kvstore.cli.bench.local_blocks import wrong
from kvstore.cli.bench.local_reads import MEMMOVE
from kvstore.cli.bench.local_sides import Side, Walk, take_turns
from kvstore.cli.bench.machine import machine_facts
from kvstore.cli.bench.report import Report, Row, percentile
from kvstore.errors import InvalidArgument
from kvstore.format.constants import CodecId
from kvstore.format.record import checksum, encode_header, padded_bytes, raw_header, record_header
from kvstore.transcode.pairs import PAIRS, Pair, pair_of
from kvstore.transcode.records import restore, transcode
from kvstore_kernels import cpu
from kvstore_kernels.codecs import LOSSY_DTYPES, get_codec
from kvstore_kernels.layout import KVLayout

__all__ = ["BASELINE", "OPAQUE", "TYPED", "TranscodeExtent", "measure_transcoding"]

BASELINE: Final = "ctypes.memmove of the same records by one thread from one private numpy array to another, in turns"

TYPED: Final = "typed"
OPAQUE: Final = "opaque"
"""Records of uint8, as a plain client puts them."""

_LAYERS, _KV_HEADS, _HEAD_DIM, _BLOCK_TOKENS = 8, 8, 128, 64
_MIB: Final = 1 << 20

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class TranscodeExtent:
    """How much is measured.

    Attributes:
        total_bytes: of the KV.
        pairs: names.
        rounds: in each, each side works on a quarter of the records.
        dtype: of the KV.

    Raises:
        InvalidArgument: an unknown pair or dtype, or less KV than four blocks.
    """

    total_bytes: int = 128 << 20
    pairs: Sequence[str] = tuple(PAIRS)
    rounds: int = 12
    dtype: str = "bfloat16"
    layout: KVLayout = field(init=False)

    def __post_init__(self) -> None:
        if self.dtype not in LOSSY_DTYPES:
            raise InvalidArgument(f"--dtype: {self.dtype!r} is none of {', '.join(LOSSY_DTYPES)}")
        for name in self.pairs:
            pair_of(name)
        if not self.pairs:
            raise InvalidArgument("--pair: give at least one pair")
        layout = KVLayout(_LAYERS, _KV_HEADS, _HEAD_DIM, self.dtype, _BLOCK_TOKENS)
        object.__setattr__(self, "layout", layout)
        if self.blocks < 4:
            raise InvalidArgument(f"--mib: at least {4 * layout.block_bytes // _MIB}, four blocks")

    @property
    def blocks(self) -> int:
        """Records of each kind."""
        return self.total_bytes // self.layout.block_bytes

    @property
    def kinds(self) -> list[tuple[Pair, str]]:
        """Pairs, and the form of records; opaque ones are always raw."""
        pairs = [pair_of(name) for name in self.pairs]
        return [
            (pair, form) for pair in pairs for form in (TYPED, OPAQUE) if form == TYPED or pair.source is CodecId.RAW
        ]

    @property
    def steps(self) -> int:
        """How often ``measure_transcoding`` says that a round is done."""
        return len(self.kinds) * self.rounds


def measure_transcoding(extent: TranscodeExtent, on_round: Callable[[], None] = lambda: None) -> Report:
    """Measure pairs, one after the other.

    Args:
        extent: how much.
        on_round: called ``extent.steps`` times.

    Raises:
        InsufficientMemory: there is not enough for the KV in all its forms.
        KVStoreError: a record did not come back as it was.
    """
    machine = machine_facts()
    memory = KVMemory(extent.layout, extent.blocks)
    rows = [
        row for pair, form in extent.kinds for row in _measure(_Work(pair, form, memory), extent, on_round)
    ]  # fmt: skip
    return Report(machine=machine, baseline=BASELINE, rows=rows)


class _Work:
    """Records of one kind in all their forms, checked.

    Attributes:
        records: as they are in memory.
        transcoded: what becomes of them; None of a record that stays as it is.
    """

    def __init__(self, pair: Pair, form: str, memory: KVMemory) -> None:
        self.pair = pair
        self.form = form
        self.records = [_record(pair, form, memory, number) for number in range(memory.blocks)]
        most = max(record.nbytes for record in self.records)
        self.out = np.zeros(padded_bytes(most), np.uint8)
        self.back = np.zeros(padded_bytes(most), np.uint8)
        self.transcoded: list[Bytes] = []
        for number, record in enumerate(self.records):
            made = transcode(record.data, pair, self.out.data)
            if made is None:
                raise wrong(f"{pair.name} did not make record {number} smaller")
            self.transcoded.append(np.array(np.frombuffer(made, np.uint8)))
            self.check_restored(number, restore(made, self.back.data))

    @property
    def stored_ratio(self) -> float:
        """Bytes on the lower tier / bytes in memory, both in whole pages."""
        made, records = (
            sum(padded_bytes(item.nbytes) for item in items) for items in (self.transcoded, self.records)
        )  # fmt: skip
        return made / records

    def check_transcoded(self, number: int, made: memoryview | None) -> None:
        """Compare with what was made at first."""
        if made is None or not np.array_equal(np.frombuffer(made, np.uint8), self.transcoded[number]):
            raise wrong(f"{self.pair.name} made something else of record {number} than before")

    def check_restored(self, number: int, back: memoryview) -> None:
        """Compare with the original, or for a pair that is not restored with what was made."""
        wanted = self.records[number] if self.pair.restored else self.transcoded[number]
        if not np.array_equal(np.frombuffer(back, np.uint8), wanted):
            raise wrong(f"{self.pair.name} did not give record {number} back as it was")


def _record(pair: Pair, form: str, memory: KVMemory, number: int) -> Bytes:
    """A record of a block, as a client writes it."""
    layout, block = memory.layout, memory.contiguous.source_block(number).reshape(-1).view(np.uint8)
    key, root, digest = (number + 1).to_bytes(32, "big"), bytes(32), b"n" * 32
    shape = (block.nbytes,) if form == OPAQUE else layout.shape
    if pair.source is CodecId.RAW:
        dtype = "uint8" if form == OPAQUE else layout.dtype
        header = raw_header(
            key=key, parent_key=root, namespace_digest=digest, part=0, payload=block.data, dtype=dtype, shape=shape
        )
        return np.concatenate([np.frombuffer(encode_header(header), np.uint8), block])
    codec = get_codec(pair.source.text)
    payload = np.empty(sum(codec.max_section_bytes(layout)), np.uint8)
    form_of = memory.contiguous
    encoded = cpu.encode(
        codec, form_of.source, form_of.pages[number : number + 1], np.array([payload.ctypes.data], np.uint64)
    )
    payload = payload[: int(encoded.section_bytes[0, 0])]
    header = record_header(
        key=key,
        parent_key=root,
        namespace_digest=digest,
        part=0,
        codec=pair.source,
        codec_parameters=codec.digest,
        fidelity=codec.fidelity,
        dtype=layout.dtype,
        shape=shape,
        section_bytes=(payload.nbytes,),
        payload_checksum=checksum(payload.data),
        token_count=layout.block_tokens,
    )
    return np.concatenate([np.frombuffer(encode_header(header), np.uint8), payload])


class _Copy(Side):
    """The baseline."""

    def __init__(self, work: _Work) -> None:
        super().__init__()
        self._records = work.records
        self._out = np.zeros_like(work.out)

    def run(self, numbers: Sequence[int]) -> None:
        """Time them."""
        target = self._out.ctypes.data
        for number in numbers:
            record = self._records[number]
            source, size = record.ctypes.data, record.nbytes
            started = perf_counter_ns()
            memmove(target, source, size)
            self.times_ns.append(perf_counter_ns() - started)

    def check(self) -> None:
        """Nothing: the C library's copy is what all else is measured by."""


class _Transcode(Side):
    """Down."""

    def __init__(self, work: _Work) -> None:
        super().__init__()
        self._work = work

    def run(self, numbers: Sequence[int]) -> None:
        """Time them."""
        work, out = self._work, self._work.out.data
        for number in numbers:
            record = work.records[number].data
            started = perf_counter_ns()
            made = transcode(record, work.pair, out)
            self.times_ns.append(perf_counter_ns() - started)
            self._last = number, made

    def check(self) -> None:
        """Compare the last one."""
        self._work.check_transcoded(*self._last)


class _Restore(Side):
    """Up again. Of a pair that is not restored this is the check of the checksum alone."""

    def __init__(self, work: _Work) -> None:
        super().__init__()
        self._work = work

    def run(self, numbers: Sequence[int]) -> None:
        """Time them."""
        work, back = self._work, self._work.back.data
        for number in numbers:
            record = work.transcoded[number].data
            started = perf_counter_ns()
            restored = restore(record, back)
            self.times_ns.append(perf_counter_ns() - started)
            self._last = number, restored

    def check(self) -> None:
        """Compare the last one."""
        self._work.check_restored(*self._last)


def _measure(work: _Work, extent: TranscodeExtent, on_round: Callable[[], None]) -> list[Row]:
    copy, down = _Copy(work), _Transcode(work)
    sides: list[Side] = [copy, down]
    if work.pair.restored:
        sides.append(_Restore(work))
    walk = Walk(extent.blocks, 1)
    for _ in range(extent.rounds):
        take_turns(sides, walk, extent.blocks // 4, 4)
        on_round()
    baseline_ns = median(copy.times_ns)
    record_bytes = sum(record.nbytes for record in work.records) / extent.blocks
    return [
        Row(
            op=op,
            codec=work.pair.name,
            size_bytes=extent.layout.block_bytes,
            batch=1,
            cache="cold",
            memory=work.form,
            threads=1,
            samples=len(side.times_ns),
            median_us=round(median(side.times_ns) / 1000, 2),
            p99_us=round(percentile(sorted(side.times_ns), 0.99) / 1000, 2),
            gb_per_s=round(record_bytes / median(side.times_ns), 3),
            baseline=MEMMOVE,
            baseline_median_us=round(baseline_ns / 1000, 2),
            ratio=round(baseline_ns / median(side.times_ns), 4),
            stored_ratio=round(work.stored_ratio, 4),
        )
        for op, side in zip(("transcode", "restore"), sides[1:], strict=False)
    ]
