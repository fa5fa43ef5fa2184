"""Clients whose blocks are ten times as many as DRAM holds, an SSD tier that does not hold them all either.

Nothing grows, no byte is wrong, the files stay within their limit at every moment, and the state is right throughout.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from daemon_process import MIB, DaemonProcess, child_environment, wait_until

SCRIPT = Path(__file__).with_name("soak_client.py")
CLIENTS = 3
PROMPTS = 400
"""Of 12 blocks of 46 KiB on average: 220 MB."""

DRAM_BYTES = 22 * MIB
SSD_BYTES = 160 * MIB


class DiskUse(threading.Thread):
    """Looks at what the files take, all the time."""

    def __init__(self, directory: Path) -> None:
        super().__init__(daemon=True)
        self._directory = directory
        self._ended = threading.Event()
        self.most_bytes = 0
        self.looks = 0

    def run(self) -> None:
        while not self._ended.wait(0.002):
            used = 0
            for path in self._directory.iterdir():
                with contextlib.suppress(FileNotFoundError):
                    used += path.stat().st_blocks * 512
            self.most_bytes = max(self.most_bytes, used)
            self.looks += 1

    def end(self) -> None:
        self._ended.set()
        self.join()


def soak(directory: Path, seconds: float, seed: int) -> None:
    arguments = ("--slab", "1MiB", "--ssd", str(directory), "--ssd-capacity", str(SSD_BYTES))
    with DaemonProcess(*arguments, "--set", "ssd.reserve_bytes=0", capacity=str(DRAM_BYTES), grant="8MiB") as daemon:
        disk = DiskUse(directory)
        disk.start()
        workers = [
            subprocess.Popen(
                [sys.executable, "-P", str(SCRIPT), daemon.endpoint, str(seed * 100 + number), str(PROMPTS)],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env=child_environment(),
            )
            for number in range(CLIENTS)
        ]
        samples = []
        verified = 0
        try:
            with daemon.connect(namespace="witness", timeout=30.0) as witness:
                end = time.monotonic() + seconds
                while time.monotonic() < end:
                    time.sleep(0.5)
                    samples.append(daemon.resources())
                    if len(samples) % 8 == 0:
                        assert witness.verify().problems == []
                        verified += 1
                    assert all(worker.poll() is None for worker in workers)
                outputs = []
                for worker in workers:
                    worker.kill()
                    outputs.append(worker.communicate(timeout=10)[0])
                wait_until(lambda: len(witness.stats().sessions) == 1, 15.0)
                assert witness.verify().problems == []
                stats = witness.stats()
        finally:
            disk.end()
            for worker in workers:
                worker.kill()
                worker.wait()
                if worker.stdout is not None:
                    worker.stdout.close()
        ssd = stats.ssd
        assert ssd is not None
        assert not [output for output in outputs if "wrong" in output or "Traceback" in output], outputs
        assert sum(line.isdigit() for output in outputs for line in output.split()) > CLIENTS, (
            "the clients did not work"
        )
        assert disk.looks > 100
        assert disk.most_bytes <= SSD_BYTES
        assert (ssd.state, ssd.corrupt_records, ssd.read_errors, ssd.write_errors) == ("ok", 0, 0, 0)
        assert ssd.demoted_blocks > 1000
        assert ssd.promoted_blocks > 200
        assert ssd.evicted_blocks > 50
        assert ssd.checkpoints > 0
        assert verified >= 2
        half = len(samples) // 2
        early, late = samples[half // 2 : half], samples[half:]
        assert max(use.fds for use in late) <= max(use.fds for use in early) + 8
        assert max(use.threads for use in late) <= max(use.threads for use in early)
        assert min(use.private_bytes for use in late) < max(use.private_bytes for use in early) + 32 * MIB


@pytest.mark.timeout(150)
def test_ssd_soak_grows_nowhere_and_gives_no_wrong_byte(tmp_path: Path):
    soak(tmp_path / "ssd", 18.0, 1)


@pytest.mark.stress
@pytest.mark.timeout(900)
def test_ssd_soak_for_long(tmp_path: Path):
    soak(tmp_path / "ssd", 330.0, 2)
