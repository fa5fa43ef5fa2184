"""More than the daemon can do at once: it says so, stays inside its limits, and nobody else waits."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from daemon_process import MIB, DaemonProcess, read_line, script, wait_until
from raw_peer import RawPeer

from kvstore.protocol.framing import encode
from kvstore.protocol.messages import Get, GetReply, GetStatus, Match, Ping, Put, PutReply, Stats
from kvstore_client import AsyncClient, Client, DeadlineExceeded, PutStatus, chain_keys

PAYLOAD = 1_000_000
RECORD = PAYLOAD + 256


def key(number: int) -> bytes:
    return number.to_bytes(4, "big") * 8


def data(number: int, length: int = PAYLOAD) -> bytes:
    return number.to_bytes(4, "big") * (length // 4)


@contextmanager
def others_served(daemon: DaemonProcess, *, within_s: float) -> Iterator[list[float]]:
    """A client beside the others, each of whose operations is right and takes no longer than so."""
    latencies: list[float] = []
    problems: list[str] = []
    stop = threading.Event()

    def work() -> None:
        number = 0
        with daemon.connect(namespace="beside", timeout=within_s) as client:
            while not stop.is_set():
                number = number % 50 + 1
                begin = time.monotonic()
                try:
                    client.put(key(number), data(number, 4000))
                    if client.get(key(number)) not in (data(number, 4000), None):
                        problems.append("wrong bytes")
                except Exception as error:  # whatever it is, it is the finding
                    problems.append(repr(error))
                latencies.append(time.monotonic() - begin)
                time.sleep(0.001)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield latencies
    finally:
        stop.set()
        thread.join()
    assert not problems, problems[:3]
    assert latencies


STOPPED_READER = """
import os, signal, sys, time
from kvstore.format.record import decode_record
from kvstore.protocol.framing import decode_reply, encode
from kvstore.protocol.messages import Get
from kvstore_client import Client
from kvstore_client.session import Ask
keys = bytes.fromhex(sys.argv[2])
client = Client(sys.argv[1], namespace="reader", mapped=False)
client._link.send(encode(client._session.request(Ask(Get, (keys, 0)), 60.0)))
time.sleep(float(sys.argv[3]))
os.kill(os.getpid(), signal.SIGSTOP)
while (message := client._link.receive()) is None:
    client._link.wait(1000)
statuses = decode_reply(message[0]).statuses
hit = [keys[32 * at : 32 * at + 32] for at, status in enumerate(statuses) if status == 1]
for wanted, frame in zip(hit, message[1], strict=True):
    header, payload = decode_record(frame)
    assert header.key == wanted, "another block's record"
    assert bytes(payload) == wanted[:4] * (len(payload) // 4), "wrong bytes"
print(len(hit))
"""


@contextmanager
def stopped_reader(daemon: DaemonProcess, client: Client, keys: list[bytes]) -> Iterator[subprocess.Popen[str]]:
    """A client that asked for blocks and stopped before it read them."""
    for attempt in range(20):
        with script(STOPPED_READER, daemon.endpoint, b"".join(keys).hex(), str(0.0005 * attempt)) as process:
            os.waitpid(process.pid, os.WUNTRACED)
            # It may have stopped before its request left, or after the reply was there.
            if client.ping() and client.ping() and client.stats().server.outbound_bytes:
                yield process
                return
    raise AssertionError("no reader stopped in the middle of its reply")


# ------------------------------------------------------------------ readers that do not read


@pytest.fixture
def reading() -> Iterator[tuple[DaemonProcess, Client, list[bytes]]]:
    """A daemon that holds 24 large blocks and a small one."""
    with (
        DaemonProcess(capacity="32MiB", grant="8MiB") as daemon,
        daemon.connect(namespace="reader", payload_bytes=[PAYLOAD], timeout=10.0) as client,
    ):
        keys = [key(number) for number in range(1, 26)]
        for number in range(1, 25):
            assert client.put(key(number), data(number)) is PutStatus.STORED
        assert client.put(key(25), data(25, 400)) is PutStatus.STORED
        yield daemon, client, keys


Reading = tuple[DaemonProcess, Client, list[bytes]]


@pytest.mark.parametrize("small", ["first", "last"])
def test_slots_on_their_way_to_a_stopped_reader_are_not_reused(reading: Reading, small: str):
    """Also not where the reply's last record is so small that libzmq copied it at once."""
    daemon, client, keys = reading
    order = keys if small == "last" else keys[::-1]
    with stopped_reader(daemon, client, order) as process:
        statuses = [client.put(key(number), data(number)) for number in range(101, 151)]
        assert statuses.count(PutStatus.STORED) > 5
        assert client.stats().dram.limbo_bytes > 0
        os.kill(process.pid, signal.SIGCONT)
        assert read_line(process) == "25"
        assert process.wait(10) == 0
    wait_until(lambda: client.stats().server.outbound_bytes == client.stats().dram.limbo_bytes == 0)
    assert client.verify().problems == []


def test_stopped_reader_keeps_nobody_from_writing(reading: Reading):
    """What it was to read holds slots, but only those; others get the rest of the tier."""
    daemon, client, keys = reading
    with stopped_reader(daemon, client, keys) as process:
        refused = 0
        for number in range(101, 161):
            begin = time.monotonic()
            while client.put(key(number), data(number)) is not PutStatus.STORED:
                refused += 1
                assert time.monotonic() - begin < 2.0, f"put {number} was refused for two seconds"
                time.sleep(0.01)
            assert client.get(key(number)) == data(number)
        stats = client.stats()
        assert stats.server.outbound_bytes > 20 * MIB
        assert stats.dram.resident_bytes + stats.dram.limbo_bytes <= stats.dram.arena_bytes
        assert refused < 40
        process.kill()
        process.wait()
        wait_until(lambda: client.stats().server.outbound_bytes == client.stats().dram.limbo_bytes == 0, 5)
        for number in range(201, 240):
            assert client.put(key(number), data(number)) is PutStatus.STORED
        stats = client.stats()
        assert stats.dram.resident_bytes > stats.dram.capacity_bytes - 2 * MIB
    assert client.verify().problems == []


def test_get_larger_than_the_outbound_limit_arrives_in_turns():
    with (
        DaemonProcess("--set", "limits.outbound_bytes_per_session=3MiB") as daemon,
        daemon.connect(timeout=10.0, mapped=False) as client,
    ):
        keys = [key(number) for number in range(1, 31)]
        for number in range(1, 31):
            client.put(key(number), data(number))
        for _ in range(5):
            outs = [bytearray(PAYLOAD) for _ in keys]
            assert client.get_many_into(keys, outs) == [PAYLOAD] * 30
            assert outs == [data(number) for number in range(1, 31)]
        assert client.stats().server.outbound_bytes <= 3 * MIB


def test_block_larger_than_the_outbound_limit_is_read_alone():
    with (
        DaemonProcess("--set", "limits.outbound_bytes_per_session=4KiB") as daemon,
        daemon.connect(timeout=10.0, mapped=False) as client,
    ):
        for number in range(1, 4):
            client.put(key(number), data(number))
        for _ in range(20):
            for number in range(1, 4):
                assert client.get(key(number)) == data(number)


def test_raw_reader_over_its_limit_is_throttled_and_others_are_not():
    with (
        DaemonProcess("--set", "limits.outbound_bytes_per_session=4MiB") as daemon,
        daemon.connect(namespace="reader") as client,
    ):
        for number in range(1, 25):
            client.put(key(number), data(number))
        keys = b"".join(key(number) for number in range(1, 25))
        with stopped_reader(daemon, client, [key(number) for number in range(1, 25)]) as process:
            stats = client.stats()
            assert stats.server.outbound_bytes <= 4 * MIB
            assert stats.lookups.get_throttled >= 20
            with RawPeer(daemon.endpoint).ready("reader") as peer:
                reply = peer.ask(Get, keys, 0)
                assert isinstance(reply, GetReply)
                assert GetStatus.HIT in reply.statuses
                assert GetStatus.THROTTLED in reply.statuses
            process.kill()
        wait_until(lambda: client.stats().server.outbound_bytes == 0)


# ------------------------------------------------------------------ floods


def rss_limit(daemon: DaemonProcess, extra_bytes: int) -> Callable[[], None]:
    before = daemon.resources().private_bytes

    def check() -> None:
        grown = daemon.resources().private_bytes - before
        assert grown < extra_bytes, f"the daemon grew by {grown >> 20} MiB"

    return check


def test_flood_of_a_client_that_never_reads_its_replies_harms_nobody(daemon: DaemonProcess):
    """Requests whose replies are much larger than they are; replies that find no room are dropped."""
    check = rss_limit(daemon, 192 * MIB)
    with others_served(daemon, within_s=5.0) as latencies, RawPeer(daemon.endpoint, receive_hwm=1) as peer:
        peer.ready("flood")
        asked = chain_keys(range(2000), 1)
        requests = [
            encode(peer.request(Match, b"".join(asked), 0)),
            encode(peer.request(Stats)),
            encode(peer.request(Ping)),
            b"\xc1 no request",
        ]
        end = time.monotonic() + 4.0
        sent = 0
        while time.monotonic() < end:
            peer.send(requests[sent % 4])
            sent += 1
            if sent % 500 == 0:
                check()
    check()
    assert sent > 2000
    assert sorted(latencies)[len(latencies) * 9 // 10] < 1.0
    with daemon.connect() as client:
        wait_until(lambda: client.ping() < 0.5)


def test_flood_of_large_puts_stays_within_memory(daemon: DaemonProcess):
    """What a client sends faster than it is served waits with the client, not in the daemon's memory."""
    check = rss_limit(daemon, 192 * MIB)
    with others_served(daemon, within_s=10.0), RawPeer(daemon.endpoint) as peer:
        peer.ready("flood")
        payload = bytes(900_000)
        frames = [peer.record(key(number), payload) for number in range(1, 41)]
        for _ in range(25):
            for number in range(40):
                peer.send(peer.request(Put, 1), frames[number])
            check()
        replies = peer.settle(60.0)
        assert replies == 1000
        check()
    with daemon.connect(namespace="flood") as client:
        client.clear()


async def test_thousands_of_outstanding_requests_are_served(daemon: DaemonProcess):
    async with AsyncClient(daemon.endpoint, namespace="many", timeout=30.0) as client:
        await client.put(key(1), data(1, 10_000))
        clients = [AsyncClient(daemon.endpoint, namespace="many", timeout=30.0, mapped=False) for _ in range(8)]
        outcomes = await asyncio.gather(*(each.get(key(1)) for each in clients for _ in range(1000)))
        assert set(outcomes) == {data(1, 10_000)}
        for each in clients:
            await each.close()
        await client.clear()


# ------------------------------------------------------------------ late


@contextmanager
def paused(daemon: DaemonProcess) -> Iterator[None]:
    os.kill(daemon.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(daemon.pid, signal.SIGCONT)


def test_payload_requests_that_waited_too_long_are_throttled_and_the_rest_is_served():
    with DaemonProcess("--set", "limits.max_queue_delay_ms=200") as daemon, daemon.connect(timeout=10.0) as client:
        client.put(key(1), b"x")
        outcomes: dict[str, object] = {}
        before = client.stats()

        def note(name: str, operation: Callable[[Client], object]) -> threading.Thread:
            other = daemon.connect(timeout=10.0, mapped=False)

            def run() -> None:
                with other:
                    outcomes[name] = operation(other)

            return threading.Thread(target=run)

        threads = [
            note("put", lambda other: other.put(key(2), b"y")),
            note("get", lambda other: other.get(key(1))),
            note("match", lambda other: len(other.match([key(1)]))),
            note("exists", lambda other: other.exists([key(1)])),
        ]
        with paused(daemon):
            for thread in threads:
                thread.start()
            time.sleep(0.6)
        for thread in threads:
            thread.join()
        assert outcomes["put"] is PutStatus.THROTTLED
        assert outcomes["get"] == b"x", "a get is asked again after a moment"
        assert (outcomes["match"], outcomes["exists"]) == (1, [True])
        stats = client.stats()
        assert stats.server.overloaded - before.server.overloaded == 2
        assert stats.lookups.get_throttled - before.lookups.get_throttled == 1
        assert stats.puts.reasons == {"overloaded": 1}
        assert client.exists([key(2)]) == [False]
        assert client.get(key(1)) == b"x"
        assert client.put(key(2), b"y") is PutStatus.STORED


def test_put_that_its_client_gave_up_is_not_carried_out():
    with (
        DaemonProcess() as daemon,
        daemon.connect(timeout=10.0) as watching,
        daemon.connect(timeout=0.3, mapped=False) as client,
    ):
        with paused(daemon):
            with pytest.raises(DeadlineExceeded):
                client.put(key(1), b"x")
            with pytest.raises(DeadlineExceeded):
                client.get(key(2))
            time.sleep(0.2)
        assert watching.exists([key(1)]) == [False]
        assert watching.stats().server.overloaded >= 1


def test_put_of_a_client_with_a_clock_of_its_own_is_served_late(daemon: DaemonProcess):
    """Another host's clock says nothing here: such a request is never too old."""
    with RawPeer(daemon.endpoint).ready("late") as peer:
        sent = peer.request(Put, 1, sent_ns=1, timeout_ms=1)
        peer.send(sent, peer.record(key(1), b"x"))
        reply, _ = peer.receive()
        assert isinstance(reply, PutReply)
        assert reply.statuses[0] in (PutStatus.STORED, PutStatus.EXISTS)
    with daemon.connect(namespace="late") as client:
        client.clear()
