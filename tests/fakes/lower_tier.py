"""A tier below DRAM that does not exist: a relay before a real daemon, which keeps whole records in a dict.

Clients of the relay map the real daemon's memory. Whatever they send goes through to it, except for what a tier below
has to do with, which the relay answers: it puts records into the daemon when they are to come up, and plays what a test
scripts (throttled puts, answers to persists, silence).
"""

from __future__ import annotations

import os
import threading
from collections import Counter, deque
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec
import zmq
from raw_peer import RawPeer

from kvstore.errors import ErrorCode
from kvstore.format.constants import RECORD_HEADER_BYTES
from kvstore.protocol.framing import decode_reply, decode_request, encode
from kvstore.protocol.messages import (
    AnyRequest,
    CountReply,
    ErrorReply,
    Exists,
    ExistsReply,
    Get,
    GetReply,
    Hello,
    Hint,
    Match,
    MatchReply,
    Persist,
    Persisted,
    Prefetch,
    Put,
    PutReply,
    PutStatus,
    Reason,
    Remove,
    Reply,
    Reserve,
    Reserved,
    TierId,
    Welcome,
)
from kvstore.protocol.namespace import Namespace

DEMOTING = bytes([Reason.DEMOTING])
THROTTLED = bytes([PutStatus.THROTTLED])
_RECORDS = 3
"""The protocol with which records of all codecs are moved."""
_POLL_MS = 20


class LowerTier:
    """The relay, at work in a thread while the ``with`` lasts.

    Args:
        daemon_endpoint: of the real daemon.
        path: of the relay's socket.
        namespace: whose blocks it keeps; None: it is set before any block goes below.
        lower_tiers: what it says in ``Welcome``.
        protocol: the newest version that it speaks.

    Attributes:
        namespace: as given.
        below: records by key, each with all its parts.
        asked: how many requests of each kind came.
        brought_up: keys of each prefetch that waited.
        silent: answer no prefetch.
        lose_prefetches: so many prefetches find their session gone.
        refuse_puts, refuse_slots: so many puts, and reservations, are throttled because blocks are being demoted.
        persists: answers to the next persists, a status and a reason for all their keys; then ``STORED``.
        timeouts_ms: of the requests that waited.
    """

    def __init__(
        self,
        daemon_endpoint: str,
        path: Path,
        namespace: Namespace | None = None,
        *,
        lower_tiers: int = 1 << TierId.SSD,
        protocol: int | None = None,
    ) -> None:
        self.endpoint = f"ipc://{path}"
        self._daemon_endpoint = daemon_endpoint
        self.namespace = namespace or Namespace()
        self._lower_tiers = lower_tiers
        self._protocol = protocol
        self.below: dict[bytes, list[bytes]] = {}
        self.asked: Counter[str] = Counter()
        self.brought_up: list[list[bytes]] = []
        self.silent = False
        self.lose_prefetches = 0
        self.refuse_puts = 0
        self.refuse_slots = 0
        self.persists: deque[tuple[PutStatus, Reason]] = deque()
        self.timeouts_ms: list[int] = []
        self._incarnation = 0
        self._stop = threading.Event()
        self._context = zmq.Context()
        self._front = self._context.socket(zmq.ROUTER)
        self._front.bind(self.endpoint)
        self._backs: dict[bytes, zmq.Socket[bytes]] = {}
        self._thread = threading.Thread(target=self._serve, name="lower-tier")
        self.failed: BaseException | None = None

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._front.close(0)
        for back in self._backs.values():
            back.close(0)
        self._context.term()
        if error is None and self.failed is not None:
            raise self.failed

    # -------------------------------------------------------------- records

    def sink(self, keys: list[bytes], parts: int = 1) -> None:
        """Move blocks out of the daemon's memory, below."""
        with RawPeer(self._daemon_endpoint) as peer:
            peer.ready(self.namespace, _RECORDS)
            for part in range(parts):
                peer.send(peer.request(Get, b"".join(keys), part))
                reply, records = peer.receive()
                assert isinstance(reply, GetReply)
                assert len(records) == len(keys), "not all of them are there"
                for key, record in zip(keys, records, strict=True):
                    self.below.setdefault(key, []).append(record)
            peer.ask(Remove, b"".join(keys))

    def _raise(self, keys: list[bytes]) -> None:
        """Put blocks into the daemon's memory again; they stay below as well."""
        records = [record for key in keys for record in self.below.get(key, [])]
        with RawPeer(self._daemon_endpoint) as peer:
            peer.ready(self.namespace, _RECORDS)
            for record in records:
                payloads = [record[:RECORD_HEADER_BYTES], record[RECORD_HEADER_BYTES:]]
                peer.send(peer.request(Put, 1), payloads)
                peer.receive()

    def _in_dram(self, keys: list[bytes]) -> list[bool]:
        with RawPeer(self._daemon_endpoint) as peer:
            peer.ready(self.namespace, _RECORDS)
            reply = peer.ask(Exists, b"".join(keys))
            assert isinstance(reply, ExistsReply)
            return list(map(bool, reply.tiers))

    # -------------------------------------------------------------- relaying

    def _serve(self) -> None:
        try:
            while not self._stop.is_set():
                poller = zmq.Poller()
                for socket in (self._front, *self._backs.values()):
                    poller.register(socket, zmq.POLLIN)
                ready = dict(poller.poll(_POLL_MS))
                if self._front in ready:
                    identity, header, *payloads = self._front.recv_multipart()
                    self._take(identity, header, payloads)
                for identity, back in list(self._backs.items()):
                    if back in ready:
                        header, *payloads = back.recv_multipart()
                        self._front.send_multipart([identity, self._told(header), *payloads])
        except BaseException as error:
            self.failed = error

    def _told(self, header: bytes) -> bytes:
        reply = decode_reply(header)
        if isinstance(reply, Welcome):
            self._incarnation = reply.incarnation
            header = encode(msgspec.structs.replace(reply, lower_tiers=self._lower_tiers))
        return header

    def _take(self, identity: bytes, header: bytes, payloads: list[bytes]) -> None:
        request = decode_request(header)
        self.asked[type(request).__name__] += 1
        if isinstance(request, Hello) and self._protocol is not None:
            header = encode(msgspec.structs.replace(request, protocol_newest=self._protocol))
        answer = self._answer(request)
        if answer is not None:
            self._front.send_multipart([identity, encode(answer)])
        elif not (self.silent and isinstance(request, Prefetch)):
            back = self._backs.get(identity)
            if back is None:
                back = self._backs[identity] = self._context.socket(zmq.DEALER)
                back.connect(self._daemon_endpoint)
            back.send_multipart([header, *payloads])

    def _answer(self, request: AnyRequest) -> Reply | None:
        """What the tier answers by itself; None: the daemon does."""
        match request:
            case Prefetch(wait=True) if not self.silent:
                self.timeouts_ms.append(request.timeout_ms)
                if self.lose_prefetches:
                    self.lose_prefetches -= 1
                    return ErrorReply(request.id, self._incarnation, ErrorCode.UNKNOWN_SESSION, "scripted")
                keys = _split(request.keys)
                self.brought_up.append(keys)
                self._raise(keys)
            case Match() if self._lower_tiers:
                keys = _split(request.keys)
                tiers = [
                    TierId.DRAM if there else TierId.SSD if key in self.below else TierId.NONE
                    for key, there in zip(keys, self._in_dram(keys), strict=True)
                ]
                hits = tiers.index(TierId.NONE) if TierId.NONE in tiers else len(tiers)
                if request.prefetch:
                    self._raise(keys[:hits])
                return MatchReply(request.id, self._incarnation, hits, tuple((int(tier), 1) for tier in tiers[:hits]))
            case Put() if self.refuse_puts:
                self.refuse_puts -= 1
                return PutReply(request.id, self._incarnation, THROTTLED * request.count, DEMOTING * request.count, 20)
            case Reserve() if self.refuse_slots:
                self.refuse_slots -= 1
                return Reserved(request.id, self._incarnation, 0, 0, Reason.DEMOTING)
            case Persist():
                self.timeouts_ms.append(request.timeout_ms)
                status, reason = self.persists.popleft() if self.persists else (PutStatus.STORED, Reason.NONE)
                count = len(_split(request.keys))
                return Persisted(request.id, self._incarnation, bytes([status]) * count, bytes([reason]) * count)
            case Hint():
                return CountReply(request.id, self._incarnation, sum(key in self.below for key in _split(request.keys)))
        return None


def _split(joined: bytes) -> list[bytes]:
    return [joined[at : at + 32] for at in range(0, len(joined), 32)]


def other_process(*arguments: object) -> int:
    """Instead of ``kvstore_client.link.probe``: the relay is no daemon of this process, its clients may map."""
    return os.getpid() + 1
