"""The leak checks themselves: each kind of leak is seen, and what is given back in time is not."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from leaks import SHM, SHM_PREFIX, Snapshot, shm_holders

CONFTEST = Path(__file__).parents[2] / "conftest.py"


def test_snapshot_nothing_taken_reports_nothing():
    assert Snapshot.take().leaks_since(grace_s=0) == []


def test_snapshot_fd_left_open_is_named():
    before = Snapshot.take()
    fd = os.open("/dev/null", os.O_RDONLY)
    try:
        assert before.leaks_since(grace_s=0) == [f"fd {fd} (/dev/null)"]
    finally:
        os.close(fd)
    assert before.leaks_since(grace_s=0) == []


def test_snapshot_thread_still_running_is_named_and_waited_for():
    before = Snapshot.take()
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait, name="left-behind", daemon=True)
    thread.start()
    assert [leak for leak in before.leaks_since(grace_s=0) if "left-behind" in leak]
    threading.Timer(0.1, stop.set).start()
    assert before.leaks_since() == []
    thread.join()


def test_snapshot_zmq_context_left_open_is_seen():
    zmq = pytest.importorskip("zmq")
    before = Snapshot.take()
    context = zmq.Context()
    socket = context.socket(zmq.DEALER)
    try:
        # A thread of libzmq gives itself its name only after it was started.
        end = time.monotonic() + 10
        while not any("ZMQbg" in leak for leak in before.new()):
            assert time.monotonic() < end, before.new()
            time.sleep(0.01)
    finally:
        socket.close(linger=0)
        context.term()
    assert before.leaks_since() == []


def test_snapshot_child_process_is_named_until_it_ends():
    before = Snapshot.take()
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as child:
        try:
            assert any(f"process {child.pid} " in leak for leak in before.leaks_since(grace_s=0))
        finally:
            child.kill()
    assert before.leaks_since() == []


@pytest.mark.skipif(not os.access(SHM, os.W_OK), reason="/dev/shm is not writable here")
def test_snapshot_shared_memory_counts_unless_a_stranger_holds_it():
    before = Snapshot.take()
    path = SHM / f"{SHM_PREFIX}leak-check-{os.getpid()}"
    path.write_bytes(b"")
    try:
        assert before.leaks_since(grace_s=0) == [f"shared memory {path}"]
        with path.open("rb"):
            assert shm_holders(path.name) == {os.getpid()}
            assert f"shared memory {path}" in before.leaks_since(grace_s=0)
        # A grandchild whose parent is gone belongs to somebody else: it is no descendant of this process.
        script = (
            "import os, sys, time\n"
            "if os.fork(): os._exit(0)\n"
            "os.setsid(); file = open(sys.argv[1]); print(os.getpid(), flush=True); os.close(1); time.sleep(60)\n"
        )
        stranger = subprocess.run(
            [sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, check=True, text=True
        )
        pid = int(stranger.stdout)
        try:
            assert before.leaks_since(grace_s=0) == []
        finally:
            os.kill(pid, 9)
            end = time.monotonic() + 10
            while shm_holders(path.name) and time.monotonic() < end:
                time.sleep(0.01)
    finally:
        path.unlink()
    assert before.leaks_since() == []


LEAKY = """
import asyncio, os

def test_fd():
    os.open("/dev/null", os.O_RDONLY)

async def test_task():
    asyncio.ensure_future(asyncio.sleep(3600))

async def test_clean():
    await asyncio.create_task(asyncio.sleep(0))
"""


@pytest.mark.parametrize(("folder", "errors"), [("integration", {"test_fd", "test_task"}), ("unit", set())])
def test_conftest_leaky_tests_fail_in_checked_folders_only(tmp_path: Path, folder: str, errors: set[str]):
    tests = tmp_path / "tests"
    (tests / folder).mkdir(parents=True)
    (tests / "conftest.py").write_text(CONFTEST.read_text())
    source = (CONFTEST.parent / "leaks.py").read_text()
    (tests / "leaks.py").write_text(source.replace("GRACE_S = 5.0", "GRACE_S = 0.2"))
    (tests / folder / "test_leaky.py").write_text(LEAKY)
    (tmp_path / "pytest.ini").write_text(
        "[pytest]\naddopts = --import-mode=importlib\npythonpath = tests\nasyncio_mode = auto\n"
        "asyncio_default_fixture_loop_scope = function\n"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rE", "-p", "no:cacheprovider", "tests"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    failed = {line.split("::")[1].split(" ")[0] for line in done.stdout.splitlines() if line.startswith("ERROR tests")}
    assert failed == errors, done.stdout + done.stderr
