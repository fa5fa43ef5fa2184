"""Blocks in an engine's pages: every way to keep them gives the bytes of contiguous ones and gets the same values."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from codec_blocks import normal_block, same_bits
from cpu_blocks import Guarded, encoded_by_cpu
from unit.kernels.cpu.codec_checks import AXES, check_form

from kvstore_kernels import cpu
from kvstore_kernels.codecs import get_codec
from kvstore_kernels.layout import KVLayout, MLALayout
from kvstore_kernels.paged import PagedKV

CODECS = ("raw", "lossless", "fp8", "int8", "int4", "kivi4", "kivi2", "turbo4", "turbo3-2")


@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize("codec", CODECS)
def test_every_form_of_pages_gives_the_same(codec: str, axes: str) -> None:
    check_form(get_codec(codec), KVLayout(2, 3, 64, "bfloat16", 64), 16, axes)


@pytest.mark.parametrize("axes", ["kv page token head dim", "page kv head token dim", "vllm cpu"])
@pytest.mark.parametrize(
    ("page_tokens", "block_tokens"), [(1, 64), (16, 128), (64, 64), (64, 256), (128, 128), (128, 256), (3, 21)]
)
def test_every_size_of_pages_gives_the_same(page_tokens: int, block_tokens: int, axes: str) -> None:
    for codec in ("int8", "int4") if block_tokens % 64 else ("kivi4", "turbo4", "fp8"):
        check_form(get_codec(codec), KVLayout(1, 2, 128, "bfloat16", block_tokens), page_tokens, axes)


@pytest.mark.parametrize("offset", [2, 16])
@pytest.mark.parametrize("codec", CODECS)
def test_pages_that_are_not_aligned_give_the_same(codec: str, offset: int) -> None:
    check_form(get_codec(codec), KVLayout(2, 3, 64, "bfloat16", 64), 16, "page kv token head dim", offset=offset)


@pytest.mark.parametrize("axes", ["kv page token head dim", "vllm cpu"])
@pytest.mark.parametrize("codec", ["raw", "lossless", "int8", "kivi4", "turbo3-2"])
def test_several_threads_give_the_same(codec: str, axes: str) -> None:
    check_form(get_codec(codec), KVLayout(6, 8, 64, "bfloat16", 128), 16, axes, threads=3)


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


@pytest.mark.parametrize("name", ["raw", "lossless", "int8", "kivi4", "turbo3"])
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
