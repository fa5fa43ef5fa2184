"""Puts over ZeroMQ: take granted slots for the client, write its records into them, commit."""

from __future__ import annotations

from collections.abc import Callable

import zmq

from kvstore.core.block import Record
from kvstore.core.events import Committed, CommittedRecord, SlotWanted
from kvstore.core.instructions import Answer, Refuse
from kvstore.errors import CorruptRecord
from kvstore.format.constants import RECORD_HEADER_BYTES
from kvstore.format.record import RecordHeader, checksum, decode_header, header_key
from kvstore.protocol.messages import Put, PutReply, PutStatus, Reason
from kvstore.server.counters import RequestCounters
from kvstore.server.executor import Executor
from kvstore.server.sessions import Session
from kvstore.server.transport import frame_buffer

RETRY_AFTER_MS = 20
"""Advice with ``throttled``: about the time in which transfers end and slots come back."""

_SHORT_OF_SLOTS = (Reason.GRANT_LIMIT, Reason.ALL_HELD, Reason.NO_ROOM, Reason.QUOTA)


class Puts:
    """The write path of clients that send their payloads.

    Args:
        executor: carries the store's instructions out.
        counters: of the request path.
        have_back: takes slots back that mapped clients were lent ahead and do not use; how many.
    """

    def __init__(self, executor: Executor, counters: RequestCounters, have_back: Callable[[], int]) -> None:
        self._executor = executor
        self._counters = counters
        self._have_back = have_back

    def put(self, session: Session, request: Put, frames: list[zmq.Frame], incarnation: int) -> PutReply:
        """Store the records of one request, each written straight from its frame into its slot.

        The payload's checksum is verified on the way in: a client may have changed its buffer while it was sent.
        """
        count = request.count
        statuses = [PutStatus.REJECTED] * count
        reasons = [Reason.BAD_RECORD] * count
        access = request.access
        if not access:
            # All records of one request are one access, also where the client named none.
            session.private_accesses -= 1
            access = session.private_accesses
        pending: list[tuple[int, CommittedRecord]] = []
        throttled: dict[bytes, Refuse] = {}

        def commit() -> None:
            if pending:
                event = Committed(session.id, request.namespace_id, tuple(entry[1] for entry in pending), access)
                answer = self._executor.apply(event)
                assert isinstance(answer, Answer)
                for (index, _), status, reason in zip(pending, answer.statuses, answer.reasons, strict=True):
                    statuses[index], reasons[index] = status, reason
                pending.clear()

        for index in range(count):
            header_frame, payload = frames[2 * index], frame_buffer(frames[2 * index + 1])
            header = self._check(header_frame, payload)
            if header is None:
                continue
            wanted = SlotWanted(
                session.id,
                header.record_bytes,
                access=access,
                namespace_id=request.namespace_id,
                parent_key=header.parent_key,
            )
            # What comes behind a block that is to be sent again is to be sent again as well: nobody could reach it
            # until then, so it would have left.
            behind = throttled.get(header.parent_key)
            granted = behind or self._slot(wanted)
            if isinstance(granted, Refuse) and not behind and pending and granted.reason in _SHORT_OF_SLOTS:
                # Their slots may do, and it may be one of them that this one goes on behind.
                commit()
                granted = self._slot(wanted)
            if isinstance(granted, Refuse):
                statuses[index], reasons[index] = granted.status, granted.reason
                if granted.status is PutStatus.THROTTLED:
                    throttled[header.key] = granted
                self._executor.store.tell_refused(request.namespace_id, header.key, granted.reason)
                continue
            self._executor.arena.write(granted.slot, granted.slot_bytes, frame_buffer(header_frame), payload)
            pending.append((index, _committed(granted, header)))
        commit()
        return self._reply(session, request, incarnation, statuses, reasons, frames)

    def tell_overloaded(self, request: Put, frames: list[zmq.Frame]) -> None:
        """Remember of which blocks a put was not looked at."""
        for frame in frames[: 2 * request.count : 2]:
            if len(frame) == RECORD_HEADER_BYTES:
                key = header_key(frame_buffer(frame))
                self._executor.store.tell_refused(request.namespace_id, key, Reason.OVERLOADED)

    def _check(self, header_frame: zmq.Frame, payload: memoryview | bytes | bytearray) -> RecordHeader | None:
        if len(header_frame) != RECORD_HEADER_BYTES:
            return None
        try:
            header = decode_header(frame_buffer(header_frame))
        except CorruptRecord:
            return None
        if RECORD_HEADER_BYTES + len(payload) != header.record_bytes or checksum(payload) != header.payload_checksum:
            return None
        return header

    def _slot(self, wanted: SlotWanted) -> Record | Refuse:
        granted = self._executor.want_slot(wanted)
        if isinstance(granted, Refuse) and granted.reason in _SHORT_OF_SLOTS and self._have_back():
            granted = self._executor.want_slot(wanted)
        return granted

    def _reply(
        self,
        session: Session,
        request: Put,
        incarnation: int,
        statuses: list[PutStatus],
        reasons: list[Reason],
        frames: list[zmq.Frame],
    ) -> PutReply:
        counters = self._counters
        stored = statuses.count(PutStatus.STORED)
        exists = statuses.count(PutStatus.EXISTS)
        throttled = statuses.count(PutStatus.THROTTLED)
        counters.stored += stored
        counters.exists += exists
        counters.throttled += throttled
        counters.rejected += len(statuses) - stored - exists - throttled
        if stored != len(statuses):
            for reason in reasons:
                if reason is not Reason.NONE:
                    counters.reasons[reason.name.lower()] += 1
            reasons = [reason.known_in(session.protocol) for reason in reasons]
        counters.bytes_in += sum(
            len(frames[2 * index + 1]) for index, status in enumerate(statuses) if status is PutStatus.STORED
        )
        return PutReply(request.id, incarnation, bytes(statuses), bytes(reasons), RETRY_AFTER_MS if throttled else 0)


def _committed(granted: Record, header: RecordHeader) -> CommittedRecord:
    return CommittedRecord(
        slot=granted.slot,
        key=header.key,
        parent_key=header.parent_key,
        namespace_digest=header.namespace_digest,
        part=header.part,
        record_bytes=header.record_bytes,
        checksum=header.payload_checksum,
        fidelity=header.effective_fidelity,
        codec=int(header.codec),
    )


def refused(request: Put, incarnation: int) -> PutReply:
    """The answer to a put that was not looked at because the daemon is behind."""
    statuses = bytes([PutStatus.THROTTLED]) * request.count
    reasons = bytes([Reason.OVERLOADED]) * request.count
    return PutReply(request.id, incarnation, statuses, reasons, RETRY_AFTER_MS)
