"""Malformed messages at a live daemon: each is answered with an error or dropped, and others are served meanwhile."""

from __future__ import annotations

import random
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import msgspec
import pytest
from daemon_process import MIB, DaemonProcess, wait_until
from malformed_frames import REQUESTS, frames
from raw_peer import RawPeer

from kvstore.protocol.framing import encode
from kvstore.protocol.messages import ErrorReply, Hello, Put, Reply

MESSAGES = 110_000
BATCH = 400


@dataclass
class Witness:
    """What a well-behaved client saw meanwhile."""

    rounds: int = 0
    slowest_s: float = 0.0
    problems: list[str] = field(default_factory=list)


@contextmanager
def witness(daemon: DaemonProcess) -> Iterator[Witness]:
    """A client that puts, matches and gets all the time, and checks every byte."""
    seen, stop = Witness(), threading.Event()

    def work() -> None:
        rng = random.Random(1)
        with daemon.connect(namespace="witness", timeout=30.0) as client:
            while not stop.is_set():
                key, data = rng.randbytes(32), rng.randbytes(rng.randint(1, 20_000))
                begin = time.monotonic()
                try:
                    client.put(key, data)
                    if client.get(key) not in (data, None) or len(client.match([key])) > 1:
                        seen.problems.append("wrong bytes")
                except Exception as error:  # whatever it is, it is the finding
                    seen.problems.append(repr(error))
                seen.rounds += 1
                seen.slowest_s = max(seen.slowest_s, time.monotonic() - begin)
                time.sleep(0.002)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield seen
    finally:
        stop.set()
        thread.join()


def samples_of(peer: RawPeer) -> list[bytes]:
    """Valid requests of every kind in the peer's own session, so that what is wrong is not only the session."""
    made = []
    for request in REQUESTS:
        fields = {"session": 0 if isinstance(request, Hello) else peer.session, "namespace_id": peer.namespace_id}
        made.append(encode(msgspec.structs.replace(request, **fields)))
    return made


def test_malformed_messages_are_refused_and_others_are_served(daemon: DaemonProcess):
    rng = random.Random(2)
    tags = [encode(request)[1] for request in REQUESTS]
    sent = replies = 0
    with witness(daemon) as seen:
        peer = RawPeer(daemon.endpoint).ready("fuzz")
        before = None
        while sent < MESSAGES:
            # Each message as whole batches of one connection; a mutant may well have said goodbye for it.
            for _, frame in frames(sent, samples_of(peer), tags, 4000):
                payloads = [
                    rng.randbytes(rng.choice([0, 1, 255, 256, 300])) for _ in range(rng.choice([0, 0, 0, 1, 2, 3]))
                ]
                peer.send_frames([frame, *payloads])
                sent += 1
                if sent % BATCH == 0:
                    replies += peer.settle()
            replies += peer.settle()
            peer.close()
            peer = RawPeer(daemon.endpoint).ready("fuzz")
            if before is None:
                before = daemon.resources()
        peer.close()
        assert daemon.alive()
    wait_until(lambda: daemon.resources().fds <= before.fds + 2)
    after = daemon.resources()
    assert not seen.problems, seen.problems[:3]
    assert seen.rounds > 100
    assert seen.slowest_s < 5.0
    assert 0 < replies <= sent
    assert after.threads == before.threads
    assert after.private_bytes < before.private_bytes + 64 * MIB
    with daemon.connect() as client:
        assert client.verify().problems == []
        assert client.stats().server.bad_requests > MESSAGES / 4


@pytest.mark.parametrize("count", [-1, 0, 1, 3, 2**31, 2**64 - 1])
def test_put_whose_count_is_not_that_of_its_frames_is_refused(daemon: DaemonProcess, count: int):
    with RawPeer(daemon.endpoint).ready("fuzz") as peer:
        frames_of_two = [*peer.record(b"a" * 32, b"x"), *peer.record(b"b" * 32, b"y")]
        sent = encode(peer.request(Put, 2))
        peer.send_frames([sent[: -len(encode(2))] + encode(count), *frames_of_two])
        reply: Reply = peer.receive()[0]
        assert isinstance(reply, ErrorReply)
        with daemon.connect(namespace="fuzz") as client:
            assert client.exists([b"a" * 32, b"b" * 32]) == [False, False]


def test_bytes_that_are_no_zeromq_leave_the_daemon_alone(daemon: DaemonProcess):
    rng = random.Random(3)
    with daemon.connect(namespace="plain") as client:
        client.put(b"k" * 32, b"value")
        for _ in range(300):
            with socket.socket(socket.AF_UNIX) as plain:
                plain.connect(str(daemon.socket))
                plain.settimeout(1.0)
                with suppress(BrokenPipeError, ConnectionResetError):
                    plain.sendall(rng.randbytes(rng.choice([0, 1, 9, 10, 64, 5000])))
        assert client.get(b"k" * 32) == b"value"
    with daemon.connect() as client:
        wait_until(lambda: client.ping() < 1.0)


def test_frame_beyond_the_limit_ends_only_its_own_connection(daemon: DaemonProcess):
    with daemon.connect(namespace="plain") as client, RawPeer(daemon.endpoint).ready("fuzz") as peer:
        client.put(b"l" * 32, b"value")
        peer.send_frames([bytes(128 * MIB)])
        assert peer.nothing(0.5)
        assert client.get(b"l" * 32) == b"value"
        assert daemon.resources().private_bytes < 512 * MIB
