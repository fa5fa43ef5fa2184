"""What the sync and the async client share beside the operations: arguments, ownership by one process, settings."""

from __future__ import annotations

import os
import warnings
from collections import Counter, deque
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from kvstore.errors import (
    ConnectionLost,
    DeadlineExceeded,
    ForkedClient,
    InvalidArgument,
    PermissionRefused,
)
from kvstore.format.constants import FIDELITY_EXACT
from kvstore.protocol.endpoint import check_endpoint, default_endpoint
from kvstore.protocol.keys import chain_keys
from kvstore.protocol.messages import TierName
from kvstore.protocol.namespace import Namespace
from kvstore.protocol.version import MAX_KEYS_PER_REQUEST
from kvstore_client.arguments import check_read, list_of
from kvstore_client.link import Link
from kvstore_client.mapped_watch import unwatch, watch
from kvstore_client.operations import MISSED, NOT_THERE, Operations
from kvstore_client.results import ReadBatch
from kvstore_client.session import Session

if TYPE_CHECKING:
    from kvstore_client.mapped_session import MappedSession

ENDPOINT_VARIABLE: Final = "KVSTORE_ENDPOINT"
DIRECTORY_VARIABLE: Final = "KVSTORE_DIRECTORY"
VERIFY_TIMEOUT_S: Final = 600.0
DRAM: Final[list[TierName]] = ["dram"]
_HITS_MASK: Final = (1 << 32) - 1
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
        mapped: None maps the daemon's memory where that is possible; False does everything over the socket; True
            refuses to connect where it is not possible.
        timeout: seconds that an operation may take in all.
        payload_bytes: sizes that will be put, for slots without waste.
        unknown_revision: see ``OnUnknownRevision``.
        directory: where the daemon's memory directory is for this process, where that is not where it is for the daemon
            (another container); None: ``$KVSTORE_DIRECTORY``, else the daemon's path.

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
        directory: str | os.PathLike[str] | None = None,
    ) -> None:
        if mapped not in (None, True, False):
            raise InvalidArgument(f"mapped must be None, True or False, got {mapped!r}")
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
        self._want = mapped
        self._unmapped = "mapped=False" if mapped is False else "not connected"
        self._mapped: MappedSession | None = None
        self._dropped: list[tuple[Counter[int], deque[tuple[int, bytes]]]] = []
        where = directory or os.environ.get(DIRECTORY_VARIABLE)
        self._session = Session(
            described,
            payload_bytes,
            wants_mapping=mapped is not False,
            directory=Path(where) if where else None,
        )
        self._operations = Operations(self._session)
        self._link: Link | None = None
        self._pid = os.getpid()
        self._closed = False

    def __del__(self) -> None:
        link = getattr(self, "_link", None)
        if link is None or self._closed or self._is_of_another_process():
            return
        self._mapped = None
        unwatch(self)
        link.close()
        self._session.forget()
        warnings.warn(f"unclosed {type(self).__name__} of {self.endpoint}", ResourceWarning, stacklevel=2, source=self)

    @property
    def mapped(self) -> bool:
        """Whether reads and puts of this client go through mapped memory, without a message."""
        return self._mapped is not None

    @property
    def unmapped(self) -> str:
        """Why they do not, "" where they do."""
        return "" if self._mapped is not None else self._unmapped

    def _load_compiled(self) -> None:
        """Load, or on a machine's first use compile, what reads shared memory: before any deadline runs."""
        if self._want is not False:
            try:
                import kvstore_client.mapped_session  # noqa: F401
            except ImportError as error:
                self._cannot_map(f"the compiled readers cannot be loaded: {error}")
                self._session.wants_mapping = False

    def _cannot_map(self, why: str) -> None:
        """Raises: PermissionRefused: mapping was demanded."""
        self._unmapped = why
        if self._want:
            raise PermissionRefused(f"mapped=True: {why}")

    def _begin_mapping(self) -> None:
        """Map the memory of the session that was just opened.

        Raises:
            PermissionRefused: it cannot be mapped, and ``mapped=True`` demands it.
        """
        self._mapped = None
        session = self._session
        welcome = session.welcome
        if not session.wants_mapping or welcome is None:
            return
        if session.in_own_process:
            self._cannot_map("the daemon lives in this very process, where a lock would not show the client's end")
            return
        if not welcome.index_file:
            self._cannot_map(welcome.unmapped or f"the daemon (kvstored {welcome.daemon_version}) does not offer it")
            return
        if session.file < 0:
            self._cannot_map(session.unlocked)
            return
        from kvstore_client.mapped_session import MappedSession, NotMapped

        try:
            session.mapped = MappedSession(
                welcome,
                session.file,
                session.namespace_id,
                session.namespace.parts,
                session.digest,
                session.directory,
            )
        except NotMapped as error:
            self._cannot_map(str(error))
            return
        self._mapped = session.mapped
        watch(self)

    def daemon_lives(self) -> bool:
        """Whether the mapped daemon is still there; True where nothing is mapped."""
        mapped = self._mapped
        return mapped is None or mapped.daemon_lives()

    def drop_mapping(self) -> None:
        """Refer to the mapping no more, whose daemon is gone; the next operation connects anew."""
        mapped = self._mapped
        self._unmapped = "the daemon is gone"
        self._mapped = self._session.mapped = None
        if mapped is not None:
            self._dropped.append(mapped.abandon())

    def disown_mapping(self) -> None:
        """In a forked child: refer to the parent's mapping no more."""
        self._unmapped = "this process was forked"
        self._mapped = self._session.mapped = None

    def _end_mapping(self) -> None:
        """The session is over: puts that nobody waited for are lost."""
        mapped, self._mapped = self._mapped, None
        if mapped is not None:
            self._unmapped = "not connected"
            self._operations.note_mapped(mapped)
            self._operations.note_lost(mapped.take_unanswered())
        while self._dropped:
            answers, unanswered = self._dropped.pop()
            self._operations.note_answers(answers)
            self._operations.note_lost(len(unanswered))
        unwatch(self)

    def _match_mapped(self, mapped: MappedSession, keys: Sequence[bytes]) -> tuple[int, int, int] | None:
        """Leading hits, the engine request's id and the lowest fidelity; None where the daemon must be asked."""
        given = list_of(keys)
        if len(given) > MAX_KEYS_PER_REQUEST:
            return None
        access = self._operations.next_access()
        hits = mapped.match(given, access)
        return None if hits < 0 else (hits & _HITS_MASK, access, FIDELITY_EXACT - (hits >> 32))

    def _read_mapped(
        self,
        mapped: MappedSession,
        keys: Sequence[bytes],
        outs: Sequence[object],
        part: int,
        request: int | None,
        *,
        sure: bool,
    ) -> list[int] | ReadBatch:
        """Copy what mapped memory has: all lengths, or what is there and what has to be asked for.

        ``sure``: a miss there is a miss.
        """
        check_read(part, request)
        given, targets = list_of(keys), list_of(outs)
        access = self._operations.next_access() if request is None and len(given) > 1 else request or 0
        below = mapped.lower_tiers
        results = mapped.get_many_into(given, targets, part, access, sure and not below)
        if isinstance(results, int):
            return ReadBatch(given, targets, access, [None] * len(given), list(range(len(given))))
        if min(results) >= 0:
            return results
        lengths = [result if result >= 0 else None for result in results]
        asked = [index for index, result in enumerate(results) if result < 0 and result not in NOT_THERE]
        missed = [index for index in asked if results[index] == MISSED] if below else []
        return ReadBatch(given, targets, access, lengths, asked, missed)

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
        mapped = self._mapped
        return self._operations.corrupt + (0 if mapped is None else mapped.corrupt)

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
