"""The daemon ends under mapped clients: no wrong byte, a new mapping, and none of the dead daemon's memory kept."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
from daemon_process import DaemonProcess, child_environment, read_line, script, wait_until
from unshared import unshared

WORK = """
import json, random, sys, threading, time
from kvstore_client import Client, ConnectionLost, DaemonUnavailable, Throttled
endpoint, seed, writes = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "writer"
draw = random.Random(seed)
told = {"hits": 0, "wrong": 0, "errors": 0, "lives": [], "mapped": 0, "longest": 0.0}
client = None
print("ready", flush=True)
sys.stdin.readline()
told_to_end = threading.Thread(target=sys.stdin.readline)
told_to_end.start()
while told_to_end.is_alive():
    number = draw.randrange(1, 200)
    key = number.to_bytes(4, "big") * 8
    data = bytes([number]) * (1000 + 300 * number)
    begin = time.monotonic()
    try:
        if client is None:
            client = Client(endpoint, namespace="load", timeout=10.0)
        if writes:
            client.put(key, data, wait=number % 2 == 0)
        way = draw.randrange(3)
        if way == 0:
            out = bytearray(70_000)
            length = client.get_into(key, out)
            found = None if length is None else bytes(out[:length])
        elif way == 1:
            with client.view(key) as seen:
                found = None if seen is None else bytes(seen)
        else:
            outs = [bytearray(70_000), bytearray(70_000)]
            lengths = client.get_many_into([bytes(31) + b"1", key], outs)
            found = None if lengths[1] is None else bytes(outs[1][:lengths[1]])
        told["hits"] += found is not None
        told["wrong"] += found not in (None, data)
        told["mapped"] += client.mapped
        if client.incarnation not in told["lives"]:
            told["lives"].append(client.incarnation)
    except (ConnectionLost, DaemonUnavailable, Throttled):
        told["errors"] += 1
        time.sleep(0.01)
    told["longest"] = max(told["longest"], time.monotonic() - begin)
told["at_last"] = client is not None and client.mapped
print(json.dumps(told), flush=True)
client.close()
"""

IDLE = """
import os, sys
from kvstore_client import Client
client = Client(sys.argv[1], mapped=True)
key = bytes(31) + b"1"
client.put(key, b"x" * 5000)
view = client.view(key)
if sys.argv[2] == "reading":
    found = view.__enter__()
for line in iter(sys.stdin.readline, ""):
    if line == "descriptors\\n":
        print(len(os.listdir("/proc/self/fd")), flush=True)
    elif line == "use\\n":
        client.put(key, b"x" * 5000)
        print(client.mapped, client.get(key) == b"x" * 5000, flush=True)
    elif line == "close view\\n":
        print(bytes(found) == b"x" * 5000, flush=True)
        del found
        view.__exit__(None, None, None)
    else:
        print("ready", flush=True)
client.close()
"""

ENDS = [signal.SIGKILL, signal.SIGTERM]


def end(daemon: DaemonProcess, number: signal.Signals) -> None:
    if number is signal.SIGKILL:
        daemon.kill()
    else:
        assert daemon.terminate() == 0


def mapped_files(pid: int, daemon: DaemonProcess) -> list[str]:
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return [line.split(None, 5)[5] for line in lines if str(daemon.arena_directory) in line]


def say(processes: list[subprocess.Popen[str]], line: str) -> None:
    for process in processes:
        assert process.stdin is not None
        process.stdin.write(f"{line}\n")
        process.stdin.flush()


def ask(process: subprocess.Popen[str], line: str) -> str:
    say([process], line)
    return read_line(process)


def test_readers_and_writers_meet_no_wrong_byte_while_the_daemon_dies_again_and_again(stack: ExitStack):
    with DaemonProcess("--slab", "256KiB", capacity="4MiB", grant="2MiB") as daemon:
        workers = [
            stack.enter_context(script(WORK, daemon.endpoint, str(seed), kind))
            for seed, kind in enumerate(["writer", "writer", "reader"])
        ]
        for worker in workers:
            assert read_line(worker) == "ready"
        say(workers, "go")
        for number in (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM):
            time.sleep(1.5)
            end(daemon, number)
            daemon.start()
        time.sleep(0.7)
        say(workers, "end")
        told = [json.loads(read_line(worker)) for worker in workers]
        for each in told:
            assert each["wrong"] == 0
            assert each["at_last"] is True
            assert len(each["lives"]) >= 2
            assert each["hits"] > 100
            assert each["mapped"] > each["hits"] // 2
            assert each["longest"] < 5.0
        assert sum(each["errors"] for each in told) > 0
        assert len({life for each in told for life in each["lives"]}) >= 3
        with daemon.connect() as client:
            wait_until(lambda: len(client.stats().sessions) == 1)
            assert client.verify().problems == []
            wait_until(lambda: client.stats().dram.granted_bytes == 0)


@pytest.mark.parametrize("number", ENDS)
def test_idle_client_unmaps_a_dead_daemons_files_within_a_second(number: signal.Signals):
    with DaemonProcess(capacity="8MiB") as daemon, script(IDLE, daemon.endpoint, "idle") as process:
        assert ask(process, "ready") == "ready"
        assert len(mapped_files(process.pid, daemon)) == 3
        descriptors = ask(process, "descriptors")
        for _ in range(2 if number is signal.SIGKILL else 1):
            end(daemon, number)
            begin = time.monotonic()
            wait_until(lambda: not mapped_files(process.pid, daemon), 3.0)
            assert time.monotonic() - begin < 2.0
            daemon.start()
            assert ask(process, "use") == "True True"
            assert len(mapped_files(process.pid, daemon)) == 3
            assert ask(process, "descriptors") == descriptors


@pytest.mark.parametrize("number", ENDS)
def test_open_view_outlives_the_daemon_and_takes_the_mapping_with_it(number: signal.Signals):
    with DaemonProcess(capacity="8MiB") as daemon, script(IDLE, daemon.endpoint, "reading") as process:
        assert ask(process, "ready") == "ready"
        end(daemon, number)
        daemon.start()
        assert ask(process, "use") == "True True"
        old = [path for path in mapped_files(process.pid, daemon) if path.endswith("(deleted)")]
        assert [path for path in old if "/arena-" in path]
        with daemon.connect() as other:
            for block in range(2000):
                other.put((block + 1).to_bytes(4, "big") * 8, b"y" * 5000)
        assert ask(process, "close view") == "True"
        wait_until(lambda: not [path for path in mapped_files(process.pid, daemon) if path.endswith("(deleted)")], 3.0)
        assert ask(process, "use") == "True True"


def test_unwaited_puts_of_an_idle_client_are_lost_with_the_daemon_and_counted():
    """Also where nobody used the client between the daemon's end and its return."""
    with DaemonProcess() as daemon, daemon.connect(mapped=True, timeout=10.0) as client:
        client.put(bytes(31) + b"1", b"x")
        client.put(bytes(31) + b"2", b"x", wait=False)
        client.ping()
        os.kill(daemon.pid, signal.SIGSTOP)
        for number in range(10):
            client.put(bytes(31) + bytes([100 + number]), b"x" * 1000, wait=False)
        daemon.kill()
        wait_until(lambda: not client.mapped, 3.0)
        assert client.unmapped == "the daemon is gone"
        daemon.start()
        done = client.flush()
        assert (done.stored, done.lost) == (1, 10)
        assert client.mapped
        assert client.flush() == type(done)()


FULL = """
import os, signal, subprocess, sys, time
from pathlib import Path
from kvstore_client import Client
directory = Path(sys.argv[1])
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(directory)], check=True)
endpoint = f"ipc://{directory}/kv.sock"
command = [sys.executable, "-P", "-m", "kvstore", "serve", "--endpoint", endpoint]
command += ["--arena-dir", str(directory / "arena"), "--http", "off", "--capacity", "10MiB", "--grant", "2MiB"]
command += ["--parent-pid", str(os.getpid())]

def daemon():
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while process.poll() is None:
        try:
            with Client(endpoint) as client:
                dram = client.stats().dram
                if dram.populated_bytes >= dram.arena_bytes:
                    return process
        except ConnectionError:
            time.sleep(0.02)
    return process

IDLE = "import sys; from kvstore_client import Client; client = Client(sys.argv[1], mapped=True); print(1); input()"
first = daemon()
holder = subprocess.Popen(
    [sys.executable, "-P", "-u", "-c", IDLE, endpoint], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
)
holder.stdout.readline()
os.kill(holder.pid, signal.SIGSTOP)
first.kill()
first.wait()
second = daemon()
print(second.wait(), second.stderr.read().strip().splitlines()[-1], flush=True)
os.kill(holder.pid, signal.SIGCONT)
time.sleep(1.5)
third = daemon()
print(third.poll(), flush=True)
third.terminate()
print(third.wait(), flush=True)
holder.communicate("\\n")
"""


def test_start_is_refused_while_a_dead_daemons_arena_is_mapped_and_there_is_no_room_for_two(tmp_path: Path):
    command = [*unshared("--mount"), sys.executable, "-P", "-c", FULL, str(tmp_path)]
    done = subprocess.run(
        command, env=child_environment(), capture_output=True, text=True, timeout=60, check=False, cwd=tmp_path
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 3, done.stdout + done.stderr
    assert lines[0].startswith("1 kvstore: error: the arena needs"), lines[0]
    assert f"but the file system of {tmp_path}/arena has" in lines[0]
    assert "lower dram.capacity_bytes (--capacity) or enlarge it" in lines[0]
    assert lines[1:] == ["None", "0"], done.stderr
