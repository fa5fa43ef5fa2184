"""Blocks for tests of codecs: layouts of many shapes, and numbers like those of a KV cache."""

from __future__ import annotations

from typing import Final

import torch

from kvstore_kernels.codecs import CODECS, Codec
from kvstore_kernels.layout import KVLayout, Layout, MLALayout, Role

DIMS: Final = (16, 32, 64, 80, 96, 112, 128, 192, 256)
DTYPES: Final = ("bfloat16", "float16", "float32")
LAYOUTS: Final[tuple[Layout, ...]] = (
    *(KVLayout(1, 2, dim, dtype, 64) for dim in DIMS for dtype in DTYPES),
    KVLayout(2, 3, 64, "bfloat16", 128),
    *(MLALayout(2, latent, 64, dtype, 64) for latent in (512, 192) for dtype in DTYPES),
)
CENTRED: Final = {name: codec for name, codec in CODECS.items() if name.startswith("centred")}
LOSSY: Final = tuple(codec for codec in CODECS.values() if not codec.exact)
STEP_SLACK: Final = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 2.0**-23}
"""Relative error of rounding a value to a dtype, doubled."""


def layout_id(layout: Layout) -> str:
    return f"{layout.text.partition(' axes')[0].replace(' ', ',')},{layout.dtype}"


def normal_block(layout: Layout, seed: int = 0, *, outliers: bool = False) -> torch.Tensor:
    """Normal numbers of deviation 1; with outliers two channels of the keys (or latents) are 8 times as large."""
    block = torch.randn(layout.shape, generator=torch.Generator().manual_seed(seed))
    if outliers:
        keys = layout.split(block)[0]
        keys[..., 3] *= 8
        keys[..., -5] *= 8
    return block.to(getattr(torch, layout.dtype))


def any_bits(layout: Layout, seed: int) -> torch.Tensor:
    """Every bit pattern is as likely as another: NaN, infinities and denormals among them."""
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 256, (layout.block_bytes,), generator=generator, dtype=torch.uint8)
    return raw.view(getattr(torch, layout.dtype)).view(layout.shape)


def round_trip(codec: Codec, block: torch.Tensor, layout: Layout) -> torch.Tensor:
    return codec.decode(codec.encode(block, layout).sections, layout)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and bool((a.contiguous().view(torch.uint8) == b.contiguous().view(torch.uint8)).all())


def snr_db(block: torch.Tensor, decoded: torch.Tensor) -> float:
    """Signal-to-noise ratio in dB."""
    x, y = block.double(), decoded.double()
    return float(10 * torch.log10(x.square().sum() / (x - y).square().sum()))


def lossy_roles(layout: Layout) -> list[int]:
    """Indices of the sections that lossy codecs quantise."""
    return [index for index, planes in enumerate(layout.planes) if planes.role is not Role.ROTARY]
