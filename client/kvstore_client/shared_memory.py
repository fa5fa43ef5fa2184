"""The memory that one session shares with the daemon: mapped, checked, and described for compiled functions.

Covers: the files, the block of words that compiled functions read (``kvstore.mapped.context``), the daemon's end and
the session's. Does not cover: reading and writing (``mapped_session``).
"""

from __future__ import annotations

import fcntl
import mmap
import os
import sys
import threading
import time
import weakref
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from kvstore.errors import CorruptRecord
from kvstore.format.constants import PAGE_BYTES
from kvstore.format.record import encode_header, raw_header
from kvstore.mapped import context as fields
from kvstore.mapped.arena import decode_arena_header
from kvstore.mapped.client_file import (
    ANSWER_OFFSET,
    CLIENT_FILE_BYTES,
    FLAGS_OFFSET,
    HEAD_OFFSET,
    RING_RECORDS,
    ClientFlag,
)
from kvstore.mapped.index_file import (
    BUCKET_OFFSET,
    NAMESPACE_ENTRY_BYTES,
    NAMESPACE_OFFSET,
    STATE_OFFSET,
    IndexState,
    NamespaceWord,
    decode_index_header,
)
from kvstore.mapped.session_file import decode_session_header
from kvstore.protocol.messages import Welcome
from kvstore_client.session import why_not_opened

__all__ = ["Bytes", "NotMapped", "SharedMemory", "Words"]

_LOOK_EVERY_NS: Final = 100_000_000
_NEXT_LOOK: Final = fields.NEXT_LOOK // 8
_MADV_POPULATE_READ: Final = 22
_MADV_POPULATE_WRITE: Final = 23
_DIGEST_WORDS: Final = slice(88 // 8, 120 // 8)
"""Of a record's header."""

Words = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]

_all: weakref.WeakSet[SharedMemory] = weakref.WeakSet()


class NotMapped(Exception):
    """The daemon's memory cannot be mapped by this process; the message says why."""


def _file(path: str, directory: Path | None) -> Path:
    return Path(path) if directory is None else directory / Path(path).name


def _open(path: Path, flags: int, what: str) -> int:
    try:
        return os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError as error:
        raise NotMapped(why_not_opened(error, what, path)) from None


class SharedMemory:
    """The memory of one session. Freed when nobody refers to it any more, so a running call cannot lose it.

    Args:
        welcome: names the files.
        session_fd: the locked session file; stays the caller's.
        namespace_id, parts, digest: of the namespace that was joined.
        directory: where the daemon's directory is for this process, None for where it is for the daemon.

    Attributes:
        writable: whether puts may go this way.
        over: whether the daemon or the session is known to be gone.
        header: of the index.
        arena_view: all of the arena, read-only; a slot of it may be read while a hazard holds it.
        arena_address: where it begins in this process.
        slab_bytes, slab_count: of the slabs that it is cut into.
        address: of the block of words that compiled functions take.

    Raises:
        NotMapped: why it cannot be done.
    """

    def __init__(
        self,
        welcome: Welcome,
        session_fd: int,
        namespace_id: int,
        parts: int,
        digest: bytes,
        directory: Path | None,
    ) -> None:
        self.writable = True
        self.over = False
        self._lock_fd = self._bell_fd = self._session_fd = -1
        self._descriptors = threading.Lock()
        try:
            self._map(welcome, session_fd, directory)
        except (OSError, CorruptRecord, ValueError) as error:
            self.release()
            raise NotMapped(f"the daemon's memory cannot be mapped: {error}") from None
        except BaseException:
            self.release()
            raise
        self._prepare(namespace_id, parts, digest)
        _all.add(self)

    def _map(self, welcome: Welcome, session_fd: int, directory: Path | None) -> None:
        if not decode_session_header(os.pread(session_fd, 64, 0)).mapped:
            raise NotMapped("the session's file is not made for it")
        if os.fstat(session_fd).st_size != CLIENT_FILE_BYTES:
            raise NotMapped("the session's file is of another layout")
        self._lock_fd = _open(_file(welcome.index_file, directory), os.O_RDONLY, "the index")
        size = os.fstat(self._lock_fd).st_size
        self._index_map = mmap.mmap(self._lock_fd, size, prot=mmap.PROT_READ)
        self.header = decode_index_header(self._index_map[:PAGE_BYTES], size)
        path = _file(welcome.arena_file, directory)
        try:
            fd = _open(path, os.O_RDWR, "the arena")
        except NotMapped:
            fd = _open(path, os.O_RDONLY, "the arena")
            self.writable = False
        try:
            size = os.fstat(fd).st_size
            prot = mmap.PROT_READ | (mmap.PROT_WRITE if self.writable else 0)
            self._arena_map = mmap.mmap(fd, size, prot=prot)
        finally:
            os.close(fd)
        arena = decode_arena_header(self._arena_map[:PAGE_BYTES])
        self.slab_bytes, self.slab_count = arena.slab_bytes, arena.slab_count
        ours = welcome.incarnation
        if arena.arena_bytes != size or self.header.arena_bytes != size:
            raise NotMapped("arena and index are not as large as they say")
        if arena.incarnation != ours or self.header.incarnation != ours:
            raise NotMapped("arena or index is another daemon's")
        self._bell_fd = _open(_file(welcome.doorbell, directory), os.O_WRONLY | os.O_NONBLOCK, "the doorbell")
        # Last, when nothing can be refused any more: a mapping has a descriptor of its own, and closing any descriptor
        # of the session file frees the lock on it.
        self._file_map = mmap.mmap(session_fd, CLIENT_FILE_BYTES)

    def join(self, namespace_id: int, digest: bytes) -> None:
        """Read and write another generation of the namespace; id 0: none, every read is ``STALE``."""
        context = self._context
        self._template[_DIGEST_WORDS] = np.frombuffer(digest, np.int64)
        context[fields.NAMESPACE_ID // 8] = namespace_id
        # A copy that another thread has under way may see one of both: the old generation's records are gone already.
        context[fields.NAMESPACE // 8] = self._namespaces_at + namespace_id * NAMESPACE_ENTRY_BYTES

    def in_current_generation(self) -> bool:
        """Whether the generation that is read and written is the namespace's current one."""
        entry = int(self._context[fields.NAMESPACE // 8]) - int(self._index_words.ctypes.data)
        return int(self._index_words[entry // 8]) == NamespaceWord.CURRENT

    def _prepare(self, namespace_id: int, parts: int, digest: bytes) -> None:
        self._index_words: Words = np.frombuffer(self._index_map, np.int64)
        self._arena_bytes = np.frombuffer(self._arena_map, np.uint8)
        self._words: Words = np.frombuffer(self._file_map, np.int64)
        self._file_at = int(self._words.ctypes.data)
        begin = ANSWER_OFFSET // 8
        self._answers = self._words[begin : begin + RING_RECORDS * 2 // 8].view(np.uint16)
        self.arena_view: Bytes = np.frombuffer(memoryview(self._arena_map).toreadonly(), np.uint8)
        self.arena_address = int(self._arena_bytes.ctypes.data)
        self._touched = np.zeros(len(self._arena_map) // fields.CHUNK_BYTES + 1, np.uint8)
        self._recent: Words = np.zeros(2 * fields.RECENT_TARGETS, np.int64)
        self._window: Words = np.zeros(fields.WINDOW * fields.WINDOW_WORDS, np.int64)
        template = encode_header(
            raw_header(key=bytes(31) + b"\1", parent_key=bytes(32), namespace_digest=digest, part=0, payload=b"\0")
        )
        self._template: Words = np.frombuffer(template, np.int64).copy()
        context: Words = np.zeros(fields.CONTEXT_BYTES // 8, np.int64)
        index_at = int(self._index_words.ctypes.data)
        self._namespaces_at = index_at + NAMESPACE_OFFSET
        for field, value in (
            (fields.BUCKETS, index_at + BUCKET_OFFSET),
            (fields.BUCKET_COUNT, self.header.bucket_count),
            (fields.SEED, self.header.hash_seed),
            (fields.ARENA, self.arena_address),
            (fields.ARENA_BYTES, self.header.arena_bytes),
            (fields.EPOCH, index_at + STATE_OFFSET),
            (fields.FILE, self._file_at),
            (fields.PARTS, parts),
            (fields.VERIFY_EVERY, self.header.verify_every),
            (fields.RECENT, int(self._recent.ctypes.data)),
            (fields.KEYS, int(self._window.ctypes.data)),
            (fields.HEADER, int(self._template.ctypes.data)),
            (fields.BELL, self._bell_fd),
            (fields.TOUCHED, int(self._touched.ctypes.data)),
            (fields.POPULATE, _MADV_POPULATE_WRITE if self.writable else _MADV_POPULATE_READ),
        ):
            context[field // 8] = value
        self._context = context
        self._scratch = context.data
        self.address = int(context.ctypes.data)
        self.join(namespace_id, digest)
        if _has_device():
            self.note_device()

    # -------------------------------------------------------------- life

    def note_device(self) -> None:
        """Say that a device may read and write the arena: its transfers can outlive this process for a moment."""
        self._words[FLAGS_OFFSET // 8] = int(self._words[FLAGS_OFFSET // 8]) | ClientFlag.DEVICE

    def daemon_lives(self) -> bool:
        """Whether the daemon still holds its lock and answers for its files. May be called by any thread."""
        with self._descriptors:
            if not self.over:
                marked_dead = int(self._index_words[STATE_OFFSET // 8]) != int(IndexState.LIVE)
                self.over = marked_dead or _lock_is_free(self._lock_fd)
            return not self.over

    def _look(self) -> bool:
        """Look after the daemon's lock, which compiled calls ask for now and then; False once it is gone."""
        if not self.daemon_lives():
            return False
        self._scratch[_NEXT_LOOK] = time.monotonic_ns() + _LOOK_EVERY_NS
        return True

    def own_lock(self, session_fd: int) -> None:
        """Take over the session file's descriptor, and with it the lock, until nobody refers to this object.

        The daemon must not take this client's slots back while a call of another thread writes one or a view reads one.
        """
        self._session_fd = session_fd

    def __del__(self) -> None:
        if getattr(self, "_session_fd", -1) >= 0:
            os.close(self._session_fd)

    def release(self) -> None:
        """Give descriptors back; the memory goes with the object."""
        with self._descriptors:
            self._close_descriptors()

    def _close_descriptors(self) -> None:
        self.over = True
        if hasattr(self, "_scratch"):
            # First: compiled calls, which hold the interpreter lock, write into what stands here.
            self._scratch[fields.BELL // 8] = -1
        fds = (self._lock_fd, self._bell_fd)
        self._lock_fd = self._bell_fd = -1
        for fd in fds:
            if fd >= 0:
                os.close(fd)

    def disown(self) -> None:
        """In a forked child: what a view that is still open lets go of is not the parent's, and descriptors are copies.

        Takes no lock: a thread that the fork left behind may hold it.
        """
        self._own_file: Words = np.zeros(CLIENT_FILE_BYTES // 8, np.int64)
        self._scratch[fields.FILE // 8] = int(self._own_file.ctypes.data)
        self._close_descriptors()

    def head(self) -> int:
        """Records ever written into the ring."""
        return int(self._words[HEAD_OFFSET // 8])


def _lock_is_free(fd: int) -> bool:
    """Whether nobody holds the daemon's lock on its index file."""
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    fcntl.flock(fd, fcntl.LOCK_UN)
    return True


def _has_device() -> bool:
    """Whether this process already has a CUDA context, as far as loaded libraries know."""
    torch: Any = sys.modules.get("torch")
    return bool(torch is not None and hasattr(torch, "cuda") and torch.cuda.is_initialized())


def _in_forked_child() -> None:
    for memory in list(_all):
        memory.disown()


os.register_at_fork(after_in_child=_in_forked_child)
