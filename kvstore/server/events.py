"""KV events: what the journal says is published in the format of vLLM's publisher, and can be had again.

Covers: the PUB socket, a batch each few milliseconds while blocks come and go, heartbeats while they do not, answers to
requests for replays and snapshots. Does not cover: the ROUTER socket they come in by (``kvstore.server.event_replay``),
bytes (``kvstore.protocol.kv_events``). See ``docs/events.md``.

Nobody is waited for. The PUB socket drops batches for a subscriber whose queue is full; sequence numbers show it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import zmq

from kvstore.core.journal import Change, Journal
from kvstore.errors import PermissionRefused, ResourceTaken
from kvstore.observability.logs import RepeatedLog
from kvstore.protocol.endpoint import IPC_PREFIX, ipc_path
from kvstore.protocol.kv_events import (
    END_OF_REPLAY,
    NO_CURSOR,
    AllBlocksCleared,
    BlockEvent,
    encode_batch,
    encode_number,
    heartbeat_topic,
    snapshot_reply,
)
from kvstore.protocol.statistics import EventStats
from kvstore.server.event_batches import BatchRing, events_of, stored_events
from kvstore.server.event_replay import ReplaySocket, Replies
from kvstore.server.transport import bind_ipc
from kvstore.tiers.files import OwnerLock, require_socket_or_nothing

BLOCKS_PER_BATCH: Final = 512
"""Most blocks in a batch."""

PLACES_PER_PAGE: Final = 512
"""Places of the journal that a page of a snapshot looks at."""

_GATHER_S: Final = 0.002
"""How long changes are gathered for a batch: a message costs the daemon more than the blocks in it."""

_SUBSCRIPTION_BYTES: Final = 1024
"""Longest message that a subscriber may send. libzmq keeps some 50 bytes for each byte of a subscription."""

_LINGER_MS: Final = 200
_NOBLOCK: Final = int(zmq.NOBLOCK)


@dataclass(slots=True)
class _Counts:
    """Since the start."""

    batches: int = 0
    heartbeats: int = 0
    stored_blocks: int = 0
    removed_blocks: int = 0
    replays: int = 0
    snapshots: int = 0


class EventPublisher:
    """Publishes what a journal says.

    Args:
        journal: of the store; it is drained here and nowhere else.
        endpoint, replay_endpoint: checked ``ipc://`` or ``tcp://`` endpoints, which are bound.
        topic: first frame of all batches.
        buffer_steps: batches with events that are kept for replays.
        hwm: batches that wait for one subscriber before it loses some.
        heartbeat_s: after how long without a batch one without events is published.
        incarnation: of the daemon.
        mode, gid: permissions of socket files, and their group or -1.
        wall_clock: seconds since 1970.
        log: for what goes wrong.

    Raises:
        ResourceTaken: another daemon has an endpoint, or a file that is no socket is there.
        PermissionRefused: a socket cannot be made.
    """

    def __init__(
        self,
        journal: Journal,
        *,
        endpoint: str,
        replay_endpoint: str,
        topic: str,
        buffer_steps: int,
        hwm: int,
        heartbeat_s: float,
        incarnation: int,
        mode: int,
        gid: int,
        wall_clock: Callable[[], float],
        log: RepeatedLog,
    ) -> None:
        self._journal = journal
        self._endpoints = endpoint, replay_endpoint
        self._counts = _Counts()
        self._topic = topic.encode()
        self._heartbeat_topic = heartbeat_topic(self._topic, incarnation)
        self._heartbeat_s = heartbeat_s
        self._incarnation = incarnation
        self._wall_clock = wall_clock
        self._log = log
        # Beyond the numbers of every earlier life: a subscriber that knows of no lives finds a gap after a restart,
        # asks for a replay, and is told first that everything is gone.
        first_sequence = max(int(wall_clock() * 1e6), 0)
        self._ring = BatchRing(buffer_steps, encode_batch(0.0, []), first_sequence)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._scheduled = False
        self._last_s = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._undo = contextlib.ExitStack()
        try:
            # Locks first: they are given back last, when libzmq has removed the files.
            self._lock(endpoint, "events.endpoint")
            self._lock(replay_endpoint, "events.replay_endpoint")
            context = zmq.Context(io_threads=1)
            self._undo.callback(context.term)
            self._pub = self._socket(context, zmq.PUB)
            self._pub.setsockopt(zmq.SNDHWM, hwm)
            self._pub.setsockopt(zmq.MAXMSGSIZE, _SUBSCRIPTION_BYTES)
            _bind(self._pub, endpoint, mode, gid, "events.endpoint")
            router = self._socket(context, zmq.ROUTER)
            ReplaySocket.prepare(router)
            _bind(router, replay_endpoint, mode, gid, "events.replay_endpoint")
        except BaseException:
            self._undo.close()
            raise
        self._replay = ReplaySocket(router, self._answer, log)

    def _socket(self, context: zmq.Context[zmq.Socket[bytes]], kind: int) -> zmq.Socket[bytes]:
        socket = context.socket(kind)
        socket.setsockopt(zmq.LINGER, _LINGER_MS)
        self._undo.callback(socket.close)
        return socket

    def _lock(self, endpoint: str, setting: str) -> None:
        if endpoint.startswith(IPC_PREFIX):
            path = ipc_path(endpoint)
            lock = OwnerLock(Path(f"{path}.lock"), f"the socket {path}", f"stop it, or choose another {setting}")
            self._undo.callback(lock.release)
            require_socket_or_nothing(path, setting)
            self._undo.callback(path.unlink, missing_ok=True)

    # -------------------------------------------------------------- life

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begin to publish; all other calls must come from this loop."""
        self._loop = loop
        self._journal.wake = self._schedule
        self._replay.start(loop)
        self._send([AllBlocksCleared(self._incarnation)])
        self._timer = loop.call_later(self._heartbeat_s, self._beat)
        if self._journal.waiting:
            self._schedule()

    def close(self) -> None:
        """Say that all blocks are gone, give queued batches a moment to leave, remove the socket files."""
        self._journal.wake = None
        if self._loop is not None:
            self._loop = None
            self._replay.stop()
            if self._timer is not None:
                self._timer.cancel()
            with contextlib.suppress(zmq.ZMQError):
                self._send([AllBlocksCleared(self._incarnation)])
        self._undo.close()

    def statistics(self) -> EventStats:
        """What it did so far."""
        counts, ring = self._counts, self._ring
        return EventStats(
            endpoint=self._endpoints[0],
            replay_endpoint=self._endpoints[1],
            sequence=max(ring.next_sequence - 1, 0),
            batches=counts.batches,
            heartbeats=counts.heartbeats,
            stored_blocks=counts.stored_blocks,
            removed_blocks=counts.removed_blocks,
            waiting_blocks=self._journal.waiting,
            kept_batches=len(ring),
            kept_bytes=ring.kept_bytes,
            replays=counts.replays,
            snapshots=counts.snapshots,
            bad_requests=self._replay.malformed,
            dropped_requests=self._replay.dropped,
        )

    # -------------------------------------------------------------- publishing

    def _schedule(self) -> None:
        if not self._scheduled and self._loop is not None:
            self._scheduled = True
            self._loop.call_later(_GATHER_S, self._publish)

    def _publish(self) -> None:
        self._scheduled = False
        if self._loop is None:
            return
        try:
            entries = self._journal.drain(BLOCKS_PER_BATCH)
            if entries:
                self._send(events_of(entries, self._incarnation))
                stored = sum(entry.change is Change.STORED for entry in entries)
                self._counts.stored_blocks += stored
                self._counts.removed_blocks += len(entries) - stored - (entries[0].change is Change.CLEARED)
        except Exception as error:
            # A defect of ours: consumers find a number missing, and take a snapshot.
            self._ring.lose()
            self._log.log_every(5, "publish", "error", "event_publish_failed", error=repr(error), exc_info=error)
        if self._journal.waiting:
            # More than a batch takes, or a defect: after everybody else had a turn.
            self._scheduled = True
            self._loop.call_soon(self._publish)

    def _send(self, events: list[BlockEvent]) -> None:
        payload = encode_batch(self._wall_clock(), events)
        sequence = self._ring.append(payload)
        self._counts.batches += 1
        self._publish_frames(self._topic, sequence, payload)

    def _publish_frames(self, topic: bytes, sequence: int, payload: bytes) -> None:
        self._pub.send_multipart([topic, encode_number(sequence), payload], _NOBLOCK)
        if self._loop is not None:
            self._last_s = self._loop.time()

    def _beat(self) -> None:
        """Publish a batch without events where none was published for a while."""
        loop = self._loop
        if loop is None:
            return
        due_s = self._last_s + self._heartbeat_s - loop.time()
        if due_s <= 0:
            due_s = self._heartbeat_s
            try:
                payload = encode_batch(self._wall_clock(), [])
                self._publish_frames(self._heartbeat_topic, self._ring.append_idle(), payload)
                self._counts.heartbeats += 1
            except Exception as error:
                self._log.log_every(5, "beat", "error", "event_heartbeat_failed", error=repr(error), exc_info=error)
        self._timer = loop.call_later(due_s, self._beat)

    # -------------------------------------------------------------- replays and snapshots

    def _answer(self, snapshot: bool, number: int) -> Replies:
        if self._journal.waiting:
            self._publish()  # whoever asks is told what happened before
        if snapshot:
            self._counts.snapshots += not number
            return self._page(number)
        self._counts.replays += 1
        return self._batches(number)

    def _batches(self, sequence: int) -> Replies:
        # Looked up when their turn comes: what waits to be answered costs nothing.
        for number, payload in self._ring.since(sequence):
            topic = self._heartbeat_topic if payload is self._ring.idle else self._topic
            yield [b"", topic, encode_number(number), payload]
        yield [b"", b"", END_OF_REPLAY, b""]

    def _page(self, cursor: int) -> Replies:
        blocks, following = self._journal.page(cursor, PLACES_PER_PAGE)
        payload = encode_batch(self._wall_clock(), stored_events(blocks, self._incarnation))
        last = self._ring.next_sequence - 1
        return iter([snapshot_reply(last, payload, NO_CURSOR if following is None else following, self._incarnation)])


def _bind(socket: zmq.Socket[bytes], endpoint: str, mode: int, gid: int, setting: str) -> None:
    if endpoint.startswith(IPC_PREFIX):
        bind_ipc(socket, endpoint, mode, gid)
        return
    try:
        socket.bind(endpoint)
    except zmq.ZMQError as error:
        if error.errno == zmq.EADDRINUSE:
            raise ResourceTaken(f"{setting} {endpoint}: the port is taken; choose another") from None
        raise PermissionRefused(f"{setting}: cannot bind {endpoint}: {error.strerror}") from None
