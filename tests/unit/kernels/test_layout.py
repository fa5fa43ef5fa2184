"""KVLayout against numpy's own arithmetic."""

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
from kvstore_kernels.layout import AXES, ELEMENT_BYTES, KVLayout

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


def test_importing_the_layout_loads_neither_torch_nor_the_store() -> None:
    script = (
        f"import sys; sys.path[:] = {sys.path!r}\n"
        "import kvstore_kernels.layout\n"
        "heavy = {'torch', 'numpy', 'numba', 'kvstore', 'kvstore_client', 'zmq', 'msgspec'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
