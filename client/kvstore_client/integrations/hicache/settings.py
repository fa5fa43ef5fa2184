"""What a user configures of a HiCache backend, checked before anything is connected."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Final, Literal

from kvstore.errors import InvalidArgument
from kvstore.format.constants import CODECS_BY_NAME
from kvstore.protocol.endpoint import check_endpoint
from kvstore_client.base import OnUnknownRevision

__all__ = ["HiCacheSettings"]

_OF_SGLANG: Final = (
    "backend_name",
    "module_path",
    "class_name",
    "prefetch_threshold",
    "prefetch_timeout_base",
    "prefetch_timeout_per_ki_token",
    "hicache_storage_pass_prefix_keys",
    "tp_lcm_size",
)
"""Keys of the same dictionary that SGLang reads itself; it takes some of them out before."""

_EXACT: Final = ("raw", "lossless", "lossless-zstd")
_MOST_THREADS: Final = 64
_TEXTS: Final = ("codec", "exact_codec", "name", "revision", "tenant_salt", "identity")


@dataclass(frozen=True, slots=True)
class HiCacheSettings:
    """Settings of a HiCache backend; all of them have defaults.

    Attributes:
        endpoint: of the daemon; None: ``$KVSTORE_ENDPOINT``, else the user's default.
        directory: the daemon's memory directory as this process sees it, see ``Client``.
        mapped: None maps the daemon's memory where that is possible; False uses the socket; True insists.
        codec: of KV pages, by name (``docs/codecs.md``).
        exact_codec: of pages that ``codec`` cannot hold.
        fidelity: ``exact``: nothing lossy is ever stored or loaded.
        name: a label of the user's, part of the namespace.
        revision: of the weights; "" takes the engine's, where it says one.
        unknown_revision: what to do where nobody says one: ``warn``, ``refuse``, ``ignore``.
        tenant_salt: keeps tenants apart.
        identity: anything else that makes KV differ and that the engine does not tell, part of the namespace.
        threads: that encoding and decoding may use.
        timeout_s: that one operation of the store may take.
        retry_s: most seconds between attempts to reach a daemon that is not there.
        interface_v1: as SGLang reads it: pages go by index, not as tensors.

    Raises:
        InvalidArgument: naming the setting.
    """

    endpoint: str | None = None
    directory: str | None = None
    mapped: bool | None = None
    codec: str = "raw"
    exact_codec: str = "raw"
    fidelity: Literal["any", "exact"] = "any"
    name: str = "default"
    revision: str = ""
    unknown_revision: OnUnknownRevision = "warn"
    tenant_salt: str = ""
    identity: str = ""
    threads: int = 1
    timeout_s: float = 2.0
    retry_s: float = 2.0
    interface_v1: bool = False

    def __post_init__(self) -> None:
        for name in _TEXTS:
            if not isinstance(getattr(self, name), str):
                raise _wrong(name, "text", getattr(self, name))
        for name in ("endpoint", "directory"):
            if getattr(self, name) is not None and not isinstance(getattr(self, name), str):
                raise _wrong(name, "text", getattr(self, name))
        if self.endpoint is not None:
            check_endpoint(self.endpoint)
        if self.mapped not in (None, True, False):
            raise _wrong("mapped", "true, false or null", self.mapped)
        if self.unknown_revision not in ("warn", "refuse", "ignore"):
            raise _wrong("unknown_revision", "'warn', 'refuse' or 'ignore'", self.unknown_revision)
        if self.fidelity not in ("any", "exact"):
            raise _wrong("fidelity", "'any' or 'exact'", self.fidelity)
        if not self.name:
            raise _wrong("name", "text that is not empty", self.name)
        self._check_codecs()
        for name in ("timeout_s", "retry_s"):
            if not _is_number(getattr(self, name)) or not 0 < getattr(self, name) <= 3600:
                raise _wrong(name, "a number of seconds above 0 and up to 3600", getattr(self, name))
        if not _is_whole(self.threads) or not 1 <= self.threads <= _MOST_THREADS:
            raise _wrong("threads", f"a whole number from 1 to {_MOST_THREADS}", self.threads)

    def _check_codecs(self) -> None:
        if self.codec not in CODECS_BY_NAME:
            raise _wrong("codec", f"one of {', '.join(CODECS_BY_NAME)}", self.codec)
        if self.exact_codec not in _EXACT:
            raise _wrong("exact_codec", f"one of {', '.join(_EXACT)}", self.exact_codec)
        if self.fidelity == "exact" and self.codec not in _EXACT:
            raise InvalidArgument(
                f"kvstore HiCache: fidelity 'exact' and the lossy codec {self.codec!r}: use one of {', '.join(_EXACT)}"
            )
        if self.codec != "raw" and not self.interface_v1:
            raise InvalidArgument(
                f'kvstore HiCache: codec {self.codec!r} needs "interface_v1": 1 in the extra config: without it SGLang '
                "hands over tensors of which it does not say what is where in them"
            )

    @classmethod
    def parse(cls, extra_config: Mapping[str, Any] | None) -> HiCacheSettings:
        """Settings from ``--hicache-storage-backend-extra-config``, beside the keys that SGLang reads itself.

        Raises:
            InvalidArgument: a key that is no setting, named with those that are; or a wrong value.
        """
        given = {key: value for key, value in (extra_config or {}).items() if key not in _OF_SGLANG}
        known = [field.name for field in fields(cls)]
        unknown = [key for key in given if key not in known]
        if unknown:
            near = difflib.get_close_matches(str(unknown[0]), known, 1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise InvalidArgument(
                f"kvstore HiCache: unknown setting {', '.join(map(repr, unknown))}{hint}; known are {', '.join(known)}"
            )
        given["interface_v1"] = bool(given.get("interface_v1", False))
        return cls(**given)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _wrong(name: str, wanted: str, got: object) -> InvalidArgument:
    return InvalidArgument(f"kvstore HiCache: {name} must be {wanted}, got {got!r}")
