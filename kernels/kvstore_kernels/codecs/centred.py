"""Keys of ``centred4``, ``centred3``, ``centred2`` and mixtures: less their mean over tokens, then as turbo.

4.25, 3.25 and 2.25 bits a key at 128 channels and 128 tokens; values are plain turbo.

Two thirds of what the keys of a trained transformer hold is the same for all tokens of a head: its bias, and the slowly
turning rotary channels. A turbo code's error is a share of the whole vector, so it pays for that part in every token.
Here the mean of a group of tokens is stored once, and the codes are of what is left. Three things make it hold:

- The few tokens that attention sinks into have small vectors, far from the mean. Each vector is coded with or without
  the mean removed, whichever is shorter; the sign of its scale says which.
- Channels that stand out would spread their error over all others. Each channel is divided by the square root of its
  strength, in steps of the square root of two, between leaving channels as they are and making all of them equal.
- All parameters but a vector's scale are a byte a channel and group, so they cost an eighth of a bit at 128 tokens.

A mean is removed in KVTC (arXiv 2511.01815), and SmoothQuant (arXiv 2211.10438) scales by roots of channels' strengths;
both calibrate once a model, where this needs nothing but the block. Choosing by vector is this project's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from kvstore_kernels.codecs import arithmetic
from kvstore_kernels.codecs.method import PlaneMethod, Region
from kvstore_kernels.codecs.turbo import VOID_ABOVE, Turbo, sum_of_squares, vector_elements
from kvstore_kernels.layout import Planes

if TYPE_CHECKING:
    import torch

MOST_TOKENS: Final = 128
"""Tokens of a group, where the block's are a multiple of it; half as many elsewhere."""

LEAST_EXPONENT: Final = -20
GREATEST_EXPONENT: Final = 20
"""Bounds of a channel's exponent, in half octaves."""

_MEAN_QUOTIENT: Final = 127


class CentredKey(PlaneMethod):
    """Turbo codes of vectors less the mean of their group of tokens."""

    token_multiple = MOST_TOKENS // 2

    def __init__(self, bits: int) -> None:
        self.name = f"centred{bits}k"
        self._turbo = Turbo(bits)
        self.parameters = (
            f"mean=int8 group={MOST_TOKENS},{MOST_TOKENS // 2}tokens exponents={LEAST_EXPONENT}..{GREATEST_EXPONENT} "
            f"strength=1/2 far=sign {arithmetic.BOUNDS} {self._turbo.parameters}"
        )

    def check(self, planes: Planes, block_tokens: int) -> None:
        """As ``PlaneMethod.check``."""
        super().check(planes, block_tokens)
        self._turbo.check(planes, block_tokens)

    def regions(self, planes: Planes, block_tokens: int) -> tuple[Region, ...]:
        """Those of turbo, then mean scales ``[L, H, N]``, mean codes and exponents ``[L, H, N, D]``, N groups."""
        groups = (planes.num_layers, planes.num_heads, block_tokens // group_tokens(block_tokens))
        return (
            *self._turbo.regions(planes, block_tokens),
            Region("mean_scales", groups, "float16"),
            Region("mean_codes", (*groups, planes.dim), "int8"),
            Region("exponents", (*groups, planes.dim), "int8"),
        )

    def encode(self, x: torch.Tensor) -> tuple[tuple[torch.Tensor, ...], int]:
        """As ``PlaneMethod.encode``."""
        import torch

        tokens, dim = x.shape[2:]
        void = ~(_squares(x) <= VOID_ABOVE)
        x = x.masked_fill(_of_elements(void, dim), 0)
        groups = x.unflatten(2, (-1, group_tokens(tokens)))
        mean = _sum_in_order(groups) * arithmetic.float32(1 / groups.shape[3])
        quotients = arithmetic.symmetric(mean, (3,), _MEAN_QUOTIENT)
        mean_codes = quotients.codes.round()
        centred = (groups - (mean_codes * quotients.scale)[:, :, :, None]).flatten(2, 3)
        far = void | (_squares(x) < _squares(centred))
        chosen = torch.where(_of_elements(far, dim), x, centred)
        exponents = _exponents(_sum_in_order((chosen * chosen).unflatten(2, (-1, groups.shape[3]))))
        scaled = (chosen.unflatten(2, (-1, groups.shape[3])) * _factors(-exponents)[:, :, :, None]).flatten(2, 3)
        (*packed, scales), _ = self._turbo.encode(scaled)
        scales = scales.flatten(2)
        scales = torch.where(far.flatten(2), -scales, scales)
        parameters = (quotients.scale.squeeze(3).half(), mean_codes.to(torch.int8), exponents.to(torch.int8))
        return (*packed, scales, *parameters), int(void.sum())

    def decode(self, regions: Sequence[torch.Tensor], planes: Planes, block_tokens: int) -> torch.Tensor:
        """As ``PlaneMethod.decode``."""
        *packed, scales, mean_scales, mean_codes, exponents = regions
        shape = (-1, group_tokens(block_tokens))
        far = scales.signbit().unflatten(2, (block_tokens, -1))
        scaled = self._turbo.decode((*packed, scales.abs()), planes, block_tokens)
        vectors = scaled.unflatten(2, shape) * _factors(exponents)[:, :, :, None]
        mean = mean_codes.float() * mean_scales.float()[..., None]
        centred = vectors + mean[:, :, :, None]
        return vectors.where(_of_elements(far, planes.dim).unflatten(2, shape), centred).flatten(2, 3)


def group_tokens(block_tokens: int) -> int:
    """Tokens of a group."""
    return MOST_TOKENS if block_tokens % MOST_TOKENS == 0 else MOST_TOKENS // 2


def _squares(x: torch.Tensor) -> torch.Tensor:
    """Sum of squares of each vector of ``[L, H, T, D]``: ``[L, H, T, D / B]``."""
    return sum_of_squares(x.unflatten(3, (-1, vector_elements(x.shape[3])))).squeeze(-1)


def _of_elements(vectors: torch.Tensor, dim: int) -> torch.Tensor:
    """What ``[L, H, T, D / B]`` says of vectors, said of their elements: ``[L, H, T, D]``."""
    return vectors.repeat_interleave(dim // vectors.shape[3], 3)


def _sum_in_order(groups: torch.Tensor) -> torch.Tensor:
    """The sum of ``[L, H, N, G, D]`` over the tokens of a group, one after the other: ``[L, H, N, D]``."""
    total = groups[:, :, :, 0]
    for token in range(1, groups.shape[3]):
        total = total + groups[:, :, :, token]
    return total


def _exponents(strengths: torch.Tensor) -> torch.Tensor:
    """Half octaves of the root of the root of a sum of squares: half of its binary exponent, rounded up."""
    import torch

    binary = (strengths.view(torch.int32) >> 23) - 127
    return ((binary + 1) >> 1).clamp(LEAST_EXPONENT, GREATEST_EXPONENT)


def _factors(exponents: torch.Tensor) -> torch.Tensor:
    """``2**(exponent / 2)`` as float32, of exponents that are brought within their bounds."""
    import torch

    table = [arithmetic.float32(2 ** (k / 2)) for k in range(LEAST_EXPONENT, GREATEST_EXPONENT + 1)]
    return torch.tensor(table, device=exponents.device)[
        exponents.long().clamp(LEAST_EXPONENT, GREATEST_EXPONENT) - LEAST_EXPONENT
    ]
