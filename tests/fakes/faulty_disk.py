"""A twin of ``kvstore.tiers.disk`` in memory: it crashes, and has every fault that a disk has, when it is told to.

``FaultyDirectory`` stands for ``SsdDirectory``. Before and after each operation it calls ``before(op, name)`` and
``after(op, name)``, which may raise ``Crashed``: from then on every call raises it, as if the process had died, and
``crash(choose)`` gives the directory that the next process finds. Operations, with the names of their files:

- ``data_write``, ``data_read``, ``data_sync``, ``data_format``, ``data_truncate``, ``data_create`` and
  ``data_open`` of the slab file
- ``log_create``, ``header_write`` and ``header_sync`` of ``create_log``, then ``log_append`` and ``log_sync``
- ``checkpoint_create``, ``checkpoint_write`` (a chunk), ``checkpoint_sync``, ``checkpoint_rename`` of ``write_whole``
- ``file_write`` and ``file_sync`` of ``sync_file``, ``directory_sync``, ``remove``, ``read_file``, ``list``
"""

from __future__ import annotations

import asyncio
import errno
import os
import threading
import time
from collections.abc import AsyncIterable, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from fakes.crash_medium import PAGE_BYTES, Choose, Content, Names
from fakes.disk_faults import CHANGING, Fault

from kvstore.errors import ResourceTaken
from kvstore.tiers.disk import LOCK_NAME, SLABS_NAME, TEMPORARY_SUFFIX

Hook = Callable[[str, str], None]


class Crashed(BaseException):
    """The process is dead: no handler of errors may go on after it."""


class FaultyDirectory:
    """Twin of ``SsdDirectory``, in memory.

    Args:
        path: what it calls itself.
        names: what is in it; empty by default.
        direct: whether its file system takes O_DIRECT, which makes misaligned transfers errors.

    Attributes:
        faults: those that are switched on.
        capacity_bytes: of its file system; ENOSPC beyond.
        read_only: EROFS for all that changes something.
        gone: somebody removed the directory; files that are open live on.
        delays_s: by operation, how long it takes.
        before, after: called around each operation.
        points: every hook that was passed, as ``before_data_write``.
    """

    def __init__(self, path: Path = Path("/twin/ssd"), *, names: Names | None = None, direct: bool = True) -> None:
        self.path = path
        self.direct = direct
        self.faults: list[Fault] = []
        self.capacity_bytes = 1 << 40
        self.read_only = False
        self.gone = False
        self.delays_s: dict[str, float] = {}
        self.before: Hook | None = None
        self.after: Hook | None = None
        self.points: list[str] = []
        self.medium = names if names is not None else Names()
        self.lock = threading.RLock()
        self.opened: list[Content] = []
        self._dead = False
        self._closed = False
        for name in [name for name in self.medium.now if name.endswith(TEMPORARY_SUFFIX)]:
            self.medium.remove(name)

    # -------------------------------------------------------------- crashes and faults

    def crash(self, choose: Choose | None = None) -> FaultyDirectory:
        """End this life, at once, and give the directory that the next process finds.

        Args:
            choose: what the end of the machine leaves of what was not synced. By default only the process ended: all
                that was written is still there, and still not durable.
        """
        with self.lock:
            self._dead = True
            left = self.medium if choose is None else self.medium.survive(choose)
            return FaultyDirectory(self.path, names=left, direct=self.direct)

    def reopen(self) -> FaultyDirectory:
        """Open it again after ``close``.

        Raises:
            ResourceTaken: it is not closed.
        """
        if not self._closed and not self._dead:
            raise ResourceTaken(
                f"the SSD directory {self.path} is in use by another daemon (pid {os.getpid()}); "
                "stop it, or choose another --ssd"
            )
        with self.lock:
            return FaultyDirectory(self.path, names=self.medium, direct=self.direct)

    def fail(self, op: str, number: int, name: str = "", **details: int) -> Fault:
        """Switch a fault on; see ``Fault``."""
        fault = Fault(op, number, name, **details)
        self.faults.append(fault)
        return fault

    def full_after(self, length_bytes: int) -> None:
        """ENOSPC when so many bytes more are taken."""
        self.capacity_bytes = self._taken_bytes() + length_bytes

    def heal(self) -> None:
        """Switch all faults off; what was lost or flipped stays so."""
        self.faults.clear()
        self.capacity_bytes = 1 << 40
        self.read_only = self.gone = False
        self.delays_s.clear()

    def flip(self, name: str, offset: int, mask: int = 1) -> None:
        """Flip bits of a byte on the medium."""
        with self.lock:
            self.medium.now[name].flip(offset, mask)

    def content(self, name: str) -> bytes:
        """All bytes of a file as they are now, past all faults."""
        with self.lock:
            found = self.medium.now[name]
            return found.read(0, found.size_bytes)

    @contextmanager
    def op(self, op: str, name: str, start: int = 0, end: int = 1 << 62, *, waited: bool = False) -> Iterator[None]:
        """Around an operation: points, delays and faults; what is inside happens at once."""
        self._point("before", op, name)
        if op in self.delays_s and not waited:
            time.sleep(self.delays_s[op])
        with self.lock:
            self._strike(op, name, start, end)
            yield
        self._point("after", op, name)

    def _point(self, when: str, op: str, name: str) -> None:
        if self._dead:
            raise Crashed
        self.points.append(f"{when}_{op}")
        hook = self.before if when == "before" else self.after
        if hook is not None:
            try:
                hook(op, name)
            except Crashed:
                self._dead = True
                raise

    def _strike(self, op: str, name: str, start: int, end: int) -> None:
        if self._dead:
            raise Crashed
        if self.read_only and op.rpartition("_")[2] in CHANGING:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), name)
        for fault in self.faults:
            if fault.strikes(op, name, start, end):
                raise OSError(fault.number, os.strerror(fault.number), name)

    def put(self, content: Content, offset: int, data: bytes, name: str) -> None:
        """Write into a file as far as there is room."""
        room = (self.capacity_bytes - self._taken_bytes()) // PAGE_BYTES
        for begin in range(offset - offset % PAGE_BYTES, offset + len(data), PAGE_BYTES):
            if content.is_hole(begin // PAGE_BYTES):
                room -= 1
                if room < 0:
                    content.write(offset, data[: max(begin - offset, 0)])
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)
        content.write(offset, data)

    def _taken_bytes(self) -> int:
        contents = {id(content): content for content in [*self.medium.now.values(), *self.opened]}
        return sum(content.allocated_pages for content in contents.values()) * PAGE_BYTES

    # -------------------------------------------------------------- as SsdDirectory

    def names(self) -> list[str]:
        with self.op("list", ""):
            if self.gone:
                return []
            return sorted(name for name in self.medium.now if not name.endswith((LOCK_NAME, TEMPORARY_SUFFIX)))

    def read_bytes(self, name: str, most_bytes: int) -> bytes:
        with self.op("read_file", name):
            content = self._named(name)
            if content.size_bytes > most_bytes:
                raise OSError(errno.EFBIG, f"larger than {most_bytes} bytes", name)
            return content.read(0, content.size_bytes)

    def open_slabs(self, *, create: bool) -> FaultySlabs:
        if not create:
            with self.op("data_open", SLABS_NAME):
                return FaultySlabs(self, self._named(SLABS_NAME))
        with self.op("data_create", SLABS_NAME):
            content = self._created(SLABS_NAME, exclusive=True)
        self._sync_names()
        return FaultySlabs(self, content)

    async def create_log(self, name: str, header: bytes) -> FaultyLog:
        with self.op("log_create", name):
            log = FaultyLog(self, name, self._created(name, exclusive=True), "header_write")
        try:
            if header:
                await log.append(header)
            await log.sync()
            self._sync_names()
        except BaseException:
            await self._give_up(log, name)
            raise
        log.op = "log_append"
        return log

    async def write_whole(self, name: str, chunks: AsyncIterable[bytes] | Iterable[bytes]) -> int:
        temporary = name + TEMPORARY_SUFFIX
        with self.op("checkpoint_create", temporary):
            file = FaultyLog(self, temporary, self._created(temporary, exclusive=False), "checkpoint_write")
        try:
            if isinstance(chunks, AsyncIterable):
                async for chunk in chunks:
                    await file.append(chunk)
            else:
                for chunk in chunks:
                    await file.append(chunk)
            await file.sync()
            with self.op("checkpoint_rename", name):
                self._must_be_there(temporary)
                self.medium.rename(temporary, name)
        except BaseException:
            await self._give_up(file, temporary)
            raise
        await file.close()
        self._sync_names()
        return file.size_bytes

    async def sync_file(self, name: str) -> None:
        with self.op("file_write", name):
            content = self._named(name)
            content.write(0, content.read(0, content.size_bytes))
        await asyncio.sleep(self.delays_s.get("file_sync", 0))
        _sync(self, "file_sync", name, content, waited=True)

    def remove(self, name: str) -> None:
        with self.op("remove", name):
            if name in self.medium.now and not self.gone:
                self.medium.remove(name)

    def free_bytes(self) -> int:
        with self.lock:
            return max(0, self.capacity_bytes - self._taken_bytes())

    def used_bytes(self) -> int:
        with self.lock:
            return sum(content.allocated_pages for content in self.medium.now.values()) * PAGE_BYTES

    def there(self) -> bool:
        return not self.gone

    def close(self) -> None:
        self._closed = True

    def _named(self, name: str) -> Content:
        self._must_be_there(name)
        if name not in self.medium.now:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
        return self.medium.now[name]

    def _must_be_there(self, name: str) -> None:
        if self._closed:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF), name)
        if self.gone:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)

    def _created(self, name: str, *, exclusive: bool) -> Content:
        self._must_be_there(name)
        if name not in self.medium.now:
            return self.medium.create(name)
        if exclusive:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), name)
        content = self.medium.now[name]
        content.truncate(0)
        return content

    def _sync_names(self) -> None:
        with self.lock:
            began = self.medium.begin_sync()
        with self.op("directory_sync", ""):
            self.medium.end_sync(began)

    async def _give_up(self, file: FaultyLog, name: str) -> None:
        await file.close()
        if not self._dead:
            try:
                self.remove(name)
            except OSError:
                return


class FaultySlabs:
    """Twin of ``SlabFile``."""

    def __init__(self, directory: FaultyDirectory, content: Content) -> None:
        self.direct = directory.direct
        self._directory = directory
        self._content = content
        self._closed = False
        directory.opened.append(content)

    @property
    def size_bytes(self) -> int:
        self._must_be_open()
        return self._content.size_bytes

    def write(self, offset: int, buffers: Sequence[memoryview]) -> None:
        self._check(offset, buffers)
        data = b"".join(buffers)
        if data:
            with self._directory.op("data_write", SLABS_NAME, offset, offset + len(data)):
                self._directory.put(self._content, offset, data, SLABS_NAME)

    def read(self, offset: int, buffers: Sequence[memoryview]) -> None:
        self._check(offset, buffers)
        length_bytes = sum(buffer.nbytes for buffer in buffers)
        if not length_bytes:
            return
        with self._directory.op("data_read", SLABS_NAME, offset, offset + length_bytes):
            found = self._content.read(offset, length_bytes)
        at = 0
        for buffer in buffers:
            part = found[at : at + buffer.nbytes]
            buffer.cast("B")[: len(part)] = part
            at += buffer.nbytes
        if len(found) < length_bytes:
            raise OSError(errno.EIO, "short read: the file ends before")

    def sync(self) -> None:
        self._must_be_open()
        _sync(self._directory, "data_sync", SLABS_NAME, self._content)

    def format(self, offset: int, length_bytes: int) -> None:
        self._check(offset, [memoryview(bytes(length_bytes))], memory=False)
        with self._directory.op("data_format", SLABS_NAME, offset, offset + length_bytes):
            self._directory.put(self._content, offset, bytes(length_bytes), SLABS_NAME)

    def truncate(self, size_bytes: int) -> None:
        self._must_be_open()
        with self._directory.op("data_truncate", SLABS_NAME):
            self._content.truncate(size_bytes)

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            _forget(self._directory, self._content)

    def _must_be_open(self) -> None:
        if self._closed:
            raise OSError(errno.EBADF, "the slab file is closed")

    def _check(self, offset: int, buffers: Sequence[memoryview], *, memory: bool = True) -> None:
        self._must_be_open()
        numbers = [offset, *(buffer.nbytes for buffer in buffers)]
        if memory:
            numbers += [np.frombuffer(buffer, np.uint8).ctypes.data for buffer in buffers if buffer.nbytes]
        if self.direct and any(number % PAGE_BYTES for number in numbers):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))


class FaultyLog:
    """Twin of ``AppendFile``, and what ``write_whole`` writes into."""

    def __init__(self, directory: FaultyDirectory, name: str, content: Content, op: str) -> None:
        self.size_bytes = 0
        self.op = op
        self._directory = directory
        self._name = name
        self._content = content
        self._lock = asyncio.Lock()
        self._failed = self._closed = False
        directory.opened.append(content)

    async def append(self, data: bytes) -> None:
        async with self._lock:
            with self._failing():
                await self._delay(self.op)
                begin, end = self.size_bytes, self.size_bytes + max(len(data), 1)
                with self._directory.op(self.op, self._name, begin, end, waited=True):
                    self._directory.put(self._content, begin, bytes(data), self._name)
            self.size_bytes += len(data)

    async def sync(self) -> None:
        async with self._lock:
            with self._failing():
                op = self.op.partition("_")[0] + "_sync"
                await self._delay(op)
                _sync(self._directory, op, self._name, self._content, waited=True)

    async def close(self) -> None:
        async with self._lock:
            if not self._closed:
                self._closed = True
                _forget(self._directory, self._content)

    async def _delay(self, op: str) -> None:
        # Others run between the steps of a real one, too.
        await asyncio.sleep(self._directory.delays_s.get(op, 0))

    @contextmanager
    def _failing(self) -> Iterator[None]:
        if self._failed:
            raise OSError(errno.EIO, "an earlier write to this log failed; start a new one")
        if self._closed:
            raise OSError(errno.EBADF, "the log is closed")
        try:
            yield
        except BaseException:
            self._failed = True
            raise


def _sync(directory: FaultyDirectory, op: str, name: str, content: Content, *, waited: bool = False) -> None:
    with directory.lock:
        began = content.begin_sync()
    try:
        with directory.op(op, name, waited=waited):
            content.end_sync(began)
    except OSError:
        with directory.lock:
            content.fail_sync(began)
        raise


def _forget(directory: FaultyDirectory, content: Content) -> None:
    with directory.lock:
        # By identity: two empty files are two files.
        at = next(index for index, other in enumerate(directory.opened) if other is content)
        del directory.opened[at]
