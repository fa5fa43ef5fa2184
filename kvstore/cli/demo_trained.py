"""The demo's engine for a trained model: the small one by which ``kvstore quality`` measures codecs.

With random weights any change of the KV, however small, soon changes every token; with trained ones it shows what a
lossy codec does to text. Prompts are text that the model was not trained on. torch is imported inside functions.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache as once
from hashlib import sha256
from importlib.resources import files
from typing import TYPE_CHECKING

import numpy as np

from kvstore.cli.demo_model import Engine
from kvstore.cli.quality.model import EMBEDDING_GAIN, LAYERS, SmallModel, load_arrays

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    from kvstore.cli.demo_model import States

__all__ = ["TrainedEngine", "draw_texts", "trained_revision"]


@dataclass(slots=True)
class TrainedCache:
    """KV of a sequence.

    Attributes:
        states: keys and values ``[num_kv_heads, tokens, head_dim]`` of each layer.
        last_token: the sequence's last token id ``[1]``; None where it is empty.
    """

    states: States
    last_token: torch.Tensor | None


class TrainedEngine(Engine):
    """The small trained model.

    Some of its heads have the keys of the token before, so the last token that is in the cache is read once more with
    those that follow; what the cache has of it stays.
    """

    def __init__(self, block_tokens: int) -> None:
        weights = [array for array in load_arrays().values() if array.dtype == np.float16]
        super().__init__(SmallModel.layout(block_tokens), sum(array.size for array in weights))
        self._model = SmallModel()

    def read(self, tokens: torch.Tensor, cache: TrainedCache) -> torch.Tensor:
        """See ``Engine``."""
        import torch
        from torch.nn import functional

        model, past = self._model, cache.states[0][0].shape[1]
        again = 0 if cache.last_token is None else 1
        read = tokens if cache.last_token is None else torch.cat([cache.last_token, tokens])
        places = torch.arange(past + len(tokens))
        mask = places <= places[past - again :, None]
        hidden = model._weights["embedding"][read[None]] * EMBEDDING_GAIN
        for layer in range(LAYERS):
            queries, keys, values = model._projections(layer, hidden, past - again)
            known_keys, known_values = (
                torch.cat([old, new[0, :, again:].to(old.dtype)], dim=1)
                for old, new in zip(cache.states[layer], (keys, values), strict=True)
            )
            cache.states[layer] = known_keys, known_values
            attended = functional.scaled_dot_product_attention(
                queries, known_keys[None].float(), known_values[None].float(), attn_mask=mask, enable_gqa=True
            )
            hidden = model._behind_attention(layer, hidden, attended)
        cache.last_token = tokens[-1:]
        return model._normed("final_norm", hidden[0, -1]) @ model._weights["embedding"].T

    def states_of(self, cache: TrainedCache) -> States:
        """See ``Engine``."""
        return cache.states

    def cache_of(self, states: States, blocks: int, before: torch.Tensor | None = None) -> TrainedCache:
        """See ``Engine``."""
        tokens = blocks * self.layout.block_tokens
        last_token = before[tokens - 1 : tokens] if before is not None and tokens else None
        return TrainedCache([(keys[:, :tokens], values[:, :tokens]) for keys, values in states], last_token)


@once
def trained_revision() -> str:
    """A digest of the weights."""
    return f"sha256:{sha256(files('kvstore.cli.quality').joinpath('small-model.npz').read_bytes()).hexdigest()}"


def draw_texts(prompt_tokens: int, seed: int) -> NDArray[np.int64]:
    """Token ids of two stretches of text, the prompt and the one to warm up with, ``[2, prompt_tokens]``."""
    text = load_arrays()["test_tokens"].astype(np.int64)
    begins = np.random.default_rng(seed).choice(len(text) // prompt_tokens, 2, replace=False) * prompt_tokens
    return np.stack([text[begin : begin + prompt_tokens] for begin in begins])
