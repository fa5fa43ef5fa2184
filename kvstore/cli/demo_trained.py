"""The demo's engine for a trained model: the small one by which ``kvstore quality`` measures codecs.

With random weights any change of the KV, however small, soon changes every token; with trained ones it shows what a
lossy codec does to text. Prompts are text that the model was not trained on. torch and transformers are imported inside
functions.
"""

from __future__ import annotations

from functools import cache as once
from hashlib import sha256
from importlib.resources import files
from typing import TYPE_CHECKING

import numpy as np

from kvstore.cli.demo_model import Engine
from kvstore.cli.quality.model import SmallModel, load_arrays

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray
    from transformers import DynamicCache

__all__ = ["TrainedEngine", "draw_texts", "trained_revision"]


class TrainedEngine(Engine):
    """The small trained model."""

    def __init__(self, block_tokens: int) -> None:
        from kvstore.cli.demo_trained_model import TrainedModel

        weights = [array for array in load_arrays().values() if array.dtype == np.float16]
        super().__init__(TrainedModel(), SmallModel.layout(block_tokens), sum(array.size for array in weights))

    def read(self, tokens: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
        """See ``Engine``."""
        return self.model(input_ids=tokens[None], past_key_values=cache)

    def prefill(self, prompt: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
        """See ``Engine``."""
        past = cache.get_seq_length()
        if past:  # loaded: the cache has no token of it yet
            cache.last_token = prompt[past - 1 : past]
        return super().prefill(prompt, cache)


@once
def trained_revision() -> str:
    """A digest of the weights."""
    return f"sha256:{sha256(files('kvstore.cli.quality').joinpath('small-model.npz').read_bytes()).hexdigest()}"


def draw_texts(prompt_tokens: int, seed: int) -> NDArray[np.int64]:
    """Token ids of two stretches of text, the prompt and the one to warm up with, ``[2, prompt_tokens]``."""
    text = load_arrays()["test_tokens"].astype(np.int64)
    begins = np.random.default_rng(seed).choice(len(text) // prompt_tokens, 2, replace=False) * prompt_tokens
    return np.stack([text[begin : begin + prompt_tokens] for begin in begins])
