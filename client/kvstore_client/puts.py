"""The operations that store blocks and see to it that they last; ``kvstore_client.operations`` has the others.

Generators as there. Answers to puts are numbers: ``PutStatus`` | ``Reason`` << 8.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

from kvstore.errors import DeadlineExceeded, ErrorCode, InvalidArgument, ProtocolMismatch, RemoteError
from kvstore.format.constants import RECORD_HEADER_BYTES
from kvstore.format.record import Buffer, encode_header, raw_header
from kvstore.mapped.context import FULL, NO_GRANT, NO_LANE, OVER, STALE
from kvstore.protocol.keys import check_key, check_parent
from kvstore.protocol.messages import (
    Done,
    Flush,
    Persist,
    Persisted,
    Ping,
    Put,
    PutReply,
    PutStatus,
    Reason,
    Request,
    Reserve,
    Reserved,
)
from kvstore.protocol.version import MAX_PAYLOAD_FRAMES
from kvstore_client.arguments import batches, buffer_of, check_part, check_request
from kvstore_client.results import FlushResult
from kvstore_client.session import Ask, Session, Steps, Told, expect

if TYPE_CHECKING:
    from kvstore_client.mapped_session import MappedSession

_log: Final = logging.getLogger("kvstore_client")

_PUT_BYTES: Final = 32 << 20
"""Payload bytes of one put request; longer chains are sent as several."""

_DEMOTING_PAUSES_S: Final = (0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128)
"""Pauses before a put is tried again for which blocks have to be written to a tier below first; then the last again."""

DEMOTING_ANSWER: Final = PutStatus.THROTTLED | Reason.DEMOTING << 8
"""Answer to a put, or to a persist, for which blocks have to be written to a tier below first."""

NO_ROOM_ANSWER: Final = PutStatus.REJECTED | Reason.NO_ROOM << 8

STALE_ANSWER: Final = PutStatus.REJECTED | Reason.STALE_NAMESPACE << 8
"""Answer to a put that began before the namespace was invalidated."""

_GOOD_ANSWERS: Final = frozenset({int(PutStatus.STORED), int(PutStatus.EXISTS)})

_DEMOTING: Final = -100
"""Beside the results of ``kvstore.mapped.context``: there are no slots for so long."""

_LOG_EVERY_S: Final = 5.0

_STATUSES: Final = frozenset(PutStatus)

_PUT_TRIES: Final = 4
"""How often slots or ring places are asked for before a block is sent instead."""


class Chain(NamedTuple):
    """Checked arguments of a put: key, parent and payload of each block, and what all of them share.

    ``digest`` is that of the namespace's generation in which the put began: what it stores was computed in it, and is
    never stored in another one that is joined before the put ends.
    """

    blocks: list[tuple[bytes, bytes, memoryview]]
    part: int
    access: int
    digest: bytes

    def rest(self, begin: int) -> Chain:
        """The same without the first blocks."""
        return self._replace(blocks=self.blocks[begin:])

    def some(self, positions: Sequence[int]) -> Chain:
        """Some of the blocks, each behind the same one as before."""
        return self._replace(blocks=[self.blocks[at] for at in positions])


def demoting_pauses(until: float) -> Iterator[float]:
    """Pauses (s) before further tries while blocks are written to a tier below, as long as there is time for them."""
    for pause_s in itertools.chain(_DEMOTING_PAUSES_S, itertools.repeat(_DEMOTING_PAUSES_S[-1])):
        if time.monotonic() + pause_s >= until:
            return
        yield pause_s


def waits_for_demotion(answers: Sequence[int]) -> list[int]:
    """Positions of what is to be tried again: what waits for room, and what found none behind it in its chain."""
    first = next((at for at, answer in enumerate(answers) if answer == DEMOTING_ANSWER), len(answers))
    again = (DEMOTING_ANSWER, NO_ROOM_ANSWER)
    return [at for at in range(first, len(answers)) if answers[at] in again]


class PutOperations:
    """Puts, persists and flushes in one session."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._accesses = itertools.count(1)
        self._unflushed: Counter[str] = Counter()
        self._unflushed_reasons: Counter[str] = Counter()
        self._logged: dict[int, float] = {}

    def next_access(self) -> int:
        """The id of another engine request."""
        return next(self._accesses)

    def check_chain(
        self,
        keys: Sequence[bytes],
        datas: Sequence[object],
        parent: bytes | None,
        part: int,
        request: int | None,
    ) -> Chain:
        """Check all arguments of a put before any of it is done.

        Raises:
            InvalidArgument: a bad key, parent, part or buffer, unequal lengths, or data larger than the largest slot.
        """
        if len(keys) != len(datas):
            raise InvalidArgument(f"{len(keys)} keys but {len(datas)} datas")
        access = next(self._accesses) if request is None and len(keys) > 1 else request or 0
        previous = check_parent(parent)
        check_part(part)
        check_request(request)
        max_record_bytes = self._session.max_record_bytes
        blocks: list[tuple[bytes, bytes, memoryview]] = []
        for index, (given, data) in enumerate(zip(keys, datas, strict=True)):
            key = check_key(given, f"keys[{index}]")
            payload = buffer_of(data, f"data of keys[{index}]")
            if RECORD_HEADER_BYTES + payload.nbytes > max_record_bytes:
                raise InvalidArgument(
                    f"data of keys[{index}] has {payload.nbytes} bytes; the daemon's largest record holds "
                    f"{max_record_bytes - RECORD_HEADER_BYTES}; raise dram.slab_bytes, dram.grant_bytes and "
                    "limits.grant_bytes_per_session, or use fewer tokens a block"
                )
            if key == previous:
                raise InvalidArgument(f"keys[{index}] is its own parent")
            blocks.append((key, previous, payload))
            previous = key
        return Chain(blocks, part, access, self._session.digest)

    def put_asks(self, chain: Chain) -> list[Ask]:
        """The requests that store a chain by sending it. Its records say the generation that the put began in."""
        headers = [
            encode_header(
                raw_header(
                    key=key, parent_key=previous, namespace_digest=chain.digest, part=chain.part, payload=payload
                )
            )
            for key, previous, payload in chain.blocks
        ]
        return self.record_asks(headers, [payload for _, _, payload in chain.blocks], chain.access, chain.digest)

    def record_asks(
        self, headers: Sequence[bytes], payloads: Sequence[memoryview], access: int, digest: bytes
    ) -> list[Ask]:
        """The requests that store records of the generation with that digest by sending them."""
        asks: list[Ask] = []
        frames: list[Buffer] = []
        total = 0
        for header, payload in zip(headers, payloads, strict=True):
            if frames and (total + payload.nbytes > _PUT_BYTES or len(frames) >= MAX_PAYLOAD_FRAMES):
                asks.append(Ask(Put, (len(frames) // 2,), access, frames, digest=digest))
                frames, total = [], 0
            frames += (header, payload)
            total += payload.nbytes
        if frames:
            asks.append(Ask(Put, (len(frames) // 2,), access, frames, digest=digest))
        return asks

    def put_chain(self, chain: Chain, until: float, durable: bool = False) -> Steps[list[PutStatus]]:
        """Store a chain and wait for each answer; with ``durable`` also until what is stored outlives the daemon.

        Args:
            chain: what is stored.
            until: as long (``time.monotonic``) is tried again what has to wait for blocks that are written below.
            durable: of what was stored or there, the answer says whether it is durable.

        Raises:
            ProtocolMismatch: the daemon is too old for ``durable``; nothing was stored.
        """
        if durable:
            yield from self.check_known(Persist)
        answers = yield from self._put_once(chain)
        pauses = demoting_pauses(until)
        while again := waits_for_demotion(answers):
            try:
                if not (yield from self.pause(pauses)):
                    break
                anew = yield from self._put_once(chain.some(again))
            except DeadlineExceeded:
                break
            for at, answer in zip(again, anew, strict=True):
                answers[at] = answer
            if len(waits_for_demotion(answers)) < len(again):
                # What goes on need not be asked for less and less often.
                pauses = demoting_pauses(until)
        self.note_demoting(answers)
        if durable:
            there = [at for at, answer in enumerate(answers) if answer in _GOOD_ANSWERS]
            persisted = yield from self.persist([chain.blocks[at][0] for at in there], until)
            for at, answer in zip(there, persisted, strict=True):
                answers[at] = answer
        return [PutStatus(answer & 0xFF) for answer in answers]

    def pause(self, pauses: Iterator[float]) -> Steps[bool]:
        """Wait for the next of the pauses, and for a sign of life; False where there is none."""
        pause_s = next(pauses, None)
        if pause_s is None:
            return False
        expect((yield Ask(Ping, pause_s=pause_s)), Done)
        return True

    def note_demoting(self, answers: Sequence[int]) -> None:
        """Log what was given up because the time was over."""
        records = answers.count(DEMOTING_ANSWER)
        if records:
            self._log_refusal(Reason.DEMOTING, records)

    def _put_once(self, chain: Chain) -> Steps[list[int]]:
        """Answers (status | reason << 8), through mapped memory as far as that goes, else by sending records."""
        mapped = self._session.mapped
        if mapped is None or not mapped.writable:
            return (yield from self._put_sent(chain))
        waiting: deque[int] = deque()
        answers: list[int] = []
        number = 0
        try:
            for key, previous, payload in chain.blocks:
                number = yield from self._put_mapped(mapped, key, previous, payload, chain)
                if number < 0:
                    break
                mapped.want_answer(number)
                waiting.append(number)
                while waiting and (answer := mapped.answer(waiting[0])) >= 0:
                    answers.append(answer)
                    waiting.popleft()
            if waiting:
                # The daemon deals with what was written into the ring before it answers a later request.
                expect((yield Ask(Ping)), Done)
                while waiting and (answer := mapped.answer(waiting[0])) >= 0:
                    answers.append(answer)
                    waiting.popleft()
        finally:
            mapped.forget_answers(waiting)
        for answer in answers:
            self.answered(answer)
        rest = chain.rest(len(answers))
        if number == _DEMOTING and self._session.mapped is mapped and not waiting:
            # No use in sending what there is no slot for.
            return answers + [DEMOTING_ANSWER] * len(rest.blocks)
        # The rest, and what a daemon that is gone did not answer: a repeated put changes nothing.
        return answers + (yield from self._put_sent(rest))

    def answered(self, answer: int) -> None:
        """Log the reason of a refusal (status | reason << 8), now and then; not of what is tried again."""
        reason = answer >> 8
        if reason and reason != Reason.DEMOTING:
            self._log_refusal(reason, 1)

    def put_unwaited(self, chain: Chain) -> Steps[Chain]:
        """Write a chain into mapped memory without waiting for answers; what has to be sent instead."""
        mapped = self._session.mapped
        if mapped is None or not mapped.writable:
            return chain
        for index, (key, previous, payload) in enumerate(chain.blocks):
            number = yield from self._put_mapped(mapped, key, previous, payload, chain)
            if number < 0:
                return chain.rest(index)
            mapped.expect_answer(number, key)
        return chain.rest(len(chain.blocks))

    def _put_mapped(
        self, mapped: MappedSession, key: bytes, previous: bytes, payload: memoryview, chain: Chain
    ) -> Steps[int]:
        """Number of the commit, or below 0 where the block has to be sent. Asks for slots where there are none."""
        for _ in range(_PUT_TRIES):
            if self._session.mapped is not mapped:
                return OVER
            if self._session.digest != chain.digest:
                return STALE
            number = mapped.put(key, previous, payload, chain.part, chain.access)
            if number >= 0:
                return number
            if number == FULL:
                expect((yield Ask(Ping)), Done)
                mapped.settle()
            elif number in (NO_LANE, NO_GRANT):
                record_bytes = RECORD_HEADER_BYTES + payload.nbytes
                refused = yield from self.reserve(mapped, record_bytes, previous, chain.access)
                if refused is not None:
                    return _DEMOTING if refused == Reason.DEMOTING else NO_GRANT
            else:
                return number
        return NO_GRANT

    def reserve(self, mapped: MappedSession, record_bytes: int, parent: bytes, access: int) -> Steps[int | None]:
        """Ask for slots for records of a size; None where there are some, else the ``Reason``.

        It is 0 where the mapping that they were asked for is over.

        ``parent``: of the block that is written first. Neither it nor what ``access`` used leaves for the slots.
        """
        lane = mapped.lane_for(record_bytes)
        mapped.close_lane(lane, record_bytes)
        reserved = expect((yield Ask(Reserve, (record_bytes, lane, parent), access)), Reserved)
        # Now and then, so that answers are taken before the ring goes around and others take their place.
        mapped.settle()
        if reserved.reason or self._session.mapped is not mapped:
            return reserved.reason
        mapped.open_lane(lane, record_bytes)
        return None

    def _put_sent(self, chain: Chain) -> Steps[list[int]]:
        return (yield from self.send_puts(self.put_asks(chain), len(chain.blocks), chain.digest))

    def send_puts(self, asks: Sequence[Ask], records: int, digest: bytes) -> Steps[list[int]]:
        """Answers (status | reason << 8) to records that are sent; reasons go to the log, each every few seconds.

        They are rejected once the client is in another generation of the namespace than that of the digest.
        """
        answers: list[int] = []
        for ask in asks:
            if self._session.digest != digest:
                _log.warning("a put that began before the namespace was invalidated was rejected")
                return answers + [STALE_ANSWER] * (records - len(answers))
            reply = expect((yield ask), PutReply)
            if not set(reply.statuses) <= _STATUSES:
                raise RemoteError(ErrorCode.INTERNAL, f"the daemon gave an unknown answer: {reply.statuses.hex()}")
            # What is behind one that waits for room is tried again with it.
            later = {Reason.DEMOTING, Reason.NO_ROOM} if Reason.DEMOTING in reply.reasons else set()
            for reason, refused in Counter(reply.reasons).items():
                if reason and reason not in later:
                    self._log_refusal(reason, refused, reply.id)
            answers += [status | reason << 8 for status, reason in zip(reply.statuses, reply.reasons, strict=True)]
        return answers

    def check_known(self, kind: type[Request]) -> Steps[None]:
        """Make sure that the daemon knows a kind of request, before anything is done that needs it.

        Raises:
            ProtocolMismatch: it does not.
        """
        if not self._session.number:
            # Not connected: whoever answers now may be another one.
            expect((yield Ask(Ping)), Done)
        unknown = self._session.too_old_for(kind)
        if unknown:
            raise ProtocolMismatch(unknown)

    def persist(self, keys: Sequence[bytes], until: float) -> Steps[list[int]]:
        """Wait until blocks are durable; answers (status | reason << 8).

        ``until``: as long (``time.monotonic``) is tried again what takes longer than the daemon waits.
        """
        answers = [DEMOTING_ANSWER] * len(keys)
        todo = list(range(len(keys)))
        pauses = demoting_pauses(until)
        try:
            while todo:
                at = 0
                for some in batches([keys[index] for index in todo]):
                    reply = expect((yield Ask(Persist, (some,), waits=True)), Persisted)
                    if not set(reply.statuses) <= _STATUSES:
                        raise RemoteError(
                            ErrorCode.INTERNAL, f"the daemon gave an unknown answer: {reply.statuses.hex()}"
                        )
                    for status, reason in zip(reply.statuses, reply.reasons, strict=True):
                        answers[todo[at]] = status | reason << 8
                        at += 1
                todo = [index for index in todo if answers[index] == DEMOTING_ANSWER]
                if todo and not (yield from self.pause(pauses)):
                    break
        except DeadlineExceeded:
            # They are stored all the same, and known not to be durable yet.
            pass
        for answer, records in Counter(answers).items():
            if answer >> 8:
                self._log_refusal(answer >> 8, records, outcome="are stored but not known to be durable")
        return answers

    def _log_refusal(
        self, reason: int, records: int, request: int | None = None, outcome: str = "were not stored"
    ) -> None:
        if reason == Reason.STALE_NAMESPACE:
            # The answer may be to a put from before this client moved on itself; mapped memory knows.
            mapped = self._session.mapped
            if mapped is not None:
                self._session.stale = not mapped.in_current_generation()
            elif request is None or request > self._session.joined_after:
                self._session.stale = True
        now = time.monotonic()
        if now - self._logged.get(reason, -_LOG_EVERY_S) >= _LOG_EVERY_S:
            self._logged[reason] = now
            _log.warning("%d records %s: %s", records, outcome, _reason_name(reason))

    def note_unwaited(self, told: Told, records: int) -> None:
        """Count the answers to a put that nobody waited for; ``flush`` reports them."""
        reply = told.reply
        if not isinstance(reply, PutReply):
            self._unflushed["lost"] += records
            return
        for status, reason in zip(reply.statuses, reply.reasons, strict=True):
            self._unflushed[PutStatus(status).name.lower()] += 1
            if reason:
                self._unflushed_reasons[_reason_name(reason)] += 1
                self._log_refusal(reason, 1, reply.id)

    def note_mapped(self, mapped: MappedSession) -> None:
        """Count what became of puts through mapped memory that nobody waited for."""
        self.note_answers(mapped.take_answers())

    def note_answers(self, answers: Counter[int]) -> None:
        """Count answers (status | reason << 8) to puts that nobody waited for."""
        for answer, records in answers.items():
            self._unflushed[PutStatus(answer & 0xFF).name.lower()] += records
            reason = answer >> 8
            if reason:
                self._unflushed_reasons[_reason_name(reason)] += records
                self._log_refusal(reason, records)

    def note_lost(self, records: int) -> None:
        """Count records whose answer will never come."""
        self._unflushed["lost"] += records

    def flush(self) -> Steps[FlushResult]:
        """Wait until all earlier puts of this client are published or refused."""
        expect((yield Ask(Flush)), Done)
        mapped = self._session.mapped
        if mapped is not None:
            mapped.settle()
            self.note_mapped(mapped)
        result = FlushResult(**self._unflushed, reasons=dict(self._unflushed_reasons))
        self._unflushed.clear()
        self._unflushed_reasons.clear()
        return result


def _reason_name(reason: int) -> str:
    try:
        return Reason(reason).name.lower()
    except ValueError:
        return f"reason {reason}"
