"""The demo's models on the CPU, with their KV as tensors that the store reads and writes in place.

Covers: what an engine does with any of them, and small Llama-style transformers with random weights: making and loading
these, prefill in chunks, greedy decoding, and where a transformers cache has the KV of which block.
Does not cover: the store, see ``kvstore.cli.demo_engine``. torch and transformers are imported inside functions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from kvstore.errors import KVStoreError
from kvstore_kernels.layout import KVLayout
from kvstore_kernels.paged import PagedKV

if TYPE_CHECKING:
    import torch
    from transformers import DynamicCache, LlamaForCausalLM

    States = list[tuple[torch.Tensor, torch.Tensor]]

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
        layout: of the model's KV.
        parameters: weights of the model.
    """

    def __init__(self, layout: KVLayout, parameters: int) -> None:
        self.layout = layout
        self.parameters = parameters
        self._chunk_tokens = max(1, _CHUNK_TOKENS // layout.block_tokens) * layout.block_tokens

    @abstractmethod
    def read(self, tokens: torch.Tensor, cache: Any) -> torch.Tensor:
        """Compute tokens ``[count]`` on top of a cache and append their KV; the last's logits, ``[vocabulary]``."""

    @abstractmethod
    def states_of(self, cache: Any) -> States:
        """Keys and values ``[num_kv_heads, tokens, head_dim]`` of each layer of a cache, in place."""

    @abstractmethod
    def cache_of(self, states: States, blocks: int, before: torch.Tensor | None = None) -> Any:
        """A new cache whose sequence begins with the first blocks of these keys and values.

        Args:
            states: as ``empty_states`` gives them.
            blocks: how many.
            before: token ids of these blocks, at least the last; None where there are none.
        """

    def chunk_edges(self, prompt_tokens: int, start: int) -> list[int]:
        """Borders of the chunks that prefill tokens ``[start, prompt_tokens)``, both ends included.

        The last chunk begins at the last block border that leaves it a token.
        """
        tail = (prompt_tokens - 1) // self.layout.block_tokens * self.layout.block_tokens
        return [*range(start, tail, self._chunk_tokens), max(start, tail), prompt_tokens]

    def prefill(self, prompt: torch.Tensor, cache: Any, start: int) -> torch.Tensor:
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
            self.read(prompt[first:last], cache)
        return self.read(prompt[tail:], cache)

    def decode(self, logits: torch.Tensor, cache: Any, new_tokens: int) -> tuple[list[int], float]:
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

    def agreement(self, logits: torch.Tensor, cache: Any, tokens: Sequence[int]) -> int:
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

    def empty_states(self, blocks: int) -> States:
        """Memory for keys and values of each layer, for so many blocks; NaN, so that a byte not written shows."""
        import torch

        shape = (self.layout.num_kv_heads, blocks * self.layout.block_tokens, self.layout.head_dim)
        dtype = getattr(torch, self.layout.dtype)

        def empty() -> torch.Tensor:
            return torch.full(shape, float("nan"), dtype=dtype)

        return [(empty(), empty()) for _ in range(self.layout.num_layers)]

    def pages_of(self, states: States) -> PagedKV:
        """The full blocks of keys and values, in place: page n is block n."""
        tokens = self.layout.block_tokens
        blocks = states[0][0].shape[1] // tokens
        layers = [
            tuple(state[:, : blocks * tokens].unflatten(1, (blocks, tokens)) for state in layer) for layer in states
        ]
        return PagedKV.from_layers(self.layout, layers, axes="head page token dim")


class LlamaEngine(Engine):
    """A causal language model of transformers, with its cache.

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
        super().__init__(layout, sum(weight.numel() for weight in model.parameters()))
        self._model = model

    def read(self, tokens: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
        """See ``Engine``."""
        output = self._model.model(input_ids=tokens[None], past_key_values=cache, use_cache=True)
        return self._model.lm_head(output.last_hidden_state[0, -1])

    def states_of(self, cache: DynamicCache) -> States:
        """See ``Engine``."""
        return [(layer.keys[0], layer.values[0]) for layer in cache.layers]

    def cache_of(self, states: States, blocks: int, before: torch.Tensor | None = None) -> DynamicCache:
        """See ``Engine``."""
        from transformers import DynamicCache

        cache = DynamicCache()
        tokens = blocks * self.layout.block_tokens
        if tokens:
            for layer, (keys, values) in enumerate(states):
                cache.update(keys[None, :, :tokens], values[None, :, :tokens], layer)
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
