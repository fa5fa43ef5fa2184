"""What several tests of the CPU's kernels check, of any codec: bytes and values of the reference, pages of any form."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from codec_blocks import any_bits, normal_block, same_bits
from cpu_blocks import Guarded, decoded_by_cpu, encoded_by_cpu
from numpy.typing import NDArray

from kvstore_kernels import cpu
from kvstore_kernels.codecs import Codec
from kvstore_kernels.layout import KVLayout, Layout
from kvstore_kernels.paged import PagedKV

SPARE_PAGES = 3
_TESTS = Path(__file__).parents[3]
_AVX2 = """
from numba.core.registry import cpu_target
print("+avx2" in cpu_target.target_context.codegen().magic_tuple()[2].split(","))
"""


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


def check_like_reference(codec: Codec, block: torch.Tensor, layout: Layout) -> None:
    reference = codec.encode(block, layout)
    encoded = encoded_by_cpu(codec, block, layout)
    if codec.section_bytes(layout) is not None:
        assert encoded.sections == reference.sections
    assert encoded.void_groups == reference.void_groups
    expected = codec.decode(reference.sections, layout)
    assert same_bits(codec.decode(encoded.sections, layout), expected)
    assert same_bits(decoded_by_cpu(codec, reference.sections, layout), expected)


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
    codec: Codec, layout: KVLayout, page_tokens: int, axes: str, *, threads: int = 1, offset: int = 0
) -> None:
    """Blocks in pages of this form give the bytes of contiguous ones, and decode to the reference's values."""
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


def run_without_avx2(script: str, *arguments: str) -> None:
    """Run a script in a process of its own, for a processor without AVX2: it prints first whether it has it."""
    older = {"NUMBA_CPU_NAME": "ivybridge", "NUMBA_CPU_FEATURES": "+sse4.2,+popcnt,+avx,+f16c"}
    done = subprocess.run(
        [sys.executable, "-c", _AVX2 + script, *arguments],
        env=os.environ | older | {"PYTHONPATH": os.pathsep.join([str(_TESTS), *sys.path])},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["False"]
