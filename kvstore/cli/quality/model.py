"""A small trained causal language model, run in two steps: a prefix into a KV cache, then a continuation on top of it.

Covers: its weights (package data), prefill, continuation, and rescaling of channels that leaves its function as it is.
Does not cover: what is measured with it, see ``kvstore.cli.quality.evaluation``. torch is imported inside functions.

The model was trained for this project on English documentation and Python sources: 2.6 million parameters, 4 layers, 4
query heads on 2 KV heads, head_dim 64, rotary positions (half-split), RMSNorm, SwiGLU, 1,024 tokens. A model this small
would ignore most of its prefix, and then every codec looks perfect. So the keys of the last KV head of layers 1 and 2
are those of the token before: with that, the model learned to find what followed the last time a token occurred.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Final

import numpy as np

from kvstore_kernels.layout import KVLayout

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

__all__ = ["EMBEDDING_GAIN", "HEAD_DIM", "KV_HEADS", "LAYERS", "SmallModel", "load_arrays"]

LAYERS: Final = 4
QUERY_HEADS: Final = 4
KV_HEADS: Final = 2
HEAD_DIM: Final = 64
MOST_TOKENS: Final = 1024
"""Longest sequence: prefix and continuation together."""

_ROTARY_BASE: Final = 10000.0
_NORM_EPSILON: Final = 1e-5
EMBEDDING_GAIN: Final = 8.0
_SHIFTED_LAYERS: Final = (1, 2)
"""Layers whose last KV head has the keys of the token before."""

_OUTLIER_GAIN: Final = 8.0


@cache
def load_arrays() -> Mapping[str, NDArray[np.generic]]:
    """The model's weights (float16) and its token sequences (uint16), by name.

    ``test_tokens [196324]`` is text that the model was not trained on, ``calibration_tokens [64, 384]`` is training
    text, and ``outlier_pairs [4, 2, 2]`` names rotary pairs of each KV head.
    """
    with files(__package__).joinpath("small-model.npz").open("rb") as file, np.load(file, allow_pickle=False) as stored:
        return {name: stored[name] for name in stored.files}


class SmallModel:
    """The model, in float32 on the CPU. It is not changed after it was made.

    Args:
        outliers: multiply two rotary pairs of each KV head by 8 in the keys, and divide them by 8 in the queries. The
            model computes the same, but its keys have channels that stand out, as those of large models do.
    """

    def __init__(self, *, outliers: bool = False) -> None:
        import torch

        arrays = load_arrays()
        self._weights = {
            name: torch.from_numpy(array).float() for name, array in arrays.items() if array.dtype == np.float16
        }
        if outliers:
            self._rescale(arrays["outlier_pairs"])
        pairs = torch.arange(0, HEAD_DIM, 2, dtype=torch.float32) / HEAD_DIM
        angles = torch.outer(torch.arange(MOST_TOKENS, dtype=torch.float32), 1.0 / _ROTARY_BASE**pairs)
        angles = torch.cat([angles, angles], dim=-1)
        self._cosines, self._sines = angles.cos(), angles.sin()

    @staticmethod
    def layout(block_tokens: int) -> KVLayout:
        """Layout of a block of its KV, in bfloat16."""
        return KVLayout(LAYERS, KV_HEADS, HEAD_DIM, "bfloat16", block_tokens)

    def prefill(self, tokens: torch.Tensor) -> torch.Tensor:
        """The KV of sequences, as an engine caches it: keys behind the rotary embedding.

        Args:
            tokens: token ids, int64 ``[sequences, tokens]``.

        Returns:
            bfloat16 ``[sequences, layers, 2, tokens, kv_heads, head_dim]``.
        """
        import torch
        from torch.nn import functional

        count = tokens.shape[1]
        states = self._weights["embedding"][tokens] * EMBEDDING_GAIN
        layers = []
        with torch.inference_mode():
            for layer in range(LAYERS):
                queries, keys, values = self._projections(layer, states, 0)
                layers.append(torch.stack([keys, values], dim=1).transpose(2, 3))
                attended = functional.scaled_dot_product_attention(
                    queries, keys, values, is_causal=True, enable_gqa=True
                )
                states = self._behind_attention(layer, states, attended)
            made = torch.stack(layers, dim=1).bfloat16()
        assert made.shape == (len(tokens), LAYERS, 2, count, KV_HEADS, HEAD_DIM)
        return made

    def extend(self, tokens: torch.Tensor, kv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Read a continuation on top of a KV cache.

        Args:
            tokens: token ids of the continuation, int64 ``[sequences, tokens]``.
            kv: of the prefix, shape as ``prefill`` gives it.

        Returns:
            Logits, float32 ``[sequences, tokens, vocabulary]``, and what attention gave in each layer, float32
            ``[sequences, layers, query_heads, tokens, head_dim]``.
        """
        import torch
        from torch.nn import functional

        prefix, count = kv.shape[3], tokens.shape[1]
        mask = torch.cat(
            [torch.ones(count, prefix, dtype=torch.bool), torch.ones(count, count, dtype=torch.bool).tril()], dim=1
        )
        states = self._weights["embedding"][tokens] * EMBEDDING_GAIN
        outputs = []
        with torch.inference_mode():
            for layer in range(LAYERS):
                queries, keys, values = self._projections(layer, states, prefix)
                past_keys, past_values = kv[:, layer].float().transpose(2, 3).unbind(1)
                attended = functional.scaled_dot_product_attention(
                    queries,
                    torch.cat([past_keys, keys], dim=2),
                    torch.cat([past_values, values], dim=2),
                    attn_mask=mask,
                    enable_gqa=True,
                )
                outputs.append(attended)
                states = self._behind_attention(layer, states, attended)
            logits = self._normed("final_norm", states) @ self._weights["embedding"].T
        return logits, torch.stack(outputs, dim=1)

    def _rescale(self, outlier_pairs: NDArray[np.generic]) -> None:
        shared = QUERY_HEADS // KV_HEADS
        for layer in range(LAYERS):
            keys, queries = (self._weights[f"layers.{layer}.{name}"] for name in ("key", "query"))
            for head in range(KV_HEADS):
                for channel in outlier_pairs[layer, head].tolist():
                    for dim in (channel, channel + HEAD_DIM // 2):
                        keys[head * HEAD_DIM + dim] *= _OUTLIER_GAIN
                        for query_head in range(head * shared, (head + 1) * shared):
                            queries[query_head * HEAD_DIM + dim] /= _OUTLIER_GAIN

    def _projections(
        self, layer: int, states: torch.Tensor, first: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values of tokens from position ``first`` on, each ``[sequences, heads, tokens, dim]``."""
        import torch
        from torch.nn import functional

        normed = self._normed(f"layers.{layer}.attention_norm", states)
        queries, keys, values = (
            (normed @ self._weights[f"layers.{layer}.{name}"].T).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2)
            for name in ("query", "key", "value")
        )
        if layer in _SHIFTED_LAYERS:
            shifted = functional.pad(keys[:, -1:, :-1], (0, 0, 1, 0))
            keys = torch.cat([keys[:, :-1], shifted], dim=1)
        return self._rotated(queries, first), self._rotated(keys, first), values

    def _behind_attention(self, layer: int, states: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        from torch.nn import functional

        weights = {name: self._weights[f"layers.{layer}.{name}"] for name in ("output", "gate", "up", "down")}
        states = states + attended.transpose(1, 2).flatten(2) @ weights["output"].T
        normed = self._normed(f"layers.{layer}.feed_forward_norm", states)
        return states + (functional.silu(normed @ weights["gate"].T) * (normed @ weights["up"].T)) @ weights["down"].T

    def _rotated(self, heads: torch.Tensor, first: int) -> torch.Tensor:
        import torch

        span = slice(first, first + heads.shape[2])
        low, high = heads.chunk(2, dim=-1)
        return heads * self._cosines[span] + torch.cat([-high, low], dim=-1) * self._sines[span]

    def _normed(self, name: str, states: torch.Tensor) -> torch.Tensor:
        from torch.nn import functional

        return functional.rms_norm(states, (states.shape[-1],), self._weights[name], _NORM_EPSILON)
