"""What others' formats for KV cost the small model of ``kvstore quality``.

    python benchmarks/quality/baselines.py > benchmarks/results/quality-baselines-2026-01-31.json

The others are simplified forms of published methods, in plain torch: numbers go through the format and back, and bits
are counted, all metadata included, without packing them. Calibrated ones have learned from 64 sequences of the model's
training text. Sources: KIVI (arXiv 2402.02750), NVFP4 and MXFP4 (OCP microscaling formats), KVQuant (arXiv 2401.18079,
without Fisher weights), TurboQuant as in vLLM's presets (uniform values, centroids scaled to the vector's norm).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import msgspec
import numpy as np
import torch
from calibrated import calibrated

from kvstore.cli.quality.evaluation import Evaluation, RoundTrip, measure
from kvstore.cli.quality.measured import QualityReport
from kvstore.cli.quality.model import SmallModel, load_arrays
from kvstore_kernels.codecs.turbo import DEVIATION, LEVELS, THRESHOLDS, flip_signs, hadamard
from kvstore_kernels.layout import KVLayout

# Keys or values of one layer and head, [..., T, D] float32, to what comes back and how many bits that took.
Plane = Callable[[torch.Tensor], tuple[torch.Tensor, float]]


@dataclass(frozen=True)
class Baseline:
    name: str
    keys: Plane
    values: Plane

    def round_trip(self, block: torch.Tensor, layout: KVLayout) -> tuple[torch.Tensor, Sequence[int]]:
        """As ``kvstore.cli.quality.evaluation.RoundTrip``."""
        decoded, sizes = torch.empty_like(block), []
        for role, plane in enumerate((self.keys, self.values)):
            made, bits = plane(block[:, role].transpose(1, 2).float())
            decoded[:, role] = made.transpose(1, 2).to(block.dtype)
            sizes.append(round(bits / 8))
        return decoded, sizes


def uniform(bits: int, group: int, *, over_tokens: bool = False) -> Plane:
    """Asymmetric, float16 scale and minimum a group of channels of a token, or of tokens of a channel."""

    def plane(x: torch.Tensor) -> tuple[torch.Tensor, float]:
        axis = -2 if over_tokens else -1
        groups = x.unflatten(axis, (-1, group))
        low, high = groups.amin(axis, keepdim=True), groups.amax(axis, keepdim=True)
        scale = ((high - low) / (2**bits - 1)).half().float().clamp(min=1e-5)
        low = low.half().float()
        codes = ((groups - low) / scale).round().clamp(0, 2**bits - 1)
        return (codes * scale + low).flatten(axis - 1, axis), x.numel() * (bits + 32 / group)

    return plane


E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def e2m1(kind: str) -> Plane:
    """Four-bit floats in groups of channels: ``nvfp4`` (16, E4M3 scales) or ``mxfp4`` (32, powers of two)."""
    levels = torch.cat([-E2M1.flip(0)[:-1], E2M1])
    borders = (levels[1:] + levels[:-1]) / 2

    def plane(x: torch.Tensor) -> tuple[torch.Tensor, float]:
        group = 16 if kind == "nvfp4" else 32
        groups = x.unflatten(-1, (-1, group))
        greatest = groups.abs().amax(-1, keepdim=True).clamp(min=1e-6)
        if kind == "nvfp4":
            whole = greatest.max() / 6 / 448
            scale = ((greatest / 6 / whole).to(torch.float8_e4m3fn).float() * whole).clamp(min=1e-9)
        else:
            scale = torch.exp2((greatest / 6).log2().ceil())
        codes = torch.bucketize((groups / scale).contiguous(), borders)
        return (levels[codes] * scale).flatten(-2), x.numel() * (4 + 8 / group)

    return plane


def rotated(bits: int, fit: str) -> Plane:
    """Turbo's codes with another scale: ``norm`` keeps the vector's length, ``squares`` has the least squared error."""

    def plane(x: torch.Tensor) -> tuple[torch.Tensor, float]:
        root = x.shape[-1] ** 0.5
        y = hadamard(flip_signs(x)) / root
        norm = y.pow(2).mean(-1, keepdim=True).sqrt().clamp(min=1e-9)
        magnitude = (y / norm).abs() * DEVIATION
        index = sum((magnitude > threshold).int() for threshold in THRESHOLDS[bits])
        z = torch.tensor(LEVELS[bits])[index] / DEVIATION * y.sign()
        if fit == "norm":
            scale = y.norm(dim=-1, keepdim=True) / z.norm(dim=-1, keepdim=True).clamp(min=1e-9)
        else:
            scale = (y * z).sum(-1, keepdim=True) / z.pow(2).sum(-1, keepdim=True).clamp(min=1e-9)
        return flip_signs(hadamard(z * scale.half().float()) / root), x.numel() * (bits + 16 / x.shape[-1])

    return plane


class Learned:
    """KVQuant-like: levels by k-means over training text, and 1 % of the numbers kept as they are.

    Keys are normalised by percentiles of each channel in the training text, values by the range of each token without
    its furthest number. A number that is kept takes 32 bits: an index and a float16.
    """

    KEPT = 0.005
    """Share beyond each of the two percentiles."""

    def __init__(self, bits: int, training: torch.Tensor) -> None:
        """``training`` is KV as ``Evaluation.kv``."""
        self.bits = bits
        keys, values = (training[:, :, role].float().permute(1, 3, 0, 2, 4).flatten(2, 3) for role in (0, 1))
        low, high = (keys.quantile(share, 2)[:, :, None] for share in (self.KEPT, 1 - self.KEPT))
        self.middle, self.half = (low + high) / 2, ((high - low) / 2).clamp(min=1e-5)
        normed = (keys - self.middle) / self.half
        self.key_levels = [self._levels(layer[layer.abs() <= 1]) for layer in normed]
        middle, half, kept = self._of_tokens(values)
        normed = (values - middle) / half
        self.value_levels = [self._levels(layer[~out]) for layer, out in zip(normed, kept, strict=True)]

    def keys(self, x: torch.Tensor) -> tuple[torch.Tensor, float]:
        normed = (x - self.middle) / self.half
        kept = normed.abs() > 1
        coded = self._nearest(normed, self.key_levels) * self.half + self.middle
        return torch.where(kept, x.half().float(), coded), x.numel() * self.bits + 32 * int(kept.sum())

    def values(self, x: torch.Tensor) -> tuple[torch.Tensor, float]:
        middle, half, kept = self._of_tokens(x)
        coded = self._nearest((x - middle) / half, self.value_levels) * half + middle
        bits = x.numel() * (self.bits + 32 / x.shape[-1]) + 32 * int(kept.sum())
        return torch.where(kept, x.half().float(), coded), bits

    def _of_tokens(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        median = x.median(-1, keepdim=True).values
        kept = torch.zeros_like(x, dtype=torch.bool)
        kept.scatter_(-1, (x - median).abs().argmax(-1, keepdim=True), True)
        rest = torch.where(kept, median, x)
        high, low = rest.amax(-1, keepdim=True), rest.amin(-1, keepdim=True)
        return ((high + low) / 2).half().float(), ((high - low) / 2).clamp(min=1e-5).half().float(), kept

    def _nearest(self, normed: torch.Tensor, levels: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack(
            [
                table[torch.bucketize(layer.contiguous(), (table[1:] + table[:-1]) / 2)]
                for layer, table in zip(normed, levels, strict=True)
            ]
        )

    def _levels(self, numbers: torch.Tensor) -> torch.Tensor:
        chosen = torch.randperm(numbers.numel(), generator=torch.Generator().manual_seed(0))[:60_000]
        sample = numbers.flatten()[chosen]
        levels = sample.quantile((torch.arange(2**self.bits) + 0.5) / 2**self.bits)
        for _ in range(40):
            index = torch.bucketize(sample, (levels[1:] + levels[:-1]) / 2)
            sums = torch.zeros_like(levels).index_add_(0, index, sample)
            levels = sums / torch.bincount(index, minlength=len(levels)).clamp(min=1)
        return levels


def baselines() -> list[Baseline]:
    tokens = torch.from_numpy(load_arrays()["calibration_tokens"].astype(np.int64))
    training = torch.cat([SmallModel().prefill(batch) for batch in tokens.split(8)])
    four, three, two = (Learned(bits, training) for bits in (4, 3, 2))
    return [
        Baseline("int4 by token, groups of 32", uniform(4, 32), uniform(4, 32)),
        Baseline("KIVI-4, groups of 32", uniform(4, 32, over_tokens=True), uniform(4, 32)),
        Baseline("nvfp4", e2m1("nvfp4"), e2m1("nvfp4")),
        Baseline("mxfp4", e2m1("mxfp4"), e2m1("mxfp4")),
        Baseline("TurboQuant as vLLM, k4v4", rotated(4, "norm"), uniform(4, 64)),
        Baseline("TurboQuant as vLLM, k3v4", rotated(3, "norm"), uniform(4, 64)),
        Baseline("TurboQuant as vLLM, k3v3", rotated(3, "norm"), uniform(3, 64)),
        Baseline("turbo3, least squares", rotated(3, "squares"), rotated(3, "squares")),
        Baseline("turbo2, least squares", rotated(2, "squares"), rotated(2, "squares")),
        Baseline("int3 by token, groups of 32", uniform(3, 32), uniform(3, 32)),
        Baseline("int2 by token, groups of 32", uniform(2, 32), uniform(2, 32)),
        Baseline("KVQuant-like, calibrated, 4 bits", four.keys, four.values),
        Baseline("KVQuant-like, calibrated, 3 bits", three.keys, three.values),
        Baseline("KVQuant-like, calibrated, 2 bits", two.keys, two.values),
        *(Baseline(name, keys, values) for name, (keys, values) in calibrated(training).items()),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sequences", type=int, default=96)
    parser.add_argument("--only", default="", help="baselines whose names contain this")
    options = parser.parse_args()
    torch.set_num_threads(1)
    usual, outliers = Evaluation(options.sequences), Evaluation(options.sequences, outliers=True)
    candidates: dict[str, RoundTrip] = {baseline.name: baseline.round_trip for baseline in baselines()}
    rows = []
    for name, round_trip in candidates.items():
        if options.only in name:
            rows.append(measure(name, round_trip, usual, outliers))
            print(f"{name}: {rows[-1].bits:.3f} bits, recall {rows[-1].recall}", file=sys.stderr)
    report = QualityReport(
        date=datetime.now(tz=UTC).date().isoformat(),
        natural_perplexity=usual.perplexity("natural"),
        recall_perplexity=usual.perplexity("recall"),
        codecs=rows,
    )
    print(msgspec.json.format(msgspec.json.encode(report), indent=1).decode())


if __name__ == "__main__":
    main()
