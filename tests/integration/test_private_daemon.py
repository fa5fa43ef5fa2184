from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kvstore.cli.private_daemon import PrivateDaemon
from kvstore.errors import DaemonUnavailable, DeadlineExceeded, KVStoreError
from kvstore.protocol.endpoint import default_arena_directory, ipc_path
from kvstore_client import Client, PutStatus

MIB = 1 << 20
SMALL = {"capacity_bytes": 8 * MIB, "grant_bytes": 4 * MIB}


def gone(daemon: PrivateDaemon) -> bool:
    directory, arena = ipc_path(daemon.endpoint).parent, default_arena_directory(daemon.endpoint)
    return not directory.exists() and not arena.exists()


def wait_until_dead(pid: int) -> None:
    end = time.monotonic() + 20
    while Path(f"/proc/{pid}").exists() and Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < end
        time.sleep(0.02)


def test_private_daemon_is_populated_and_leaves_nothing() -> None:
    with PrivateDaemon(**SMALL, slab_bytes=1 * MIB, arguments=["--verify", "always"]) as daemon:
        with Client(daemon.endpoint) as client:
            stats = client.stats()
            assert stats.pid == daemon.pid
            assert stats.dram.capacity_bytes == 8 * MIB
            assert stats.dram.slab_bytes == 1 * MIB
            assert stats.dram.populated_bytes == stats.dram.arena_bytes
            assert client.put(b"k" * 32, b"payload") == PutStatus.STORED
        assert "ready" in daemon.stderr_tail()
    assert gone(daemon)
    daemon.close()


def test_private_daemon_ignores_settings_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVSTORE_HTTP", "nonsense")
    monkeypatch.setenv("KVSTORE_CONFIG", "/no/such/file.toml")
    with PrivateDaemon(**SMALL) as daemon:
        assert daemon.pid > 0


def test_private_daemon_with_a_long_temporary_directory_starts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    with PrivateDaemon(**SMALL) as daemon:
        assert len(daemon.endpoint) < 100
    assert gone(daemon)
    assert not list(long.iterdir())


def test_private_daemon_that_refuses_to_start_says_why() -> None:
    daemon = PrivateDaemon(**SMALL, arguments=["--set", "limits.max_sessions=none"])
    with (
        pytest.raises(DaemonUnavailable, match=r"ended with code 2: --set limits.max_sessions = 'none'") as caught,
        daemon,
    ):
        pass
    assert "kvstore: error:" in caught.value.__notes__[0]
    assert gone(daemon)


def test_private_daemon_too_slow_is_given_up() -> None:
    daemon = PrivateDaemon(**SMALL, timeout_s=0.05)
    with pytest.raises(DeadlineExceeded, match=r"has not opened its socket within 0\.05 s"), daemon:
        pass
    assert gone(daemon)


def test_private_daemon_killed_by_somebody_leaves_nothing() -> None:
    with PrivateDaemon(**SMALL) as daemon:
        os.kill(daemon.pid, signal.SIGKILL)
        wait_until_dead(daemon.pid)
    assert gone(daemon)


def test_private_daemon_ends_with_a_body_that_fails() -> None:
    with pytest.raises(ZeroDivisionError), PrivateDaemon(**SMALL) as daemon:
        _ = 1 / 0
    assert gone(daemon)


def test_private_daemon_starts_once() -> None:
    daemon = PrivateDaemon(**SMALL)
    with pytest.raises(KVStoreError, match="not running"):
        _ = daemon.pid
    with daemon, pytest.raises(KVStoreError, match="starts once"):
        daemon.start()


def test_private_daemon_of_a_killed_parent_ends_and_leaves_nothing() -> None:
    script = (
        "import sys\n"
        "from kvstore.cli.private_daemon import PrivateDaemon\n"
        f"daemon = PrivateDaemon(capacity_bytes={8 * MIB}, grant_bytes={4 * MIB})\n"
        "daemon.start()\n"
        "print(daemon.pid, daemon.endpoint, flush=True)\n"
        "sys.stdin.read()\n"
    )
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environ
    ) as parent:
        assert parent.stdout is not None
        pid, endpoint = parent.stdout.readline().split()
        parent.kill()
    wait_until_dead(int(pid))
    assert not ipc_path(endpoint).parent.exists()
    assert not default_arena_directory(endpoint).exists()
