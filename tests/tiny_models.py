"""Tiny transformers models with random weights, made here: nothing is downloaded."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

from packaging.version import Version

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of the imports, which are not ours
    import torch
    import transformers

VOCABULARY = 256
MOST_TOKENS = 1024
NEW_TOKENS = 32

COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": MOST_TOKENS,
    "initializer_range": 0.25,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
GPT2: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "n_embd": 64,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": MOST_TOKENS,
    "initializer_range": 0.25,
    "bos_token_id": None,
    "eos_token_id": None,
}
WINDOW: dict[str, Any] = {**COMMON, "head_dim": 16, "sliding_window": 32}
UNTIED = {"tie_word_embeddings": False}
"""A tied model of this size and with these weights says what it was told last."""

MIXED = ["sliding_attention", "full_attention", "sliding_attention"]

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("ForCausalLM", COMMON),
    "Qwen2": ("ForCausalLM", COMMON),
    "Qwen3": ("ForCausalLM", {**COMMON, "head_dim": 16}),
    "Mistral": ("ForCausalLM", WINDOW),
    "Gemma2": ("ForCausalLM", {**WINDOW, **UNTIED}),
    "Gemma3": ("ForCausalLM", {**WINDOW, **UNTIED, "layer_types": MIXED}),
    "GPTNeoX": ("ForCausalLM", {name: value for name, value in COMMON.items() if name != "num_key_value_heads"}),
    "GPT2": ("LMHeadModel", GPT2),
}
"""Heads and options by family: grouped and multi-head attention, rotary and learned positions, windows."""

CHUNKS_GO_ON = Version(transformers.__version__) >= Version("5.21")
"""Whether ``prefill_chunk_size`` goes on from what is in a cache; before, it begins anew."""


@contextmanager
def quiet() -> Any:
    """Without the warnings of libraries, which are not ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def model_of(family: str, seed: int = 0, **options: Any) -> Any:
    """A model of a family, its weights drawn from a seed."""
    head, common = FAMILIES[family]
    config_name = f"{family}TextConfig" if family == "Gemma3" else f"{family}Config"
    return made(config_name, f"{family}{head}", seed, **{**common, **options})


def made(config_name: str, model_name: str, seed: int = 0, **options: Any) -> Any:
    """Any model."""
    with quiet():
        torch.manual_seed(seed)
        return getattr(transformers, model_name)(getattr(transformers, config_name)(**options)).eval()


def prompt_of(tokens: int, seed: int = 0) -> Any:
    """Random token ids ``[1, tokens]``, without that of padding."""
    return torch.randint(1, VOCABULARY, (1, tokens), generator=torch.Generator().manual_seed(seed))


def generate(model: Any, ids: Any, cache: Any = None, **options: Any) -> Any:
    """Greedy tokens behind a prompt, ``[1, tokens]``, the prompt among them."""
    with quiet():
        return model.generate(
            ids, past_key_values=cache, **{"max_new_tokens": NEW_TOKENS, "do_sample": False, **options}
        )


def computed_tokens(model: Any, work: Callable[[], Any]) -> tuple[Any, int]:
    """What some work gives, and how many tokens the model's embedding was asked for meanwhile."""
    counts: list[int] = []
    hook = model.get_input_embeddings().register_forward_hook(lambda *given: counts.append(given[1][0].numel()))
    try:
        return work(), sum(counts)
    finally:
        hook.remove()
