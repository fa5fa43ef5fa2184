"""What one mapped client may hold: hazards, bytes read in place, slots lent ahead; and that others go on meanwhile."""

from __future__ import annotations

import os
import signal
import time
from contextlib import ExitStack

import numpy as np
import pytest
from daemon_process import DaemonProcess, read_line, script, wait_until
from mapped_peer import hazards_of

from kvstore.protocol.statistics import DaemonStats
from kvstore.sizes import parse_size
from kvstore_client import Client, PutStatus

KIB = 1 << 10
HAZARDS = 64


def key(number: int) -> bytes:
    return (number + 1).to_bytes(4, "big") * 8


def data(number: int, length: int) -> bytes:
    return bytes([number % 251]) * length


def hazards(daemon: DaemonProcess, client: Client) -> int:
    """How many records a client reads in place."""
    return hazards_of(daemon.arena_directory, client._session.number)


def lent(stats: DaemonStats, client: Client) -> int:
    """Bytes of slots that a client was lent."""
    return next(each.granted_bytes for each in stats.sessions if each.session == client._session.number)


# ------------------------------------------------------------------ reading in place


@pytest.mark.parametrize(
    ("length", "limit", "held"),
    [(5000, "64MiB", HAZARDS), (100, "8KiB", HAZARDS), (65_281, "256KiB", 4), (5000, "4KiB", 0)],
    ids=["words", "small blocks", "large blocks", "none at all"],
)
def test_views_beyond_a_clients_share_are_copies_and_all_of_them_stay_right(length: int, limit: str, held: int):
    """Also those whose blocks left long ago and whose slots others wait for: the daemon counts as the client does."""
    settings = ("--slab", "256KiB", "--set", f"limits.hazard_bytes_per_session={limit}")
    with (
        DaemonProcess(*settings, capacity="8MiB", grant="4MiB") as daemon,
        daemon.connect(mapped=True, timeout=20.0) as client,
        daemon.connect(mapped=True, timeout=20.0) as other,
    ):
        count = 90
        for number in range(count):
            assert other.put(key(number), data(number, length)) is PutStatus.STORED
        session = client._session.number
        with ExitStack() as views:
            seen = [views.enter_context(client.view(key(number))) for number in range(count)]
            assert hazards(daemon, client) == held
            assert other.remove([key(number) for number in range(count)]) == count
            slot_bytes = -(-(length + 256) // 4096) * 4096
            # What was received as a copy is pinned a moment longer.
            wait_until(lambda: other.stats().dram.limbo_bytes <= held * slot_bytes * 1.125)
            assert other.stats().dram.limbo_bytes >= held * slot_bytes
            if held * slot_bytes > parse_size(limit):
                # Held by payloads within the limit, though not by slots: a tick must see nothing wrong in it.
                time.sleep(2.2)
            for number in range(1000, 1200):
                assert other.put(key(number), data(number, length)) in (PutStatus.STORED, PutStatus.THROTTLED)
            assert [bytes(view or b"") for view in seen] == [data(number, length) for number in range(count)]
            assert client.get(key(1199)) in (data(1199, length), None)
            assert client._session.number == session
            del seen
        assert hazards(daemon, client) == 0
        wait_until(lambda: other.stats().dram.limbo_bytes == 0, 3.0)
        assert other.stats().server.sessions_died == 0
        assert other.verify().problems == []


def test_what_was_made_from_a_view_holds_its_slot_until_the_last_of_it_is_gone():
    with (
        DaemonProcess(capacity="4MiB", grant="2MiB") as daemon,
        daemon.connect(mapped=True) as client,
        daemon.connect(mapped=True) as other,
    ):
        other.put(key(0), data(7, 5000))
        with client.view(key(0)) as seen:
            assert seen is not None
            array, part = np.frombuffer(seen, np.uint8), seen[100:200]
            del seen
        assert hazards(daemon, client) == 1
        other.clear()
        for number in range(1000):
            other.put(key(number), data(9, 5000))
        assert bytes(array) == data(7, 5000)
        del array
        assert hazards(daemon, client) == 1
        assert bytes(part) == data(7, 100)
        del part
        assert client.get(key(999)) == data(9, 5000)
        assert hazards(daemon, client) == 0
        wait_until(lambda: other.stats().dram.limbo_bytes == 0, 3.0)


# ------------------------------------------------------------------ slots lent ahead


def test_slots_lent_ahead_are_bounded_for_each_client_and_for_all(stack: ExitStack):
    settings = ("--slab", "256KiB", "--set", "limits.grant_bytes_per_session=768KiB")
    with DaemonProcess(*settings, capacity="16MiB", grant="2MiB") as daemon:
        clients = [
            stack.enter_context(daemon.connect(mapped=True, timeout=20.0, namespace=f"bounded-{number}"))
            for number in range(6)
        ]
        watching = stack.enter_context(daemon.connect(mapped=False))
        for turn in range(12):
            for number, client in enumerate(clients):
                length = [3000, 20_000, 60_000, 120_000][(turn + number) % 4]
                for block in range(4):
                    mine = 10 * turn + block
                    assert client.put(key(mine), data(mine, length), wait=bool(block % 2)) in (1, 5)
                stats = watching.stats()
                assert max(each.granted_bytes for each in stats.sessions) <= 768 * KIB
                assert stats.dram.granted_bytes <= 2048 * KIB
        for client in clients:
            done = client.flush()
            assert (done.stored, done.throttled, done.rejected) == (24, 0, 0)
        # Who writes no more has nothing lent after a while.
        wait_until(lambda: watching.stats().dram.granted_bytes == 0, 5.0)


@pytest.mark.parametrize("mapped", [True, False], ids=["mapped", "sent"])
def test_slots_of_an_idle_client_are_had_back_at_once_when_another_needs_them(mapped: bool):
    with (
        DaemonProcess("--slab", "512KiB", capacity="8MiB", grant="1MiB") as daemon,
        daemon.connect(mapped=True, namespace="idle") as idle,
        daemon.connect(mapped=mapped, namespace="busy", timeout=20.0) as busy,
    ):
        assert idle.put(key(0), data(0, 3000)) is PutStatus.STORED
        assert idle.put(key(1), data(1, 60_000)) is PutStatus.STORED
        before = lent(busy.stats(), idle)
        assert before > 700 * KIB
        begin = time.monotonic()
        datas = [data(number, 400_000) for number in range(4)]
        assert busy.put_many([key(number) for number in range(4)], datas) == [PutStatus.STORED] * 4
        assert time.monotonic() - begin < 1.0
        assert lent(busy.stats(), idle) < before
        assert [busy.get(key(number)) for number in range(4)] == datas
        # It notices nothing but that it has to ask again.
        for number in range(2, 30):
            assert idle.put(key(number), data(number, 3000)) is PutStatus.STORED
            assert idle.get(key(number)) == data(number, 3000)


WRITER = """
import sys
from kvstore_client import Client
client = Client(sys.argv[1], namespace="writer", mapped=True, timeout=20.0)
print("ready", flush=True)
number = 0
while True:
    number += 1
    client.put(number.to_bytes(4, "big") * 8, bytes([number % 251]) * 30_000, wait=False)
    before = max(number - 20, 1)
    with client.view(before.to_bytes(4, "big") * 8) as found:
        assert found is None or found == bytes([before % 251]) * 30_000
"""


def test_stopped_client_holds_no_more_than_its_share_and_others_go_on():
    settings = ("--slab", "256KiB", "--set", "limits.grant_bytes_per_session=512KiB")
    with DaemonProcess(*settings, capacity="4MiB", grant="1MiB") as daemon:
        with (
            script(WRITER, daemon.endpoint) as writer,
            daemon.connect(mapped=True, timeout=20.0) as mapped,
            daemon.connect(mapped=False, timeout=20.0) as sent,
        ):
            assert read_line(writer) == "ready"
            for turn in range(5):
                time.sleep(0.1)
                os.kill(writer.pid, signal.SIGSTOP)
                longest = 0.0
                for number in range(60):
                    begin = time.monotonic()
                    mine = turn * 100 + number
                    for client in (mapped, sent):
                        told = client.put(key(mine), data(mine, 10_000))
                        assert told in (PutStatus.STORED, PutStatus.EXISTS)
                        assert client.get(key(mine)) == data(mine, 10_000)
                    longest = max(longest, time.monotonic() - begin)
                assert longest < 1.0
                stats = sent.stats()
                held = next(each.granted_bytes for each in stats.sessions if each.pid == writer.pid)
                assert held <= 512 * KIB
                if turn < 4:
                    os.kill(writer.pid, signal.SIGCONT)
            # Of what it was lent ahead and did not take, nothing is left to it after a while.
            wait_until(
                lambda: (
                    next(each.granted_bytes for each in sent.stats().sessions if each.pid == writer.pid)
                    <= 32 * KIB + 4096
                ),
                5.0,
            )
            os.kill(writer.pid, signal.SIGCONT)
            writer.kill()
            writer.wait()
            wait_until(lambda: len(sent.stats().sessions) == 2, 3.0)
            assert sent.verify().problems == []
        with daemon.connect(mapped=False) as last:
            wait_until(lambda: (dram := last.stats().dram).granted_bytes == dram.limbo_bytes == 0, 3.0)


def test_reads_go_on_without_the_daemon_and_reports_that_find_no_room_are_counted():
    """Reports leave room for puts: what a client writes meanwhile is not lost."""
    with DaemonProcess(capacity="8MiB", grant="4MiB") as daemon, daemon.connect(mapped=True, timeout=20.0) as client:
        assert client.put(key(0), data(0, 3000)) is PutStatus.STORED
        out = bytearray(3000)
        os.kill(daemon.pid, signal.SIGSTOP)
        try:
            for _ in range(5000):
                assert client.get_into(key(0), out) == 3000
                assert len(client.match([key(0)])) == 1
            for number in range(1, 100):
                assert client.put(key(number), data(number, 3000), wait=False) is PutStatus.PENDING
        finally:
            os.kill(daemon.pid, signal.SIGCONT)
        assert client.flush().stored == 99
        lookups = client.stats().lookups
        assert lookups.dropped_reports >= 10_000 - 2048
        assert lookups.mapped_reads + lookups.dropped_reports == 10_000


RESTLESS = """
import os, sys, time
sys.path.insert(0, sys.argv[2])
from mapped_peer import MappedPeer
from kvstore.mapped.client_file import CONSUMED_OFFSET, HEAD_OFFSET, RingKind
peer = MappedPeer(sys.argv[1]).join("restless")
for number in range(2048):
    peer.push(RingKind.GET)
peer.ring()
print("ready", flush=True)
words, head, consumed = peer.words, HEAD_OFFSET // 8, CONSUMED_OFFSET // 8
end = time.monotonic() + 2.0
while time.monotonic() < end:
    for _ in range(1000):
        words[head] = words[consumed] + 2000
    peer.ring()
print(peer.consumed, flush=True)
"""


def test_client_that_never_stops_writing_into_its_ring_keeps_nobody_waiting():
    with (
        DaemonProcess(capacity="8MiB") as daemon,
        daemon.connect(mapped=False) as client,
        script(RESTLESS, daemon.endpoint, os.path.dirname(__file__) + "/..") as process,
    ):
        assert read_line(process) == "ready"
        longest = count = 0.0
        end = time.monotonic() + 1.5
        while time.monotonic() < end:
            longest = max(longest, client.ping())
            count += 1
        assert longest < 0.5
        assert count > 20
        assert int(read_line(process)) > 10_000
