"""KV events of a live daemon: an index that follows them is what the daemon holds, whatever was lost on the way."""

from __future__ import annotations

import contextlib
import random
import socket
import struct
import time
from collections.abc import Iterator
from hashlib import sha256
from typing import Any

import pytest
import zmq
from daemon_process import DaemonProcess, wait_until

from kvstore.errors import DeadlineExceeded
from kvstore.protocol.kv_events import (
    END_OF_REPLAY,
    AllBlocksCleared,
    decode_batch,
    decode_number,
    decode_snapshot_reply,
    encode_number,
    incarnation_of,
    replay_request,
    snapshot_request,
)
from kvstore.protocol.namespace import Namespace
from kvstore.protocol.statistics import EventStats
from kvstore_client import Client
from kvstore_client.events import EventConsumer

PUBLISH = {"KVSTORE_EVENTS__PUBLISH": "true", "KVSTORE_EVENTS__HEARTBEAT_S": "0.1"}
PAYLOAD_BYTES = 3000


def publishing(*arguments: str, capacity: str = "1MiB", **settings: str) -> DaemonProcess:
    """A daemon that publishes; its small tier is full after about 250 blocks of one page."""
    return DaemonProcess(
        *arguments,
        capacity=capacity,
        grant="512KiB",
        environ=PUBLISH | {f"KVSTORE_EVENTS__{name.upper()}": value for name, value in settings.items()},
    )


@pytest.fixture(scope="module")
def daemon() -> Iterator[DaemonProcess]:
    with publishing() as running:
        yield running


def key_of(name: str, number: int) -> bytes:
    return sha256(f"{name} {number}".encode()).digest()


class Traffic:
    """A client that does what clients do, at random, in one namespace, with keys from a small range."""

    def __init__(self, daemon: DaemonProcess, name: str, seed: int, keys: int = 400, clears: bool = True) -> None:
        self.clears = clears
        self.client: Client = daemon.connect(namespace=name, timeout=20.0)
        self.random = random.Random(seed)
        self.keys = [key_of(name, number) for number in range(keys)]
        self.digest = Namespace(name=name).digest(0)

    def step(self) -> None:
        choice = self.random.random()
        first = self.random.randrange(len(self.keys))
        count = self.random.randint(1, 24)
        keys = self.keys[first : first + count]
        if choice < 0.75:
            parent = self.keys[first - 1] if first else None
            self.put(keys, parent)
        elif choice < 0.97:
            self.client.remove(keys)
        elif self.clears:
            self.client.clear()

    def put(self, keys: list[bytes], parent: bytes | None = None, data: bytes = bytes(PAYLOAD_BYTES)) -> None:
        """A chain, at the root or behind a block."""
        self.client.put_many(keys, [data] * len(keys), parent=parent)

    def held(self) -> set[bytes]:
        """Keys that the daemon says it has."""
        return {key for key, there in zip(self.keys, self.client.exists(self.keys), strict=True) if there}

    def close(self) -> None:
        self.client.close()


def settle(consumer: EventConsumer, traffic: Traffic, timeout_s: float = 15.0) -> None:
    """Follow until the index is what the daemon holds; it must stay so."""
    held = traffic.held()

    def same() -> bool:
        consumer.poll(0.05)
        return set(consumer.index.namespaces.get(traffic.digest, {})) == held

    wait_until(same, timeout_s, 0.0)
    for _ in range(3):
        consumer.poll(0.15)
    assert set(consumer.index.namespaces.get(traffic.digest, {})) == held
    assert consumer.exact


@pytest.fixture
def traffic(daemon: DaemonProcess, request: pytest.FixtureRequest) -> Iterator[Traffic]:
    made = Traffic(daemon, f"events-{request.node.name}"[:100], seed=len(request.node.name))
    yield made
    made.client.clear()
    made.close()


# ---------------------------------------------------------------- following


def test_index_of_events_is_what_the_daemon_holds(daemon: DaemonProcess, traffic: Traffic) -> None:
    with EventConsumer(daemon.endpoint) as consumer:
        consumer.poll()
        for number in range(200):
            traffic.step()
            if number % 7 == 0:
                consumer.poll()
        settle(consumer, traffic)
        assert consumer.snapshots == 1, "it could be followed, and was not"
        blocks = consumer.index.namespaces.get(traffic.digest, {})
        numbers = {key: number for number, key in enumerate(traffic.keys)}
        for key, parent in blocks.items():
            assert parent == (traffic.keys[numbers[key] - 1] if numbers[key] else None)


def test_evictions_are_told(daemon: DaemonProcess, traffic: Traffic) -> None:
    with EventConsumer(daemon.endpoint) as consumer:
        consumer.poll()
        for first in range(0, 400, 20):
            traffic.put(traffic.keys[first : first + 20])
        held = traffic.held()
        assert 0 < len(held) < 400, "nothing was evicted"
        settle(consumer, traffic)
        assert traffic.client.stats().eviction.evicted_blocks > 0


def test_late_consumer_begins_with_a_snapshot(daemon: DaemonProcess, traffic: Traffic) -> None:
    for _ in range(60):
        traffic.step()
    with EventConsumer(daemon.endpoint) as consumer:
        consumer.poll()
        assert set(consumer.index.namespaces.get(traffic.digest, {})) == traffic.held()
        for _ in range(30):
            traffic.step()
        settle(consumer, traffic)


def test_snapshot_of_many_pages_while_blocks_come_and_go() -> None:
    with publishing(capacity="16MiB") as daemon:
        traffic = Traffic(daemon, "pages", seed=3, keys=2500, clears=False)
        for first in range(0, 2500, 50):
            traffic.put(traffic.keys[first : first + 50])
        for seed in range(5):
            with Interrupted(daemon.endpoint, lambda: [traffic.step() for _ in range(4)]) as consumer:
                consumer.poll()
                assert consumer.pages >= 4, f"{seed}: {consumer.pages} pages"
                assert set(consumer.index.namespaces.get(traffic.digest, {})) == traffic.held()
                settle(consumer, traffic)
        traffic.close()


class Interrupted(EventConsumer):
    """Something happens before each page of a snapshot."""

    def __init__(self, endpoint: str, between: Any) -> None:
        super().__init__(endpoint, timeout=20.0)
        self.between = between
        self.pages = 0

    def _page(self, cursor: int, deadline_s: float) -> Any:
        self.pages += 1
        self.between()
        return super()._page(cursor, deadline_s)


class Lossy(EventConsumer):
    """Loses some of what was published."""

    def __init__(self, endpoint: str, lost: float, seed: int) -> None:
        super().__init__(endpoint)
        self.random = random.Random(seed)
        self.lost = lost

    def _take(self, topic: bytes, sequence: int, batch: Any) -> bool:
        if self.random.random() < self.lost:
            return False
        return super()._take(topic, sequence, batch)


@pytest.mark.parametrize("lost", [0.1, 0.5, 0.9])
def test_lost_batches_are_replayed(daemon: DaemonProcess, traffic: Traffic, lost: float) -> None:
    with Lossy(daemon.endpoint, lost, seed=int(lost * 10)) as consumer:
        consumer.poll()
        for number in range(150):
            traffic.step()
            if number % 3 == 0:
                consumer.poll()
        settle(consumer, traffic)
        assert consumer.replays > 0
        assert consumer.snapshots == 1, "the ring had all of it"


def test_lost_last_batch_is_found_by_the_heartbeat(daemon: DaemonProcess, traffic: Traffic) -> None:
    with Lossy(daemon.endpoint, 0.0, seed=1) as consumer:
        consumer.poll()
        consumer.lost = 1.0
        traffic.client.put(traffic.keys[0], b"lost")
        wait_until(lambda: consumer._sub.poll(0), 5.0)
        consumer.poll()
        consumer.lost = 0.0
        settle(consumer, traffic)
        assert traffic.keys[0] in consumer.index.namespaces[traffic.digest]


def test_gap_beyond_the_ring_takes_a_snapshot() -> None:
    with publishing(buffer_steps="3") as daemon:
        traffic = Traffic(daemon, "ring", seed=5)
        with Lossy(daemon.endpoint, 0.0, seed=1) as consumer:
            consumer.poll()
            consumer.lost = 1.0
            for _ in range(40):
                traffic.step()
                time.sleep(0.005)
                consumer.poll()
            consumer.lost = 0.0
            settle(consumer, traffic)
            assert consumer.snapshots >= 2
        traffic.close()


@pytest.mark.parametrize("graceful", [True, False])
def test_restarted_daemon_begins_anew(graceful: bool) -> None:
    with publishing() as daemon:
        traffic = Traffic(daemon, "restart", seed=6)
        with EventConsumer(daemon.endpoint) as consumer:
            consumer.poll()
            traffic.put(traffic.keys[:20], data=b"old")
            settle(consumer, traffic)
            assert len(consumer.index) == 20
            before = consumer.incarnation
            if graceful:
                daemon.terminate()
                wait_until(lambda: consumer.poll(0.1) and not len(consumer.index), 5.0)
                daemon.start()
            else:
                daemon.restart()
            wait_until(lambda: consumer.poll(0.1) and consumer.incarnation != before, 10.0)
            assert not len(consumer.index)
            traffic.put(traffic.keys[:7], data=b"new")
            settle(consumer, traffic)
            assert len(consumer.index) == 7
        traffic.close()


def test_invalidated_namespace_is_gone(daemon: DaemonProcess, traffic: Traffic) -> None:
    traffic.client.put(traffic.keys[0], b"old weights")
    with EventConsumer(daemon.endpoint) as consumer:
        consumer.poll()
        assert traffic.digest in consumer.index.namespaces
        traffic.client.invalidate()
        wait_until(lambda: consumer.poll(0.1) and traffic.digest not in consumer.index.namespaces)
        traffic.client.put(traffic.keys[1], b"new weights")
        after = Namespace(name=traffic.client.namespace.name).digest(1)
        wait_until(lambda: consumer.poll(0.1) and after in consumer.index.namespaces)
        assert consumer.index.namespaces[after] == {traffic.keys[1]: None}


def test_namespace_of_parts_is_told_when_all_of_them_are_there(daemon: DaemonProcess) -> None:
    name, key = "events-parts", key_of("parts", 0)
    digest = Namespace(name=name, parts=2).digest(0)
    with daemon.connect(namespace=Namespace(name=name, parts=2)) as client, EventConsumer(daemon.endpoint) as consumer:
        client.put(key, b"half", part=0)
        consumer.poll(0.3)
        assert digest not in consumer.index.namespaces
        client.put(key, b"other half", part=1)
        wait_until(lambda: consumer.poll(0.1) and digest in consumer.index.namespaces)
        client.remove([key])
        wait_until(lambda: consumer.poll(0.1) and digest not in consumer.index.namespaces)


# ---------------------------------------------------------------- the wire


class Sockets:
    """Sockets of a peer that is none of ours, closed at the end."""

    def __init__(self) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._open: list[zmq.Socket[bytes]] = []

    def _socket(self, kind: int, endpoint: str, hwm: int) -> zmq.Socket[bytes]:
        socket = self._context.socket(kind)
        self._open.append(socket)
        socket.setsockopt(zmq.RCVTIMEO, 5000)
        socket.setsockopt(zmq.RCVHWM, hwm)
        if kind == zmq.SUB:
            socket.setsockopt(zmq.SUBSCRIBE, b"")
        socket.connect(endpoint)
        return socket

    def sub(self, daemon: DaemonProcess, hwm: int = 1000) -> zmq.Socket[bytes]:
        """A subscriber to everything."""
        return self._socket(zmq.SUB, f"{daemon.endpoint}.events", hwm)

    def dealer(self, daemon: DaemonProcess, hwm: int = 1000) -> zmq.Socket[bytes]:
        """Somebody who asks for replays and snapshots."""
        return self._socket(zmq.DEALER, f"{daemon.endpoint}.replay", hwm)

    def close(self) -> None:
        for each in self._open:
            each.close(0)
        self._context.term()


@pytest.fixture
def sockets() -> Iterator[Sockets]:
    made = Sockets()
    yield made
    made.close()


def replayed(dealer: zmq.Socket[bytes]) -> list[tuple[bytes, int, bytes]]:
    found = []
    while True:
        empty, topic, sequence, payload = dealer.recv_multipart()
        assert empty == b""
        if sequence == END_OF_REPLAY:
            assert (topic, payload) == (b"", b"")
            return found
        found.append((topic, decode_number(sequence), payload))


def test_requests_that_are_none_are_ignored(sockets: Sockets) -> None:
    malformed: list[list[bytes]] = [
        [b""],
        [b"", b""],
        [b"", b"1"],
        [b"", bytes(9)],
        [b"x", bytes(8)],
        [b"", b"snapshot", b""],
        [b"", b"snapshot", bytes(9)],
        [b"", b"Snapshot", bytes(8)],
        [b"", b"snapshot", bytes(8), b""],
        [b"x"] * 500,
    ]
    with publishing() as daemon:
        for request in malformed:
            dealer = sockets.dealer(daemon)
            dealer.send_multipart(request)
            assert not dealer.poll(20), f"{request} was answered"
            # The same connection goes on.
            dealer.send_multipart(replay_request(1 << 62))
            assert replayed(dealer) == []
        for cursor in (-(1 << 63), -1, 1 << 40, (1 << 63) - 1):
            dealer = sockets.dealer(daemon)
            dealer.send_multipart(snapshot_request(cursor))
            page = decode_snapshot_reply(dealer.recv_multipart())
            assert page.cursor == -1
        dealer = sockets.dealer(daemon)
        dealer.send_multipart([b"", b"\xff" * 8])
        assert replayed(dealer) == []
        # A frame that is far too large ends the connection, and nothing else.
        dealer.send_multipart([b"", bytes(1 << 20)])
        fresh = sockets.dealer(daemon)
        fresh.send_multipart(snapshot_request(0))
        assert decode_snapshot_reply(fresh.recv_multipart()).incarnation
        with daemon.connect() as client:
            assert client.stats().server.bad_requests == 0


def test_replay_gives_what_was_published_byte_for_byte(sockets: Sockets) -> None:
    with publishing(topic="kv@here") as daemon:
        sub = sockets.sub(daemon)
        published = [sub.recv_multipart()]  # a heartbeat: the subscription has arrived
        traffic = Traffic(daemon, "bytes", seed=8)
        for _ in range(20):
            traffic.step()
            time.sleep(0.01)
        traffic.close()
        while sub.poll(300 if len(published) < 40 else 0):
            published.append(sub.recv_multipart())
        first = decode_number(published[0][1])
        assert [decode_number(sequence) for _, sequence, _ in published] == list(range(first, first + len(published)))
        told = {decode_number(sequence): (topic, payload) for topic, sequence, payload in published}
        with_events = {number for number, (_, payload) in told.items() if decode_batch(payload).events}
        assert with_events
        for number, (topic, payload) in told.items():
            heartbeat = topic.startswith(b"kv@herekvstore.heartbeat.")
            assert heartbeat == (number not in with_events)
            assert heartbeat or topic == b"kv@here"
            assert incarnation_of(topic, decode_batch(payload))
        dealer = sockets.dealer(daemon)
        dealer.send_multipart(replay_request(first))
        again = replayed(dealer)
        assert again[0][1] == first
        assert [number for _, number, _ in again[1:] if number in told] == sorted(with_events - {first})
        assert all(told[number] == (topic, payload) for topic, number, payload in again if number in with_events)


def test_consumers_that_do_not_read_hold_nobody_up(sockets: Sockets) -> None:
    with publishing(hwm="10", capacity="1MiB") as daemon:
        traffic = Traffic(daemon, "slow", seed=9)
        sockets.sub(daemon, hwm=1)
        for _ in range(100):
            traffic.step()
        # Each asks for all there is and takes none of it; some of them vanish.
        for number in range(12):
            dealer = sockets.dealer(daemon, hwm=1)
            for _ in range(6):
                dealer.send_multipart(replay_request(0))
            if not number % 2:
                dealer.close(0)
        with EventConsumer(daemon.endpoint, timeout=10.0) as consumer:
            consumer.poll()
            for number in range(150):
                traffic.step()
                if number % 5 == 0:
                    consumer.poll()
            settle(consumer, traffic)
        slowest_s = 0.0
        for _ in range(50):
            began = time.monotonic()
            traffic.client.exists(traffic.keys[:1])
            slowest_s = max(slowest_s, time.monotonic() - began)
        assert slowest_s < 2.0
        traffic.close()


def test_first_batch_of_a_life_says_that_all_is_gone_and_is_beyond_those_of_earlier_lives(sockets: Sockets) -> None:
    """Whoever knows of no incarnations asks for what it missed, and is told."""
    with publishing() as daemon:
        sub, expected = sockets.sub(daemon), 0
        began = time.time() * 1e6
        for _ in range(2):
            _, sequence, _ = sub.recv_multipart()
            while decode_number(sequence) < expected:  # of the life before, and still on its way
                _, sequence, _ = sub.recv_multipart()
            assert decode_number(sequence) > began - 60e6
            dealer = sockets.dealer(daemon)
            dealer.send_multipart(replay_request(expected))
            batches = replayed(dealer)
            events = decode_batch(batches[0][2]).events
            assert [type(event) for event in events] == [AllBlocksCleared]
            expected = decode_number(sequence) + 1000
            daemon.restart()


def test_snapshot_has_what_was_put_before_it(daemon: DaemonProcess) -> None:
    with daemon.connect(namespace="own puts") as client:
        digest = Namespace(name="own puts").digest(0)
        for number in range(20):
            client.put(key_of("own", number), b"there")
            with EventConsumer(daemon.endpoint) as consumer:
                consumer.poll()
                assert key_of("own", number) in consumer.index.namespaces[digest]
        client.clear()


def test_puts_in_a_row_are_few_batches_and_counted(daemon: DaemonProcess) -> None:
    with daemon.connect(namespace="counted", mapped=False) as client:
        wait_until(lambda: not told(client).waiting_blocks)
        before = told(client)
        for number in range(0, 200, 4):
            client.put_many([key_of("counted", number + each) for each in range(4)], [b"there"] * 4)
        wait_until(lambda: not told(client).waiting_blocks)
        after = told(client)
        assert after.stored_blocks - before.stored_blocks == 200
        assert 0 < after.batches - before.batches < 50, "a batch for each put"
        client.remove([key_of("counted", 0)])
        wait_until(lambda: told(client).removed_blocks == after.removed_blocks + 1)
        client.clear()


def told(client: Client) -> EventStats:
    events = client.stats().events
    assert events is not None
    return events


@pytest.mark.parametrize("subscription_bytes", [2000, 4_000_000])
def test_subscription_that_is_too_long_ends_its_connection_and_costs_nothing(subscription_bytes: int) -> None:
    """Spoken by hand: libzmq would keep some 50 bytes for each byte of it."""
    with publishing() as daemon:
        before = daemon.resources().private_bytes
        with socket.socket(socket.AF_UNIX) as peer:
            peer.settimeout(5.0)
            peer.connect(f"{daemon.endpoint.removeprefix('ipc://')}.events")
            peer.sendall(b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32))
            ready = b"\x05READY\x0bSocket-Type" + struct.pack(">I", 3) + b"SUB"
            peer.sendall(bytes([4, len(ready)]) + ready)
            with contextlib.suppress(ConnectionError):  # it may be over before all of it is sent
                peer.sendall(b"\x02" + struct.pack(">Q", 1 + subscription_bytes) + b"\x01" + bytes(subscription_bytes))
            with contextlib.suppress(ConnectionError):
                while peer.recv(4096):
                    pass
        assert daemon.resources().private_bytes - before < 50 << 20
        with EventConsumer(daemon.endpoint) as consumer:
            consumer.poll()
            assert consumer.exact


def test_clean_stop_says_that_all_blocks_are_gone(sockets: Sockets) -> None:
    with publishing() as daemon:
        sub = sockets.sub(daemon)
        sub.recv_multipart()
        daemon.terminate()
        events: list[Any] = []
        while not events:
            events = decode_batch(sub.recv_multipart()[2]).events
        assert len(events) == 1
        assert isinstance(events[0], AllBlocksCleared)
        assert daemon.files() == []


def test_clearing_everything_is_one_event(sockets: Sockets) -> None:
    with publishing() as own:
        traffic, other = Traffic(own, "one", seed=1), Traffic(own, "two", seed=2)
        sub = sockets.sub(own)
        sub.recv_multipart()
        for each in (traffic, other):
            each.put(each.keys[:9], data=b"there")
        time.sleep(0.2)
        for each in (traffic, other):
            each.client.clear()
            time.sleep(0.2)
        kinds: list[str] = []
        while AllBlocksCleared.__name__ not in kinds:
            kinds += [type(event).__name__ for event in decode_batch(sub.recv_multipart()[2]).events]
        # A put may be told in pieces; a clear is told at once.
        stored = kinds.count("BlockStored")
        assert 2 <= stored <= 18
        assert kinds[stored:] == ["BlockRemoved", "AllBlocksCleared"]
        traffic.close()
        other.close()


def test_endpoint_of_another_daemon_is_refused(daemon: DaemonProcess) -> None:
    other = DaemonProcess(environ=PUBLISH | {"KVSTORE_EVENTS__ENDPOINT": f"{daemon.endpoint}.events"})
    try:
        status, line = other.refused()
        assert status
        assert "events.endpoint" in line
        assert other.files() == []
    finally:
        other._remove()


def test_consumer_of_a_daemon_without_events_says_so() -> None:
    with DaemonProcess() as silent, EventConsumer(silent.endpoint, timeout=0.3) as consumer:
        with pytest.raises(DeadlineExceeded, match=r"events\.publish"):
            consumer.poll()
        assert not consumer.exact
        assert silent.files()


def test_numbers_of_frames_are_big_endian() -> None:
    assert encode_number(258) == b"\0\0\0\0\0\0\1\2"
    assert encode_number(-1) == END_OF_REPLAY == b"\xff" * 8
