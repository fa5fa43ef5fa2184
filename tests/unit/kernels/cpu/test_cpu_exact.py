"""The CPU's kernels give the reference's bytes, void groups and values, for any numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from codec_blocks import any_bits, layout_id, normal_block, same_bits
from cpu_blocks import decoded_by_cpu, encoded_by_cpu, first_block
from golden_codecs import golden, golden_block, golden_names, sha256_of
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.kernels.cpu.codec_checks import check_like_reference, extreme_block, few_void_bits, one_sign_block

from kvstore_kernels import cpu
from kvstore_kernels.codecs import CODECS, get_codec
from kvstore_kernels.layout import KVLayout, Layout, MLALayout
from kvstore_kernels.paged import PagedKV

LAYOUTS: tuple[Layout, ...] = (
    KVLayout(2, 3, 128, "bfloat16", 64),
    KVLayout(1, 2, 64, "bfloat16", 128),
    KVLayout(1, 2, 80, "bfloat16", 64),
    MLALayout(2, 256, 64, "bfloat16", 64),
    KVLayout(1, 2, 64, "float16", 64),
    KVLayout(1, 2, 128, "float32", 64),
)


@pytest.mark.parametrize("codec", [name for name in CODECS if "-" not in name or name == "lossless-zstd"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=layout_id)
def test_any_numbers_give_the_bytes_and_values_of_the_reference(codec: str, layout: Layout) -> None:
    for block in (
        normal_block(layout, seed=1, outliers=True),
        extreme_block(layout, seed=2),
        few_void_bits(layout, seed=3),
        any_bits(layout, seed=4),
        one_sign_block(layout, seed=5),
    ):
        check_like_reference(get_codec(codec), block, layout)


@pytest.mark.parametrize(("block", "codec"), golden_names())
def test_golden_blocks_give_and_decode_golden_bytes(block: str, codec: str) -> None:
    expected = golden(block, codec)
    encoded = encoded_by_cpu(get_codec(codec), golden_block(block), expected.layout)
    if not get_codec(codec).whole:
        assert encoded.sections == expected.sections
    assert encoded.void_groups == expected.void_groups
    decoded = decoded_by_cpu(get_codec(codec), expected.sections, expected.layout)
    assert sha256_of(decoded) == expected.decoded_sha256


@pytest.mark.parametrize("codec", CODECS)
def test_decoding_to_unaligned_memory_gives_the_same(codec: str) -> None:
    layout = LAYOUTS[0]
    sections = get_codec(codec).encode(normal_block(layout), layout).sections
    aligned = decoded_by_cpu(get_codec(codec), sections, layout)
    for offset in (2, 16, 32):
        assert same_bits(decoded_by_cpu(get_codec(codec), sections, layout, offset=offset), aligned)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "int8", "uint8"])
@pytest.mark.parametrize("codec", ["raw", "lossless", "lossless-zstd"])
@pytest.mark.parametrize("dim", [64, 9])
def test_quantised_caches_are_stored_exactly(codec: str, dtype: str, dim: int) -> None:
    layout = KVLayout(2, 3, dim, dtype, 7)
    blocks = [any_bits(layout, seed) for seed in (5, 6)]
    encoded = [encoded_by_cpu(get_codec(codec), block, layout) for block in blocks]
    # In this order memory that is used again holds the other block's bytes.
    for block, one in zip(blocks, encoded, strict=True):
        assert same_bits(decoded_by_cpu(get_codec(codec), one.sections, layout), block)


@pytest.mark.parametrize(
    "layout", [KVLayout(2, 2, 9, "float32", 64), MLALayout(2, 128, 24, "float16", 64)], ids=layout_id
)
def test_elements_that_lie_apart_and_are_no_whole_vectors(layout: Layout) -> None:
    """Nothing beside them is written."""
    between = torch.full((*layout.shape, 2), 3, dtype=getattr(torch, layout.dtype))
    block = normal_block(layout)
    between[..., 0] = block
    kv = PagedKV.from_tensor(layout, between[..., 0])
    for name in ("raw", "lossless") if isinstance(layout, KVLayout) else ("raw", "lossless", "int8", "centred4"):
        codec = get_codec(name)
        encoded = encoded_by_cpu(codec, between[..., 0], layout)
        expected = codec.decode(encoded.sections, layout)
        assert name == "lossless" or encoded.sections == codec.encode(block, layout).sections
        payload = np.frombuffer(b"".join(encoded.sections), np.uint8)
        between.fill_(3)
        lengths = np.array([[len(section) for section in encoded.sections]])
        cpu.decode(codec, kv, first_block(), np.array([payload.ctypes.data], np.uint64), lengths)
        assert same_bits(between[..., 0].contiguous(), expected)
        assert (between[..., 1] == 3).all()
        between[..., 0] = block


@settings(max_examples=40)
@given(st.data())
def test_any_shape_gives_the_bytes_of_the_reference(data: st.DataObject) -> None:
    """Every codec; layers, heads, tokens (odd ones too) and channels of all kinds."""
    layout = KVLayout(
        data.draw(st.integers(1, 3)),
        data.draw(st.integers(1, 3)),
        data.draw(st.sampled_from([64, 80, 96, 128, 192, 256])),
        "bfloat16",
        data.draw(st.one_of(st.integers(1, 70), st.sampled_from([64, 128, 192]))),
    )
    fitting = []
    for codec in CODECS.values():
        try:
            codec.check(layout)
        except ValueError:
            continue
        fitting.append(codec.name)
    codec, seed = data.draw(st.sampled_from(fitting)), data.draw(st.integers(0, 99))
    check_like_reference(get_codec(codec), extreme_block(layout, seed), layout)
