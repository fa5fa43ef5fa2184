"""Saving blocks: encoded straight into granted slots, or sent where that cannot be."""

from __future__ import annotations

import ctypes
import logging
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from time import monotonic, monotonic_ns, sleep
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from kvstore.errors import ConnectionLost
from kvstore.format.constants import PAGE_BYTES, RECORD_HEADER_BYTES
from kvstore.format.record import checksum
from kvstore.mapped.context import FULL, NO_GRANT, NO_LANE, STALE
from kvstore.protocol.messages import Persist, PutStatus, Reason
from kvstore_client.operations import Operations
from kvstore_client.puts import (
    DEMOTING_ANSWER,
    NO_ROOM_ANSWER,
    STALE_ANSWER,
    demoting_pauses,
    waits_for_demotion,
)
from kvstore_client.session import Session
from kvstore_client.tensors.backends import Addresses, Backend, Words
from kvstore_client.tensors.blocks import Blocks
from kvstore_client.tensors.plan import StorePlan
from kvstore_client.tensors.records import BlockRecords
from kvstore_client.tensors.results import SaveReport
from kvstore_client.tensors.work import Work

if TYPE_CHECKING:
    from kvstore_client.mapped_batches import SlotBatch
    from kvstore_client.mapped_session import MappedSession

__all__ = ["Saving"]

_MOST_BLOCKS: Final = 64
"""Blocks of one group: so many does the daemon take at once."""
_SEND_BYTES: Final = 16 << 20
_SCRATCH_BYTES: Final = 8 << 20
_TRIES: Final = 4
"""How often slots or ring places are asked for before blocks are sent instead."""
_ROUNDS: Final = 3
"""How often blocks are stored anew that a daemon that went away did not answer for."""
_PATIENCE_NS: Final = 1_000_000
"""So long are answers looked for before the daemon is asked for them."""
_LOOK_S: Final = 20e-6
_STEPS: Final = 32
"""Into so many slot sizes the records of a codec without a fixed size are sorted."""
_ALIGNED: Final = 64
_NONE: Final = 0
_GOOD: Final = int(PutStatus.EXISTS)
_TOO_LARGE: Final = int(PutStatus.REJECTED) | int(Reason.TOO_LARGE) << 8
_log: Final = logging.getLogger("kvstore_client")
_STATUSES: Final = {int(status): status for status in PutStatus}

Indices = npt.NDArray[np.intp]


class Saving:
    """One call of ``save_blocks``.

    Args:
        session, operations: of the client, which is connected.
        plan: what is stored.
        backend: the kernels.
        blocks: what is saved.
        lineage: fidelity of what the blocks were computed on.
        access: the engine request.
        stream: of a device, after whose work blocks are encoded.
        durable: wait until what is stored outlives the daemon.
        patience_s: so long is tried again what has to wait for blocks that are written to a tier below.
    """

    def __init__(
        self,
        session: Session,
        operations: Operations,
        plan: StorePlan,
        backend: Backend,
        blocks: Blocks,
        lineage: int,
        access: int,
        stream: object,
        durable: bool,
        patience_s: float,
    ) -> None:
        self._session = session
        self._operations = operations
        self._plan = plan
        self._backend = backend
        self._blocks = blocks
        self._lineage = lineage
        self._access = access
        self._stream = stream
        self._durable = durable
        self._patience_s = patience_s
        self._pauses: Iterator[float] | None = None
        self._until = 0.0
        self._waited_for = 0
        """What is left of the pauses, None before the first one."""
        self._first_waiting = len(blocks.keys)
        """Position of the first block that waits for others to be written to a tier below, or their number."""
        self._digest = session.digest
        count = len(blocks.keys)
        self._answers = np.zeros(count, np.int64)
        """Status | reason << 8 of each block, 0 while there is none."""
        self._payload_bytes = np.zeros(count, np.int64)
        self._void = np.zeros(count, np.bool_)
        self._last = count
        """Position of the first block for which there was no room, or their number."""
        self._waiting: deque[tuple[MappedSession, int, Indices]] = deque()
        """Commits whose answers have not come: of which mapping, number of the first, positions of the blocks."""

    def run(self) -> Work[SaveReport]:
        """Store what is not there yet: what the codec cannot hold by the exact one."""
        if self._durable:
            yield self._operations.check_known(Persist)
        rounds = 0
        try:
            yield from self._find()
            while rounds < _ROUNDS:
                yield from self._store_in_order(np.flatnonzero(self._answers == _NONE))
                yield from self._take_last_answers()
                if self._first_waiting < self._answers.size:
                    yield from self._wait_for_demotion()
                elif self._answers.all():
                    break
                else:
                    rounds += 1
            else:
                raise ConnectionLost("the daemon went away again and again while blocks were saved")
        finally:
            self._forget_answers()
        self._operations.note_demoting(self._answers.tolist())
        stored = self._answers == PutStatus.STORED
        if self._durable:
            there = np.flatnonzero(self._answers <= _GOOD)
            keys = [self._blocks.keys[at] for at in there.tolist()]
            self._answers[there] = yield self._operations.persist(keys, monotonic() + self._patience_s)
        return self._report(stored)

    def _wait_for_demotion(self) -> Work[None]:
        """Let the daemon write blocks to a tier below, and have what waits for that be stored anew.

        Where there is no time for that any more, it is throttled, and so is all behind it.
        """
        answers = self._answers
        if not self._until:
            self._until = monotonic() + self._patience_s
        again = waits_for_demotion(answers.tolist())
        if self._pauses is None or len(again) < self._waited_for:
            # What goes on need not be asked for less and less often.
            self._pauses = demoting_pauses(self._until)
        self._waited_for = len(again)
        if (yield self._operations.pause(self._pauses)):
            answers[again] = _NONE
            if self._last > self._first_waiting:
                self._last = answers.size
        else:
            behind = answers[self._first_waiting :]
            behind[behind == _NONE] = DEMOTING_ANSWER
        self._first_waiting = answers.size

    def _report(self, stored: npt.NDArray[np.bool_]) -> SaveReport:
        kinds = self._answers & 0xFF
        refused = np.flatnonzero(self._answers > _GOOD).tolist()
        return SaveReport(
            statuses=tuple([_STATUSES[kind] for kind in kinds.tolist()]),
            reasons={index: Reason(int(self._answers[index]) >> 8).name.lower() for index in refused},
            void=tuple(np.flatnonzero(self._void).tolist()),
            raw_bytes=int(np.count_nonzero(stored)) * self._plan.layout.block_bytes,
            stored_bytes=int(self._payload_bytes[stored].sum()),
        )

    def _find(self) -> Work[None]:
        """Answer for the blocks that are there already, at the fidelity that they would get or a better one."""
        wanted = min(self._plan.records.codec.fidelity, self._lineage)
        mapped = self._session.mapped
        if mapped is not None:
            from kvstore_client.mapped_batches import fidelities

            found = fidelities(mapped, self._blocks.key_words, self._plan.part)
        else:
            found = yield self._operations.fidelities(self._blocks.keys)
        self._answers[np.asarray(found) >= wanted] = PutStatus.EXISTS

    def _store_in_order(self, todo: Indices) -> Work[None]:
        """Store blocks, none before those that it goes on behind: what nobody can reach yet is given no room."""
        while todo.size:
            void = self._void[todo]
            alike = int(np.argmax(void != void[0])) or todo.size
            records = self._plan.exact_records if void[0] else self._plan.records
            found = yield from self._store(todo[:alike], records)
            todo = np.concatenate((found, todo[alike:]))

    def _store(self, todo: Indices, records: BlockRecords) -> Work[Indices]:
        """Store blocks by a codec, through mapped memory as far as that goes; the rest from the first void one on."""
        while todo.size and not self._finds_void(todo, records):
            todo = self._within_reach(todo)
            if not todo.size:
                break
            if self._session.digest != self._digest:
                # Joined another generation meanwhile: what was computed in the old one is not stored in the new one.
                self._answers[todo] = STALE_ANSWER
                break
            most_bytes = self._session.max_record_bytes
            if records.fixed and records.max_record_bytes > most_bytes:
                self._refuse_large(todo, records.max_record_bytes)
                break
            mapped = self._session.mapped
            if mapped is not None and not mapped.over and not mapped.in_current_generation():
                self._answers[todo] = STALE_ANSWER
                self._operations.answered(STALE_ANSWER)
                break
            if mapped is not None and mapped.writable:
                into = self._into_slots if records.fixed else self._through_scratch
                todo = self._within_reach((yield from into(mapped, todo, records)))
            if todo.size and not self._finds_void(todo, records) and self._session.digest == self._digest:
                todo = yield from self._send(todo, records)
        else:
            return todo
        return todo[:0]

    def _finds_void(self, todo: Indices, records: BlockRecords) -> bool:
        """Whether the next block turned out to be one that the codec cannot hold."""
        return not records.codec.exact and bool(self._void[todo[0]])

    def _within_reach(self, todo: Indices) -> Indices:
        """Blocks that can be stored now: there is no room behind one for which there was none, or is none yet."""
        todo = todo[todo < self._first_waiting]
        behind = todo > self._last
        self._answers[todo[behind]] = NO_ROOM_ANSWER
        return todo[~behind]

    # -------------------------------------------------------------- through mapped memory

    def _into_slots(self, mapped: MappedSession, todo: Indices, records: BlockRecords) -> Work[Indices]:
        """Encode blocks straight into slots and commit them; those for which there is no slot."""
        from kvstore_client.mapped_batches import SlotBatch

        backend = self._backend
        most = max(1, min(backend.group_bytes // records.max_payload_bytes, backend.group_blocks, todo.size))
        header = records.template(self._digest, self._plan.part, self._lineage)
        with SlotBatch(mapped, most) as slots:
            while (todo := self._within_reach(todo)).size and not self._finds_void(todo, records):
                claimed = yield from self._claim(mapped, slots, todo[:most], records.max_record_bytes)
                if not claimed:
                    break
                kept = yield partial(self._encode_into, slots, todo[:claimed], records)
                if kept.size and not (yield from self._commit(mapped, slots, kept, header)):
                    break
                todo = todo[kept.size :]
        return todo

    def _encode_into(self, slots: SlotBatch, indices: Indices, records: BlockRecords) -> Indices:
        """Encode blocks into the slots that are held; those before the first void one, whose slots are kept."""
        payloads = slots.payloads()
        if self._backend.reaches(slots.mapped, payloads, records.max_payload_bytes):
            lengths, good = self._encode(indices, records, payloads)
            indices = self._describe(slots, indices, lengths, good)
            self._backend.share_out(slots.seal, slots.count)
            return indices
        with self._memory(indices.size, records) as payloads:
            lengths, good = self._encode(indices, records, payloads)
            indices = self._describe(slots, indices, lengths, good)
            self._fill(slots, payloads[good])
        return indices

    def _fill(self, slots: SlotBatch, payloads: Addresses) -> None:
        self._backend.share_out(partial(slots.fill, payloads), slots.count)

    def _describe(self, slots: SlotBatch, indices: Indices, lengths: Words, good: Indices) -> Indices:
        """Say what stands in the slots, and keep those of the blocks that are good."""
        if good.size < indices.size:
            slots.keep(good)
            indices, lengths = indices[good], lengths[good]
        slots.describe(self._blocks.key_words[indices], self._blocks.parent_words[indices], lengths)
        return indices

    def _encode(self, indices: Indices, records: BlockRecords, payloads: Addresses) -> tuple[Words, Indices]:
        """Encode blocks; the lengths of their sections, and the places of those before the first void one."""
        blocks = self._blocks
        lengths, void = self._backend.encode(records.codec, blocks.kv, blocks.pages[indices], payloads, self._stream)
        self._payload_bytes[indices] = lengths.sum(axis=1)
        if records.codec.exact or not void.any():
            return lengths, np.arange(indices.size)
        self._void[indices[void]] = True
        return lengths, np.arange(int(void.argmax()))

    @contextmanager
    def _memory(self, count: int, records: BlockRecords) -> Iterator[Addresses]:
        """Addresses in scratch memory for so many payloads."""
        stride = -(-records.max_payload_bytes // _ALIGNED) * _ALIGNED
        memory = self._backend.scratch.take(count * stride)
        try:
            yield (int(memory.ctypes.data) + stride * np.arange(count)).astype(np.uint64)
        finally:
            self._backend.scratch.put(memory)

    def _through_scratch(self, mapped: MappedSession, todo: Indices, records: BlockRecords) -> Work[Indices]:
        """Encode blocks of which nobody knows how long they become, then copy each into a slot of about its size."""
        from kvstore_client.mapped_batches import SlotBatch

        most = max(1, min(_SCRATCH_BYTES // records.max_payload_bytes, _MOST_BLOCKS, todo.size))
        header = records.template(self._digest, self._plan.part, self._lineage)
        step = max(PAGE_BYTES, self._plan.layout.block_bytes // _STEPS // PAGE_BYTES * PAGE_BYTES)
        with SlotBatch(mapped, most) as slots, self._memory(most, records) as payloads:
            while (todo := self._within_reach(todo)).size:
                group = todo[:most]
                lengths, _ = yield partial(self._encode, group, records, payloads[: group.size])
                sizes = -(-(RECORD_HEADER_BYTES + lengths.sum(axis=1)) // step) * step
                sizes = np.minimum(sizes, records.max_record_bytes)
                at = 0
                while at < group.size:
                    alike = int(np.argmax(sizes[at:] != sizes[at])) or group.size - at
                    claimed = yield from self._claim(mapped, slots, group[at : at + alike], int(sizes[at]))
                    if not claimed:
                        return todo[at:]
                    some, indices = slice(at, at + claimed), group[at : at + claimed]
                    slots.describe(self._blocks.key_words[indices], self._blocks.parent_words[indices], lengths[some])
                    yield partial(self._fill, slots, payloads[some])
                    if not (yield from self._commit(mapped, slots, indices, header)):
                        return todo[at:]
                    at += claimed
                todo = todo[most:]
        return todo

    def _claim(self, mapped: MappedSession, slots: SlotBatch, indices: Indices, record_bytes: int) -> Work[int]:
        """Take slots, having asked for them where there are none; 0 where blocks have to be sent instead."""
        count = indices.size
        for _ in range(_TRIES):
            if self._session.mapped is not mapped or self._session.digest != self._digest:
                return 0
            claimed = slots.claim(count, record_bytes)
            if claimed > 0:
                return claimed
            if claimed == FULL:
                yield self._operations.ping()
                self._take_answers()
            elif claimed in (NO_LANE, NO_GRANT):
                parent = self._blocks.parent_words[indices[0]].tobytes()
                refused = yield self._operations.reserve(mapped, record_bytes, parent, self._access)
                self._take_answers()
                if refused is not None:
                    if refused == Reason.DEMOTING:
                        # No use in encoding and sending what there is no slot for.
                        self._answer(indices, np.full(count, DEMOTING_ANSWER))
                    return 0
            else:
                return 0
        return 0

    def _commit(self, mapped: MappedSession, slots: SlotBatch, indices: Indices, header: Words) -> Work[bool]:
        """Commit what is in the slots; False where it was not possible, and they are given back."""
        first = FULL
        for _ in range(_TRIES):
            first = slots.commit(header, self._plan.part, self._access)
            if first != FULL:
                break
            yield self._operations.ping()
            self._take_answers()
        if first < 0:
            slots.give_back()
            if first == STALE:
                self._answers[indices] = STALE_ANSWER
            return first == STALE
        mapped.want_answer(first)
        self._waiting.append((mapped, first, indices))
        self._take_answers()
        return True

    def _take_answers(self) -> None:
        """Take over the answers that have come."""
        waiting = self._waiting
        while waiting:
            mapped, first, indices = waiting[0]
            answers = mapped.answers(first, indices.size)
            if answers is None:
                return
            for answer in answers[answers > _GOOD].tolist():
                self._operations.answered(answer)
            self._answer(indices, answers)
            waiting.popleft()

    def _answer(self, indices: Indices, answers: Words) -> None:
        """Note what became of blocks."""
        self._answers[indices] = answers
        refused = indices[answers == NO_ROOM_ANSWER]
        if refused.size:
            self._last = min(self._last, int(refused.min()))
        waiting = indices[answers == DEMOTING_ANSWER]
        if waiting.size:
            self._first_waiting = min(self._first_waiting, int(waiting.min()))

    def _take_last_answers(self) -> Work[None]:
        self._take_answers()
        if self._waiting:
            yield self._wait_for_answers
            self._take_answers()
        if self._waiting:
            # The daemon deals with what was written into the ring before it answers a later request.
            yield self._operations.ping()
            self._take_answers()
        # What a daemon that is gone did not answer for is stored again: a repeated put changes nothing.
        self._forget_answers()

    def _wait_for_answers(self) -> None:
        """Look for the last answers for a moment: to ask for them takes longer than publishing some blocks does."""
        mapped, first, indices = self._waiting[-1]
        until = monotonic_ns() + _PATIENCE_NS
        while not (mapped.answered(first, indices.size) or mapped.over) and monotonic_ns() < until:
            sleep(_LOOK_S)

    def _forget_answers(self) -> None:
        while self._waiting:
            mapped, first, _ = self._waiting.popleft()
            mapped.forget_answers((first,))

    # -------------------------------------------------------------- by sending

    def _send(self, todo: Indices, records: BlockRecords) -> Work[Indices]:
        """Encode some blocks and send them; the rest."""
        most = max(1, min(_SEND_BYTES // records.max_payload_bytes, _MOST_BLOCKS, todo.size))
        group = todo[:most]
        with self._memory(most, records) as addresses:
            lengths, good = yield partial(self._encode, group, records, addresses)
            rest = np.concatenate((group[good.size :], todo[most:]))
            headers: list[bytes] = []
            payloads: list[memoryview] = []
            large = RECORD_HEADER_BYTES + lengths[good].sum(axis=1) > self._session.max_record_bytes
            if large.any():
                self._refuse_large(group[good[large]], RECORD_HEADER_BYTES + int(lengths[good].sum(axis=1).max()))
                good = good[~large]
            for place in good.tolist():
                payload = _bytes_at(int(addresses[place]), int(lengths[place].sum()))
                payloads.append(payload)
                headers.append(self._header(int(group[place]), records, lengths[place].tolist(), payload))
            asks = self._operations.record_asks(headers, payloads, self._access, self._digest)
            if asks:
                answers = yield self._operations.send_puts(asks, good.size, self._digest)
                self._answer(group[good], np.array(answers, np.int64))
        return rest

    def _refuse_large(self, indices: Indices, record_bytes: int) -> None:
        """Answer for blocks whose records the daemon cannot take."""
        self._answers[indices] = _TOO_LARGE
        _log.warning(
            "%d blocks were not stored: their records of %d bytes are larger than the %d that the daemon takes; raise "
            "dram.slab_bytes, dram.grant_bytes and limits.grant_bytes_per_session, or use fewer tokens a block",
            indices.size,
            record_bytes,
            self._session.max_record_bytes,
        )

    def _header(self, index: int, records: BlockRecords, section_bytes: list[int], payload: memoryview) -> bytes:
        return records.header(
            self._blocks.keys[index],
            self._blocks.parent_words[index].tobytes(),
            self._digest,
            self._plan.part,
            lineage=self._lineage,
            section_bytes=section_bytes,
            payload_checksum=checksum(payload),
        )


def _bytes_at(address: int, length: int) -> memoryview:
    """Memory that the caller keeps."""
    return memoryview((ctypes.c_ubyte * length).from_address(address)).cast("B")
