"""The command line as a user meets it: processes, exit statuses and the lines they print."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import termios
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from kvstore.protocol.endpoint import default_arena_directory
from kvstore_client import Client, PutStatus

ROOT = Path(__file__).parents[2]
KVSTORE = [sys.executable, "-P", "-m", "kvstore"]
START_S = 30.0
SMALL = ("--capacity", "8MiB", "--grant", "4MiB")
Start = Callable[..., AbstractContextManager["Daemon"]]


def environment(**more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("KVSTORE_", "COLUMNS"))}
    paths = os.pathsep.join(str(ROOT / part) for part in (".", "client", "kernels"))
    return {**kept, "PYTHONPATH": paths, **more}


def kvstore(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*KVSTORE, *arguments], env=environment(**environ), capture_output=True, text=True, timeout=60, check=False
    )


def refused(done: subprocess.CompletedProcess[str], status: int) -> str:
    """The one line of a command that failed."""
    assert done.returncode == status, done.stderr
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("kvstore: error: ")
    return line.removeprefix("kvstore: error: ")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


class Daemon:
    """``kvstore serve`` in a process of its own."""

    def __init__(self, endpoint: str, log: Path, *arguments: str) -> None:
        self.endpoint = endpoint
        self.log = log
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                [*KVSTORE, "serve", "--endpoint", endpoint, *arguments], env=environment(), stdout=file, stderr=file
            )

    def wait_for(self, word: str) -> None:
        end = time.monotonic() + START_S
        while not re.search(rf"\b{word}\b", self.log.read_text()):
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < end, self.log.read_text()
            time.sleep(0.02)

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(20)


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory with a short name: a socket's path has 107 bytes at most."""
    with tempfile.TemporaryDirectory(prefix="kvs-", dir="/tmp") as name:
        yield Path(name)


@pytest.fixture
def start(directory: Path) -> Start:
    @contextlib.contextmanager
    def started(*arguments: str, name: str = "kv.sock") -> Iterator[Daemon]:
        daemon = Daemon(f"ipc://{directory}/{name}", directory / f"{name}.log", *SMALL, *arguments)
        try:
            daemon.wait_for("ready")
            yield daemon
        finally:
            if daemon.process.poll() is None:
                daemon.process.terminate()
                daemon.process.wait(20)

    return started


# ------------------------------------------------------------------ serve


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_serve_ended_by_a_signal_exits_0_and_leaves_no_files(
    start: Start, directory: Path, number: signal.Signals
) -> None:
    with start("--http", "off") as daemon:
        arena = default_arena_directory(daemon.endpoint)
        assert list(arena.iterdir())
        with Client(daemon.endpoint) as client:
            assert client.put(b"k" * 32, b"payload") == PutStatus.STORED
            assert daemon.end(number) == 0
    assert not arena.exists()
    assert {path.name for path in directory.iterdir()} <= {"kv.sock.log"}
    assert "Traceback" not in daemon.log.read_text()


def test_serve_serves_metrics_and_health(start: Start) -> None:
    port = free_port()
    with start("--http", f"127.0.0.1:{port}") as daemon:

        def page(path: str) -> str:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as response:
                assert response.status == 200
                text: str = response.read().decode()
                return text

        with Client(daemon.endpoint) as client:
            client.put(b"k" * 32, b"payload")
            client.get(b"k" * 32)
        assert json.loads(page("/healthz")) == {"status": "ok"}
        assert json.loads(page("/readyz")) == {"status": "ready"}
        metrics = page("/metrics")
        assert 'kvstore_puts_total{status="stored"} 1.0' in metrics
        assert 'kvstore_lookup_hits_total{operation="get"} 1.0' in metrics
        assert 'kvstore_tier_blocks{tier="dram"} 1.0' in metrics
        assert 'kvstore_tier_capacity_bytes{tier="dram"} 8.388608e+06' in metrics


def test_serve_logs_json_when_asked(start: Start) -> None:
    with start("--http", "off", "--log-format", "json") as daemon:
        daemon.wait_for("populated")
        assert daemon.end() == 0
    events = [json.loads(line) for line in daemon.log.read_text().splitlines()]
    ready = next(event for event in events if event["event"] == "ready")
    assert ready["endpoint"] == daemon.endpoint
    assert ready["level"] == "info"


def test_second_daemon_on_a_socket_is_refused_in_one_line_and_the_first_serves(start: Start) -> None:
    with start("--http", "off") as daemon, Client(daemon.endpoint) as client:
        client.put(b"k" * 32, b"payload")
        line = refused(kvstore("serve", "--endpoint", daemon.endpoint, "--http", "off", *SMALL), 1)
        assert str(daemon.process.pid) in line
        assert daemon.endpoint.removeprefix("ipc://") in line
        assert client.get(b"k" * 32) == b"payload"


def test_second_daemon_in_an_arena_directory_is_refused_in_one_line(start: Start, directory: Path) -> None:
    arena = Path("/dev/shm") / f"kvstore-test-{os.getpid()}"
    arena.mkdir()
    try:
        with start("--http", "off", "--arena-dir", str(arena)):
            other = f"ipc://{directory}/other.sock"
            line = refused(kvstore("serve", "--endpoint", other, "--http", "off", "--arena-dir", str(arena), *SMALL), 1)
            assert str(arena) in line
            assert not (directory / "other.sock").exists()
    finally:
        assert not list(arena.iterdir())
        arena.rmdir()


def test_taken_http_port_is_refused_in_one_line_and_leaves_nothing(directory: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        line = refused(kvstore("serve", "--endpoint", f"{directory}/kv.sock", "--http", address, *SMALL), 1)
    assert address in line
    assert "--http off" in line
    assert list(directory.iterdir()) == []
    assert not default_arena_directory(f"ipc://{directory}/kv.sock").exists()


def test_settings_file_with_a_typo_is_refused_in_one_line(directory: Path) -> None:
    config = directory / "kvstore.toml"
    config.write_text('[dram]\ncapcity_bytes = "8GiB"\n')
    line = refused(kvstore("serve", "--config", str(config)), 2)
    assert line == f"{config}: unknown key 'dram.capcity_bytes'; did you mean dram.capacity_bytes?"


def test_environment_with_a_typo_is_refused_in_one_line() -> None:
    line = refused(kvstore("serve", KVSTORE_DRAM__CAPACITY="8GiB"), 2)
    assert line == ("environment: unknown variable KVSTORE_DRAM__CAPACITY; did you mean KVSTORE_DRAM__CAPACITY_BYTES?")


def test_capacity_beyond_the_machine_is_refused_in_one_line(directory: Path) -> None:
    line = refused(kvstore("serve", "--endpoint", f"{directory}/kv.sock", "--http", "off", "--capacity", "900TiB"), 1)
    assert "--capacity" in line
    assert "/dev/shm" in line
    assert list(directory.iterdir()) == []


# ------------------------------------------------------------------ stats, verify


def test_stats_shows_tables_and_json(start: Start) -> None:
    with start("--http", "off") as daemon:
        with Client(daemon.endpoint) as client:
            client.put_many([bytes([n]) * 32 for n in (1, 2, 3)], [b"x" * 5000] * 3)
            assert client.get(bytes([9]) * 32) is None
        shown = kvstore("stats", "--endpoint", daemon.endpoint)
        by_variable = kvstore("stats", "--json", KVSTORE_ENDPOINT=daemon.endpoint)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "\x1b" not in shown.stdout
    assert max(map(len, shown.stdout.splitlines())) <= 80
    rows = [line.split() for line in shown.stdout.splitlines()]
    assert ["match", "0", "0", "0", "-"] in rows
    assert ["get", "1", "1", "0", "0.0", "%"] in rows
    assert ["records", "3", "0", "0", "0"] in rows
    stats = json.loads(by_variable.stdout)
    assert stats["endpoint"] == daemon.endpoint
    assert stats["puts"]["stored"] == stats["dram"]["blocks"] == 3


def test_stats_into_a_closed_pipe_is_silent(start: Start) -> None:
    with start("--http", "off") as daemon:
        process = subprocess.Popen(
            [*KVSTORE, "stats", "--endpoint", daemon.endpoint],
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert process.stdout is not None
        process.stdout.close()
        _, err = process.communicate(timeout=30)
    assert err == b""


def test_stats_watched_survives_the_daemon(start: Start) -> None:
    """On a terminal: shown, ``waiting`` while the daemon is away, shown again, ended by Ctrl+C."""
    terminal, inner = pty.openpty()
    fcntl.ioctl(inner, termios.TIOCSWINSZ, struct.pack("HHHH", 60, 100, 0, 0))
    with start("--http", "off") as daemon:
        watch = subprocess.Popen(
            [*KVSTORE, "stats", "--endpoint", daemon.endpoint, "--watch", "0.2", "--timeout", "1"],
            env=environment(TERM="xterm-256color"),
            stdin=inner,
            stdout=inner,
            stderr=inner,
            start_new_session=True,
        )
        os.close(inner)
        try:
            read_until(terminal, "Lookups")
            daemon.end()
            read_until(terminal, "waiting for the daemon")
            with start("--http", "off"):
                read_until(terminal, "Lookups")
                watch.send_signal(signal.SIGINT)
                rest = read_until(terminal, None)
            assert watch.wait(10) == 0
            assert "error" not in rest
            assert "Traceback" not in rest
        finally:
            watch.kill()
            watch.wait()
            os.close(terminal)


def read_until(terminal: int, word: str | None) -> str:
    """What a terminal shows until ``word`` appears, or until nobody writes to it any more."""
    text = b""
    end = time.monotonic() + START_S
    while word is None or word.encode() not in text:
        assert time.monotonic() < end, text.decode(errors="replace")
        if select.select([terminal], [], [], 0.2)[0]:
            try:
                more = os.read(terminal, 65536)
            except OSError:  # the other side is closed
                more = b""
            if not more:
                assert word is None, text.decode(errors="replace")
                break
            text += more
    return text.decode(errors="replace")


def test_verify_without_problems_exits_0(start: Start) -> None:
    with start("--http", "off") as daemon:
        with Client(daemon.endpoint) as client:
            client.put(b"k" * 32, b"x" * 5000)
        shown = kvstore("verify", "--endpoint", daemon.endpoint)
        as_json = kvstore("verify", "--endpoint", daemon.endpoint, "--json")
    assert shown.returncode == as_json.returncode == 0
    assert ["problems", "none"] in [line.split() for line in shown.stdout.splitlines()]
    outcome = json.loads(as_json.stdout)
    assert (outcome["records"], outcome["problems"]) == (1, [])


def test_verify_with_a_changed_byte_exits_1_and_names_the_record(start: Start) -> None:
    with start("--http", "off") as daemon:
        payload = bytes(range(256)) * 16
        with Client(daemon.endpoint) as client:
            client.put(b"k" * 32, payload)
        (arena,) = default_arena_directory(daemon.endpoint).glob("arena-*")
        with arena.open("r+b") as file:
            at = file.read().index(payload)
            file.seek(at + 100)
            file.write(b"\xff")
        shown = kvstore("verify", "--endpoint", daemon.endpoint)
        assert daemon.process.poll() is None
    assert shown.returncode == 1, shown.stdout + shown.stderr
    assert (b"k" * 4).hex() in shown.stdout
    assert "checksum" in shown.stdout


@pytest.mark.parametrize("command", ["stats", "verify"])
def test_command_without_a_daemon_is_refused_in_one_line(directory: Path, command: str) -> None:
    begin = time.monotonic()
    line = refused(kvstore(command, "--endpoint", f"{directory}/none.sock", "--timeout", "2"), 1)
    assert time.monotonic() - begin < 10
    assert f"{directory}/none.sock" in line
    assert "kvstore serve" in line


@pytest.mark.parametrize("command", ["stats", "verify"])
def test_command_with_an_impossible_endpoint_is_refused_in_one_line(command: str) -> None:
    assert "tcp://" in refused(kvstore(command, "--endpoint", "tcp://127.0.0.1:1"), 2)


# ------------------------------------------------------------------ the rest


def test_help_needs_no_heavy_module() -> None:
    script = (
        "import sys, kvstore.cli.main\n"
        "heavy = {'zmq', 'numpy', 'torch', 'aiohttp', 'uvloop', 'pydantic', 'prometheus_client', 'kvstore_client'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment(), capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "[]\n"


def test_help_names_every_command() -> None:
    done = kvstore("--help")
    assert done.returncode == 0
    for command in ("serve", "stats", "verify", "replay", "codecs", "layout", "quality", "demo", "bench", "version"):
        assert re.search(rf"\b{command}\b", done.stdout)
