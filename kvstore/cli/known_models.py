"""Configs of a few well-known models, as far as they say what KV the models have, so that nothing need be downloaded.

The fields are those of the models' own ``config.json``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

__all__ = ["KNOWN_MODELS"]


def _decoder(layers: int, heads: int, kv_heads: int, head_dim: int = 128, **more: Any) -> dict[str, Any]:
    return {
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "dtype": "bfloat16",
        **more,
    }


def _alternating(layers: int, kv_heads: int) -> dict[str, Any]:
    types = ["sliding_attention", "full_attention"] * (layers // 2)
    return _decoder(layers, 64, kv_heads, 64, model_type="gpt_oss", sliding_window=128, layer_types=types)


KNOWN_MODELS: Final[Mapping[str, Mapping[str, Any]]] = {
    "llama-3.1-8b": _decoder(32, 32, 8, model_type="llama"),
    "llama-3.1-70b": _decoder(80, 64, 8, model_type="llama"),
    "llama-3.1-405b": _decoder(126, 128, 8, model_type="llama"),
    "mistral-7b-v0.3": _decoder(32, 32, 8, model_type="mistral", sliding_window=None),
    "qwen3-8b": _decoder(36, 32, 8, model_type="qwen3", sliding_window=None, use_sliding_window=False),
    "qwen3-32b": _decoder(64, 64, 8, model_type="qwen3", sliding_window=None, use_sliding_window=False),
    "gemma-3-27b": _decoder(62, 32, 16, model_type="gemma3_text", sliding_window=1024, sliding_window_pattern=6),
    "gpt-oss-20b": _alternating(24, 8),
    "gpt-oss-120b": _alternating(36, 8),
    "deepseek-v3": {
        "model_type": "deepseek_v3",
        "num_hidden_layers": 61,
        "num_attention_heads": 128,
        "kv_lora_rank": 512,
        "qk_rope_head_dim": 64,
        "dtype": "bfloat16",
    },
}
"""By name."""
