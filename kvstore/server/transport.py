"""The ROUTER socket on the event loop, driven by its own file descriptor.

libzmq's descriptor is edge-triggered: it becomes readable when the socket's EVENTS *may* have changed, once. So after
every receive or send outside the drain EVENTS must be read again, and a drain scheduled if there is input; otherwise
replies stall until the next message happens to arrive. The drain takes a bounded number of messages and then lets
other callbacks run.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Sequence
from typing import Final

import zmq

from kvstore.errors import PermissionRefused
from kvstore.format.record import Buffer
from kvstore.protocol.endpoint import ipc_path
from kvstore.protocol.version import MAX_OUTSTANDING_REQUESTS, MAX_PAYLOAD_FRAMES

DRAIN_MESSAGES: Final = 64
WAITING_MESSAGES: Final = 64
"""Requests of one client that libzmq takes in before they are drained; the others wait with the client. They are whole
records, so their number bounds the daemon's memory while its loop is held up; a drain's worth costs no throughput."""

# pyzmq's flags are enums, whose arithmetic costs more than the call they are passed to.
_NOBLOCK: Final = int(zmq.NOBLOCK)
_SNDMORE: Final = int(zmq.SNDMORE | zmq.NOBLOCK)
_RCVMORE: Final = int(zmq.RCVMORE)
_EVENTS: Final = int(zmq.EVENTS)
_POLLIN: Final = int(zmq.POLLIN)
_LINGER_MS: Final = 200
_BACKLOG: Final = 1024
"""Connections that may wait to be accepted: all clients of a daemon reconnect at once after its restart."""

OnMessage = Callable[[bytes, bytes, list[zmq.Frame]], None]
"""Called with the sender's identity, the header frame, and the payload frames."""


class RouterTransport:
    """One bound ROUTER socket.

    Args:
        endpoint: checked ``ipc://`` endpoint; the caller owns its lock.
        max_frame_bytes: larger frames end the sender's connection.
        mode: permissions of the socket file.
        gid: its group, -1 for the user's.
        on_message: called for each whole message; must not raise.

    Raises:
        PermissionRefused: the socket cannot be made.
    """

    def __init__(self, endpoint: str, *, max_frame_bytes: int, mode: int, gid: int, on_message: OnMessage) -> None:
        self._on_message = on_message
        self._context = zmq.Context(io_threads=1)
        self._context.set(zmq.MAX_SOCKETS, 4096)
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.setsockopt(zmq.MAXMSGSIZE, max_frame_bytes)
        self._socket.setsockopt(zmq.SNDHWM, 2 * MAX_OUTSTANDING_REQUESTS)
        self._socket.setsockopt(zmq.RCVHWM, WAITING_MESSAGES)
        self._socket.setsockopt(zmq.LINGER, _LINGER_MS)
        self._socket.setsockopt(zmq.BACKLOG, _BACKLOG)
        self._path = ipc_path(endpoint)
        try:
            bind_ipc(self._socket, endpoint, mode, gid)
        except PermissionRefused:
            self._socket.close(0)
            self._context.term()
            raise
        self._fd = int(self._socket.getsockopt(zmq.FD))
        self._loop: asyncio.AbstractEventLoop | None = None
        self._scheduled = False
        self._draining = False
        self.dropped_replies = 0
        self.malformed = 0

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begin to serve on a loop; all other calls must come from it."""
        self._loop = loop
        loop.add_reader(self._fd, self._drain)
        self._schedule()

    def _schedule(self) -> None:
        if not self._scheduled and self._loop is not None:
            self._scheduled = True
            self._loop.call_soon(self._scheduled_drain)

    def _scheduled_drain(self) -> None:
        self._scheduled = False
        self._drain()

    def _drain(self) -> None:
        if self._socket.closed:
            return
        self._draining = True
        exhausted = False
        try:
            exhausted = self._take(DRAIN_MESSAGES)
        finally:
            self._draining = False
            if not exhausted:
                self._schedule()

    def _take(self, count: int) -> bool:
        """Serve up to ``count`` messages; True when there are no more."""
        receive, option, on_message = self._socket.recv, self._socket.getsockopt, self._on_message
        for _ in range(count):
            try:
                identity = receive(_NOBLOCK)
            except zmq.ZMQError:
                return True
            if not option(_RCVMORE):
                self.malformed += 1
                continue
            header = receive()
            payloads: list[zmq.Frame] = []
            while option(_RCVMORE):
                payloads.append(self._socket.recv(copy=False))
                if len(payloads) > MAX_PAYLOAD_FRAMES + 1:
                    # One more than any request has: it is refused for its number of frames, whatever it claims.
                    payloads.pop()
            on_message(identity, header, payloads)
        return False

    def send(self, identity: bytes, header: bytes, payloads: Sequence[memoryview] = ()) -> zmq.MessageTracker | None:
        """Send a reply.

        Args:
            identity: the peer.
            header: header frame.
            payloads: payload frames, sent from where they lie: they must not change before the tracker is done.

        Returns:
            A tracker for the payloads, None where libzmq holds none of them: there are none, all were small enough to
            be copied, or the reply was dropped because the peer is gone or does not read its replies.
        """
        lent: list[zmq.MessageTracker] = []
        try:
            self._socket.send(identity, _SNDMORE)
            self._socket.send(header, _SNDMORE if payloads else _NOBLOCK)
            last = len(payloads) - 1
            for index, payload in enumerate(payloads):
                flags = _SNDMORE if index < last else _NOBLOCK
                tracker = self._socket.send(payload, flags, copy=False, track=True)
                if not tracker.done:
                    lent.append(tracker)
        except zmq.ZMQError:
            self.dropped_replies += 1
        if not self._draining and int(self._socket.getsockopt(_EVENTS)) & _POLLIN:
            self._schedule()
        return zmq.MessageTracker(*lent) if lent else None

    def close(self) -> None:
        """Stop serving, give queued replies a moment to leave, remove the socket file."""
        if self._loop is not None:
            self._loop.remove_reader(self._fd)
            self._loop = None
        self._socket.close(_LINGER_MS)
        self._context.term()
        with contextlib.suppress(FileNotFoundError):
            self._path.unlink()


def bind_ipc(socket: zmq.Socket[bytes], endpoint: str, mode: int, gid: int) -> None:
    """Bind a socket whose file has these permissions from the first moment on; ``gid`` -1 leaves the group.

    Raises:
        PermissionRefused: the socket file cannot be made.
    """
    path = ipc_path(endpoint)
    umask = os.umask(0o177)
    try:
        socket.bind(endpoint)
        os.chmod(path, mode)
        if gid >= 0:
            os.chown(path, -1, gid)
    except (zmq.ZMQError, OSError) as error:
        raise PermissionRefused(f"cannot make the socket {path}: {error.strerror}") from None
    finally:
        os.umask(umask)


def frame_buffer(frame: zmq.Frame) -> Buffer:
    """A received frame's bytes without a copy; valid as long as the frame."""
    return memoryview(frame.buffer)
