"""What all codecs have in common: sizes as declared, planes on their own, every input defined, the rest refused."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from codec_blocks import (
    LAYOUTS,
    LOSSY,
    any_bits,
    layout_id,
    normal_block,
    round_trip,
    same_bits,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore_kernels.codecs import CODECS, Codec, Region, codec_of_id, get_codec
from kvstore_kernels.layout import KVLayout, Layout, MLALayout, Rule

GQA = KVLayout(1, 2, 64, "bfloat16", 64)
TORCH_DTYPES = {"uint16": "int16", "uint32": "int32"}

every_codec = pytest.mark.parametrize("codec", CODECS.values(), ids=lambda codec: codec.name)
every_lossy = pytest.mark.parametrize("codec", LOSSY, ids=lambda codec: codec.name)


def is_rotated(codec: Codec) -> bool:
    return codec.name.startswith(("turbo", "centred"))


every_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=layout_id)


def regions_of(codec: Codec, section: bytes, layout: Layout, index: int) -> dict[str, torch.Tensor]:
    """The arrays of a section by name, cut as the regions say."""
    arrays, at = {}, 0
    for region in codec.regions(layout.planes[index], layout.block_tokens):
        data = bytearray(section[at : at + region.region_bytes])
        dtype = getattr(torch, TORCH_DTYPES.get(region.dtype, region.dtype))
        arrays[region.name] = torch.frombuffer(data, dtype=dtype).view(region.shape)
        at += region.region_bytes
    assert at == len(section)
    return arrays


# ------------------------------------------------------------------ sizes


@every_layout
@every_codec
def test_sections_have_the_sizes_declared_and_decode_to_a_block(codec: Codec, layout: Layout) -> None:
    encoded = codec.encode(normal_block(layout), layout)
    lengths = tuple(len(section) for section in encoded.sections)
    declared, most = codec.section_bytes(layout), codec.max_section_bytes(layout)
    assert encoded.void_groups == 0
    assert len(lengths) == len(most) == (1 if codec.whole else len(layout.planes))
    assert all(length <= bound for length, bound in zip(lengths, most, strict=True))
    if declared is None:
        assert codec.bits_per_value(layout) is None
    else:
        assert lengths == declared == most
        assert codec.bits_per_value(layout) == 8 * sum(lengths) / math.prod(layout.shape)
    decoded = codec.decode(encoded.sections, layout)
    assert tuple(decoded.shape) == layout.shape
    assert decoded.is_contiguous()
    assert decoded.isfinite().all()


@every_layout
@every_lossy
def test_regions_begin_with_layer_and_head_and_fill_the_section(codec: Codec, layout: Layout) -> None:
    sizes = codec.section_bytes(layout)
    assert sizes is not None
    for planes, size in zip(layout.planes, sizes, strict=True):
        regions = codec.regions(planes, layout.block_tokens)
        assert sum(region.region_bytes for region in regions) == size
        if planes.rule is Rule.EXACT:
            assert regions == (Region("values", (planes.num_layers, layout.block_tokens, planes.dim), layout.dtype),)
            assert codec.plane_codec(planes) == "exact"
        else:
            assert {region.shape[:2] for region in regions} == {(planes.num_layers, planes.num_heads)}


def test_plane_codecs_are_named_by_role() -> None:
    key, value = GQA.planes
    latent, rotary = MLALayout(1, 128, 64, "bfloat16", 64).planes
    names = {
        codec.name: [codec.plane_codec(planes) for planes in (key, value, latent, rotary)]
        for codec in LOSSY
        if codec.name in ("int4", "kivi4", "kivi2", "turbo4", "turbo3-2", "centred4-2")
    }
    assert names == {
        "int4": ["int4", "int4", "int4", "exact"],
        "kivi4": ["kivi4k", "kivi4v", "kivi4k", "exact"],
        "kivi2": ["kivi2k", "kivi2v", "kivi2k", "exact"],
        "turbo4": ["turbo4", "turbo4", "turbo4", "exact"],
        "turbo3-2": ["turbo3", "turbo2", "turbo3", "exact"],
        "centred4-2": ["centred4k", "turbo2", "centred4k", "exact"],
    }


@pytest.mark.parametrize("name", ["raw", "lossless", "lossless-zstd"])
def test_codecs_of_whole_blocks_have_no_planes(name: str) -> None:
    codec = get_codec(name)
    assert codec.whole
    assert codec.exact
    with pytest.raises(ValueError, match="one section for the whole block"):
        codec.regions(GQA.planes[0], 64)
    with pytest.raises(ValueError, match="one section for the whole block"):
        codec.plane_codec(GQA.planes[0])


# ------------------------------------------------------------------ planes on their own


@every_lossy
@pytest.mark.parametrize("dim", [128, 96, 16])
def test_each_plane_is_encoded_by_itself(codec: Codec, dim: int) -> None:
    layout = KVLayout(2, 3, dim, "float32", 64)
    alone = dataclasses.replace(layout, num_layers=1, num_kv_heads=1)
    block = normal_block(layout, outliers=True)
    sections = codec.encode(block, layout).sections
    for layer in range(2):
        for head in range(3):
            single = codec.encode(block[layer : layer + 1, :, :, head : head + 1], alone).sections
            for index in range(2):
                whole = regions_of(codec, sections[index], layout, index)
                for name, array in regions_of(codec, single[index], alone, index).items():
                    assert same_bits(array[0, 0], whole[name][layer, head]), (name, layer, head)


@every_codec
def test_strides_of_the_block_do_not_matter(codec: Codec) -> None:
    block = normal_block(GQA)
    padded = torch.zeros(1, 2, 70, 2, 80, dtype=torch.bfloat16)
    strided = padded[:, :, 3:67, :, 8:72]
    strided.copy_(block)
    mixed = block.permute(4, 2, 3, 1, 0).contiguous().permute(4, 3, 1, 2, 0)
    assert not mixed.is_contiguous()
    expected = codec.encode(block, GQA).sections
    assert codec.encode(strided, GQA).sections == expected
    assert codec.encode(mixed, GQA).sections == expected


@every_lossy
def test_rotary_keys_are_stored_as_they_are(codec: Codec) -> None:
    layout = MLALayout(2, 128, 16, "float16", 64)
    block = any_bits(layout, 3)
    encoded = codec.encode(block, layout)
    rotary = layout.split(block)[1]
    assert encoded.sections[1] == rotary.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    assert same_bits(layout.split(codec.decode(encoded.sections, layout))[1], rotary)


# ------------------------------------------------------------------ every input is defined


@every_codec
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_zeros_of_either_sign_stay_zeros(codec: Codec, dtype: str) -> None:
    layout = dataclasses.replace(GQA, dtype=dtype)
    for zero in (0.0, -0.0):
        block = torch.full(layout.shape, zero, dtype=getattr(torch, dtype))
        encoded = codec.encode(block, layout)
        assert encoded.void_groups == 0
        assert not codec.decode(encoded.sections, layout).any()


@every_lossy
def test_parameters_hold_no_negative_zero(codec: Codec) -> None:
    block = normal_block(GQA) * 1e-9
    block[:, :, 3] = -0.0
    sections = codec.encode(block, GQA).sections
    for index, section in enumerate(sections):
        for name, array in regions_of(codec, section, GQA, index).items():
            if array.dtype == torch.float16:
                assert not (array.view(torch.int16) == -32768).any(), name


@pytest.mark.parametrize("codec", [codec for codec in LOSSY if not is_rotated(codec)], ids=lambda codec: codec.name)
@pytest.mark.parametrize("value", [1.0, -3.5, 0.1, 1e-3, 500.0, -61440.0])
def test_blocks_of_one_value_decode_close_to_it(codec: Codec, value: float) -> None:
    layout = dataclasses.replace(GQA, dtype="float32")
    block = torch.full(layout.shape, value)
    decoded = round_trip(codec, block, layout)
    # The floor of scales lets small numbers keep three bits in fp8.
    relative = 2.0**-4 if codec.name == "fp8" else 2.0**-10
    assert ((decoded - block).abs() <= abs(value) * relative + 1e-5).all()


@every_lossy
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_denormals_are_ordinary_numbers(codec: Codec, dtype: str) -> None:
    layout = dataclasses.replace(GQA, dtype=dtype)
    least = torch.finfo(getattr(torch, dtype)).tiny
    block = (normal_block(layout).float() * least / 8).to(getattr(torch, dtype))
    assert (block.abs() < least).any()
    encoded = codec.encode(block, layout)
    assert encoded.void_groups == 0
    decoded = codec.decode(encoded.sections, layout)
    assert ((decoded - block).abs() <= 2e-5).all()


@pytest.mark.parametrize(
    "codec", [codec for codec in LOSSY if not codec.name.startswith("centred")], ids=lambda codec: codec.name
)
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan, 61441.0, -1e30], ids=str)
def test_void_group_decodes_to_zeros_and_leaves_the_others_alone(codec: Codec, bad: float) -> None:
    layout = KVLayout(1, 2, 64, "float32", 128)
    block = normal_block(layout)
    marked = block.clone()
    marked[0, :, 70, 1, 9] = bad
    encoded = codec.encode(marked, layout)
    before, after = round_trip(codec, block, layout), codec.decode(encoded.sections, layout)
    changed = before != after
    assert encoded.void_groups == 2
    assert changed[0, 0, 70, 1, 9]
    assert changed[0, 1, 70, 1, 9]
    assert not after[changed].any()
    assert not changed[:, :, :, 0].any()
    expected = {"fp8": 64 * 64, "int8": 64, "int4": 64, "kivi4": 64, "kivi2": 32}.get(codec.name, 64)
    for role in range(2):
        assert expected * 0.9 <= int(changed[:, role].sum()) <= expected


@every_lossy
def test_limit_itself_is_not_void(codec: Codec) -> None:
    layout = dataclasses.replace(GQA, dtype="float32")
    block = normal_block(layout)
    largest = 2.0**13 if is_rotated(codec) else 61440.0
    block[0, :, 5, 0] = 0
    block[0, :, 5, 0, 7] = largest
    encoded = codec.encode(block, layout)
    assert encoded.void_groups == 0
    decoded = codec.decode(encoded.sections, layout)[0, :, 5, 0, 7]
    assert (decoded - largest).abs().max() <= largest * (0.3 if is_rotated(codec) else 2.0**-10)
    block[0, :, 5, 0, 7] = largest * (1 + 2.0**-20)
    assert codec.encode(block, layout).void_groups == 2


@every_lossy
@settings(max_examples=15)
@given(seed=st.integers(0, 2**32), dtype=st.sampled_from(["bfloat16", "float16", "float32"]))
def test_any_bits_decode_to_finite_values(codec: Codec, seed: int, dtype: str) -> None:
    layout = KVLayout(1, 1, 32, dtype, 64)
    block = any_bits(layout, seed)
    decoded = round_trip(codec, block, layout)
    assert decoded.isfinite().all()


@every_lossy
@settings(max_examples=15)
@given(seed=st.integers(0, 2**32), exponent=st.integers(-30, 12))
def test_scale_of_the_input_does_not_break_it(codec: Codec, seed: int, exponent: int) -> None:
    layout = KVLayout(1, 1, 64, "float32", 64)
    block = normal_block(layout, seed) * 2.0**exponent
    encoded = codec.encode(block, layout)
    decoded = codec.decode(encoded.sections, layout)
    assert encoded.void_groups == 0 or (is_rotated(codec) and exponent > 8)
    if -7 <= exponent <= 8:
        relative = (decoded - block).norm() / block.norm()
        assert relative < (0.45 if "2" in codec.name else 0.21)


@every_lossy
@settings(max_examples=15)
@given(sections=st.data())
def test_any_section_bytes_decode_without_a_crash(codec: Codec, sections: st.DataObject) -> None:
    layout = KVLayout(1, 1, 16, "bfloat16", 64)
    sizes = codec.section_bytes(layout)
    assert sizes is not None
    seed = sections.draw(st.integers(0, 2**32))
    generator = torch.Generator().manual_seed(seed)
    raw = [bytes(torch.randint(0, 256, (size,), generator=generator, dtype=torch.uint8).tolist()) for size in sizes]
    assert tuple(codec.decode(raw, layout).shape) == layout.shape


# ------------------------------------------------------------------ refusals


def test_unknown_names_and_ids_are_refused_listing_the_known() -> None:
    with pytest.raises(ValueError, match="unknown codec 'kivi8'; known are raw, lossless, "):
        get_codec("kivi8")
    for wrong in (0, 20, 65535):
        with pytest.raises(ValueError, match=f"unknown codec id {wrong}"):
            codec_of_id(wrong)
    assert [codec_of_id(codec.id) for codec in CODECS.values()] == list(CODECS.values())


@every_lossy
@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn", "float8_e5m2", "uint8"])
def test_quantised_caches_are_for_exact_codecs_only(codec: Codec, dtype: str) -> None:
    for layout in (dataclasses.replace(GQA, dtype=dtype), MLALayout(1, 128, 64, dtype, 64)):
        with pytest.raises(ValueError, match=rf"codec {codec.name} .*got {dtype}: use an exact codec \(raw, lossless"):
            codec.check(layout)
        with pytest.raises(ValueError, match="use an exact codec"):
            codec.section_bytes(layout)


@every_lossy
@pytest.mark.parametrize("dim", [8, 24, 100])
def test_dimension_must_be_a_multiple_of_16(codec: Codec, dim: int) -> None:
    with pytest.raises(ValueError, match=rf"codec {codec.name} .*multiple of 16, got {dim}"):
        codec.check(dataclasses.replace(GQA, head_dim=dim))


@every_lossy
def test_latent_that_cannot_be_cut_is_refused(codec: Codec) -> None:
    with pytest.raises(ValueError, match="latent of 100"):
        codec.check(MLALayout(1, 100, 64, "bfloat16", 64))


@pytest.mark.parametrize(
    ("name", "dim", "tokens", "refused"),
    [
        ("kivi4", 128, 64, False),
        ("kivi4", 128, 96, True),
        ("kivi2", 128, 96, False),
        ("kivi2", 128, 48, True),
        ("turbo4", 128, 1, False),
        ("turbo3", 64, 1, True),
        ("turbo3", 64, 2, False),
        ("turbo2", 80, 4, True),
        ("turbo2", 80, 8, False),
        ("int4", 16, 1, False),
        ("int8", 16, 1, False),
        ("fp8", 16, 1, False),
    ],
)
def test_tokens_that_do_not_fit_are_refused_saying_what_would(name: str, dim: int, tokens: int, refused: bool) -> None:
    codec, layout = get_codec(name), KVLayout(1, 1, dim, "bfloat16", tokens)
    if not refused:
        codec.check(layout)
        assert round_trip(codec, normal_block(layout), layout).isfinite().all()
        return
    with pytest.raises(ValueError, match=rf"codec {name} needs blocks of a multiple of \d+ tokens.*got {tokens}"):
        codec.check(layout)


@every_codec
def test_block_of_another_layout_is_refused(codec: Codec) -> None:
    with pytest.raises(ValueError, match=r"bfloat16 \[1, 2, 64, 2, 64\], got float32"):
        codec.encode(normal_block(GQA).float(), GQA)
    with pytest.raises(ValueError, match=r"got bfloat16 \[1, 2, 32, 2, 64\]"):
        codec.encode(normal_block(GQA)[:, :, :32], GQA)


@every_codec
def test_sections_of_another_layout_are_refused(codec: Codec) -> None:
    sections = codec.encode(normal_block(GQA), GQA).sections
    for wrong in ([], sections[:-1], [*sections, b""], [section[:-1] for section in sections]):
        with pytest.raises(ValueError, match="section"):
            codec.decode(wrong, GQA)
    with pytest.raises(ValueError, match="section"):
        codec.decode([section + b"\0" for section in sections], GQA)


@every_codec
def test_sections_may_be_any_buffer(codec: Codec) -> None:
    sections = codec.encode(normal_block(GQA), GQA).sections
    expected = codec.decode(sections, GQA)
    assert same_bits(codec.decode([memoryview(bytearray(section)) for section in sections], GQA), expected)
