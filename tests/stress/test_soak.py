"""Clients that work, die and freeze at random: nothing grows, nothing leaks, nobody else waits, no byte is wrong."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from daemon_process import MIB, DaemonProcess, child_environment, wait_until, wait_until_nothing_is_lent
from raw_peer import RawPeer

from kvstore.protocol.messages import Get

SCRIPT = Path(__file__).with_name("soak_client.py")
CLIENTS = 4


class Worker:
    """A client process."""

    def __init__(self, daemon: DaemonProcess, seed: int) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(SCRIPT), daemon.endpoint, str(seed)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=child_environment(),
        )
        self.stopped = False

    def end(self) -> str:
        """Kill it; what it printed."""
        self.process.kill()
        output, _ = self.process.communicate(timeout=10)
        return output

    def freeze(self) -> None:
        self.process.send_signal(signal.SIGCONT if self.stopped else signal.SIGSTOP)
        self.stopped = not self.stopped


def soak(seconds: float, seed: int) -> None:
    rng = random.Random(seed)
    # One that is killed between its greeting and its lock is only noticed by its silence.
    arguments = ("--slab", "1MiB", "--set", "limits.session_idle_s=5")
    with DaemonProcess(*arguments, capacity="24MiB", grant="8MiB") as daemon:
        workers = [Worker(daemon, seed * 1000 + number) for number in range(CLIENTS)]
        outputs: list[str] = []
        kills = freezes = 0
        samples = []
        slowest_s = 0.0
        try:
            with daemon.connect(namespace="witness", timeout=10.0) as witness:
                end = time.monotonic() + seconds
                while time.monotonic() < end:
                    time.sleep(rng.uniform(0.1, 0.6))
                    at = rng.randrange(CLIENTS)
                    if rng.random() < 0.35:
                        outputs.append(workers[at].end())
                        workers[at] = Worker(daemon, rng.randrange(1 << 30))
                        kills += 1
                    elif rng.random() < 0.5:
                        workers[at].freeze()
                        freezes += 1
                    slowest_s = max(slowest_s, witness.ping())
                    witness.put(rng.randbytes(32), rng.randbytes(1000))
                    samples.append(daemon.resources())
                outputs.extend([worker.end() for worker in workers])
                # Sessions of the dead end within a few ticks, and with them whatever they held.
                wait_until(lambda: len(witness.stats().sessions) == 1, 15.0)
                stats = witness.stats()
                assert stats.leases == 0
                assert stats.server.outbound_bytes == 0
                # The witness itself was lent slots ahead, which come back once it idles.
                wait_until_nothing_is_lent(witness.stats)
                assert stats.dram.resident_bytes <= stats.dram.capacity_bytes
                assert stats.eviction.evicted_blocks > 1000
                assert stats.lookups.mapped_reads > 100
                assert stats.lookups.gets + stats.lookups.matches - stats.lookups.mapped_reads > 100
                assert stats.eviction.corrupt_records == 0
                assert stats.server.sessions_died >= kills / 2
                assert witness.verify().problems == []
                witness.clear()
        finally:
            for worker in workers:
                worker.process.kill()
                worker.process.wait()
                if worker.process.stdout is not None:
                    worker.process.stdout.close()
        assert not [output for output in outputs if "wrong" in output or "Traceback" in output], outputs
        assert sum(line.isdigit() for output in outputs for line in output.split()) > 5, "the clients did not work"
        assert kills >= 3
        assert freezes >= 3
        assert slowest_s < 5.0
        half = len(samples) // 2
        early, late = samples[half // 2 : half], samples[half:]
        assert max(use.fds for use in late) <= max(use.fds for use in early) + 8
        assert max(use.threads for use in late) <= max(use.threads for use in early)
        assert min(use.private_bytes for use in late) < max(use.private_bytes for use in early) + 32 * MIB


@pytest.mark.timeout(120)
def test_soak_with_clients_killed_and_frozen_leaves_nothing_behind():
    soak(18.0, 1)


@pytest.mark.stress
@pytest.mark.timeout(900)
def test_soak_for_long():
    soak(600.0, 2)


def test_reader_that_stops_reading_is_throttled_and_gives_its_slots_back_when_it_dies():
    limit = 4 * MIB
    with DaemonProcess("--set", f"limits.outbound_bytes_per_session={limit}", capacity="48MiB", grant="8MiB") as daemon:  # noqa: SIM117
        with daemon.connect(namespace="reader") as client:
            keys = [bytes([number]) * 32 for number in range(1, 33)]
            for key in keys:
                client.put(key, key * (1 << 14))
            frozen = RawPeer(daemon.endpoint, same_host=True, receive_hwm=1).ready("reader")
            for _ in range(20):
                frozen.send(frozen.request(Get, b"".join(keys), 0))
            wait_until(lambda: client.stats().lookups.get_throttled > 0)
            stats = client.stats()
            assert stats.server.outbound_bytes <= limit + (1 << 19) + 256
            # Others read on, and what is removed meanwhile waits in limbo for the frozen reader.
            assert client.get(keys[0]) == keys[0] * (1 << 14)
            client.clear()
            assert client.put(keys[0], b"new")
            assert client.get(keys[0]) == b"new"
            frozen.close()
            wait_until(lambda: client.stats().server.outbound_bytes == 0)
            stats = client.stats()
            assert stats.dram.limbo_bytes == 0
            assert client.verify().problems == []
            client.clear()
