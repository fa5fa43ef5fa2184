"""What the CPU's kernels refuse: arguments out of range, and blocks that are not well formed."""

from __future__ import annotations

import struct
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from codec_blocks import normal_block
from cpu_blocks import Guarded, decoded_by_cpu, encoded_by_cpu

from kvstore_kernels import cpu
from kvstore_kernels.codecs import get_codec
from kvstore_kernels.layout import KVLayout
from kvstore_kernels.paged import PagedKV

LAYOUT = KVLayout(2, 2, 64, "bfloat16", 64)
INT8 = get_codec("int8")


def attempt(kv: PagedKV | None = None, **changes: Any) -> cpu.EncodedBlocks:
    payload = Guarded(sum(INT8.max_section_bytes(LAYOUT)))
    arguments = {
        "codec": INT8,
        "kv": kv or PagedKV.from_tensor(LAYOUT, normal_block(LAYOUT)),
        "pages": np.zeros((1, 1), np.int32),
        "payloads": np.array([payload.address], np.uint64),
    }
    return cpu.encode(**(arguments | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pages": np.ones((1, 1), np.int32)}, "pages must be 0 to 0, got 1 to 1"),
        ({"pages": np.full((1, 1), -1, np.int32)}, "pages must be 0 to 0, got -1 to -1"),
        ({"pages": np.zeros((1, 2), np.int32)}, r"whole numbers \[blocks, 1\]"),
        ({"pages": np.zeros(1, np.int32)}, r"whole numbers \[blocks, 1\]"),
        ({"pages": np.zeros((1, 1))}, r"whole numbers \[blocks, 1\], got float64"),
        ({"payloads": np.zeros(2, np.uint64)}, "expected 1 addresses of payloads"),
        ({"payloads": np.zeros(1)}, "expected 1 addresses of payloads"),
        ({"threads": 0}, "threads must be at least 1"),
        ({"codec": get_codec("kivi4"), "kv": None}, ""),
    ],
)
def test_arguments_out_of_range_are_refused(changes: dict[str, Any], message: str) -> None:
    if not message:
        layout = replace(LAYOUT, block_tokens=16)
        changes = changes | {"kv": PagedKV.from_tensor(layout, normal_block(layout))}
        message = "codec kivi4 needs blocks of a multiple of 64 tokens"
    with pytest.raises(ValueError, match=message):
        attempt(**changes)


def test_pages_on_a_gpu_are_refused() -> None:
    kv = replace(PagedKV.from_tensor(LAYOUT, normal_block(LAYOUT)), device="cuda")
    with pytest.raises(ValueError, match="use kvstore_kernels.cuda"):
        attempt(kv)


def test_lengths_of_sections_that_are_not_the_codecs_are_refused() -> None:
    sections = encoded_by_cpu(INT8, normal_block(LAYOUT), LAYOUT).sections
    with pytest.raises(ValueError, match=r"block 0: codec int8 has sections of \[16896, 16896\] bytes here"):
        decoded_by_cpu(INT8, [sections[0], sections[1][:-1]], LAYOUT)
    with pytest.raises(ValueError, match=r"section_bytes must be whole numbers \[1, 2\]"):
        decoded_by_cpu(INT8, sections[:1], LAYOUT)


def damaged(section: bytes) -> dict[str, bytes]:
    """Sections that are not well formed, by what is wrong. The second plane is compressed, the first stored."""
    first, second = struct.unpack("<2I", section[:8])
    assert first >> 31 == 1
    assert second >> 31 == 0
    return {
        "empty": b"",
        "table cut": section[:10],
        "cut": section[:-1],
        "longer": section + b"\0",
        "length 0": struct.pack("<I", 0) + section[4:],
        "length beyond": struct.pack("<I", 0x7FFFFFFF) + section[4:],
        "stored, another length": struct.pack("<I", first - 1) + section[4:],
        "stored, though compressed": section[:4] + struct.pack("<I", second | 1 << 31) + section[8:],
        "garbage": section[:-100] + bytes(100),
    }


@pytest.mark.parametrize("codec", ["lossless", "lossless-zstd"])
@pytest.mark.parametrize("threads", [1, 3])
def test_malformed_compressed_blocks_are_refused_by_number(codec: str, threads: int) -> None:
    method = get_codec(codec)
    block = normal_block(LAYOUT)
    good = encoded_by_cpu(method, block, LAYOUT).sections[0]
    assert len(good) < LAYOUT.block_bytes
    for what, section in damaged(good).items():
        # What is behind a section would make a cut one whole again.
        areas = [np.frombuffer(data + good[len(data) :] + bytes(8), np.uint8) for data in (good, section)]
        target = torch.zeros(2, 2, 128, 2, 64, dtype=torch.bfloat16)
        with pytest.raises(ValueError, match="block 1: ") as raised:
            cpu.decode(
                method,
                PagedKV.from_tensor(LAYOUT, target),
                np.array([[0], [1]], np.int32),
                np.array([area.ctypes.data for area in areas], np.uint64),
                np.array([[len(good)], [len(section)]]),
                threads=threads,
            )
        assert raised, what
        assert target[:, :, :64].equal(block)
