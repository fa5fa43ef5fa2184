"""The store of vLLM's offloading rows: its namespace, from what vLLM says of itself and where it says it."""

from __future__ import annotations

import logging
import sys
from types import FrameType
from typing import Any, Final

from vllm.config import VllmConfig, get_current_vllm_config_or_none
from vllm.platforms import current_platform
from vllm.v1.core import kv_cache_utils

from kvstore.errors import InvalidArgument
from kvstore_client.integrations.row_tier.rows import Rows
from kvstore_client.integrations.row_tier.settings import TierSettings
from kvstore_client.integrations.vllm_identity import describe, namespace_name, revision_of, tier_version
from kvstore_client.tensors import TensorStore

__all__ = ["check_engine", "current_vllm_config", "hashes_are_known", "load_compiled", "open_store"]

_log: Final = logging.getLogger("kvstore_client")


def open_store(settings: TierSettings, config: Any, vllm_config: VllmConfig | None, rows: Rows) -> TensorStore:
    """Connect to the store of rows; nothing inexact is stored or loaded.

    Args:
        settings: the user's.
        config: vLLM's ``OffloadingConfig``.
        vllm_config: None where it cannot be reached.
        rows: of the CPU tier.

    Raises:
        KVStoreError: as ``Client``.
    """
    root = getattr(kv_cache_utils, "NONE_HASH", None)
    described = describe(
        config,
        vllm_config,
        version=tier_version(),
        platform=str(current_platform.device_type),
        device=_device_name(),
        hash_root="unknown" if root is None else bytes(root).hex(),
        row_bytes=rows.row_bytes,
    )
    return TensorStore(
        rows.layout,
        settings.codec,
        name=namespace_name(settings.name, described, settings.identity),
        model=config.model.name,
        revision=settings.revision or revision_of(vllm_config),
        tenant_salt=settings.tenant_salt.encode(),
        fidelity="exact",
        least_block_tokens=rows.layout.block_tokens,
        endpoint=settings.endpoint,
        mapped=settings.mapped,
        timeout=settings.timeout_s,
        unknown_revision="ignore",
        directory=settings.directory,
    )


def load_compiled(settings: TierSettings) -> None:
    """Load what reads shared memory, and on a machine's first use compile it, while the engine starts anyway.

    In a thread beside an engine that already waits for it, it would take far longer.
    """
    if settings.mapped is not False:
        import kvstore_client.mapped_batches
        import kvstore_client.mapped_session  # noqa: F401


def hashes_are_known() -> bool:
    """Whether vLLM chose what block hashes begin with: after it made its connectors, before the first request."""
    return hasattr(kv_cache_utils, "NONE_HASH")


def check_engine(settings: TierSettings, config: Any, vllm_config: VllmConfig | None) -> None:
    """See whether an engine can have a tier, and say what is not known of it.

    Raises:
        InvalidArgument: other hosts hold a part of each row, which is not in this one's memory; or no revision is
            known, and that is refused.
    """
    if vllm_config is None:
        _log.warning(
            "kvstore tier: vLLM's configuration cannot be reached: set revision to that of the weights, and identity "
            "to what else tells engines apart (attention backend, quantisation)"
        )
    if not settings.revision and not revision_of(vllm_config) and settings.unknown_revision != "ignore":
        message = (
            f"kvstore tier: no revision of the weights of {config.model.name!r} is known: blocks of other weights "
            "under that name would be taken for right; start vLLM with --revision, or set the tier's revision to a "
            "commit or a checksum"
        )
        if settings.unknown_revision == "refuse":
            raise InvalidArgument(message)
        _log.warning(message)
    hosts = 1 if vllm_config is None else getattr(vllm_config.parallel_config, "nnodes_within_dp", 1)
    if hosts > 1:
        raise InvalidArgument(
            f"kvstore tier: the ranks of this engine are on {hosts} hosts, and a row of vLLM's CPU tier has only those "
            "of its own; use the KV connector, which runs beside each rank"
        )


def current_vllm_config() -> VllmConfig | None:
    """The configuration of the engine, which vLLM does not hand to tiers; None where it cannot be reached.

    It says the revision of the weights and the attention backend. It is a global while models are made, and an argument
    of the scheduler's half of the connector, which makes tiers in its constructor: on the stack above this.
    """
    config = get_current_vllm_config_or_none()
    frame: FrameType | None = sys._getframe()
    while config is None and frame is not None:
        found = frame.f_locals.get("vllm_config")
        config = found if isinstance(found, VllmConfig) else None
        frame = frame.f_back
    return config


def _device_name() -> str:
    try:
        return str(current_platform.get_device_name())
    except NotImplementedError:
        # A platform that has no names for devices.
        return "unknown"
