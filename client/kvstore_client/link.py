"""One connection to a daemon: a DEALER socket and its monitor, without waiting policy.

Used by the sync and the async client alike. A lost connection is not mended here: libzmq would reconnect silently to
another life of the daemon, which knows nothing of this client's session.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import time
from collections.abc import Sequence

import zmq

from kvstore.errors import DaemonUnavailable, PermissionRefused
from kvstore.format.record import Buffer
from kvstore.protocol.endpoint import ipc_path
from kvstore.protocol.version import MAX_OUTSTANDING_REQUESTS

_CREDENTIALS = struct.Struct("@iII")
"""``struct ucred``: pid, user, group."""

_LOST = (
    zmq.EVENT_DISCONNECTED
    | zmq.EVENT_CLOSED
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
)


_RETRY_S = 0.01


def probe(endpoint: str, timeout: float, patience: float, own: bool) -> int:
    """Find out at once whether anybody listens, and who; the pid, 0 where this process's pid namespace has none.

    Args:
        endpoint: where.
        timeout: seconds for the connection.
        patience: seconds to try again while too many others are waiting to be let in.
        own: accept only a daemon of this user or of root: nobody named the endpoint, and its place can be guessed.

    Raises:
        DaemonUnavailable: nobody does.
        PermissionRefused: somebody does, and does not let this user in, or is somebody else.
    """
    path = ipc_path(endpoint)
    start = f"start one with `kvstore serve --endpoint {endpoint}`"
    end = time.monotonic() + patience
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as probing:
        probing.settimeout(timeout)
        try:
            while True:
                try:
                    probing.connect(str(path))
                    break
                except BlockingIOError:
                    if time.monotonic() >= end:
                        raise
                    time.sleep(_RETRY_S)
        except FileNotFoundError:
            raise DaemonUnavailable(f"no daemon at {endpoint}: the socket does not exist; {start}") from None
        except ConnectionRefusedError:
            raise DaemonUnavailable(f"no daemon at {endpoint}: nobody listens on the socket; {start}") from None
        except PermissionError:
            raise PermissionRefused(
                f"no access to {endpoint}: the daemon's access.mode and access.group do not let this user in"
            ) from None
        except BlockingIOError:
            raise DaemonUnavailable(
                f"the daemon at {endpoint} takes no connection now: too many are waiting for it already; try again"
            ) from None
        except OSError as error:
            if error.errno in (errno.ENOTSOCK, errno.EPROTOTYPE):
                raise DaemonUnavailable(f"no daemon at {endpoint}: {path} is no socket of a daemon; {start}") from None
            raise DaemonUnavailable(f"cannot reach the daemon at {endpoint}: {error}") from None
        credentials = probing.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        pid, user, _ = _CREDENTIALS.unpack(credentials)
    if own and user not in (os.geteuid(), 0):
        raise PermissionRefused(
            f"the daemon at the default endpoint {endpoint} is user {user}'s, not yours; if that is meant, name the "
            "endpoint (endpoint= or KVSTORE_ENDPOINT)"
        )
    return int(pid)


class Link:
    """A connected socket. Not thread-safe.

    Args: as ``probe``.

    Raises:
        DaemonUnavailable, PermissionRefused: as ``probe``.
    """

    def __init__(self, endpoint: str, timeout: float, *, patience: float = 0.0, own: bool = False) -> None:
        self.in_own_process = probe(endpoint, timeout, patience, own) == os.getpid()
        """Whether the daemon lives in this very process; pids alone do not tell, two containers may have equal ones."""
        self._context = zmq.Context(io_threads=1)
        self.socket = self._context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.RECONNECT_IVL, -1)
        self.socket.setsockopt(zmq.SNDHWM, 2 * MAX_OUTSTANDING_REQUESTS)
        self.socket.setsockopt(zmq.RCVHWM, 2 * MAX_OUTSTANDING_REQUESTS)
        self.monitor = self.socket.get_monitor_socket(_LOST)
        self.socket.connect(endpoint)
        self._poller = zmq.Poller()
        self._poller.register(self.socket, zmq.POLLIN)
        self._poller.register(self.monitor, zmq.POLLIN)
        self.torn = False
        """An exception (an interrupt) left half of a message in the socket: the connection is of no use any more."""

    def send(self, header: bytes, payloads: Sequence[Buffer] = ()) -> None:
        """Queue a message. libzmq takes a copy of the payloads.

        Lending it the caller's buffers was measured to be no faster below some MiB, and pyzmq's bookkeeping of lent
        buffers does not survive an exception from a signal handler (Ctrl+C): they could be freed while they are sent.

        Raises:
            zmq.Again: too many messages are queued, or the daemon is gone.
        """
        if not payloads:
            self.socket.send(header, zmq.NOBLOCK)
            return
        self.torn = True
        try:
            self.socket.send(header, zmq.NOBLOCK | zmq.SNDMORE)
        except zmq.Again:
            self.torn = False
            raise
        last = len(payloads) - 1
        for index, payload in enumerate(payloads):
            self.socket.send(payload, zmq.SNDMORE if index < last else 0)
        self.torn = False

    def receive(self) -> tuple[bytes, list[memoryview]] | None:
        """A message that has arrived, or None; payloads are valid as long as they are referenced."""
        self.torn = True
        try:
            header = self.socket.recv(zmq.NOBLOCK)
        except zmq.Again:
            self.torn = False
            return None
        payloads: list[memoryview] = []
        while self.socket.getsockopt(zmq.RCVMORE):
            payloads.append(memoryview(self.socket.recv(copy=False).buffer))
        self.torn = False
        return header, payloads

    def wait(self, timeout_ms: int) -> None:
        """Return when something arrived or broke, or the time is over."""
        self._poller.poll(timeout_ms)

    def lost(self) -> bool:
        """Whether the daemon's side closed the connection."""
        return _readable(self.monitor)

    def pending(self) -> bool:
        """Whether a message has arrived; also re-arms libzmq's edge-triggered descriptor."""
        return _readable(self.socket)

    def descriptors(self) -> tuple[int, int]:
        """Descriptors that become readable when something arrived or broke."""
        return int(self.socket.getsockopt(zmq.FD)), int(self.monitor.getsockopt(zmq.FD))

    def close(self, linger_ms: int = 0) -> None:
        """Close both sockets; queued messages are dropped after ``linger_ms``."""
        if not self.socket.closed:
            self.socket.disable_monitor()
            self.monitor.close(0)
            self.socket.close(linger_ms)
            self._context.term()


def _readable(socket: zmq.Socket[bytes]) -> bool:
    return bool(int(socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN)
