"""Where elements of KV lie: addresses by strides are those of the tensors."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from kvstore_kernels.layout import KVLayout, MLALayout
from kvstore_kernels.paged import PagedKV

LAYOUT = KVLayout(2, 3, 16, "float32", 8)
LATENT = MLALayout(2, 128, 16, "float32", 8)


def element(kv: PagedKV, section: int, layer: int, head: int, page: int, token: int, channel: int) -> float:
    at = kv.sections[section]
    address = (
        int(at.bases[layer])
        + page * at.page_stride
        + token * at.token_stride
        + head * at.head_stride
        + channel * at.element_stride
    )
    return ctypes.c_float.from_address(address).value


def counted(*shape: int) -> torch.Tensor:
    return torch.arange(np.prod(shape), dtype=torch.float32).view(shape)


def check(kv: PagedKV, expected: Callable[..., Any]) -> None:
    """Compare elements with ``expected(section, layer, head, page, token, channel)``."""
    for section, planes in enumerate(kv.layout.planes):
        counts = (planes.num_layers, planes.num_heads, kv.num_pages, kv.page_tokens)
        for place in itertools.product(*map(range, counts)):
            for channel in (0, 1, planes.dim - 1):
                assert element(kv, section, *place, channel) == expected(section, *place, channel)


def test_one_tensor_has_a_page_a_block() -> None:
    tensor = counted(2, 2, 24, 3, 16)
    kv = PagedKV.from_tensor(LAYOUT, tensor)
    assert (kv.page_tokens, kv.num_pages, kv.block_pages) == (8, 3, 1)
    check(kv, lambda s, layer, h, p, t, c: tensor[layer, s, 8 * p + t, h, c])


def test_strides_of_one_tensor_may_be_any() -> None:
    array = np.arange(2 * 2 * 16 * 3 * 16, dtype=np.float32).reshape(2, 3, 16, 16, 2)
    view = array.transpose(0, 4, 2, 1, 3)[:, :, ::-1]
    kv = PagedKV.from_tensor(LAYOUT, view)
    check(kv, lambda s, layer, h, p, t, c: view[layer, s, 8 * p + t, h, c])


@pytest.mark.parametrize("axes", ["kv page token head dim", "page kv head token dim", "head dim page token kv"])
def test_layers_may_have_any_order_of_axes(axes: str) -> None:
    sizes = {"kv": 2, "page": 5, "token": 4, "head": 3, "dim": 16}
    layers = [counted(*(sizes[axis] for axis in axes.split())) + 10000 * layer for layer in range(2)]
    kv = PagedKV.from_layers(LAYOUT, layers, axes)
    assert (kv.page_tokens, kv.num_pages, kv.block_pages) == (4, 5, 2)
    order = [axes.split().index(axis) for axis in ("kv", "head", "page", "token", "dim")]
    check(kv, lambda s, layer, *place: layers[layer].permute(order)[(s, *place)])


def test_keys_and_values_may_be_tensors_of_their_own() -> None:
    pairs = [(counted(6, 3, 16), counted(6, 3, 16) + 1000), (counted(6, 3, 16) + 2000, counted(6, 3, 16) + 3000)]
    kv = PagedKV.from_layers(LAYOUT, pairs, "page head dim")
    assert (kv.page_tokens, kv.block_pages) == (1, 8)
    check(kv, lambda s, layer, h, p, t, c: pairs[layer][s][p, h, c])


def test_latents_are_cut_into_planes() -> None:
    layers = [counted(3, 4, 144), counted(3, 4, 144) + 5000]
    kv = PagedKV.from_layers(LATENT, layers, "page token dim")
    check(kv, lambda s, layer, h, p, t, c: layers[layer][p, t, 128 * s + 128 * h + c])
    tensor = counted(2, 16, 144)
    check(PagedKV.from_tensor(LATENT, tensor), lambda s, layer, h, p, t, c: tensor[layer, 8 * p + t, 128 * s + c])


def test_vllm_on_cpu_transposes_keys() -> None:
    layers = [counted(3, 3, 4, 32), counted(3, 3, 4, 32) + 5000]
    kv = PagedKV.from_vllm_cpu(LAYOUT, layers)
    keys = [layer.flatten(2)[:, :, :64].view(3, 3, 16, 4).transpose(2, 3) for layer in layers]
    values = [layer.flatten(2)[:, :, 64:].view(3, 3, 4, 16) for layer in layers]
    check(kv, lambda s, layer, h, p, t, c: (keys, values)[s][layer][p, h, t, c])


def test_numpy_has_words_for_bfloat16() -> None:
    layout = KVLayout(1, 1, 16, "bfloat16", 4)
    assert PagedKV.from_tensor(layout, np.zeros(layout.shape, np.uint16)).num_pages == 1
    with pytest.raises(ValueError, match="expected elements of bfloat16, got float16"):
        PagedKV.from_tensor(layout, np.zeros(layout.shape, np.float16))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PagedKV.from_tensor(LAYOUT, counted(2, 2, 12, 3, 16)), "multiple of 8 tokens"),
        (lambda: PagedKV.from_tensor(LAYOUT, counted(2, 2, 16, 4, 16)), "expected shape"),
        (lambda: PagedKV.from_tensor(LAYOUT, counted(2, 16, 3, 16)), "expected shape"),
        (lambda: PagedKV.from_tensor(LAYOUT, counted(2, 2, 8, 3, 16).half()), "expected elements of float32"),
        (lambda: PagedKV.from_tensor(LAYOUT, [1.0]), "got list"),
        (lambda: PagedKV.from_layers(LAYOUT, [counted(5, 2, 4, 3, 16)], "page kv token head dim"), "2 layers, got 1"),
        (lambda: PagedKV.from_layers(LAYOUT, [counted(5, 4, 3)] * 2, "page token head"), "axes must be"),
        (lambda: PagedKV.from_layers(LAYOUT, [counted(5, 4, 3, 16)] * 2, "page page head dim"), "axes must be"),
        (lambda: PagedKV.from_layers(LATENT, [counted(5, 4, 1, 144)] * 2, "page token head dim"), "axes must be"),
        (lambda: PagedKV.from_layers(LAYOUT, [counted(5, 2, 4, 3)] * 2, "page kv token head dim"), "do not fit"),
        (lambda: PagedKV.from_layers(LAYOUT, [counted(5, 2, 4, 3, 8)] * 2, "page kv token head dim"), "dim must be 16"),
        (lambda: PagedKV.from_layers(LAYOUT, [counted(5, 1, 4, 3, 16)] * 2, "page kv token head dim"), "kv must be 2"),
        (
            lambda: PagedKV.from_layers(LAYOUT, [counted(5, 2, 3, 3, 16)] * 2, "page kv token head dim"),
            "whole pages of 3",
        ),
        (
            lambda: PagedKV.from_layers(
                LAYOUT, [counted(5, 2, 4, 3, 16), counted(6, 2, 4, 3, 16)], "page kv token head dim"
            ),
            "tensor 1 differs",
        ),
        (lambda: PagedKV.from_layers(LAYOUT, [(counted(6, 3, 16),)] * 2, "page head dim"), "pair of keys and values"),
        (lambda: PagedKV.from_layers(LAYOUT, [counted(2, 6, 3, 16)] * 2, "page head dim"), "need the axis kv"),
        (lambda: PagedKV.from_layers(LAYOUT, [counted(5, 2, 4, 3, 16)] * 2, None), "axes must be a text .* got None"),
        (lambda: PagedKV.from_layers(LAYOUT, [counted(5, 2, 4, 3, 16)] * 2, ""), "kv and token may be left out"),
        (lambda: PagedKV.from_layers(LAYOUT, None, "page kv token head dim"), "list of 2 tensors, got NoneType"),
        (lambda: PagedKV.from_layers(LAYOUT, counted(2, 5, 2, 4, 3, 16), "page kv token head dim"), "got Tensor"),
        (lambda: PagedKV.from_layers(LAYOUT, [None] * 2, "page kv token head dim"), "got NoneType"),
        (lambda: PagedKV.from_layers(None, [counted(5, 2, 4, 3, 16)] * 2, "page kv token head dim"), "layout must be"),
        (lambda: PagedKV.from_tensor(None, counted(2, 2, 8, 3, 16)), "layout must be"),
        (lambda: PagedKV.from_vllm_cpu(LAYOUT, None), "list of 2 tensors, got NoneType"),
        (lambda: PagedKV.from_vllm_cpu(LAYOUT, [None] * 2), "got NoneType"),
        (lambda: PagedKV.from_vllm_cpu(None, [counted(3, 3, 4, 32)] * 2), "layout must be"),
        (lambda: PagedKV.from_vllm_cpu(LATENT, [counted(3, 3, 4, 32)] * 2), "use from_layers"),
        (lambda: PagedKV.from_vllm_cpu(LAYOUT, [counted(3, 3, 4, 16)] * 2), "expected shape"),
        (
            lambda: PagedKV.from_vllm_cpu(LAYOUT, [counted(3, 3, 32, 4).transpose(2, 3)] * 2),
            "last two axes must be contiguous",
        ),
    ],
)
def test_what_does_not_fit_is_refused(make: Callable[[], PagedKV], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
