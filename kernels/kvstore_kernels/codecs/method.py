"""How the planes of one section are encoded: what a method says of itself, and its reference implementation.

Methods know planes, not blocks or codecs; ``PlanesCodec`` makes a codec of one or two. Importing this module loads the
standard library only.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from kvstore_kernels.layout import ELEMENT_BYTES, Planes

if TYPE_CHECKING:
    import torch

LOSSY_DTYPES: Final = ("bfloat16", "float16", "float32")
"""Element types that lossy codecs take."""

REGION_BYTES: Final = ELEMENT_BYTES | {"uint16": 2, "uint32": 4}
"""Bytes an element of a region, by dtype name."""


@dataclass(frozen=True, slots=True)
class Region:
    """An array of a section, in C order, little-endian.

    Attributes:
        name: what it holds, for example ``"codes"``.
        shape: its first axes are layer and head, unless the planes are stored as they are.
        dtype: name of the element type.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def region_bytes(self) -> int:
        """Bytes of the region."""
        return math.prod(self.shape) * REGION_BYTES[self.dtype]


class PlaneMethod(ABC):
    """How the planes of one section are encoded.

    Attributes:
        name: as ``Codec.plane_codec`` gives it.
        parameters: text that names everything that the bytes depend on.
        token_multiple: block tokens must be a multiple of this.
    """

    name: str
    parameters: str
    token_multiple: int = 1

    def check(self, planes: Planes, block_tokens: int) -> None:
        """Whether the method can encode planes of this shape.

        Raises:
            ValueError: it cannot; says why, and what would do.
        """
        if planes.dtype not in LOSSY_DTYPES:
            raise ValueError(f"takes {', '.join(LOSSY_DTYPES)}, got {planes.dtype}: use an exact codec (raw, lossless)")
        if planes.dim % 16:
            raise ValueError(
                f"needs a {planes.role} dimension that is a multiple of 16, got {planes.dim}: "
                "use an exact codec (raw, lossless)"
            )
        if block_tokens % self.token_multiple:
            raise ValueError(
                f"needs blocks of a multiple of {self.token_multiple} tokens, got {block_tokens}: "
                "change block_tokens or use a codec that takes any (int4, int8, fp8)"
            )

    @abstractmethod
    def regions(self, planes: Planes, block_tokens: int) -> tuple[Region, ...]:
        """The regions of the section, in order."""

    @abstractmethod
    def encode(self, x: torch.Tensor) -> tuple[tuple[torch.Tensor, ...], int]:
        """Encode planes.

        Args:
            x: ``[layers, heads, tokens, dim]``, float32.

        Returns:
            A tensor for each region, with its bytes in its order, and the number of void groups.
        """

    @abstractmethod
    def decode(self, regions: Sequence[torch.Tensor], planes: Planes, block_tokens: int) -> torch.Tensor:
        """Decode planes.

        Args:
            regions: a tensor for each region, of its shape; words (uint16, uint32) are an axis of bytes at the end.
            planes: what was encoded.
            block_tokens: tokens of a plane.

        Returns:
            ``[layers, heads, tokens, dim]``, float32, not yet rounded to the dtype.
        """
