"""``turbo4``, ``turbo3``, ``turbo2`` and mixtures: rotated vectors on Lloyd-Max levels. 4.125, 3.125, 2.125 bits.

A random rotation makes the coordinates of any vector nearly normal and independent, so that one table of levels, the
best for a normal distribution (Lloyd 1982, Max 1960), fits all of them: TurboQuant (Zandieh and others, ICLR 2026,
arXiv 2504.19874). The rotation is a Walsh-Hadamard transform after random signs, as in QuaRot (arXiv 2404.00456). Of
TurboQuant's two forms neither scale is used: the scale here makes the product of a vector and its decoded form the
square of its length, which keeps dot products from shrinking and with that the softmax from flattening.

Coordinates are normalised to a deviation of 2048 and rounded to whole numbers before they meet the thresholds, so that
codes and scale do not depend on the order of any sum but that of the squares, which the contract fixes.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from kvstore_kernels.codecs import arithmetic
from kvstore_kernels.codecs.method import PlaneMethod, Region
from kvstore_kernels.layout import Planes

if TYPE_CHECKING:
    import torch

ROW: Final = 128
"""Elements whose codes are packed together."""

DEVIATION: Final = 2048
"""Standard deviation of the normalised coordinates."""

LEVELS: Final[dict[int, tuple[int, ...]]] = {
    4: (263, 795, 1345, 1930, 2573, 3314, 4237, 5596),
    3: (502, 1548, 2752, 4407),
    2: (927, 3093),
}
"""Magnitudes of the Lloyd-Max levels of a normal distribution, times ``DEVIATION``, by bits."""

THRESHOLDS: Final[dict[int, tuple[int, ...]]] = {
    4: (529, 1070, 1637, 2251, 2943, 3776, 4917),
    3: (1025, 2150, 3580),
    2: (2010,),
}
"""Midpoints of the levels before rounding; a magnitude above a threshold belongs to the next level."""

ZERO_BELOW: Final = 2.0**-40
"""A vector whose squares sum up to less is taken for zero."""

VOID_ABOVE: Final = 2.0**26
"""A vector whose squares sum up to more is void."""

SIGNS: Final = hashlib.sha256(b"kvstore turbo signs").digest()
"""Bit i, counted from bit 0 of byte 0, flips the sign of element i of a vector."""


class Turbo(PlaneMethod):
    """Vectors of the largest power of two that divides the channels, at most 128."""

    def __init__(self, bits: int) -> None:
        self.name = f"turbo{bits}"
        self.parameters = (
            f"hadamard signs={SIGNS[:16].hex()} deviation={DEVIATION} bits={bits} "
            f"levels={','.join(map(str, LEVELS[bits]))} thresholds={','.join(map(str, THRESHOLDS[bits]))} "
            "scale=dot zero=2^-40 limit=2^26"
        )
        self._bits = bits

    def check(self, planes: Planes, block_tokens: int) -> None:
        """As ``PlaneMethod.check``."""
        super().check(planes, block_tokens)
        if block_tokens * planes.dim % ROW:
            multiple = ROW // math.gcd(planes.dim, ROW)
            raise ValueError(
                f"needs blocks of a multiple of {multiple} tokens at {planes.dim} channels, got {block_tokens}: "
                "change block_tokens or use a codec that takes any (int4, int8, fp8)"
            )

    def regions(self, planes: Planes, block_tokens: int) -> tuple[Region, ...]:
        """Codes ``[L, H, R, 2, 16]`` or ``[L, H, R, 16]`` u16, signs ``[L, H, R, 16]`` u8 at three bits, scales."""
        outer = (planes.num_layers, planes.num_heads)
        rows = block_tokens * planes.dim // ROW
        scales = Region("scales", (*outer, rows * ROW // vector_elements(planes.dim)), "float16")
        if self._bits == 4:
            return Region("codes", (*outer, rows, 2, 16), "uint16"), scales
        codes = Region("codes", (*outer, rows, 16), "uint16")
        if self._bits == 2:
            return codes, scales
        return codes, Region("signs", (*outer, rows, 16), "uint8"), scales

    def encode(self, x: torch.Tensor) -> tuple[tuple[torch.Tensor, ...], int]:
        """As ``PlaneMethod.encode``."""
        import torch

        vectors = x.flatten(2).unflatten(2, (-1, vector_elements(x.shape[-1])))
        squares = sum_of_squares(vectors)
        void = ~(squares <= VOID_ABOVE)
        empty = void | (squares < ZERO_BELOW)
        norm = squares.masked_fill(empty, 1).sqrt()
        rotated = hadamard(flip_signs(vectors)).masked_fill(empty, 0)
        y = (rotated * (DEVIATION / norm)).round().int()
        magnitude = y.abs()
        index = sum((magnitude > threshold).int() for threshold in THRESHOLDS[self._bits])
        level = torch.tensor(LEVELS[self._bits], dtype=torch.int32, device=x.device)[index]
        dot = (magnitude * level).sum(-1, keepdim=True).float()
        factor = arithmetic.float32(math.sqrt(vectors.shape[-1]) * DEVIATION**2)
        scale = (norm * factor / dot).half().masked_fill(empty, 0)
        negative = (y < 0).int()
        return (*self._pack(index, negative), scale), int(void.sum())

    def decode(self, regions: Sequence[torch.Tensor], planes: Planes, block_tokens: int) -> torch.Tensor:
        """As ``PlaneMethod.decode``."""
        import torch

        *packed, scales = regions
        elements = vector_elements(planes.dim)
        index, negative = self._unpack(packed)
        level = torch.tensor(LEVELS[self._bits])[index] / DEVIATION
        z = torch.where(negative == 1, -level, level).flatten(2).unflatten(2, (-1, elements))
        factor = scales.float() * arithmetic.float32(1 / math.sqrt(elements))
        vectors = flip_signs(hadamard(z) * factor[..., None])
        return vectors.flatten(2).unflatten(2, (block_tokens, planes.dim))

    def _pack(self, index: torch.Tensor, negative: torch.Tensor) -> tuple[torch.Tensor, ...]:
        rows = index.flatten(2).unflatten(2, (-1, ROW)), negative.flatten(2).unflatten(2, (-1, ROW))
        if self._bits == 3:
            return arithmetic.pack(_strided(rows[0], 8), 2), arithmetic.pack(_strided(rows[1], 8), 1)
        codes = rows[0] | (rows[1] << (self._bits - 1))
        return (arithmetic.pack(_strided(codes, 16 // self._bits), self._bits),)

    def _unpack(self, packed: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Index of the level and sign bit, each ``[L, H, R, 128]``."""
        bits = self._bits
        if bits == 3:
            index, negative = arithmetic.unpack(packed[0], 2), arithmetic.unpack(packed[1][..., None], 1)
            return _unstrided(index), _unstrided(negative)
        codes = _unstrided(arithmetic.unpack(packed[0], bits))
        return codes & (2 ** (bits - 1) - 1), codes >> (bits - 1)


def vector_elements(dim: int) -> int:
    """Elements of a vector, B."""
    return math.gcd(dim, ROW)


def sum_of_squares(vectors: torch.Tensor) -> torch.Tensor:
    """Squares of ``[..., B]`` summed up in the order of the contract: ``[..., 1]``."""
    squares = (vectors * vectors).unflatten(-1, (-1, 2))
    rows = (squares[..., 0] + squares[..., 1]).unflatten(-1, (-1, 8))
    while rows.shape[-2] > 1:
        first, second = rows.chunk(2, -2)
        rows = first + second
    lanes = rows.squeeze(-2)
    while lanes.shape[-1] > 1:
        first, second = lanes.chunk(2, -1)
        lanes = first + second
    return lanes


def hadamard(vectors: torch.Tensor) -> torch.Tensor:
    """Walsh-Hadamard butterfly over ``[..., B]``, without a factor."""
    import torch

    distance = 1
    while distance < vectors.shape[-1]:
        first, second = vectors.unflatten(-1, (-1, 2, distance)).unbind(-2)
        vectors = torch.stack([first + second, first - second], -2).flatten(-3)
        distance *= 2
    return vectors


def flip_signs(vectors: torch.Tensor) -> torch.Tensor:
    """Flips the signs that ``SIGNS`` marks."""
    import torch

    flipped = torch.tensor(_sign_bits(vectors.shape[-1]), device=vectors.device)
    return torch.where(flipped, -vectors, vectors)


@functools.cache
def _sign_bits(elements: int) -> tuple[bool, ...]:
    return tuple(bool(SIGNS[i // 8] >> (i % 8) & 1) for i in range(elements))


def _strided(rows: torch.Tensor, codes_a_word: int) -> torch.Tensor:
    """Rows ``[..., 128]`` as words whose codes are 16 elements apart: ``[..., (2,) 16, codes]``."""
    return rows.unflatten(-1, (-1, codes_a_word, 16)).movedim(-1, -2).squeeze(-3)


def _unstrided(words: torch.Tensor) -> torch.Tensor:
    """Inverse of ``_strided``."""
    return words.movedim(-1, -2).flatten(3)
