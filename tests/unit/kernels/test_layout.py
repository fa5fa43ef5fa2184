"""Layouts against numpy's own arithmetic."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.format.constants import DTYPE_SIZES
from kvstore.protocol.namespace import Namespace
from kvstore_kernels.layout import (
    AXES,
    ELEMENT_BYTES,
    MLA_AXES,
    KVLayout,
    Layout,
    MLALayout,
    Planes,
    Role,
    Rule,
)

MISTRAL_7B = KVLayout(num_layers=32, num_kv_heads=8, head_dim=128, dtype="bfloat16", block_tokens=64)


def test_layout_of_a_known_model_has_its_known_sizes() -> None:
    assert MISTRAL_7B.shape == (32, 2, 64, 8, 128)
    assert MISTRAL_7B.token_bytes == 128 * 1024
    assert MISTRAL_7B.block_bytes == 8 * 1024 * 1024


@given(
    st.integers(1, 8),
    st.integers(1, 8),
    st.integers(1, 32),
    st.integers(1, 32),
    st.sampled_from(["float16", "float32"]),
)
def test_layout_sizes_equal_an_array_of_its_shape(layers: int, heads: int, dim: int, tokens: int, dtype: str) -> None:
    layout = KVLayout(layers, heads, dim, dtype, tokens)
    block = np.empty(layout.shape, dtype=dtype)
    assert block.ndim == len(AXES)
    assert block.nbytes == layout.block_bytes
    assert block[:, :, :1].nbytes == layout.token_bytes
    assert math.prod(layout.shape) * layout.element_bytes == layout.block_bytes


@pytest.mark.parametrize(("num_tokens", "blocks"), [(0, 0), (63, 0), (64, 1), (127, 1), (128, 2)])
def test_full_blocks_with_partial_tail_leaves_it_out(num_tokens: int, blocks: int) -> None:
    assert MISTRAL_7B.full_blocks(num_tokens) == blocks


@pytest.mark.parametrize("field", ["num_layers", "num_kv_heads", "head_dim", "block_tokens"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True, "2", None])
def test_layout_with_impossible_count_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field):
        dataclasses.replace(MISTRAL_7B, **{field: value})


def test_layout_with_unknown_dtype_is_refused_naming_the_known() -> None:
    with pytest.raises(ValueError, match=r"float64.*bfloat16"):
        dataclasses.replace(MISTRAL_7B, dtype="float64")


def test_element_bytes_agree_with_the_record_format() -> None:
    assert {name: DTYPE_SIZES[name] for name in ELEMENT_BYTES} == ELEMENT_BYTES


def test_text_differs_with_every_field_that_a_namespace_does_not_hold_itself() -> None:
    variants = [
        MISTRAL_7B,
        dataclasses.replace(MISTRAL_7B, num_layers=16),
        dataclasses.replace(MISTRAL_7B, num_kv_heads=1),
        dataclasses.replace(MISTRAL_7B, head_dim=64),
    ]
    assert len({layout.text for layout in variants}) == len(variants)
    assert MISTRAL_7B.text == "gqa layers=32 kv_heads=8 head_dim=128 axes=layer.kv.token.head.dim"
    assert Namespace(layout=MISTRAL_7B.text).layout == MISTRAL_7B.text


@pytest.mark.parametrize("module", ["layout", "codecs", "models", "model_config"])
def test_importing_what_a_daemon_reads_loads_neither_torch_nor_the_store(module: str) -> None:
    script = (
        f"import sys; sys.path[:] = {sys.path!r}\n"
        f"import kvstore_kernels.{module}\n"
        "heavy = {'torch', 'numpy', 'numba', 'kvstore', 'kvstore_client', 'zmq', 'msgspec',"
        " 'lz4', 'zstandard'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


# ------------------------------------------------------------------ latent attention

DEEPSEEK_V3 = MLALayout(num_layers=61, latent_dim=512, rotary_dim=64, dtype="bfloat16", block_tokens=64)


def test_mla_layout_of_a_known_model_has_its_known_sizes() -> None:
    assert DEEPSEEK_V3.shape == (61, 64, 576)
    assert DEEPSEEK_V3.token_bytes == 61 * 576 * 2 == 70_272
    assert DEEPSEEK_V3.block_bytes == 64 * 70_272
    assert DEEPSEEK_V3.full_blocks(127) == 1


@given(
    st.integers(1, 8),
    st.integers(1, 512),
    st.integers(1, 128),
    st.integers(1, 32),
    st.sampled_from(["float16", "float32"]),
)
def test_mla_layout_sizes_equal_an_array_of_its_shape(
    layers: int, latent: int, rotary: int, tokens: int, dtype: str
) -> None:
    layout = MLALayout(layers, latent, rotary, dtype, tokens)
    block = np.empty(layout.shape, dtype=dtype)
    assert block.ndim == len(MLA_AXES)
    assert block.nbytes == layout.block_bytes
    assert block[:, :1].nbytes == layout.token_bytes


@pytest.mark.parametrize("field", ["num_layers", "latent_dim", "rotary_dim", "block_tokens"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True, "2", None])
def test_mla_layout_with_impossible_count_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field):
        dataclasses.replace(DEEPSEEK_V3, **{field: value})


def test_mla_layout_with_unknown_dtype_is_refused_naming_the_known() -> None:
    with pytest.raises(ValueError, match=r"float64.*bfloat16"):
        dataclasses.replace(DEEPSEEK_V3, dtype="float64")


def test_mla_text_differs_with_every_field_that_a_namespace_does_not_hold_itself() -> None:
    variants = [
        DEEPSEEK_V3,
        dataclasses.replace(DEEPSEEK_V3, num_layers=60),
        dataclasses.replace(DEEPSEEK_V3, latent_dim=576),
        dataclasses.replace(DEEPSEEK_V3, rotary_dim=128),
    ]
    assert len({layout.text for layout in variants}) == len(variants)
    assert DEEPSEEK_V3.text == "mla layers=61 latent=512 rotary=64 axes=layer.token.dim"
    assert Namespace(layout=DEEPSEEK_V3.text).layout == DEEPSEEK_V3.text


# ------------------------------------------------------------------ planes


def test_planes_of_keys_and_values_are_one_a_layer_and_head() -> None:
    assert MISTRAL_7B.planes == (
        Planes(Role.KEY, Rule.CHANNEL, 32, 8, 128, "bfloat16"),
        Planes(Role.VALUE, Rule.TOKEN, 32, 8, 128, "bfloat16"),
    )


@pytest.mark.parametrize(("latent", "heads", "dim"), [(512, 4, 128), (128, 1, 128), (192, 3, 64), (64, 1, 64)])
def test_planes_of_a_latent_are_128_wide_or_else_64(latent: int, heads: int, dim: int) -> None:
    layout = dataclasses.replace(DEEPSEEK_V3, latent_dim=latent)
    assert layout.planes == (
        Planes(Role.LATENT, Rule.CHANNEL, 61, heads, dim, "bfloat16"),
        Planes(Role.ROTARY, Rule.EXACT, 61, 1, 64, "bfloat16"),
    )


def test_latent_that_cannot_be_cut_is_one_plane_and_refused_for_lossy_codecs() -> None:
    layout = dataclasses.replace(DEEPSEEK_V3, latent_dim=100)
    assert layout.planes[0] == Planes(Role.LATENT, Rule.CHANNEL, 61, 1, 100, "bfloat16")
    with pytest.raises(ValueError, match=r"latent of 100 .*raw, lossless"):
        layout.check_lossy()
    DEEPSEEK_V3.check_lossy()


@pytest.mark.parametrize("layout", [KVLayout(2, 3, 16, "float32", 5), MLALayout(2, 192, 16, "float32", 5)])
def test_split_views_are_the_planes_and_write_through(layout: Layout) -> None:
    block = np.arange(math.prod(layout.shape), dtype=np.float32).reshape(layout.shape)
    before = block.copy()
    views = layout.split(block)
    assert [view.shape for view in views] == [
        (planes.num_layers, planes.num_heads, layout.block_tokens, planes.dim) for planes in layout.planes
    ]
    assert sum(view.size for view in views) == block.size
    if isinstance(layout, KVLayout):
        assert views[1][1, 2, 3, 4] == before[1, 1, 3, 2, 4]
    else:
        assert views[0][1, 2, 3, 4] == before[1, 3, 2 * 64 + 4]
        assert views[1][1, 0, 3, 4] == before[1, 3, 192 + 4]
    for view in views:
        view += 1
    assert (block == before + 1).all()


def test_split_of_another_shape_is_refused_naming_both() -> None:
    with pytest.raises(ValueError, match=r"\[2, 2, 5, 3, 16\].*\[1, 2\]"):
        KVLayout(2, 3, 16, "float32", 5).split(np.zeros((1, 2)))
