"""What is wrong with sizes, places, permissions and versions is said in one line; nothing is left behind."""

from __future__ import annotations

import asyncio
import os
import socket
import stat
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from daemon_process import MIB, DaemonProcess

import kvstore_client.session
from kvstore.errors import DaemonUnavailable, DeadlineExceeded, InsufficientMemory, InvalidArgument, ProtocolMismatch
from kvstore.mapped.arena import ARENA_HEADER_BYTES
from kvstore.server.app import Daemon, run
from kvstore.settings import Settings
from kvstore.tiers.files import SharedFile
from kvstore_client import AsyncClient, Client, Namespace, PutStatus, chain_keys

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounting a file system and changing the user need root")
NOBODY = 65534


@pytest.fixture
def small_tmpfs(tmp_path: Path) -> Iterator[Path]:
    """A memory file system of 8 MiB."""
    mounted = tmp_path / "shm"
    mounted.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "kvstore-test", str(mounted)], capture_output=True)
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
    assert "0.01 GiB" in line
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
    with pytest.raises(ProtocolMismatch, match=r"speaks protocol 1 to 1.*90 to 99; install the same version"):
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
        return f"in {client.ping() > 0}"


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
        assert as_nobody(lambda: ping(daemon.endpoint)) == "in True"


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
