"""Arithmetic that several codecs share, in plain torch: rounding, group parameters, bit packing, bytes.

Every step is one float32 operation, rounded to nearest even, in the order that ``docs/codecs.md`` gives; that is what
makes codes the same to the bit on every backend. Functions take and give tensors of any device; torch is loaded by
those that need more than a tensor's own methods, so importing this module does not load it.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    import torch

LIMIT: Final = 61440.0
"""Greatest magnitude that an int or fp8 group may hold; a group with more, or with a NaN, is void."""

FLOOR_BITS: Final = 0x00A8
FLOOR: Final = FLOOR_BITS * 2.0**-24
"""Smallest scale, 1.0014e-05, and its bits as float16."""

BOUNDS: Final = f"floor={FLOOR_BITS:04x} limit={LIMIT:.0f}"
"""Both, as they stand in the parameters of codecs."""


class Quantised(NamedTuple):
    """Codes of groups and what turns them back into values.

    Attributes:
        codes: quotients, float32, whole numbers from ``asymmetric`` and unrounded from ``symmetric``; 0 in void groups.
        scale: float32 that float16 holds exactly, one a group; 0 for a void group.
        minimum: likewise; 0 where the rule has none.
        void: bool, one a group.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    minimum: torch.Tensor
    void: torch.Tensor


def float32(number: float) -> float:
    """The float32 nearest to a number, ``fl(x)`` in the contract."""
    return float(struct.unpack("<f", struct.pack("<f", number))[0])


def half(x: torch.Tensor) -> torch.Tensor:
    """``f16(x)``: rounded to float16, as float32, a zero made positive."""
    return x.half().float() + 0.0


def symmetric(x: torch.Tensor, axes: tuple[int, ...], quotient: int) -> Quantised:
    """Scales by the greatest magnitude of each group; the codes are not rounded yet.

    Args:
        x: float32.
        axes: axes of ``x`` that a group spans; parameters keep them with length 1.
        quotient: magnitude that the greatest number of a group is mapped to.
    """
    greatest = x.abs().amax(axes, keepdim=True)
    void = ~(greatest <= LIMIT)
    scale = half(greatest * float32(1 / quotient)).clamp(min=FLOOR).masked_fill(void, 0)
    codes = (x * (1 / scale)).masked_fill(void, 0)
    return Quantised(codes, scale, scale * 0, void)


def asymmetric(x: torch.Tensor, axes: tuple[int, ...], bits: int) -> Quantised:
    """Minimum and scale of each group, and the codes ``0 .. 2**bits - 1``.

    Args:
        x: float32.
        axes: axes of ``x`` that a group spans; parameters keep them with length 1.
        bits: of a code.
    """
    greatest_code = 2**bits - 1
    low, high = x.amin(axes, keepdim=True), x.amax(axes, keepdim=True)
    void = ~((low >= -LIMIT) & (high <= LIMIT))
    minimum = half(low).masked_fill(void, 0)
    scale = half((high - low) * float32(1 / greatest_code)).clamp(min=FLOOR).masked_fill(void, 0)
    codes = ((x - minimum) * (1 / scale)).clamp(0, greatest_code).round().masked_fill(void, 0)
    return Quantised(codes, scale, minimum, void)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes in natural order as bytes: the first of a byte in its low bits.

    Args:
        codes: whole numbers below ``2**bits``, shape ``[..., n]``; ``n * bits`` is a multiple of 8.
        bits: of a code: 1, 2 or 4.

    Returns:
        uint8 ``[..., n * bits / 8]``.
    """
    import torch

    grouped = codes.int().unflatten(-1, (-1, 8 // bits))
    packed = grouped[..., 0]
    for place in range(1, 8 // bits):
        packed = packed | (grouped[..., place] << (bits * place))
    return packed.to(torch.uint8)


def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Inverse of ``pack``: int32 ``[..., n]``."""
    import torch

    wide = packed.int()
    places = [(wide >> (bits * place)) & (2**bits - 1) for place in range(8 // bits)]
    return torch.stack(places, -1).flatten(-2)


def to_bytes(tensor: torch.Tensor) -> bytes:
    """The bytes of a tensor in C order."""
    import torch

    data: bytes = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return data


def from_bytes(data: bytes | bytearray | memoryview, dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor of a copy of the bytes."""
    import torch

    return torch.frombuffer(bytearray(data), dtype=getattr(torch, dtype)).view(shape)
