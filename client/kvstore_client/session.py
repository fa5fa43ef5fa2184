"""A client's session with one life of the daemon: greeting, namespace, lock on the session file, errors.

No waiting here: the greeting is a generator like every operation (see ``kvstore_client.operations``).
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar

import kvstore
from kvstore.errors import (
    ConnectionLost,
    CorruptRecord,
    DaemonUnavailable,
    ErrorCode,
    InvalidArgument,
    ProtocolMismatch,
    RemoteError,
    Throttled,
)
from kvstore.format.record import Buffer
from kvstore.mapped.index_file import MAPPED_LAYOUT
from kvstore.mapped.session_file import decode_session_header, lock_request
from kvstore.protocol.messages import (
    AnyReply,
    Attach,
    Attached,
    Chains,
    Configure,
    ErrorReply,
    Hello,
    Hint,
    Persist,
    PutReply,
    PutStatus,
    Reason,
    Record,
    Reply,
    ReportPrefill,
    Request,
    Retain,
    Warm,
    Welcome,
    Why,
)
from kvstore.protocol.namespace import Namespace
from kvstore.protocol.version import PROTOCOL_OLDEST, PROTOCOL_VERSION

if TYPE_CHECKING:
    from kvstore_client.mapped_session import MappedSession

_SINCE: Final[dict[type[Request], int]] = {
    Persist: 4,
    Hint: 4,
    Configure: 5,
    Record: 5,
    Retain: 5,
    Why: 5,
    ReportPrefill: 5,
    Warm: 5,
    Chains: 5,
}
"""Protocol versions with which requests came; what is not listed may always be sent, or is the session's own affair."""
_WAITED: Final = 0.9
"""Share of the time that is left within which the daemon is to answer a request that waits there."""

R = TypeVar("R")
ReplyT = TypeVar("ReplyT", bound=Reply)


@dataclass(slots=True)
class Ask:
    """A request to be made.

    Attributes:
        type, fields: what it is, and the fields behind the envelope.
        access: the engine request.
        payloads: payload frames.
        pause_s: a pause before it is sent.
        digest: of the generation that the records of a put are of; empty for other requests.
        waits: the daemon answers when something has come about, or when it may not wait any longer.
    """

    type: type[Request]
    fields: tuple[Any, ...] = ()
    access: int = 0
    payloads: Sequence[Buffer] = ()
    pause_s: float = 0.0
    digest: bytes = b""
    waits: bool = False


class Told(NamedTuple):
    """A reply and its payload frames."""

    reply: AnyReply
    payloads: list[memoryview]


Steps = Generator[Ask, Told, R]
"""An operation: yields requests, is sent replies, returns its result."""


class SessionLost(ConnectionLost):
    """The daemon does not know this session, also not after another greeting."""


def _boot_id() -> str:
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return ""


class Session:
    """What the daemon told this client about itself and the namespace.

    Attributes:
        number: of the session, 0 before the greeting.
        incarnation: of the daemon that was greeted last.
        namespace_id: 0 before the greeting, and where the client's generation was over when it greeted.
        stale: the client's generation is known to be over: reads miss and puts are refused.
        generation: of the namespace, -1 before the first greeting.
        joined_after: number of the last request before the generation was joined; answers up to it are of earlier ones.
        digest: 32 bytes, goes into every record.
        max_record_bytes: largest record the daemon takes, header included.
        protocol: the version that was agreed on, 0 before the first greeting.
        lower_tiers: tiers below DRAM that the daemon reads from, a bit each; 0 where there are none.
        wants_mapping: whether to ask for the daemon's memory.
        in_own_process: whether the daemon that was greeted last lives in this very process.
        unlocked: why the session's file could not be locked, where it could not.
        directory: where the daemon's directory is for this process, None for where it is for the daemon.
        mapped: the daemon's memory, None where it is not mapped.
    """

    def __init__(
        self,
        namespace: Namespace,
        payload_bytes: Sequence[int],
        *,
        wants_mapping: bool = False,
        directory: Path | None = None,
    ) -> None:
        self.namespace = namespace
        self.wants_mapping = wants_mapping
        self.directory = directory
        self._payload_bytes = tuple(payload_bytes)
        self._boot_id = _boot_id()
        self._last_id = 0
        self.joined_after = 0
        self._same_host = False
        self._lock_fd = -1
        self.in_own_process = False
        self.unlocked = ""
        self.mapped: MappedSession | None = None
        self.welcome: Welcome | None = None
        self.number = 0
        self.incarnation = 0
        self.daemon_version = ""
        self.namespace_id = 0
        self.stale = False
        self.generation = -1
        self.digest = bytes(32)
        self.max_record_bytes = 0
        self.protocol = 0
        self.lower_tiers = 0

    def request(self, ask: Ask, timeout_s: float) -> Request:
        """The struct of a request in this session."""
        self._last_id += 1
        if ask.waits:
            # Else its answer would always come when nobody waits for it any more.
            timeout_s *= _WAITED
        return ask.type(
            self._last_id,
            self.number,
            self.namespace_id,
            time.monotonic_ns() if self._same_host else 0,
            min(int(max(timeout_s, 0.0) * 1000) + 1, 1 << 31),
            0 if self.mapped is None else self.mapped.head_for_request(),
            ask.access,
            *ask.fields,
        )

    def refused(self, ask: Ask) -> PutReply | ErrorReply | None:
        """The answer to what must not be sent: a put whose generation this client left, what the daemon cannot know.

        To be asked at the moment of sending: another thread or task may move on at any other.
        """
        unknown = self.too_old_for(ask.type)
        if unknown:
            return ErrorReply(0, self.incarnation, ErrorCode.PROTOCOL_MISMATCH, unknown)
        if not ask.digest or ask.digest == self.digest:
            return None
        records = len(ask.payloads) // 2
        statuses, reasons = bytes([PutStatus.REJECTED]), bytes([Reason.STALE_NAMESPACE])
        return PutReply(0, self.incarnation, statuses * records, reasons * records)

    def too_old_for(self, kind: type[Request]) -> str:
        """Why the daemon that was greeted last does not know a kind of request, "" where it does."""
        since = _SINCE.get(kind, 0)
        if self.protocol >= since:
            return ""
        needs = f"{kind.__name__}, which needs protocol {since}"
        return (
            f"the daemon (kvstored {self.daemon_version}) is too old for {needs}: it speaks {self.protocol}; "
            "upgrade the daemon"
        )

    def greet(self, in_own_process: bool) -> Steps[None]:
        """Open a session, lock its file, join the namespace in the generation the client was in.

        Args:
            in_own_process: the daemon lives in this very process, where a lock would not show the client's end.

        Raises:
            ProtocolMismatch: no common version.
        """
        for last in (False, True):
            self.forget()
            self.in_own_process = in_own_process
            locked = yield from self._open()
            told = yield self.attach(locked, self.generation)
            # A client that was stopped for long in the middle of its greeting is not waited for.
            if last or not is_lost_session(told.reply):
                self.joined(expect(told, Attached))
                return

    def _open(self) -> Steps[bool]:
        """Open a session; returns whether its file could be locked."""
        versions = (PROTOCOL_OLDEST, PROTOCOL_VERSION, kvstore.__version__)
        layout = MAPPED_LAYOUT if self.wants_mapping and not self.in_own_process else 0
        hello = Ask(Hello, (*versions, os.getpid(), self._boot_id, layout))
        welcome = expect((yield hello), Welcome)
        self.welcome = welcome
        self.number = welcome.session
        self.incarnation = welcome.incarnation
        self.daemon_version = welcome.daemon_version
        self.max_record_bytes = welcome.max_record_bytes
        self._same_host = welcome.same_host
        self.protocol = welcome.protocol
        self.lower_tiers = welcome.lower_tiers
        return bool(welcome.session_file) and not self.in_own_process and self._lock(welcome)

    def attach(self, locked: bool, generation: int) -> Ask:
        """The request that joins the namespace; generation -1 is whatever is current."""
        return Ask(Attach, (self.namespace, self._payload_bytes, locked, generation))

    @property
    def locked(self) -> bool:
        """Whether this client holds the lock on its session file."""
        return self._lock_fd >= 0

    @property
    def file(self) -> int:
        """Descriptor of the locked session file, -1 where there is none."""
        return self._lock_fd

    def joined(self, attached: Attached) -> None:
        """Take over a namespace's id; a stale answer keeps the generation this client was in."""
        self.namespace_id = attached.namespace_id
        self.stale = not attached.namespace_id
        if attached.namespace_id:
            if self.digest != attached.digest:
                self.joined_after = self._last_id
            self.generation = attached.generation
            self.digest = attached.digest
        if self.mapped is not None:
            self.mapped.join(self.namespace_id, self.digest)

    def forget(self) -> None:
        """The session is over; the generation is remembered. What still uses its memory keeps its lock."""
        self.number = 0
        self.namespace_id = 0
        mapped, self.mapped = self.mapped, None
        # Taken out first: an interrupt may lose a descriptor, but never close one twice, which could be a stranger's.
        fd, self._lock_fd = self._lock_fd, -1
        if mapped is not None:
            mapped.own_lock(fd)
            mapped.release()
        elif fd >= 0:
            os.close(fd)

    def _lock(self, welcome: Welcome) -> bool:
        """Lock the session file; False where this process cannot (another container, another user)."""
        path = Path(welcome.session_file)
        if self.directory is not None:
            path = self.directory / path.name
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError as error:
            self.unlocked = why_not_opened(error, "the session's file", path)
            return False
        try:
            header = decode_session_header(os.pread(fd, 64, 0))
            if header.session != welcome.session or header.incarnation != welcome.incarnation:
                raise CorruptRecord("it is another client's")
            fcntl.fcntl(fd, fcntl.F_SETLK, lock_request(fcntl.F_WRLCK))
        except (OSError, CorruptRecord) as error:
            os.close(fd)
            self.unlocked = f"cannot lock the session's file {path}: {error}"
            return False
        self._lock_fd = fd
        return True


def why_not_opened(error: OSError, what: str, path: Path) -> str:
    """Why a file of the daemon's cannot be opened, and what to do."""
    if isinstance(error, PermissionError):
        return f"no access to {what} {path}: the daemon's access.mode and access.group do not let this user in"
    if isinstance(error, FileNotFoundError):
        return (
            f"{what} {path} is not there for this process; in another container mount the daemon's directory and say "
            "where (directory= or KVSTORE_DIRECTORY)"
        )
    return f"cannot open {what} {path}: {error.strerror}"


def is_lost_session(reply: Reply) -> bool:
    """Whether a reply says that the daemon does not know the session any more."""
    return isinstance(reply, ErrorReply) and reply.code in (ErrorCode.UNKNOWN_SESSION, ErrorCode.UNKNOWN_NAMESPACE)


def expect(told: Told, kind: type[ReplyT]) -> ReplyT:
    """The reply as the type it must be, or its error raised.

    Raises:
        SessionLost: the daemon gave the session up twice on one request.
        ProtocolMismatch, Throttled, DaemonUnavailable, InvalidArgument, RemoteError: what the daemon said.
    """
    reply = told.reply
    if isinstance(reply, kind):
        return reply
    if not isinstance(reply, ErrorReply):
        raise RemoteError(ErrorCode.INTERNAL, f"the daemon answered {type(reply).__name__} instead of {kind.__name__}")
    code = reply.code
    if is_lost_session(reply):
        raise SessionLost(f"the daemon gave this client's session up again and again: {reply.message}")
    if code == ErrorCode.PROTOCOL_MISMATCH:
        raise ProtocolMismatch(reply.message)
    if code == ErrorCode.THROTTLED:
        raise Throttled(reply.message)
    if code == ErrorCode.SHUTTING_DOWN:
        raise DaemonUnavailable(f"the daemon is stopping: {reply.message}")
    if code == ErrorCode.BAD_REQUEST:
        raise InvalidArgument(f"the daemon refused the request: {reply.message}")
    try:
        known = ErrorCode(code)
    except ValueError:
        known = ErrorCode.INTERNAL
    raise RemoteError(known, reply.message)
