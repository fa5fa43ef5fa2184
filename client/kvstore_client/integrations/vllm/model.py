"""What vLLM says of a model's KV, as layouts, shards and KV groups of the store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Any, Final

import torch
from vllm.config import VllmConfig
from vllm.platforms import current_platform
from vllm.v1.core.kv_cache_utils import resolve_kv_cache_block_sizes
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    MLAAttentionSpec,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
)

from kvstore.errors import InvalidArgument
from kvstore_client.integrations.vllm.settings import ConnectorSettings
from kvstore_client.tensors import TensorStore, store_layout
from kvstore_kernels.codecs import get_codec
from kvstore_kernels.layout import KVLayout, Layout, MLALayout

__all__ = ["EngineGroup", "EngineModel", "describe_model", "open_store"]

_KNOWN_PACKINGS: Final = ("vec", "vec16")
_PLAIN: Final = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}


@dataclass(frozen=True, slots=True)
class EngineGroup:
    """One KV group: layers that share a block table.

    Attributes:
        index: of the group in vLLM's configuration and in block tables.
        layer_names: in order.
        layout: of a store block of this group.
        page_tokens: tokens of the engine's block.
        window: whether the engine gives blocks back while a request runs (sliding windows).
        opaque: whether pages are taken as bytes: KV that the engine packed or quantised itself.
    """

    index: int
    layer_names: tuple[str, ...]
    layout: Layout
    page_tokens: int
    window: bool
    opaque: bool


@dataclass(frozen=True, slots=True)
class EngineModel:
    """What both halves of the connector derive, equally.

    Attributes:
        name, revision: of the model.
        digest: of what else changes its KV: quantisation, overrides of its configuration, packing by the processor.
        groups: whose KV is stored.
        table_groups: KV groups of the engine, which block tables have.
        block_tokens: tokens of a store block.
        hash_tokens: tokens of one of vLLM's block hashes.
        shard, shards: of this worker.
        workers: processes that load and save.
        writes: whether this worker saves: of ranks with equal KV the first does.
        times_prefill: whether this worker says how fast prompts are computed: one does, where each computes all layers.
    """

    name: str
    revision: str
    digest: str
    groups: tuple[EngineGroup, ...]
    table_groups: int
    block_tokens: int
    hash_tokens: int
    shard: int
    shards: int
    workers: int
    writes: bool
    times_prefill: bool

    @property
    def window(self) -> bool:
        """Whether blocks are given back while a request runs."""
        return any(group.window for group in self.groups)


def describe_model(settings: ConnectorSettings, vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> EngineModel:
    """Derive it from vLLM's configuration.

    Raises:
        InvalidArgument: a model or a parallel layout whose KV cannot be stored by hash; says which and why.
    """
    parallel = vllm_config.parallel_config
    if parallel.decode_context_parallel_size > 1 or getattr(parallel, "prefill_context_parallel_size", 1) > 1:
        raise InvalidArgument(
            "the kvstore connector does not know context parallelism (a block's tokens on several ranks); "
            "start vLLM without decode and prefill context parallelism"
        )
    ids = kv_cache_config.prefix_cacheable_group_ids
    if not ids:
        raise InvalidArgument("this model has no KV that a hash of its tokens names; start vLLM without the connector")
    scheduler_tokens, hash_tokens = resolve_kv_cache_block_sizes(kv_cache_config, vllm_config)
    engine = [_group(index, kv_cache_config.kv_cache_groups[index], vllm_config) for index in ids]
    tokens = _block_tokens(settings, [group.layout for group in engine], scheduler_tokens)
    groups = tuple(replace(group, layout=replace(group.layout, block_tokens=tokens)) for group in engine)
    tp, pp = parallel.tensor_parallel_size, parallel.pipeline_parallel_size
    replicas = max(1, getattr(kv_cache_config, "kv_tp_replicas", 1))
    if all(isinstance(group.layout, MLALayout) for group in groups):
        replicas = tp
    if pp > 1:
        _check_stages(vllm_config, groups, pp)
    rank = parallel.rank % (tp * pp)
    return EngineModel(
        name=vllm_config.model_config.model,
        revision=_revision(settings, vllm_config),
        digest=_digest(vllm_config, [_packing(group, vllm_config, settings.codec) for group in groups]),
        groups=groups,
        table_groups=len(kv_cache_config.kv_cache_groups),
        block_tokens=tokens,
        hash_tokens=hash_tokens,
        shard=rank // tp * (tp // replicas) + rank % tp // replicas,
        shards=pp * (tp // replicas),
        workers=tp * pp,
        writes=rank % tp % replicas == 0,
        times_prefill=rank == 0 and pp == 1,
    )


def open_store(settings: ConnectorSettings, model: EngineModel, group: int, timeout_s: float) -> TensorStore:
    """Connect to the store of one KV group of this worker.

    Raises:
        KVStoreError: as ``TensorStore``.
    """
    return TensorStore(
        [each.layout for each in model.groups],
        settings.codec,
        model=model.name,
        revision=model.revision,
        name=f"{settings.name}/{model.digest}",
        tenant_salt=settings.tenant_salt.encode(),
        shard=model.shard,
        shards=model.shards,
        group=group,
        groups=len(model.groups),
        fidelity=settings.fidelity,
        exact_codec=settings.exact_codec,
        engine_block_tokens=model.hash_tokens,
        least_block_tokens=min(settings.block_tokens, model.block_tokens),
        threads=settings.threads,
        endpoint=settings.endpoint,
        mapped=settings.mapped,
        timeout=timeout_s,
        unknown_revision=settings.unknown_revision,
        directory=settings.directory,
    )


def _group(index: int, group: Any, vllm_config: VllmConfig) -> EngineGroup:
    """A KV group with the layout of the engine's own block."""
    spec = group.kv_cache_spec
    if isinstance(spec, UniformTypeKVCacheSpecs):
        specs = {_shape(each): each for each in spec.kv_cache_specs.values()}
        if len(specs) > 1:
            raise InvalidArgument(
                f"KV group {index} mixes layers of unlike KV ({', '.join(map(str, specs))}), which the kvstore "
                "connector does not know; store it by vLLM's own offloading with the kvstore tier"
            )
        spec = next(iter(specs.values()))
    if not isinstance(spec, (FullAttentionSpec, SlidingWindowSpec)):
        raise InvalidArgument(
            f"KV group {index} is of kind {type(spec).__name__}, which the kvstore connector does not know: it stores "
            "full attention, sliding windows and latent attention; for others use vLLM's own offloading with the "
            "kvstore tier"
        )
    layers = len(group.layer_names)
    window = not isinstance(spec, FullAttentionSpec)
    dtype = _PLAIN.get(spec.dtype, "")
    packed = spec.kv_quant_mode.value != 0 or spec.state_content_bytes is not None or spec.tokens_per_state != 1
    layout: Layout
    if isinstance(spec, MLAAttentionSpec) and dtype and not packed:
        text = vllm_config.model_config.hf_text_config
        latent, rotary = getattr(text, "kv_lora_rank", 0), getattr(text, "qk_rope_head_dim", 0)
        if latent and rotary and latent + rotary == spec.head_size:
            layout = MLALayout(layers, latent, rotary, dtype, spec.block_size)
            return EngineGroup(index, tuple(group.layer_names), layout, spec.block_size, window, False)
    elif dtype and not packed and spec.head_size_v in (None, spec.head_size):
        layout = KVLayout(layers, spec.num_kv_heads, spec.head_size, dtype, spec.block_size)
        return EngineGroup(index, tuple(group.layer_names), layout, spec.block_size, window, False)
    # Packed by the engine: halves of its pages' bytes, whatever they mean. An exact codec does not care.
    page_bytes = spec.page_size_bytes
    if page_bytes % (2 * spec.block_size):
        raise InvalidArgument(
            f"KV group {index} has pages of {page_bytes} bytes, no even number a token of {spec.block_size}: the "
            "kvstore connector cannot cut them"
        )
    layout = KVLayout(layers, 1, page_bytes // (2 * spec.block_size), "uint8", spec.block_size)
    return EngineGroup(index, tuple(group.layer_names), layout, spec.block_size, window, True)


def _shape(spec: Any) -> tuple[Any, ...]:
    return (
        type(spec).__name__,
        spec.block_size,
        getattr(spec, "num_kv_heads", 0),
        getattr(spec, "head_size", 0),
        str(getattr(spec, "dtype", "")),
    )


def _block_tokens(settings: ConnectorSettings, layouts: Sequence[Layout], scheduler_tokens: int) -> int:
    """Tokens of a store block: whole blocks of every group, and as many as the codec takes for each."""
    tokens = 0
    for layout in layouts:
        codec = settings.codec if layout.dtype != "uint8" else "raw"
        found = store_layout(replace(layout, block_tokens=scheduler_tokens), codec, at_least=settings.block_tokens)
        tokens = max(tokens, found.block_tokens)
    return tokens


def _check_stages(vllm_config: VllmConfig, groups: Sequence[EngineGroup], stages: int) -> None:
    total = int(vllm_config.model_config.hf_text_config.num_hidden_layers)
    here = sum(len(group.layer_names) for group in groups)
    if here * stages != total:
        raise InvalidArgument(
            f"pipeline stages of unequal depth ({here} of {total} layers here, {stages} stages): their parts of "
            "a block do not match each other; choose a number of stages that divides the layers"
        )


def _revision(settings: ConnectorSettings, vllm_config: VllmConfig) -> str:
    """The revision of the weights, "" where nobody said it."""
    model = vllm_config.model_config
    return str(settings.revision or model.revision or getattr(model.hf_config, "_commit_hash", None) or "")


def _digest(vllm_config: VllmConfig, packings: Sequence[str]) -> str:
    """Of what else makes equal tokens have other KV, or the same KV other bytes."""
    model = vllm_config.model_config
    changes = (
        str(model.dtype),
        str(model.quantization),
        repr(model.hf_overrides),
        *(repr(getattr(model.hf_text_config, name, None)) for name in ("rope_parameters", "rope_scaling")),
        str(vllm_config.cache_config.cache_dtype),
        *packings,
    )
    return sha256("|".join(changes).encode()).hexdigest()[:16]


def _packing(group: EngineGroup, vllm_config: VllmConfig, codec: str) -> str:
    """How vLLM's CPU attention orders the numbers of a page, "" on other devices, where strides say it.

    Raises:
        InvalidArgument: a codec that has to know the order, where it is not known.
    """
    if not current_platform.is_cpu() or isinstance(group.layout, MLALayout):
        return ""
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    dtype = vllm_config.model_config.dtype
    head_dim = None if group.opaque else group.layout.head_dim
    packing = str(_get_attn_isa(dtype, group.page_tokens, head_dim, str(vllm_config.cache_config.cache_dtype)))
    if packing not in _KNOWN_PACKINGS and not group.opaque and not get_codec(codec).exact:
        raise InvalidArgument(
            f"vLLM packs KV for {packing!r} on this processor, in an order that lossy codecs do not know yet; use "
            "codec raw, lossless or lossless-zstd"
        )
    return packing
