"""The client loop of the control benchmark: a raw DEALER that sends frames encoded beforehand.

The same loop drives the daemon and the echo, and decodes the answers of neither, so what differs is the server.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Sequence
from time import perf_counter_ns
from types import TracebackType
from typing import Final, Self, TypeVar

import zmq

from kvstore.errors import DeadlineExceeded, ErrorCode, RemoteError
from kvstore.protocol.framing import decode_reply, encode
from kvstore.protocol.messages import AnyReply, AnyRequest, Attach, Attached, Bye, ErrorReply, Hello, Reply, Welcome
from kvstore.protocol.namespace import Namespace
from kvstore.protocol.version import PROTOCOL_OLDEST, PROTOCOL_VERSION

__all__ = ["DaemonSession", "Wire"]

R = TypeVar("R", bound=Reply)

_DEADLINE_MS: Final = 10_000


class Wire:
    """One DEALER connected to one endpoint. Blocking, of one thread; every wait ends after 10 s.

    Args:
        context: shared by the sides that are compared, so that both use the same I/O thread.
        endpoint: of the daemon or of the echo.
        what: names the other side in errors.
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], endpoint: str, what: str) -> None:
        self._what = f"{what} at {endpoint}"
        self._socket = context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 200)
        self._socket.setsockopt(zmq.RCVTIMEO, _DEADLINE_MS)
        self._socket.setsockopt(zmq.SNDTIMEO, _DEADLINE_MS)
        self._socket.connect(endpoint)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def send(self, frame: bytes) -> None:
        """Send one message without waiting for an answer."""
        self._socket.send(frame)

    def exchange(self, frame: bytes) -> bytes:
        """Send one message and return the only frame of its answer.

        Raises:
            DeadlineExceeded: no answer within 10 s.
        """
        try:
            self._socket.send(frame)
            answer = self._socket.recv_multipart()
        except zmq.Again:
            raise self._late() from None
        if len(answer) != 1:
            raise RemoteError(ErrorCode.INTERNAL, f"{self._what} answered with {len(answer)} frames, not one")
        return answer[0]

    def round_trips(self, frame: bytes, count: int) -> list[int]:
        """Nanoseconds of ``count`` exchanges, one after the other.

        Raises:
            DeadlineExceeded: an answer took more than 10 s.
        """
        send, receive, clock = self._socket.send, self._socket.recv, perf_counter_ns
        times: list[int] = []
        add = times.append
        try:
            for _ in range(count):
                started = clock()
                send(frame)
                receive()
                add(clock() - started)
        except zmq.Again:
            raise self._late() from None
        return times

    def pipelined(self, frames: Sequence[bytes], count: int) -> float:
        """Exchanges a second with ``len(frames)`` always under way (a sliding window).

        Args:
            frames: one a place in the window, with ids that differ.
            count: exchanges in all, at least ``len(frames)``.

        Raises:
            DeadlineExceeded: an answer took more than 10 s.
        """
        send, receive = self._socket.send, self._socket.recv
        depth = len(frames)
        try:
            started = perf_counter_ns()
            for frame in frames:
                send(frame)
            for frame in itertools.islice(itertools.cycle(frames), count - depth):
                receive()
                send(frame)
            for _ in frames:
                receive()
            elapsed_ns = perf_counter_ns() - started
        except zmq.Again:
            raise self._late() from None
        return count / elapsed_ns * 1e9

    def _late(self) -> DeadlineExceeded:
        return DeadlineExceeded(f"{self._what} did not answer within {_DEADLINE_MS // 1000} s")


class DaemonSession(Wire):
    """A session of the protocol on a raw socket, in one namespace. Ends itself with the block."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], endpoint: str, namespace: Namespace) -> None:
        super().__init__(context, endpoint, "the daemon")
        self._ids = itertools.count(1)
        self.session = 0
        self.namespace_id = 0
        try:
            hello = Hello(*self.envelope(), protocol_oldest=PROTOCOL_OLDEST, protocol_newest=PROTOCOL_VERSION)
            self.session = self.ask(hello, Welcome).session
            self.namespace_id = self.ask(Attach(*self.envelope(), namespace), Attached).namespace_id
        except BaseException:
            super().close()
            raise

    def envelope(self) -> tuple[int, int, int, int, int, int, int]:
        """The leading fields of a request of this session, with a fresh id.

        The moment of sending is left out: a frame encoded once is sent many times.
        """
        return (next(self._ids), self.session, self.namespace_id, 0, _DEADLINE_MS, 0, 0)

    def ask(self, request: AnyRequest, expected: type[R]) -> R:
        """One checked exchange.

        Raises:
            RemoteError: the answer is an error, or of another kind or id.
            DeadlineExceeded: no answer.
        """
        return self.check(decode_reply(self.exchange(encode(request))), request.id, expected)

    def check(self, reply: AnyReply, request_id: int, expected: type[R]) -> R:
        """Return the reply if it is of the kind and id expected.

        Raises:
            RemoteError: it is not.
        """
        if isinstance(reply, ErrorReply):
            raise RemoteError(ErrorCode(reply.code), f"{self._what} answered: {reply.message}")
        if not isinstance(reply, expected) or reply.id != request_id:
            raise RemoteError(
                ErrorCode.INTERNAL,
                f"{self._what} answered {type(reply).__name__} {reply.id}, not {expected.__name__} {request_id}",
            )
        return reply

    def close(self) -> None:
        """End the session and close the socket."""
        if self.session:
            with contextlib.suppress(zmq.Again):  # a daemon that takes nothing finds out by itself
                self.send(encode(Bye(*self.envelope())))
        super().close()
