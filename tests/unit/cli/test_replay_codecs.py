"""KV that derives from keys, and what a lossy codec must make of it."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from rich.console import Console

from kvstore.cli.replay_codecs import CodecsReplay, KVBytes, codecs_layout, comparison_table
from kvstore.cli.replay_loop import DaemonView, Latency, ReplayReport
from kvstore.errors import InvalidArgument
from kvstore.simulator.trace import block_key
from kvstore_kernels import cpu
from kvstore_kernels.codecs import get_codec

LAYOUT = codecs_layout(32 << 10)
KEYS = [block_key(number) for number in range(3)]


def values(payload: memoryview) -> np.ndarray:
    bits = np.frombuffer(payload, np.uint16).astype(np.uint32)
    return (bits << 16).view(np.float32)


def test_layout_has_whole_layers() -> None:
    assert (LAYOUT.shape, LAYOUT.block_bytes) == ((2, 2, 64, 1, 64), 32 << 10)
    for size in (4096, 24 << 10):
        with pytest.raises(InvalidArgument, match=r"--block-bytes: with --codec .* whole layers of 16 KiB"):
            codecs_layout(size)


def test_kv_is_finite_varied_and_of_its_key() -> None:
    one, two, _ = (values(payload).copy() for payload in KVBytes(LAYOUT, get_codec("raw"), 3).derive(KEYS))
    assert np.abs(one).min() >= 0.5
    assert np.abs(one).max() < 2
    assert -0.1 < one.mean() < 0.1
    assert not np.array_equal(one, two)


@pytest.mark.parametrize("codec", ["raw", "int8", "kivi4", "turbo2"])
def test_received_kv_must_be_what_the_codec_makes_of_it_to_the_byte(codec: str) -> None:
    blocks = KVBytes(LAYOUT, get_codec(codec), 3)
    blocks.derive(KEYS)
    pages = np.arange(3, dtype=np.int32).reshape(3, 1)
    payloads = np.empty((3, LAYOUT.block_bytes), np.uint8)
    addresses = payloads.ctypes.data + np.arange(3, dtype=np.uint64) * np.uint64(LAYOUT.block_bytes)
    encoded = cpu.encode(get_codec(codec), blocks.derived, pages, addresses)
    assert not encoded.void_groups.any()
    received = blocks.receivers(3)
    lengths = [LAYOUT.block_bytes] * 3
    assert blocks.wrong_bytes(KEYS, lengths) > 0
    cpu.decode(get_codec(codec), blocks.received, pages, addresses, encoded.section_bytes)
    assert blocks.wrong_bytes(KEYS, lengths) == 0
    received[1][7] ^= 1
    assert blocks.wrong_bytes(KEYS, lengths) == 1
    assert blocks.wrong_bytes(KEYS, [LAYOUT.block_bytes, None, LAYOUT.block_bytes]) == 0


def test_comparison_fits_80_columns_and_says_how_many_more_fit() -> None:
    daemon = DaemonView(**dict.fromkeys(DaemonView.__struct_fields__, 123_456_789))
    raw = ReplayReport(
        trace="conversation_trace.jsonl",
        block_bytes=2 << 20,
        slot_bytes=2101248,
        capacity_blocks=1000,
        requests=12031,
        blocks_asked=288_500,
        blocks_hit=100_000,
        hit_rate=0.3466,
        blocks_lost=0,
        corrupt_records=0,
        wrong_bytes=0,
        bytes_read=100_000 << 21,
        bytes_written=1,
        puts={},
        latency={"get": Latency(calls=0, p50_us=0, p99_us=0), "put": Latency(calls=9, p50_us=123456, p99_us=1)},
        seconds=1.0,
        daemon=daemon,
    )
    kivi4 = msgspec.structs.replace(raw, capacity_blocks=3538)
    console = Console(width=80, highlight=False, emoji=False, markup=False)
    with console.capture() as capture:
        console.print(comparison_table(CodecsReplay(capacity_bytes=1 << 40, replays={"raw": raw, "kivi4": kivi4})))
    lines = capture.get().splitlines()
    assert max(map(len, lines)) <= 80
    assert not any("…" in line for line in lines)
    assert ["as", "many", "as", "raw", "1.00x", "3.54x"] in [line.split() for line in lines]
