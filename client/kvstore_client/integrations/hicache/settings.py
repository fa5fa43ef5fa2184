"""What a user configures of a HiCache backend, checked before anything is connected."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from kvstore.errors import InvalidArgument
from kvstore.format.constants import CODECS_BY_NAME
from kvstore_client.base import OnUnknownRevision
from kvstore_client.integrations.settings import MOST_THREADS, Checks

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
_CHECKS: Final = Checks("kvstore HiCache")
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
        _CHECKS.texts(self, _TEXTS)
        _CHECKS.connection(self)
        _CHECKS.one_of(self, "fidelity", "any", "exact")
        if not self.name:
            raise _CHECKS.wrong("name", "text that is not empty", self.name)
        self._check_codecs()
        _CHECKS.seconds(self, "timeout_s", "retry_s")
        _CHECKS.count(self, "threads", MOST_THREADS)

    def _check_codecs(self) -> None:
        if self.codec not in CODECS_BY_NAME:
            raise _CHECKS.wrong("codec", f"one of {', '.join(CODECS_BY_NAME)}", self.codec)
        if self.exact_codec not in _EXACT:
            raise _CHECKS.wrong("exact_codec", f"one of {', '.join(_EXACT)}", self.exact_codec)
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
        own = {key: value for key, value in (extra_config or {}).items() if key not in _OF_SGLANG}
        given = _CHECKS.given(own, cls)
        given["interface_v1"] = bool(given.get("interface_v1", False))
        return cls(**given)
