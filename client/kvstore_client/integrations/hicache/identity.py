"""What makes equal page hashes of SGLang equal pages: namespaces and parts, from what SGLang says of itself."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Final

from kvstore.errors import InvalidArgument
from kvstore_client.integrations.hicache.settings import HiCacheSettings

__all__ = ["Identity"]

_FORMAT: Final = 1
_log: Final = logging.getLogger("kvstore_client")

_ENGINE: Final = ("dtype", "kv_cache_dtype", "quantization", "json_model_override_args")
"""Arguments of the engine that change KV without changing a page's hash or its layout."""

_DRAFT: Final = ("speculative_draft_model_path", "speculative_draft_model_revision", "speculative_draft_kv_cache_dtype")
"""The same, of the draft model, for pools that hold its KV."""


@dataclass(frozen=True, slots=True)
class Identity:
    """Names of one rank's stores.

    Attributes:
        config: SGLang's ``HiCacheStorageConfig``.
        settings: the user's.
        engine: what of the engine's arguments matters, "" where they cannot be reached.
        draft: the same of its draft model.
        version: of SGLang, for pages that are stored as SGLang lays them out.
        revision: of the weights, "" where nobody says one.
    """

    config: Any
    settings: HiCacheSettings
    engine: str
    draft: str
    version: str
    revision: str

    @classmethod
    def of(cls, config: Any, settings: HiCacheSettings, server_args: Any, version: str) -> Identity:
        """What is known of an engine, and what is not is said.

        Args:
            config: SGLang's ``HiCacheStorageConfig``.
            settings: the user's.
            server_args: SGLang's ``ServerArgs``, None where they cannot be reached.
            version: of SGLang.

        Raises:
            InvalidArgument: ranks that hold pages in another way than this backend knows; or no revision is known, and
                that is refused.
        """
        if config.should_split_heads:
            raise InvalidArgument(
                "kvstore HiCache: tp_lcm_size asks for pages that engines of other tensor-parallel sizes share, which "
                "this backend does not do; leave tp_lcm_size out of the extra config"
            )
        if getattr(config, "dcp_size", 1) > 1:
            raise InvalidArgument(
                f"kvstore HiCache: pages that are shared out to {config.dcp_size} decode-context-parallel ranks are "
                "not known here; use --attn-dcp-size 1"
            )
        revision = settings.revision or _text(server_args, "revision")
        if not revision and settings.unknown_revision != "ignore":
            message = (
                f"kvstore HiCache: no revision of the weights of {config.model_name!r} is known: pages of other "
                "weights under that name would be taken for right; start SGLang with --revision, or set revision in "
                "the extra config to a commit or a checksum"
            )
            if settings.unknown_revision == "refuse":
                raise InvalidArgument(message)
            _log.warning(message)
        if server_args is None:
            _log.warning(
                "kvstore HiCache: SGLang's arguments cannot be reached: set identity in the extra config to what else "
                "tells engines apart (--kv-cache-dtype, --quantization, overrides of the model's configuration)"
            )
        engine = "" if server_args is None else _digest([_text(server_args, name) for name in _ENGINE])
        draft = "" if server_args is None else _digest([_text(server_args, name) for name in _DRAFT])
        return cls(config, settings, engine, draft, version, revision)

    def shard(self, *, replicated: bool) -> tuple[int, int]:
        """Which part of a page this rank has, and how many there are.

        Context-parallel ranks hold a slice each. Pipeline stages have namespaces of their own: they can differ in
        depth, which no stage knows of another.
        """
        config = self.config
        rank, size = (0, 1) if replicated else (config.tp_rank, config.tp_size)
        return rank * config.attn_cp_size + config.attn_cp_rank, size * config.attn_cp_size

    def namespace(self, pool: str, described: Mapping[str, object], *, draft: bool, opaque: bool) -> str:
        """The name of a pool's namespace: the user's, the pool's, and a digest of all that equal pages have in common.

        Args:
            pool: its name.
            described: of its pages.
            draft: whether it holds KV of a draft model.
            opaque: whether pages are stored as SGLang lays them out, which may change with its version.
        """
        config = self.config
        everything = {
            "format": _FORMAT,
            "pool": pool,
            "pages": dict(described),
            "stage": [config.pp_rank, config.pp_size],
            "tp": 1 if config.is_mla_model else config.tp_size,
            "cp": config.attn_cp_size,
            "engine": self.engine,
            "draft": self.draft if draft else "",
            "identity": self.settings.identity,
            "version": self.version if opaque else "",
        }
        return f"{self.settings.name}/sglang/{pool}/{_digest(everything)}"

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of every client of this rank."""
        settings = self.settings
        return {
            "endpoint": settings.endpoint,
            "mapped": settings.mapped,
            "timeout": settings.timeout_s,
            "unknown_revision": "ignore",
            "directory": settings.directory,
        }


def _text(server_args: Any, name: str) -> str:
    value = getattr(server_args, name, None)
    return "" if value is None else str(value)


def _digest(value: object) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return sha256(text.encode()).hexdigest()[:32]
