"""What a user configures of a tier, checked before anything is connected."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from kvstore.errors import InvalidArgument
from kvstore.format.constants import CODECS_BY_NAME
from kvstore_client.base import OnUnknownRevision
from kvstore_client.integrations.settings import MOST_THREADS, Checks, is_whole

__all__ = ["BYTE_CODECS", "TierSettings"]

BYTE_CODECS: Final = ("raw", "lossless", "lossless-zstd")
"""Codecs that take bytes of which nobody says what they are."""

_CHECKS: Final = Checks("kvstore tier")


@dataclass(frozen=True, slots=True)
class TierSettings:
    """Settings of a tier; all of them have defaults.

    Attributes:
        endpoint: of the daemon; None: ``$KVSTORE_ENDPOINT``, else the user's default.
        directory: the daemon's memory directory as this process sees it, see ``Client``.
        mapped: None maps the daemon's memory where that is possible; False uses the socket; True insists.
        codec: one of ``BYTE_CODECS``.
        name: a label of the user's, part of the namespace.
        revision: of the weights; "" takes the engine's, where it says one.
        unknown_revision: what to do where nobody says one: ``warn``, ``refuse``, ``ignore``.
        on_reset: what becomes of the store when the engine resets its caches, as it does when weights change in place:
            ``keep``, or ``invalidate``: its namespace moves on to the next generation.
        tenant_salt: keeps tenants apart.
        identity: anything else that makes KV differ and that the engine does not tell, part of the namespace.
        threads: transfers at a time.
        timeout_s: that one operation of the store may take.
        lookup_timeout_s: that a request waits for answers in all, before they count as misses.
        job_timeout_s: that a transfer may take with its waiting; what is left of it fails then.
        lease_s: for which blocks that were found stay, unless they were loaded before; 0 for no leases.
        retry_s: most seconds between attempts to reach a daemon that is not there.
        queued_stores: rows of stores that may wait; None: a quarter of all rows. Those beyond are not stored.

    Raises:
        InvalidArgument: naming the setting.
    """

    endpoint: str | None = None
    directory: str | None = None
    mapped: bool | None = None
    codec: str = "raw"
    name: str = "default"
    revision: str = ""
    unknown_revision: OnUnknownRevision = "warn"
    on_reset: Literal["keep", "invalidate"] = "keep"
    tenant_salt: str = ""
    identity: str = ""
    threads: int = 2
    timeout_s: float = 2.0
    lookup_timeout_s: float = 1.0
    job_timeout_s: float = 30.0
    lease_s: float = 10.0
    retry_s: float = 2.0
    queued_stores: int | None = None

    def __post_init__(self) -> None:
        _CHECKS.texts(self, ("codec", "name", "revision", "tenant_salt", "identity"))
        _CHECKS.connection(self)
        _CHECKS.one_of(self, "on_reset", "keep", "invalidate")
        if not self.name:
            raise _CHECKS.wrong("name", "text that is not empty", self.name)
        _check_codec(self.codec)
        _CHECKS.seconds(self, "timeout_s", "lookup_timeout_s", "job_timeout_s", "retry_s")
        _CHECKS.lease(self)
        _CHECKS.count(self, "threads", MOST_THREADS)
        if self.queued_stores is not None and (not is_whole(self.queued_stores) or self.queued_stores < 1):
            raise _CHECKS.wrong("queued_stores", "a whole number of at least 1, or null", self.queued_stores)

    @classmethod
    def parse(cls, config: Mapping[str, Any]) -> TierSettings:
        """Settings from an engine's configuration.

        Raises:
            InvalidArgument: a key that is no setting, named with those that are; or a wrong value.
        """
        return cls(**_CHECKS.given(config, cls))


def _check_codec(codec: str) -> None:
    if codec in BYTE_CODECS:
        return
    which = ", ".join(BYTE_CODECS)
    if codec in CODECS_BY_NAME:
        raise InvalidArgument(
            f"kvstore tier: codec {codec!r} is lossy, and the engine hands a tier rows of bytes without saying what is "
            f"where in them; use one of {which}, or the KV connector, which sees the tensors"
        )
    raise InvalidArgument(f"kvstore tier: unknown codec {codec!r}; use one of {which}")
