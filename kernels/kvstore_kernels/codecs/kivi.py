"""``kivi4`` and ``kivi2``: keys by channel over tokens, values by token over channels. 4.5 and 3 bits a value.

KIVI (Liu and others, ICML 2024, arXiv 2402.02750): a few channels of the keys are large for all tokens, so a group of
one channel holds alike numbers, whereas values have no such channels. Groups of 64 tokens of a channel at four bits and
of 32 at two; no calibration. The recent tokens that KIVI leaves unquantised are here the engine's open block.

``kivi4`` encodes values as ``int4`` does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvstore_kernels.codecs import arithmetic
from kvstore_kernels.codecs.method import PlaneMethod, Region
from kvstore_kernels.layout import Planes

if TYPE_CHECKING:
    import torch


class KiviKey(PlaneMethod):
    """Groups of 64 (four bits) or 32 (two bits) tokens of one channel.

    A word has the codes of two neighbouring channels for as many tokens as fit: four, or eight.
    """

    def __init__(self, name: str, bits: int) -> None:
        self.name = name
        self.parameters = (
            f"asymmetric bits={bits} group={16 * bits}tokens order=tokens{16 // bits}channels2 {arithmetic.BOUNDS}"
        )
        self.token_multiple = 16 * bits
        self._bits = bits
        self._word_tokens = 16 // bits

    def regions(self, planes: Planes, block_tokens: int) -> tuple[Region, ...]:
        """Codes ``[L, H, T/G, words, D/2]`` and parameters ``[L, H, T/G, 2, D]`` (scales, then minima)."""
        outer = (planes.num_layers, planes.num_heads, block_tokens // self.token_multiple)
        words = self.token_multiple // self._word_tokens
        return (
            Region("codes", (*outer, words, planes.dim // 2), "uint32"),
            Region("parameters", (*outer, 2, planes.dim), "float16"),
        )

    def encode(self, x: torch.Tensor) -> tuple[tuple[torch.Tensor, ...], int]:
        """As ``PlaneMethod.encode``."""
        import torch

        groups = x.unflatten(2, (-1, self.token_multiple))
        codes, scale, minimum, void = arithmetic.asymmetric(groups, (3,), self._bits)
        words = codes.unflatten(4, (-1, 2)).unflatten(3, (-1, self._word_tokens))
        # [L, H, group, word row, token, channel pair, channel] to tokens within pairs
        words = words.movedim(4, 5).flatten(5)
        return (arithmetic.pack(words, self._bits), torch.cat([scale, minimum], 3).half()), int(void.sum())

    def decode(self, regions: Sequence[torch.Tensor], planes: Planes, block_tokens: int) -> torch.Tensor:
        """As ``PlaneMethod.decode``."""
        packed, parameters = regions
        words = arithmetic.unpack(packed, self._bits).unflatten(5, (self._word_tokens, 2))
        codes = words.movedim(5, 4).flatten(5).flatten(3, 4)
        scale, minimum = parameters.float().split(1, 3)
        return (codes * scale + minimum).flatten(2, 3)


class Kivi2Value(PlaneMethod):
    """Groups of 32 channels of a token, or 16 where 32 does not divide the channels; two bits."""

    name = "kivi2v"
    parameters = f"asymmetric bits=2 group=32,16channels order=lanes64,natural {arithmetic.BOUNDS}"

    def regions(self, planes: Planes, block_tokens: int) -> tuple[Region, ...]:
        """Codes ``[L, H, T, D/64, 8]`` u16 or ``[L, H, T, D/4]`` u8; parameters ``[L, H, T, D/G, 2]``."""
        outer = (planes.num_layers, planes.num_heads, block_tokens)
        if planes.dim % 64 == 0:
            codes = Region("codes", (*outer, planes.dim // 64, 8), "uint16")
        else:
            codes = Region("codes", (*outer, planes.dim // 4), "uint8")
        return codes, Region("parameters", (*outer, planes.dim // _value_group(planes.dim), 2), "float16")

    def encode(self, x: torch.Tensor) -> tuple[tuple[torch.Tensor, ...], int]:
        """As ``PlaneMethod.encode``."""
        import torch

        dim = x.shape[-1]
        groups = x.unflatten(-1, (-1, _value_group(dim)))
        codes, scale, minimum, void = arithmetic.asymmetric(groups, (-1,), 2)
        codes = codes.flatten(-2)
        if dim % 64 == 0:
            codes = codes.unflatten(-1, (-1, 4, 8, 2)).movedim(-3, -2).flatten(-3)
        return (arithmetic.pack(codes, 2), torch.cat([scale, minimum], -1).half()), int(void.sum())

    def decode(self, regions: Sequence[torch.Tensor], planes: Planes, block_tokens: int) -> torch.Tensor:
        """As ``PlaneMethod.decode``."""
        packed, parameters = regions
        codes = arithmetic.unpack(packed, 2)
        if planes.dim % 64 == 0:
            # [..., D/64, word, two bytes, code of the byte]: four codes a byte are an axis of their own
            codes = codes.flatten(-2).unflatten(-1, (8, 4, 2)).movedim(-3, -2).flatten(-4)
        scale, minimum = parameters.float().split(1, -1)
        return (codes.unflatten(-1, (-1, _value_group(planes.dim))) * scale + minimum).flatten(-2)


def _value_group(dim: int) -> int:
    return 32 if dim % 32 == 0 else 16
