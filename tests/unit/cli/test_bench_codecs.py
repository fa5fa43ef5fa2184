"""The codecs' benchmark without its codecs: aims, refusals, the KV in its forms, the table."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console

from kvstore.cli.bench import codecs_memory
from kvstore.cli.bench.codecs import CodecExtent, aim, thread_counts
from kvstore.cli.bench.codecs_memory import PAGE_TOKENS, KVMemory, check_memory
from kvstore.cli.bench.codecs_store import CODEC_ALONE, SAVE_AND_LOAD
from kvstore.cli.bench.codecs_table import codecs_table
from kvstore.cli.bench.machine import machine_facts
from kvstore.cli.bench.report import Report, Row
from kvstore.errors import InsufficientMemory, InvalidArgument
from kvstore_kernels.codecs import CODECS
from kvstore_kernels.layout import KVLayout

MIB = 1 << 20
LAYOUT = KVLayout(2, 2, 64, "bfloat16", 64)


# ------------------------------------------------------------------ aims and extent


@pytest.mark.parametrize(
    ("op", "codec", "threads", "one", "expected"),
    [
        ("encode", "int8", 1, 0.7, 0.6),
        ("decode", "int8", 1, 0.7, 0.9),
        ("encode", "kivi4", 1, None, 0.5),
        ("decode", "turbo3", 1, 0.1, 0.33),
        ("encode", "turbo4", 2, 0.2, 0.34),
        ("encode", "turbo4", 2, 0.49, 0.833),
        ("decode", "int4", 2, 0.5, 1.0),
        ("decode", "int4", 2, None, None),
        ("decode", "int4", 4, 0.9, None),
        ("encode", "raw", 1, 1.0, None),
        ("encode", "lossless", 2, 0.1, None),
    ],
)
def test_aim(op: str, codec: str, threads: int, one: float | None, expected: float | None) -> None:
    assert aim(op, codec, threads, one) == expected


def test_extent_has_whole_calls_of_whole_blocks() -> None:
    extent = CodecExtent()
    assert (extent.layout.block_bytes, extent.call_blocks, extent.calls) == (2 * MIB, 16, 8)
    assert extent.steps == (len(CODECS) + 1) * extent.rounds
    assert CodecExtent(dtype="float32").call_blocks == 8
    assert CodecExtent(codecs=("int8",)).steps == 20


def test_extent_of_nothing_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="--codec: unknown codec 'zip'; known are raw"):
        CodecExtent(codecs=("zip",))
    with pytest.raises(InvalidArgument, match="--codec: give at least one"):
        CodecExtent(codecs=())
    with pytest.raises(InvalidArgument, match="--dtype: 'int8' is none of bfloat16, float16, float32"):
        CodecExtent(dtype="int8")
    with pytest.raises(InvalidArgument, match="--mib: 31 MiB are less than the 32 MiB of one call"):
        CodecExtent(total_bytes=31 * MIB)


def test_thread_counts_are_read_or_refused() -> None:
    assert thread_counts("4,1, 2,2") == (1, 2, 4)
    for text in ("", "0", "1,,2", "two", "1,257", "-1"):
        with pytest.raises(InvalidArgument, match="--threads: write numbers of 1 to 256"):
            thread_counts(text)


def test_memory_that_is_not_there_is_refused_with_what_would_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codecs_memory.psutil, "virtual_memory", lambda: SimpleNamespace(available=1536 * MIB))
    check_memory(256 * MIB)
    with pytest.raises(InsufficientMemory, match=r"takes 1\.6 GiB of memory and 1\.5 GiB .*at most --mib 256"):
        check_memory(288 * MIB)
    monkeypatch.setattr(codecs_memory.psutil, "virtual_memory", lambda: SimpleNamespace(available=100 * MIB))
    with pytest.raises(InsufficientMemory, match="a larger machine"):
        check_memory(256 * MIB)


# ------------------------------------------------------------------ the KV


def test_blocks_of_both_forms_are_alike_and_differ_from_each_other() -> None:
    memory = KVMemory(LAYOUT, 5)
    assert memory.total_bytes == 5 * LAYOUT.block_bytes
    blocks = [memory.contiguous.source_block(number) for number in range(5)]
    assert len({block.tobytes() for block in blocks}) == 5
    for number, block in enumerate(blocks):
        assert block.shape == LAYOUT.shape
        assert np.array_equal(memory.paged.source_block(number), block)
    assert memory.paged.pages.shape == (5, LAYOUT.block_tokens // PAGE_TOKENS)
    assert not np.array_equal(memory.paged.pages.ravel(), np.arange(20))


def test_kv_has_key_channels_that_stand_out() -> None:
    values = KVMemory(KVLayout(2, 2, 64, "float32", 64), 4).contiguous.source_block(1)
    spread = values.std(axis=(0, 2, 3))
    assert spread[0].max() > 5
    assert spread[1].max() < 1.5
    assert KVMemory(KVLayout(2, 2, 64, "float16", 64), 1).contiguous.source_block(0).dtype == np.float16


def test_bits_of_bfloat16_are_rounded_to_nearest_even() -> None:
    numbers = np.array([1.0, 1.00390625, 1.01171875, -3.1415927], np.float32)
    expected = np.array([0x3F80, 0x3F80, 0x3F82, 0xC049], np.uint16)
    assert np.array_equal(codecs_memory._rounded(numbers, "bfloat16"), expected)


def test_spoiled_targets_are_those_that_were_named() -> None:
    memory = KVMemory(LAYOUT, 4)
    memory.paged.spoil_target(1, 3)
    spoiled = [bool((memory.paged.target_block(number) == 0xFFFF).any()) for number in range(4)]
    assert spoiled == [False, True, True, False]


# ------------------------------------------------------------------ the table


def rows() -> list[Row]:
    made = [
        Row(
            op=op,
            codec=codec,
            size_bytes=2 * MIB,
            batch=16,
            memory=memory,
            threads=threads,
            median_us=3000.0,
            gb_per_s=0.04 if codec == "lossless-zstd" else 12.34,
            baseline="memmove",
            ratio=10.25 if op == "decode" else 0.59,
            scale=None if threads == 1 else 1.75,
            limit=aim(op, codec, threads, 0.59),
            others_share=0.04 if codec == "raw" else 1.26,
        )
        for codec in CODECS
        for op in ("encode", "decode")
        for memory in ("contiguous", "paged")
        for threads in (1, 2)
    ]
    made += [
        Row(op="memmove", size_bytes=size, batch=1, gb_per_s=rate)
        for size, rate in ((32 * MIB, 7.0), (256 * MIB, 12.4))
    ]
    made.append(
        Row(
            op=SAVE_AND_LOAD,
            codec="kivi4",
            batch=64,
            median_us=180_000.0,
            baseline=CODEC_ALONE,
            baseline_median_us=160_000.0,
            ratio=0.79,
            limit=0.8,
        )
    )
    return made


def shown(width: int, some: list[Row]) -> list[str]:
    console = Console(width=width, highlight=False, emoji=False, markup=False)
    with console.capture() as capture:
        console.print(codecs_table(Report(machine=machine_facts(), baseline="a copy", rows=some)))
    return capture.get().splitlines()


@pytest.mark.parametrize("width", [80, 120])
def test_table_fits_a_terminal_and_says_what_was_missed(width: int) -> None:
    lines = shown(width, rows())
    assert max(map(len, lines)) <= width
    assert not any("…" in line for line in lines)
    aimed = sum(aim("encode", codec, 1, None) is not None for codec in CODECS)
    assert " ".join(lines).count("MISSED") == 2 * aimed + 1
    assert any(line.split()[:3] == ["lossless-zstd", "encode", "0.04"] for line in lines)
    assert "7.0 GB/s in calls of 32.0 MiB, 12.4 GB/s in calls of 256.0 MiB" in " ".join(" ".join(lines).split())
    assert "used 0.0 to 1.3 cores meanwhile" in " ".join(" ".join(lines).split())
    assert any("save and load" in line and "MISSED" in line for line in lines)


def test_table_of_one_number_of_threads_has_no_columns_for_others() -> None:
    for threads in (1, 2):
        some = [row for row in rows() if row.threads == threads and row.codec == "int8"]
        text = "\n".join(shown(80, some))
        assert ("2 threads" in text) == (threads == 2)
        assert "Through the store" not in text
