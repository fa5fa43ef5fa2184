"""The demo's model: a small Llama-style transformer on the CPU, with its KV as tensors that can leave it and come back.

Covers: making and loading the weights, prefill in chunks, greedy decoding, blocks out of and into a transformers cache.
Does not cover: the store, see ``kvstore.cli.demo_engine``. torch and transformers are imported inside functions.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Final

from kvstore.errors import KVStoreError
from kvstore_kernels.layout import KVLayout

if TYPE_CHECKING:
    import torch
    from transformers import DynamicCache, LlamaForCausalLM

__all__ = ["MODEL_SHAPES", "Engine", "ModelShape", "load_model"]

_CHUNK_TOKENS: Final = 512
_WEIGHT_GAIN: Final = 2.25
"""Standard deviation of a weight times the square root of its inputs; 1 would keep attention almost uniform."""


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A Llama-style model with grouped-query attention, float32.

    Attributes:
        vocabulary: tokens the model knows.
        hidden, intermediate: widths of the residual stream and of the feed-forward layer.
        layers, query_heads, kv_heads: counts; a head has ``hidden // query_heads`` elements.
    """

    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    query_heads: int
    kv_heads: int

    def layout(self, block_tokens: int) -> KVLayout:
        """Layout of its KV."""
        return KVLayout(self.layers, self.kv_heads, self.hidden // self.query_heads, "float32", block_tokens)


MODEL_SHAPES: Final = {
    "tiny": ModelShape(vocabulary=512, hidden=128, intermediate=256, layers=2, query_heads=4, kv_heads=2),
    "small": ModelShape(vocabulary=8192, hidden=512, intermediate=1408, layers=8, query_heads=8, kv_heads=2),
    "medium": ModelShape(vocabulary=8192, hidden=1024, intermediate=2816, layers=12, query_heads=16, kv_heads=4),
}
"""Models by name: 0.4, 31 and 152 million parameters."""


class Engine:
    """Prefill and greedy decoding with a transformers cache, one sequence at a time. Not thread-safe.

    Args:
        model: a causal language model on the CPU, in evaluation mode.
        block_tokens: tokens a block.

    Attributes:
        layout: of the model's KV.
        parameters: weights of the model.
    """

    def __init__(self, model: LlamaForCausalLM, block_tokens: int) -> None:
        config = model.config
        self._model = model
        self.layout = KVLayout(
            num_layers=config.num_hidden_layers,
            num_kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            dtype=str(model.dtype).removeprefix("torch."),
            block_tokens=block_tokens,
        )
        self.parameters = sum(weight.numel() for weight in model.parameters())
        self._chunk_tokens = max(1, _CHUNK_TOKENS // block_tokens) * block_tokens

    def chunk_edges(self, prompt_tokens: int, start: int) -> list[int]:
        """Borders of the chunks that prefill tokens ``[start, prompt_tokens)``, both ends included.

        The last chunk begins at the last block border that leaves it a token.
        """
        tail = (prompt_tokens - 1) // self.layout.block_tokens * self.layout.block_tokens
        return [*range(start, tail, self._chunk_tokens), max(start, tail), prompt_tokens]

    def prefill(self, prompt: torch.Tensor, cache: DynamicCache, start: int) -> torch.Tensor:
        """Compute tokens from ``start`` on top of a cache that holds those before, and append their KV to it.

        Args:
            prompt: token ids, ``[prompt_tokens]``.
            cache: holds ``start`` tokens; changed in place.
            start: first token to compute, less than ``prompt_tokens``.

        Returns:
            Logits behind the last token, ``[vocabulary]``.
        """
        *edges, tail, _ = self.chunk_edges(prompt.shape[0], start)
        for first, last in pairwise([*edges, tail]):
            self._model.model(input_ids=prompt[None, first:last], past_key_values=cache, use_cache=True)
        output = self._model.model(input_ids=prompt[None, tail:], past_key_values=cache, use_cache=True)
        return self._model.lm_head(output.last_hidden_state[0, -1])

    def decode(self, logits: torch.Tensor, cache: DynamicCache, new_tokens: int) -> tuple[list[int], float]:
        """Generate greedily.

        Returns:
            ``new_tokens`` token ids, and the least margin between the best and the second logit.

        Raises:
            KVStoreError: logits are not finite, as with KV that is not this model's.
        """
        tokens: list[int] = []
        smallest_margin = float("inf")
        while True:
            if not logits.isfinite().all():
                raise KVStoreError("the model's logits are not finite: the KV before them is not of this model")
            best, second = logits.topk(2).values
            smallest_margin = min(smallest_margin, float(best - second))
            token = logits.argmax()
            tokens.append(int(token))
            if len(tokens) == new_tokens:
                return tokens, smallest_margin
            step = self._model(input_ids=token.view(1, 1), past_key_values=cache, use_cache=True)
            logits = step.logits[0, -1]

    def empty_blocks(self, count: int) -> torch.Tensor:
        """Memory for blocks, ``[count, *layout.shape]``, filled with NaN so that a byte not written shows."""
        import torch

        return torch.full((count, *self.layout.shape), float("nan"), dtype=self._model.dtype)

    def read_blocks(self, cache: DynamicCache, first: int, last: int) -> torch.Tensor:
        """Copy blocks ``[first, last)`` out of a cache, ``[last - first, *layout.shape]``, contiguous."""
        layout = self.layout
        blocks = self.empty_blocks(last - first)
        tokens = slice(first * layout.block_tokens, last * layout.block_tokens)
        for layer, states in enumerate(cache.layers):
            for kv, state in enumerate((states.keys, states.values)):
                rows = state[0, :, tokens].unflatten(1, (last - first, layout.block_tokens))
                blocks[:, layer, kv] = rows.permute(1, 2, 0, 3)
        return blocks

    def cache_of(self, blocks: torch.Tensor) -> DynamicCache:
        """A new cache that holds a copy of these blocks, ``[count, *layout.shape]``, as the sequence's beginning."""
        from transformers import DynamicCache

        cache = DynamicCache()
        if blocks.shape[0]:
            for layer in range(self.layout.num_layers):
                keys, values = (blocks[:, layer, kv].flatten(0, 1).transpose(0, 1)[None].contiguous() for kv in (0, 1))
                cache.update(keys, values, layer)
        return cache


def load_model(directory: Path, shape: ModelShape, seed: int, max_tokens: int) -> LlamaForCausalLM:
    """The model in ``directory``, made there from the seed if it is not there yet.

    Args:
        directory: of the weights, as safetensors, and their configuration.
        shape: of a new model.
        seed: of a new model's weights.
        max_tokens: longest sequence of a new model.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    if not (directory / "model.safetensors").exists():
        config = LlamaConfig(
            vocab_size=shape.vocabulary,
            hidden_size=shape.hidden,
            intermediate_size=shape.intermediate,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.query_heads,
            num_key_value_heads=shape.kv_heads,
            max_position_embeddings=max_tokens,
            initializer_range=_WEIGHT_GAIN / shape.hidden**0.5,
            bos_token_id=None,
            eos_token_id=None,
        )
        torch.manual_seed(seed)
        LlamaForCausalLM(config).save_pretrained(directory)
    return LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32, local_files_only=True).eval()
