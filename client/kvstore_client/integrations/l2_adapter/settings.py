"""What a user configures of an L2 adapter, checked before anything is connected."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from kvstore.errors import InvalidArgument
from kvstore.format.constants import CODECS_BY_NAME, EXACT_CODECS
from kvstore_client.base import OnUnknownRevision
from kvstore_client.integrations.settings import MOST_THREADS, Checks, is_number, is_whole

__all__ = ["AdapterSettings"]

_CHECKS: Final = Checks("kvstore L2 adapter")
_MOST_DIM: Final = 1 << 16


@dataclass(frozen=True, slots=True)
class AdapterSettings:
    """Settings of an L2 adapter; all of them have defaults.

    Attributes:
        endpoint: of the daemon; None: ``$KVSTORE_ENDPOINT``, else the user's default.
        directory: the daemon's memory directory as this process sees it, see ``Client``.
        mapped: None maps the daemon's memory where that is possible; False uses the socket; True insists.
        codec: by which chunks are stored whose layout is known, by name. Others are stored as they are.
        head_dim: elements of an attention head, which lossy codecs need and a chunk does not say.
        rotary_dim: of a model of latent attention: elements of the rotary key, the last ones of each token.
        name: a label of the user's, part of the namespace.
        revision: of the weights; text, or a mapping from model names to it.
        unknown_revision: what to do for a model without a revision: ``warn``, ``refuse`` to store it, ``ignore``.
        timeout_s: that one operation of the store may take.
        retry_s: seconds without a try after one that the daemon did not answer.
        lease_s: for which chunks that a lookup found stay, unless they are unlocked before; 0 for no leases.
        task_timeout_s: that a store or a load may take with its waiting; what is left of it fails then.
        load_threads: loads at a time.
        codec_threads: that encoding and decoding one chunk may use.
        queued_bytes: of stores that may wait; None: a quarter of L1 where its size is known, else 1 GiB. Those beyond
            fail at once.
        layouts: layouts of chunks, of all models, for which connections are kept open.

    Raises:
        InvalidArgument: naming the setting.
    """

    endpoint: str | None = None
    directory: str | None = None
    mapped: bool | None = None
    codec: str = "raw"
    head_dim: int | None = None
    rotary_dim: int | None = None
    name: str = "lmcache"
    revision: str | Mapping[str, str] = ""
    unknown_revision: OnUnknownRevision = "warn"
    timeout_s: float = 2.0
    retry_s: float = 1.0
    lease_s: float = 30.0
    task_timeout_s: float = 30.0
    load_threads: int = 2
    codec_threads: int = 1
    queued_bytes: int | None = None
    layouts: int = 16

    def __post_init__(self) -> None:
        for name in ("codec", "name"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name):
                raise _CHECKS.wrong(name, "text that is not empty", getattr(self, name))
        _CHECKS.connection(self)
        given = self.revision.items() if isinstance(self.revision, Mapping) else [("", self.revision)]
        if not all(isinstance(model, str) and isinstance(revision, str) for model, revision in given):
            raise _CHECKS.wrong("revision", "text, or an object from model names to text", self.revision)
        _CHECKS.seconds(self, "timeout_s", "task_timeout_s")
        if not is_number(self.retry_s) or not 0 <= self.retry_s <= 3600:
            raise _CHECKS.wrong("retry_s", "a number of seconds from 0 to 3600", self.retry_s)
        _CHECKS.lease(self)
        for name, most in (("load_threads", MOST_THREADS), ("codec_threads", MOST_THREADS), ("layouts", 256)):
            _CHECKS.count(self, name, most)
        if self.queued_bytes is not None and (not is_whole(self.queued_bytes) or not 1 <= self.queued_bytes <= 1 << 62):
            raise _CHECKS.wrong("queued_bytes", "a whole number of at least 1, or null", self.queued_bytes)
        for name in ("head_dim", "rotary_dim"):
            value = getattr(self, name)
            if value is not None and (not is_whole(value) or not 1 <= value <= _MOST_DIM):
                raise _CHECKS.wrong(name, f"a whole number from 1 to {_MOST_DIM}, or null", value)
        self._check_codec()

    def _check_codec(self) -> None:
        codec = CODECS_BY_NAME.get(self.codec)
        if codec is None:
            raise _CHECKS.wrong("codec", f"one of {', '.join(CODECS_BY_NAME)}", self.codec)
        if codec not in EXACT_CODECS and self.head_dim is None and self.rotary_dim is None:
            raise InvalidArgument(
                f"kvstore L2 adapter: codec {self.codec!r} works on attention heads, and LMCache's chunks do not say "
                "how wide these are: set head_dim (head_dim of the model's config.json, often 128), or rotary_dim for "
                "latent attention (qk_rope_head_dim)"
            )

    @classmethod
    def parse(cls, params: Mapping[str, Any]) -> AdapterSettings:
        """Settings from ``adapter_params``.

        Raises:
            InvalidArgument: a key that is no setting, named with those that are; or a wrong value.
        """
        return cls(**_CHECKS.given(params, cls, " in adapter_params"))

    def revision_of(self, model: str) -> str:
        """Revision of a model's weights, "" where nobody said one."""
        return self.revision.get(model, "") if isinstance(self.revision, Mapping) else self.revision
