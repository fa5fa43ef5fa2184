"""The KV groups of a model from its Hugging Face ``config.json``.

Covers decoders with multi-head, grouped-query and multi-query attention (Llama, Mistral, Qwen and their like), latent
attention (DeepSeek-V2 and V3), and layers with a sliding window or chunks (Gemma 2 and 3, gpt-oss, Mistral 7B v0.1).
A config whose KV has another shape, or which does not say what it has, is refused with the fields that are the reason;
nothing is guessed. Such a model's groups can be made directly as a ``ModelLayout``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from kvstore_kernels.layout import KVLayout, Layout, MLALayout
from kvstore_kernels.models import ALL, LayerGroup, ModelLayout, Reach, window

__all__ = ["model_layout"]

_OTHER_KV: Final = (
    "attention_k_eq_v",
    "attn_layer_period",
    "block_configs",
    "global_head_dim",
    "index_head_dim",
    "indexer_head_dim",
    "kv_aggregation_stride",
    "kv_source_layers",
    "n_head_kv",
    "num_global_key_value_heads",
    "num_key_value_heads_per_layer",
    "per_layer_config",
    "swa_head_dim",
    "swa_num_key_value_heads",
)
"""Fields that, where set, give some layers KV of another shape, or more than KV."""

_OTHER_KV_HEADS: Final = ("kv_n_heads", "multi_query", "multi_query_attention", "multi_query_group_num", "num_kv_heads")
"""Fields by which some models give their KV heads in place of ``num_key_value_heads``."""

_NESTED: Final = ("text_config", "llm_config", "language_config")
_FULL: Final = frozenset({"full_attention", "attention", "global_attention"})
_WINDOW: Final = frozenset({"sliding_attention", "local_attention"})
_CHUNKED: Final = "chunked_attention"


def model_layout(config: Mapping[str, Any], block_tokens: int, dtype: str | None = None) -> ModelLayout:
    """The KV groups that a ``config.json`` describes.

    Args:
        config: the file's content; of a multi-modal model the part for text is used.
        block_tokens: tokens a block.
        dtype: of the KV cache; left out, the config's own ``dtype`` (``torch_dtype`` in older ones).

    Raises:
        ValueError: fields are missing or impossible, or the model's KV is of a kind that is not covered.
    """
    text = _text_part(config)
    _check_covered(text)
    dtype = dtype or _dtype_of(text, config)
    reaches = _reaches(text)
    groups = []
    for name in ("full", "window", "chunk"):
        layers = tuple(index for index, (of_layer, _) in enumerate(reaches) if of_layer == name)
        if layers:
            layout = _layout_of(text, len(layers), dtype, block_tokens)
            groups.append(LayerGroup(name, layers, layout, reaches[layers[0]][1]))
    return ModelLayout(tuple(groups))


def _text_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    if "num_hidden_layers" not in config:
        for name in _NESTED:
            if isinstance(config.get(name), Mapping):
                part: Mapping[str, Any] = config[name]
                return part
    return config


def _check_covered(text: Mapping[str, Any]) -> None:
    if text.get("is_encoder_decoder"):
        raise ValueError("is_encoder_decoder: models with an encoder are not covered")
    found = [name for name in _OTHER_KV if text.get(name)]
    if not _layer_types(text):
        found += sorted(name for name in text if name.startswith(("mamba_", "ssm_", "linear_")) and text[name])
    if found:
        raise ValueError(
            f"the config's {', '.join(found)} give the model KV that config.json readers here do not cover; "
            "make its groups as a ModelLayout"
        )


def _dtype_of(text: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    for source in (text, config):
        for name in ("dtype", "torch_dtype"):
            if isinstance(source.get(name), str):
                return str(source[name]).removeprefix("torch.")
    raise ValueError("the config lacks dtype (or torch_dtype); give the dtype of the KV cache")


def _layout_of(text: Mapping[str, Any], num_layers: int, dtype: str, block_tokens: int) -> Layout:
    if text.get("kv_lora_rank") is not None:
        latent_dim, rotary_dim = _fields(text, "kv_lora_rank", "qk_rope_head_dim")
        return MLALayout(num_layers, latent_dim, rotary_dim, dtype, block_tokens)
    head_dim = _head_dim(text)
    value_dim = text.get("v_head_dim")
    if value_dim is not None and value_dim != head_dim:
        raise ValueError(f"v_head_dim: values of {value_dim} elements beside keys of {head_dim} are not covered")
    return KVLayout(num_layers, _kv_heads(text), head_dim, dtype, block_tokens)


def _head_dim(text: Mapping[str, Any]) -> int:
    if text.get("head_dim") is not None:
        return _fields(text, "head_dim")[0]
    hidden, heads = _fields(text, "hidden_size", "num_attention_heads", instead="head_dim")
    if hidden % heads:
        raise ValueError(f"hidden_size {hidden} is no multiple of num_attention_heads {heads}, and head_dim is missing")
    return hidden // heads


def _kv_heads(text: Mapping[str, Any]) -> int:
    if text.get("num_key_value_heads") is not None:
        return _fields(text, "num_key_value_heads")[0]
    others = [name for name in _OTHER_KV_HEADS if name in text]
    if others:
        raise ValueError(
            f"the config lacks num_key_value_heads and gives KV heads by {', '.join(others)}; "
            "add num_key_value_heads to it"
        )
    return _fields(text, "num_attention_heads", instead="num_key_value_heads")[0]


def _reaches(text: Mapping[str, Any]) -> list[tuple[str, Reach]]:
    """Name of the group and reach of each layer that has KV of its own."""
    (num_layers,) = _fields(text, "num_hidden_layers")
    types = _layer_types(text) or _implied_layer_types(text, num_layers)
    if len(types) != num_layers:
        raise ValueError(f"layer_types names {len(types)} layers, num_hidden_layers is {num_layers}")
    # The last layers of some models read the KV of earlier ones and have none.
    shared = text.get("num_kv_shared_layers") or 0
    if not isinstance(shared, int) or not 0 <= shared < num_layers:
        raise ValueError(f"num_kv_shared_layers must be a number of layers below {num_layers}, got {shared!r}")
    reaches = []
    for layer_type in types[: num_layers - shared]:
        if layer_type in _FULL:
            reaches.append(("full", ALL))
        elif layer_type in _WINDOW:
            reaches.append(("window", window(_fields(text, "sliding_window")[0])))
        elif layer_type == _CHUNKED:
            reaches.append(("chunk", window(_fields(text, "attention_chunk_size")[0])))
        else:
            raise ValueError(
                f"layer_types: layers of type {layer_type!r} are not covered; make the model's groups as a ModelLayout"
            )
    return reaches


def _layer_types(text: Mapping[str, Any]) -> list[str]:
    types = text.get("layer_types") or text.get("layers_block_type") or []
    return [str(name) for name in types]


def _implied_layer_types(text: Mapping[str, Any], num_layers: int) -> list[str]:
    """Types of layers where the config does not list them, by the rules of the models that predate the list."""
    sliding, full = "sliding_attention", "full_attention"
    if not text.get("sliding_window") or text.get("use_sliding_window") is False:
        return [full] * num_layers
    if text.get("use_sliding_window"):
        (from_layer,) = _fields(text, "max_window_layers")
        return [sliding if layer >= from_layer else full for layer in range(num_layers)]
    pattern = text.get("sliding_window_pattern")
    if pattern is None and text.get("model_type") == "gemma2":
        pattern = 2
    if pattern is not None:
        if not isinstance(pattern, int) or pattern < 1:
            raise ValueError(f"sliding_window_pattern must be a whole number of at least 1, got {pattern!r}")
        return [full if (layer + 1) % pattern == 0 else sliding for layer in range(num_layers)]
    if text.get("model_type") in ("mistral", "mixtral", "phi3", "starcoder2"):
        return [sliding] * num_layers
    raise ValueError(
        f"the config has a sliding_window of {text['sliding_window']} tokens and lacks layer_types, "
        "which says for which layers"
    )


def _fields(text: Mapping[str, Any], *names: str, instead: str = "") -> list[int]:
    """Whole numbers of at least 1, of fields that must be there."""
    missing = [name for name in names if text.get(name) is None]
    if missing:
        hint = f" ({instead} would do instead)" if instead else ""
        raise ValueError(f"the config lacks {', '.join(missing)}{hint}")
    values = []
    for name in names:
        value = text[name]
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        values.append(value)
    return values
