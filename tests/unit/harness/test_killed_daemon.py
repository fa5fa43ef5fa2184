"""The wrapped files of daemons under test kill their process at the point that was ordered, and fail as ordered."""

from __future__ import annotations

import errno
import json
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from daemon_process import child_environment
from fakes.disk_faults import Fault
from forked_daemons import ForkedDaemon, Nursery
from killed_daemon import Control, Orders, killed_daemon

WORK = """
    import asyncio, json, mmap, os, sys
    from pathlib import Path
    import killed_daemon
    from kvstore.tiers import disk

    killed_daemon.wrap()
    page = memoryview(mmap.mmap(-1, 4096))

    async def work(directory, done):
        slabs = directory.open_slabs(create=True)
        slabs.format(0, 8192)
        slabs.write(0, [page])
        slabs.sync()
        done.append("synced")
        log = await directory.create_log("log-1", b"header")
        await log.append(b"frame")
        await log.sync()
        done.append("logged")
        await directory.write_whole("checkpoint", [b"content"])
        done.append("checkpoint")
        slabs.read(0, [page])
        slabs.write(0, [page])
        directory.remove("log-1")
        await log.close()

    def run(control, path):
        killed_daemon.injector.follow(control)
        done = []
        directory = disk.SsdDirectory(path)
        try:
            asyncio.run(work(directory, done))
        except OSError as error:
            done.append(error.errno)
        return done

    control, where = Path(sys.argv[1]), Path(sys.argv[2])
    for number, point in enumerate(sys.argv[3:]):
        new = control.with_suffix(".new")
        passing = 2 if point.startswith("2:") else 1
        orders = json.loads(sys.argv[3 + number].partition(":")[2]) if point.startswith("f:") else {}
        kill = "" if orders else point.removeprefix("2:")
        new.write_text(json.dumps({"kill": kill, "passing": passing, "faults": [], **orders}))
        new.rename(control)
        pid = os.fork()
        if not pid:
            print(json.dumps(run(control, where / str(number))), flush=True)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        print(status, sorted(os.listdir(where / str(number))), flush=True)
"""
_CREATED = ("data_create", "data_format", "data_write", "data_sync", "log_create", "log_append", "log_sync")
_LATER = ("checkpoint_create", "checkpoint_rename", "directory_sync", "data_read", "remove")
NAMED = [f"{when}_{op}" for op in _CREATED + _LATER for when in ("before", "after")]


def work(tmp_path: Path, *orders: str) -> list[str]:
    """The lines that the child above prints, for each of the orders."""
    command = [sys.executable, "-P", "-c", textwrap.dedent(WORK), str(tmp_path / "control.json"), str(tmp_path)]
    done = subprocess.run(
        [*command, *orders], env=child_environment(), capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_wrapped_files_kill_their_process_at_each_point(tmp_path: Path):
    lines = work(tmp_path, *NAMED, "before_slot_reuse", "2:before_data_write", "2:before_slot_reuse")
    killed = dict(zip([*NAMED, "before_slot_reuse", "2:before_data_write"], lines, strict=False))
    assert {point: line for point, line in killed.items() if not line.startswith(f"{-signal.SIGKILL} ")} == {}
    left = {
        "before_data_create": [],
        "before_log_create": ["slabs"],
        "before_checkpoint_rename": ["checkpoint.tmp", "log-1", "slabs"],
        "after_checkpoint_rename": ["checkpoint", "log-1", "slabs"],
        "after_remove": ["checkpoint", "slabs"],
    }
    for point, names in left.items():
        assert killed[point] == f"{-signal.SIGKILL} {sorted([*names, 'owner.lock'])}"
    assert lines[-2:] == ['["synced", "logged", "checkpoint"]', "0 ['checkpoint', 'owner.lock', 'slabs']"]


@pytest.mark.parametrize(
    ("orders", "done"),
    [
        ({"faults": [{"op": "data_sync", "number": errno.EIO}]}, [errno.EIO]),
        ({"faults": [{"op": "write", "number": errno.ENOSPC, "passes": 1}]}, ["synced", "logged", "checkpoint", 28]),
        ({"faults": [{"op": "append", "number": errno.ENOSPC}]}, ["synced", errno.ENOSPC]),
        ({"faults": [{"op": "data_read", "number": errno.EIO, "start": 4096}]}, ["synced", "logged", "checkpoint"]),
        ({"faults": [{"op": "rename", "number": errno.EIO}]}, ["synced", "logged", errno.EIO]),
        ({"read_only": True}, [errno.EROFS]),
    ],
)
def test_wrapped_files_fail_as_ordered(tmp_path: Path, orders: dict[str, object], done: list[object]):
    lines = work(tmp_path, "f:" + json.dumps(orders))
    assert json.loads(lines[0]) == done


def test_control_orders_are_read_by_the_daemon_and_say_where_it_ended(tmp_path: Path):
    control = Control(tmp_path / "control.json")
    control.order(Orders(kill="after_log_sync", passing=3, faults=[Fault("data_read", errno.EIO, times=2)]))
    fields = json.loads(control.path.read_text())
    assert (fields["kill"], fields["passing"], fields["faults"][0]["number"]) == ("after_log_sync", 3, errno.EIO)
    assert control.killed_at() == ""


def test_daemons_of_the_nursery_live_and_die_as_others_do(tmp_path: Path, no_leaks: None):
    control = Control(tmp_path / "control.json")
    with Nursery() as nursery, ForkedDaemon(nursery, control, capacity="4MiB", grant="2MiB") as daemon:
        first = daemon.pid
        daemon.restart()
        assert daemon.pid != first
        with daemon.connect() as client:
            assert client.stats().pid == daemon.pid
        status, line = daemon.refused("--capacity", "nonsense")
        assert status == 2
        assert "--capacity" in line


def test_killed_daemon_as_a_program_serves(tmp_path: Path, no_leaks: None):
    with killed_daemon(Control(tmp_path / "control.json"), capacity="4MiB", grant="2MiB") as daemon:
        assert daemon.alive()
