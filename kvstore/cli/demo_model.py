"""The demo's models on the CPU.

Covers: what an engine does with any of them, prefill in chunks and greedy decoding, and small Llama-style transformers
with random weights: making and loading these.
Does not cover: the store, see ``kvstore.cli.demo_engine``. torch and transformers are imported inside functions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from inspect import signature
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Final

from kvstore.errors import KVStoreError
from kvstore_kernels.layout import KVLayout

if TYPE_CHECKING:
    import torch
    from transformers import DynamicCache, LlamaForCausalLM, PreTrainedModel

__all__ = ["MODEL_SHAPES", "TRAINED", "Engine", "LlamaEngine", "ModelShape", "load_model"]

_CHUNK_TOKENS: Final = 512
_WEIGHT_GAIN: Final = 2.25
"""Standard deviation of a weight times the square root of its inputs; 1 would keep attention almost uniform."""


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A model with grouped-query attention.

    Attributes:
        vocabulary: tokens the model knows.
        hidden, intermediate: widths of the residual stream and of the feed-forward layer.
        layers, query_heads, kv_heads: counts; a head has ``hidden // query_heads`` elements.
        dtype: of its KV.
        most_tokens: longest sequence that it was made for.
    """

    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    query_heads: int
    kv_heads: int
    dtype: str = "float32"
    most_tokens: int = 1 << 20

    def layout(self, block_tokens: int) -> KVLayout:
        """Layout of its KV."""
        return KVLayout(self.layers, self.kv_heads, self.hidden // self.query_heads, self.dtype, block_tokens)


TRAINED: Final = "trained"
"""The model of ``kvstore quality``: its weights are trained, those of the others are random."""

MODEL_SHAPES: Final = {
    "tiny": ModelShape(vocabulary=512, hidden=128, intermediate=256, layers=2, query_heads=4, kv_heads=2),
    "small": ModelShape(vocabulary=8192, hidden=512, intermediate=1408, layers=8, query_heads=8, kv_heads=2),
    "medium": ModelShape(vocabulary=8192, hidden=1024, intermediate=2816, layers=12, query_heads=16, kv_heads=4),
    TRAINED: ModelShape(1024, 256, 512, layers=4, query_heads=4, kv_heads=2, dtype="bfloat16", most_tokens=512),
}
"""Models by name: 0.4, 31, 152 and 2.6 million parameters."""


class Engine(ABC):
    """Prefill and greedy decoding, one sequence at a time. Not thread-safe.

    Args:
        model: a model of transformers on the CPU, in evaluation mode.
        layout: of a block of its KV.
        parameters: its weights.
    """

    def __init__(self, model: PreTrainedModel, layout: KVLayout, parameters: int) -> None:
        self.model = model
        self.layout = layout
        self.parameters = parameters
        self._chunk_tokens = max(1, _CHUNK_TOKENS // layout.block_tokens) * layout.block_tokens

    @abstractmethod
    def read(self, tokens: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
        """Compute tokens ``[count]`` on top of a cache and append their KV; the last's logits, ``[vocabulary]``."""

    def new_cache(self) -> DynamicCache:
        """An empty cache, without the store."""
        from transformers import DynamicCache

        return DynamicCache()

    def chunk_edges(self, prompt_tokens: int, start: int) -> list[int]:
        """Borders of the chunks that prefill tokens ``[start, prompt_tokens)``, both ends included.

        The last chunk begins at the last block border that leaves it a token.
        """
        tail = (prompt_tokens - 1) // self.layout.block_tokens * self.layout.block_tokens
        return [*range(start, tail, self._chunk_tokens), max(start, tail), prompt_tokens]

    def prefill(self, prompt: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
        """Compute the tokens of a prompt that a cache does not have yet, and append their KV to it.

        Args:
            prompt: token ids, ``[prompt_tokens]``.
            cache: holds less than ``prompt_tokens`` of them; changed in place.

        Returns:
            Logits behind the last token, ``[vocabulary]``.
        """
        *edges, tail, _ = self.chunk_edges(prompt.shape[0], cache.get_seq_length())
        for first, last in pairwise([*edges, tail]):
            self.read(prompt[first:last], cache)
        return self.read(prompt[tail:], cache)

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
            logits = self.read(token.view(1), cache)

    def agreement(self, logits: torch.Tensor, cache: DynamicCache, tokens: Sequence[int]) -> int:
        """How many of these tokens it would have generated itself, each behind those before it.

        Args:
            logits: behind the sequence in the cache.
            cache: not changed.
            tokens: what another process generated behind the same sequence.
        """
        import torch

        cache, alike = deepcopy(cache), 0
        for token in tokens:
            alike += int(logits.argmax()) == token
            logits = self.read(torch.tensor([token]), cache)
        return alike


class LlamaEngine(Engine):
    """A causal language model of transformers.

    Args:
        model: on the CPU, in evaluation mode.
        block_tokens: tokens a block.
    """

    def __init__(self, model: LlamaForCausalLM, block_tokens: int) -> None:
        config = model.config
        layout = KVLayout(
            num_layers=config.num_hidden_layers,
            num_kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            dtype=str(model.dtype).removeprefix("torch."),
            block_tokens=block_tokens,
        )
        super().__init__(model, layout, sum(weight.numel() for weight in model.parameters()))
        # Its name has changed with transformers 5.24.
        names = signature(model.model.forward).parameters
        self._cache_name = "cache" if "cache" in names else "past_key_values"

    def read(self, tokens: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
        """See ``Engine``."""
        output = self.model.model(input_ids=tokens[None], use_cache=True, **{self._cache_name: cache})
        return self.model.lm_head(output.last_hidden_state[0, -1])


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
