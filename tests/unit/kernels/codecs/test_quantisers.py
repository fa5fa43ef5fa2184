"""Where the codecs' levels come from: uniform, companded and Lloyd-Max quantisers, as textbooks have them.

None of these is a codec. They show the law of the uniform step (an error of step^2 / 12), what companding with the
mu-law of telephony gains on peaked data (ITU-T G.711), and that for normal numbers the levels of Lloyd (1982) and Max
(1960) are the best, with the errors of Max's table. The turbo codecs' integers are these levels.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pytest
import torch

from kvstore_kernels.codecs.turbo import DEVIATION, LEVELS, THRESHOLDS

MAX_1960 = {1: 0.3634, 2: 0.1175, 3: 0.03454, 4: 0.009497}
"""Mean squared error of the best quantiser of a normal distribution of deviation 1, by bits."""


def normals(count: int = 400_000) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def uniform(x: torch.Tensor, bits: int, limit: float) -> torch.Tensor:
    """Levels in the middle of ``2**bits`` equal steps from -limit to limit."""
    step = 2 * limit / 2**bits
    return ((x / step).floor() + 0.5).clamp(-(2 ** (bits - 1)) + 0.5, 2 ** (bits - 1) - 0.5) * step


def mu_law(x: torch.Tensor, bits: int, limit: float, mu: float = 255.0) -> torch.Tensor:
    """Uniform in ``sign(x) log(1 + mu |x| / limit) / log(1 + mu)``: small numbers get small steps."""
    squeezed = x.sign() * torch.log1p(mu * x.abs() / limit) / math.log1p(mu)
    level = uniform(squeezed, bits, 1.0)
    return level.sign() * limit * torch.expm1(level.abs() * math.log1p(mu)) / mu


def lloyd_max(bits: int) -> list[float]:
    """Positive levels for a normal distribution, by Lloyd's iteration: levels are the means of their cells."""
    half = 2 ** (bits - 1)
    levels = [0.2 + 3.0 * index / half for index in range(half)]
    for _ in range(20_000):
        bounds = [0.0, *midpoints(levels), math.inf]
        means = [cell_mean(low, high) for low, high in itertools.pairwise(bounds)]
        if max(abs(new - old) for new, old in zip(means, levels, strict=True)) < 1e-13:
            return means
        levels = means
    raise AssertionError("Lloyd's iteration did not settle")


def midpoints(levels: Sequence[float]) -> list[float]:
    return [(low + high) / 2 for low, high in itertools.pairwise(levels)]


def cell_mean(low: float, high: float) -> float:
    """Mean of a normal number between two bounds."""

    def density(x: float) -> float:
        return math.exp(-x * x / 2) / math.sqrt(2 * math.pi)

    def below(x: float) -> float:
        return 0.5 * (1 + math.erf(x / math.sqrt(2)))

    return (density(low) - density(high)) / (below(high) - below(low))


def on_levels(x: torch.Tensor, positive: Sequence[float], thresholds: Sequence[float]) -> torch.Tensor:
    index = torch.bucketize(x.abs(), torch.tensor(thresholds, dtype=torch.float64))
    return x.sign() * torch.tensor(positive, dtype=torch.float64)[index]


def error(x: torch.Tensor, y: torch.Tensor) -> float:
    return float((x - y).square().mean())


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_uniform_error_is_a_twelfth_of_the_squared_step(bits: int) -> None:
    x = torch.rand(400_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 - 1
    step = 2 / 2**bits
    assert error(x, uniform(x, bits, 1.0)) == pytest.approx(step**2 / 12, rel=0.01)


def test_uniform_error_gains_six_decibels_a_bit() -> None:
    x = normals()
    decibels = [10 * math.log10(error(x, uniform(x, bits, 6.0))) for bits in range(6, 12)]
    steps = [more - fewer for fewer, more in itertools.pairwise(decibels)]
    assert steps == pytest.approx([-20 * math.log10(2)] * 5, abs=0.05)


def test_uniform_beyond_its_limit_does_not_follow_the_law() -> None:
    x = normals()
    assert error(x, uniform(x, 8, 1.0)) > 100 * (2 / 2**8) ** 2 / 12


def test_mu_law_is_better_on_peaked_numbers_and_worse_on_even_ones() -> None:
    generator = torch.Generator().manual_seed(1)
    even = torch.rand(200_000, generator=generator, dtype=torch.float64) * 2 - 1
    peaked = (even.sign() * -torch.log1p(-even.abs()) / 50).clamp(-1, 1)
    assert error(peaked, mu_law(peaked, 8, 1.0)) < error(peaked, uniform(peaked, 8, 1.0)) / 10
    assert error(even, mu_law(even, 8, 1.0)) > 2 * error(even, uniform(even, 8, 1.0))


def test_mu_law_keeps_the_relative_error_even_over_magnitudes() -> None:
    for scale in (0.9, 0.1, 0.03):
        x = torch.linspace(0.5, 1.0, 20_001, dtype=torch.float64) * scale
        relative = ((x - mu_law(x, 8, 1.0)) / x).square().mean().sqrt()
        assert 0.005 < relative < 0.02


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_lloyd_max_is_better_than_uniform_and_mu_law_at_their_best(bits: int) -> None:
    x = normals()
    levels = lloyd_max(bits)
    best = error(x, on_levels(x, levels, midpoints(levels)))
    assert best == pytest.approx(MAX_1960[bits], rel=0.01)
    fewer = x[:40_000]
    best = error(fewer, on_levels(fewer, levels, midpoints(levels)))
    limits = [1.0 + 0.25 * index for index in range(16)]
    assert best < min(error(fewer, uniform(fewer, bits, limit)) for limit in limits)
    assert best < min(error(fewer, mu_law(fewer, bits, limit, mu)) for limit in limits for mu in (1.0, 5.0, 255.0))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_turbo_levels_are_lloyd_max_levels_as_whole_numbers(bits: int) -> None:
    levels = lloyd_max(bits)
    assert LEVELS[bits] == tuple(round(level * DEVIATION) for level in levels)
    assert THRESHOLDS[bits] == tuple(round(middle * DEVIATION) for middle in midpoints(levels))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_rounding_levels_to_whole_numbers_costs_nothing(bits: int) -> None:
    x = normals()
    whole = on_levels(x * DEVIATION, LEVELS[bits], THRESHOLDS[bits]) / DEVIATION
    assert error(x, whole) == pytest.approx(MAX_1960[bits], rel=0.01)
