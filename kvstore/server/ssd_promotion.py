"""Promotion: blocks on the SSD are read into slots of the arena, verified, and published as if they had been put."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from kvstore.core.block import Record
from kvstore.core.events import Committed, CommittedRecord, GrantsReturned, SessionOpened, SlotWanted
from kvstore.core.instructions import Answer, Refuse
from kvstore.core.namespaces import NamespaceState
from kvstore.core.ssd import SsdStore
from kvstore.core.ssd_record import SsdRecord, SsdState
from kvstore.errors import CorruptRecord
from kvstore.format.constants import PAGE_BYTES, RECORD_HEADER_BYTES
from kvstore.format.record import RecordHeader, decode_header
from kvstore.observability.logs import RepeatedLog
from kvstore.policy.loading import LoadCosts
from kvstore.protocol.messages import PutStatus, Reason
from kvstore.server.executor import Executor
from kvstore.server.ssd_transcoding import Transcoding
from kvstore.server.ssd_transfers import Transfers
from kvstore.server.ssd_verification import verify_slot
from kvstore.tiers.disk import SlabFile

PROMOTING: Final = 1 << 62
"""Session that slots are granted to while they are filled from the SSD."""


class Promotions:
    """Reads records and publishes them; which ones and when is for ``kvstore.server.loads``.

    Args:
        executor: grants slots and publishes records.
        ssd: the tier's state.
        slabs: its file.
        transfers: its threads.
        transcoding: what records became on their way down; None: they are as they were.
        log: for records that are not what was written.
        costs: is told how long reads take.
    """

    def __init__(
        self,
        executor: Executor,
        ssd: SsdStore,
        slabs: SlabFile,
        transfers: Transfers,
        transcoding: Transcoding | None,
        log: RepeatedLog,
        costs: LoadCosts,
    ) -> None:
        self._executor = executor
        self._ssd = ssd
        self._slabs = slabs
        self._transfers = transfers
        self._transcoding = transcoding
        self._log = log
        self.costs = costs
        self._access = 0
        self.have_back: Callable[[], int] = lambda: 0
        """Takes back slots that were lent ahead and are not used; how many."""
        self.failing: Callable[[], bool] = lambda: False
        """Whether it is known that the device fails: a record that cannot be read then may be whole."""
        self.blocks = 0
        self.bytes = 0
        self.read_errors = 0
        executor.apply(SessionOpened(PROMOTING))

    def next_access(self) -> int:
        """Number of another request for which blocks come up."""
        self._access += 1
        return self._access

    def there(self, namespace: NamespaceState, record: SsdRecord) -> bool:
        """Whether DRAM has a record that is as good."""
        there = self._executor.store.find(namespace.id, record.key, record.part)
        return there is not None and there.fidelity >= record.fidelity

    def wants(self, namespace: NamespaceState, record: SsdRecord) -> bool:
        """Whether a record can come up, and is not there yet."""
        return namespace.current and record.state is SsdState.STORED and not self.there(namespace, record)

    def tell_failed(self, namespace: NamespaceState, record: SsdRecord) -> None:
        """Somebody waited for a record in vain, though it is below."""
        self._executor.store.tell_failed_load(namespace, record.key)

    def slot_for(
        self, namespace: NamespaceState, record: SsdRecord, access: int, *, only_free: bool = False
    ) -> Record | Refuse:
        """A slot for a record, or why there is none; ``only_free``: nothing may leave for it."""
        store = self._executor.store
        if only_free and store.populating:
            return Refuse(PutStatus.THROTTLED, Reason.POPULATING)
        if only_free and not store.has_free_room(record.home_bytes, PROMOTING):
            return Refuse(PutStatus.THROTTLED, Reason.NO_ROOM)
        wanted = SlotWanted(
            PROMOTING,
            record.record_bytes,
            ahead=only_free,
            access=access,
            namespace_id=namespace.id,
            slot_bytes=record.home_bytes,
        )
        answer = self._executor.want_slot(wanted)
        if isinstance(answer, Refuse) and self.have_back():
            answer = self._executor.want_slot(wanted)
        return answer

    def read(
        self,
        namespace: NamespaceState,
        record: SsdRecord,
        granted: Record,
        access: int,
        ended: Callable[[bool], None],
        *,
        used: int = 0,
        ahead: bool = False,
    ) -> None:
        """Have a record read into a slot, verified and published.

        Args:
            namespace: that it goes to.
            record: stored, and not being read.
            granted: the slot.
            access: number of the access that it is for.
            ended: called when that is over, with whether it is in DRAM.
            used: number of the access that used it last, where this is none.
            ahead: nobody waits for it yet.
        """
        began = self.costs.began()
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
            self.costs.ended(began, record.slot_bytes, good=error is None)
            if transcoding is not None:
                transcoding.scratch.give(read)
            target.release()
            self._ssd.let_go(record)
            stored = False
            try:
                if error is None:
                    stored = self._commit(namespace, record, granted, found[0], access, used)
                else:
                    self._executor.apply(GrantsReturned(PROMOTING, (granted.slot,)))
                    self._failed(namespace, record, error)
            finally:
                ended(stored)

        self._transfers.read(work, done, verify, ahead=ahead)

    def _commit(
        self,
        namespace: NamespaceState,
        record: SsdRecord,
        granted: Record,
        header: RecordHeader,
        access: int,
        used: int,
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
        event = Committed(PROMOTING, namespace.id, (commit,), access, promoted=True, used=used)
        answer = self._executor.apply(event)
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
