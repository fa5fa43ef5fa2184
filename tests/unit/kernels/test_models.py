"""Groups of layers: bytes of tokens, blocks and prefixes, with and without codecs, and times over links."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore_kernels.codecs import CODECS, get_codec
from kvstore_kernels.layout import KVLayout, MLALayout
from kvstore_kernels.models import ALL, LAST, LayerGroup, ModelLayout, Reach, transfer_s, window

FULL = LayerGroup("full", (1, 3, 5), KVLayout(3, 2, 64, "bfloat16", 64), ALL)
SLIDING = LayerGroup("window", (0, 2, 4), KVLayout(3, 2, 64, "bfloat16", 64), window(128))
STATE = LayerGroup("state", (6,), KVLayout(1, 1, 32, "float32", 64), LAST)
HYBRID = ModelLayout((FULL, SLIDING, STATE))
LATENT = ModelLayout((LayerGroup("full", (0, 1), MLALayout(2, 512, 64, "bfloat16", 64), ALL),))


def test_bytes_of_a_model_are_those_of_its_groups() -> None:
    assert HYBRID.token_bytes == 2 * (3 * 2 * 2 * 64 * 2) + 2 * 32 * 4
    assert HYBRID.block_bytes == 64 * HYBRID.token_bytes
    assert HYBRID.block_tokens == 64
    assert LATENT.token_bytes == 2 * (512 + 64) * 2


@pytest.mark.parametrize(
    ("num_tokens", "full", "sliding", "state"), [(63, 0, 0, 0), (64, 1, 1, 1), (130, 2, 2, 1), (6400, 100, 2, 1)]
)
def test_prefix_needs_the_blocks_in_each_reach(num_tokens: int, full: int, sliding: int, state: int) -> None:
    group_block = FULL.layout.block_bytes
    assert HYBRID.prefix_bytes(num_tokens) == (full + sliding) * group_block + state * STATE.layout.block_bytes


@given(st.integers(1, 5000), st.integers(1, 256), st.integers(0, 400))
def test_window_reaches_as_many_blocks_as_hold_it(tokens: int, block_tokens: int, num_blocks: int) -> None:
    blocks = window(tokens).blocks(num_blocks, block_tokens)
    assert blocks <= num_blocks
    assert blocks == num_blocks or (blocks * block_tokens >= tokens > (blocks - 1) * block_tokens)


def test_payload_of_kivi4_is_4_5_of_16_bits() -> None:
    kivi4 = get_codec("kivi4")
    model = ModelLayout((FULL, SLIDING))
    assert model.payload_bytes(kivi4) == model.block_bytes * 4.5 / 16
    assert model.prefix_bytes(640, kivi4) == model.prefix_bytes(640) * 4.5 / 16


def test_payload_of_a_codec_whose_lengths_vary_is_unknown() -> None:
    lossless = get_codec("lossless")
    assert HYBRID.payload_bytes(lossless) is None
    assert HYBRID.prefix_bytes(640, lossless) is None
    assert HYBRID.prefix_bytes(640, get_codec("raw")) == HYBRID.prefix_bytes(640)


@pytest.mark.parametrize("codec", [name for name, codec in CODECS.items() if not codec.exact])
def test_payload_of_a_latent_counts_its_exact_rotary_part(codec: str) -> None:
    layout = LATENT.groups[0].layout
    payload = LATENT.payload_bytes(get_codec(codec))
    sections = get_codec(codec).section_bytes(layout)
    assert sections is not None
    assert payload == sum(sections)
    assert sections[1] == 2 * 64 * 64 * 2


def test_codec_that_cannot_store_a_group_is_refused_naming_the_group() -> None:
    odd = ModelLayout((dataclasses.replace(FULL, layout=KVLayout(3, 2, 64, "bfloat16", 48)),))
    with pytest.raises(ValueError, match=r"group full: codec kivi4 .*64 tokens, got 48"):
        odd.payload_bytes(get_codec("kivi4"))
    with pytest.raises(ValueError, match=r"group full: codec kivi4"):
        odd.prefix_bytes(640, get_codec("kivi4"))


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ((), "at least one group"),
        ((FULL, dataclasses.replace(SLIDING, name="full")), "share a name"),
        ((FULL, dataclasses.replace(SLIDING, layers=(0, 2, 5))), "share a layer"),
        ((FULL, dataclasses.replace(SLIDING, layout=KVLayout(3, 2, 64, "bfloat16", 32))), "same block_tokens"),
    ],
)
def test_impossible_models_are_refused(groups: tuple[LayerGroup, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelLayout(groups)


@pytest.mark.parametrize("layers", [(1, 3), (3, 1, 5), (1, 1, 3)])
def test_group_whose_layers_are_not_those_of_its_layout_is_refused(layers: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="group full"):
        dataclasses.replace(FULL, layers=layers)


@pytest.mark.parametrize(("kind", "tokens"), [("some", 0), ("window", 0), ("window", -1), ("all", 5), ("last", 1)])
def test_impossible_reach_is_refused(kind: str, tokens: int) -> None:
    with pytest.raises(ValueError, match="reach"):
        Reach(kind, tokens)


def test_reach_says_itself_in_a_word() -> None:
    assert [str(reach) for reach in (ALL, window(4096), LAST)] == ["all", "window(4096)", "last"]


def test_transfer_takes_the_latency_and_the_bytes() -> None:
    assert transfer_s(25_000_000_000, 12.5) == 2.0
    assert transfer_s(0, 12.5, latency_s=0.001) == 0.001
    assert transfer_s(1_250_000, 12.5, latency_s=0.001) == pytest.approx(0.0011)


@pytest.mark.parametrize(
    ("num_bytes", "bandwidth", "latency"), [(1, 0, 0), (1, -1, 0), (-1, 1, 0), (1, 1, -1), (1, float("nan"), 0)]
)
def test_impossible_transfer_is_refused(num_bytes: int, bandwidth: float, latency: float) -> None:
    with pytest.raises(ValueError, match="bandwidth must be above 0"):
        transfer_s(num_bytes, bandwidth, latency)
