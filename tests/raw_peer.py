"""A peer that speaks the protocol by hand: any message, any frame, and no good manners."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import zmq

from kvstore.format.record import Buffer, encode_header, raw_header
from kvstore.protocol.framing import decode_reply, encode
from kvstore.protocol.keys import ROOT_KEY
from kvstore.protocol.messages import Attach, Attached, ErrorReply, Hello, Ping, Put, PutReply, Reply, Request, Welcome
from kvstore.protocol.namespace import Namespace

ReplyT = TypeVar("ReplyT", bound=Reply)
BOOT_ID = Path("/proc/sys/kernel/random/boot_id").read_text().strip()


class RawPeer:
    """One DEALER connection.

    Args:
        endpoint: of the daemon.
        same_host: whether to greet as a client of this kernel, which gets a session file (never locked here).
    """

    def __init__(self, endpoint: str, *, same_host: bool = False, receive_hwm: int = 0) -> None:
        self._context = zmq.Context(io_threads=1)
        self.socket: zmq.Socket[bytes] = self._context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.SNDHWM, 0)
        self.socket.setsockopt(zmq.RCVHWM, receive_hwm)
        self.socket.connect(endpoint)
        self._boot_id = BOOT_ID if same_host else ""
        self._ids = itertools.count(1)
        self.session = 0
        self.namespace_id = 0
        self.digest = bytes(32)

    # -------------------------------------------------------------- messages

    def request(self, kind: type[Request], *fields: Any, **envelope: int) -> Request:
        """A well-formed request of this peer's session; ``envelope`` overrides fields of the envelope."""
        values = {
            "id": next(self._ids),
            "session": self.session,
            "namespace_id": self.namespace_id,
            "sent_ns": 0,
            "timeout_ms": 0,
            "ring_head": 0,
            "access": 0,
        }
        assert set(envelope) <= set(values)
        return kind(*(values | envelope).values(), *fields)

    def send(self, request: Request | bytes, payloads: Sequence[Buffer] = ()) -> None:
        """Send a request, or any bytes as the header frame."""
        header = request if isinstance(request, bytes) else encode(request)
        self.send_frames([header, *payloads])

    def send_frames(self, frames: Sequence[Buffer]) -> None:
        """Send frames as one message."""
        self.socket.send_multipart(list(frames))

    def receive(self, timeout_s: float = 10.0) -> tuple[Reply, list[bytes]]:
        """The next reply."""
        assert self.socket.poll(int(timeout_s * 1000)), f"no reply within {timeout_s:g} s"
        header, *payloads = self.socket.recv_multipart()
        return decode_reply(header), payloads

    def nothing(self, timeout_s: float = 0.2) -> bool:
        """Whether no reply comes."""
        return not self.socket.poll(int(timeout_s * 1000))

    def ask(self, kind: type[Request], *fields: Any, payloads: Sequence[Buffer] = (), **envelope: int) -> Reply:
        """Send a request and wait for its reply; replies to others are skipped."""
        request = self.request(kind, *fields, **envelope)
        self.send(request, payloads)
        end = time.monotonic() + 10.0
        while True:
            reply, _ = self.receive(max(end - time.monotonic(), 0.0))
            if reply.id == request.id:
                return reply

    def error(self, kind: type[Request], *fields: Any, payloads: Sequence[Buffer] = (), **envelope: int) -> ErrorReply:
        """Send a request that must be refused."""
        reply = self.ask(kind, *fields, payloads=payloads, **envelope)
        assert isinstance(reply, ErrorReply), reply
        return reply

    # -------------------------------------------------------------- the usual

    def greet(self, newest: int = 1) -> Welcome:
        """Open a session, as a peer of a version of the protocol."""
        self.namespace_id = 0
        reply = self.ask(Hello, 1, newest, "raw", os.getpid(), self._boot_id, session=0)
        assert isinstance(reply, Welcome), reply
        self.session = reply.session
        return reply

    def attach(self, namespace: Namespace, *, payload_bytes: tuple[int, ...] = ()) -> Attached:
        """Join a namespace."""
        reply = self.ask(Attach, namespace, payload_bytes, False, -1)
        assert isinstance(reply, Attached), reply
        self.namespace_id, self.digest = reply.namespace_id, reply.digest
        return reply

    def ready(self, namespace: str | Namespace, newest: int = 1) -> Self:
        """Open a session and join a namespace."""
        self.greet(newest)
        self.attach(Namespace.parse(namespace))
        return self

    def record(self, key: bytes, payload: Buffer, *, parent: bytes = ROOT_KEY, part: int = 0) -> list[Buffer]:
        """The two frames of a valid record."""
        header = raw_header(key=key, parent_key=parent, namespace_digest=self.digest, part=part, payload=payload)
        return [encode_header(header), payload]

    def put(self, *frames: Buffer) -> PutReply:
        """Put the records in ``frames``."""
        reply = self.ask(Put, len(frames) // 2, payloads=frames)
        assert isinstance(reply, PutReply), reply
        return reply

    def settle(self, timeout_s: float = 30.0) -> int:
        """Wait until everything sent before was served; how many replies came that nobody had taken."""
        request = self.request(Ping)
        self.send(request)
        end = time.monotonic() + timeout_s
        others = 0
        while True:
            reply, _ = self.receive(max(end - time.monotonic(), 0.0))
            if reply.id == request.id:
                return others
            others += 1

    def close(self) -> None:
        """Drop the connection without a word."""
        self.socket.close(0)
        self._context.term()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
