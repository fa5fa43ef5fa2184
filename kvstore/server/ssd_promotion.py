"""Promotion: blocks on the SSD are read into slots of the arena, verified, and published as if they had been put."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Final

from kvstore.core.block import Record
from kvstore.core.events import Committed, CommittedRecord, GrantsReturned, SessionOpened, SlotWanted
from kvstore.core.instructions import Answer, Refuse
from kvstore.core.namespaces import NamespaceState
from kvstore.core.ssd import SsdStore
from kvstore.core.ssd_record import SsdBlock, SsdRecord, SsdState
from kvstore.errors import CorruptRecord
from kvstore.format.constants import PAGE_BYTES, RECORD_HEADER_BYTES
from kvstore.format.record import RecordHeader, decode_header
from kvstore.observability.logs import RepeatedLog
from kvstore.protocol.messages import PutStatus
from kvstore.server.executor import Executor
from kvstore.server.ssd_transcoding import Transcoding
from kvstore.server.ssd_transfers import Transfers
from kvstore.server.ssd_verification import verify_slot
from kvstore.tiers.disk import SlabFile

PROMOTING: Final = 1 << 62
"""Session that slots are granted to while they are filled from the SSD."""

_PAUSE_S: Final = 0.005
_MOST_READS: Final = 64
_MEASURED_BYTES: Final = 4 << 20


class Promotions:
    """Brings blocks up into DRAM.

    Args:
        executor: grants slots and publishes records.
        ssd: the tier's state.
        slabs: its file.
        transfers: its threads.
        transcoding: what records became on their way down; None: they are as they were.
        log: for records that are not what was written.
        clock: nanoseconds, monotonic.
    """

    def __init__(
        self,
        executor: Executor,
        ssd: SsdStore,
        slabs: SlabFile,
        transfers: Transfers,
        transcoding: Transcoding | None,
        log: RepeatedLog,
        clock: Callable[[], int],
    ) -> None:
        self._executor = executor
        self._ssd = ssd
        self._slabs = slabs
        self._transfers = transfers
        self._transcoding = transcoding
        self._log = log
        self._clock = clock
        self._flying: dict[SsdRecord, asyncio.Future[bool]] = {}
        self._access = 0
        self._since_ns = 0
        self._busy_ns = 0
        self._busy_bytes = 0
        self.have_back: Callable[[], int] = lambda: 0
        """Takes back slots that were lent ahead and are not used; how many."""
        self.failing: Callable[[], bool] = lambda: False
        """Whether it is known that the device fails: a record that cannot be read then may be whole."""
        self.blocks = 0
        self.bytes = 0
        self.read_errors = 0
        self.bytes_per_s = 0.0
        executor.apply(SessionOpened(PROMOTING))

    def next_access(self) -> int:
        """Number of another request for which blocks are brought up."""
        self._access += 1
        return self._access

    async def promote(self, namespace: NamespaceState, blocks: Sequence[SsdBlock], deadline_ns: int) -> None:
        """Bring blocks up, in that order; returns when each is in DRAM, cannot be had, or the time is over."""
        access = self.next_access()
        waiting: set[asyncio.Future[bool]] = set()
        for block in blocks:
            for record in list(block.parts.values()):
                future = await self._begin(namespace, record, access, deadline_ns)
                if future is not None:
                    waiting.add(future)
        if waiting:
            left_s = max((deadline_ns - self._clock()) / 1e9, 0.0)
            await asyncio.wait(waiting, timeout=left_s)

    async def _begin(
        self, namespace: NamespaceState, record: SsdRecord, access: int, deadline_ns: int
    ) -> asyncio.Future[bool] | None:
        """Have one record read; None where there is nothing to wait for."""
        while True:
            there = self._executor.store.find(namespace.id, record.key, record.part)
            if not namespace.current or (there is not None and there.fidelity >= record.fidelity):
                return None
            known = self._flying.get(record)
            if known is not None:
                return known
            if record.state is not SsdState.STORED:
                return None
            if len(self._flying) < _MOST_READS:
                wanted = SlotWanted(
                    PROMOTING,
                    record.record_bytes,
                    access=access,
                    namespace_id=namespace.id,
                    slot_bytes=record.home_bytes,
                )
                answer = self._executor.want_slot(wanted)
                if isinstance(answer, Refuse) and self.have_back():
                    answer = self._executor.want_slot(wanted)
                if isinstance(answer, Record):
                    return self._read(namespace, record, answer, access)
                if answer.status is not PutStatus.THROTTLED:
                    self._executor.store.tell_failed_load(namespace, record.key)
                    return None
            if self._clock() >= deadline_ns:
                self._executor.store.tell_failed_load(namespace, record.key)
                return None
            if self._flying:
                await asyncio.wait(
                    set(self._flying.values()), timeout=_PAUSE_S * 4, return_when=asyncio.FIRST_COMPLETED
                )
            else:
                await asyncio.sleep(_PAUSE_S)

    def _read(self, namespace: NamespaceState, record: SsdRecord, granted: Record, access: int) -> asyncio.Future[bool]:
        future: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._flying[record] = future
        if len(self._flying) == 1:
            self._since_ns = self._clock()
        self._ssd.hold(record)
        arena = self._executor.arena
        target = arena.slot(granted.slot, record.home_bytes)
        offset = record.slot * PAGE_BYTES
        found: list[RecordHeader] = []

        transcoding = None if record.home_bytes == record.slot_bytes else self._transcoding
        read = target if transcoding is None else transcoding.scratch.take(record.slot_bytes)

        def work() -> None:
            if record.home_bytes != record.slot_bytes and transcoding is None:
                raise CorruptRecord("the record was transcoded, and ssd.transcode is not set any more")
            self._slabs.read(offset, [read])

        def verify() -> None:
            header = verify_slot(read, record)
            if transcoding is not None:
                transcoding.up(read[: record.record_bytes], target)
                header = decode_header(target[:RECORD_HEADER_BYTES])
            found.append(header)

        def done(error: BaseException | None) -> None:
            self._measure(record.slot_bytes)
            if transcoding is not None:
                transcoding.scratch.give(read)
            target.release()
            self._ssd.let_go(record)
            del self._flying[record]
            stored = False
            try:
                if error is None:
                    stored = self._commit(namespace, record, granted, found[0], access)
                else:
                    self._executor.apply(GrantsReturned(PROMOTING, (granted.slot,)))
                    self._failed(namespace, record, error)
            finally:
                if not future.done():
                    future.set_result(stored)

        self._transfers.read(work, done, verify)
        return future

    def _commit(
        self, namespace: NamespaceState, record: SsdRecord, granted: Record, header: RecordHeader, access: int
    ) -> bool:
        if record.state is not SsdState.STORED:
            # Removed while it was read: it must not come back.
            self._executor.apply(GrantsReturned(PROMOTING, (granted.slot,)))
            return False
        commit = CommittedRecord(
            granted.slot,
            header.key,
            header.parent_key,
            header.namespace_digest,
            header.part,
            header.record_bytes,
            header.payload_checksum,
            header.effective_fidelity,
            int(header.codec),
        )
        answer = self._executor.apply(Committed(PROMOTING, namespace.id, (commit,), access, promoted=True))
        assert isinstance(answer, Answer)
        stored = answer.statuses[0] in (PutStatus.STORED, PutStatus.EXISTS)
        if stored:
            self.blocks += 1
            self.bytes += record.slot_bytes
        return stored

    def _failed(self, namespace: NamespaceState, record: SsdRecord, error: BaseException) -> None:
        """A record that cannot be read, or is not what was written, is forgotten: a miss."""
        key = record.key.hex()
        if isinstance(error, CorruptRecord):
            self._log.log_every(1, "corrupt_ssd_record", "error", "corrupt_ssd_record", block=key, why=str(error))
        elif isinstance(error, OSError):
            self.read_errors += 1
            self._log.log_every(1, "ssd_read", "error", "ssd_read_failed", block=key, why=str(error))
            if self.failing():
                self._executor.store.tell_failed_load(namespace, record.key)
                return
        else:
            raise error
        self._ssd.corrupt(record)
        if isinstance(error, OSError):
            # Not what its cause would be: whether it is damaged nobody knows.
            self._executor.store.tell_failed_load(namespace, record.key)

    def _measure(self, slot_bytes: int) -> None:
        """Bytes a second while at least one read is on its way, of the last few MiB."""
        now_ns = self._clock()
        self._busy_ns += now_ns - self._since_ns
        self._since_ns = now_ns
        self._busy_bytes += slot_bytes
        if self._busy_bytes >= _MEASURED_BYTES and self._busy_ns:
            rate = self._busy_bytes * 1e9 / self._busy_ns
            self.bytes_per_s = rate if not self.bytes_per_s else 0.75 * self.bytes_per_s + 0.25 * rate
            self._busy_bytes = self._busy_ns = 0
