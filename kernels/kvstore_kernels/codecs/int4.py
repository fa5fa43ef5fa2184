"""``int4``: four bits, with a scale and a minimum for 64 channels of a token. 4.5 bits a value.

Asymmetric round-to-nearest within groups of channels, the rule that KIVI (arXiv 2402.02750) found right for values and
that QuaRot (arXiv 2404.00456) uses for both after its rotation. Used for keys without a rotation it suffers from the
channels that stand out; ``kivi4`` has the same size and does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvstore_kernels.codecs import arithmetic
from kvstore_kernels.codecs.method import PlaneMethod, Region
from kvstore_kernels.layout import Planes

if TYPE_CHECKING:
    import torch


class Int4(PlaneMethod):
    """Groups of 64 channels of a token, or 32 or 16 where 64 does not divide the channels."""

    parameters = f"asymmetric bits=4 group=64,32,16channels order=lanes64,natural {arithmetic.BOUNDS}"

    def __init__(self, name: str) -> None:
        self.name = name

    def regions(self, planes: Planes, block_tokens: int) -> tuple[Region, ...]:
        """Codes ``[L, H, T, D/G, G/2]`` and parameters ``[L, H, T, D/G, 2]`` (scale, minimum)."""
        group = group_channels(planes.dim)
        outer = (planes.num_layers, planes.num_heads, block_tokens, planes.dim // group)
        return Region("codes", (*outer, group // 2), "uint8"), Region("parameters", (*outer, 2), "float16")

    def encode(self, x: torch.Tensor) -> tuple[tuple[torch.Tensor, ...], int]:
        """As ``PlaneMethod.encode``."""
        import torch

        group = group_channels(x.shape[-1])
        codes, scale, minimum, void = arithmetic.asymmetric(x.unflatten(-1, (-1, group)), (-1,), 4)
        if group == 64:
            codes = codes.unflatten(-1, (4, 8, 2)).movedim(-3, -2).flatten(-3)
        return (arithmetic.pack(codes, 4), torch.cat([scale, minimum], -1).half()), int(void.sum())

    def decode(self, regions: Sequence[torch.Tensor], planes: Planes, block_tokens: int) -> torch.Tensor:
        """As ``PlaneMethod.decode``."""
        packed, parameters = regions
        codes = arithmetic.unpack(packed, 4)
        if group_channels(planes.dim) == 64:
            codes = codes.unflatten(-1, (8, 4, 2)).movedim(-3, -2).flatten(-3)
        scale, minimum = parameters.float().split(1, -1)
        return (codes * scale + minimum).flatten(-2)


def group_channels(dim: int) -> int:
    """Channels of a group."""
    return next(group for group in (64, 32, 16) if dim % group == 0)
