"""Daemons and clients of different users: who is let in maps, who is not is told why.

Everything here runs in forked children that give their rights up: another user may not be able to read Python itself.
"""

from __future__ import annotations

import codecs
import os
import shutil
import signal
import stat
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from daemon_process import wait_until

import kvstore_client.mapped_session  # noqa: F401 - likewise
from kvstore.protocol.endpoint import ipc_path
from kvstore.server.app import run
from kvstore.settings import AccessSettings, DramSettings, Settings
from kvstore_client import Client, PutStatus

OWNER, MEMBER, STRANGER = 20_001, 20_002, 20_003
GROUP = 30_000

codecs.lookup("ascii")
"""Loaded, as all modules are, before rights are given up."""

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become other users")


def key(number: int) -> bytes:
    return (number + 1).to_bytes(4, "big") * 8


def fork_as(user: int, groups: list[int], work: Callable[[], int]) -> int:
    """Run ``work`` in a child of another user; its pid. The child ends with what ``work`` returns."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child:
        return child
    status = 1
    try:
        os.setgroups(groups)
        os.setgid(user)
        os.setuid(user)
        status = work()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def said_by(user: int, groups: list[int], work: Callable[[], str]) -> str:
    """What ``work`` returns, or how it fails, as another user."""
    reading, writing = os.pipe()

    def tell() -> int:
        try:
            said = work()
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        os.write(writing, said.encode())
        return 0

    child = fork_as(user, groups, tell)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    return said


@contextmanager
def daemon_of_owner(mode: str, group: str = "") -> Iterator[str]:
    """The endpoint of a daemon that runs as ``OWNER``."""
    directory = Path(tempfile.mkdtemp(prefix="kvt-", dir="/tmp"))
    directory.chmod(0o755)
    os.chown(directory, OWNER, OWNER)
    endpoint = f"ipc://{directory}/kv.sock"
    settings = Settings(
        endpoint=endpoint,
        http="off",
        dram=DramSettings(capacity_bytes=4 << 20, grant_bytes=2 << 20, directory=directory / "arena"),
        access=AccessSettings(mode=mode, group=group),
    )

    def serve() -> int:
        sys.stderr = open(directory / "log", "w", buffering=1)  # noqa: SIM115 - for the rest of the child's life
        return run(settings)

    child = fork_as(OWNER, [GROUP], serve)
    status = None

    def ended() -> bool:
        nonlocal status
        if status is None:
            pid, said = os.waitpid(child, os.WNOHANG)
            status = said if pid else None
        return status is not None

    try:
        wait_until(lambda: ipc_path(endpoint).exists() or ended())
        assert not ended(), (directory / "log").read_text()
        with Client(endpoint, timeout=20.0) as client:
            wait_until(lambda: (dram := client.stats().dram).populated_bytes == dram.arena_bytes)
        yield endpoint
        os.kill(child, signal.SIGTERM)
        wait_until(ended)
        assert status == 0, (directory / "log").read_text()
        assert {path.name for path in directory.iterdir()} == {"log"}
    finally:
        if not ended():
            os.kill(child, signal.SIGKILL)
            wait_until(ended)
        shutil.rmtree(directory, ignore_errors=True)


def use(endpoint: str) -> str:
    """Put and read by every path; how the client was connected."""
    with Client(endpoint, timeout=20.0) as client:
        client.clear()
        before = client.stats().lookups.mapped_reads
        assert client.put(key(0), b"x" * 5000) is PutStatus.STORED
        assert client.put(key(1), b"y" * 5000, parent=key(0), wait=False) is PutStatus.PENDING
        assert client.flush().stored == 1
        assert client.get(key(0)) == b"x" * 5000
        with client.view(key(1)) as found:
            assert found == b"y" * 5000
        assert len(client.match([key(0), key(1)])) == 2
        client.flush()
        reads = client.stats().lookups.mapped_reads - before
        assert client.verify().problems == []
        writable = client._mapped is not None and client._mapped.writable
        return f"mapped {client.mapped} writable {writable} reads {reads} {client.unmapped}"


MAPPED = "mapped True writable True reads 3 "
REFUSED = "do not let this user in"


def test_daemon_of_mode_0600_serves_its_user_and_root_alone():
    with daemon_of_owner("0600") as endpoint:
        assert said_by(OWNER, [], lambda: use(endpoint)) == MAPPED
        assert use(endpoint) == MAPPED
        said = said_by(MEMBER, [GROUP], lambda: use(endpoint))
        assert said == (
            f"PermissionRefused: no access to {endpoint}: the daemon's access.mode and access.group {REFUSED}"
        )


def test_daemon_of_mode_0660_serves_its_group_through_mapped_memory_and_sees_its_members_die():
    with daemon_of_owner("0660", str(GROUP)) as endpoint:
        arena = ipc_path(endpoint).parent / "arena"
        modes = {path.name.split("-")[0]: stat.S_IMODE(path.stat().st_mode) for path in arena.iterdir()}
        assert (modes["arena"], modes["index"], modes["doorbell"]) == (0o660, 0o640, 0o620)
        assert {path.stat().st_gid for path in arena.glob("*-*")} == {GROUP}
        assert said_by(MEMBER, [GROUP], lambda: use(endpoint)) == MAPPED
        assert said_by(OWNER, [GROUP], lambda: use(endpoint)) == MAPPED
        said = said_by(STRANGER, [], lambda: use(endpoint))
        assert said.startswith("PermissionRefused")
        assert REFUSED in said

        def die() -> str:
            client = Client(endpoint, mapped=True, timeout=20.0)
            lease = client.match([key(0)], lease=60)
            return f"{len(lease)} {client.stats().leases}"

        with Client(endpoint, namespace="watching") as client:
            assert said_by(MEMBER, [GROUP], die) == "1 1"
            begin = time.monotonic()
            wait_until(lambda: client.stats().leases == 0, 5.0)
            assert time.monotonic() - begin < 3.0
            assert client.stats().server.sessions_died == 1


@pytest.mark.parametrize(
    ("name", "mode", "expected"),
    [
        ("index-*", 0o600, "mapped False writable False reads 0 no access to the index {path}: "),
        ("doorbell-*", 0o600, "mapped False writable False reads 0 no access to the doorbell {path}: "),
        ("arena-*", 0o600, "mapped False writable False reads 0 no access to the arena {path}: "),
        ("arena-*", 0o640, "mapped True writable False reads 3 "),
        ("", 0o700, "mapped False writable False reads 0 no access to the session's file {path}/client-"),
    ],
    ids=["index", "doorbell", "arena", "arena read-only", "directory"],
)
def test_client_that_may_open_the_socket_but_not_a_file_does_what_it_can(name: str, mode: int, expected: str):
    with daemon_of_owner("0660", str(GROUP)) as endpoint:
        arena = ipc_path(endpoint).parent / "arena"
        (path,) = arena.glob(name) if name else [arena]
        path.chmod(mode)
        said = said_by(MEMBER, [GROUP], lambda: use(endpoint))
        assert said.startswith(expected.format(path=path))
        if "mapped False" in expected:
            assert said.endswith(REFUSED)
            said = said_by(MEMBER, [GROUP], lambda: str(Client(endpoint, mapped=True)))
            assert said.startswith("PermissionRefused: mapped=True: no access to ")
