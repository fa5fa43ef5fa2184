"""Client sessions: who is there, and who is gone.

A client that can, locks its session file: the kernel frees the lock when it dies, and the daemon sees that within a
second. Any other client's session ends when nothing was heard from it for ``session_idle_s``, and one whose greeting
was never finished after a few seconds: its client died too early for a lock to show it.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from kvstore.errors import KVStoreError
from kvstore.mapped.client_file import CLIENT_FILE_BYTES
from kvstore.mapped.session_file import SESSION_FILE_BYTES, SessionHeader, encode_session_header
from kvstore.tiers.files import SessionFile

_GREETING_NS: Final = 5_000_000_000
"""How long a greeting may pause. A client that was stopped for longer greets again by itself."""


class TooManySessions(KVStoreError):
    """The limit of clients is reached."""


@dataclass(slots=True, eq=False)
class Session:
    """One client.

    Attributes:
        identity: its connection at the ROUTER; a session is used from no other.
        protocol: the version that was agreed on.
        same_host: whether its clock is ours.
        locked: whether it holds the lock on its file.
        last_ns: when it was last heard.
        greeted: it joined a namespace, and the lock that it speaks of, if it does, was seen.
        namespaces: ids of the namespaces that it joined; it has no access to others.
        died_ns: when its lock was first seen to be free, 0 before.
    """

    id: int
    identity: bytes
    pid: int
    version: str
    protocol: int
    same_host: bool
    last_ns: int
    file: SessionFile | None
    locked: bool = False
    greeted: bool = False
    requests: int = 0
    private_accesses: int = 0
    died_ns: int = 0
    namespaces: set[int] = field(default_factory=set)


class Sessions:
    """All sessions.

    Args:
        directory: where session files are made.
        incarnation: of this daemon.
        limit: most sessions at once.
        idle_ns: after how long an unlocked session ends that was greeted.
        mode, gid: of session files.
    """

    def __init__(self, directory: Path, incarnation: int, limit: int, idle_ns: int, mode: int, gid: int) -> None:
        self._directory = directory
        self._incarnation = incarnation
        self._limit = limit
        self._idle_ns = idle_ns
        self._mode = mode
        self._gid = gid
        self._by_id: dict[int, Session] = {}
        self._by_identity: dict[bytes, Session] = {}
        self.retired = 0
        """Sessions that ended and whose clients still hold their locks; they count."""
        self.opened = 0
        self.died = 0
        self.expired = 0

    def __len__(self) -> int:
        return len(self._by_id)

    def all(self) -> list[Session]:
        """Every session, oldest first."""
        return list(self._by_id.values())

    def open(
        self,
        identity: bytes,
        pid: int,
        version: str,
        protocol: int,
        same_host: bool,
        now_ns: int,
        *,
        mapped: bool = False,
    ) -> Session:
        """A new session for a connection; the caller has closed the connection's last one.

        Args:
            identity: as in ``Session``.
            pid: as in ``Session``.
            version: as in ``Session``.
            protocol: as in ``Session``.
            same_host: as in ``Session``.
            now_ns: the time.
            mapped: give it a file that is shared as memory, if there is room for one.

        Raises:
            TooManySessions: the limit is reached.
        """
        if len(self._by_id) + self.retired >= self._limit:
            raise TooManySessions(
                f"{self._limit} clients are connected, the limit; close some or raise limits.max_sessions"
            )
        number = secrets.randbits(62) | 1
        file = None
        if same_host:
            if mapped:
                file = self._file(number, CLIENT_FILE_BYTES, mapped=True)
            if file is None:
                file = self._file(number, SESSION_FILE_BYTES, mapped=False)
        session = Session(number, identity, pid, version, protocol, same_host, now_ns, file)
        self._by_id[number] = self._by_identity[identity] = session
        self.opened += 1
        return session

    def _file(self, number: int, size_bytes: int, *, mapped: bool) -> SessionFile | None:
        """A session's file. Where there is no room, the session does without, and ends when it is silent too long."""
        header = encode_session_header(SessionHeader(self._incarnation, number, mapped))
        path = self._directory / f"client-{number:016x}"
        with contextlib.suppress(OSError):
            return SessionFile(path, header, size_bytes, self._mode, self._gid, mapped=mapped)
        return None

    def of(self, identity: bytes, number: int) -> Session | None:
        """The session of that number, if it is this connection's."""
        session = self._by_id.get(number)
        return session if session is not None and session.identity == identity else None

    def of_connection(self, identity: bytes) -> Session | None:
        """The session of a connection."""
        return self._by_identity.get(identity)

    def close(self, session: Session) -> None:
        """Forget a session. Its file is the caller's to close: what it locks may be in use still."""
        del self._by_id[session.id]
        del self._by_identity[session.identity]

    def gone(self, now_ns: int, grace_ns: Callable[[Session], int] = lambda session: 0) -> list[Session]:
        """Sessions whose client died or was not heard of for too long; counted, not closed.

        Args:
            now_ns: the time.
            grace_ns: how long after its death what a client held must be left alone.
        """
        gone = []
        for session in self._by_id.values():
            if session.locked:
                if session.file is not None and not session.file.locked():
                    session.died_ns = session.died_ns or now_ns
                    if now_ns - session.died_ns >= grace_ns(session):
                        self.died += 1
                        gone.append(session)
            elif now_ns - session.last_ns > (self._idle_ns if session.greeted else min(self._idle_ns, _GREETING_NS)):
                self.expired += 1
                gone.append(session)
        return gone
