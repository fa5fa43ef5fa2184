"""Formats whose tables are learned from training text: simplified forms of CacheGen, SKVQ and transform coding.

Keys are taken as they lie in a cache, with their rotary embedding; SKVQ and KVTC take it off first, which needs every
token's position. Entropy-coded sizes are what an ideal coder takes with the tables that were learned.

Sources: CacheGen (arXiv 2310.07240), one table a layer and channel; SKVQ (arXiv 2405.06219), here ordered by spread
instead of clustered; KVTC (arXiv 2511.01815), one step for all components, which gives each the bits it is worth.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

_PSEUDO_COUNT = 0.05
"""So that a symbol that the training text lacks has a price."""


def planes_of(training: torch.Tensor, role: int) -> torch.Tensor:
    """Keys or values of KV as ``Evaluation.kv``, ``[N, L, 2, T, H, D]``, as ``[L, H, N * T, D]`` float32."""
    return training[:, :, role].float().permute(1, 3, 0, 2, 4).flatten(2, 3)


def prices(symbols: torch.Tensor, count: int) -> torch.Tensor:
    """Bits of each symbol in each context: of ``[contexts, samples]``, ``[contexts, count]``."""
    seen = torch.full((len(symbols), count), _PSEUDO_COUNT)
    seen.scatter_add_(1, symbols, torch.ones(symbols.shape))
    return -(seen / seen.sum(1, keepdim=True)).log2()


class CacheGen:
    """Whole numbers of a token's scale, the largest magnitude of all heads; a table a layer and channel."""

    def __init__(self, bins: int, planes: torch.Tensor) -> None:
        self._most = bins // 2 - 1
        symbols, _ = self._symbols(planes)
        self._prices = prices(self._by_channel(symbols), 2 * self._most + 1)

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, float]:
        symbols, scale = self._symbols(x)
        price = self._prices.gather(1, self._by_channel(symbols)).sum()
        return (symbols - self._most) * scale, float(price) + 16 * scale.numel()

    def _symbols(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scale = (x.abs().amax((1, 3), keepdim=True) / self._most).half().float().clamp(min=1e-6)
        return (x / scale).round().clamp(-self._most, self._most) + self._most, scale

    def _by_channel(self, symbols: torch.Tensor) -> torch.Tensor:
        return symbols.long().transpose(2, 3).flatten(0, 2)


class Skvq:
    """Asymmetric, channels in groups of like ones, each group's range narrowed; scales and minima are E4M3."""

    NARROWED = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6, 0.5)

    def __init__(self, bits: int, group: int, planes: torch.Tensor) -> None:
        self._bits, self._group = bits, group
        sample = planes[:, :, ::16]
        self._order = sample.std(2).argsort(-1)[:, :, None]
        groups = self._grouped(sample)
        errors = [(self._coded(groups, share) - groups).square().sum(-1).mean(2) for share in self.NARROWED]
        best = torch.stack(errors).argmin(0)
        self._share = torch.tensor(self.NARROWED)[best][:, :, None, :, None]

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, float]:
        coded = self._coded(self._grouped(x), self._share).flatten(-2)
        back = self._order.argsort(-1).expand_as(x)
        return coded.gather(-1, back), x.numel() * (self._bits + 16 / self._group)

    def _grouped(self, x: torch.Tensor) -> torch.Tensor:
        return x.gather(-1, self._order.expand_as(x)).unflatten(-1, (-1, self._group))

    def _coded(self, groups: torch.Tensor, share: torch.Tensor | float) -> torch.Tensor:
        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        middle, half = (low + high) / 2, (high - low) / 2 * share
        scale = (2 * half / (2**self._bits - 1)).clamp(min=0.004).to(torch.float8_e4m3fn).float()
        minimum = (middle - half).to(torch.float8_e4m3fn).float()
        return ((groups - minimum) / scale).round().clamp(0, 2**self._bits - 1) * scale + minimum


class Transform:
    """Principal components of a layer's heads together, all with one step; a table a component."""

    MOST = 1023

    def __init__(self, step: float, planes: torch.Tensor) -> None:
        tokens = self._tokens(planes)
        self._mean = tokens.mean(1, keepdim=True)
        centred = tokens - self._mean
        strengths, self._basis = torch.linalg.eigh(centred.transpose(1, 2) @ centred / tokens.shape[1])
        self._step = step * float(strengths.mean().sqrt())
        components = centred @ self._basis
        whole = self._whole(components)
        made = whole * self._step
        # What rounds to nothing shrinks a vector; a gain a component gives back its product with itself.
        products = (components * made).sum(1, keepdim=True).clamp(min=1e-9)
        self._gain = (components.square().sum(1, keepdim=True) / products).clamp(0, 1)
        self._prices = prices(self._by_component(whole), 2 * self.MOST + 1)

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, float]:
        whole = self._whole((self._tokens(x) - self._mean) @ self._basis)
        price = self._prices.gather(1, self._by_component(whole)).sum()
        made = (whole * self._step * self._gain) @ self._basis.transpose(1, 2) + self._mean
        return made.unflatten(-1, (x.shape[1], x.shape[3])).transpose(1, 2), float(price)

    def _tokens(self, x: torch.Tensor) -> torch.Tensor:
        return x.transpose(1, 2).flatten(2)

    def _whole(self, components: torch.Tensor) -> torch.Tensor:
        magnitudes = (components.abs() / self._step + 0.4).floor().clamp(max=self.MOST)
        return magnitudes * components.sign()

    def _by_component(self, whole: torch.Tensor) -> torch.Tensor:
        return (whole.long() + self.MOST).transpose(1, 2).flatten(0, 1)


def calibrated(training: torch.Tensor) -> dict[str, list[Callable[[torch.Tensor], tuple[torch.Tensor, float]]]]:
    """Formats of keys and values by name."""
    planes = [planes_of(training, role) for role in (0, 1)]
    formats: dict[str, list[Callable[[torch.Tensor], tuple[torch.Tensor, float]]]] = {}
    for bins in (32, 16):
        formats[f"CacheGen-like, {bins} bins, entropy coded"] = [CacheGen(bins, each) for each in planes]
    for bits in (4, 2):
        formats[f"SKVQ-like, calibrated, {bits} bits, groups of 32"] = [Skvq(bits, 32, each) for each in planes]
    for step in (0.25, 0.5, 1.0):
        formats[f"KVTC-like, calibrated, step {step}, entropy coded"] = [Transform(step, each) for each in planes]
    return formats
