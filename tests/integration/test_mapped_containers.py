"""Daemon and clients in containers of their own (mount, IPC and pid namespaces) that share one directory of memory."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from daemon_process import child_environment, read_line, wait_until
from unshared import unshared

from kvstore_client import Client, DaemonUnavailable

CONTAINER = ("--mount", "--ipc", "--pid", "--fork", "--kill-child", "--mount-proc")

CLIENT = """
import json, os, sys
from kvstore_client import Client, PermissionRefused
endpoint, directory, elsewhere = sys.argv[1:]
assert not os.listdir(elsewhere), "the daemon's path is another container's"
key = bytes(31) + b"1"
client = Client(endpoint, directory=directory or None, timeout=20.0)
put = client.put(key, b"x" * 70_000)
with client.view(key) as found:
    right = found == b"x" * 70_000
lease = len(client.match([key], lease=60))
refused = ""
try:
    Client(endpoint, directory=directory or None, mapped=True).close()
except PermissionRefused as error:
    refused = str(error)
maps = sorted({line.split(None, 5)[5].strip() for line in open("/proc/self/maps") if "/arena-" in line})
print(json.dumps([client.mapped, client.unmapped, put, right, lease, os.getpid(), maps, refused]), flush=True)
if sys.stdin.readline():
    client.close()
"""


class Place:
    """A directory of memory where the daemon's files lie, and one with its socket, which all containers have."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.memory = root / "memory"
        self.elsewhere = root / "elsewhere"
        self.memory.mkdir()
        self.elsewhere.mkdir()
        self.endpoint = f"ipc://{root}/kv.sock"

    def client(self, stack: ExitStack, directory: str, environ: dict[str, str]) -> subprocess.Popen[str]:
        """Run ``CLIENT`` where the daemon's directory is mounted at another path and its own path is empty."""
        mount = 'mount --bind "$1" "$2" && mount -t tmpfs tmpfs "$1" && shift 2 && exec "$@"'
        command = [*unshared(*CONTAINER), "bash", "-c", mount, "bash", str(self.memory), str(self.elsewhere)]
        command += [sys.executable, "-P", "-c", CLIENT, self.endpoint, directory, str(self.memory)]
        process = stack.enter_context(
            subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=child_environment(environ),
            )
        )
        stack.callback(process.kill)
        return process


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    """A daemon that is the first process of a container."""
    container = unshared(*CONTAINER)
    with ExitStack() as stack:
        root = Path(tempfile.mkdtemp(prefix="kvt-", dir="/dev/shm"))
        stack.callback(shutil.rmtree, root, ignore_errors=True)
        place = Place(root)
        command = [*container, sys.executable, "-P", "-m", "kvstore", "serve", "--endpoint", place.endpoint]
        command += ["--arena-dir", str(place.memory), "--http", "off", "--capacity", "8MiB", "--grant", "4MiB"]
        log = stack.enter_context(open(root / "log", "wb"))
        process = stack.enter_context(subprocess.Popen(command, stderr=log, env=child_environment()))
        stack.callback(process.kill)

        def serves() -> bool:
            assert process.poll() is None, (root / "log").read_text()
            try:
                with Client(place.endpoint, mapped=False) as client:
                    stats = client.stats()
            except DaemonUnavailable:
                return False
            assert stats.pid == 1, "the first process of its namespace"
            return stats.dram.populated_bytes == stats.dram.arena_bytes

        wait_until(serves, 30.0)
        yield place
        (child,) = (int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split())
        os.kill(child, signal.SIGTERM)
        assert process.wait(10) == 0, (root / "log").read_text()
        assert list(place.memory.iterdir()) == []


@pytest.mark.parametrize("how", ["argument", "variable"])
def test_client_in_another_container_maps_where_it_is_told_and_its_death_is_seen(
    place: Place, how: str, stack: ExitStack
):
    """Both are process 1 of their pid namespaces, as the first processes of containers are."""
    with Client(place.endpoint, mapped=False, timeout=20.0) as watching:
        watching.clear()
        died = watching.stats().server.sessions_died
        elsewhere = str(place.elsewhere)
        client = place.client(
            stack, elsewhere if how == "argument" else "", {"KVSTORE_DIRECTORY": elsewhere} if how == "variable" else {}
        )
        mapped, unmapped, put, right, lease, pid, maps, refused = json.loads(read_line(client))
        assert (mapped, unmapped, refused) == (True, "", "")
        assert (put, right, lease, pid) == (1, True, 1, 1)
        assert [os.path.dirname(path) for path in maps] == [elsewhere]
        stats = watching.stats()
        assert stats.leases == 1
        assert sorted(session.mapped for session in stats.sessions) == [False, True]
        assert watching.get(bytes(31) + b"1") == b"x" * 70_000
        client.kill()
        client.wait()
        wait_until(lambda: watching.stats().leases == 0, 4.0)
        stats = watching.stats()
        assert stats.server.sessions_died == died + 1
        assert stats.dram.granted_bytes == 0
        assert len(list(place.memory.glob("client-*"))) == 1


def test_client_in_another_container_that_is_not_told_where_sends_everything_and_says_what_to_do(
    place: Place, stack: ExitStack
):
    with Client(place.endpoint, timeout=20.0) as watching:
        assert watching.mapped
        watching.clear()
        client = place.client(stack, "", {})
        mapped, unmapped, put, right, lease, _, maps, refused = json.loads(read_line(client))
        assert (mapped, put, right, lease, maps) == (False, 1, True, 1, [])
        assert f"{place.memory}/client-" in unmapped
        assert unmapped.endswith(
            "is not there for this process; in another container mount the daemon's directory and say where "
            "(directory= or KVSTORE_DIRECTORY)"
        )
        assert refused.startswith("mapped=True: the session's file ")
        assert watching.get(bytes(31) + b"1") == b"x" * 70_000
        client.communicate("close\n", timeout=10)
        wait_until(lambda: watching.stats().leases == 0, 1.0)
