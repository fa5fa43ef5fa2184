"""How far decoded values are from the original: bounds for each rule, and the fidelity that the registry states."""

from __future__ import annotations

import pytest
import torch
from codec_blocks import DTYPES, LOSSY, STEP_SLACK, lossy_roles, normal_block, round_trip, snr_db
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore_kernels.codecs import Codec, arithmetic, get_codec
from kvstore_kernels.codecs.turbo import hadamard, sum_of_squares
from kvstore_kernels.layout import KVLayout, MLALayout

seeds = st.integers(0, 2**32)
scales = st.sampled_from([1e-3, 0.1, 1.0, 30.0, 4000.0])


def spread(x: torch.Tensor, axis: int, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Least and greatest number of each element's group, along an axis."""
    groups = x.unflatten(axis, (-1, group))
    axis = axis + 1 if axis >= 0 else axis
    low, high = groups.amin(axis, keepdim=True), groups.amax(axis, keepdim=True)
    flat = axis - 1
    return low.expand(groups.shape).flatten(flat, flat + 1), high.expand(groups.shape).flatten(flat, flat + 1)


@settings(max_examples=20)
@given(seed=seeds, scale=scales, dtype=st.sampled_from(DTYPES), offset=st.sampled_from([0.0, 5.0, -100.0]))
@pytest.mark.parametrize(
    ("name", "role", "axis", "group", "bits"),
    [
        ("int4", 0, 3, 64, 4),
        ("int4", 1, 3, 64, 4),
        ("kivi4", 0, 2, 64, 4),
        ("kivi4", 1, 3, 64, 4),
        ("kivi2", 0, 2, 32, 2),
        ("kivi2", 1, 3, 32, 2),
    ],
)
def test_asymmetric_error_is_half_a_step_and_the_rounding_of_parameters(
    name: str, role: int, axis: int, group: int, bits: int, seed: int, scale: float, dtype: str, offset: float
) -> None:
    layout = KVLayout(1, 1, 128, dtype, 64)
    block = (normal_block(layout, seed).float() * scale + offset).to(getattr(torch, dtype))
    x, y = (layout.split(each)[role].float() for each in (block, round_trip(get_codec(name), block, layout)))
    low, high = spread(x, axis, group)
    step = ((high - low) / (2**bits - 1)).clamp(min=arithmetic.FLOOR) * (1 + 2.0**-11)
    rounding = low.abs() * 2.0**-11 + (high - low) * 2.0**-11 + y.abs() * STEP_SLACK[dtype] + 2.0**-25
    assert ((x - y).abs() <= step / 2 + rounding).all()


@settings(max_examples=20)
@given(seed=seeds, scale=scales, dtype=st.sampled_from(DTYPES))
def test_int8_error_is_half_a_step(seed: int, scale: float, dtype: str) -> None:
    layout = KVLayout(1, 1, 128, dtype, 64)
    block = (normal_block(layout, seed).float() * scale).to(getattr(torch, dtype))
    x, y = block.float(), round_trip(get_codec("int8"), block, layout).float()
    step = (x.abs().amax(-1, keepdim=True) / 127).clamp(min=arithmetic.FLOOR) * (1 + 2.0**-11)
    assert ((x - y).abs() <= step * 0.5 * (1 + 2.0**-10) + y.abs() * STEP_SLACK[dtype]).all()


@settings(max_examples=20)
@given(seed=seeds, scale=scales, dtype=st.sampled_from(DTYPES))
def test_fp8_error_is_a_sixteenth_of_a_value_or_half_the_least_step(seed: int, scale: float, dtype: str) -> None:
    layout = KVLayout(1, 1, 128, dtype, 64)
    block = (normal_block(layout, seed).float() * scale).to(getattr(torch, dtype))
    x, y = block.float(), round_trip(get_codec("fp8"), block, layout).float()
    group_scale = (x.abs().amax((2, 4), keepdim=True) / 448).clamp(min=arithmetic.FLOOR)
    bound = torch.maximum(x.abs() / 16, group_scale * 2.0**-10)
    assert ((x - y).abs() <= bound * (1 + 2.0**-9) + y.abs() * STEP_SLACK[dtype]).all()


@pytest.mark.parametrize("name", ["turbo4", "turbo3", "turbo2", "turbo4-3", "turbo3-2"])
@pytest.mark.parametrize("dim", [16, 32, 64, 128])
def test_turbo_keeps_the_product_of_a_vector_with_itself(name: str, dim: int) -> None:
    layout = KVLayout(2, 2, dim, "float32", 64)
    for seed, scale in enumerate([0.1, 1.0, 50.0]):
        block = normal_block(layout, seed, outliers=True) * scale
        decoded = round_trip(get_codec(name), block, layout)
        products = (block.double() * decoded.double()).sum(-1)
        squares = block.double().square().sum(-1)
        assert ((products - squares).abs() <= squares * 2.0**-10).all()


@pytest.mark.parametrize("elements", [16, 32, 64, 128])
def test_hadamard_is_the_matrix_and_its_own_inverse(elements: int) -> None:
    identity = torch.eye(elements)
    matrix = hadamard(identity)
    sylvester = torch.tensor(
        [[(-1.0) ** bin(row & column).count("1") for column in range(elements)] for row in range(elements)]
    )
    assert torch.equal(matrix, sylvester)
    assert torch.equal(hadamard(matrix) / elements, identity)


def test_sum_of_squares_follows_its_tree() -> None:
    """One large and many small squares: the sum depends on the order, here found by hand."""
    vectors = torch.full((1, 16), 2.0**-12)
    vectors[0, 0] = 1.0
    # 1 + 2^-24 is 1: element 1 is lost; the other pairs are 2^-23 each, and added among themselves first only where
    # the tree does so: lane 4 joins lane 0, then (2 + 6), then (1 + 3 + 5 + 7).
    expected = ((1.0 + 2.0**-23) + 2.0**-22) + 2.0**-21
    assert sum_of_squares(vectors).item() == expected
    assert vectors.double().square().sum().item() != expected


@pytest.mark.parametrize("codec", LOSSY, ids=lambda codec: codec.name)
def test_fidelity_is_four_times_the_decibels_of_the_worse_half(codec: Codec) -> None:
    """The registry's numbers are those of a model; normal numbers are within 1.5 dB of it."""
    layout = KVLayout(1, 2, 128, "bfloat16", 256)
    block = normal_block(layout, 1)
    decoded = round_trip(codec, block, layout)
    worse = min(snr_db(x, y) for x, y in zip(layout.split(block.float()), layout.split(decoded.float()), strict=True))
    assert abs(4 * worse - codec.fidelity) <= 6


def test_fidelity_of_more_bits_is_higher_on_latents_too() -> None:
    layout = MLALayout(1, 256, 64, "bfloat16", 64)
    block = normal_block(layout, 2)
    by_name = {
        codec.name: snr_db(layout.split(block.float())[0], layout.split(round_trip(codec, block, layout).float())[0])
        for codec in LOSSY
    }
    assert by_name["int8"] > by_name["fp8"] > by_name["kivi4"] > by_name["turbo3"] > by_name["turbo2"]
    assert lossy_roles(layout) == [0]


def test_channels_that_stand_out_spoil_int4_keys_and_not_those_of_kivi4() -> None:
    layout = KVLayout(2, 2, 128, "float32", 64)
    block = normal_block(layout, 3, outliers=True)
    usual = torch.ones(128, dtype=torch.bool)
    usual[3] = usual[-5] = False
    error = {}
    for name in ("int4", "kivi4", "turbo4"):
        keys, decoded = layout.split(block)[0], layout.split(round_trip(get_codec(name), block, layout))[0]
        error[name] = float((keys - decoded)[..., usual].norm() / keys[..., usual].norm())
    assert error["kivi4"] < 0.1
    assert error["int4"] > 2 * error["kivi4"]
    assert error["turbo4"] > 1.2 * error["kivi4"]


def test_codes_do_not_depend_on_flushing_denormals() -> None:
    layout = KVLayout(1, 2, 64, "float32", 64)
    block = normal_block(layout, 4)
    block[:, :, 1:9] *= 2.0**-130
    block[:, :, 9:20, :, ::2] *= 2.0**-128
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormals")
    try:
        flushed = [codec.encode(block, layout) for codec in LOSSY]
    finally:
        torch.set_flush_denormal(False)
    assert flushed == [codec.encode(block, layout) for codec in LOSSY]
