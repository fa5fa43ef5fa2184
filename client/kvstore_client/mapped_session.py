"""One session's view of the daemon's memory: reads and puts that need no message.

Nothing here waits or sends, except for one byte into the doorbell. What cannot be done comes back as a negative result
(``kvstore.mapped.context``), and the caller asks over ZeroMQ. Loads numba; imported only where a client maps.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import sys
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Iterable
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
    LANE_COUNT,
    RING_RECORDS,
    ClientFlag,
)
from kvstore.mapped.context import BUSY, CORRUPT, FULL, LARGE, LOOK, MISS, STALE
from kvstore.mapped.index_file import (
    BUCKET_OFFSET,
    NAMESPACE_ENTRY_BYTES,
    NAMESPACE_OFFSET,
    STATE_OFFSET,
    IndexState,
    decode_index_header,
)
from kvstore.mapped.index_reader import copy_batch, unpin
from kvstore.mapped.index_writer import HAZARD_WORDS
from kvstore.mapped.reads import close_batch, get_one, match, open_batch, pin_one
from kvstore.mapped.ring import consumed
from kvstore.mapped.session_file import decode_session_header
from kvstore.mapped.writes import begin_put, end_put, fill_slot, give_back, put_one
from kvstore.protocol.keys import KEY_BYTES, ROOT_KEY
from kvstore.protocol.messages import PutStatus, Reason, Welcome
from kvstore_client.session import why_not_opened

__all__ = ["MappedSession", "NotMapped"]

_LOOK_EVERY_NS: Final = 100_000_000
_NEXT_LOOK: Final = fields.NEXT_LOOK // 8
_MADV_POPULATE_READ: Final = 22
_MADV_POPULATE_WRITE: Final = 23
_LENGTH_MASK: Final = (1 << 32) - 1
_DIGEST_WORDS: Final = slice(88 // 8, 120 // 8)
"""Of a record's header."""
_MOST_UNTAKEN: Final = RING_RECORDS - 64
"""How far the ring may go on past a commit whose answer was not taken: one round further it is overwritten."""
_SETTLE_EVERY: Final = 16
"""Unanswered puts after which answers are looked for; far fewer than the ring has places."""
_STALE_ANSWER: Final = PutStatus.REJECTED | Reason.STALE_NAMESPACE << 8
_LAST_GOOD: Final = int(PutStatus.EXISTS)
_PUT_ITEM: Final = fields.ITEM_BYTES // 8

Words = npt.NDArray[np.int64]

_sessions: weakref.WeakSet[MappedSession] = weakref.WeakSet()


class NotMapped(Exception):
    """The daemon's memory cannot be mapped by this process; the message says why."""


def _file(path: str, directory: Path | None) -> Path:
    return Path(path) if directory is None else directory / Path(path).name


def _open(path: Path, flags: int, what: str) -> int:
    try:
        return os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError as error:
        raise NotMapped(why_not_opened(error, what, path)) from None


class MappedSession:
    """The memory of one session. Freed when nobody refers to it any more, so a running call cannot lose it.

    Args:
        welcome: names the files.
        session_fd: the locked session file; stays the caller's.
        namespace_id, parts, digest: of the namespace that was joined.
        directory: where the daemon's directory is for this process, None for where it is for the daemon.

    Attributes:
        writable: whether puts may go this way.
        corrupt: records found with a wrong checksum, each answered as a miss.
        over: whether the daemon or the session is known to be gone.
        refused: whether a put that nobody waited for was throttled or rejected since ``take_answers``.

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
        self.corrupt = 0
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
        _sessions.add(self)
        self._free_hazards = list(range(HAZARD_WORDS))
        self._hazard_bytes = 0
        self._max_hazard_bytes = self.header.hazard_bytes
        self._settling = threading.Lock()
        self._pending: deque[tuple[int, bytes]] = deque()
        self._pending_keys: dict[bytes, int] = {}
        self._wanted: dict[int, None] = {}
        """Commits whose answers somebody will take, oldest first."""
        self._unreturned: list[int] = []
        self._lingering: list[tuple[memoryview, int, int]] = []
        self._lane_pages = [0] * LANE_COUNT
        self._last_lane = LANE_COUNT - 1
        self._answered: Counter[int] = Counter()
        self.refused = False

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

    def _prepare(self, namespace_id: int, parts: int, digest: bytes) -> None:
        self._index_words: Words = np.frombuffer(self._index_map, np.int64)
        self._arena_bytes = np.frombuffer(self._arena_map, np.uint8)
        self._words: Words = np.frombuffer(self._file_map, np.int64)
        self._file_at = int(self._words.ctypes.data)
        begin = ANSWER_OFFSET // 8
        self._answers = self._words[begin : begin + RING_RECORDS * 2 // 8].view(np.uint16)
        self.arena_view = memoryview(self._arena_map).toreadonly()
        """All of the arena; a slot of it may be read while a hazard holds it."""
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
            (fields.ARENA, int(self._arena_bytes.ctypes.data)),
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
        self._at = int(context.ctypes.data)
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
        for fd in (self._lock_fd, self._bell_fd):
            if fd >= 0:
                os.close(fd)
        self._lock_fd = self._bell_fd = -1

    def abandon(self) -> tuple[Counter[int], deque[tuple[int, bytes]]]:
        """The daemon is gone, and with it nobody refers to this any more: answers that came, puts without one."""
        self.release()
        self.settle()
        return self.take_answers(), self._pending

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

    # -------------------------------------------------------------- reads

    def get_into(self, key: bytes, out: object, part: int, access: int) -> int:
        """Copy a record's payload into a buffer: its length, ``MISS``, or why it must be asked for."""
        owed = bool(self._pending) and self._owes(key)
        result: int = get_one(self._at, id(key), id(out), part, access)
        if result == LOOK and self._look():
            result = get_one(self._at, id(key), id(out), part, access)
        if result >= 0:
            return result
        if result == LARGE:
            results = self.get_many_into([key], [out], part, access)
            return results[0] if isinstance(results, list) else results
        return self._read_failed(result, owed)

    def _read_failed(self, result: int, owed: bool) -> int:
        """``owed``: this client had put the block when it was looked for, and nobody had published it yet."""
        if result == CORRUPT:
            self.corrupt += 1
        return BUSY if result == MISS and owed else result

    def get_many_into(self, keys: list[bytes], outs: list[object], part: int, access: int) -> list[int] | int:
        """Copy many records, without the interpreter lock; one result a key as of ``get_into``, or one for all."""
        owed: frozenset[bytes] = frozenset()
        if self._pending and self.settle():
            owed = frozenset(self._pending_keys)
        count = len(keys)
        items: Words = np.empty((count, fields.ITEM_BYTES // 8), np.int64)
        at = int(items.ctypes.data)
        refused: int = open_batch(self._at, id(keys), id(outs), count, at, part)
        if refused == LOOK and self._look():
            refused = open_batch(self._at, id(keys), id(outs), count, at, part)
        if refused:
            return refused
        try:
            copy_batch(self._at, at, count, part)
        finally:
            hits = close_batch(self._at, at, count, part, access)
        results: list[int] = items[:, fields.ITEM_RESULT // 8].tolist()
        if hits < count:
            self.corrupt += results.count(CORRUPT)
            if owed:
                for index, key in enumerate(keys):
                    if results[index] == MISS and key in owed:
                        results[index] = BUSY
        return results

    def match(self, keys: list[bytes], access: int) -> int:
        """How many leading keys are there; ``BUSY`` while puts of this client are not published."""
        if self._pending and self.settle():
            # What this client put and nobody published yet would end the run.
            return BUSY
        hits: int = match(self._at, id(keys), len(keys), access)
        if hits == LOOK and self._look():
            hits = match(self._at, id(keys), len(keys), access)
        return hits

    def pin(self, key: bytes, part: int, access: int, hazard: int) -> int:
        """Hold a record in place with a hazard of ``take_hazard``: slot << 32 | length of its payload; or why not.

        Where it is not held the hazard is free again.
        """
        owed = bool(self._pending) and self._owes(key)
        where: int = pin_one(self._at, id(key), hazard, part, access)
        if where == LOOK and self._look():
            where = pin_one(self._at, id(key), hazard, part, access)
        if where < 0:
            self._free_hazards.append(hazard)
            return self._read_failed(where, owed)
        held = self._hazard_bytes + (where & _LENGTH_MASK)
        if held > self._max_hazard_bytes:
            unpin(self._at, hazard)
            self._free_hazards.append(hazard)
            return BUSY
        self._hazard_bytes = held
        return where

    def take_hazard(self) -> int:
        """A hazard word that nobody uses, -1 where there is none."""
        if self._lingering:
            self._look_at_lingering()
        try:
            return self._free_hazards.pop()
        except IndexError:
            return -1

    def unpin(self, hazard: int, length: int) -> None:
        """Let go of a pinned record; its view must not be used any more."""
        unpin(self._at, hazard)
        self._free_hazards.append(hazard)
        self._hazard_bytes -= length

    @property
    def open_views(self) -> int:
        """Records that are read in place."""
        return HAZARD_WORDS - len(self._free_hazards)

    def linger(self, data: memoryview, hazard: int, length: int) -> None:
        """A view ended while something made from it is still there: its slot stays held until that is gone."""
        self._lingering.append((data, hazard, length))

    def _look_at_lingering(self) -> None:
        lingering, self._lingering = self._lingering, []
        for data, hazard, length in lingering:
            try:
                data.release()
            except BufferError:
                self._lingering.append((data, hazard, length))
            else:
                self.unpin(hazard, length)

    # -------------------------------------------------------------- puts

    def put(self, key: bytes, parent: bytes, data: object, part: int, access: int) -> int:
        """Write a record into a granted slot and commit it: the commit's number, or why not."""
        if self._unreturned:
            self._return_slots()
        if self._wanted and self.head() - next(iter(self._wanted), 1 << 62) > _MOST_UNTAKEN:
            return FULL
        result: int = put_one(self._at, id(key), id(parent), id(data), part, access)
        if result == LOOK and self._look():
            result = put_one(self._at, id(key), id(parent), id(data), part, access)
        if result == LARGE:
            item: Words = np.empty(_PUT_ITEM, np.int64)
            at = int(item.ctypes.data)
            result = begin_put(self._at, at, id(key), id(data))
            if result == 0:
                fill_slot(self._at, at)
                result = end_put(self._at, at, id(parent), part, access)
                if result < 0:
                    self._unreturned.append(int(item[fields.ITEM_SLOT // 8]))
        return result

    def put_unwaited(self, key: object, data: object, parent: object, part: object, request: object) -> bool:
        """One put, if its arguments are of the usual kind and a slot is at hand; False: do it by the long way."""
        if parent is None:
            parent = ROOT_KEY
        if (
            not self.writable
            or type(key) is not bytes
            or type(parent) is not bytes
            or len(parent) != KEY_BYTES
            or parent == key
            or type(part) is not int
            or not 0 <= part < 1 << 16
            or not (request is None or (type(request) is int and 0 <= request < 1 << 63))
        ):
            return False
        number = self.put(key, parent, data, part, request or 0)
        if number == STALE:
            # Over, perhaps while it was written: sent now, it would go into the generation that came after it.
            self._answered[_STALE_ANSWER] += 1
            self.refused = True
            return True
        if number < 0:
            return False
        self.expect_answer(number, key)
        return True

    def _return_slots(self) -> None:
        unreturned, self._unreturned = self._unreturned, []
        self._unreturned += [slot for slot in unreturned if give_back(self._at, slot) == FULL]

    def expect_answer(self, number: int, key: bytes) -> None:
        """Remember a commit that nobody waits for, until its answer is there."""
        pending = self._pending
        self._pending_keys[key] = number
        self._wanted[number] = None
        pending.append((number, key))
        if not len(pending) % _SETTLE_EVERY:
            self.settle()

    def answer(self, number: int) -> int:
        """Status | reason << 8 of a commit, -1 while there is none. Valid until the ring has gone once around."""
        if consumed(self._file_at) <= number:
            return -1
        answer = int(self._answers[number & (RING_RECORDS - 1)])
        self._wanted.pop(number, None)
        return answer

    def want_answer(self, number: int) -> None:
        """Keep a commit's answer from being overwritten until ``answer`` gave it, or ``forget_answers``."""
        self._wanted[number] = None

    def forget_answers(self, numbers: Iterable[int]) -> None:
        """Nobody waits for these commits any more."""
        for number in numbers:
            self._wanted.pop(number, None)

    def _owes(self, key: bytes) -> bool:
        """Whether this client put a block that was not published when this was asked."""
        return bool(self.settle()) and key in self._pending_keys

    def settle(self) -> int:
        """Take over answers that have come; how many are still missing."""
        if self._settling.acquire(blocking=False):
            try:
                taken = consumed(self._file_at)
                pending = self._pending
                while pending and pending[0][0] < taken:
                    number, key = pending.popleft()
                    answer = int(self._answers[number & (RING_RECORDS - 1)])
                    self._wanted.pop(number, None)
                    self._answered[answer] += 1
                    self.refused = self.refused or answer > _LAST_GOOD
                    if self._pending_keys.get(key) == number:
                        del self._pending_keys[key]
            finally:
                self._settling.release()
        return len(self._pending)

    def take_answers(self) -> Counter[int]:
        """How many puts that nobody waited for got each answer (status | reason << 8) since the last call."""
        answered, self._answered = self._answered, Counter()
        self.refused = False
        return answered

    def take_unanswered(self) -> int:
        """How many puts will never be answered because the session is over; they are forgotten."""
        with self._settling:
            lost = len(self._pending)
            self._pending.clear()
            self._pending_keys.clear()
        return lost

    def lane_for(self, record_bytes: int) -> int:
        """The lane to reserve for a size: the one that was asked for it, a free one, or the one reserved longest ago.

        One that another operation of this client is reserving at this moment is not free.
        """
        pages = -(-record_bytes // PAGE_BYTES)
        lanes = self._lane_pages
        if pages in lanes:
            return lanes.index(pages)
        if 0 in lanes:
            return lanes.index(0)
        self._last_lane = (self._last_lane + 1) % LANE_COUNT
        return self._last_lane

    def close_lane(self, lane: int, record_bytes: int) -> None:
        """A lane is going to serve another size: until it does, nothing may be taken out of it."""
        pages = -(-record_bytes // PAGE_BYTES)
        if self._lane_pages[lane] != pages:
            self._lane_pages[lane] = pages
            self._context[fields.LANE_PAGES // 8 + lane] = 0

    def open_lane(self, lane: int, record_bytes: int) -> None:
        """A lane holds slots for records of a size, unless it was asked to serve another one since."""
        pages = -(-record_bytes // PAGE_BYTES)
        if self._lane_pages[lane] == pages:
            self._context[fields.LANE_PAGES // 8 + lane] = pages


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
    for session in list(_sessions):
        session.disown()


os.register_at_fork(after_in_child=_in_forked_child)
