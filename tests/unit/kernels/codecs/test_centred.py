"""Keys less their mean: against arithmetic done otherwise, and for what the mean must not spoil."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from codec_blocks import CENTRED
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore_kernels.codecs.base import Codec
from kvstore_kernels.codecs.turbo import Turbo, sum_of_squares
from kvstore_kernels.layout import KVLayout, MLALayout

every_codec = pytest.mark.parametrize("codec", CENTRED.values(), ids=lambda codec: codec.name)
each_width = pytest.mark.parametrize("codec", [CENTRED[f"centred{bits}"] for bits in (4, 3, 2)], ids=lambda c: c.name)
few_examples = settings(max_examples=25)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Threads would wait for each other longer than they compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def layout_of(dim: int = 128, tokens: int = 128, dtype: str = "float32") -> KVLayout:
    return KVLayout(2, 2, dim, dtype, tokens)


def keys_like_a_models(layout: KVLayout, *, seed: int = 0, sink: bool = True, outliers: bool = False) -> torch.Tensor:
    """A block whose keys have a mean of twice the rest, and a short first token far from it."""
    generator = torch.Generator().manual_seed(seed)
    block = torch.randn(layout.shape, generator=generator)
    block[:, 0] += 2 * torch.randn(layout.num_layers, 1, layout.num_kv_heads, layout.head_dim, generator=generator)
    if sink:
        block[:, 0, 0] = 0.3 * torch.randn(layout.num_layers, layout.num_kv_heads, layout.head_dim, generator=generator)
    if outliers:
        block[:, 0, :, :, [3, 7]] *= 16
    return block.to(getattr(torch, layout.dtype))


def round_trip(codec: Codec, block: torch.Tensor, layout: KVLayout) -> torch.Tensor:
    return codec.decode(codec.encode(block, layout).sections, layout)


def error(decoded: torch.Tensor, given_: torch.Tensor) -> float:
    return float((decoded.float() - given_.float()).norm() / given_.float().norm())


# ------------------------------------------------------------------ sizes


@pytest.mark.parametrize(
    ("name", "dim", "tokens", "bits"),
    [
        ("centred2", 128, 128, 2.125 + (16 / 128 + 16 / 128**2) / 2),
        ("centred3", 128, 128, 3.125 + (16 / 128 + 16 / 128**2) / 2),
        ("centred2", 64, 128, 2.25 + (16 / 128 + 16 / 128 / 64) / 2),
        ("centred4-2", 128, 64, 3.125 + (16 / 64 + 16 / 64 / 128) / 2),
        ("centred3-2", 128, 192, 2.625 + (16 / 64 + 16 / 64 / 128) / 2),
    ],
)
def test_bits_are_those_of_turbo_and_two_bytes_a_channel_and_group(
    name: str, dim: int, tokens: int, bits: float
) -> None:
    layout = layout_of(dim, tokens)
    codec = CENTRED[name]
    assert codec.bits_per_value(layout) == bits
    lengths = tuple(len(section) for section in codec.encode(keys_like_a_models(layout), layout).sections)
    assert lengths == codec.section_bytes(layout)


@every_codec
@pytest.mark.parametrize(("dim", "dtype"), [(16, "float32"), (64, "bfloat16"), (96, "float16"), (192, "bfloat16")])
def test_layouts_of_every_kind_come_back(codec: Codec, dim: int, dtype: str) -> None:
    layout = layout_of(dim, 64, dtype)
    block = keys_like_a_models(layout)
    assert error(round_trip(codec, block, layout), block) < 0.4


def test_latents_are_centred_and_rotary_keys_are_exact() -> None:
    layout = MLALayout(1, 256, 64, "bfloat16", 64)
    block = torch.randn(layout.shape).bfloat16()
    decoded = CENTRED["centred4"].decode(CENTRED["centred4"].encode(block, layout).sections, layout)
    assert torch.equal(decoded[..., 256:], block[..., 256:])
    assert 0 < error(decoded[..., :256], block[..., :256]) < 0.15


def test_tokens_that_do_not_fit_are_refused_saying_what_would() -> None:
    with pytest.raises(ValueError, match="codec centred3 needs blocks of a multiple of 64 tokens, got 96"):
        CENTRED["centred3"].check(layout_of(128, 96))


# ------------------------------------------------------------------ what it is for


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_mean_of_the_keys_costs_nothing(bits: int) -> None:
    """The error is a share of what is left, a fifth of the whole: turbo's is a share of the whole."""
    layout = layout_of()
    block = keys_like_a_models(layout, sink=False)
    keys = block[:, 0]
    centred = error(round_trip(CENTRED[f"centred{bits}"], block, layout)[:, 0], keys)
    plain = Turbo(bits)
    x = keys.transpose(1, 2)
    *codes, scales = plain.encode(x)[0]
    decoded = plain.decode((*codes, scales.squeeze(-1)), layout.planes[0], layout.block_tokens)
    assert centred < 0.55 * error(decoded, x)


def test_short_token_far_from_the_mean_keeps_its_own_accuracy() -> None:
    """Attention sinks: coded less the mean, its error would be larger than itself."""
    layout = layout_of()
    block = keys_like_a_models(layout)
    decoded = round_trip(CENTRED["centred3"], block, layout)
    assert error(decoded[:, 0, 0], block[:, 0, 0]) < 0.25
    assert error(decoded[:, 0, 1:], block[:, 0, 1:]) < 0.12


def test_channels_that_stand_out_cost_others_little() -> None:
    layout = layout_of()
    others = [channel for channel in range(128) if channel not in (3, 7)]
    usual, standing = keys_like_a_models(layout), keys_like_a_models(layout, outliers=True)
    errors = [
        error(round_trip(CENTRED["centred3"], block, layout)[:, 0][..., others], block[:, 0][..., others])
        for block in (usual, standing)
    ]
    assert errors[1] < 2 * errors[0]


@every_codec
def test_vectors_keep_the_product_with_themselves_where_channels_are_alike(codec: Codec) -> None:
    layout = layout_of()
    block = keys_like_a_models(layout, sink=False)
    keys, decoded = (b[:, 0].float() for b in (block, round_trip(codec, block, layout)))
    mean = keys.mean(1, keepdim=True)
    products = ((keys - mean) * (decoded - mean)).sum(-1) / (keys - mean).pow(2).sum(-1)
    assert float(products.mean()) == pytest.approx(1, abs=0.02)


# ------------------------------------------------------------------ to the bit


def encode_one_group(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Means, exponents, what turbo gets and which vectors are far, of ``[T, 128]``, one number after the other."""
    one, tokens = np.float32, len(x)
    mean = np.zeros(128, one)
    mean[:] = x[0]
    for row in x[1:]:
        mean = mean + row
    mean = mean * one(1 / tokens)
    scale = max(np.float16(np.abs(mean).max() * one(1 / 127)), np.uint16(0x00A8).view(np.float16)).astype(one)
    mean = np.rint(mean * (one(1) / scale)) * scale
    centred = x - mean
    squares = [sum_of_squares(torch.from_numpy(part)).squeeze(-1).numpy() for part in (x, centred)]
    far = squares[0] < squares[1]
    chosen = np.where(far[:, None], x, centred)
    strength = chosen[0] * chosen[0]
    for row in chosen[1:]:
        strength = strength + row * row
    exponents = np.array([math.floor((math.frexp(s)[1] - 1 + 1) / 2) if s else -20 for s in strength.tolist()])
    exponents = exponents.clip(-20, 20)
    scaled = chosen * np.array([one(2.0 ** (-k / 2)) for k in exponents])
    return mean, exponents, scaled, far


@few_examples
@given(st.integers(0, 1000), st.sampled_from([64, 128]), st.floats(-10, 8))
def test_section_equals_the_page_followed_step_by_step(seed: int, tokens: int, octaves: float) -> None:
    layout = KVLayout(1, 1, 128, "float32", tokens)
    block = keys_like_a_models(layout, seed=seed) * 2**octaves
    codec = CENTRED["centred3"]
    keys = codec.encode(block, layout).sections[0]
    mean, exponents, scaled, far = encode_one_group(block[0, 0, :, 0].numpy())
    codes, signs, scales = (t[0, 0] for t in Turbo(3).encode(torch.from_numpy(scaled)[None, None])[0])
    head = codes.numpy().tobytes() + signs.numpy().tobytes()
    assert keys.startswith(head)
    at = len(head)
    stored = np.frombuffer(keys, np.float16, tokens, at)
    assert np.array_equal(np.signbit(stored), far)
    assert np.array_equal(np.abs(stored), scales.squeeze(-1).numpy())
    at += 2 * tokens
    mean_scale = np.frombuffer(keys, np.float16, 1, at).astype(np.float32)
    assert np.array_equal(np.frombuffer(keys, np.int8, 128, at + 2) * mean_scale, mean)
    assert np.array_equal(np.frombuffer(keys, np.int8, 128, at + 130), exponents)
    assert len(keys) == at + 258


def test_decoded_keys_equal_the_page_followed_step_by_step() -> None:
    layout = KVLayout(1, 1, 128, "float32", 64)
    block = keys_like_a_models(layout)
    codec = CENTRED["centred2"]
    decoded = round_trip(codec, block, layout)[0, 0, :, 0]
    mean, exponents, _, far = encode_one_group(block[0, 0, :, 0].numpy())
    turbo = Turbo(2)
    section = codec.encode(block, layout).sections[0]
    tensors = (torch.frombuffer(bytearray(section[: 64 * 32]), dtype=torch.uint8).view(1, 1, 64, 16, 2),)
    scales = torch.frombuffer(bytearray(section[64 * 32 : 64 * 34]), dtype=torch.float16).abs().view(1, 1, 64)
    values = turbo.decode((*tensors, scales), layout.planes[0], 64)[0, 0].numpy()
    values = values * np.array([np.float32(2.0 ** (k / 2)) for k in exponents])
    assert np.array_equal(decoded.numpy(), np.where(far[:, None], values, values + mean))


# ------------------------------------------------------------------ every input


@every_codec
def test_zeros_constants_and_denormals_are_ordinary(codec: Codec) -> None:
    layout = layout_of()
    zeros = torch.zeros(layout.shape)
    assert torch.equal(round_trip(codec, zeros, layout), zeros)
    for value in (3.0, -1e-40, 500.0):
        decoded = round_trip(codec, torch.full(layout.shape, value), layout)
        assert float((decoded[:, 0] - value).abs().max()) <= max(abs(value) / 100, 1e-4)


@each_width
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e30])
def test_void_vector_decodes_to_zeros_and_leaves_the_others_alone(codec: Codec, bad: float) -> None:
    layout = layout_of()
    block = keys_like_a_models(layout)
    block[:, 0, 5] = 0
    expected = codec.decode(codec.encode(block, layout).sections, layout)
    block[0, 0, 5, 1, 9] = bad
    encoded = codec.encode(block, layout)
    decoded = codec.decode(encoded.sections, layout)
    assert encoded.void_groups == 1
    assert torch.equal(decoded[0, 0, 5, 1], torch.zeros(128))
    assert torch.equal(decoded, expected)


@each_width
@few_examples
@given(st.integers(0, 100), st.integers(-30, 7))
def test_scale_of_the_input_does_not_break_it(codec: Codec, seed: int, exponent: int) -> None:
    layout = KVLayout(1, 1, 64, "float32", 64)
    block = keys_like_a_models(layout, seed=seed) * 2.0**exponent
    encoded = codec.encode(block, layout)
    decoded = codec.decode(encoded.sections, layout)
    assert encoded.void_groups == 0
    assert decoded.isfinite().all()
    if exponent > -10:
        assert error(decoded, block) < 0.4


@each_width
@few_examples
@given(st.data())
def test_any_section_bytes_decode_without_a_crash(codec: Codec, data: st.DataObject) -> None:
    layout = KVLayout(1, 1, 16, "bfloat16", 64)
    sizes = codec.section_bytes(layout)
    assert sizes is not None
    sections = [data.draw(st.binary(min_size=size, max_size=size)) for size in sizes]
    assert codec.decode(sections, layout).shape == layout.shape
