from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from kvstore.protocol.namespace import Namespace
from kvstore_client.integrations.vllm_identity import describe, element_of, namespace_name, revision_of

FACTS: dict[str, Any] = {
    "version": "0.32.0",
    "platform": "cuda",
    "device": "H100",
    "hash_root": "aa",
    "row_bytes": 8192,
}


def config() -> Any:
    return SimpleNamespace(
        model=SimpleNamespace(name="llama", dtype="bfloat16"),
        cache=SimpleNamespace(tokens_per_hash=16, blocks_per_chunk=4),
        worker_kv_bytes_per_block=4096,
        groups=[SimpleNamespace(group_id=0, tokens_per_block=16, layer_names=("a", "b"))],
        parallel=SimpleNamespace(world_size=2, tp_size=2, pp_size=1, pcp_size=1, dcp_size=1),
        replicated_layout=False,
        canonical_layout=False,
        kv_cache_layout="LBHNC",
    )


def engine() -> Any:
    return SimpleNamespace(
        model_config=SimpleNamespace(
            dtype="torch.bfloat16", quantization=None, hf_overrides={}, revision="0e9e39f", model="llama"
        ),
        cache_config=SimpleNamespace(cache_dtype="auto", prefix_caching_hash_algo="sha256"),
        attention_config=SimpleNamespace(backend=None, backend_per_kind={}),
        parallel_config=SimpleNamespace(cp_kv_cache_interleave_size=1),
        use_v2_model_runner=False,
    )


def name(config: Any, engine: Any, identity: str = "", **facts: Any) -> str:
    return namespace_name("chat", describe(config, engine, **FACTS | facts), identity)


CHANGES = {
    "model.name": "qwen",
    "model.dtype": "fp8",
    "cache.tokens_per_hash": 32,
    "cache.blocks_per_chunk": 2,
    "worker_kv_bytes_per_block": 8192,
    "groups.0.tokens_per_block": 32,
    "groups.0.layer_names": ("a", "c"),
    "parallel.world_size": 4,
    "parallel.tp_size": 1,
    "parallel.pp_size": 2,
    "parallel.pcp_size": 2,
    "parallel.dcp_size": 2,
    "replicated_layout": True,
    "canonical_layout": True,
    "kv_cache_layout": "LBNHC",
}
ENGINE_CHANGES = {
    "model_config.quantization": "fp8",
    "model_config.hf_overrides": {"rope_scaling": 2},
    "cache_config.cache_dtype": "fp8",
    "cache_config.prefix_caching_hash_algo": "xxhash",
    "attention_config.backend": "FLASHINFER",
    "attention_config.backend_per_kind": {"full": "TRITON"},
    "parallel_config.cp_kv_cache_interleave_size": 8,
    "use_v2_model_runner": True,
}


def changed(thing: Any, path: str, value: Any) -> Any:
    *way, last = path.split(".")
    at = thing
    for step in way:
        at = at[int(step)] if step.isdigit() else getattr(at, step)
    setattr(at, last, value)
    return thing


@pytest.mark.parametrize(("path", "value"), CHANGES.items())
def test_a_different_row_has_a_different_name(path: str, value: Any) -> None:
    assert name(changed(config(), path, value), engine()) != name(config(), engine())


@pytest.mark.parametrize(("path", "value"), ENGINE_CHANGES.items())
def test_a_different_engine_has_a_different_name(path: str, value: Any) -> None:
    assert name(config(), changed(engine(), path, value)) != name(config(), engine())


@pytest.mark.parametrize("fact", FACTS)
def test_a_different_fact_has_a_different_name(fact: str) -> None:
    assert name(config(), engine(), **{fact: 1}) != name(config(), engine())


def test_equal_engines_have_equal_names_that_a_namespace_takes() -> None:
    first = name(config(), engine())
    assert first == name(config(), engine())
    assert first.startswith("chat/vllm-rows/")
    assert name(config(), engine(), identity="x") != first
    assert name(config(), None) != first
    assert Namespace(name=first).name == first


def test_revision_is_vllms_where_it_has_one() -> None:
    assert revision_of(engine()) == "0e9e39f"
    assert revision_of(None) == ""
    assert revision_of(changed(engine(), "model_config.revision", None)) == ""


def test_elements_are_bytes_where_the_dtype_is_no_plain_one() -> None:
    assert element_of("bfloat16") == "bfloat16"
    assert element_of("torch.float16") == "float16"
    assert element_of("fp8_e4m3") == "uint8"
