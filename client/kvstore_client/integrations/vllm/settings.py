"""Settings of the vLLM connector: ``kv_connector_extra_config`` of vLLM's ``--kv-transfer-config``."""

from __future__ import annotations

from typing import Any, Literal, Self

import msgspec

from kvstore.errors import InvalidArgument

__all__ = ["ConnectorSettings"]


class ConnectorSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a user may set; everything else is derived from the engine.

    Attributes:
        endpoint: of the daemon; None: ``$KVSTORE_ENDPOINT``, else the user's default.
        codec: by which KV is stored, see ``docs/quality.md``.
        fidelity: ``"exact"``: nothing lossy is stored or loaded.
        exact_codec: for blocks that ``codec`` cannot hold.
        name: of the namespace.
        tenant_salt: keeps tenants apart.
        revision: of the weights, where vLLM does not know it (a local folder).
        unknown_revision: what to do where nobody knows it: ``"warn"``, ``"refuse"``, ``"ignore"``.
        block_tokens: tokens of a store block, at least.
        least_load_tokens: a shorter hit is not worth loading.
        load: ``"sync"``: in the step that computes the rest; ``"async"``: between steps, while other requests run.
        save: ``"async"``: while the engine goes on; ``"sync"``: within the step.
        save_tokens: ``"all"``, or those of the ``"prompt"``.
        report_prefill: whether the daemon is told how fast prompts are computed, so that it loads from tiers below
            memory only what is there sooner than it would be computed.
        threads: of encoding and decoding on the CPU.
        deadline_s: that the scheduler waits for an answer.
        transfer_timeout_s: that a worker waits for the daemon while it loads or saves.
        lease_s: how long a hit is kept from being evicted between scheduler and worker.
        retry_s: how long a daemon that did not answer is left alone.
        required: whether the engine may start without a daemon.
        mapped, directory: see ``Client``.
    """

    endpoint: str | None = None
    codec: str = "raw"
    fidelity: Literal["any", "exact"] = "any"
    exact_codec: str = "raw"
    name: str = "vllm"
    tenant_salt: str = ""
    revision: str = ""
    unknown_revision: Literal["warn", "refuse", "ignore"] = "warn"
    block_tokens: int = 64
    least_load_tokens: int = 0
    load: Literal["sync", "async"] = "sync"
    save: Literal["sync", "async"] = "async"
    save_tokens: Literal["all", "prompt"] = "all"
    report_prefill: bool = True
    threads: int = 1
    deadline_s: float = 0.5
    transfer_timeout_s: float = 5.0
    lease_s: float = 30.0
    retry_s: float = 1.0
    required: bool = False
    mapped: bool | None = None
    directory: str | None = None

    @classmethod
    def parse(cls, extra: dict[str, Any]) -> Self:
        """The settings in ``kv_connector_extra_config``.

        Raises:
            InvalidArgument: an unknown key or an impossible value, named.
        """
        unknown = sorted(set(extra) - set(cls.__struct_fields__), key=str)
        if unknown:
            known = ", ".join(cls.__struct_fields__)
            raise InvalidArgument(
                f"unknown key {', '.join(map(repr, unknown))} in kv_connector_extra_config; known are {known}"
            )
        try:
            settings = msgspec.convert(extra, cls)
        except msgspec.ValidationError as error:
            raise InvalidArgument(f"kv_connector_extra_config: {error}") from None
        for field in ("deadline_s", "transfer_timeout_s", "lease_s", "retry_s"):
            if not 0 < getattr(settings, field) < 1e6:
                raise InvalidArgument(f"kv_connector_extra_config: {field} must be a positive number of seconds")
        for field, least in (("block_tokens", 1), ("least_load_tokens", 0), ("threads", 1)):
            if getattr(settings, field) < least:
                raise InvalidArgument(f"kv_connector_extra_config: {field} must be at least {least}")
        return settings
