"""What a codec does to a model that goes on from a cache that went through it.

Covers: token sequences, the two tasks, the unquantised runs, and measuring one codec. Does not cover: the model, see
``kvstore.cli.quality.model``; showing results, see ``kvstore.cli.quality.report``. torch is imported inside functions.

The model reads a prefix of 384 tokens. Its KV, in bfloat16 and with rotary embedded keys, is cut into blocks of 128
tokens, each encoded and decoded on its own; then the model reads a continuation of 128 tokens on top of what was
decoded. Two tasks: ``natural``, the text goes on as it does; ``recall``, it repeats tokens 96 to 224 of the prefix,
which only a model that finds them in its KV can foresee. A sequence's ratio is its perplexity over that on the cache
as it was; sequences are windows of held-out text that do not overlap, in a fixed shuffled order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

import msgspec
import numpy as np

from kvstore.cli.quality.measured import CodecQuality, Estimate
from kvstore.cli.quality.model import SmallModel, load_arrays
from kvstore.format.constants import PAGE_BYTES, RECORD_HEADER_BYTES
from kvstore_kernels.layout import KVLayout

if TYPE_CHECKING:
    import torch

__all__ = ["BLOCK_TOKENS", "MOST_SEQUENCES", "Comparison", "Evaluation", "RoundTrip", "estimate", "measure"]

PREFIX_TOKENS: Final = 384
CONTINUATION_TOKENS: Final = 128
BLOCK_TOKENS: Final = 128
RECALLED_TOKEN: Final = 96
"""Where in the prefix the text begins that ``recall`` repeats."""

MOST_SEQUENCES: Final = 382
_WINDOW_TOKENS: Final = PREFIX_TOKENS + CONTINUATION_TOKENS + 1
_SHUFFLE_SEED: Final = 4
_BATCH: Final = 8


class RoundTrip(Protocol):
    """One block through a codec."""

    def __call__(self, block: torch.Tensor, layout: KVLayout) -> tuple[torch.Tensor, Sequence[int]]:
        """Encode and decode.

        Args:
            block: bfloat16, contiguous, of the layout's shape.
            layout: of the block.

        Returns:
            What was decoded, of the same shape and dtype, and the bytes of each section.
        """
        ...


class Comparison(NamedTuple):
    """A model on another cache beside itself on the unquantised one, of each sequence: float64 ``[sequences]``.

    Attributes:
        ratios: perplexity over that on the unquantised cache.
        divergences: Kullback-Leibler divergence of its next-token distributions from the unquantised ones, in nats a
            token, mean over the continuation. Other than a ratio it cannot gain by luck.
        attention_errors: norm of the error of what attention gives over norm, mean over layers.
    """

    ratios: torch.Tensor
    divergences: torch.Tensor
    attention_errors: torch.Tensor


class Evaluation:
    """Sequences of the model, what it says of them on the cache as it was, and what it says on another.

    Takes about 2 MiB of memory a sequence.

    Args:
        sequences: how many, at least 2 and at most ``MOST_SEQUENCES``.
        outliers: use the model with channels that stand out.

    Attributes:
        kv: the unquantised cache, bfloat16 ``[sequences, layers, 2, tokens, kv_heads, head_dim]``.
        layout: of a block.
    """

    def __init__(self, sequences: int, *, outliers: bool = False) -> None:
        import torch

        if not 2 <= sequences <= MOST_SEQUENCES:
            raise ValueError(f"sequences must be 2 to {MOST_SEQUENCES}, got {sequences}")
        self.sequences = sequences
        self._model = SmallModel(outliers=outliers)
        self.layout = self._model.layout(BLOCK_TOKENS)
        tokens = load_arrays()["test_tokens"].astype(np.int64)
        order = np.random.Generator(np.random.PCG64(_SHUFFLE_SEED)).permutation(MOST_SEQUENCES)[:sequences]
        windows = torch.from_numpy(np.stack([tokens[at * _WINDOW_TOKENS :][:_WINDOW_TOKENS] for at in order]))
        self._continuations = {
            "natural": windows[:, PREFIX_TOKENS:],
            "recall": windows[:, RECALLED_TOKEN : RECALLED_TOKEN + CONTINUATION_TOKENS + 1],
        }
        self.kv = torch.cat([self._model.prefill(batch) for batch in windows[:, :PREFIX_TOKENS].split(_BATCH)])
        self._unquantised = {task: list(self._runs(task, self.kv)) for task in self._continuations}

    def perplexity(self, task: str, kv: torch.Tensor | None = None) -> float:
        """Of all continuations of a task together, on the cache as it was or on another of its shape."""
        import torch

        runs = self._unquantised[task] if kv is None else self._runs(task, kv)
        return math.exp(float(torch.cat([self._losses(likelihoods, tokens) for tokens, likelihoods, _ in runs]).mean()))

    def compare(self, task: str, kv: torch.Tensor) -> Comparison:
        """What the model says on ``kv``, a cache of the shape of the unquantised one, beside what it says on that.

        Args:
            task: "natural" or "recall".
            kv: bfloat16.
        """
        import torch

        parts = []
        for (tokens, likelihoods, attended), right in zip(self._runs(task, kv), self._unquantised[task], strict=True):
            gained = self._losses(likelihoods, tokens) - self._losses(right[1], tokens)
            divergence = (right[1].exp() * (right[1] - likelihoods)).sum(-1).double().mean(-1)
            error = (attended - right[2]).flatten(2).norm(dim=2) / right[2].flatten(2).norm(dim=2)
            parts.append((gained.exp(), divergence, error.double().mean(1)))
        return Comparison(*(torch.cat(column) for column in zip(*parts, strict=True)))

    def _runs(self, task: str, kv: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """For each batch of sequences: the continuation's tokens, log likelihoods of all tokens, attention's output."""
        for tokens, cached in zip(self._continuations[task].split(_BATCH), kv.split(_BATCH), strict=True):
            logits, attended = self._model.extend(tokens[:, :-1], cached)
            yield tokens, logits.log_softmax(-1), attended

    @staticmethod
    def _losses(likelihoods: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Mean negative log likelihood of each sequence, float64 ``[sequences]``."""
        return -likelihoods.gather(-1, tokens[:, 1:, None]).squeeze(-1).double().mean(-1)

    def through(self, round_trip: RoundTrip) -> tuple[torch.Tensor, list[int]]:
        """The cache after every block of it went through a codec, and the bytes of each block's sections together."""
        import torch

        decoded = torch.empty_like(self.kv)
        block_bytes = []
        for sequence, first in self._blocks():
            tokens = slice(first, first + BLOCK_TOKENS)
            block, sections = round_trip(self.kv[sequence, :, :, tokens].contiguous(), self.layout)
            decoded[sequence, :, :, tokens] = block
            block_bytes.append(sum(sections))
        return decoded, block_bytes

    def _blocks(self) -> Iterator[tuple[int, int]]:
        for sequence in range(self.sequences):
            for first in range(0, PREFIX_TOKENS, BLOCK_TOKENS):
                yield sequence, first


def estimate(values: torch.Tensor) -> Estimate:
    """Mean and standard error of what independent sequences gave, ``[sequences]``."""
    return Estimate(mean=float(values.mean()), se=float(values.std()) / math.sqrt(len(values)))


def measure(name: str, round_trip: RoundTrip, usual: Evaluation, outliers: Evaluation | None = None) -> CodecQuality:
    """Everything about one codec.

    Args:
        name: of the codec.
        round_trip: one block through it.
        usual: sequences of the model as it is.
        outliers: sequences of the model with channels that stand out, where that is to be measured too.
    """
    import torch

    kv, block_bytes = usual.through(round_trip)
    natural, recall = (usual.compare(task, kv) for task in ("natural", "recall"))
    bits = 8 / usual.kv.numel()
    padding = sum(-(RECORD_HEADER_BYTES + size) % PAGE_BYTES for size in block_bytes)
    key_error, value_error = (_relative_error(kv[:, :, role], usual.kv[:, :, role]) for role in (0, 1))
    result = CodecQuality(
        codec=name,
        sequences=usual.sequences,
        bits=sum(block_bytes) * bits,
        header_bits=RECORD_HEADER_BYTES * len(block_bytes) * bits,
        padding_bits=padding * bits,
        exact=torch.equal(kv.view(torch.int16), usual.kv.view(torch.int16)),
        natural=estimate(natural.ratios),
        recall=estimate(recall.ratios),
        natural_divergence=estimate(natural.divergences),
        recall_divergence=estimate(recall.divergences),
        key_error=key_error,
        value_error=value_error,
        attention_error=float(natural.attention_errors.mean()),
    )
    if outliers is None:
        return result
    kv, _ = outliers.through(round_trip)
    natural, recall = (outliers.compare(task, kv) for task in ("natural", "recall"))
    return msgspec.structs.replace(
        result,
        outlier_natural=estimate(natural.ratios),
        outlier_recall=estimate(recall.ratios),
        outlier_recall_divergence=estimate(recall.divergences),
    )


def _relative_error(decoded: torch.Tensor, right: torch.Tensor) -> float:
    return float((decoded.float() - right.float()).norm() / right.float().norm())
