"""A mapping belongs to one process: what forks, programs and spawned processes get of it; what its threads share."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

from daemon_process import DaemonProcess, child_environment, read_line, script

from kvstore_client import Client

COMMON = """
import asyncio, os, sys
from kvstore_client import AsyncClient, Client, ForkedClient

def key(number):
    return (number + 1).to_bytes(4, "big") * 8

def ours(directory):
    return [line for line in open("/proc/self/maps") if directory in line]

def in_child(function):
    pid = os.fork()
    if not pid:
        status = 1
        try:
            function()
            status = 0
        finally:
            os._exit(status)
    return os.waitpid(pid, 0)[1]
"""

FORK = (
    COMMON
    + """
endpoint, directory = sys.argv[1:]
client = Client(endpoint, mapped=True)
client.put(key(0), b"x" * 70_000)
assert len(ours(directory)) == 3, ours(directory)
OPERATIONS = [
    lambda: client.get(key(0)),
    lambda: client.get_into(key(0), bytearray(70_000)),
    lambda: client.get_many_into([key(0)], [bytearray(70_000)]),
    lambda: client.view(key(0)).__enter__(),
    lambda: client.match([key(0)]),
    lambda: client.match([key(0)], lease=1),
    lambda: client.exists([key(0)]),
    lambda: client.put(key(1), b"x"),
    lambda: client.put(key(1), b"x", wait=False),
    lambda: client.put_many([key(1), key(2)], [b"x", b"y"], wait=False),
    lambda: client.remove([key(0)]),
    lambda: client.clear(),
    lambda: client.flush(),
    lambda: client.invalidate(),
    lambda: client.stats(),
    lambda: client.ping(),
]

def child():
    assert not client.mapped and "fork" in client.unmapped, client.unmapped
    assert not ours(directory), ours(directory)
    for number, operation in enumerate(OPERATIONS):
        try:
            operation()
        except ForkedClient as error:
            assert f"made by process {os.getppid()}" in str(error)
        else:
            raise AssertionError(number)
    client.close()
    # What it makes itself is its own.
    with Client(endpoint, mapped=True) as own:
        assert own.get(key(0)) == b"x" * 70_000
        own.put(key(7), b"child's")

assert in_child(child) == 0
assert client.mapped and len(ours(directory)) == 3
assert client.get(key(0)) == b"x" * 70_000 and client.get(key(7)) == b"child's"
assert client.put(key(1), b"x", wait=False) == 5 and client.flush().stored == 1

async def run():
    async with AsyncClient(endpoint, mapped=True) as client:
        assert await client.get(key(0)) == b"x" * 70_000
        def child():
            assert not client.mapped
            for operation in (lambda: client.get(key(0)), lambda: client.put(key(1), b"x", wait=False)):
                try:
                    operation().send(None)
                except ForkedClient:
                    continue
                raise AssertionError
        assert in_child(child) == 0
        assert await client.get(key(0)) == b"x" * 70_000

asyncio.run(run())
print("done", flush=True)
sys.stdin.read(1)
assert client.get(key(0)) == b"x" * 70_000
client.close()
print("closed", flush=True)
"""
)

VIEW = (
    COMMON
    + """
endpoint = sys.argv[1]
client = Client(endpoint, mapped=True)
client.put(key(0), b"x" * 5000)
parent = os.getpid()
with client.view(key(0)) as found:
    pid = os.fork()
    if pid:
        os.waitpid(pid, 0)
        with Client(endpoint) as other:
            other.remove([key(0)])
            assert other.stats().dram.limbo_bytes == 8192, "the slot is held by the parent"
            for number in range(1, 2000):
                other.put(key(number), b"y" * 5000)
        assert bytes(found) == b"x" * 5000, "another block stands where the parent reads"
if os.getpid() != parent:
    # It left the block as its parent's copy, which must let go of nothing.
    os._exit(0)
with Client(endpoint) as other:
    other.put(key(9999), b"y" * 5000)
client.close()
print("done")
"""
)

SPAWN = (
    COMMON
    + """
import multiprocessing

def work(endpoint, number):
    with Client(endpoint, mapped=True) as client:
        assert client.get(key(0)) == b"parent's"
        assert client.put(key(number), b"%d" % number) == 1

if __name__ == "__main__":
    endpoint = sys.argv[1]
    with Client(endpoint, mapped=True) as client:
        client.put(key(0), b"parent's")
        for start, first in (("spawn", 1), ("fork", 11), ("forkserver", 21)):
            context = multiprocessing.get_context(start)
            processes = [context.Process(target=work, args=(endpoint, first + each)) for each in range(2)]
            for process in processes:
                process.start()
            for process in processes:
                process.join()
                assert process.exitcode == 0, start
            for each in range(2):
                assert client.get(key(first + each)) == b"%d" % (first + each)
    print("done")
"""
)


def key(number: int) -> bytes:
    return (number + 1).to_bytes(4, "big") * 8


def test_forked_child_has_no_mapping_and_no_client_and_its_parent_goes_on():
    with DaemonProcess() as daemon, daemon.connect(mapped=False) as watching:
        with script(FORK, daemon.endpoint, str(daemon.arena_directory)) as process:
            assert read_line(process) == "done"
            # The children are gone; their ends must not be taken for their parent's.
            time.sleep(1.3)
            mine = [session.mapped for session in watching.stats().sessions if session.pid == process.pid]
            assert mine == [True]
            assert process.stdin is not None
            process.stdin.write("x")
            process.stdin.flush()
            assert read_line(process) == "closed"
        assert watching.verify().problems == []


def test_view_that_is_open_at_a_fork_stays_the_parents():
    with DaemonProcess(capacity="4MiB", grant="2MiB") as daemon, script(VIEW, daemon.endpoint) as process:
        assert read_line(process) == "done"


def test_program_started_by_a_mapped_client_inherits_nothing_of_it():
    look = "import os, json; print(json.dumps([open('/proc/self/maps').read(), [os.readlink(f'/proc/self/fd/{fd}') "
    look += "for fd in os.listdir('/proc/self/fd') if os.path.exists(f'/proc/self/fd/{fd}')]]))"
    with DaemonProcess() as daemon, daemon.connect(mapped=True) as client:
        client.put(key(0), b"x")
        directory = str(daemon.arena_directory)
        assert directory in Path("/proc/self/maps").read_text()
        for close_fds in (True, False):
            done = subprocess.run(
                [sys.executable, "-c", look], capture_output=True, text=True, check=True, close_fds=close_fds
            )
            maps, fds = json.loads(done.stdout)
            assert directory not in maps
            assert not [fd for fd in fds if directory in fd or "kv.sock" in fd]
        assert client.get(key(0)) == b"x"


def test_processes_of_multiprocessing_map_for_themselves(tmp_path: Path):
    (tmp_path / "spawning.py").write_text(SPAWN)
    with DaemonProcess() as daemon:
        done = subprocess.run(
            [sys.executable, "-P", str(tmp_path / "spawning.py"), daemon.endpoint],
            env=child_environment(),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert (done.returncode, done.stdout.strip()) == (0, "done"), done.stderr


def test_threads_that_share_a_mapped_client_read_right_bytes_and_leave_no_hazard():
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with (
            DaemonProcess("--slab", "128KiB", capacity="1MiB", grant="768KiB") as daemon,
            daemon.connect(mapped=True, timeout=20.0) as client,
        ):
            share(client)
            assert client._mapped is not None
            assert len(client._mapped.free_hazards) == 64
            assert client.verify().problems == []
            assert client.stats().dram.limbo_bytes == 0
    finally:
        sys.setswitchinterval(interval)


def share(client: Client) -> None:
    """Six threads put, read in place and copy out of a tier that is too small for all of it."""
    failures: list[BaseException] = []
    hits = [0] * 6

    def data(number: int) -> bytes:
        return bytes([number]) * (20_000 + 1000 * number)

    def work(worker: int) -> None:
        number = worker
        try:
            for turn in range(150):
                number = (number * 7 + turn + worker) % 60
                out = bytearray(80_000)
                client.put(key(number), data(number), wait=bool(turn % 2))
                with client.view(key(number)) as found:
                    assert found is None or bytes(found) == data(number)
                    hits[worker] += found is not None
                length = client.get_into(key(number // 2), out)
                assert length is None or out[:length] == data(number // 2)
                assert len(client.match([key(number)])) in (0, 1)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(worker,)) for worker in range(len(hits))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures[0]
    client.flush()
    assert min(hits) > 50
