"""What holds for the files of the SSD directory, on a disk, on tmpfs, and for the twin that injects faults."""

from __future__ import annotations

import asyncio
import errno
import mmap
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import TypeAlias

import pytest
from disk_pages import PAGE_BYTES, pages, read_pages
from fakes.crash_medium import Names
from fakes.faulty_disk import FaultyDirectory, FaultySlabs

from kvstore.errors import ResourceTaken
from kvstore.tiers.disk import SLABS_NAME, SlabFile, SsdDirectory

Directory: TypeAlias = SsdDirectory | FaultyDirectory
Slabs: TypeAlias = SlabFile | FaultySlabs


class Place:
    """Where directories of one kind are made: the same one each time."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._names = Names()

    def open(self) -> Directory:
        return FaultyDirectory(names=self._names) if self._path is None else SsdDirectory(self._path)


@pytest.fixture(params=["disk", "tmpfs", "twin"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    if request.param == "twin":
        yield Place(None)
    elif request.param == "disk":
        yield Place(tmp_path / "ssd")
    else:
        above = Path(tempfile.mkdtemp(prefix="kvt-", dir="/dev/shm"))
        yield Place(above / "ssd")
        shutil.rmtree(above, ignore_errors=True)


@pytest.fixture
def directory(place: Place) -> Iterator[Directory]:
    opened = place.open()
    yield opened
    opened.close()


@pytest.fixture
def slabs(directory: Directory) -> Iterator[Slabs]:
    opened = directory.open_slabs(create=True)
    yield opened
    opened.close()


# ---------------------------------------------------------------- slabs


def test_slabs_written_are_read_from_the_same_offsets(slabs: Slabs):
    slabs.format(0, 8 * PAGE_BYTES)
    slabs.write(2 * PAGE_BYTES, pages("a", "b"))
    slabs.write(5 * PAGE_BYTES, pages("c"))
    slabs.sync()
    assert read_pages(slabs, 0, 8) == "..ab.c.."


def test_slabs_created_where_some_are_or_opened_where_none_are_is_an_error(directory: Directory):
    with pytest.raises(FileNotFoundError):
        directory.open_slabs(create=False)
    directory.open_slabs(create=True).close()
    with pytest.raises(FileExistsError):
        directory.open_slabs(create=True)


def test_slabs_format_grows_the_file_and_occupies_its_bytes(directory: Directory, slabs: Slabs):
    slabs.format(0, (8 << 20) + PAGE_BYTES)
    slabs.sync()
    assert slabs.size_bytes == (8 << 20) + PAGE_BYTES
    assert directory.used_bytes() >= (8 << 20) + PAGE_BYTES
    slabs.truncate(PAGE_BYTES)
    assert slabs.size_bytes == PAGE_BYTES
    assert directory.used_bytes() < 1 << 20


def test_slabs_more_buffers_than_a_call_takes_are_all_written_and_read(slabs: Slabs):
    count = os.sysconf("SC_IOV_MAX") * 2 + 3
    memory = memoryview(mmap.mmap(-1, count * PAGE_BYTES))
    memory[:] = os.urandom(len(memory))
    slabs.write(0, [memory[at : at + PAGE_BYTES] for at in range(0, len(memory), PAGE_BYTES)])
    found = memoryview(mmap.mmap(-1, count * PAGE_BYTES))
    slabs.read(0, [found[at : at + PAGE_BYTES] for at in range(0, len(found), PAGE_BYTES)])
    assert found == memory


def test_slabs_of_no_bytes_at_all_are_nothing_to_do(slabs: Slabs):
    slabs.write(0, [])
    slabs.write(0, [*pages("a"), memoryview(b"")])
    slabs.read(0, [memoryview(bytearray())])
    assert read_pages(slabs, 0, 1) == "a"


@pytest.mark.parametrize("size_bytes", [0, PAGE_BYTES, PAGE_BYTES + 100])
def test_slabs_read_beyond_the_end_is_an_io_error(slabs: Slabs, size_bytes: int):
    slabs.truncate(size_bytes)
    with pytest.raises(OSError, match="short read") as caught:
        slabs.read(0, pages("?", "?"))
    assert caught.value.errno == errno.EIO


def test_slabs_closed_refuse_calls_and_close_once(slabs: Slabs):
    slabs.close()
    slabs.close()
    for call in (slabs.sync, lambda: slabs.size_bytes, lambda: slabs.write(0, pages("a"))):
        with pytest.raises(OSError, match="closed") as caught:
            call()
        assert caught.value.errno == errno.EBADF


# ---------------------------------------------------------------- logs


async def test_log_has_its_header_and_what_was_appended(directory: Directory):
    log = await directory.create_log("log-1", b"header")
    for data in (b" one", b"", b" two"):
        await log.append(data)
    await log.sync()
    assert log.size_bytes == len(b"header one two")
    await log.close()
    assert directory.read_bytes("log-1", 100) == b"header one two"
    assert directory.names() == ["log-1"]


async def test_log_appends_at_once_do_not_mix(directory: Directory):
    log = await directory.create_log("log-1", b"")
    frames = [bytes([number]) * 5000 for number in range(20)]
    await asyncio.gather(*map(log.append, frames))
    await log.close()
    assert directory.read_bytes("log-1", 1 << 20) == b"".join(frames)


async def test_log_of_a_name_that_is_there_is_refused_and_left_alone(directory: Directory):
    await (await directory.create_log("log-1", b"first")).close()
    with pytest.raises(FileExistsError):
        await directory.create_log("log-1", b"second")
    assert directory.read_bytes("log-1", 100) == b"first"


# ---------------------------------------------------------------- files written whole


async def test_whole_file_replaces_the_old_one(directory: Directory):
    assert await directory.write_whole("checkpoint", [b"old"]) == 3

    async def chunks() -> AsyncIterator[bytes]:
        for chunk in (b"new", b"", b" and longer"):
            await asyncio.sleep(0)
            assert directory.read_bytes("checkpoint", 100) == b"old"
            assert directory.names() == ["checkpoint"]
            yield chunk

    assert await directory.write_whole("checkpoint", chunks()) == 14
    assert directory.read_bytes("checkpoint", 100) == b"new and longer"


async def test_read_bytes_of_a_file_that_is_too_large_or_missing_is_an_error(directory: Directory):
    await directory.write_whole("file", [b"12345"])
    assert directory.read_bytes("file", 5) == b"12345"
    with pytest.raises(OSError, match="larger than 4 bytes") as caught:
        directory.read_bytes("file", 4)
    assert caught.value.errno == errno.EFBIG
    with pytest.raises(FileNotFoundError):
        directory.read_bytes("other", 4)


async def test_remove_of_a_file_that_is_not_there_is_fine(directory: Directory):
    await directory.write_whole("file", [])
    directory.remove("file")
    directory.remove("file")
    assert directory.names() == []


def test_slabs_opened_again_have_their_bytes(directory: Directory):
    slabs = directory.open_slabs(create=True)
    slabs.write(0, pages("a", "b"))
    slabs.close()
    again = directory.open_slabs(create=False)
    assert (again.size_bytes, read_pages(again, 0, 2)) == (2 * PAGE_BYTES, "ab")
    again.close()


def test_slabs_past_the_page_cache_refuse_misaligned_transfers(directory: Directory, slabs: Slabs):
    slabs.format(0, 4 * PAGE_BYTES)
    if not slabs.direct or directory.path.is_relative_to("/dev/shm"):
        pytest.skip("the file system takes no O_DIRECT, or anything with it")
    two = memoryview(mmap.mmap(-1, 2 * PAGE_BYTES))
    for call in (slabs.write, slabs.read):
        for offset, buffer in ((0, two[1 : PAGE_BYTES + 1]), (0, two[: PAGE_BYTES + 1]), (1, two[:PAGE_BYTES])):
            with pytest.raises(OSError, match="Invalid argument") as caught:
                call(offset, [buffer])
            assert caught.value.errno == errno.EINVAL


async def test_log_that_is_closed_refuses_calls_and_closes_once(directory: Directory):
    log = await directory.create_log("log-1", b"header")
    await log.close()
    await log.close()
    for call in (log.append(b"more"), log.sync()):
        with pytest.raises(OSError, match="closed") as caught:
            await call
        assert caught.value.errno == errno.EBADF


async def test_whole_file_whose_chunks_fail_leaves_the_old_one(directory: Directory):
    await directory.write_whole("checkpoint", [b"old"])

    def chunks() -> Iterator[bytes]:
        yield b"new"
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        await directory.write_whole("checkpoint", chunks())
    assert directory.read_bytes("checkpoint", 100) == b"old"
    assert directory.names() == ["checkpoint"]


async def test_sync_of_a_file_by_name_is_for_files_that_are_there(directory: Directory):
    content = os.urandom((2 << 20) + 77)
    await directory.write_whole("file", [content])
    await directory.sync_file("file")
    assert directory.read_bytes("file", 4 << 20) == content
    with pytest.raises(FileNotFoundError):
        await directory.sync_file("other")


async def test_removed_name_is_free_for_another_file(directory: Directory):
    log = await directory.create_log("log-1", b"old")
    directory.remove("log-1")
    await log.append(b" goes on")
    new = await directory.create_log("log-1", b"new")
    assert directory.read_bytes("log-1", 100) == b"new"
    await log.close()
    await new.close()


def test_directory_in_use_is_refused_and_closed_can_be_opened_again(place: Place, directory: Directory):
    open_again = place.open if isinstance(directory, SsdDirectory) else directory.reopen
    with pytest.raises(ResourceTaken, match=rf"in use by another daemon \(pid {os.getpid()}\); stop it"):
        open_again()
    directory.open_slabs(create=True).close()
    directory.close()
    directory.close()
    again = place.open()
    assert again.names() == [SLABS_NAME]
    assert again.there()
    assert again.free_bytes() > 0
    again.close()
