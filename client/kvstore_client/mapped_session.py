"""One session's reads and puts that need no message.

Nothing here waits or sends, except for one byte into the doorbell. What cannot be done comes back as a negative result
(``kvstore.mapped.context``), and the caller asks over ZeroMQ. Loads numba; imported only where a client maps.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections import Counter, deque
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from kvstore.format.constants import PAGE_BYTES
from kvstore.mapped import context as fields
from kvstore.mapped.client_file import LANE_COUNT, RING_RECORDS
from kvstore.mapped.context import BUSY, CORRUPT, FULL, LARGE, LOOK, MISS, STALE
from kvstore.mapped.index_reader import copy_batch, unpin
from kvstore.mapped.index_writer import HAZARD_WORDS
from kvstore.mapped.reads import cancel_batch, close_batch, get_one, match, open_batch, pin_one
from kvstore.mapped.ring import consumed
from kvstore.mapped.writes import begin_put, cancel_put, end_put, fill_slot, give_back, put_one
from kvstore.protocol.keys import KEY_BYTES, ROOT_KEY
from kvstore.protocol.messages import PutStatus, Reason, Welcome
from kvstore_client.shared_memory import NotMapped, SharedMemory, Words

if TYPE_CHECKING:
    from kvstore_client.mapped_batches import HeldBatch, SlotBatch
    from kvstore_client.views import _Pinned

__all__ = ["MappedSession", "NotMapped"]

_LENGTH_MASK: Final = (1 << 32) - 1
_MOST_UNTAKEN: Final = RING_RECORDS - 64
"""How far the ring may go on past a commit whose answer was not taken: one round further it is overwritten."""
_SETTLE_EVERY: Final = 16
"""Unanswered puts after which answers are looked for; far fewer than the ring has places."""
_STALE_ANSWER: Final = PutStatus.REJECTED | Reason.STALE_NAMESPACE << 8
_LAST_GOOD: Final = int(PutStatus.EXISTS)
_ABANDONED: Final = 4
_SPARE_ITEMS: Final = 64
_SPARE_BATCHES: Final = 4
_PUT_ITEM: Final = fields.ITEM_BYTES // 8


class _Batch:
    """Memory for the items of a batch of gets, kept for the next one.

    Making it costs more than a lookup, and much more after a long copy has driven Python's own memory out of the cache.
    """

    __slots__ = ("address", "items", "results")

    def __init__(self, count: int) -> None:
        self.items: Words = np.zeros((max(count, _SPARE_ITEMS), fields.ITEM_WORDS), np.int64)
        self.address = int(self.items.ctypes.data)
        self.results = self.items[:, fields.ITEM_RESULT // 8]


class MappedSession(SharedMemory):
    """Reads and puts of one session. Args and errors are those of ``SharedMemory``.

    Attributes:
        corrupt: records found with a wrong checksum, each answered as a miss.
        refused: whether a put that nobody waited for was throttled or rejected since ``take_answers``.
        pending: commits that nobody waits for and whose answers have not come.
        free_hazards: numbers of hazard words that are not in use.
        hazard_bytes, most_hazard_bytes: what is read in place, and may be.
        views: the views that hold hazards.
        batches: those that hold slots or hazards, by id.
        pin_one: the compiled function, for views.
        lower_tiers: not 0 where the daemon has tiers below this memory, so that a miss here need not be one.
    """

    pin_one = staticmethod(pin_one)

    def __init__(
        self,
        welcome: Welcome,
        session_fd: int,
        namespace_id: int,
        parts: int,
        digest: bytes,
        directory: Path | None,
    ) -> None:
        super().__init__(welcome, session_fd, namespace_id, parts, digest, directory)
        self.corrupt = 0
        self.lower_tiers = welcome.lower_tiers
        self.free_hazards = list(range(HAZARD_WORDS))
        self.hazard_bytes = 0
        self.views: dict[int, _Pinned] = {}
        self.batches: dict[int, SlotBatch | HeldBatch] = {}
        self._lingering = 0
        self.most_hazard_bytes = self.header.hazard_bytes
        self._settling = threading.Lock()
        self.pending: deque[tuple[int, bytes]] = deque()
        self._pending_keys: dict[bytes, int] = {}
        self._wanted: dict[int, None] = {}
        """Commits whose answers somebody will take, oldest first."""
        self._unreturned: list[int] = []
        self._spare_batches: list[_Batch] = []
        self._lane_pages = [0] * LANE_COUNT
        self._last_lane = LANE_COUNT - 1
        self._answered: Counter[int] = Counter()
        self.refused = False

    def abandon(self) -> tuple[Counter[int], deque[tuple[int, bytes]]]:
        """The daemon is gone, and with it nobody refers to this any more: answers that came, puts without one."""
        self.release()
        self.settle()
        return self.take_answers(), self.pending

    # -------------------------------------------------------------- reads

    def get_into(self, key: bytes, out: object, part: int, access: int, sure: bool) -> int:
        """Copy a record's payload into a buffer: its length, ``MISS``, or why it must be asked for.

        ``sure``: what is not there is a miss. Else, and where this client put it a moment ago, it must be asked for.
        """
        unsure = 0 if sure and not self.pending else self.unsure(key, sure)
        result: int = get_one(self.address, id(key), id(out), part, access, unsure)
        if result == LOOK and self._look():
            result = get_one(self.address, id(key), id(out), part, access, unsure)
        if result >= 0:
            return result
        if result == LARGE:
            results = self.get_many_into([key], [out], part, access, sure)
            return results[0] if isinstance(results, list) else results
        if result == CORRUPT:
            self.corrupt += 1
        return result

    def get_many_into(
        self, keys: list[bytes], outs: list[object], part: int, access: int, sure: bool
    ) -> list[int] | int:
        """Copy many records, without the interpreter lock; one result a key as of ``get_into``, or one for all."""
        owed: frozenset[bytes] = frozenset()
        if self.pending and self.settle():
            owed = frozenset(self._pending_keys)
        count = len(keys)
        batch = self._spare_batches.pop() if self._spare_batches and count <= _SPARE_ITEMS else _Batch(count)
        at = batch.address
        try:
            refused: int = open_batch(self.address, id(keys), id(outs), count, at, part)
            if refused == LOOK and self._look():
                refused = open_batch(self.address, id(keys), id(outs), count, at, part)
            if refused:
                return refused
            copy_batch(self.address, at, count, part)
            if owed or not sure:
                # What is asked for again is reported then, and not twice.
                for index in np.flatnonzero(batch.results[:count] == MISS).tolist():
                    if not sure or keys[index] in owed:
                        batch.results[index] = BUSY
            hits = close_batch(self.address, at, count, part, access)
        except BaseException:
            cancel_batch(at, count)
            raise
        results: list[int] = batch.results[:count].tolist()
        # Never inside the block above: another thread may use it at once, and must not have it cancelled.
        self._keep(batch)
        if hits < count:
            self.corrupt += results.count(CORRUPT)
        return results

    def _keep(self, batch: _Batch) -> None:
        # A list's pop and append are safe between threads.
        if len(self._spare_batches) < _SPARE_BATCHES and len(batch.results) == _SPARE_ITEMS:
            self._spare_batches.append(batch)

    def match(self, keys: list[bytes], access: int) -> int:
        """How many leading keys are there, and how far from exact, as of ``kvstore.mapped.reads.match``.

        ``BUSY`` while puts of this client are not published, and where the daemon may have more in tiers below.
        """
        if self.pending and self.settle():
            # What this client put and nobody published yet would end the run.
            return BUSY
        unsure = self.lower_tiers
        hits: int = match(self.address, id(keys), len(keys), access, unsure)
        if hits == LOOK and self._look():
            hits = match(self.address, id(keys), len(keys), access, unsure)
        return hits

    def pin_failed(self, where: int, key: bytes, hazard: int, part: int, access: int, unsure: int) -> int:
        """What to do about a pin that gave no place: try it again after a look at the daemon's lock, or why not.

        So does one that would hold more than this client may. Where nothing is held the hazard is free again.
        """
        if where == LOOK and self._look():
            where = pin_one(self.address, id(key), hazard, part, access, unsure)
        if where >= 0:
            if self.hazard_bytes + (where & _LENGTH_MASK) <= self.most_hazard_bytes:
                return where
            unpin(self.address, hazard)
            where = LARGE
        self.views.pop(hazard, None)
        self.free_hazards.append(hazard)
        if where == CORRUPT:
            self.corrupt += 1
        return where

    def unpin(self, hazard: int, length: int) -> None:
        """Let go of a pinned record; its view must not be used any more."""
        unpin(self.address, hazard)
        self.hazard_bytes -= length
        self.views.pop(hazard, None)
        self.free_hazards.append(hazard)

    def linger(self, array: object, hazard: int, length: int) -> None:
        """A view ended while something made from its array is still there: hold slot and mapping until that is gone."""
        self._lingering += length
        weakref.finalize(array, self._end_lingering, hazard, length).atexit = False
        self.views.pop(hazard, None)

    def _end_lingering(self, hazard: int, length: int) -> None:
        self._lingering -= length
        self.unpin(hazard, length)

    def head_for_request(self) -> int:
        """Records written into the ring, for a request; also the moment to look for what interrupts left behind."""
        if self.views or self.batches:
            self.reclaim()
        return self.head()

    def reclaim(self) -> None:
        """Let go of what views and batches held that an interrupt ended before they could."""
        for number, batch in list(self.batches.items()):
            if sys.getrefcount(batch) <= _ABANDONED and self.batches.pop(number, None) is batch:
                batch.give_back()
        for hazard, view in list(self.views.items()):
            # The dictionary, the list's tuple, the variable, the argument: nobody else has it.
            if sys.getrefcount(view) <= _ABANDONED and self.views.pop(hazard, None) is view:
                unpin(self.address, hazard)
                if hazard not in self.free_hazards:
                    self.free_hazards.append(hazard)
                others = (*list(self.views.values()), *list(self.batches.values()))
                self.hazard_bytes = self._lingering + sum(other.length for other in others)

    # -------------------------------------------------------------- puts

    def put(self, key: bytes, parent: bytes, data: object, part: int, access: int) -> int:
        """Write a record into a granted slot and commit it: the commit's number, or why not."""
        if not self.ready_for(1):
            return FULL
        result: int = put_one(self.address, id(key), id(parent), id(data), part, access)
        if result == LOOK and self._look():
            result = put_one(self.address, id(key), id(parent), id(data), part, access)
        if result == LARGE:
            item: Words = np.zeros(_PUT_ITEM, np.int64)
            at = int(item.ctypes.data)
            try:
                result = begin_put(self.address, at, id(key), id(data))
                if result == 0:
                    fill_slot(self.address, at)
                    result = end_put(self.address, at, id(parent), part, access)
                    if result < 0:
                        self._cancel_put(at)
            except BaseException:
                self._cancel_put(at)
                raise
        return result

    def _cancel_put(self, item: int) -> None:
        """Let go of what an item holds, once; a single call of C code, so that no interrupt loses its slot."""
        self._unreturned.extend(filter(None, map(cancel_put, (item,))))

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

    def ready_for(self, commits: int) -> bool:
        """Whether the ring may go on so far, for the answers that somebody waits for; also returns what is left over.

        Not where it has no room.
        """
        if self._unreturned:
            self._return_slots()
        return not self._wanted or self.head() + commits - next(iter(self._wanted), 1 << 62) <= _MOST_UNTAKEN + 1

    def give_back_later(self, slot: int) -> None:
        """Return a granted slot when the ring has room."""
        self._unreturned.append(slot)

    def _return_slots(self) -> None:
        # Those stay for which the ring is full. A single step of C code: no interrupt strikes where a slot was given
        # back and is in the list still, or where it is out of it and was not given back.
        self._unreturned[:] = filter(partial(give_back, self.address), self._unreturned)

    def expect_answer(self, number: int, key: bytes) -> None:
        """Remember a commit that nobody waits for, until its answer is there."""
        pending = self.pending
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

    def answered(self, first: int, count: int) -> bool:
        """Whether so many commits have been answered."""
        return consumed(self._file_at) >= first + count

    def answers(self, first: int, count: int) -> Words | None:
        """The answers of so many commits, the first of which was wanted; None until all are there."""
        if not self.answered(first, count):
            return None
        answers: Words = self._answers[np.arange(first, first + count) & (RING_RECORDS - 1)].astype(np.int64)
        self._wanted.pop(first, None)
        return answers

    def want_answer(self, number: int) -> None:
        """Keep the answers from a commit's on from being overwritten, until it was given, or ``forget_answers``."""
        self._wanted[number] = None

    def forget_answers(self, numbers: Iterable[int]) -> None:
        """Nobody waits for these commits any more."""
        for number in numbers:
            self._wanted.pop(number, None)

    def unsure(self, key: bytes, sure: bool) -> int:
        """1 where a miss need not be one: this client put the block, and it was not published when this was asked."""
        return 0 if sure and not (self.settle() and key in self._pending_keys) else 1

    def settle(self) -> int:
        """Take over answers that have come; how many are still missing."""
        # A ``with``: between taking a lock by a call and a ``try`` an interrupt could leave it taken for ever.
        with self._settling:
            taken = consumed(self._file_at)
            pending = self.pending
            while pending and pending[0][0] < taken:
                number, key = pending.popleft()
                answer = int(self._answers[number & (RING_RECORDS - 1)])
                self._wanted.pop(number, None)
                self._answered[answer] += 1
                self.refused = self.refused or answer > _LAST_GOOD
                if self._pending_keys.get(key) == number:
                    del self._pending_keys[key]
        return len(self.pending)

    def take_answers(self) -> Counter[int]:
        """How many puts that nobody waited for got each answer (status | reason << 8) since the last call."""
        answered, self._answered = self._answered, Counter()
        self.refused = False
        return answered

    def take_unanswered(self) -> int:
        """How many puts will never be answered because the session is over; they are forgotten."""
        with self._settling:
            lost = len(self.pending)
            self.pending.clear()
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
