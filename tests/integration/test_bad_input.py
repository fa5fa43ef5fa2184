"""What is wrong with sizes, places, permissions and versions is said in one line; nothing is left behind."""

from __future__ import annotations

import asyncio
import importlib
import os
import signal
import socket
import stat
import subprocess
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from daemon_process import MIB, DaemonProcess, wait_until

import kvstore_client.base
import kvstore_client.link
import kvstore_client.session
from kvstore.errors import (
    DaemonUnavailable,
    DeadlineExceeded,
    InsufficientMemory,
    InvalidArgument,
    PermissionRefused,
    ProtocolMismatch,
)
from kvstore.mapped.arena import ARENA_HEADER_BYTES
from kvstore.protocol.version import PROTOCOL_OLDEST, PROTOCOL_VERSION
from kvstore.server.app import Daemon, run
from kvstore.settings import Settings
from kvstore.tiers.files import SharedFile
from kvstore_client import AsyncClient, Client, Namespace, PutStatus, chain_keys

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounting a file system and changing the user need root")
NOBODY = 65534


@pytest.fixture
def small_tmpfs(tmp_path: Path) -> Iterator[Path]:
    """A memory file system of 12 MiB."""
    mounted = tmp_path / "shm"
    mounted.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "kvstore-test", str(mounted)], capture_output=True)
    if done.returncode:
        pytest.skip(f"cannot mount a tmpfs here: {done.stderr.decode().strip()}")
    yield mounted
    subprocess.run(["umount", "-l", str(mounted)], check=True)


def one_line(output: str) -> str:
    assert output.startswith("kvstore: error: "), output
    assert "Traceback" not in output
    return output


@needs_root
def test_arena_larger_than_its_file_system_is_refused_with_sizes_and_remedy(small_tmpfs: Path):
    daemon = DaemonProcess("--arena-dir", str(small_tmpfs / "arena"), capacity="32MiB", grant="4MiB")
    try:
        status, line = daemon.refused()
    finally:
        daemon._remove()
    assert status == 2 or status == 1
    assert "the file system of" in one_line(line)
    assert "12.0 MiB" in line
    assert "--capacity" in line
    assert list(small_tmpfs.iterdir()) == []


async def test_file_system_that_fills_up_while_memory_is_populated_leaves_a_smaller_working_tier(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    slab_bytes = 256 << 10
    allocate = SharedFile.allocate

    def fills_up(file: SharedFile, offset: int, length: int) -> None:
        if offset > ARENA_HEADER_BYTES + 5 * slab_bytes:
            raise InsufficientMemory("there is no room for more")
        allocate(file, offset, length)

    monkeypatch.setattr(SharedFile, "allocate", fills_up)
    dram = {"capacity_bytes": 4 * MIB, "grant_bytes": MIB, "slab_bytes": slab_bytes, "directory": tmp_path / "arena"}
    daemon = Daemon(Settings(endpoint=f"ipc://{tmp_path}/s", http="off", dram=dram))
    await daemon.start()
    try:
        async with AsyncClient(f"ipc://{tmp_path}/s") as client:
            stats = await client.stats()
            while not stats.dram.problem:
                await asyncio.sleep(0.01)
                stats = await client.stats()
            assert stats.dram.populated_bytes == 6 * slab_bytes
            assert "stays smaller than configured: there is no room for more" in stats.dram.problem
            for number in range(1, 60):
                assert await client.put(bytes([number]) * 32, bytes(60_000)) is PutStatus.STORED
            assert await client.get(bytes([59]) * 32) == bytes(60_000)
            assert await client.get(bytes([1]) * 32) is None
            assert (await client.verify()).problems == []
    finally:
        await daemon.stop()
    assert not (tmp_path / "arena").exists()


@pytest.mark.parametrize(
    ("capacity", "message"), [("900TiB", "file system of"), ("1KiB", "at least"), ("8 giga", "unknown unit"), ("0", "")]
)
def test_impossible_capacities_are_refused(capacity: str, message: str):
    daemon = DaemonProcess(capacity=capacity)
    try:
        status, line = daemon.refused()
        assert status != 0
        assert message in one_line(line)
        assert daemon.files() == []
    finally:
        daemon._remove()


def test_block_that_can_never_fit_says_what_limits_it(small_daemon: DaemonProcess):
    with small_daemon.connect(namespace="never") as client:
        key = chain_keys(range(64), 64)[0]
        with pytest.raises(InvalidArgument, match=r"largest record holds \d+; raise dram\.slab_bytes"):
            client.put(key, bytes(2 * MIB))
        assert client.exists([key]) == [False]
        assert client.put(key, b"fits") is PutStatus.STORED
        client.clear()


@pytest.mark.parametrize(
    "options", [{"colour": "red"}, {"parts": 0}, {"codec": "zip"}, {"fidelity": "best"}, {"name": ""}]
)
def test_unknown_and_impossible_namespace_options_are_named(options: dict[str, object]):
    with pytest.raises(InvalidArgument, match=next(iter(options))):
        Namespace.parse(dict(options))


@pytest.mark.parametrize("kind", ["missing", "stale", "file", "directory"])
def test_endpoint_without_a_daemon_is_an_error_at_once(kind: str, tmp_path: Path):
    # Loaded once a process, before the client looks for its daemon: not what is timed here.
    importlib.import_module("kvstore_client.mapped_session")
    path = tmp_path / "s"
    if kind == "stale":
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(str(path))
    elif kind == "file":
        path.write_text("no socket")
    elif kind == "directory":
        path.mkdir()
    begin = time.monotonic()
    with pytest.raises(DaemonUnavailable, match=r"no daemon at ipc://.*kvstore serve"):
        Client(f"ipc://{path}", timeout=5.0)
    assert time.monotonic() - begin < 1.0


def test_listener_that_never_answers_is_given_up_within_the_timeout(tmp_path: Path):
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "s"))
        listening.listen(8)
        begin = time.monotonic()
        with pytest.raises((DeadlineExceeded, DaemonUnavailable)):
            Client(f"ipc://{tmp_path}/s", timeout=0.7)
        assert time.monotonic() - begin < 3.0


def test_client_of_another_protocol_is_told_both_versions(daemon: DaemonProcess, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kvstore_client.session, "PROTOCOL_OLDEST", 90)
    monkeypatch.setattr(kvstore_client.session, "PROTOCOL_VERSION", 99)
    spoken = rf"speaks protocol {PROTOCOL_OLDEST} to {PROTOCOL_VERSION}\b.*90 to 99; install the same version"
    with pytest.raises(ProtocolMismatch, match=spoken):
        daemon.connect()
    monkeypatch.undo()
    with daemon.connect() as client:
        client.ping()


def as_nobody(work: Callable[[], str]) -> str:
    """What ``work`` returns in a forked child of another user, who may not be able to read this tree."""
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if not child:
        try:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            said = work()
        except BaseException as error:
            said = f"{type(error).__name__} {error}"
        os.write(writing, said.encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    return said


def ping(endpoint: str) -> str:
    with Client(endpoint, timeout=3.0) as client:
        return f"in {client.ping() > 0}, mapped {client.mapped} {client.unmapped}"


@needs_root
def test_other_users_are_kept_out_unless_the_mode_lets_them_in():
    with DaemonProcess() as daemon:
        daemon.directory.chmod(0o755)
        assert stat.S_IMODE(daemon.socket.stat().st_mode) == 0o600
        said = as_nobody(lambda: ping(daemon.endpoint))
        assert said.startswith("PermissionRefused")
        assert "access.mode" in said
    with DaemonProcess("--mode", "0666") as daemon:
        daemon.directory.chmod(0o755)
        assert as_nobody(lambda: ping(daemon.endpoint)) == "in True, mapped True "


@needs_root
def test_daemon_without_access_to_its_directories_says_which(tmp_path: Path):
    place = tmp_path / "place"
    place.mkdir(mode=0o755)
    for parent in (tmp_path, tmp_path.parent, tmp_path.parent.parent):
        parent.chmod(0o755)

    def serve() -> str:
        return str(run(Settings(endpoint=f"ipc://{place}/s", http="off", dram={"capacity_bytes": 4 * MIB})))

    said = as_nobody(serve)
    assert said.startswith("PermissionRefused")
    assert str(place) in said
    assert list(place.iterdir()) == []


@pytest.mark.parametrize("kind", ["file", "link", "directory"])
def test_endpoint_that_is_something_else_is_refused_and_left_alone(kind: str, tmp_path: Path):
    target = tmp_path / "precious"
    target.write_text("data")
    place = {"file": target, "link": tmp_path / "link", "directory": tmp_path / "folder"}[kind]
    if kind == "link":
        place.symlink_to(target)
    elif kind == "directory":
        place.mkdir()
    daemon = DaemonProcess()
    try:
        status, line = daemon.refused("--endpoint", str(place))
        assert status != 0
        assert "exists and is no socket" in one_line(line)
        assert target.read_text() == "data"
        assert os.path.lexists(place)
    finally:
        daemon._remove()


@needs_root
@pytest.mark.parametrize("mapped", ["true", "false"])
def test_full_file_system_keeps_no_client_out_and_leaks_nothing(small_tmpfs: Path, mapped: str):
    arguments = ("--arena-dir", str(small_tmpfs / "arena"), "--slab", "256KiB", "--set", f"dram.mapped={mapped}")
    with DaemonProcess(*arguments, capacity="3MiB", grant="1MiB") as daemon:
        # The file of the client that waited for the daemon must be gone, or its room would come free later.
        wait_until(lambda: not list((small_tmpfs / "arena").glob("client-*")))
        (small_tmpfs / "filler").open("wb").close()
        with (small_tmpfs / "filler").open("r+b", buffering=0) as filler, suppress(OSError):
            while True:
                filler.write(bytes(4096))
        before = daemon.resources()
        why = {"true": "no room for the client's file", "false": "dram.mapped is off"}[mapped]
        for number in range(1, 40):
            with daemon.connect(namespace="full") as client:
                assert client.put(bytes([number]) * 32, b"x" * 100) is PutStatus.STORED
                assert why in client.unmapped
        wait_until(lambda: daemon.resources().fds <= before.fds)
        assert len(list((small_tmpfs / "arena").glob("client-*"))) == 0
        (small_tmpfs / "filler").unlink()


def test_default_endpoint_of_another_user_is_not_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("KVSTORE_ENDPOINT", raising=False)
    with DaemonProcess() as daemon:
        monkeypatch.setattr(kvstore_client.base, "default_endpoint", lambda: daemon.endpoint)
        with Client() as client:
            client.ping()
        monkeypatch.setattr(kvstore_client.link, "_CREDENTIALS", SquatterCredentials())
        with pytest.raises(PermissionRefused, match="is user 4711's, not yours"):
            Client()
        with Client(daemon.endpoint) as client:
            client.ping()


class SquatterCredentials:
    """Says that the peer is user 4711."""

    size = 12

    def unpack(self, data: bytes) -> tuple[int, int, int]:
        assert len(data) == self.size
        return 1, 4711, 4711


def test_two_signals_at_once_are_one_graceful_stop():
    with DaemonProcess() as daemon:
        os.kill(daemon.pid, signal.SIGTERM)
        time.sleep(0.002)
        os.kill(daemon.pid, signal.SIGTERM)
        assert daemon.process is not None
        assert daemon.process.wait(10) == 0
        assert daemon.files() == []
        assert "forced_stop" not in daemon.log()


def test_crowd_that_greets_a_stopped_daemon_gets_in_when_it_goes_on():
    with DaemonProcess() as daemon:
        outcomes: list[str] = []

        def greet() -> None:
            try:
                with daemon.connect(timeout=20.0) as client:
                    client.ping()
                outcomes.append("in")
            except Exception as error:
                outcomes.append(repr(error))

        os.kill(daemon.pid, signal.SIGSTOP)
        threads = [threading.Thread(target=greet) for _ in range(130)]
        for thread in threads:
            thread.start()
        time.sleep(0.5)
        os.kill(daemon.pid, signal.SIGCONT)
        for thread in threads:
            thread.join()
        assert set(outcomes) == {"in"}
