"""Blocks in an engine's pages: every way to keep them gives the bytes of contiguous ones and gets the same values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from codec_blocks import normal_block, same_bits
from cpu_blocks import Guarded, encoded_by_cpu
from numpy.typing import NDArray

from kvstore_kernels import cpu
from kvstore_kernels.codecs import get_codec
from kvstore_kernels.layout import KVLayout, MLALayout
from kvstore_kernels.paged import PagedKV

CODECS = ("raw", "lossless", "fp8", "int8", "int4", "kivi4", "kivi2", "turbo4", "turbo3-2", "centred3")
SPARE_PAGES = 3


@dataclass
class Cache:
    """An engine's tensors, a view of each block's pages in the layout's order, and how kernels see them."""

    kv: PagedKV
    memory: list[Guarded]
    block: Callable[[list[int]], torch.Tensor]
    """A copy of the pages."""
    fill: Callable[[list[int], torch.Tensor], None]


def layer_memory(layout: KVLayout, tokens: int, offset: int) -> list[Guarded]:
    return [Guarded(tokens * layout.token_bytes // layout.num_layers, offset) for _ in range(layout.num_layers)]


def make_cache(layout: KVLayout, pages: int, page_tokens: int, axes: str, offset: int = 0) -> Cache:
    """A tensor a layer with these axes."""
    sizes = {"kv": 2, "page": pages, "token": page_tokens, "head": layout.num_kv_heads, "dim": layout.head_dim}
    names = axes.split()
    memory = layer_memory(layout, pages * page_tokens, offset)
    layers = [area.tensor([sizes[name] for name in names], layout.dtype) for area in memory]
    order = [names.index(name) for name in ("page", "kv", "token", "head", "dim")]
    views = [layer.permute(order) for layer in layers]

    def block(numbers: list[int]) -> torch.Tensor:
        return torch.stack([view[numbers].transpose(0, 1).flatten(1, 2) for view in views])

    def fill(numbers: list[int], values: torch.Tensor) -> None:
        for view, layer in zip(views, values, strict=True):
            view[numbers] = layer.unflatten(1, (len(numbers), page_tokens)).transpose(0, 1)

    return Cache(PagedKV.from_layers(layout, layers, axes), memory, block, fill)


def make_vllm_cpu_cache(layout: KVLayout, pages: int, page_tokens: int, offset: int = 0) -> Cache:
    """Keys transposed, then values, in each page and head."""
    heads, dim = layout.num_kv_heads, layout.head_dim
    memory = layer_memory(layout, pages * page_tokens, offset)
    layers = [area.tensor((pages, heads, page_tokens, 2 * dim), layout.dtype) for area in memory]
    halves = [layer.view(pages, heads, 2, page_tokens * dim) for layer in layers]
    keys = [half[:, :, 0].view(pages, heads, dim, page_tokens).transpose(2, 3) for half in halves]
    values = [half[:, :, 1].view(pages, heads, page_tokens, dim) for half in halves]

    def block(numbers: list[int]) -> torch.Tensor:
        pairs = zip(keys, values, strict=True)
        return torch.stack([torch.stack([x[numbers].transpose(1, 2).flatten(0, 1) for x in pair]) for pair in pairs])

    def fill(numbers: list[int], data: torch.Tensor) -> None:
        for layer in range(layout.num_layers):
            for view, half in ((keys[layer], data[layer, 0]), (values[layer], data[layer, 1])):
                view[numbers] = half.unflatten(0, (len(numbers), page_tokens)).transpose(1, 2)

    return Cache(PagedKV.from_vllm_cpu(layout, layers), memory, block, fill)


def make_any(layout: KVLayout, pages: int, page_tokens: int, axes: str, offset: int = 0) -> Cache:
    if axes == "vllm cpu":
        return make_vllm_cpu_cache(layout, pages, page_tokens, offset)
    return make_cache(layout, pages, page_tokens, axes, offset)


AXES = (
    "kv page token head dim",
    "page kv token head dim",
    "page kv head token dim",
    "kv page head token dim",
    "page head token kv dim",
    "page head kv dim token",
    "vllm cpu",
)


def page_lists(count: int, each: int, seed: int = 0) -> tuple[NDArray[np.int32], int]:
    """Pages of blocks in no order, and how many there are."""
    total = count * each + SPARE_PAGES
    chosen = np.random.default_rng(seed).permutation(total)[: count * each]
    return chosen.astype(np.int32).reshape(count, each), total


def spoiled(cache: Cache) -> None:
    for area in cache.memory:
        area.data[:] = 0x5A


def check_form(
    codec_name: str, layout: KVLayout, page_tokens: int, axes: str, *, threads: int = 1, offset: int = 0
) -> None:
    codec = get_codec(codec_name)
    pages, total = page_lists(3, layout.block_tokens // page_tokens)
    cache = make_any(layout, total, page_tokens, axes, offset)
    spoiled(cache)
    blocks = [normal_block(layout, seed=number) for number in range(len(pages))]
    for numbers, block in zip(pages.tolist(), blocks, strict=True):
        cache.fill(numbers, block)
    most = sum(codec.max_section_bytes(layout))
    payloads = [Guarded(most, offset=8) for _ in blocks]
    addresses = np.array([payload.address for payload in payloads], np.uint64)
    encoded = cpu.encode(codec, cache.kv, pages, addresses, threads=threads)
    for number, block in enumerate(blocks):
        payloads[number].check()
        expected = b"".join(encoded_by_cpu(codec, block, layout).sections)
        assert payloads[number].data[: encoded.section_bytes[number].sum()].tobytes() == expected
    for area in cache.memory:
        area.check()
    spoiled(cache)
    cpu.decode(codec, cache.kv, pages, addresses, encoded.section_bytes, threads=threads)
    for number, numbers in enumerate(pages.tolist()):
        sections, at = [], 0
        for length in encoded.section_bytes[number].tolist():
            sections.append(payloads[number].data[at : at + length].tobytes())
            at += length
        assert same_bits(cache.block(numbers), codec.decode(sections, layout))
    untouched = sorted(set(range(total)) - set(pages.ravel().tolist()))
    assert (cache.block(untouched).contiguous().view(torch.uint8) == 0x5A).all()
    for area in cache.memory:
        area.check()


@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize("codec", CODECS)
def test_every_form_of_pages_gives_the_same(codec: str, axes: str) -> None:
    check_form(codec, KVLayout(2, 3, 64, "bfloat16", 64), 16, axes)


@pytest.mark.parametrize("axes", ["kv page token head dim", "page kv head token dim", "vllm cpu"])
@pytest.mark.parametrize(
    ("page_tokens", "block_tokens"), [(1, 64), (16, 128), (64, 64), (64, 256), (128, 128), (128, 256), (3, 21)]
)
def test_every_size_of_pages_gives_the_same(page_tokens: int, block_tokens: int, axes: str) -> None:
    for codec in ("int8", "int4") if block_tokens % 64 else ("kivi4", "turbo4", "fp8", "centred2"):
        check_form(codec, KVLayout(1, 2, 128, "bfloat16", block_tokens), page_tokens, axes)


@pytest.mark.parametrize("offset", [2, 16])
@pytest.mark.parametrize("codec", CODECS)
def test_pages_that_are_not_aligned_give_the_same(codec: str, offset: int) -> None:
    check_form(codec, KVLayout(2, 3, 64, "bfloat16", 64), 16, "page kv token head dim", offset=offset)


@pytest.mark.parametrize("axes", ["kv page token head dim", "vllm cpu"])
@pytest.mark.parametrize("codec", ["raw", "lossless", "int8", "kivi4", "turbo3-2", "centred4-2"])
def test_several_threads_give_the_same(codec: str, axes: str) -> None:
    check_form(codec, KVLayout(6, 8, 64, "bfloat16", 128), 16, axes, threads=3)


def test_separate_tensors_of_keys_and_values_in_pages_of_one_token() -> None:
    layout = KVLayout(2, 2, 64, "bfloat16", 32)
    blocks = torch.cat([normal_block(layout, seed=number) for number in range(2)], dim=2)
    pairs = [(layer[0].contiguous(), layer[1].contiguous()) for layer in blocks]
    kv = PagedKV.from_layers(layout, pairs, "page head dim")
    assert (kv.page_tokens, kv.num_pages) == (1, 64)
    pages = np.arange(63, -1, -1, dtype=np.int32).reshape(2, 32)
    codec = get_codec("int8")
    payloads = [Guarded(sum(codec.section_bytes(layout) or ())) for _ in pages]
    cpu.encode(codec, kv, pages, np.array([payload.address for payload in payloads], np.uint64))
    for payload, numbers in zip(payloads, pages.tolist(), strict=True):
        block = blocks[:, :, numbers]
        assert payload.data.tobytes() == b"".join(encoded_by_cpu(codec, block, layout).sections)


@pytest.mark.parametrize("name", ["raw", "lossless", "int8", "kivi4", "turbo3", "centred3"])
def test_latents_in_pages_give_the_same(name: str) -> None:
    codec = get_codec(name)
    layout = MLALayout(2, 128, 64, "bfloat16", 64)
    blocks = [normal_block(layout, seed=number) for number in range(2)]
    pages = np.array([[5, 0, 7, 2], [1, 6, 3, 4]], np.int32)
    layers = [torch.zeros(8, 16, 192, dtype=torch.bfloat16) for _ in range(2)]
    for numbers, block in zip(pages.tolist(), blocks, strict=True):
        for layer, values in zip(layers, block, strict=True):
            layer[numbers] = values.view(4, 16, 192)
    kv = PagedKV.from_layers(layout, layers, "page token dim")
    payloads = [Guarded(sum(codec.max_section_bytes(layout))) for _ in blocks]
    addresses = np.array([payload.address for payload in payloads], np.uint64)
    encoded = cpu.encode(codec, kv, pages, addresses)
    for layer in layers:
        layer.fill_(7)
    cpu.decode(codec, kv, pages, addresses, encoded.section_bytes)
    for numbers, block in zip(pages.tolist(), blocks, strict=True):
        decoded = torch.stack([layer[numbers].flatten(0, 1) for layer in layers])
        assert same_bits(decoded, codec.decode(codec.encode(block, layout).sections, layout))


def test_no_blocks_are_no_work() -> None:
    layout = KVLayout(1, 1, 64, "bfloat16", 64)
    kv = PagedKV.from_tensor(layout, normal_block(layout))
    none, nowhere = np.zeros((0, 1), np.int32), np.zeros(0, np.uint64)
    for name in CODECS:
        encoded = cpu.encode(get_codec(name), kv, none, nowhere)
        assert encoded.section_bytes.shape == (0, len(get_codec(name).max_section_bytes(layout)))
        assert encoded.void_groups.shape == (0,)
        cpu.decode(get_codec(name), kv, none, nowhere, encoded.section_bytes)


def test_void_groups_are_counted_for_each_block() -> None:
    layout = KVLayout(4, 2, 64, "bfloat16", 64)
    blocks = torch.cat([normal_block(layout, seed=number) for number in range(4)], dim=2)
    blocks[2, 0, 64:67, 1, 5] = torch.inf
    blocks[:, :, 192 + 9, 0, 7] = torch.nan
    codec = get_codec("int8")
    payloads = np.zeros((4, sum(codec.section_bytes(layout) or ())), np.uint8)
    addresses = np.array([payload.ctypes.data for payload in payloads], np.uint64)
    kv = PagedKV.from_tensor(layout, blocks)
    for threads in (1, 4):
        encoded = cpu.encode(codec, kv, np.arange(4, dtype=np.int32)[:, None], addresses, threads=threads)
        assert encoded.void_groups.tolist() == [0, 3, 0, 8]
