"""Models' groups from their ``config.json``: known models have their known KV, what is not known is refused."""

from __future__ import annotations

from typing import Any

import pytest

from kvstore_kernels.layout import KVLayout, MLALayout
from kvstore_kernels.model_config import model_layout
from kvstore_kernels.models import ALL, ModelLayout, window

LLAMA = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "torch_dtype": "bfloat16",
}
DEEPSEEK = {
    "model_type": "deepseek_v3",
    "hidden_size": 7168,
    "num_attention_heads": 128,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "torch_dtype": "bfloat16",
}
GPT_OSS = {
    "model_type": "gpt_oss",
    "hidden_size": 2880,
    "head_dim": 64,
    "num_attention_heads": 64,
    "num_hidden_layers": 24,
    "num_key_value_heads": 8,
    "sliding_window": 128,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
    "dtype": "bfloat16",
}
GEMMA_3 = {
    "model_type": "gemma3",
    "torch_dtype": "bfloat16",
    "vision_config": {"num_hidden_layers": 27},
    "text_config": {
        "model_type": "gemma3_text",
        "hidden_size": 5376,
        "num_attention_heads": 32,
        "num_key_value_heads": 16,
        "head_dim": 128,
        "num_hidden_layers": 62,
        "sliding_window": 1024,
        "sliding_window_pattern": 6,
    },
}


def without(config: dict[str, Any], *names: str, **changes: Any) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in names} | changes


def only_layout(model: ModelLayout) -> object:
    (group,) = model.groups
    assert group.reach == ALL
    assert group.layers == tuple(range(group.layout.num_layers))
    return group.layout


def test_llama_derives_its_head_dim() -> None:
    assert only_layout(model_layout(LLAMA, 64)) == KVLayout(32, 8, 128, "bfloat16", 64)


def test_explicit_head_dim_wins_over_the_derived_one() -> None:
    assert only_layout(model_layout(LLAMA | {"head_dim": 256}, 64)) == KVLayout(32, 8, 256, "bfloat16", 64)


def test_config_without_kv_heads_is_multi_head() -> None:
    config = without(LLAMA, "num_key_value_heads")
    assert only_layout(model_layout(config, 64)) == KVLayout(32, 32, 128, "bfloat16", 64)
    assert only_layout(model_layout(LLAMA | {"num_key_value_heads": 1}, 64)) == KVLayout(32, 1, 128, "bfloat16", 64)


def test_dtype_given_wins_and_both_names_of_the_field_are_read() -> None:
    assert model_layout(LLAMA, 64, dtype="float8_e4m3fn").token_bytes * 2 == model_layout(LLAMA, 64).token_bytes
    assert model_layout(without(LLAMA, "torch_dtype", dtype="float32"), 64).groups[0].layout.dtype == "float32"
    assert model_layout(LLAMA | {"torch_dtype": "torch.float16"}, 64).groups[0].layout.dtype == "float16"


def test_deepseek_has_a_latent_and_a_rotary_key() -> None:
    assert only_layout(model_layout(DEEPSEEK, 64)) == MLALayout(61, 512, 64, "bfloat16", 64)


def test_layer_types_make_two_groups() -> None:
    model = model_layout(GPT_OSS, 64)
    full, sliding = model.groups
    assert (full.name, full.reach, full.layers) == ("full", ALL, tuple(range(1, 24, 2)))
    assert (sliding.name, sliding.reach, sliding.layers) == ("window", window(128), tuple(range(0, 24, 2)))
    assert full.layout == sliding.layout == KVLayout(12, 8, 64, "bfloat16", 64)


def test_gemma_3_reads_its_text_part_and_every_sixth_layer_sees_all() -> None:
    full, sliding = model_layout(GEMMA_3, 64).groups
    assert full.layers == (5, 11, 17, 23, 29, 35, 41, 47, 53, 59)
    assert len(sliding.layers) == 52
    assert sliding.reach == window(1024)


def test_gemma_2_alternates_beginning_with_a_window() -> None:
    config = without(GEMMA_3["text_config"], "sliding_window_pattern", model_type="gemma2", torch_dtype="float16")
    full, sliding = model_layout(config, 64).groups
    assert sliding.layers == tuple(range(0, 62, 2))
    assert full.layers == tuple(range(1, 62, 2))


def test_mistral_has_a_window_on_all_layers_or_none() -> None:
    (group,) = model_layout(LLAMA | {"model_type": "mistral", "sliding_window": 4096}, 64).groups
    assert (group.name, group.reach) == ("window", window(4096))
    assert only_layout(model_layout(LLAMA | {"model_type": "mistral", "sliding_window": None}, 64))


def test_qwen_uses_its_window_only_where_it_says_so() -> None:
    config = LLAMA | {"model_type": "qwen2", "sliding_window": 32768, "max_window_layers": 28}
    assert only_layout(model_layout(config | {"use_sliding_window": False}, 64))
    full, sliding = model_layout(config | {"use_sliding_window": True}, 64).groups
    assert full.layers == tuple(range(28))
    assert sliding.layers == tuple(range(28, 32))


def test_chunked_layers_reach_as_far_as_a_chunk() -> None:
    types = (["chunked_attention"] * 3 + ["full_attention"]) * 8
    full, chunk = model_layout(LLAMA | {"layer_types": types, "attention_chunk_size": 8192}, 64).groups
    assert len(full.layers) == 8
    assert (chunk.name, chunk.reach) == ("chunk", window(8192))


def test_layers_that_share_the_kv_of_others_have_none() -> None:
    model = model_layout(GPT_OSS | {"num_kv_shared_layers": 4}, 64)
    assert sum(group.layout.num_layers for group in model.groups) == 20
    assert max(layer for group in model.groups for layer in group.layers) == 19


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "lacks dtype"),
        ({"dtype": "bfloat16"}, "lacks num_hidden_layers"),
        (without(LLAMA, "hidden_size"), r"lacks hidden_size \(head_dim would do instead\)"),
        (without(LLAMA, "hidden_size", "num_attention_heads"), "lacks hidden_size, num_attention_heads"),
        (
            without(LLAMA, "num_key_value_heads", "num_attention_heads", head_dim=128),
            r"lacks num_attention_heads \(num_key_value_heads would do instead\)",
        ),
        (without(LLAMA, "num_key_value_heads", multi_query=True), "multi_query; add num_key_value_heads"),
        (without(DEEPSEEK, "qk_rope_head_dim"), "lacks qk_rope_head_dim"),
        (DEEPSEEK | {"index_head_dim": 128}, "index_head_dim"),
        (LLAMA | {"v_head_dim": 64}, "v_head_dim: values of 64 elements beside keys of 128"),
        (LLAMA | {"hidden_size": 4097}, "4097 is no multiple of num_attention_heads 32"),
        (LLAMA | {"num_hidden_layers": "32"}, "num_hidden_layers must be a whole number"),
        (LLAMA | {"num_key_value_heads": 0}, "num_key_value_heads must be a whole number"),
        (LLAMA | {"torch_dtype": "float64"}, "unknown dtype 'float64'"),
        (LLAMA | {"is_encoder_decoder": True}, "is_encoder_decoder"),
        (LLAMA | {"global_head_dim": 512}, "global_head_dim"),
        (LLAMA | {"mamba_d_state": 16}, "mamba_d_state"),
        (LLAMA | {"layer_types": ["full_attention"] * 31}, "layer_types names 31 layers, num_hidden_layers is 32"),
        (LLAMA | {"layer_types": ["linear_attention"] * 32}, "layers of type 'linear_attention' are not covered"),
        (LLAMA | {"layer_types": ["sliding_attention"] * 32}, "lacks sliding_window"),
        (LLAMA | {"layer_types": ["chunked_attention"] * 32}, "lacks attention_chunk_size"),
        (LLAMA | {"model_type": "new", "sliding_window": 512}, "sliding_window of 512 tokens and lacks layer_types"),
        (LLAMA | {"use_sliding_window": True, "sliding_window": 512}, "lacks max_window_layers"),
        (LLAMA | {"sliding_window": 512, "sliding_window_pattern": 0}, "sliding_window_pattern must be"),
        (LLAMA | {"num_kv_shared_layers": 32}, "num_kv_shared_layers must be a number of layers below 32"),
    ],
)
def test_config_that_does_not_say_its_kv_is_refused_with_the_fields(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model_layout(config, 64)


@pytest.mark.parametrize(
    ("model_type", "more"),
    [
        ("llama", {}),
        ("mistral", {"sliding_window": 8}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}),
        ("qwen3", {"head_dim": 32}),
        ("gemma2", {"head_dim": 32, "sliding_window": 8}),
        ("gemma3_text", {"head_dim": 32, "sliding_window": 8, "sliding_window_pattern": 2}),
        ("gpt_oss", {"head_dim": 32, "sliding_window": 8, "num_local_experts": 2, "num_experts_per_tok": 1}),
    ],
)
def test_groups_are_the_cache_that_transformers_makes(model_type: str, more: dict[str, Any]) -> None:
    """A small model of that kind is run, and each layer's cache has the group's shape and reach."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 64, "intermediate_size": 64, "vocab_size": 64, "num_hidden_layers": 4, "pad_token_id": 0}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 1}
    config = transformers.AutoConfig.for_model(model_type, **(small | heads | more))
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        cache = model(torch.zeros(1, 20, dtype=torch.long), use_cache=True).past_key_values
    groups = model_layout(config.to_dict(), 4, "float32").groups
    of_layer = {layer: group for group in groups for layer in group.layers}
    assert sorted(of_layer) == list(range(len(cache.layers)))
    for index, layer in enumerate(cache.layers):
        group = of_layer[index]
        assert isinstance(group.layout, KVLayout)
        kept = 20 if group.reach == ALL else 8 - 1
        assert tuple(layer.keys.shape) == (1, group.layout.num_kv_heads, kept, group.layout.head_dim)
        assert layer.values.shape == layer.keys.shape
