"""What the sync and the async client share beside the operations: arguments, ownership by one process, settings."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from typing import Any, Final, Literal

from kvstore.errors import ConnectionLost, DeadlineExceeded, ErrorCode, ForkedClient, InvalidArgument
from kvstore.protocol.endpoint import check_endpoint, default_endpoint
from kvstore.protocol.keys import chain_keys
from kvstore.protocol.messages import ErrorReply, Reply
from kvstore.protocol.namespace import Namespace
from kvstore_client.link import Link
from kvstore_client.operations import Operations
from kvstore_client.session import Session

ENDPOINT_VARIABLE: Final = "KVSTORE_ENDPOINT"
VERIFY_TIMEOUT_S: Final = 600.0
UNWAITED_BYTES: Final = 64 << 20
"""Payload bytes of ``wait=False`` puts that may be unanswered before the next one waits."""

UNWAITED_REQUESTS: Final = 256

GOODBYE_MS: Final = 200
"""How long a client that closes waits until its goodbye has left."""

OnUnknownRevision = Literal["warn", "refuse", "ignore"]
"""What to do where a namespace names a model but not the revision of its weights."""


class BaseClient:
    """Arguments and state common to both clients.

    Args:
        endpoint: ``ipc:///path`` or a path; None: ``$KVSTORE_ENDPOINT``, else the user's default.
        namespace: name or description of the namespace.
        mapped: None or False; True is refused by this version, which has no mapped path.
        timeout: seconds that an operation may take in all.
        payload_bytes: sizes that will be put, for slots without waste.
        unknown_revision: see ``OnUnknownRevision``.

    Raises:
        InvalidArgument: naming the argument.
    """

    def __init__(
        self,
        endpoint: str | None = None,
        *,
        namespace: str | Namespace = "default",
        mapped: bool | None = None,
        timeout: float = 5.0,
        payload_bytes: Sequence[int] = (),
        unknown_revision: OnUnknownRevision = "warn",
    ) -> None:
        if mapped:
            raise InvalidArgument("mapped=True: this version reads over ZeroMQ only; use mapped=None or mapped=False")
        if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not 0 < timeout < 1e6:
            raise InvalidArgument(f"timeout must be a positive number of seconds, got {timeout!r}")
        if (
            not isinstance(payload_bytes, Sequence)
            or any(not isinstance(size, int) or size <= 0 for size in payload_bytes)
            or len(payload_bytes) > 64
        ):
            raise InvalidArgument("payload_bytes takes up to 64 positive sizes in bytes")
        named = endpoint or os.environ.get(ENDPOINT_VARIABLE)
        self.endpoint = check_endpoint(named or default_endpoint())
        self._own = not named
        self.timeout = float(timeout)
        described = Namespace.parse(namespace)
        _check_revision(described, unknown_revision)
        self._session = Session(described, payload_bytes)
        self._operations = Operations(self._session)
        self._link: Link | None = None
        self._pid = os.getpid()
        self._closed = False

    def __del__(self) -> None:
        link = getattr(self, "_link", None)
        if link is None or self._closed or self._is_of_another_process():
            return
        link.close()
        self._session.forget()
        warnings.warn(f"unclosed {type(self).__name__} of {self.endpoint}", ResourceWarning, stacklevel=2, source=self)

    @property
    def namespace(self) -> Namespace:
        """The namespace this client reads and writes."""
        return self._session.namespace

    @property
    def incarnation(self) -> int:
        """The daemon's life that was greeted last; another number after a restart."""
        return self._session.incarnation

    @property
    def generation(self) -> int:
        """Generation of the namespace that this client is in."""
        return self._session.generation

    @property
    def stale(self) -> bool:
        """Whether another client invalidated the namespace: reads miss, puts are rejected, until ``invalidate()``.

        Known from the first put that was rejected for it, or from the greeting after a restart of the daemon.
        """
        return self._session.stale

    @property
    def corrupt_records(self) -> int:
        """Records received with a wrong checksum or identity, each answered as a miss."""
        return self._operations.corrupt

    @staticmethod
    def chain_keys(
        tokens: Sequence[int] | Any, block_tokens: int, *, parent: bytes | None = None, salt: bytes = b""
    ) -> list[bytes]:
        """See ``kvstore_client.chain_keys``."""
        return chain_keys(tokens, block_tokens, parent=parent, salt=salt)

    def _is_of_another_process(self) -> bool:
        """Whether this is a forked child's copy: the connection is the parent's, and nothing may be done to it."""
        return os.getpid() != self._pid

    def _late(self) -> DeadlineExceeded:
        return DeadlineExceeded(f"the daemon at {self.endpoint} did not answer in time (timeout {self.timeout:g} s)")

    def _check_usable(self) -> None:
        if self._closed:
            raise ConnectionLost("this client is closed; make a new one")
        if self._is_of_another_process():
            raise ForkedClient(f"this client was made by process {self._pid}; make one in the forked child")


def is_lost_session(reply: Reply) -> bool:
    """Whether a reply says that the daemon does not know the session any more."""
    return isinstance(reply, ErrorReply) and reply.code in (ErrorCode.UNKNOWN_SESSION, ErrorCode.UNKNOWN_NAMESPACE)


def _check_revision(namespace: Namespace, policy: OnUnknownRevision) -> None:
    if policy not in ("warn", "refuse", "ignore"):
        raise InvalidArgument(f"unknown_revision must be 'warn', 'refuse' or 'ignore', got {policy!r}")
    if not namespace.model or namespace.revision or policy == "ignore":
        return
    message = (
        f"namespace {namespace.name!r} names the model {namespace.model!r} but no revision of its weights: blocks of "
        "other weights would be taken for right; set revision= to a commit or a checksum"
    )
    if policy == "refuse":
        raise InvalidArgument(message)
    warnings.warn(message, stacklevel=4)
