"""``fp8``: E4M3 numbers and one float16 scale for 64 tokens of a head. 8.002 bits a value.

The number format is OCP 8-bit floating point E4M3 (OCP OFP8 revision 1.0; Micikevicius and others, "FP8 formats for
deep learning", arXiv 2209.05433): no infinities, 448 the greatest. The scale maps the greatest magnitude to 448.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from kvstore_kernels.codecs import arithmetic
from kvstore_kernels.codecs.method import PlaneMethod, Region
from kvstore_kernels.layout import Planes

if TYPE_CHECKING:
    import torch

GROUP_TOKENS: Final = 64
GREATEST: Final = 448


class Fp8(PlaneMethod):
    """Groups of 64 tokens of a plane, the last one shorter."""

    name = "fp8"
    parameters = f"symmetric e4m3 group={GROUP_TOKENS}tokens quotient={GREATEST} {arithmetic.BOUNDS}"

    def regions(self, planes: Planes, block_tokens: int) -> tuple[Region, ...]:
        """Codes ``[L, H, T, D]`` and scales ``[L, H, ceil(T/64)]``."""
        outer = (planes.num_layers, planes.num_heads)
        return (
            Region("codes", (*outer, block_tokens, planes.dim), "uint8"),
            Region("scales", (*outer, -(-block_tokens // GROUP_TOKENS)), "float16"),
        )

    def encode(self, x: torch.Tensor) -> tuple[tuple[torch.Tensor, ...], int]:
        """As ``PlaneMethod.encode``."""
        import torch

        groups = [arithmetic.symmetric(group, (2, 3), GREATEST) for group in x.split(GROUP_TOKENS, 2)]
        codes = torch.cat([group.codes for group in groups], 2).clamp(-GREATEST, GREATEST).to(torch.float8_e4m3fn)
        scales = torch.cat([group.scale for group in groups], 2).half()
        return (codes, scales), sum(int(group.void.sum()) for group in groups)

    def decode(self, regions: Sequence[torch.Tensor], planes: Planes, block_tokens: int) -> torch.Tensor:
        """As ``PlaneMethod.decode``."""
        import torch

        codes, scales = regions
        of_token = scales.float().repeat_interleave(GROUP_TOKENS, 2)[:, :, :block_tokens, None]
        return codes.view(torch.float8_e4m3fn).float() * of_token
