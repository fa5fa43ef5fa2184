"""The module that opens, maps, locks and removes files: owners, permissions, full file systems, stale files."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import select
import signal
import stat
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from leaks import open_fds

from kvstore.errors import InsufficientMemory, PermissionRefused, ResourceTaken
from kvstore.mapped.arena import ArenaHeader
from kvstore.tiers import files
from kvstore.tiers.dram import Arena
from kvstore.tiers.files import (
    Doorbell,
    OwnerLock,
    SessionFile,
    SharedFile,
    free_bytes,
    make_directory,
    read_text,
    remove_stale,
)

PAGE_BYTES = 4096
root_only = pytest.mark.skipif(os.geteuid() != 0, reason="needs root (to mount, or to be another user)")


@pytest.fixture
def same_fds() -> Iterator[None]:
    before = open_fds()
    yield
    assert set(open_fds()) <= set(before), "a file descriptor was left open"


def _lock(path: Path) -> OwnerLock:
    return OwnerLock(path, "the arena directory /x", "choose another --arena-dir")


def _python(source: str, *arguments: object, **options: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(source), *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        **options,  # type: ignore[call-overload]
    )


# ---------------------------------------------------------------- directories


def test_make_directory_new_one_has_the_mode_whatever_the_umask(tmp_path: Path):
    before = os.umask(0o077)
    try:
        make_directory(tmp_path / "above" / "arena", 0o750)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "above" / "arena").stat().st_mode) == 0o750


def test_make_directory_existing_one_keeps_its_mode(tmp_path: Path):
    (tmp_path / "arena").mkdir(mode=0o700)
    make_directory(tmp_path / "arena", 0o755)
    assert stat.S_IMODE((tmp_path / "arena").stat().st_mode) == 0o700


def test_make_directory_link_is_refused(tmp_path: Path):
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    with pytest.raises(PermissionRefused, match="no directory"):
        make_directory(tmp_path / "link", 0o700)


def test_make_directory_file_in_its_place_is_refused(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(PermissionRefused, match="no directory"):
        make_directory(tmp_path / "file", 0o700)
    with pytest.raises(PermissionRefused, match="Not a directory|File exists"):
        make_directory(tmp_path / "file" / "below", 0o700)


@root_only
def test_make_directory_of_another_user_is_refused_unless_it_need_not_be_private(tmp_path: Path):
    directory = tmp_path / "theirs"
    directory.mkdir()
    os.chown(directory, 12345, -1)
    with pytest.raises(PermissionRefused, match="belongs to user 12345"):
        make_directory(directory, 0o700)
    make_directory(directory, 0o700, private=False)


@root_only
def test_make_directory_group_is_set_on_a_new_one(tmp_path: Path):
    make_directory(tmp_path / "shared", 0o750, 12345)
    assert (tmp_path / "shared").stat().st_gid == 12345


@root_only
def test_make_directory_without_permission_is_refused(tmp_path: Path):
    (tmp_path / "closed").mkdir(mode=0o700)
    tmp_path.chmod(0o755)
    source = """
        import os, sys
        from pathlib import Path
        from kvstore.errors import PermissionRefused
        from kvstore.tiers.files import make_directory
        os.setuid(12345)
        try:
            make_directory(Path(sys.argv[1]), 0o700)
        except PermissionRefused as error:
            print(error)
    """
    child = _python(source, tmp_path / "closed" / "arena")
    assert "cannot make the directory" in child.communicate(timeout=30)[0]


# ---------------------------------------------------------------- owner locks


def test_owner_lock_held_names_the_owner_and_the_remedy(tmp_path: Path, same_fds: None):
    lock = _lock(tmp_path / "owner.lock")
    with pytest.raises(ResourceTaken, match=rf"/x is in use by another daemon \(pid {os.getpid()}\); choose another"):
        _lock(tmp_path / "owner.lock")
    lock.release()
    lock.release()
    assert not (tmp_path / "owner.lock").exists()
    _lock(tmp_path / "owner.lock").release()


def test_owner_lock_stale_file_of_any_content_is_taken_over(tmp_path: Path, same_fds: None):
    path = tmp_path / "owner.lock"
    path.write_text("99999999 and much more than a pid, left by a daemon that was killed\n")
    lock = _lock(path)
    assert path.read_text() == f"{os.getpid()}\n"
    lock.release()


def test_owner_lock_is_free_after_kill_minus_nine(tmp_path: Path):
    path = tmp_path / "owner.lock"
    source = """
        import sys, time
        from pathlib import Path
        from kvstore.tiers.files import OwnerLock
        lock = OwnerLock(Path(sys.argv[1]), "it", "wait")
        print("held", flush=True)
        time.sleep(60)
    """
    child = _python(source, path)
    assert child.stdout is not None
    assert child.stdout.readline() == "held\n"
    with pytest.raises(ResourceTaken, match=f"pid {child.pid}"):
        _lock(path)
    child.send_signal(signal.SIGKILL)
    child.communicate(timeout=30)
    _lock(path).release()


def test_owner_lock_link_is_not_followed(tmp_path: Path, same_fds: None):
    (tmp_path / "target").write_text("precious")
    (tmp_path / "owner.lock").symlink_to(tmp_path / "target")
    with pytest.raises(PermissionRefused, match="cannot open the lock file"):
        _lock(tmp_path / "owner.lock")
    assert (tmp_path / "target").read_text() == "precious"


def test_owner_lock_in_a_directory_that_is_gone_is_refused(tmp_path: Path):
    with pytest.raises(PermissionRefused, match="No such file"):
        _lock(tmp_path / "gone" / "owner.lock")


def test_owner_lock_unsupported_by_the_file_system_is_not_taken_for_an_owner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, same_fds: None
):
    def flock(fd: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(PermissionRefused, match="cannot lock .*No locks available"):
        _lock(tmp_path / "owner.lock")


def test_owner_lock_removed_between_open_and_lock_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, same_fds: None
):
    """The race with an owner that releases: the lock of a file that has no name is worth nothing."""
    path = tmp_path / "owner.lock"
    real, removed = fcntl.flock, []

    def flock(fd: int, operation: int) -> None:
        if not removed:
            removed.append(True)
            path.unlink()
        real(fd, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    lock = _lock(path)
    assert os.path.samestat(os.fstat(lock._fd), path.stat())
    lock.release()


def test_owner_lock_contended_by_processes_has_one_owner_at_a_time(tmp_path: Path):
    """Processes take and release as fast as they can; each owner checks that nobody else is one."""
    source = """
        import os, sys, time
        from pathlib import Path
        from kvstore.errors import ResourceTaken
        from kvstore.tiers.files import OwnerLock
        path, mark = Path(sys.argv[1]), Path(sys.argv[2])
        sys.stdin.readline()
        owned = 0
        end = time.monotonic() + 2.0
        while time.monotonic() < end:
            try:
                lock = OwnerLock(path, "it", "wait")
            except ResourceTaken:
                continue
            # Fails where another owner is there at the same time.
            os.close(os.open(mark, os.O_CREAT | os.O_EXCL))
            owned += 1
            os.unlink(mark)
            lock.release()
        print(owned)
    """
    children = [_python(source, tmp_path / "owner.lock", tmp_path / "mark") for _ in range(4)]
    try:
        for child in children:
            assert child.stdin is not None
            child.stdin.write("go\n")
            child.stdin.flush()
        outputs = [child.communicate(timeout=60)[0] for child in children]
    finally:
        for child in children:
            child.kill()
    assert [child.returncode for child in children] == [0] * 4
    assert sum(map(int, outputs)) > 100
    assert not (tmp_path / "owner.lock").exists()


# ---------------------------------------------------------------- shared files


def test_shared_file_has_mode_and_size_and_goes_with_close(tmp_path: Path, same_fds: None):
    path = tmp_path / "arena-1"
    shared = SharedFile(path, 16 * PAGE_BYTES, 0o660)
    assert stat.S_IMODE(path.stat().st_mode) == 0o660
    assert path.stat().st_size == 16 * PAGE_BYTES
    with open(path, "rb") as other, mmap.mmap(other.fileno(), 0, access=mmap.ACCESS_READ) as view:
        shared.allocate(0, PAGE_BYTES)
        shared.map[:5] = b"bytes"
        assert view[:5] == b"bytes"
    shared.close()
    shared.close()
    assert not path.exists()


def test_shared_file_existing_one_is_not_touched(tmp_path: Path, same_fds: None):
    path = tmp_path / "arena-1"
    path.write_text("of another daemon")
    with pytest.raises(PermissionRefused, match="File exists"):
        SharedFile(path, PAGE_BYTES, 0o600)
    assert path.read_text() == "of another daemon"


def test_shared_file_that_cannot_be_mapped_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, same_fds: None
):
    def no_mapping(fd: int, length: int) -> mmap.mmap:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(files.mmap, "mmap", no_mapping)
    with pytest.raises(InsufficientMemory, match="Cannot allocate memory"):
        SharedFile(tmp_path / "arena-1", PAGE_BYTES, 0o600)
    assert list(tmp_path.iterdir()) == []


def test_shared_file_too_large_for_its_file_system_is_insufficient_memory(tmp_path: Path, same_fds: None):
    with pytest.raises(InsufficientMemory):
        SharedFile(tmp_path / "arena-1", 1 << 62, 0o600)
    assert list(tmp_path.iterdir()) == []


def test_shared_file_closed_while_a_transfer_reads_keeps_its_bytes(tmp_path: Path):
    shared = SharedFile(tmp_path / "arena-1", PAGE_BYTES, 0o600)
    shared.map[:5] = b"bytes"
    view = memoryview(shared.map)
    shared.close()
    assert bytes(view[:5]) == b"bytes"
    view.release()
    shared.map.close()


def test_shared_file_allocate_on_a_full_file_system_is_insufficient_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    shared = SharedFile(tmp_path / "arena-1", PAGE_BYTES, 0o600)

    def full(fd: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(InsufficientMemory, match="no room for 4096 bytes more: No space left"):
        shared.allocate(0, PAGE_BYTES)
    shared.close()


def test_arena_without_room_for_its_first_page_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, same_fds: None
):
    def full(fd: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(InsufficientMemory):
        Arena(tmp_path / "arena-1", ArenaHeader(1, PAGE_BYTES, 1, os.getpid()), 0o600)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def small_file_system(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 4 MiB."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small file system")
    where = tmp_path / "small"
    where.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(where)], capture_output=True, text=True, check=False
    )
    if made.returncode:
        pytest.skip(f"cannot mount a small file system: {made.stderr.strip()}")
    try:
        yield where
    finally:
        subprocess.run(["umount", "-l", str(where)], check=True)


def test_arena_larger_than_its_file_system_ends_as_insufficient_memory_and_not_by_sigbus(small_file_system: Path):
    """In a process of its own: what fails here fails by a signal."""
    source = """
        import os, sys
        from pathlib import Path
        from kvstore.errors import InsufficientMemory
        from kvstore.mapped.arena import ArenaHeader
        from kvstore.tiers.dram import Arena
        slab = 1 << 20
        arena = Arena(Path(sys.argv[1]) / "arena-1", ArenaHeader(1, slab, 16, os.getpid()), 0o600)
        populated = 0
        try:
            for index in range(16):
                step = 0
                while not arena.populate_step(index, step):
                    step += 1
                populated += 1
        except InsufficientMemory as error:
            print(error)
        for index in range(populated):
            first = 512 + index * slab // 4096
            for page in range(first, first + slab // 4096):
                arena.write(page, 4096, bytes(256), b"x" * 3840)
        arena.close()
        print(populated)
    """
    child = _python(source, small_file_system)
    lines = child.communicate(timeout=60)[0].splitlines()
    assert child.returncode == 0, f"ended with {child.returncode}"
    assert "has no room for 1048576 bytes more: No space left on device" in lines[0]
    assert lines[1] == "3"
    assert list(small_file_system.iterdir()) == []


def test_files_on_a_full_file_system_are_refused_and_leave_nothing(small_file_system: Path, same_fds: None):
    filler = small_file_system / "filler"
    with filler.open("wb") as out:
        os.posix_fallocate(out.fileno(), 0, 4 << 20)
    assert free_bytes(small_file_system) == 0
    with pytest.raises(InsufficientMemory, match="No space left"):
        _lock(small_file_system / "owner.lock")
    for mapped in (False, True):
        with pytest.raises(OSError, match="No space left"):
            SessionFile(small_file_system / "client-1", b"header", PAGE_BYTES, 0o600, mapped=mapped)
    with pytest.raises(InsufficientMemory):
        Arena(small_file_system / "arena-1", ArenaHeader(1, 1 << 20, 1, os.getpid()), 0o600)
    assert list(small_file_system.iterdir()) == [filler]


# ---------------------------------------------------------------- the daemon's life, and its doorbell


def test_shared_file_locked_for_life_shows_its_end(tmp_path: Path, same_fds: None):
    shared = SharedFile(tmp_path / "index-1", PAGE_BYTES, 0o600)
    with open(shared.path, "rb") as other:
        fcntl.flock(other, fcntl.LOCK_SH | fcntl.LOCK_NB)
        fcntl.flock(other, fcntl.LOCK_UN)
        shared.lock_for_life()
        with pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_SH | fcntl.LOCK_NB)
        shared.close()
        fcntl.flock(other, fcntl.LOCK_SH | fcntl.LOCK_NB)


def test_doorbell_rung_is_readable_until_silenced_and_goes_with_close(tmp_path: Path, same_fds: None):
    bell = Doorbell(tmp_path / "doorbell-1", 0o660)
    assert stat.S_ISFIFO(bell.path.stat().st_mode)
    assert stat.S_IMODE(bell.path.stat().st_mode) == 0o660
    ringing = os.open(bell.path, os.O_WRONLY | os.O_NONBLOCK)
    assert not select.select([bell.fd], [], [], 0)[0]
    for _ in range(3):
        os.write(ringing, b"!")
    assert select.select([bell.fd], [], [], 0)[0]
    bell.silence()
    assert not select.select([bell.fd], [], [], 0)[0]
    bell.silence()
    os.write(ringing, b"!")
    os.close(ringing)
    bell.silence()
    # The last client is gone, and it is silent: a FIFO without a writer would be readable for ever.
    assert not select.select([bell.fd], [], [], 0)[0]
    bell.close()
    bell.close()
    assert list(tmp_path.iterdir()) == []


def test_doorbell_that_rings_without_end_is_silenced_in_one_read(tmp_path: Path, same_fds: None):
    bell = Doorbell(tmp_path / "doorbell-1", 0o600)
    ringing = os.open(bell.path, os.O_WRONLY | os.O_NONBLOCK)
    with contextlib.suppress(BlockingIOError):
        while os.write(ringing, b"!" * 4096):
            pass
    bell.silence()
    assert not select.select([bell.fd], [], [], 0)[0]
    os.close(ringing)
    bell.close()


def test_doorbell_existing_file_is_not_touched(tmp_path: Path, same_fds: None):
    (tmp_path / "doorbell-1").write_text("of another daemon")
    with pytest.raises(PermissionRefused, match="cannot make the FIFO .*File exists"):
        Doorbell(tmp_path / "doorbell-1", 0o600)
    assert (tmp_path / "doorbell-1").read_text() == "of another daemon"


# ---------------------------------------------------------------- what is stale


def test_remove_stale_marks_what_others_still_map(tmp_path: Path):
    path = tmp_path / "arena-7"
    path.write_bytes(bytes(64))
    (tmp_path / "owner.lock").touch()
    with path.open("rb") as other, mmap.mmap(other.fileno(), 0, access=mmap.ACCESS_READ) as view:
        assert remove_stale(tmp_path, "arena-", (12, b"\x02\0\0\0")) == 1
        assert view[12:16] == b"\x02\0\0\0"
    assert [found.name for found in tmp_path.iterdir()] == ["owner.lock"]
    assert remove_stale(tmp_path, "client-") == 0


def test_remove_stale_link_is_removed_and_not_followed(tmp_path: Path):
    precious = tmp_path / "precious"
    precious.write_bytes(bytes(64))
    (tmp_path / "arena-1").symlink_to(precious)
    assert remove_stale(tmp_path, "arena-", (12, b"\x02\0\0\0")) == 1
    assert precious.read_bytes() == bytes(64)
    assert not (tmp_path / "arena-1").is_symlink()


def test_remove_stale_pipe_does_not_block_and_directory_is_named(tmp_path: Path):
    os.mkfifo(tmp_path / "arena-1")
    begin = time.monotonic()
    assert remove_stale(tmp_path, "arena-", (0, b"x")) == 1
    assert time.monotonic() - begin < 5
    (tmp_path / "arena-2").mkdir()
    with pytest.raises(PermissionRefused, match=r"cannot remove .*arena-2.*; remove it"):
        remove_stale(tmp_path, "arena-", (0, b"x"))


def test_read_text_of_nothing_is_empty(tmp_path: Path):
    assert read_text(str(tmp_path / "nothing")) == ""
