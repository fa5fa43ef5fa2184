"""The lossless codecs: every bit comes back, sections are what the page says, and malformed ones are refused."""

from __future__ import annotations

import struct
import tracemalloc

import lz4.block
import pytest
import torch
import zstandard
from codec_blocks import any_bits, normal_block, same_bits
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kvstore_kernels.codecs import Codec, get_codec
from kvstore_kernels.codecs.lossless import CHUNK_VALUES, STORED, Compressor, Lossless, Lz4, Zstd, chunk_count
from kvstore_kernels.layout import ELEMENT_BYTES, KVLayout, Layout, MLALayout

SMALL = KVLayout(1, 1, 16, "bfloat16", 4)
CHUNKS = KVLayout(2, 2, 80, "bfloat16", 211)
"""135,040 values: two chunks and a short one."""

CODECS = [get_codec("lossless"), get_codec("lossless-zstd")]
every_codec = pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)
every_compressor = pytest.mark.parametrize("compressor", [Lz4(), Zstd()], ids=["lz4", "zstd"])


def only_section(codec: Codec, block: torch.Tensor, layout: Layout) -> bytes:
    (section,) = codec.encode(block, layout).sections
    return section


def rebuilt(entries: list[int], planes: list[bytes]) -> bytes:
    return struct.pack(f"<{len(entries)}I", *entries) + b"".join(planes)


# ------------------------------------------------------------------ round trip


@every_codec
@pytest.mark.parametrize("dtype", ELEMENT_BYTES)
@pytest.mark.parametrize("kind", [KVLayout(1, 2, 16, "int8", 33), MLALayout(2, 100, 24, "int8", 5)], ids=["gqa", "mla"])
@settings(max_examples=10)
@given(seed=st.integers(0, 2**32))
def test_every_bit_comes_back(codec: Codec, dtype: str, kind: Layout, seed: int) -> None:
    layout = type(kind)(*[getattr(kind, name) for name in kind.__slots__[:3]], dtype, kind.block_tokens)  # type: ignore[arg-type]
    block = any_bits(layout, seed)
    encoded = codec.encode(block, layout)
    assert encoded.void_groups == 0
    assert same_bits(codec.decode(encoded.sections, layout), block)


@every_codec
def test_blocks_of_several_chunks_come_back(codec: Codec) -> None:
    block = normal_block(CHUNKS, outliers=True)
    assert chunk_count(CHUNKS) == 3
    section = only_section(codec, block, CHUNKS)
    assert len(section) < CHUNKS.block_bytes
    assert same_bits(codec.decode([section], CHUNKS), block)


@pytest.mark.parametrize(("name", "bits"), [("lossless", 13.4), ("lossless-zstd", 11.0)])
def test_size_on_normal_numbers(name: str, bits: float) -> None:
    layout = KVLayout(2, 4, 128, "bfloat16", 64)
    section = only_section(get_codec(name), normal_block(layout), layout)
    assert 8 * len(section) / (layout.block_bytes / 2) < bits


@every_codec
def test_noise_is_stored_as_it_is_and_meets_the_bound(codec: Codec) -> None:
    block = any_bits(CHUNKS, 1)
    section = only_section(codec, block, CHUNKS)
    assert (len(section),) == codec.max_section_bytes(CHUNKS)
    entries = struct.unpack_from("<6I", section)
    assert all(entry & STORED for entry in entries)


def test_plane_that_compression_leaves_as_long_is_stored_as_it_is() -> None:
    class Reversed(Lz4):
        def compress(self, plane: bytes | bytearray | memoryview) -> bytes:
            return bytes(plane)[::-1]

    section = only_section(Lossless("reversed", 2, Reversed()), any_bits(SMALL, 1), SMALL)
    assert struct.unpack_from("<2I", section) == (128 | STORED, 128 | STORED)
    assert section == only_section(get_codec("lossless"), any_bits(SMALL, 1), SMALL)


@every_codec
def test_planes_are_the_rotated_bytes_in_the_order_of_the_page(codec: Codec) -> None:
    layout = KVLayout(1, 1, 16, "float32", 2)
    block = any_bits(layout, 5)
    section = only_section(codec, block, layout)
    words = struct.unpack("<64I", block.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    rotated = [(word << 1 | word >> 31) & 0xFFFFFFFF for word in words]
    planes = [bytes(word >> 8 * p & 255 for word in rotated) for p in range(4)]
    assert section == rebuilt([64 | STORED] * 4, planes)


def test_exponents_of_bfloat16_make_a_plane_of_their_own() -> None:
    """Rotated, the upper byte of a bfloat16 is its exponent: numbers of one binade have one value there."""
    block = (1 + torch.rand(SMALL.shape, generator=torch.Generator().manual_seed(0))).bfloat16().clamp(max=1.99)
    block *= torch.where(torch.arange(16) % 2 == 0, 1, -1)
    section = only_section(get_codec("lossless"), block, SMALL)
    low, high = struct.unpack_from("<2I", section)
    assert low == 128 | STORED
    assert lz4.block.decompress(section[8 + 128 :], uncompressed_size=128) == bytes([127]) * 128
    assert high == len(section) - 8 - 128


@every_codec
def test_what_another_level_of_the_compressor_gave_decodes(codec: Codec) -> None:
    assert isinstance(codec, Lossless)
    block = torch.ones(SMALL.shape, dtype=torch.bfloat16)
    section = only_section(codec, block, SMALL)
    entries = struct.unpack_from("<2I", section)
    first, second = section[8 : 8 + entries[0]], section[8 + entries[0] :]
    planes = [codec.compressor.decompress(each, 128) for each in (first, second)]
    if isinstance(codec.compressor, Lz4):
        again = [lz4.block.compress(each, mode="high_compression", store_size=False) for each in planes]
    else:
        again = [zstandard.ZstdCompressor(level=19, write_checksum=True).compress(each) for each in planes]
    assert same_bits(codec.decode([rebuilt([len(each) for each in again], again)], SMALL), block)


# ------------------------------------------------------------------ malformed sections

ONES = torch.ones(SMALL.shape, dtype=torch.bfloat16)


@every_codec
@pytest.mark.parametrize("cut", [0, 1, 4, 7])
def test_section_that_ends_in_its_table_is_refused(codec: Codec, cut: int) -> None:
    with pytest.raises(ValueError, match=f"a section of {cut} bytes ends inside its table of 8"):
        codec.decode([only_section(codec, ONES, SMALL)[:cut]], SMALL)


@every_codec
@pytest.mark.parametrize(
    ("entries", "planes", "message"),
    [
        ([127 | STORED, 128 | STORED], [bytes(127), bytes(128)], "plane 0 of 128 bytes cannot be stored in 127"),
        ([128 | STORED, 129 | STORED], [bytes(128), bytes(129)], "plane 1 of 128 bytes cannot be stored in 129"),
        ([128 | STORED, STORED], [bytes(128)], "plane 1 of 128 bytes cannot be stored in 0"),
        ([0, 128 | STORED], [bytes(128)], "plane 0 of 128 bytes cannot be compressed in 0"),
        ([128, 128 | STORED], [bytes(128), bytes(128)], "plane 0 of 128 bytes cannot be compressed in 128"),
        ([2**31 - 1, 128 | STORED], [bytes(128)], "cannot be compressed in 2147483647"),
        ([128 | STORED, 128 | STORED], [bytes(128), bytes(127)], "planes end at byte 264, the section at 263"),
        ([128 | STORED, 128 | STORED], [bytes(128), bytes(129)], "planes end at byte 264, the section at 265"),
        ([128 | STORED, 20], [bytes(128), bytes(20)], "128 bytes"),
    ],
)
def test_impossible_tables_are_refused(codec: Codec, entries: list[int], planes: list[bytes], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        codec.decode([rebuilt(entries, planes)], SMALL)


@every_codec
def test_table_of_zero_planes_stored_decodes(codec: Codec) -> None:
    section = rebuilt([128 | STORED, 128 | STORED], [bytes(128), bytes(128)])
    assert not codec.decode([section], SMALL).any()


@every_compressor
@pytest.mark.parametrize("actual", [99, 101, 1, 100_000])
def test_plane_of_another_length_is_refused(compressor: Compressor, actual: int) -> None:
    data = compressor.compress(bytes(actual))
    with pytest.raises(ValueError, match="100"):
        compressor.decompress(data, 100)


@every_compressor
def test_plane_with_bytes_behind_or_cut_is_refused(compressor: Compressor) -> None:
    plane = bytes(range(100)) * 40
    data = compressor.compress(plane)
    assert compressor.decompress(data, len(plane)) == plane
    for wrong in (data + b"\0", data[:-1], data + data, data[1:], b"", data[: len(data) // 2]):
        with pytest.raises(ValueError, match=str(len(plane))):
            compressor.decompress(wrong, len(plane))


@pytest.mark.parametrize(
    "data",
    [
        zstandard.ZstdCompressor(write_content_size=False).compress(bytes(100)),
        b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd" + Zstd().compress(bytes(100)),
        Zstd().compress(bytes(50)) + Zstd().compress(bytes(50)),
        Zstd().compress(bytes(100)) + b"\x50\x2a\x4d\x18\x00\x00\x00\x00",
        Zstd().compress(bytes(100))[4:],
    ],
    ids=["no content size", "skippable frame in front", "two frames", "skippable frame behind", "no magic"],
)
def test_zstd_is_one_frame_that_says_its_size(data: bytes) -> None:
    with pytest.raises(ValueError, match="100"):
        Zstd().decompress(data, 100)


@every_compressor
def test_decompression_allocates_no_more_than_the_plane(compressor: Compressor) -> None:
    """Bombs: one that says how large it is, and one whose size is only seen as it unfolds."""
    big = compressor.compress(bytes(64 << 20))
    frame = bytearray(Zstd().compress(bytes(1000)))
    lying = [big, bytes(frame)]
    if isinstance(compressor, Zstd):
        parameters = zstandard.get_frame_parameters(big)
        assert parameters.content_size == 64 << 20
        # The size in the header of a large frame, replaced by a small one: four bytes behind the descriptor.
        small = big.replace((64 << 20).to_bytes(4, "little"), (4096).to_bytes(4, "little"), 1)
        assert zstandard.get_frame_parameters(small).content_size == 4096
        lying.append(small)
    tracemalloc.start()
    try:
        for data in lying:
            with pytest.raises(ValueError, match="4096"):
                compressor.decompress(data, 4096)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20


NORMAL = normal_block(SMALL)
MIXED = torch.where(torch.arange(16) < 12, ONES, NORMAL)


@every_codec
@settings(max_examples=200)
@given(at=st.integers(0, 10_000), bit=st.integers(0, 7), cut=st.integers(0, 3), extra=st.binary(max_size=3))
@example(at=0, bit=0, cut=0, extra=b"")
def test_mutated_sections_are_refused_or_decode_to_a_block(
    codec: Codec, at: int, bit: int, cut: int, extra: bytes
) -> None:
    section = bytearray(only_section(codec, MIXED, SMALL))
    section[at % len(section)] ^= 1 << bit
    wrong = bytes(section[: len(section) - cut]) + extra
    try:
        decoded = codec.decode([wrong], SMALL)
    except ValueError:
        return
    assert tuple(decoded.shape) == SMALL.shape


@every_codec
@settings(max_examples=200)
@given(section=st.binary(max_size=300))
def test_any_bytes_are_refused_or_decode_to_a_block(codec: Codec, section: bytes) -> None:
    try:
        decoded = codec.decode([section], SMALL)
    except ValueError:
        return
    assert tuple(decoded.shape) == SMALL.shape


def test_chunks_are_of_65536_values() -> None:
    assert CHUNK_VALUES == 65536
    assert chunk_count(KVLayout(1, 1, 128, "bfloat16", 256)) == 1
    assert chunk_count(KVLayout(1, 1, 128, "bfloat16", 257)) == 2
