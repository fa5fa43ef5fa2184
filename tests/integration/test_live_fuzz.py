"""Malformed messages at a live daemon: each is answered or dropped as the protocol says, and others are served.

The fuzzer's requests are right up to their wounds: their session lives and their namespace is joined, so that what is
wrong reaches every part of the daemon, not only the check of the session.
"""

from __future__ import annotations

import json
import random
import socket
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress

import msgspec
import pytest
import xxhash
from daemon_process import MIB, DaemonProcess, read_line, script, wait_until
from malformed_frames import REQUESTS, frames
from raw_peer import RawPeer

from kvstore.errors import ErrorCode, InvalidArgument
from kvstore.format.record import Buffer
from kvstore.protocol.framing import decode_request, encode, request_id
from kvstore.protocol.messages import (
    Bye,
    Chains,
    ChainsReply,
    ErrorReply,
    Get,
    Hello,
    Put,
    PutReply,
    PutStatus,
    Record,
    Recorded,
    Reply,
    Verify,
    VerifyReply,
    Warm,
    Warmed,
    Why,
    WhyReply,
)
from kvstore.protocol.version import MAX_PAYLOAD_FRAMES

MESSAGES = 150_000
CHUNK = 16
"""Messages after which the fuzzer looks whether its session survived them."""

SESSION = 0x2B5C_71E9_D3A8_460F
NAMESPACE = 0x7EAD_BEEF
"""Stand for the session's and the namespace's number until a frame is sent."""

WITNESS = """
import json, random, sys, threading, time
from kvstore_client import Client
stop = threading.Event()
threading.Thread(target=lambda: (sys.stdin.read(1), stop.set()), daemon=True).start()
rng = random.Random(1)
latencies, problems, mine = [], [], {}
with Client(sys.argv[1], namespace="witness", timeout=10.0) as client:
    print("ready", flush=True)
    while not stop.is_set():
        key, data = rng.randbytes(32), rng.randbytes(rng.randint(1, 20_000))
        begin = time.monotonic()
        try:
            client.put(key, data)
            mine[key] = data
            asked = rng.choice(list(mine))
            if client.get(asked) != mine[asked]:
                problems.append("a block is gone or wrong")
            if len(client.match([key], lease=0.5)) != 1:
                problems.append("no match")
        except Exception as error:
            problems.append(repr(error))
        latencies.append(time.monotonic() - begin)
        if len(mine) > 200:
            client.remove(list(mine))
            mine.clear()
        time.sleep(0.002)
latencies.sort()
at = lambda share: latencies[int(share * (len(latencies) - 1))]
print(json.dumps({"rounds": len(latencies), "p50": at(0.5), "p99": at(0.99), "max": at(1), "problems": problems[:5]}))
"""


@contextmanager
def witness(daemon: DaemonProcess) -> Iterator[dict[str, object]]:
    """A well-behaved client in a process of its own; what it saw is there after the ``with``."""
    seen: dict[str, object] = {}
    with script(WITNESS, daemon.endpoint) as process:
        assert read_line(process) == "ready"
        yield seen
        output, _ = process.communicate("x", timeout=30)
        seen |= json.loads(output)


class Fuzzer:
    """Sends malformed messages in a session that it renews whenever one of them has ended it."""

    def __init__(self, daemon: DaemonProcess) -> None:
        self.peer = RawPeer(daemon.endpoint).ready("fuzz")
        self.sent = self.renewed = 0
        self.outcomes: Counter[str] = Counter()

    def send(self, chunk: Sequence[list[Buffer]]) -> None:
        """Send messages, and check that each one got exactly the replies it must get."""
        names = {
            SESSION.to_bytes(8, "big"): self.peer.session.to_bytes(8, "big"),
            NAMESPACE.to_bytes(4, "big"): self.peer.namespace_id.to_bytes(4, "big"),
        }
        most = least = 0
        refused: set[int] = set()
        accepted: set[int] = set()
        for header, *payloads in chunk:
            frame = bytes(header)
            for name, value in names.items():
                frame = frame.replace(name, value)
            self.peer.send_frames([frame, *payloads])
            number = request_id(frame)
            try:
                request = decode_request(frame)
            except InvalidArgument:
                least += number is not None
                most += number is not None
                refused |= {number} if number is not None else set()
            else:
                # A goodbye is answered only where it is refused, what takes time when it is done.
                least += not isinstance(request, (Bye, Chains, Record, Verify, Warm, Why))
                most += 1
                accepted.add(request.id)
        self.sent += len(chunk)
        replies = self.settled()
        assert least <= len(replies) <= most, (len(replies), least, most)
        for reply in replies:
            self.outcomes[type(reply).__name__] += 1
            if reply.id in refused - accepted:
                assert isinstance(reply, ErrorReply)
                assert reply.code == ErrorCode.BAD_REQUEST
            assert not (isinstance(reply, ErrorReply) and reply.code == ErrorCode.INTERNAL), reply

    def settled(self) -> list[Reply]:
        """All replies to what was sent; a new session where the old one has ended."""
        marker = (1 << 64) - 1 - self.sent
        self.peer.send(self.peer.request(Get, b"", 0, id=marker))
        replies: list[Reply] = []
        while True:
            reply, _ = self.peer.receive(30.0)
            if reply.id == marker:
                break
            if not isinstance(reply, (ChainsReply, Recorded, VerifyReply, Warmed, WhyReply)):
                replies.append(reply)
        if isinstance(reply, ErrorReply):
            self.renewed += 1
            self.peer.ready("fuzz")
        return replies

    def close(self) -> None:
        self.peer.settle()
        self.peer.send(self.peer.request(Bye))
        self.peer.close()


def chunks(messages: Iterator[list[Buffer]]) -> Iterator[list[list[Buffer]]]:
    chunk: list[list[Buffer]] = []
    for message in messages:
        chunk.append(message)
        if len(chunk) == CHUNK:
            yield chunk
            chunk = []
    yield chunk


def messages(seed: int, count: int) -> Iterator[list[Buffer]]:
    """Malformed requests of all kinds, some with payload frames that do not belong to them, well mixed."""
    rng = random.Random(seed)
    samples = []
    for request in REQUESTS:
        session = 0 if isinstance(request, Hello) else SESSION
        samples.append(encode(msgspec.structs.replace(request, session=session, namespace_id=NAMESPACE)))
    tags = [sample[1] for sample in samples]
    made = [frame for _, frame in frames(seed, samples, tags, count)]
    for frame in rng.sample(made, min(count, len(made))):
        payloads = []
        if rng.random() < 0.2:
            payloads = [rng.randbytes(rng.choice([0, 1, 32, 255, 256, 257, 5000])) for _ in range(rng.randint(1, 5))]
        yield [frame, *payloads]


def test_malformed_messages_are_refused_and_others_are_served(daemon: DaemonProcess):
    with ExitStack() as stack:
        fuzzers = [Fuzzer(daemon) for _ in range(3)]
        for fuzzer in fuzzers:
            stack.callback(fuzzer.close)
        for chunk in chunks(messages(0, 5000)):
            fuzzers[0].send(chunk)
        before = daemon.resources()
        with witness(daemon) as seen:
            for number, chunk in enumerate(chunks(messages(1, MESSAGES))):
                fuzzers[number % 3].send(chunk)
        outcomes = sum((fuzzer.outcomes for fuzzer in fuzzers), Counter[str]())
        renewed = sum(fuzzer.renewed for fuzzer in fuzzers)
        sent = sum(fuzzer.sent for fuzzer in fuzzers)
    assert sent >= MESSAGES
    assert outcomes["ErrorReply"] > MESSAGES // 4, outcomes
    assert len(outcomes) > 8, f"the wounds are too coarse: {outcomes}"
    assert 3 < renewed < sent // CHUNK // 2, f"{renewed} of {sent // CHUNK} chunks ended their session"
    assert seen["problems"] == []
    assert seen["rounds"] > 300  # type: ignore[operator]
    assert seen["p99"] < 0.5, seen  # type: ignore[operator]
    assert seen["max"] < 3.0, seen  # type: ignore[operator]
    wait_until(lambda: daemon.resources().fds <= before.fds)
    after = daemon.resources()
    assert after.threads == before.threads
    assert after.private_bytes < before.private_bytes + 48 * MIB
    with daemon.connect() as client:
        wait_until(lambda: len(client.stats().sessions) == 1)
        stats = client.stats()
        assert (stats.leases, stats.dram.granted_bytes, stats.server.outbound_bytes) == (0, 0, 0)
        assert client.verify().problems == []


# ------------------------------------------------------------------ records


def signed(header: bytes) -> bytes:
    """A record's header with a checksum that is right for whatever it says."""
    return header[:248] + xxhash.xxh3_64_intdigest(header[:248]).to_bytes(8, "little")


def wounded_records(rng: random.Random, peer: RawPeer, count: int) -> Iterator[tuple[list[Buffer], bool]]:
    """Pairs of record frames, and whether the record may be stored."""
    for number in range(count):
        key = rng.choice([rng.randbytes(32), bytes([number % 7 + 1]) * 32])
        payload = rng.randbytes(rng.choice([1, 100, 4000, 66_000]))
        header, _ = peer.record(key, payload, parent=rng.choice([bytes(32), b"p" * 32, rng.randbytes(32)]))
        wound = bytearray(header)
        match rng.randrange(9):
            case 0:
                wound[rng.randrange(256)] ^= 1 << rng.randrange(8)
                yield [bytes(wound), payload], False
            case 1:
                at = rng.randrange(248)
                wound[at : at + rng.randint(1, 8)] = rng.randbytes(8)[: rng.randint(1, 8)]
                yield [signed(bytes(wound[:256].ljust(256, b"\0"))), payload], True
            case 2:
                # The length that the header claims is not that of the payload.
                claimed = rng.choice([0, 255, 256, 258, 1 << 31, 1 << 32, (1 << 64) - 1])
                wound[16:24] = claimed.to_bytes(8, "little")
                yield [signed(bytes(wound)), payload], False
            case 3:
                yield [header, payload + b"x"], False
            case 4:
                yield [header, payload[:-1]], False
            case 5:
                altered = bytearray(payload)
                altered[rng.randrange(len(altered))] ^= 1
                yield [header, bytes(altered)], False
            case 6:
                yield [payload, header], False
            case 7:
                yield [bytes(header)[: rng.randrange(256)], payload], False
            case _:
                yield [header, payload], True


def test_records_that_lie_are_rejected_and_nothing_wrong_is_stored(daemon: DaemonProcess):
    rng = random.Random(4)
    with RawPeer(daemon.endpoint).ready("lies") as peer, daemon.connect(namespace="lies") as client, ExitStack() as end:
        end.callback(client.clear)
        stored: dict[bytes, bytes] = {}
        outcomes: Counter[int] = Counter()
        for _ in range(400):
            records = list(wounded_records(rng, peer, rng.randint(1, 8)))
            reply = peer.put(*(frame for record, _ in records for frame in record))
            assert isinstance(reply, PutReply)
            assert len(reply.statuses) == len(reply.reasons) == len(records)
            for (record, honest), status in zip(records, reply.statuses, strict=True):
                outcomes[status] += 1
                if status == PutStatus.STORED:
                    assert honest, bytes(record[0]).hex()
                    stored[bytes(record[0])[24:56]] = bytes(record[1])
        assert outcomes[PutStatus.REJECTED] > 1000
        assert outcomes[PutStatus.STORED] > 50
        for key, payload in stored.items():
            assert client.get(key) == payload
        assert client.corrupt_records == 0
        assert client.verify().problems == []


@pytest.mark.parametrize("count", [-(1 << 63), -1, 0, 1, 3, 1 << 31, (1 << 64) - 1])
def test_put_whose_count_is_not_that_of_its_frames_is_refused(daemon: DaemonProcess, count: int):
    with RawPeer(daemon.endpoint).ready("fuzz") as peer:
        frames_of_two = [*peer.record(b"a" * 32, b"x"), *peer.record(b"b" * 32, b"y")]
        sent = encode(peer.request(Put, 2))
        peer.send_frames([sent[:-1] + encode(count), *frames_of_two])
        reply, _ = peer.receive()
        assert isinstance(reply, ErrorReply)
        assert reply.code == ErrorCode.BAD_REQUEST
        with daemon.connect(namespace="fuzz") as client:
            assert client.exists([b"a" * 32, b"b" * 32]) == [False, False]


def test_messages_of_odd_frames_are_dropped_or_refused(daemon: DaemonProcess):
    with RawPeer(daemon.endpoint).ready("fuzz") as peer:
        many = MAX_PAYLOAD_FRAMES + 2
        full = encode(peer.request(Put, MAX_PAYLOAD_FRAMES // 2))
        odd: list[list[Buffer]] = [[b""], [b"", b""], [b""] * 100, [b"x"] * many, [full, *[b""] * many]]
        odd += [[encode(peer.request(Get, b"", 0)), b"x" * MIB], [bytes(4 * MIB + 1)], [bytes(4 * MIB)]]
        replies = 0
        for message in odd:
            peer.send_frames(message)
            replies += peer.settle()
        assert replies == 2, "the put and the get are refused, the rest is no request at all"
        record = peer.record(b"c" * 32, b"x")
        peer.send_frames([encode(peer.request(Put, MAX_PAYLOAD_FRAMES // 2)), *record * (MAX_PAYLOAD_FRAMES // 2 + 1)])
        reply, _ = peer.receive()
        assert isinstance(reply, ErrorReply), "frames beyond the limit were taken for none at all"
        with daemon.connect(namespace="fuzz") as client:
            client.clear()


# ------------------------------------------------------------------ below the protocol


def greeting(rng: random.Random) -> bytes:
    """The beginning of a ZMTP connection, right or nearly so."""
    whole = b"\xff" + bytes(8) + b"\x7f" + b"\x03\x00" + b"NULL".ljust(20, b"\0") + b"\0" + bytes(31)
    ready = b"\x04\x19\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER"
    torn = ready[: rng.randrange(len(ready))] + rng.randbytes(9)
    return rng.choice([whole, whole[: rng.randrange(64)], whole + ready, whole + torn])


def test_bytes_that_are_no_zeromq_leave_the_daemon_alone(daemon: DaemonProcess):
    rng = random.Random(3)
    with daemon.connect(namespace="plain", timeout=2.0) as client:
        client.put(b"k" * 32, b"value")
        before = daemon.resources()
        with ExitStack() as kept:
            for number in range(400):
                plain = kept.enter_context(socket.socket(socket.AF_UNIX))
                plain.connect(str(daemon.socket))
                plain.settimeout(1.0)
                with suppress(BrokenPipeError, ConnectionResetError):
                    if number % 2:
                        plain.sendall(greeting(rng))
                    plain.sendall(rng.randbytes(rng.choice([0, 1, 9, 10, 64, 5000])))
                if number % 4:
                    plain.close()
                if number % 20 == 0:
                    assert client.get(b"k" * 32) == b"value"
        wait_until(lambda: daemon.resources().fds <= before.fds)
        assert daemon.resources().private_bytes < before.private_bytes + 16 * MIB
        assert client.get(b"k" * 32) == b"value"
        client.clear()


def test_frame_beyond_the_limit_ends_only_its_own_connection(daemon: DaemonProcess):
    with daemon.connect(namespace="plain") as client, RawPeer(daemon.endpoint).ready("fuzz") as peer:
        client.put(b"l" * 32, b"value")
        before = daemon.resources()
        peer.send_frames([bytes(128 * MIB)])
        assert peer.nothing(0.5)
        assert client.get(b"l" * 32) == b"value"
        assert daemon.resources().private_bytes < before.private_bytes + 64 * MIB
        client.clear()


def test_connections_that_come_and_go_leave_nothing(daemon: DaemonProcess):
    with daemon.connect(namespace="plain") as client:
        before = daemon.resources()
        for number in range(150):
            with RawPeer(daemon.endpoint, same_host=number % 2 == 0) as peer:
                if number % 3:
                    peer.greet()
                    peer.send(peer.request(Bye))
                    if number % 3 == 1:
                        assert peer.error(Get, b"", 0).code == ErrorCode.UNKNOWN_SESSION
        time.sleep(0.1)
        wait_until(lambda: daemon.resources().fds <= before.fds + 4, 15)
        assert len(client.stats().sessions) < 60
