"""A daemon for tests whose files of the SSD directory fail, and which kills itself at a point that a test names.

As a program, ``killed_daemon.py serve ...`` is ``kvstore serve ...`` with wrapped classes of ``kvstore.tiers.disk``:
around each operation it looks into the control file that ``KILLED_DAEMON_CONTROL`` names. Imported, ``Control`` writes
that file, and ``killed_daemon(...)`` makes the daemon process.

Points are ``before_`` or ``after_`` and one of: ``data_open``, ``data_write``, ``data_read``, ``data_sync``,
``data_format``, ``slot_reuse`` (a write over pages that this process wrote before), ``log_create``, ``log_append``,
``log_sync``, ``checkpoint_create``, ``checkpoint_rename``, ``file_sync``, ``directory_sync``,
``remove``, ``read_file``.
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import AsyncIterable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fakes.disk_faults import CHANGING, Fault

from kvstore.tiers import disk
from kvstore.tiers.disk import SLABS_NAME, TEMPORARY_SUFFIX, AppendFile, SlabFile, SsdDirectory

if TYPE_CHECKING:
    from daemon_process import DaemonProcess

VARIABLE = "KILLED_DAEMON_CONTROL"
PAGE_BYTES = 4096


@dataclass
class Orders:
    """What the daemon is to do to itself.

    Attributes:
        kill: the point at which it ends itself with SIGKILL, "" for none.
        passing: at which passing of it, the first being 1, counted from when the orders were read.
        faults: operations that fail.
        read_only: whatever changes something fails with EROFS.
        delays_s: by operation, how long it takes.
        volume_bytes: of the file system, as far as its free space goes; 0: the real one's.
        buffered: the file system refuses O_DIRECT.
    """

    kill: str = ""
    passing: int = 1
    faults: list[Fault] = field(default_factory=list)
    read_only: bool = False
    delays_s: dict[str, float] = field(default_factory=dict)
    volume_bytes: int = 0
    buffered: bool = False


class Control:
    """The control file, as a test sees it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._passed = path.with_suffix(".passed")

    def order(self, orders: Orders | None = None) -> None:
        """Have the daemon follow these orders from its next operation on, in place of earlier ones; None ends them."""
        new = self.path.with_suffix(".new")
        new.write_text(json.dumps(asdict(orders or Orders())))
        new.rename(self.path)

    def environ(self) -> dict[str, str]:
        """Of the daemon's process."""
        return {VARIABLE: str(self.path)}

    def killed_at(self) -> str:
        """The point at which the last daemon killed itself; "" where none did. Forgets it."""
        try:
            text = self._passed.read_text()
        except FileNotFoundError:
            return ""
        self._passed.unlink()
        return text


def killed_daemon(control: Control, *arguments: str, **options: Any) -> DaemonProcess:
    """A ``DaemonProcess`` of this program."""
    from daemon_process import DaemonProcess

    return DaemonProcess(*arguments, program=(os.path.abspath(__file__),), environ=control.environ(), **options)


# -------------------------------------------------------------- in the daemon


class Injector:
    """Follows the orders around operations; used by any thread."""

    def __init__(self) -> None:
        self._path = Path("/nonexistent")
        self._lock = threading.Lock()
        self._read_at: tuple[int, int] | None = None
        self._orders = Orders()
        self._passings: Counter[str] = Counter()

    def follow(self, path: Path) -> None:
        """Take the orders from this file."""
        self._path = path

    @contextmanager
    def op(self, op: str, name: str, start: int = 0, end: int = 1 << 62) -> Iterator[None]:
        """Around an operation on bytes ``start`` to ``end`` of a file."""
        self.point(f"before_{op}")
        with self._lock:
            delay_s = self._orders.delays_s.get(op, 0)
            number = next((fault.number for fault in self._orders.faults if fault.strikes(op, name, start, end)), 0)
            if not number and self._orders.read_only and op.rpartition("_")[2] in CHANGING:
                number = errno.EROFS
        if delay_s:
            time.sleep(delay_s)
        if number:
            raise OSError(number, os.strerror(number), name)
        yield
        self.point(f"after_{op}")

    def orders(self) -> Orders:
        """Those of now."""
        with self._lock:
            self._refresh()
            return self._orders

    def point(self, point: str) -> None:
        """Pass a point, if the orders allow."""
        with self._lock:
            self._refresh()
            if point != self._orders.kill:
                return
            self._passings[point] += 1
            if self._passings[point] >= self._orders.passing:
                self._path.with_suffix(".passed").write_text(point)
                os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(60)

    def _refresh(self) -> None:
        try:
            status = os.stat(self._path)
        except FileNotFoundError:
            return
        read_at = (status.st_ino, status.st_mtime_ns)
        if read_at != self._read_at:
            self._read_at = read_at
            fields = json.loads(self._path.read_text())
            self._orders = Orders(**(fields | {"faults": [Fault(**fault) for fault in fields["faults"]]}))
            self._passings.clear()


injector = Injector()


class WrappedSlabs(SlabFile):
    """A slab file with points and faults."""

    def __init__(self, fd: int, *, direct: bool) -> None:
        super().__init__(fd, direct=direct)
        self._written: set[int] = set()

    def write(self, offset: int, buffers: Sequence[memoryview]) -> None:
        end = offset + sum(buffer.nbytes for buffer in buffers)
        touched = set(range(offset // PAGE_BYTES, -(-end // PAGE_BYTES)))
        if not touched.isdisjoint(self._written):
            injector.point("before_slot_reuse")
        self._written |= touched
        with injector.op("data_write", SLABS_NAME, offset, end):
            super().write(offset, buffers)

    def read(self, offset: int, buffers: Sequence[memoryview]) -> None:
        with injector.op("data_read", SLABS_NAME, offset, offset + sum(buffer.nbytes for buffer in buffers)):
            super().read(offset, buffers)

    def sync(self) -> None:
        with injector.op("data_sync", SLABS_NAME):
            super().sync()

    def format(self, offset: int, length_bytes: int) -> None:
        with injector.op("data_format", SLABS_NAME, offset, offset + length_bytes):
            super().format(offset, length_bytes)

    def truncate(self, size_bytes: int) -> None:
        with injector.op("data_truncate", SLABS_NAME):
            super().truncate(size_bytes)


class WrappedLog(AppendFile):
    """A log with points and faults."""

    async def append(self, data: bytes) -> None:
        try:
            with injector.op("log_append", "log", self.size_bytes, self.size_bytes + len(data)):
                await super().append(data)
        except OSError:
            self._failed = True
            raise

    async def sync(self) -> None:
        try:
            with injector.op("log_sync", "log"):
                await super().sync()
        except OSError:
            self._failed = True
            raise


class WrappedDirectory(SsdDirectory):
    """The directory with points and faults."""

    def read_bytes(self, name: str, most_bytes: int) -> bytes:
        with injector.op("read_file", name):
            return super().read_bytes(name, most_bytes)

    def open_slabs(self, *, create: bool) -> SlabFile:
        with injector.op("data_create" if create else "data_open", SLABS_NAME):
            return super().open_slabs(create=create)

    async def create_log(self, name: str, header: bytes) -> AppendFile:
        with injector.op("log_create", name):
            return await super().create_log(name, header)

    async def write_whole(self, name: str, chunks: AsyncIterable[bytes] | Iterable[bytes]) -> int:
        with injector.op("checkpoint_create", name):
            pass
        return await super().write_whole(name, chunks)

    async def sync_file(self, name: str) -> None:
        with injector.op("file_sync", name):
            await super().sync_file(name)

    def free_bytes(self) -> int:
        volume_bytes = injector.orders().volume_bytes
        return max(volume_bytes - self.used_bytes(), 0) if volume_bytes else super().free_bytes()

    def _takes_direct(self) -> bool:
        return not injector.orders().buffered and super()._takes_direct()

    def remove(self, name: str) -> None:
        if name.endswith(TEMPORARY_SUFFIX):  # no call of the tier's
            super().remove(name)
            return
        with injector.op("remove", name):
            super().remove(name)


class _Os:
    """``os`` for ``kvstore.tiers.disk`` alone, with points around the renaming of what is written whole."""

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def rename(self, source: str, target: str, **options: Any) -> None:
        with injector.op("checkpoint_rename", target):
            os.rename(source, target, **options)


def wrap() -> None:
    """Put the wrapped classes in the place of those of ``kvstore.tiers.disk``, before the daemon imports them."""
    assert not [name for name in sys.modules if name.startswith("kvstore.server")], "the daemon has the real classes"
    fsync = disk._fsync

    async def directory_sync(fd: int) -> None:
        with injector.op("directory_sync", ""):
            await asyncio.shield(fsync(fd))

    module: Any = disk
    module.SlabFile, module.AppendFile, module.SsdDirectory = WrappedSlabs, WrappedLog, WrappedDirectory
    module.os, module._fsync = _Os(), directory_sync


if __name__ == "__main__":
    from kvstore.cli.main import main

    injector.follow(Path(os.environ[VARIABLE]))
    wrap()
    main()
