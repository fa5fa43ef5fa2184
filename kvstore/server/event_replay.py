"""The ROUTER socket over which missed batches and snapshots are had, on the event loop.

Driven as ``transport.py`` is: the descriptor is edge-triggered, so EVENTS is read again after each receive and send.
A peer that does not read its replies is waited for without holding anybody up, and given up after a while.
"""

from __future__ import annotations

import asyncio
import errno
from collections import deque
from collections.abc import Callable, Iterator
from typing import Final

import zmq

from kvstore.errors import InvalidArgument
from kvstore.observability.logs import RepeatedLog
from kvstore.protocol.kv_events import decode_request

MAX_PEERS: Final = 32
"""Peers that are answered at a time; requests of more are dropped."""

MAX_REQUESTS_PER_PEER: Final = 4
PATIENCE_S: Final = 5.0
"""How long a peer may take none of its replies before it gets no more of them."""

_REQUESTS_PER_TURN: Final = 4
_MESSAGES_PER_TURN: Final = 32
_BYTES_PER_TURN: Final = 1 << 20
_RETRY_S: Final = 0.005
_MAX_FRAMES: Final = 4
_MAX_FRAME_BYTES: Final = 1024
_QUEUE: Final = 256

_NOBLOCK: Final = int(zmq.NOBLOCK)
_EVENTS: Final = int(zmq.EVENTS)
_POLLIN: Final = int(zmq.POLLIN)

Replies = Iterator[list[bytes]]
"""Messages for a peer, without its identity, made as they are sent."""


class _Peer:
    """What a peer still gets. ``unsent`` is the next message, where there was no room for it."""

    __slots__ = ("replies", "since_s", "unsent")

    def __init__(self, now_s: float) -> None:
        self.replies: deque[Replies] = deque()
        self.unsent: list[bytes] | None = None
        self.since_s = now_s


class ReplaySocket:
    """Answers requests for replays and snapshots.

    Args:
        socket: a bound ROUTER; closed by its owner.
        answer: replies to a request, given as ``decode_request`` gives it.
        log: for what is wrong with requests.
    """

    def __init__(self, socket: zmq.Socket[bytes], answer: Callable[[bool, int], Replies], log: RepeatedLog) -> None:
        self._socket = socket
        self._answer = answer
        self._log = log
        self._fd = int(socket.getsockopt(zmq.FD))
        self._loop: asyncio.AbstractEventLoop | None = None
        self._scheduled: asyncio.Handle | None = None
        self._peers: dict[bytes, _Peer] = {}
        self.malformed = 0
        self.dropped = 0

    @staticmethod
    def prepare(socket: zmq.Socket[bytes]) -> None:
        """Set the options that must be there before the socket is bound."""
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        socket.setsockopt(zmq.MAXMSGSIZE, _MAX_FRAME_BYTES)
        socket.setsockopt(zmq.SNDHWM, _QUEUE)
        socket.setsockopt(zmq.RCVHWM, _QUEUE)

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begin to answer; all calls must come from this loop."""
        self._loop = loop
        loop.add_reader(self._fd, self._turn)
        self._schedule(0.0)

    def stop(self) -> None:
        """Answer no more."""
        if self._loop is not None:
            self._loop.remove_reader(self._fd)
            self._loop = None
        if self._scheduled is not None:
            self._scheduled.cancel()
            self._scheduled = None
        self._peers.clear()

    def _schedule(self, delay_s: float) -> None:
        if self._loop is None:
            return
        if self._scheduled is not None:
            self._scheduled.cancel()
        later = self._loop.call_later
        self._scheduled = later(delay_s, self._turn) if delay_s else self._loop.call_soon(self._turn)

    def _turn(self) -> None:
        """Take some requests, send some replies; again at once while that moves on, later where peers are slow."""
        if self._loop is None:
            return
        if self._scheduled is not None:
            self._scheduled.cancel()
            self._scheduled = None
        again = False
        try:
            exhausted = self._receive()
            moved = self._send()
            again = moved or not exhausted or bool(int(self._socket.getsockopt(_EVENTS)) & _POLLIN)
        except Exception as error:
            # A defect of ours: the daemon goes on, and says so.
            self._peers.clear()
            self._log.log_every(5, "replay", "error", "event_replay_failed", error=repr(error), exc_info=error)
            again = True
        if again:
            self._schedule(0.0)
        elif self._peers:
            self._schedule(_RETRY_S)

    # -------------------------------------------------------------- requests

    def _receive(self) -> bool:
        """Take a few requests; True when there are no more."""
        for _ in range(_REQUESTS_PER_TURN):
            try:
                frames = [self._socket.recv(_NOBLOCK)]
            except zmq.ZMQError as error:
                if error.errno != errno.EAGAIN:
                    raise
                return True
            while self._socket.getsockopt(zmq.RCVMORE):
                frame = self._socket.recv()
                if len(frames) <= _MAX_FRAMES:
                    frames.append(frame)
            self._take(frames[0], frames[1:])
        return False

    def _take(self, identity: bytes, frames: list[bytes]) -> None:
        assert self._loop is not None
        try:
            snapshot, number = decode_request(frames)
        except InvalidArgument as error:
            self.malformed += 1
            self._log.log_every(10, "request", "warning", "bad_event_request", why=str(error))
            return
        peer = self._peers.get(identity)
        if peer is None and len(self._peers) < MAX_PEERS:
            peer = self._peers[identity] = _Peer(self._loop.time())
        if peer is None or len(peer.replies) >= MAX_REQUESTS_PER_PEER:
            self.dropped += 1
            self._log.log_every(10, "busy", "warning", "event_request_dropped", peers=len(self._peers))
            return
        peer.replies.append(self._answer(snapshot, number))

    # -------------------------------------------------------------- replies

    def _send(self) -> bool:
        """Send some replies to each peer; whether anything left."""
        assert self._loop is not None
        moved = False
        now_s = self._loop.time()
        messages, room = _MESSAGES_PER_TURN, _BYTES_PER_TURN
        for identity in list(self._peers):
            peer = self._peers.pop(identity)
            if messages > 0 and room > 0:
                share = max(messages // (len(self._peers) + 1), 1)
                sent, sent_bytes, reachable = self._send_to(identity, peer, share)
                messages, room = messages - sent, room - sent_bytes
                if sent:
                    moved, peer.since_s = True, now_s
                elif reachable and now_s - peer.since_s > PATIENCE_S:
                    reachable = False
                    self._log.log_every(10, "slow", "warning", "slow_event_consumer", waited_s=PATIENCE_S)
                if not reachable:
                    self.dropped += len(peer.replies)
                    continue
            # Behind the others: who was not served in this turn comes first in the next one.
            if peer.replies:
                self._peers[identity] = peer
        return moved

    def _send_to(self, identity: bytes, peer: _Peer, count: int) -> tuple[int, int, bool]:
        """How many messages and bytes left, and whether the peer is still there."""
        sent = sent_bytes = 0
        while peer.replies and sent < count and sent_bytes < _BYTES_PER_TURN:
            message = peer.unsent or next(peer.replies[0], None)
            if message is None:
                peer.replies.popleft()
                continue
            try:
                self._socket.send_multipart([identity, *message], _NOBLOCK)
            except zmq.ZMQError as error:
                if error.errno != errno.EAGAIN:
                    return sent, sent_bytes, False
                peer.unsent = message
                break
            peer.unsent = None
            sent += 1
            sent_bytes += sum(map(len, message))
        return sent, sent_bytes, True
