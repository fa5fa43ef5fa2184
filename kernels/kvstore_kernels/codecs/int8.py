"""``int8``: whole numbers and one float16 scale for each token of a head. 8.125 bits a value at 128 channels.

Symmetric round-to-nearest with the greatest magnitude mapped to 127, as engines' own int8 caches do it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from kvstore_kernels.codecs import arithmetic
from kvstore_kernels.codecs.method import PlaneMethod, Region
from kvstore_kernels.layout import Planes

if TYPE_CHECKING:
    import torch

GREATEST: Final = 127


class Int8(PlaneMethod):
    """Groups of one token of a plane, all its channels."""

    name = "int8"
    parameters = f"symmetric bits=8 group=token quotient={GREATEST} {arithmetic.BOUNDS}"

    def regions(self, planes: Planes, block_tokens: int) -> tuple[Region, ...]:
        """Codes ``[L, H, T, D]`` in two's complement and scales ``[L, H, T]``."""
        outer = (planes.num_layers, planes.num_heads, block_tokens)
        return Region("codes", (*outer, planes.dim), "int8"), Region("scales", outer, "float16")

    def encode(self, x: torch.Tensor) -> tuple[tuple[torch.Tensor, ...], int]:
        """As ``PlaneMethod.encode``."""
        codes, scale, _, void = arithmetic.symmetric(x, (3,), GREATEST)
        return (codes.round().char(), scale.half()), int(void.sum())

    def decode(self, regions: Sequence[torch.Tensor], planes: Planes, block_tokens: int) -> torch.Tensor:
        """As ``PlaneMethod.decode``."""
        codes, scales = regions
        return codes.float() * scales.float()[..., None]
