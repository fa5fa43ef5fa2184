"""The small trained model as a model of transformers: it reads token ids on top of a ``DynamicCache``.

Imported only where torch and transformers are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel

from kvstore.cli.quality.model import EMBEDDING_GAIN, LAYERS, SmallModel

__all__ = ["TrainedModel"]


class TrainedConfig(PretrainedConfig):  # type: ignore[misc]
    """It has no options."""

    model_type = "kvstore_trained"


class TrainedModel(PreTrainedModel):  # type: ignore[misc]
    """One sequence at a time; KV in bfloat16.

    Some of its heads have the keys of the token before, so the last token that is in the cache is read once more with
    those that follow; what the cache has of it stays. A cache says which one that was by its attribute ``last_token``,
    ``[1]``, which is set here; where a cache was filled by something else, it has to be set before.
    """

    config_class = TrainedConfig
    base_model_prefix = "model"

    def __init__(self) -> None:
        super().__init__(TrainedConfig())
        self._small = SmallModel()
        self.embedding = torch.nn.Parameter(self._small._weights["embedding"], requires_grad=False)
        self.eval()

    @classmethod
    def can_generate(cls) -> bool:
        """It gives logits."""
        return True

    def forward(self, input_ids: torch.Tensor, past_key_values: DynamicCache, use_cache: bool = True) -> torch.Tensor:
        """Logits behind the last token, ``[vocabulary]``.

        Args:
            input_ids: ``[1, tokens]``.
            past_key_values: what comes before; the tokens are appended to it.
            use_cache: always.
        """
        model, tokens, past = self._small, input_ids[0], past_key_values.get_seq_length()
        again = 1 if past else 0
        read = torch.cat([past_key_values.last_token, tokens]) if again else tokens
        places = torch.arange(past + len(tokens))
        mask = places <= places[past - again :, None]
        hidden = self.embedding[read[None]] * EMBEDDING_GAIN
        for layer in range(LAYERS):
            queries, keys, values = model._projections(layer, hidden, past - again)
            new: list[Any] = [states[:, :, again:].bfloat16() for states in (keys, values)]
            known_keys, known_values = past_key_values.update(*new, layer)
            attended = functional.scaled_dot_product_attention(
                queries, known_keys.float(), known_values.float(), attn_mask=mask, enable_gqa=True
            )
            hidden = model._behind_attention(layer, hidden, attended)
        past_key_values.last_token = tokens[-1:]
        return model._normed("final_norm", hidden[0, -1]) @ self.embedding.T
