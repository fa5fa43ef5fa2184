"""Slots that an encoder writes into, and slots that a decoder reads in place, many at a time.

Nothing here waits or sends, as in ``mapped_session``. Covers: taking, filling, committing and giving back slots;
holding records and letting go of them. What an interrupt leaves behind ``MappedSession.reclaim`` finds. Does not cover:
what stands in the slots (``kvstore_client.tensors``).
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Sequence
from types import TracebackType
from typing import Final, Self

import numpy as np
import numpy.typing as npt

from kvstore.format.constants import PAGE_BYTES, RECORD_HEADER_BYTES
from kvstore.mapped import batch_writes as writes
from kvstore.mapped import context as fields
from kvstore.mapped.batch_reads import find_batch, hold_batch, release_batch, verify_batch
from kvstore.mapped.context import CORRUPT, FULL, LOOK
from kvstore.mapped.reads import close_batch
from kvstore.protocol.keys import join_keys
from kvstore_client.mapped_session import MappedSession
from kvstore_client.shared_memory import Words

__all__ = ["HeldBatch", "SlotBatch", "fidelities"]

Addresses = npt.NDArray[np.uint64]
Headers = npt.NDArray[np.uint8]

_SLOT: Final = writes.ITEM_SLOT // 8
_PAYLOAD_BYTES: Final = writes.ITEM_PAYLOAD_BYTES // 8
_KEY: Final = slice(writes.ITEM_KEY // 8, writes.ITEM_KEY // 8 + 4)
_PARENT: Final = slice(writes.ITEM_PARENT // 8, writes.ITEM_PARENT // 8 + 4)
_SECTIONS: Final = writes.ITEM_SECTIONS // 8
_SOURCE: Final = writes.ITEM_SOURCE // 8

_HELD_KEY: Final = slice(fields.ITEM_KEY // 8, fields.ITEM_KEY // 8 + 4)
_HELD_RESULT: Final = fields.ITEM_RESULT // 8
_HELD_TARGET: Final = fields.ITEM_TARGET // 8


class SlotBatch:
    """Slots lent to this client, until they are committed or given back: at the latest when the ``with`` ends.

    Args:
        mapped: whose slots.
        most: slots that are taken at once.

    Attributes:
        mapped: whose slots.
        count: slots that are held now.
        length: bytes that are read in place: none.
    """

    length: Final = 0

    def __init__(self, mapped: MappedSession, most: int) -> None:
        self.mapped = mapped
        self._items: Words = np.zeros((most, writes.ITEM_WORDS), np.int64)
        self._address = int(self._items.ctypes.data)
        self.count = 0

    def __enter__(self) -> Self:
        # Before anything is held: should an interrupt strike from here on, ``reclaim`` finds what nobody uses.
        self.mapped.batches[id(self)] = self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.give_back()
        self.mapped.batches.pop(id(self), None)

    def claim(self, count: int, record_bytes: int) -> int:
        """Take up to ``count`` slots for records of at most ``record_bytes``; how many, or below 0 why none.

        None may be held before.
        """
        mapped = self.mapped
        if not mapped.ready_for(count):
            return FULL
        claimed: int = writes.claim_slots(mapped.address, self._address, count, record_bytes)
        if claimed == LOOK and mapped._look():
            claimed = writes.claim_slots(mapped.address, self._address, count, record_bytes)
        self.count = max(claimed, 0)
        return claimed

    def payloads(self) -> Addresses:
        """Addresses behind the headers of the slots that are held."""
        slots = self._items[: self.count, _SLOT]
        return (slots * PAGE_BYTES + (self.mapped.arena_address + RECORD_HEADER_BYTES)).view(np.uint64)

    def describe(self, keys: Words, parents: Words, section_bytes: Words) -> None:
        """Say what the slots hold: keys and parents ``[count, 4]``, section lengths ``[count, sections]``."""
        items = self._items[: self.count]
        items[:, _KEY] = keys
        items[:, _PARENT] = parents
        items[:, _SECTIONS : _SECTIONS + section_bytes.shape[1]] = section_bytes
        items[:, _PAYLOAD_BYTES] = section_bytes.sum(axis=1)

    def seal(self, first: int, count: int) -> None:
        """Checksum what was encoded into some slots, and zero what is behind it. Without the interpreter lock."""
        writes.seal_slots(self.mapped.address, self._address + first * writes.ITEM_BYTES, count)

    def fill(self, sources: Addresses, first: int, count: int) -> None:
        """Copy payloads that were encoded elsewhere into some slots, instead of ``seal``."""
        end = first + count
        self._items[first:end, _SOURCE] = sources[first:end].view(np.int64)
        writes.fill_slots(self.mapped.address, self._address + first * writes.ITEM_BYTES, count)

    def keep(self, kept: npt.NDArray[np.intp]) -> None:
        """Give back all slots but those at these positions, which move up."""
        items = np.zeros_like(self._items)
        items[: len(kept)] = self._items[kept]
        for index in np.setdiff1d(np.arange(self.count), kept).tolist():
            self._give_back(index, 1)
        # In one step, so that each slot is held by one item whenever an interrupt strikes.
        self._items[:] = items
        self.count = len(kept)

    def commit(self, header: Words, part: int, access: int) -> int:
        """Number of the first of the commits; ``FULL`` or ``STALE``, and then the slots are held on.

        Args:
            header: 256 bytes of a record's header, see ``kvstore.mapped.batch_writes.commit_slots``.
            part: as in the header.
            access: the engine request.
        """
        mapped = self.mapped
        if not mapped.ready_for(self.count):
            return FULL
        first: int = writes.commit_slots(
            mapped.address, int(header.ctypes.data), self._address, self.count, part, access
        )
        if first >= 0:
            self.count = 0
        return first

    def give_back(self) -> None:
        """Return what is held."""
        self._give_back(0, len(self._items))
        self.count = 0

    def _give_back(self, first: int, count: int) -> None:
        if writes.return_slots(self.mapped.address, self._address + first * writes.ITEM_BYTES, count):
            # The ring is full.
            for index in range(first, first + count):
                slot, self._items[index, _SLOT] = int(self._items[index, _SLOT]), 0
                if slot:
                    self.mapped.give_back_later(slot)


class HeldBatch:
    """Leading records of a chain, held in place until the ``with`` ends.

    Args:
        mapped: whose memory.
        keys: of the chain.
        part: of the blocks.
        sure: a miss is a miss; else, and where this client put the block a moment ago, it must be asked for.

    Attributes:
        mapped: whose memory.
        length: bytes that are held.
        count: leading records that are held, at most as many as there are hazards and bytes for.
        why: why the next one is not held (``kvstore.mapped.context``), 0 where all are.
        headers: ``[count, 256]``, copied out: whole, and those of the records that were asked for.
    """

    def __init__(self, mapped: MappedSession, keys: Sequence[bytes], part: int, sure: bool) -> None:
        self.mapped = mapped
        self._keys = keys
        self._part = part
        self._sure = sure
        self._numbers: list[int] = []
        """Hazards that are ours: in this list or free, whenever an interrupt strikes."""
        self._hazards_at = 0
        self._asked = 0
        self.count = 0
        self.length = 0
        self.why = fields.BUSY

    def __enter__(self) -> Self:
        # Before anything is held, as in ``SlotBatch``.
        self.mapped.batches[id(self)] = self
        try:
            self._hold()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.give_back()
        self.mapped.batches.pop(id(self), None)

    def _hold(self) -> None:
        mapped = self.mapped
        if not mapped.free_hazards:
            mapped.reclaim()
        _move(mapped.free_hazards, self._numbers, len(self._keys))
        self._asked = count = len(self._numbers)
        if not count:
            return
        self._items: Words = np.zeros((count, fields.ITEM_WORDS), np.int64)
        self._items[:, _HELD_KEY] = np.frombuffer(join_keys(self._keys[:count]), np.int64).reshape(count, 4)
        self._hazards: Words = np.array(self._numbers, np.int64)
        headers: Headers = np.empty((count, RECORD_HEADER_BYTES), np.uint8)
        self._items_at, self._hazards_at = int(self._items.ctypes.data), int(self._hazards.ctypes.data)
        self._headers_at = int(headers.ctypes.data)
        self._all_headers = headers
        held = self._hold_now()
        if held == LOOK and mapped._look():
            held = self._hold_now()
        if held < 0:
            self.why = held
            held = 0
        else:
            length = int(self._items[:held, _HELD_RESULT].sum())
            self.length = length
            mapped.hazard_bytes += length
            self.why = int(self._items[held, _HELD_RESULT]) if held < count else 0
        self.count = held
        self.headers = headers[:held]
        if held < count:
            self._let_go(held)

    def _hold_now(self) -> int:
        mapped = self.mapped
        unsure = 0 if self._sure and not (mapped.pending and mapped.settle()) else 1
        limit = mapped.most_hazard_bytes - mapped.hazard_bytes
        held: int = hold_batch(
            mapped.address,
            self._items_at,
            self._asked,
            self._part,
            self._hazards_at,
            self._headers_at,
            limit,
            unsure,
        )
        return held

    def payloads(self) -> Addresses:
        """Addresses of the payloads that are held."""
        return np.ascontiguousarray(self._items[: self.count, _HELD_TARGET]).view(np.uint64)

    def lengths(self) -> Words:
        """Bytes of the payloads that are held."""
        return self._items[: self.count, _HELD_RESULT]

    def payload(self, index: int) -> memoryview:
        """One of the payloads that are held, read-only."""
        begin = int(self._items[index, _HELD_TARGET]) - self.mapped.arena_address
        return self.mapped.arena_view[begin : begin + int(self._items[index, _HELD_RESULT])].data

    def verify(self, decoded: int) -> int:
        """How many leading records count, of the first so many that were decoded. Without the interpreter lock."""
        good: int = verify_batch(self.mapped.address, self._items_at, decoded, self._headers_at)
        return good

    def suspect(self, index: int) -> None:
        """Report that a record's bytes are not what its header says."""
        self._items[index, _HELD_RESULT] = CORRUPT

    def report(self, used: int, access: int) -> None:
        """Tell the daemon what was read: the first ``used`` of the records that are held."""
        if not self._asked:
            return
        results = self._items[:, _HELD_RESULT]
        # What was held and not looked into is not reported.
        results[used : self.count][results[used : self.count] >= 0] = fields.BUSY
        self.mapped.corrupt += int(np.count_nonzero(results == CORRUPT))
        close_batch(self.mapped.address, self._items_at, self._asked, self._part, access)

    def _let_go(self, first: int) -> None:
        """Let go of all hazards from a position on."""
        count = len(self._numbers) - first
        if self._hazards_at:
            release_batch(self.mapped.address, self._hazards_at + 8 * first, count)
        _move(self._numbers, self.mapped.free_hazards, count)

    def give_back(self) -> None:
        """Let go of everything."""
        self._let_go(0)
        length = self.length
        self.length = 0
        self.mapped.hazard_bytes -= length


def _move(source: list[int], target: list[int], most: int) -> None:
    """Move up to ``most`` numbers from the end of a list to that of another.

    A single call of C code: no interrupt strikes where a number is in neither.
    """
    with contextlib.suppress(IndexError):
        target.extend(map(list.pop, itertools.repeat(source, most)))


def fidelities(mapped: MappedSession, keys: Words, part: int) -> Words:
    """Effective fidelity of the record of each of keys ``[count, 4]``, -1 where there is none; counts as no access."""
    found: Words = np.empty(len(keys), np.int64)
    find_batch(mapped.address, int(keys.ctypes.data), len(keys), part, int(found.ctypes.data))
    return found
