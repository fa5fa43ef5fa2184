"""A file of slots that worker threads read and write, past the page cache where that is possible.

Covers: whole transfers, however many calls of the system they take. Does not cover: opening the file, see
``kvstore.tiers.disk``; which slot holds what.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Final

_ZEROS_BYTES: Final = 4 << 20
_MOST_BUFFERS: Final = max(os.sysconf("SC_IOV_MAX"), 16)


class SlabFile:
    """One file of slots, read and written by worker threads.

    Calls block, and may be made by any number of threads at once; ranges that overlap are the callers' to keep apart.
    Offsets, lengths and addresses of buffers are multiples of 4 KiB, which O_DIRECT demands.

    Args:
        fd: open for reading and writing; owned from now on.
        direct: whether it was opened with O_DIRECT.

    Attributes:
        direct: reads and writes go past the page cache; False where the file system refuses that.
    """

    def __init__(self, fd: int, *, direct: bool) -> None:
        self.direct = direct
        self._fd = fd
        self._lock = threading.Lock()
        self._calls = 0
        self._closed = False
        self._zeros = memoryview(mmap.mmap(-1, _ZEROS_BYTES, prot=mmap.PROT_READ))

    @property
    def size_bytes(self) -> int:
        """The file's size."""
        with self._descriptor() as fd:
            return os.fstat(fd).st_size

    def write(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """Write all bytes of all buffers, one after the other, from ``offset`` on. Durable after ``sync``.

        Raises:
            OSError: some of the bytes may have been written.
        """
        with self._descriptor() as fd:
            transfer(os.pwritev, fd, offset, buffers)

    def read(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """Fill all buffers, one after the other, from ``offset`` on.

        Raises:
            OSError: the buffers' content is undefined; EIO with "short read" where the file ends before.
        """
        with self._descriptor() as fd:
            transfer(os.preadv, fd, offset, buffers)

    def sync(self) -> None:
        """Make durable what was written before; see the module for what a failure means.

        Raises:
            OSError: of ``fdatasync``.
        """
        with self._descriptor() as fd:
            os.fdatasync(fd)

    def format(self, offset: int, length_bytes: int) -> None:
        """Write zeros through, so that later writes there need no new space; grows the file. Durable after ``sync``.

        Raises:
            OSError: some of it may have been written.
        """
        with self._descriptor() as fd:
            end = offset + length_bytes
            while offset < end:
                step = min(_ZEROS_BYTES, end - offset)
                transfer(os.pwritev, fd, offset, [self._zeros[:step]])
                offset += step

    def truncate(self, size_bytes: int) -> None:
        """Cut the file, or grow it by a hole.

        Raises:
            OSError: of ``ftruncate``.
        """
        with self._descriptor() as fd:
            os.ftruncate(fd, size_bytes)

    def close(self) -> None:
        """Refuse further calls (EBADF); the file is closed when the last call in progress ends."""
        with self._lock:
            close_now = not self._closed and not self._calls
            self._closed = True
        if close_now:
            os.close(self._fd)

    @contextlib.contextmanager
    def _descriptor(self) -> Iterator[int]:
        """The descriptor, which is not closed meanwhile: its number would be given to another file."""
        with self._lock:
            if self._closed:
                raise OSError(errno.EBADF, "the slab file is closed")
            self._calls += 1
        try:
            yield self._fd
        finally:
            with self._lock:
                self._calls -= 1
                close_now = self._closed and not self._calls
            if close_now:
                os.close(self._fd)


def transfer(
    call: Callable[[int, Sequence[memoryview], int], int], fd: int, offset: int, buffers: Sequence[memoryview]
) -> None:
    """``pwritev`` or ``preadv`` until all bytes are there; a call takes ``SC_IOV_MAX`` buffers at most.

    Raises:
        OSError: of the call; EIO where nothing is taken, or the file ends before all is read.
    """
    left = [buffer.cast("B") for buffer in reversed(buffers) if buffer.nbytes]
    while left:
        done = call(fd, left[: -_MOST_BUFFERS - 1 : -1], offset)
        offset += done
        rest = done
        while left and rest >= len(left[-1]):
            rest -= len(left.pop())
        if not left:
            return
        left[-1] = left[-1][rest:]
        if call is os.preadv:
            # With O_DIRECT the next read could be refused for its offset, where the truth is that the file ended.
            if not done or offset >= os.fstat(fd).st_size:
                raise OSError(errno.EIO, "short read: the file ends before")
        elif not done:
            raise OSError(errno.EIO, "short write: nothing was taken")
