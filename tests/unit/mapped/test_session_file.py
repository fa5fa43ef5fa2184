"""Session files: golden bytes, a strict decoder, and a lock that lives exactly as long as its process."""

from __future__ import annotations

import fcntl
import os
import signal
import struct
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvstore.errors import CorruptRecord
from kvstore.mapped.client_file import CLIENT_FILE_BYTES
from kvstore.mapped.session_file import (
    SESSION_FILE_BYTES,
    SessionHeader,
    decode_session_header,
    encode_session_header,
    lock_kind,
    lock_request,
)
from kvstore.tiers.files import SessionFile

HEADER = SessionHeader(incarnation=0x0123456789ABCDEF, session=0x1122334455667788)
# magic, version 1, reserved, incarnation, session; all little-endian.
GOLDEN = bytes.fromhex("4b56434c49454e54 01000000 00000000 efcdab8967452301 8877665544332211")
# Version 2: the file is shared as memory too.
MAPPED_HEADER = SessionHeader(HEADER.incarnation, HEADER.session, mapped=True)
MAPPED_GOLDEN = bytes.fromhex("4b56434c49454e54 02000000 00000000 efcdab8967452301 8877665544332211")

CLIENT = """
    import fcntl, os, subprocess, sys, time
    from kvstore.mapped.session_file import lock_request
    fd = os.open(sys.argv[1], os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    fcntl.fcntl(fd, fcntl.F_SETLK, lock_request(fcntl.F_WRLCK))
"""


@pytest.mark.parametrize(("header", "golden"), [(HEADER, GOLDEN), (MAPPED_HEADER, MAPPED_GOLDEN)])
def test_session_header_encodes_to_its_golden_bytes(header: SessionHeader, golden: bytes):
    assert encode_session_header(header) == golden
    assert decode_session_header(golden) == header
    assert decode_session_header(golden + bytes(SESSION_FILE_BYTES - 32)) == header


@pytest.mark.parametrize(
    "damaged",
    [
        b"X" + GOLDEN[1:],
        GOLDEN[:8] + b"\x00" + GOLDEN[9:],
        GOLDEN[:8] + b"\x03" + GOLDEN[9:],
        GOLDEN[:12] + b"\x01" + GOLDEN[13:],
        MAPPED_GOLDEN[:9] + b"\x01" + MAPPED_GOLDEN[10:],
    ],
)
def test_session_header_damaged_is_refused(damaged: bytes):
    with pytest.raises(CorruptRecord, match="no session file of this version"):
        decode_session_header(damaged)


@pytest.mark.parametrize("length", [0, 31])
def test_session_header_too_short_is_refused(length: int):
    with pytest.raises(CorruptRecord, match=f"{length} bytes"):
        decode_session_header(GOLDEN[:length])


def test_lock_request_is_the_kernel_s_struct():
    kind, whence = struct.unpack_from("@hh", lock_request(fcntl.F_WRLCK))
    assert (kind, whence) == (fcntl.F_WRLCK, os.SEEK_SET)
    assert lock_kind(lock_request(fcntl.F_UNLCK)) == fcntl.F_UNLCK


@pytest.fixture
def file(tmp_path: Path) -> Iterator[SessionFile]:
    file = SessionFile(tmp_path / "client-1", GOLDEN, SESSION_FILE_BYTES, 0o660)
    yield file
    file.close()
    assert not (tmp_path / "client-1").exists()


@pytest.fixture
def run() -> Iterator[object]:
    children: list[subprocess.Popen[str]] = []

    def start(source: str, path: Path) -> subprocess.Popen[str]:
        child = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(source), str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        children.append(child)
        return child

    yield start
    for child in children:
        child.kill()
        child.communicate(timeout=30)


def _line(child: subprocess.Popen[str]) -> str:
    assert child.stdout is not None
    return child.stdout.readline().strip()


def _eventually_free(file: SessionFile) -> bool:
    end = time.monotonic() + 10
    while file.locked() and time.monotonic() < end:
        time.sleep(0.005)
    return not file.locked()


def test_session_file_has_size_mode_and_content(file: SessionFile):
    status = file.path.stat()
    assert status.st_size == SESSION_FILE_BYTES
    assert status.st_mode & 0o777 == 0o660
    assert file.path.read_bytes() == GOLDEN + bytes(SESSION_FILE_BYTES - 32)
    assert not file.locked()


def test_session_file_existing_one_is_not_touched(file: SessionFile):
    with pytest.raises(FileExistsError):
        SessionFile(file.path, b"x", SESSION_FILE_BYTES, 0o600)
    assert file.path.read_bytes()[:32] == GOLDEN


def test_session_file_mapped_has_all_its_memory_and_shows_what_others_write(tmp_path: Path):
    path = tmp_path / "client-2"
    mapped = SessionFile(path, MAPPED_GOLDEN, CLIENT_FILE_BYTES, 0o600, mapped=True)
    status = path.stat()
    assert (status.st_size, status.st_blocks * 512) == (CLIENT_FILE_BYTES, -(-CLIENT_FILE_BYTES // 4096) * 4096)
    assert mapped.map is not None
    assert mapped.map[:64] == MAPPED_GOLDEN + bytes(32)
    with path.open("r+b") as other:
        other.seek(320)
        other.write(b"head")
    assert mapped.map[320:324] == b"head"
    mapped.close()
    mapped.close()
    assert not path.exists()
    assert mapped.map is None


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_session_lock_is_freed_by_the_kernel_when_the_client_is_killed(file: SessionFile, run, number: signal.Signals):
    client = run(CLIENT + "    print('locked', flush=True); time.sleep(60)\n", file.path)
    assert _line(client) == "locked"
    assert file.locked()
    client.send_signal(number)
    client.wait(timeout=30)
    assert _eventually_free(file)


def test_session_lock_of_a_stopped_client_is_kept(file: SessionFile, run):
    client = run(CLIENT + "    print('locked', flush=True); time.sleep(60)\n", file.path)
    assert _line(client) == "locked"
    client.send_signal(signal.SIGSTOP)
    time.sleep(0.2)
    assert file.locked()


def test_session_lock_is_not_inherited_over_fork(file: SessionFile, run):
    """An engine that forked a worker and died is dead, although the worker has its descriptors."""
    forks = """
    child = os.fork()
    if not child:
        time.sleep(60)
    print(child, flush=True)
    sys.stdin.readline()
    os._exit(0)
"""
    client = run(CLIENT + forks, file.path)
    worker = int(_line(client))
    try:
        assert file.locked()
        assert client.stdin is not None
        client.stdin.write("go\n")
        client.stdin.flush()
        client.wait(timeout=30)
        assert _eventually_free(file)
        os.kill(worker, 0)  # it still runs
    finally:
        os.kill(worker, signal.SIGKILL)


def test_session_lock_is_not_inherited_over_exec(file: SessionFile, run):
    spawns = """
    child = subprocess.Popen(["sleep", "60"], close_fds=False, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    print(child.pid, os.listdir(f"/proc/{child.pid}/fd"), flush=True)
    sys.stdin.readline()
    os._exit(0)
"""
    client = run(CLIENT + spawns, file.path)
    sleeper = int(_line(client).split()[0])
    try:
        targets = [os.readlink(f"/proc/{sleeper}/fd/{fd}") for fd in os.listdir(f"/proc/{sleeper}/fd")]
        assert str(file.path) not in targets
        assert client.stdin is not None
        client.stdin.write("go\n")
        client.stdin.flush()
        client.wait(timeout=30)
        assert _eventually_free(file)
    finally:
        os.kill(sleeper, signal.SIGKILL)


def test_session_lock_removed_file_still_shows_the_client(file: SessionFile, run):
    client = run(CLIENT + "    print('locked', flush=True); time.sleep(60)\n", file.path)
    assert _line(client) == "locked"
    file.path.unlink()
    assert file.locked()
    client.kill()
    client.wait(timeout=30)
    assert _eventually_free(file)
