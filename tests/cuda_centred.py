"""What the CUDA kernels of centred keys are tested with: shapes, and numbers that matter to them.

``known`` has the numbers found by kind.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Final
from unittest import mock

import torch
from codec_blocks import CENTRED
from emulator import cases
from emulator.cases import Case, fill

from kvstore_kernels.layout import KVLayout, MLALayout


def _mha(
    codec: str, dtype: str, heads: int, dim: int, tokens: int, page: int, layers: int = 1, offset: int = 0
) -> Case:
    return Case(codec, KVLayout(layers, heads, dim, dtype, tokens), page, offset=offset)


NAMES: Final = tuple(CENTRED)

MAIN: Final = tuple(_mha(codec, "bfloat16", 4, 128, 64, 16, layers=2) for codec in ("centred4", "centred3", "centred2"))
"""Each width once, in its fastest form: both sections at multiples of 16."""

CENTRED_CASES: Final[tuple[Case, ...]] = (
    *MAIN,
    _mha("centred4", "bfloat16", 2, 128, 128, 16),
    _mha("centred3-2", "float16", 3, 64, 128, 32),
    _mha("centred4-3", "float32", 2, 128, 64, 64),
    _mha("centred2", "float32", 1, 64, 192, 8),
    # Strips: groups that are more than a block of threads holds.
    _mha("centred3", "bfloat16", 1, 256, 256, 32),
    _mha("centred4-2", "float16", 1, 640, 64, 16),
    # Rows that begin in the middle of a token, pages of odd sizes, payloads at even addresses.
    _mha("centred4", "bfloat16", 1, 192, 128, 128, offset=2),
    _mha("centred3", "float32", 1, 192, 64, 1, offset=6),
    _mha("centred2", "float16", 1, 320, 64, 32),
    dataclasses.replace(_mha("centred3", "float16", 2, 128, 192, 24), axes="page kv head token dim"),
    Case("centred2", MLALayout(2, 256, 64, "bfloat16", 64), 16, axes="page token dim"),
)

CENTRED_KINDS: Final = ("keys", "far", "void", "constant", "strengths", "brink", "cancelling", "borders")
"""Kinds of numbers besides those of ``emulator.cases``."""


def more_kinds(kind: str, shape: Sequence[int], dtype: str, seed: int) -> torch.Tensor:
    """As ``fill``, for a few kinds more; "cancelling" and "borders" need pages that are groups, on axis 2."""
    if kind not in CENTRED_KINDS:
        return fill(kind, shape, dtype, seed)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tuple(shape), generator=generator)
    channels = torch.randn(shape[-1], generator=generator)
    rows = torch.rand((*shape[:-1], 1), generator=generator)
    half = shape[2] // 2
    if kind == "constant":
        x = channels.expand(shape).clone()
    elif kind == "strengths":
        # Exponents from one bound to the other, and beyond the lower; less in each token than a void vector has.
        x *= torch.exp2(torch.linspace(-36, 9, shape[-1]))
    elif kind == "brink":
        # Half of the tokens are void, if their squares are added in the order of the contract.
        vector = math.gcd(shape[-1], 128)
        x *= 2.0**-20
        x[..., ::vector] = 8192
        x[..., vector // 4 :: vector // 2] = torch.where(rows < 0.5, 1.578125, 1.0)
    elif kind == "cancelling":
        # One channel a token is so great that small numbers are rounded until another token takes it off again.
        x *= 2.0**-10
        at = torch.arange(min(half, shape[-1]))
        x[:, :, at, ..., at] = 8000
        x[:, :, at + half, ..., at] = -8000
    elif kind == "borders":
        # Strengths that are just below where the exponent changes, and that small squares do not take beyond it.
        powers = [2.0**-power for power in range(1, 12) for _ in range(3)]
        column = torch.tensor([1.0, *powers, *[2.0**-13] * shape[2]])[: shape[2]]
        x = torch.where(x < 0, -1.0, 1.0) * column.view(-1, *[1] * (len(shape) - 3))
        x[..., 0] = 100
    else:
        # A mean that is most of a vector, and a channel that stands out.
        x += 3 * channels
        x[..., 5] *= 20
        if kind == "far":
            x *= torch.where(rows < 0.1, 0.02, 1.0) * torch.where(rows > 0.9, -1.0, 1.0)
        elif kind == "void":
            # Some are so little too long that they would not be once their channels are scaled.
            x *= torch.where(rows < 0.05, 880 * shape[-1] ** 0.5 / x.norm(dim=-1, keepdim=True), 1.0)
            x[..., :1] = torch.where(rows > 0.95, torch.tensor([torch.nan]), x[..., :1])
            x[..., 3:4] = torch.where((rows > 0.5) & (rows < 0.53), torch.tensor([-torch.inf]), x[..., 3:4])
    return x.to(getattr(torch, dtype))


@contextlib.contextmanager
def known() -> Iterator[None]:
    """Has the kinds of numbers filled."""
    with mock.patch.object(cases, "fill", more_kinds):
        yield
