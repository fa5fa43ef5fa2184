"""What the CUDA kernels are tested with, on the emulator as on a GPU: shapes, numbers, and what must come out."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt
import torch

from kvstore_kernels.codecs import Codec, get_codec
from kvstore_kernels.layout import KVLayout, Layout, MLALayout
from kvstore_kernels.paged import PagedKV

BLOCKS: Final = 2
FILLER: Final = 0xEE
"""What payloads are full of before an encoding, and pages before a decoding."""


@dataclass(frozen=True)
class Case:
    """A codec, and pages that it is used on.

    Attributes:
        codec: its name.
        layout: of the blocks.
        page_tokens: tokens a page.
        axes: of a layer's tensor, as for ``PagedKV.from_layers``.
        offset: bytes of payloads from a multiple of 16.
    """

    codec: str
    layout: Layout
    page_tokens: int
    axes: str = "kv page token head dim"
    offset: int = 0

    def __str__(self) -> str:
        shape = "x".join(map(str, self.layout.shape))
        return f"{self.codec}-{shape}-{self.layout.dtype}-page{self.page_tokens}" + (
            f"+{self.offset}" if self.offset else ""
        )


def _mha(
    codec: str, dtype: str, heads: int, dim: int, tokens: int, page: int, layers: int = 1, offset: int = 0
) -> Case:
    return Case(codec, KVLayout(layers, heads, dim, dtype, tokens), page, offset=offset)


def _mla(codec: str, dtype: str, latent: int, rotary: int, tokens: int, page: int) -> Case:
    return Case(codec, MLALayout(2, latent, rotary, dtype, tokens), page, axes="page token dim")


FAST: Final = ("raw", "fp8", "int8", "int4", "kivi4", "kivi2", "turbo4", "turbo3", "turbo2", "turbo4-3", "turbo3-2")
"""Codecs that there are CUDA kernels of."""

ODD: Final = ("fp8", "int8", "int4", "kivi2", "turbo4", "turbo3")

CASES: Final[tuple[Case, ...]] = (
    # fp8 has two bytes of scales a plane: eight planes keep the second section at a multiple of 16.
    *(_mha(codec, "bfloat16", 4 if codec == "fp8" else 2, 128, 64, 16, layers=2) for codec in FAST),
    *(_mha(codec, "float16", 2, 64, 64, 16) for codec in FAST),
    *(_mha(codec, "float32", 1, 128, 64, 32) for codec in ("fp8", "int8", "kivi4", "kivi2", "turbo4", "turbo3")),
    # Dimensions that are no power of two, tails of tiles, pages of odd sizes, payloads at even addresses.
    *(
        _mha(codec, "bfloat16", 1, 192, 96, 24, offset=2)
        for codec in ("fp8", "int8", "int4", "kivi2", "turbo4", "turbo3")
    ),
    *(_mha(codec, "bfloat16", 3, 128, 5, 5) for codec in ("raw", "fp8", "int8", "int4", "turbo4-3", "turbo3-2")),
    *(_mha(codec, "float16", 1, 256, 64, 1) for codec in ("kivi4", "kivi2", "int8", "turbo2")),
    *(_mla(codec, "bfloat16", 512, 64, 64, 16) for codec in ("raw", "fp8", "int8", "kivi4", "kivi2", "turbo3-2")),
    _mla("kivi2", "float32", 192, 32, 32, 32),
    # A latent that is one plane of any width.
    _mla("raw", "bfloat16", 100, 20, 16, 4),
    _mla("raw", "float32", 1101, 33, 8, 8),
    dataclasses.replace(_mha("kivi4", "bfloat16", 2, 128, 128, 128), axes="page head token kv dim"),
    dataclasses.replace(_mha("turbo4", "bfloat16", 2, 64, 128, 32), axes="page kv head token dim"),
    _mha("raw", "int8", 3, 7, 16, 4),
    _mha("raw", "bfloat16", 2, 80, 16, 16, offset=2),
)

KINDS: Final = ("normal", "ties", "finite_bits", "any_bits", "offset", "tiny", "zeros", "holes", "wide")
"""Numbers that ``fill`` makes."""


def fill(kind: str, shape: Sequence[int], dtype: str, seed: int) -> torch.Tensor:
    """Numbers of a kind, of any dtype; those of one byte are any."""
    torch_dtype: torch.dtype = getattr(torch, dtype)
    generator = torch.Generator().manual_seed(seed)
    width = torch_dtype.itemsize
    x = torch.randn(tuple(shape), generator=generator)
    if width == 1 or kind in ("any_bits", "finite_bits"):
        raw = torch.randint(0, 256, (*shape, width), generator=generator, dtype=torch.uint8)
        if kind == "finite_bits" and width > 1:
            # Exponents below 2^15 (float16: 2^14) and down to denormals, as likely as one another.
            raw[..., -1] &= 0xC7 if width != 2 or dtype == "bfloat16" else 0xF3
        return raw.view(torch_dtype).reshape(tuple(shape))
    if kind == "ties":
        x = (x * 8).round() * 0.5
    elif kind == "offset":
        # Of float32 the minimum's rounding reaches past the codes, which must be clamped.
        x = x * 0.01 + 1000
    elif kind == "tiny":
        x *= 2.0**-24 if dtype == "float16" else 2.0**-128
    elif kind == "zeros":
        x = x.sign() * 0.0
    elif kind == "holes":
        at = torch.randint(0, x.numel(), (max(4, x.numel() // 2000),), generator=generator)
        x.view(-1)[at] = torch.tensor([torch.inf, -torch.inf, torch.nan, 61696.0, -65504.0]).repeat(len(at))[: len(at)]
    elif kind == "wide":
        x *= torch.exp2(torch.randint(-24, 14, (*shape[:-1], 1), generator=generator).float())
        x *= torch.exp(torch.randn(shape[-1], generator=generator))
        x.clamp_(-61440, 61440)
    return x.to(torch_dtype)


@dataclass(frozen=True)
class Paged:
    """Blocks in pages.

    Attributes:
        layers: a contiguous tensor for each layer.
        kv: them, on the device "cpu".
        pages: of each block.
        axes: of a layer's tensor.
    """

    layers: list[torch.Tensor]
    kv: PagedKV
    pages: npt.NDArray[np.int32]
    axes: str

    def blocks(self) -> list[torch.Tensor]:
        """Each block as a tensor of its layout."""
        layout, names = self.kv.layout, self.axes.split()
        order = [name for name in ("kv", "page", "token", "head", "dim") if name in names]
        at = order.index("page")
        whole = [layer.permute([names.index(name) for name in order]) for layer in self.layers]
        chosen = [torch.from_numpy(pages).long() for pages in self.pages]
        return [
            torch.stack([layer.index_select(at, pages).flatten(at, at + 1) for layer in whole]).view(layout.shape)
            for pages in chosen
        ]


def paged(case: Case, kind: str, seed: int = 0) -> Paged:
    """Pages with more in them than the blocks, which lie in them in no order."""
    layout, page = case.layout, case.page_tokens
    count = (BLOCKS + 1) * layout.block_tokens // page
    sizes = {"page": count, "token": page, "dim": layout.shape[-1], "kv": 2, "head": layout.shape[-2]}
    shape = [sizes[name] for name in case.axes.split()]
    layers = [fill(kind, shape, layout.dtype, 1000 * seed + layer) for layer in range(layout.num_layers)]
    chosen = np.random.default_rng(seed).permutation(count)[: BLOCKS * layout.block_tokens // page]
    kv = PagedKV.from_layers(layout, layers, case.axes)
    return Paged(layers, kv, chosen.reshape(BLOCKS, -1).astype(np.int32), case.axes)


class Runner(Protocol):
    """Runs the kernels of a case on pages; the emulator, or a GPU."""

    def encode(self, case: Case, pages: Paged) -> tuple[list[bytes], list[int]]:
        """Payloads of the blocks, and their void groups."""
        ...

    def decode(self, case: Case, pages: Paged, payloads: Sequence[bytes]) -> None:
        """Decode payloads into the pages' tensors."""
        ...


def check_case(runner: Runner, case: Case, kind: str, seed: int = 0) -> None:
    """Bytes, void groups and decoded values are those of the reference, and nothing else is written."""
    codec = get_codec(case.codec)
    source = paged(case, kind, seed)
    expected = [codec.encode(block, case.layout) for block in source.blocks()]
    payloads, void_groups = runner.encode(case, source)
    counts = [each.void_groups for each in expected]
    assert void_groups == counts, f"wrong counts of void groups: {void_groups} instead of {counts}"
    for block, each in enumerate(expected):
        compare_sections(codec, case.layout, block, each.sections, payloads[block])
    target = paged(case, kind, seed)
    for layer in target.layers:
        layer.view(torch.uint8).fill_(FILLER)
    untouched = [layer.clone() for layer in target.layers]
    runner.decode(case, target, payloads)
    for block, (each, decoded) in enumerate(zip(expected, target.blocks(), strict=True)):
        reference = codec.decode(each.sections, case.layout)
        wrong = (bits(decoded) != bits(reference)).nonzero()
        assert not len(wrong), (
            f"{case} {kind}: block {block} decodes to {len(wrong)} wrong bytes, first at {wrong[0].tolist()}"
        )
    others = sorted(set(range(target.kv.num_pages)) - set(target.pages.reshape(-1).tolist()))
    axis = case.axes.split().index("page")
    for layer, before in zip(target.layers, untouched, strict=True):
        at = torch.tensor(others)
        assert torch.equal(bits(layer.index_select(axis, at)), bits(before.index_select(axis, at)))


def compare_sections(codec: Codec, layout: Layout, block: int, sections: Sequence[bytes], payload: bytes) -> None:
    """Raises where a payload is not these sections; says where, in which."""
    at = 0
    for planes, section in zip(layout.planes, sections, strict=codec.name != "raw"):
        got = np.frombuffer(payload[at : at + len(section)], np.uint8)
        wrong = np.flatnonzero(got != np.frombuffer(section, np.uint8))
        assert not len(wrong), (
            f"{codec.name}: block {block}, {planes.role}: {len(wrong)} wrong bytes, the first at {wrong[0]}"
        )
        at += len(section)
    assert at == len(payload)


def bits(x: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor, each NaN the same."""
    if x.is_floating_point() and x.dtype.itemsize > 1:
        x = x.masked_fill(x.isnan(), torch.nan)
    return x.contiguous().view(torch.uint8)
