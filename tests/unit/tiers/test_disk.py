"""The module that opens files of the SSD directory: owners, and calls of the system that fail or do half."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import mmap
import os
import shutil
import stat
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from disk_pages import PAGE_BYTES, pages, read_pages
from leaks import open_fds

from kvstore.errors import PermissionRefused, ResourceTaken
from kvstore.tiers import disk
from kvstore.tiers.disk import LOCK_NAME, SLABS_NAME, SlabFile, SsdDirectory

SHM = Path("/dev/shm")
root_only = pytest.mark.skipif(os.geteuid() != 0, reason="needs root (to be another user)")


@pytest.fixture(params=["disk", "tmpfs"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A directory that is not there yet, on a file system of each kind; no descriptor may be left."""
    before = open_fds()
    above = tmp_path if request.param == "disk" else Path(tempfile.mkdtemp(prefix="kvt-", dir=SHM))
    try:
        yield above / "ssd"
    finally:
        if request.param == "tmpfs":
            shutil.rmtree(above, ignore_errors=True)
    assert set(open_fds()) <= set(before), "a file descriptor was left open"


@pytest.fixture
def directory(place: Path) -> Iterator[SsdDirectory]:
    opened = SsdDirectory(place)
    yield opened
    opened.close()


@pytest.fixture
def slabs(directory: SsdDirectory) -> Iterator[SlabFile]:
    opened = directory.open_slabs(create=True)
    yield opened
    opened.close()


def fail(monkeypatch: pytest.MonkeyPatch, name: str, number: int, when: Callable[..., bool] = lambda *_: True) -> None:
    """Let a call of ``os`` fail."""
    real = getattr(os, name)

    def failing(*arguments: Any, **options: Any) -> Any:
        if when(*arguments):
            raise OSError(number, os.strerror(number))
        return real(*arguments, **options)

    monkeypatch.setattr(disk.os, name, failing)


def short(monkeypatch: pytest.MonkeyPatch, name: str, most_bytes: int) -> list[int]:
    """Let ``pwritev`` or ``preadv`` transfer a few bytes at a time; the list gets each call's number of buffers."""
    real, counts = getattr(os, name), []

    def shortened(fd: int, buffers: list[memoryview], offset: int) -> int:
        counts.append(len(buffers))
        return real(fd, [buffers[0][:most_bytes]], offset)

    monkeypatch.setattr(disk.os, name, shortened)
    return counts


# ---------------------------------------------------------------- slabs


async def test_files_are_private_and_closed_on_exec(directory: SsdDirectory, slabs: SlabFile):
    log = await directory.create_log("log-1", b"")
    await directory.write_whole("checkpoint", [b""])
    files = {path.name: stat.S_IMODE(path.stat().st_mode) for path in directory.path.iterdir()}
    assert files == dict.fromkeys(("log-1", "checkpoint", SLABS_NAME, LOCK_NAME), 0o600)
    opened = [fd for fd, path in open_fds().items() if path.startswith(str(directory.path))]
    assert len(opened) == 4
    assert all(fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC for fd in opened)
    await log.close()


def test_slabs_short_transfers_are_continued(slabs: SlabFile, monkeypatch: pytest.MonkeyPatch):
    slabs.format(0, 8 * PAGE_BYTES)
    memory = memoryview(mmap.mmap(-1, 4 * PAGE_BYTES))
    memory[:] = os.urandom(len(memory))
    with monkeypatch.context() as patched:
        calls = short(patched, "pwritev", PAGE_BYTES)
        slabs.write(PAGE_BYTES, [memory[: 3 * PAGE_BYTES], memory[3 * PAGE_BYTES :]])
    assert calls == [2, 2, 2, 1]
    found = memoryview(mmap.mmap(-1, 4 * PAGE_BYTES))
    with monkeypatch.context() as patched:
        short(patched, "preadv", PAGE_BYTES)
        slabs.read(PAGE_BYTES, [found[:PAGE_BYTES], found[PAGE_BYTES:]])
    assert found == memory


def test_slabs_writes_that_make_no_progress_end(slabs: SlabFile, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(disk.os, "pwritev", lambda fd, buffers, offset: 0)
    with pytest.raises(OSError, match="short write") as caught:
        slabs.write(0, pages("a"))
    assert caught.value.errno == errno.EIO


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT])
def test_slabs_errors_of_the_system_come_out_as_they_are(slabs: SlabFile, monkeypatch: pytest.MonkeyPatch, number: int):
    calls: list[tuple[str, Callable[[], object]]] = [
        ("pwritev", lambda: slabs.write(0, pages("a"))),
        ("pwritev", lambda: slabs.format(0, PAGE_BYTES)),
        ("preadv", lambda: slabs.read(0, pages("a"))),
        ("fdatasync", slabs.sync),
        ("ftruncate", lambda: slabs.truncate(0)),
    ]
    for name, call in calls:
        with monkeypatch.context() as patched:
            fail(patched, name, number)
            with pytest.raises(OSError, match=os.strerror(number)) as caught:
                call()
            assert caught.value.errno == number


def test_slabs_used_by_threads_at_once_keep_ranges_apart(slabs: SlabFile):
    slabs.format(0, 64 * PAGE_BYTES)
    wrong: list[str] = []

    def work(number: int) -> None:
        letter = chr(ord("a") + number)
        for turn in range(20):
            first = number * 8 + turn % 7
            slabs.write(first * PAGE_BYTES, pages(letter, letter.upper()))
            found = read_pages(slabs, first, 2)
            if found != letter + letter.upper():
                wrong.append(found)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong


def test_slabs_closed_during_a_write_let_it_end(slabs: SlabFile, monkeypatch: pytest.MonkeyPatch):
    """The number of a closed descriptor is given to the next file: a write must not go there."""
    entered, go = threading.Event(), threading.Event()
    real = os.pwritev

    def slow(fd: int, buffers: list[memoryview], offset: int) -> int:
        entered.set()
        assert go.wait(30)
        return real(fd, buffers, offset)

    monkeypatch.setattr(disk.os, "pwritev", slow)
    fd = slabs._fd
    thread = threading.Thread(target=slabs.write, args=(0, pages("a")))
    thread.start()
    assert entered.wait(30)
    slabs.close()
    assert fd in open_fds()
    go.set()
    thread.join(30)
    assert fd not in open_fds()


# ---------------------------------------------------------------- past the page cache


def test_slabs_on_a_disk_are_read_past_the_page_cache(tmp_path: Path):
    directory = SsdDirectory(tmp_path / "ssd")
    slabs = directory.open_slabs(create=True)
    try:
        if not slabs.direct:
            pytest.skip(f"the file system of {tmp_path} takes no O_DIRECT")
        assert fcntl.fcntl(slabs._fd, fcntl.F_GETFL) & os.O_DIRECT
        with pytest.raises(OSError, match="Invalid argument"):
            slabs.write(0, [pages("a", "b")[0][1:]])
    finally:
        slabs.close()
        directory.close()


@pytest.mark.parametrize("call", ["open", "pwritev", "preadv"])
def test_slabs_where_direct_transfers_are_refused_are_buffered(
    directory: SsdDirectory, monkeypatch: pytest.MonkeyPatch, call: str
):
    """Some file systems refuse the flag at open, some at the first transfer."""

    def direct(first: Any, second: Any, *_: Any) -> bool:
        return bool((second if call == "open" else fcntl.fcntl(first, fcntl.F_GETFL)) & os.O_DIRECT)

    fail(monkeypatch, call, errno.EINVAL, direct)
    slabs = directory.open_slabs(create=True)
    assert not slabs.direct
    slabs.write(0, pages("a"))
    assert read_pages(slabs, 0, 1) == "a"
    slabs.close()
    assert directory.names() == [SLABS_NAME]


def test_slabs_on_a_full_disk_are_opened_as_before(directory: SsdDirectory, monkeypatch: pytest.MonkeyPatch):
    slabs = directory.open_slabs(create=True)
    slabs.write(0, pages("a"))
    slabs.close()
    for name in ("pwritev", "open"):
        with monkeypatch.context() as patched:
            fail(patched, name, errno.ENOSPC, lambda first, *_: not isinstance(first, str) or first == "direct.tmp")
            again = directory.open_slabs(create=False)
        assert again.direct is slabs.direct
        assert read_pages(again, 0, 1) == "a"
        again.close()


# ---------------------------------------------------------------- logs


async def test_log_after_a_failure_takes_nothing_more(directory: SsdDirectory, monkeypatch: pytest.MonkeyPatch):
    """Of a sync that failed once the kernel speaks no more; a frame behind a torn one would never be read."""
    log = await directory.create_log("log-1", b"")

    async def failing(fd: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patched:
        patched.setattr(disk, "_fdatasync", failing)
        with pytest.raises(OSError, match="Input/output error"):
            await log.sync()
    for call in (log.sync(), log.append(b"more")):
        with pytest.raises(OSError, match="start a new one"):
            await call
    await log.close()


async def test_log_that_cannot_be_synced_leaves_nothing(directory: SsdDirectory, monkeypatch: pytest.MonkeyPatch):
    async def failing(fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for name in ("_fdatasync", "_fsync"):
        with monkeypatch.context() as patched:
            patched.setattr(disk, name, failing)
            with pytest.raises(OSError, match="No space left"):
                await directory.create_log("log-1", b"header")
        assert directory.names() == []


async def _cancelled_while(
    monkeypatch: pytest.MonkeyPatch, what: str, call: Callable[[], Any], after: float = 0.02
) -> None:
    """Cancel a call while a thread is in a slow step of it; it must not end before the step has."""
    ended = threading.Event()
    real = getattr(disk, what)

    async def slow(*arguments: Any) -> Any:
        def step() -> None:
            threading.Event().wait(0.2)
            ended.set()

        await asyncio.get_running_loop().run_in_executor(None, step)
        return await real(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(disk, what, slow)
        task = asyncio.ensure_future(call())
        for _ in range(2):
            await asyncio.sleep(after)
            task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert ended.is_set()


@pytest.mark.parametrize("step", ["_opened", "_fdatasync", "_fsync"])
async def test_cancelled_creation_ends_after_its_system_call_and_leaves_nothing(
    directory: SsdDirectory, monkeypatch: pytest.MonkeyPatch, step: str
):
    await _cancelled_while(monkeypatch, step, lambda: directory.create_log("log-1", b"header"))
    assert os.listdir(directory.path) == [LOCK_NAME]
    if step != "_fsync":
        await _cancelled_while(monkeypatch, step, lambda: directory.write_whole("checkpoint", [b"content"]))
        assert os.listdir(directory.path) == [LOCK_NAME]


async def test_cancelled_sync_makes_the_log_unusable(directory: SsdDirectory, monkeypatch: pytest.MonkeyPatch):
    log = await directory.create_log("log-1", b"")
    await _cancelled_while(monkeypatch, "_fdatasync", log.sync)
    with pytest.raises(OSError, match="start a new one"):
        await log.append(b"more")
    await log.close()


# ---------------------------------------------------------------- files written whole


async def test_whole_file_that_fails_leaves_the_old_one(directory: SsdDirectory, monkeypatch: pytest.MonkeyPatch):
    await directory.write_whole("checkpoint", [b"old"])

    def chunks() -> Iterator[bytes]:
        yield b"new"
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        await directory.write_whole("checkpoint", chunks())
    with monkeypatch.context() as patched:
        fail(patched, "rename", errno.EIO)
        with pytest.raises(OSError, match="Input/output error"):
            await directory.write_whole("checkpoint", [b"new"])
    assert directory.read_bytes("checkpoint", 100) == b"old"
    assert sorted(os.listdir(directory.path)) == ["checkpoint", LOCK_NAME]


# ---------------------------------------------------------------- the directory


def test_directory_is_made_private_and_its_lock_goes_with_it(place: Path):
    directory = SsdDirectory(place / "below")
    assert stat.S_IMODE((place / "below").stat().st_mode) == 0o700
    assert directory.there()
    assert directory.free_bytes() > 0
    directory.close()
    directory.close()
    assert os.listdir(place / "below") == []


def test_directory_of_a_daemon_that_runs_is_refused_by_its_pid(directory: SsdDirectory):
    expected = rf"the SSD directory {directory.path} is in use by another daemon \(pid {os.getpid()}\); stop it, or"
    with pytest.raises(ResourceTaken, match=expected):
        SsdDirectory(directory.path)


def test_directory_drops_what_was_being_written_when_the_last_owner_died(place: Path):
    place.mkdir()
    for name in ("checkpoint.tmp", "checkpoint", "direct.tmp"):
        (place / name).write_text("content")
    directory = SsdDirectory(place)
    assert sorted(os.listdir(place)) == ["checkpoint", LOCK_NAME]
    assert directory.names() == ["checkpoint"]
    directory.close()


def test_directory_that_is_a_link_or_a_file_is_refused(place: Path):
    place.parent.joinpath("target").mkdir()
    place.symlink_to(place.parent / "target")
    with pytest.raises(PermissionRefused, match="no directory"):
        SsdDirectory(place)
    place.unlink()
    place.touch()
    with pytest.raises(PermissionRefused, match="no directory"):
        SsdDirectory(place)


@root_only
def test_directory_and_files_of_another_user_are_refused(place: Path):
    place.mkdir()
    os.chown(place, 12345, -1)
    with pytest.raises(PermissionRefused, match="belongs to user 12345"):
        SsdDirectory(place)
    os.chown(place, 0, -1)
    directory = SsdDirectory(place)
    (place / SLABS_NAME).write_bytes(bytes(PAGE_BYTES))
    os.chown(place / SLABS_NAME, 12345, -1)
    for call in (lambda: directory.open_slabs(create=False), lambda: directory.read_bytes(SLABS_NAME, PAGE_BYTES)):
        with pytest.raises(PermissionError, match="is no file of user 0"):
            call()
    directory.close()


def test_files_that_are_links_or_pipes_are_not_opened(directory: SsdDirectory):
    target = directory.path.parent / "target"
    target.write_bytes(b"precious")
    (directory.path / SLABS_NAME).symlink_to(target)
    (directory.path / "pipe").symlink_to(target)
    os.mkfifo(directory.path / "fifo")
    with pytest.raises(OSError, match="symbolic links"):
        directory.open_slabs(create=False)
    with pytest.raises(OSError, match="symbolic links"):
        directory.read_bytes("pipe", 100)
    with pytest.raises(PermissionError, match="is no file of user"):
        directory.read_bytes("fifo", 100)
    assert target.read_bytes() == b"precious"


async def test_directory_removed_or_replaced_is_noticed(directory: SsdDirectory):
    (directory.path / LOCK_NAME).unlink()
    directory.path.rmdir()
    assert not directory.there()
    directory.path.mkdir()
    assert not directory.there()
    (directory.path / LOCK_NAME).write_text("of another daemon")
    for call in (directory.create_log("log-1", b""), directory.write_whole("checkpoint", [b""])):
        with pytest.raises(FileNotFoundError):
            await call
    directory.close()
    assert os.listdir(directory.path) == [LOCK_NAME], "the new directory was touched"


def test_directory_on_a_full_file_system_opens_without_a_pid(place: Path, monkeypatch: pytest.MonkeyPatch):
    fail(monkeypatch, "pwrite", errno.ENOSPC)
    directory = SsdDirectory(place)
    with pytest.raises(ResourceTaken, match="pid unknown"):
        SsdDirectory(place)
    directory.close()
