"""``EventConsumer``: an index of what a daemon has that follows its KV events, and misses none.

Covers: subscribing, gaps, replays, snapshots, restarts of the daemon. Does not cover: the bytes
(``kvstore.protocol.kv_events``), other publishers' events: those of engines know no namespaces, no incarnations and no
snapshots. See ``docs/events.md``.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from types import TracebackType
from typing import Final, Self

import zmq

from kvstore.errors import ConnectionLost, DeadlineExceeded, InvalidArgument
from kvstore.protocol.endpoint import check_endpoint, check_event_endpoint, default_endpoint, default_event_endpoints
from kvstore.protocol.kv_events import (
    END_OF_REPLAY,
    NO_CURSOR,
    EventBatch,
    SnapshotPage,
    decode_batch,
    decode_number,
    decode_snapshot_reply,
    incarnation_of,
    replay_request,
    snapshot_request,
)
from kvstore_client.block_index import BlockIndex

_HWM: Final = 100_000
_SNAPSHOT_TRIES: Final = 8
_BATCHES_PER_POLL: Final = 10_000


class _Gone(Exception):
    """Batches are missing that nobody has any more, or another daemon answers."""


class EventConsumer:
    """Follows a daemon's KV events. Of one thread; never touches the daemon's other sockets.

    ``poll`` does everything. What it finds missing it has replayed; where the daemon does not keep it any more, or is
    another one after a restart, it takes a snapshot. In between ``index`` is as it was at ``sequence``.

    Args:
        endpoint: of the daemon, by default the default one.
        events_endpoint, replay_endpoint: where events are published and replayed, if not beside the daemon's own.
        topic: as the daemon's ``events.topic``.
        timeout: seconds for a replay, and for a snapshot.

    Attributes:
        index: the blocks.
        sequence: number of the last batch that is in the index.
        incarnation: of the daemon whose blocks these are, 0 before the first snapshot.
        exact: whether nothing is missing up to ``sequence``; False until the first snapshot, and after one failed.
        gaps, replays, snapshots: how often batches were missing, were had again, and a snapshot was taken.
        malformed: messages that were no batches.

    Raises:
        InvalidArgument: an endpoint that can be none.
    """

    def __init__(
        self,
        endpoint: str | None = None,
        *,
        events_endpoint: str = "",
        replay_endpoint: str = "",
        topic: str = "",
        timeout: float = 5.0,
    ) -> None:
        beside = default_event_endpoints(check_endpoint(default_endpoint() if endpoint is None else endpoint))
        self.events_endpoint = check_event_endpoint(events_endpoint or beside[0])
        self.replay_endpoint = check_event_endpoint(replay_endpoint or beside[1])
        for wildcard in (self.events_endpoint, self.replay_endpoint):
            if wildcard.startswith("tcp://*"):
                raise InvalidArgument(f"endpoint {wildcard!r} is one to bind; give the host's name to connect")
        self.timeout = timeout
        self.index = BlockIndex()
        self.sequence = -1
        self.incarnation = 0
        self.exact = False
        self.gaps = self.replays = self.snapshots = self.malformed = 0
        self._past: set[int] = set()
        self._heard_s = time.monotonic()
        self._context = zmq.Context(io_threads=1)
        self._dealer: zmq.Socket[bytes] | None = None
        self._sub = self._context.socket(zmq.SUB)
        self._sub.setsockopt(zmq.LINGER, 0)
        self._sub.setsockopt(zmq.RCVHWM, _HWM)
        self._sub.setsockopt(zmq.SUBSCRIBE, topic.encode())
        self._sub.setsockopt(zmq.RECONNECT_IVL_MAX, 1000)
        self._sub.connect(self.events_endpoint)

    # -------------------------------------------------------------- life

    def close(self) -> None:
        """Free the sockets. May be called again."""
        self._close_dealer()
        self._sub.close(0)
        self._context.term()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def silent_s(self) -> float:
        """Seconds since anything was heard: more than a few heartbeats mean that the daemon is gone."""
        return time.monotonic() - self._heard_s

    # -------------------------------------------------------------- following

    def poll(self, timeout: float = 0.0) -> int:
        """Take what was published; how many batches changed the index or its sequence.

        Args:
            timeout: seconds to wait for the first batch. Replays and snapshots have ``self.timeout`` beside it.

        Raises:
            DeadlineExceeded: no answer to a replay or snapshot, or blocks change faster than snapshots can follow. The
                index is as it was; the next ``poll`` tries again.
        """
        applied = 0
        if not self.exact:
            self._resync()
            applied += 1
        wait_ms = int(timeout * 1000)
        for _ in range(_BATCHES_PER_POLL):
            if not self._sub.poll(0 if applied else wait_ms):
                break
            topic, *rest = self._sub.recv_multipart()
            self._heard_s = time.monotonic()
            try:
                if len(rest) != 2:
                    raise InvalidArgument(f"{len(rest) + 1} frames are no batch")
                sequence, batch = decode_number(rest[0]), decode_batch(rest[1])
            except InvalidArgument:
                # Its number, if it was one, will be found missing.
                self.malformed += 1
                continue
            applied += self._take(topic, sequence, batch)
        return applied

    def _take(self, topic: bytes, sequence: int, batch: EventBatch) -> bool:
        incarnation = incarnation_of(topic, batch)
        if incarnation in self._past:
            return False
        if incarnation != self.incarnation:
            before = self.incarnation
            self._resync()
            # What the snapshot does not say it is was before it; more may have been received of that.
            self._past |= {before, incarnation} - {self.incarnation}
            return True
        if sequence <= self.sequence:
            return False
        if sequence != self.sequence + 1:
            self.gaps += 1
            self._close_gap(sequence)
            return True
        self.index.apply(batch.events)
        self.sequence = sequence
        return True

    def _close_gap(self, sequence: int) -> None:
        """Have everything up to a batch that came too early."""
        self.exact = False
        try:
            batches = self._replayed(self.sequence + 1, self.incarnation, time.monotonic() + self.timeout)
        except _Gone:
            self._resync()
            return
        self.replays += 1
        for number, batch in batches:
            self.index.apply(batch.events)
            self.sequence = number
        # Behind the last one that was replayed only batches without events were left out.
        self.sequence = max(self.sequence, sequence)
        self.exact = True

    def _resync(self) -> None:
        """Take a snapshot, in its place whatever was known."""
        self.exact = False
        deadline_s = time.monotonic() + self.timeout
        for _ in range(_SNAPSHOT_TRIES):
            try:
                self._take_snapshot(deadline_s)
                break
            except _Gone:
                continue
        else:
            raise DeadlineExceeded(
                f"{_SNAPSHOT_TRIES} snapshots from {self.replay_endpoint} could not be completed: blocks come and go "
                "faster than events.buffer_steps covers; set more of them"
            )
        self.snapshots += 1
        self.exact = True

    def _take_snapshot(self, deadline_s: float) -> None:
        """Pages are of different moments; what was published from the first one on makes them one."""
        index = BlockIndex()
        page = first = self._page(0, deadline_s)
        index.apply(page.batch.events)
        while page.cursor != NO_CURSOR:
            page = self._page(page.cursor, deadline_s)
            if page.incarnation != first.incarnation:
                raise _Gone
            index.apply(page.batch.events)
        sequence = page.sequence
        if sequence != first.sequence:
            for number, batch in self._replayed(first.sequence + 1, first.incarnation, deadline_s):
                index.apply(batch.events)
                sequence = max(sequence, number)
        self.index, self.sequence, self.incarnation = index, sequence, first.incarnation

    def _page(self, cursor: int, deadline_s: float) -> SnapshotPage:
        page = decode_snapshot_reply(self._ask(snapshot_request(cursor), deadline_s))
        if page.cursor != NO_CURSOR and page.cursor <= cursor:
            raise InvalidArgument(f"{self.replay_endpoint} answers with page {page.cursor} after {cursor}")
        return page

    def _replayed(self, start: int, incarnation: int, deadline_s: float) -> list[tuple[int, EventBatch]]:
        """All batches with events from ``start`` on, which was published."""
        batches: list[tuple[int, EventBatch]] = []
        for topic, number, payload in self._replay(start, deadline_s):
            batch = decode_batch(payload)
            if incarnation_of(topic, batch) != incarnation:
                raise _Gone
            batches.append((number, batch))
        if not batches or batches[0][0] != start:
            raise _Gone
        return batches

    # -------------------------------------------------------------- asking

    def _replay(self, start: int, deadline_s: float) -> Iterator[tuple[bytes, int, bytes]]:
        frames = self._ask(replay_request(start), deadline_s)
        while True:
            if len(frames) != 4 or frames[0]:
                self._close_dealer()
                raise InvalidArgument(f"{self.replay_endpoint} answers with {len(frames)} frames; is it a publisher's?")
            if frames[2] == END_OF_REPLAY:
                return
            yield frames[1], decode_number(frames[2]), frames[3]
            frames = self._answer(deadline_s)

    def _ask(self, request: list[bytes], deadline_s: float) -> list[bytes]:
        # A socket for each request: replies to one that was given up cannot be taken for those to another.
        self._close_dealer()
        self._dealer = self._context.socket(zmq.DEALER)
        self._dealer.setsockopt(zmq.LINGER, 0)
        self._dealer.setsockopt(zmq.RCVHWM, 1000)
        self._dealer.connect(self.replay_endpoint)
        self._dealer.send_multipart(request)
        return self._answer(deadline_s)

    def _answer(self, deadline_s: float) -> list[bytes]:
        if self._dealer is None:
            raise ConnectionLost("the consumer was closed")
        wait_ms = max(int((deadline_s - time.monotonic()) * 1000), 0)
        if not self._dealer.poll(wait_ms):
            self._close_dealer()
            raise DeadlineExceeded(
                f"no answer from {self.replay_endpoint} within {self.timeout:g} s; does the daemon run with "
                "events.publish = true?"
            )
        self._heard_s = time.monotonic()
        return self._dealer.recv_multipart()

    def _close_dealer(self) -> None:
        if self._dealer is not None:
            self._dealer.close(0)
            self._dealer = None
