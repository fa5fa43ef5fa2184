"""The module that opens files of the SSD directory, on file systems that are there: whole transfers, owners, faults."""

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
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from leaks import open_fds

from kvstore.errors import PermissionRefused, ResourceTaken
from kvstore.tiers import disk
from kvstore.tiers.disk import LOCK_NAME, SLABS_NAME, SlabFile, SsdDirectory

PAGE_BYTES = 4096
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


def pages(*letters: str) -> list[memoryview]:
    """Aligned buffers of one page, each full of its letter."""
    memory = memoryview(mmap.mmap(-1, max(len(letters), 1) * PAGE_BYTES))
    found = [memory[at * PAGE_BYTES : (at + 1) * PAGE_BYTES] for at in range(len(letters))]
    for page, letter in zip(found, letters, strict=True):
        page[:] = letter.encode() * PAGE_BYTES
    return found


def read_pages(slabs: SlabFile, first: int, count: int) -> str:
    found = pages(*"?" * count)
    slabs.read(first * PAGE_BYTES, found)
    for page in found:
        assert set(page) == {page[0]}
    return "".join(chr(page[0]) for page in found)


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


def test_slabs_written_are_read_from_the_same_offsets(slabs: SlabFile):
    slabs.format(0, 8 * PAGE_BYTES)
    slabs.write(2 * PAGE_BYTES, pages("a", "b"))
    slabs.write(5 * PAGE_BYTES, pages("c"))
    slabs.sync()
    assert read_pages(slabs, 0, 8) == "\0\0ab\0c\0\0"


def test_slabs_opened_again_have_their_bytes_and_the_mode_of_a_private_file(directory: SsdDirectory):
    slabs = directory.open_slabs(create=True)
    slabs.write(0, pages("a", "b"))
    slabs.close()
    path = directory.path / SLABS_NAME
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    again = directory.open_slabs(create=False)
    assert (again.size_bytes, read_pages(again, 0, 2)) == (2 * PAGE_BYTES, "ab")
    assert fcntl.fcntl(again._fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    again.close()


def test_slabs_created_where_some_are_or_opened_where_none_are_is_an_error(directory: SsdDirectory):
    with pytest.raises(FileNotFoundError):
        directory.open_slabs(create=False)
    directory.open_slabs(create=True).close()
    with pytest.raises(FileExistsError):
        directory.open_slabs(create=True)


def test_slabs_format_grows_the_file_and_occupies_its_bytes(directory: SsdDirectory, slabs: SlabFile):
    slabs.format(0, (8 << 20) + PAGE_BYTES)
    slabs.sync()
    assert slabs.size_bytes == (8 << 20) + PAGE_BYTES
    assert directory.used_bytes() >= (8 << 20) + PAGE_BYTES
    slabs.truncate(PAGE_BYTES)
    assert slabs.size_bytes == PAGE_BYTES
    assert directory.used_bytes() < 1 << 20


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


def test_slabs_more_buffers_than_a_call_takes_are_all_written_and_read(slabs: SlabFile):
    count = disk._MOST_BUFFERS * 2 + 3
    memory = memoryview(mmap.mmap(-1, count * PAGE_BYTES))
    memory[:] = os.urandom(len(memory))
    slabs.write(0, [memory[at : at + PAGE_BYTES] for at in range(0, len(memory), PAGE_BYTES)])
    found = memoryview(mmap.mmap(-1, count * PAGE_BYTES))
    slabs.read(0, [found[at : at + PAGE_BYTES] for at in range(0, len(found), PAGE_BYTES)])
    assert found == memory


def test_slabs_of_no_bytes_at_all_are_nothing_to_do(slabs: SlabFile):
    slabs.write(0, [])
    slabs.write(0, [*pages("a"), memoryview(b"")])
    slabs.read(0, [memoryview(bytearray())])
    assert read_pages(slabs, 0, 1) == "a"


@pytest.mark.parametrize("size_bytes", [0, PAGE_BYTES, PAGE_BYTES + 100])
def test_slabs_read_beyond_the_end_is_an_io_error(slabs: SlabFile, size_bytes: int):
    slabs.truncate(size_bytes)
    with pytest.raises(OSError, match="short read") as caught:
        slabs.read(0, pages("?", "?"))
    assert caught.value.errno == errno.EIO


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


def test_slabs_closed_refuse_calls_and_close_once(slabs: SlabFile):
    slabs.close()
    slabs.close()
    for call in (slabs.sync, lambda: slabs.size_bytes, lambda: slabs.write(0, pages("a"))):
        with pytest.raises(OSError, match="closed") as caught:
            call()
        assert caught.value.errno == errno.EBADF


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


async def test_log_has_its_header_and_what_was_appended(directory: SsdDirectory):
    log = await directory.create_log("log-1", b"header")
    for data in (b" one", b"", b" two"):
        await log.append(data)
    await log.sync()
    assert log.size_bytes == len(b"header one two")
    await log.close()
    assert directory.read_bytes("log-1", 100) == b"header one two"
    assert directory.names() == ["log-1"]
    assert stat.S_IMODE((directory.path / "log-1").stat().st_mode) == 0o600


async def test_log_appends_at_once_do_not_mix(directory: SsdDirectory):
    log = await directory.create_log("log-1", b"")
    frames = [bytes([number]) * 5000 for number in range(20)]
    await asyncio.gather(*map(log.append, frames))
    await log.close()
    assert directory.read_bytes("log-1", 1 << 20) == b"".join(frames)


async def test_log_of_a_name_that_is_there_is_refused_and_left_alone(directory: SsdDirectory):
    await (await directory.create_log("log-1", b"first")).close()
    with pytest.raises(FileExistsError):
        await directory.create_log("log-1", b"second")
    assert directory.read_bytes("log-1", 100) == b"first"


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


async def test_whole_file_replaces_the_old_one(directory: SsdDirectory):
    assert await directory.write_whole("checkpoint", [b"old"]) == 3

    async def chunks() -> AsyncIterator[bytes]:
        for chunk in (b"new", b"", b" and longer"):
            await asyncio.sleep(0)
            assert directory.read_bytes("checkpoint", 100) == b"old"
            assert directory.names() == ["checkpoint"]
            yield chunk

    assert await directory.write_whole("checkpoint", chunks()) == 14
    assert directory.read_bytes("checkpoint", 100) == b"new and longer"


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


def test_read_bytes_of_a_file_that_is_too_large_or_missing_is_an_error(directory: SsdDirectory):
    (directory.path / "file").write_bytes(b"12345")
    assert directory.read_bytes("file", 5) == b"12345"
    with pytest.raises(OSError, match="larger than 4 bytes") as caught:
        directory.read_bytes("file", 4)
    assert caught.value.errno == errno.EFBIG
    with pytest.raises(FileNotFoundError):
        directory.read_bytes("other", 4)


def test_remove_of_a_file_that_is_not_there_is_fine(directory: SsdDirectory):
    (directory.path / "file").touch()
    directory.remove("file")
    directory.remove("file")
    assert directory.names() == []


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
