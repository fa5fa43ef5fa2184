"""The only module that opens files of the SSD tier's directory.

Covers: a log that is appended to, small files that are written whole, the slab file (see ``kvstore.tiers.slab_file``),
and the directory that they are in, with its lock. Tests put a twin that injects faults in its place. Does not cover:
what is in the files.

An ``OSError`` of the system comes out as it is: ``errno`` says what to do about it. After a sync that failed, nothing
that was written since the last one may be taken as durable, not even after a later sync that succeeds: the kernel
reports lost pages once.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import mmap
import os
import stat
from collections.abc import AsyncIterable, Awaitable, Callable, Iterable, Iterator
from pathlib import Path
from typing import Final, TypeVar

import aiofiles
import aiofiles.os
from aiofiles.threadpool.binary import AsyncFileIO

from kvstore.errors import PermissionRefused
from kvstore.format.constants import PAGE_BYTES
from kvstore.tiers.files import OwnerLock, make_directory
from kvstore.tiers.slab_file import SlabFile, transfer

__all__ = ["LOCK_NAME", "SLABS_NAME", "TEMPORARY_SUFFIX", "AppendFile", "SlabFile", "SsdDirectory"]

SLABS_NAME: Final = "slabs"
LOCK_NAME: Final = "owner.lock"
TEMPORARY_SUFFIX: Final = ".tmp"
"""Of files that are being written and are worth nothing yet; those of an earlier life are removed at start."""

_TRIAL_NAME: Final = "direct" + TEMPORARY_SUFFIX
_UNWRITABLE: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS})
_STEP_BYTES: Final = 1 << 20
_SAFE: Final = os.O_CLOEXEC | os.O_NOFOLLOW

_T = TypeVar("_T")
_fdatasync: Final = aiofiles.os.wrap(os.fdatasync)
_fsync: Final = aiofiles.os.wrap(os.fsync)


class AppendFile:
    """A log that is only appended to; made by ``SsdDirectory.create_log``.

    Its calls wait for each other. A cancelled call ends when the system call in progress has ended. After a call that
    failed or was cancelled the file's end is unknown: further ones are refused (EIO), the owner starts a new file.

    Attributes:
        size_bytes: what was appended with success.
    """

    def __init__(self, file: AsyncFileIO, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self._file = file
        self._lock = asyncio.Lock()
        self._failed = False

    async def append(self, data: bytes) -> None:
        """Append all of ``data``. Durable after ``sync``.

        Raises:
            OSError: some of it may have been appended.
        """
        async with self._lock:
            with self._failing():
                await _write_all(self._file, data)
            self.size_bytes += len(data)

    async def sync(self) -> None:
        """Make durable what was appended before.

        Raises:
            OSError: of ``fdatasync``.
        """
        async with self._lock:
            with self._failing():
                await _ended(_fdatasync(self._file.fileno()))

    async def close(self) -> None:
        """Close it after the calls in progress, without a sync."""
        async with self._lock:
            await _ended(self._file.close())

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        if self._failed:
            raise OSError(errno.EIO, "an earlier write to this log failed; start a new one")
        if self._file.closed:
            raise OSError(errno.EBADF, "the log is closed")
        try:
            yield
        except BaseException:
            self._failed = True
            raise


class SsdDirectory:
    """The SSD tier's directory, locked until it is closed. Names are those of files in it, without a path.

    What was written whole or created is durable under its name when the call returns; a removal is with the next of
    these calls. Calls that are not ``async`` block for a short time.

    Args:
        path: made if it is not there (mode 0700); files in it get mode 0600.
        remedy: what to do where another process has it, for messages.
        read_only: it must be there; nothing in it is changed, but for the lock while it is open.

    Raises:
        ResourceTaken: another daemon has it; the message names its pid.
        PermissionRefused, InsufficientMemory: it cannot be made, belongs to another user, or cannot be locked.
    """

    def __init__(
        self, path: Path, *, remedy: str = "stop it, or choose another --ssd", read_only: bool = False
    ) -> None:
        self.path = path
        self._read_only = read_only
        above = [path.parent, *path.parent.parents]
        kept = next((index for index, parent in enumerate(above) if parent.exists()), 0)
        existed = path.exists()
        if read_only and not existed:
            raise PermissionRefused(f"there is no directory {path}")
        self._lock: OwnerLock | None = None
        # Where nothing can be written no daemon can be at work.
        if not (read_only and os.statvfs(path).f_flag & os.ST_RDONLY):
            make_directory(path, 0o700)
            self._lock = OwnerLock(path / LOCK_NAME, f"the SSD directory {path}", remedy, named=False)
        self._fd = -1
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | _SAFE)
            for name in os.listdir(self._fd):
                if name.endswith(TEMPORARY_SUFFIX) and not read_only:
                    self.remove(name)
            if not existed:
                for parent in above[: kept + 1]:
                    _sync_name(parent)
        except OSError as error:
            self.close()
            raise PermissionRefused(
                f"cannot use the SSD directory {path}: {error.strerror}; choose another --ssd or fix its permissions"
            ) from None

    def names(self) -> list[str]:
        """Files in it, sorted, without the lock and files that are being written."""
        skipped = (LOCK_NAME, TEMPORARY_SUFFIX)
        return sorted(name for name in os.listdir(self._fd) if not name.endswith(skipped))

    def read_bytes(self, name: str, most_bytes: int) -> bytes:
        """A whole small file.

        Raises:
            OSError: EFBIG where it is larger than ``most_bytes``; EPERM where it is no file of this user.
        """
        fd = self._open(name, os.O_RDONLY)
        with open(fd, "rb", buffering=0) as file:
            content = bytearray()
            while chunk := file.read(min(_STEP_BYTES, most_bytes + 1 - len(content))):
                content += chunk
                if len(content) > most_bytes:
                    raise OSError(errno.EFBIG, f"larger than {most_bytes} bytes", name)
            return bytes(content)

    def open_slabs(self, *, create: bool) -> SlabFile:
        """Open the slab file ``slabs``, past the page cache where the file system allows that.

        Args:
            create: make it, empty and durable under its name; else it must be there.

        Raises:
            FileExistsError, FileNotFoundError: it is there, or is not.
            OSError: EPERM where it is no file of this user.
        """
        flags = os.O_RDONLY if self._read_only else os.O_RDWR | (os.O_CREAT | os.O_EXCL if create else 0)
        direct = self._takes_direct()
        fd = self._open(SLABS_NAME, flags | (os.O_DIRECT if direct else 0))
        if create:
            try:
                os.fsync(self._fd)
            except OSError:
                os.close(fd)
                self.remove(SLABS_NAME)
                raise
        return SlabFile(fd, direct=direct)

    async def create_log(self, name: str, header: bytes) -> AppendFile:
        """A new log that begins with ``header``; header and name are durable.

        Raises:
            FileExistsError: a file of that name is there.
            OSError: it cannot be made; nothing is left but what cannot be removed.
        """
        file = await self._created(name, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL)
        try:
            await _write_all(file, header)
            await _ended(_fdatasync(file.fileno()))
            await _ended(_fsync(self._fd))
        except BaseException:
            await _ended(file.close())
            with contextlib.suppress(OSError):
                self.remove(name)
            raise
        return AppendFile(file, len(header))

    async def write_whole(self, name: str, chunks: AsyncIterable[bytes] | Iterable[bytes]) -> int:
        """Write a file that appears under its name with all of its content, or not at all; replaces one that is there.

        Other tasks run between chunks.

        Returns:
            Its size in bytes.

        Raises:
            OSError: which of the two files is under the name is known only after the next start; a failure before the
                renaming leaves the old one.
        """
        temporary = name + TEMPORARY_SUFFIX
        size_bytes = 0
        file = await self._created(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        try:
            try:
                if isinstance(chunks, AsyncIterable):
                    async for chunk in chunks:
                        size_bytes += await _write_all(file, chunk)
                else:
                    for chunk in chunks:
                        size_bytes += await _write_all(file, chunk)
                await _ended(_fdatasync(file.fileno()))
            finally:
                await _ended(file.close())
            os.rename(temporary, name, src_dir_fd=self._fd, dst_dir_fd=self._fd)
        except BaseException:
            with contextlib.suppress(OSError):
                self.remove(temporary)
            raise
        await _ended(_fsync(self._fd))
        return size_bytes

    async def sync_file(self, name: str) -> None:
        """Make durable what an earlier life wrote into a file: its process may have ended before it did.

        The bytes are written over themselves before the sync. Pages that a sync of that life failed to write are clean
        to the kernel: it would take them for durable.

        Raises:
            OSError: it is not there, or cannot be written.
        """
        fd = self._open(name, os.O_RDWR)
        try:
            await _ended(_write_again(fd))
        finally:
            os.close(fd)

    def remove(self, name: str) -> None:
        """Remove a file; one that is not there is fine. Durable with the next name that is made so.

        Raises:
            OSError: of ``unlink``.
        """
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self._fd)

    def free_bytes(self) -> int:
        """Bytes that the file system can still take from this user.

        Raises:
            OSError: of ``fstatvfs``.
        """
        status = os.fstatvfs(self._fd)
        return status.f_bavail * status.f_frsize

    def used_bytes(self) -> int:
        """Bytes that all files of the directory occupy on the file system.

        Raises:
            OSError: of listing it.
        """
        used = 0
        for name in os.listdir(self._fd):
            with contextlib.suppress(FileNotFoundError):
                used += os.stat(name, dir_fd=self._fd, follow_symlinks=False).st_blocks * 512
        return used

    def there(self) -> bool:
        """Whether the path still names the directory that was opened: not removed, replaced or mounted over."""
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(self._fd))
        except OSError:
            return False

    def close(self) -> None:
        """Give the lock back; files that were opened are their owner's to close, before."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        if self._lock is not None:
            self._lock.release()

    def _open(self, name: str, flags: int) -> int:
        # Of what is no regular file an open could wait for its other end.
        fd = os.open(name, flags | _SAFE | os.O_NONBLOCK, 0o600, dir_fd=self._fd)
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
                raise PermissionError(errno.EPERM, f"is no file of user {os.geteuid()}; remove it", name)
        except OSError:
            os.close(fd)
            raise
        return fd

    async def _created(self, name: str, flags: int) -> AsyncFileIO:
        def opener(_: str, __: int) -> int:
            return self._open(name, flags)

        opening = asyncio.ensure_future(_opened(name, opener))
        try:
            return await _ended(opening)
        except asyncio.CancelledError:
            with contextlib.suppress(OSError):
                await _ended(opening.result().close())
                self.remove(name)
            raise

    def _takes_direct(self) -> bool:
        """Write and read a page with O_DIRECT: some file systems take the flag and refuse the first transfer."""
        page = memoryview(mmap.mmap(-1, PAGE_BYTES))
        try:
            try:
                if self._read_only:
                    raise OSError(errno.EROFS, "opened to be read")
                fd = self._open(_TRIAL_NAME, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_DIRECT)
                try:
                    transfer(os.pwritev, fd, 0, [page])
                    transfer(os.preadv, fd, 0, [page])
                finally:
                    os.close(fd)
                    self.remove(_TRIAL_NAME)
            except OSError as error:
                if error.errno not in _UNWRITABLE:
                    raise
                # Where nothing can be written, what is there must be readable still: try to read it.
                fd = self._open(SLABS_NAME, os.O_RDONLY | os.O_DIRECT)
                try:
                    transfer(os.preadv, fd, 0, [page])
                finally:
                    os.close(fd)
        except OSError:
            # If it is not the flag's fault, opening the file without it will say so.
            return False
        return True


async def _opened(name: str, opener: Callable[[str, int], int]) -> AsyncFileIO:
    return await aiofiles.open(name, "wb", buffering=0, opener=opener)


async def _write_all(file: AsyncFileIO, data: bytes) -> int:
    left = memoryview(data)
    while left:
        done = await _ended(file.write(left))
        if not done:
            raise OSError(errno.EIO, "short write: nothing was taken")
        left = left[done:]
    return len(data)


@aiofiles.os.wrap
def _write_again(fd: int) -> None:
    buffer = bytearray(_STEP_BYTES)
    offset = 0
    while done := os.preadv(fd, [buffer], offset):
        transfer(os.pwritev, fd, offset, [memoryview(buffer)[:done]])
        offset += done
    os.fdatasync(fd)


async def _ended(call: Awaitable[_T]) -> _T:
    """Await a call that a thread makes; a cancellation waits for its end, or the file would be closed under it."""
    task = asyncio.ensure_future(call)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        while not task.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait([task])
        if not task.cancelled():
            task.exception()
        raise


def _sync_name(directory: Path) -> None:
    """Make names in a directory durable, where this user may open it."""
    with contextlib.suppress(PermissionError):
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
