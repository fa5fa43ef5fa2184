"""The CPU's kernels give the reference's bytes, void groups and values, for any numbers."""

from __future__ import annotations

import math

import pytest
import torch
from codec_blocks import any_bits, layout_id, normal_block, same_bits
from cpu_blocks import decoded_by_cpu, encoded_by_cpu
from golden_codecs import golden, golden_block, golden_names, sha256_of
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore_kernels.codecs import CODECS, get_codec
from kvstore_kernels.layout import KVLayout, Layout, MLALayout

LAYOUTS: tuple[Layout, ...] = (
    KVLayout(2, 3, 128, "bfloat16", 64),
    KVLayout(1, 2, 64, "bfloat16", 128),
    KVLayout(1, 2, 80, "bfloat16", 64),
    MLALayout(2, 256, 64, "bfloat16", 64),
    KVLayout(1, 2, 64, "float16", 64),
    KVLayout(1, 2, 128, "float32", 64),
)


def extreme_block(layout: Layout, seed: int) -> torch.Tensor:
    """Numbers of every size, ties of every quantiser, and what no codec can hold, side by side."""
    generator = torch.Generator().manual_seed(seed)
    dtype = getattr(torch, layout.dtype)
    block = torch.randn(layout.shape, generator=generator)
    for section in layout.split(block):
        section *= 10.0 ** torch.randint(-12, 5, (*section.shape[:3], 1), generator=generator)
        section[:, :, 0::9] = torch.randint(-8, 9, section[:, :, 0::9].shape, generator=generator) / 2
        section[:, :, 1::9, ::16] += 300
        section[:, :, 5:6] = torch.finfo(dtype).tiny / 3
    flat = block.view(-1)
    for value in (math.inf, -math.inf, math.nan, -math.nan, 61440.0, -61440.0, 61696.0, 0.0, -0.0):
        flat[torch.randint(0, flat.numel(), (3,), generator=generator)] = value
    return block.to(dtype)


def one_sign_block(layout: Layout, seed: int) -> torch.Tensor:
    """Planes of positive numbers beside planes of negative ones: the extremes of a group are at its own end of zero."""
    block = normal_block(layout, seed=seed).abs()
    for section in layout.split(block):
        section[:, ::2] *= -1
    return block


def few_void_bits(layout: Layout, seed: int) -> torch.Tensor:
    """Random bits of numbers that groups can hold, denormals among them."""
    return any_bits(layout, seed).nan_to_num(0.0, 0.0, 0.0).clamp(-61440, 61440)


def check_like_reference(codec_name: str, block: torch.Tensor, layout: Layout) -> None:
    codec = get_codec(codec_name)
    reference = codec.encode(block, layout)
    encoded = encoded_by_cpu(codec, block, layout)
    if codec.section_bytes(layout) is not None:
        assert encoded.sections == reference.sections
    assert encoded.void_groups == reference.void_groups
    expected = codec.decode(reference.sections, layout)
    assert same_bits(codec.decode(encoded.sections, layout), expected)
    assert same_bits(decoded_by_cpu(codec, reference.sections, layout), expected)


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
        check_like_reference(codec, block, layout)


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
    check_like_reference(codec, extreme_block(layout, seed), layout)
