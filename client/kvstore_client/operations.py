"""Every operation of the SDK, once, as a generator that the sync and the async client drive."""

from __future__ import annotations

import itertools
import logging
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple, get_args

from kvstore.errors import (
    CorruptRecord,
    DeadlineExceeded,
    ErrorCode,
    InvalidArgument,
    ProtocolMismatch,
    RemoteError,
    Throttled,
)
from kvstore.format.constants import FIDELITY_EXACT, RECORD_HEADER_BYTES, CodecId
from kvstore.format.record import Buffer, RecordHeader, decode_record, encode_header, raw_header
from kvstore.mapped.context import BUSY, CORRUPT, FULL, MISS, NO_GRANT, NO_LANE, OVER, STALE
from kvstore.protocol.keys import check_key, check_parent, join_keys
from kvstore.protocol.messages import (
    Attached,
    Clear,
    CountReply,
    DaemonStats,
    Done,
    Exists,
    ExistsReply,
    Flush,
    Get,
    GetReply,
    GetStatus,
    Hint,
    Invalidate,
    Match,
    MatchReply,
    Persist,
    Persisted,
    Ping,
    Prefetch,
    Put,
    PutReply,
    PutStatus,
    Reason,
    Release,
    Remove,
    Request,
    Reserve,
    Reserved,
    Stats,
    StatsReply,
    TierId,
    TierName,
    Verify,
    VerifyReply,
)
from kvstore.protocol.version import MAX_KEYS_PER_REQUEST, MAX_LEASE_MS, MAX_PAYLOAD_FRAMES
from kvstore_client.results import FlushResult, MatchResult
from kvstore_client.session import Ask, Session, Steps, Told, expect

if TYPE_CHECKING:
    from kvstore_client.mapped_session import MappedSession

_log: Final = logging.getLogger("kvstore_client")

_PUT_BYTES: Final = 32 << 20
"""Payload bytes of one put request; longer chains are sent as several."""

_GET_PAUSES_S: Final = (0.002, 0.004, 0.008, 0.016, 0.032)
"""Pauses before a get is asked again of which the daemon sent nothing; then it is throttled."""

_DEMOTING_PAUSES_S: Final = (0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128)
"""Pauses before a put is tried again for which blocks have to be written to a tier below first; then the last again."""

DEMOTING_ANSWER: Final = PutStatus.THROTTLED | Reason.DEMOTING << 8
"""Answer to a put, or to a persist, for which blocks have to be written to a tier below first."""

NO_ROOM_ANSWER: Final = PutStatus.REJECTED | Reason.NO_ROOM << 8
_GOOD_ANSWERS: Final = frozenset({int(PutStatus.STORED), int(PutStatus.EXISTS)})
_DEMOTING: Final = -100
"""Beside the results of ``kvstore.mapped.context``: there are no slots for so long."""

_LOG_EVERY_S: Final = 5.0
NOT_THERE: Final = frozenset({MISS, STALE, CORRUPT})
"""Results of a mapped read that are a miss, as they would be if they were asked for."""

MISSED: Final = BUSY
"""Result of a mapped read that is not sure to be a miss, because the block may be in a tier below."""

STALE_ANSWER: Final = PutStatus.REJECTED | Reason.STALE_NAMESPACE << 8
"""Answer to a put that began before the namespace was invalidated."""
_STATUSES: Final = frozenset(PutStatus)

_PUT_TRIES: Final = 4
"""How often slots or ring places are asked for before a block is sent instead."""

_TIER_NAMES: Final[dict[int, TierName]] = {
    TierId.HBM: "hbm",
    TierId.DRAM: "dram",
    TierId.SSD: "ssd",
    TierId.REMOTE: "remote",
}


def buffer_of(data: object, what: str, *, writable: bool = False) -> memoryview:
    """The bytes of a contiguous buffer (bytes, memoryview, numpy, CPU torch), without a copy.

    Raises:
        InvalidArgument: not a buffer, not contiguous, empty, or read-only where it must be written.
    """
    if hasattr(data, "untyped_storage"):
        data = _torch_bytes(data, what)
    try:
        view = memoryview(data)  # type: ignore[arg-type]
    except TypeError:
        # numpy has no buffer format for bfloat16 and the like; their bytes are as good.
        try:
            view = memoryview(data.view("uint8"))  # type: ignore[attr-defined]
        except (AttributeError, TypeError, ValueError):
            raise InvalidArgument(
                f"{what} must be bytes, a memoryview, a numpy array or a CPU torch tensor, got {type(data).__name__}"
            ) from None
    except ValueError as error:
        raise InvalidArgument(f"{what}: {error}") from None
    if "O" in view.format:
        raise InvalidArgument(f"{what} holds Python objects, whose bytes are addresses of this process")
    if not view.c_contiguous:
        raise InvalidArgument(f"{what} must be contiguous; copy it first")
    if not view.nbytes:
        raise InvalidArgument(f"{what} is empty; a block has at least one byte")
    if writable and view.readonly:
        raise InvalidArgument(f"{what} is read-only")
    return view.cast("B")


def _torch_bytes(tensor: Any, what: str) -> Any:
    """A CPU tensor's bytes as numpy, for any dtype; torch is the caller's, it is not imported here."""
    if tensor.device.type != "cpu":
        raise InvalidArgument(f"{what} is on {tensor.device}; this version takes CPU tensors")
    if not tensor.is_contiguous():
        raise InvalidArgument(f"{what} must be contiguous; call .contiguous() first")
    flat = tensor.detach().reshape(-1)
    return flat.view(_uint8_of(flat)).numpy()


def _uint8_of(tensor: Any) -> Any:
    return sys.modules[type(tensor).__module__.partition(".")[0]].uint8


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


class Operations:
    """The operations in one session.

    Attributes:
        corrupt: records received whose checksum or identity was wrong; each was answered as a miss.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._accesses = itertools.count(1)
        self._unflushed: Counter[str] = Counter()
        self._unflushed_reasons: Counter[str] = Counter()
        self._logged: dict[int, float] = {}
        self.corrupt = 0

    def next_access(self) -> int:
        """The id of another engine request."""
        return next(self._accesses)

    # -------------------------------------------------------------- puts

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
            for reason, refused in Counter(reply.reasons).items():
                if reason and reason != Reason.DEMOTING:
                    self._log_refusal(reason, refused, reply.id)
            answers += [status | reason << 8 for status, reason in zip(reply.statuses, reply.reasons, strict=True)]
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

    # -------------------------------------------------------------- gets

    def get_data(
        self, keys: Sequence[bytes], part: int, request: int | None
    ) -> Steps[list[tuple[RecordHeader, memoryview] | None]]:
        """As ``get_records``, where what a record holds must be the data that was put.

        Raises:
            InvalidArgument: a record is encoded.
        """
        records = yield from self.get_records(keys, part, request)
        for record in records:
            if record is not None and record[0].codec is not CodecId.RAW:
                raise InvalidArgument(
                    f"block {record[0].key.hex()} is stored as {record[0].codec.text}, so its bytes are not those that "
                    "were put; read it as tensors (kvstore_client.tensors)"
                )
        return records

    def get_records(
        self, keys: Sequence[bytes], part: int, request: int | None
    ) -> Steps[list[tuple[RecordHeader, memoryview] | None]]:
        """Headers and payloads of one part of blocks, views of received frames; None for a miss.

        Raises:
            Throttled: the daemon would not send more now.
        """
        check_part(part)
        check_request(request)
        joined = join_keys(keys)
        access = next(self._accesses) if request is None and len(keys) > 1 else request or 0
        found: dict[int, tuple[RecordHeader, memoryview] | None] = {}
        wanted = list(range(len(keys)))
        pauses = iter(_GET_PAUSES_S)
        pause_s = 0.0
        while wanted:
            asked = wanted[:MAX_KEYS_PER_REQUEST]
            some = joined if len(asked) == len(keys) else b"".join(joined[32 * at : 32 * at + 32] for at in asked)
            # A daemon with tiers below answers when what is there has come up.
            waits = bool(self._session.lower_tiers)
            told = yield Ask(Get, (some, part), access, pause_s=pause_s, waits=waits)
            reply = expect(told, GetReply)
            frames = iter(told.payloads)
            throttled = []
            for at, status in zip(asked, reply.statuses, strict=True):
                if status == GetStatus.THROTTLED:
                    throttled.append(at)
                else:
                    record = next(frames) if status == GetStatus.HIT else None
                    found[at] = None if record is None else self._record(record, joined[32 * at : 32 * at + 32], part)
            pause_s = 0.0
            if len(throttled) == len(asked):
                # What this client has read the daemon hears from libzmq, a moment after the client itself.
                pause_s = next(pauses, 0.0)
                if not pause_s:
                    raise Throttled(
                        f"the daemon would not send {len(throttled)} blocks now; read fewer at once, or later"
                    )
            wanted = throttled + wanted[len(asked) :]
        return [found[at] for at in range(len(keys))]

    def bring_up(self, missed: Sequence[bytes]) -> Steps[bool]:
        """Have blocks that are in tiers below come up into mapped memory; False where time was over before.

        Asks for all of them at once. Afterwards what is not in mapped memory is nowhere, or does not come up.
        """
        try:
            for some in _batches(missed):
                expect((yield Ask(Prefetch, (some, TierId.DRAM, True), waits=True)), CountReply)
        except DeadlineExceeded:
            return False
        return True

    def read_rest(
        self,
        keys: Sequence[bytes],
        outs: Sequence[object],
        missed: Sequence[bytes],
        part: int,
        request: int | None,
    ) -> Steps[list[int | None]]:
        """As ``get_into``, of what mapped memory did not give at once.

        ``missed``: those that were not there and may be below: they come up first, and are looked for there once more.
        """
        if not missed:
            return (yield from self.get_into(keys, outs, part, request))
        in_time = yield from self.bring_up(missed)
        mapped = self._session.mapped
        lengths: list[int | None] = [None] * len(keys)
        asked = list(range(len(keys)))
        if mapped is not None:
            results = mapped.get_many_into(list(keys), list(outs), part, request or 0, True)
            if isinstance(results, list):
                lengths = [result if result >= 0 else None for result in results]
                asked = [at for at in asked if results[at] < 0 and results[at] not in NOT_THERE]
        if asked and in_time:
            found = yield from self.get_into([keys[at] for at in asked], [outs[at] for at in asked], part, request)
            for at, length in zip(asked, found, strict=True):
                lengths[at] = length
        return lengths

    def view_rest(
        self, pin: Callable[[MappedSession], bool], key: bytes, part: int, request: int | None, missed: bool
    ) -> Steps[tuple[RecordHeader, memoryview] | None]:
        """As ``get_data`` of one key that could not be held in mapped memory at once.

        Args:
            pin: tries again to hold it there; whether that is the answer.
            key: of the block.
            part: of it.
            request: the engine request.
            missed: it was not there and may be below: it comes up first.
        """
        if missed:
            in_time = yield from self.bring_up([key])
            mapped = self._session.mapped
            if (mapped is not None and pin(mapped)) or not in_time:
                return None
        return (yield from self.get_data([key], part, request))[0]

    def get_into(
        self, keys: Sequence[bytes], outs: Sequence[object], part: int, request: int | None
    ) -> Steps[list[int | None]]:
        """Copy payloads into buffers; their lengths, None for a miss.

        Raises:
            InvalidArgument: a buffer is read-only, not contiguous or too small.
        """
        if len(keys) != len(outs):
            raise InvalidArgument(f"{len(keys)} keys but {len(outs)} outs")
        buffers = [buffer_of(out, f"outs[{index}]", writable=True) for index, out in enumerate(outs)]
        records = yield from self.get_data(keys, part, request)
        payloads = [None if record is None else record[1] for record in records]
        for index, (payload, out) in enumerate(zip(payloads, buffers, strict=True)):
            if payload is not None and payload.nbytes > out.nbytes:
                raise InvalidArgument(f"outs[{index}] has {out.nbytes} bytes, its block has {payload.nbytes}")
        lengths: list[int | None] = []
        for payload, out in zip(payloads, buffers, strict=True):
            if payload is not None:
                out[: payload.nbytes] = payload
            lengths.append(None if payload is None else payload.nbytes)
        return lengths

    def _record(self, record: memoryview, key: bytes, part: int) -> tuple[RecordHeader, memoryview] | None:
        """Check a received record; a wrong byte is a miss, never an answer."""
        try:
            header, payload = decode_record(record)
            if header.key != key or header.part != part or header.namespace_digest != self._session.digest:
                raise CorruptRecord("it is the record of another block")
            if self._session.namespace.fidelity == "exact" and header.effective_fidelity < FIDELITY_EXACT:
                raise CorruptRecord(f"a record of fidelity {header.effective_fidelity} in an exact namespace")
        except CorruptRecord as error:
            self.corrupt += 1
            _log.error("key %s part %d: %s; treated as a miss", key.hex(), part, error)
            return None
        return header, payload.toreadonly()

    # -------------------------------------------------------------- the rest

    def match(self, keys: Sequence[bytes], lease: float | None, prefetch: bool) -> Steps[MatchResult]:
        """Count leading blocks, lease them, and have those below DRAM begin to come up."""
        lease_ms = 0
        if lease is not None:
            if not 0 < lease <= MAX_LEASE_MS / 1000:
                raise InvalidArgument(
                    f"lease must be more than 0 and at most {MAX_LEASE_MS // 1000} seconds, got {lease}"
                )
            lease_ms = max(int(lease * 1000), 1)
        joined = join_keys(keys)
        if len(keys) > MAX_KEYS_PER_REQUEST:
            raise InvalidArgument(f"match takes at most {MAX_KEYS_PER_REQUEST} keys, got {len(keys)}")
        access = self.next_access()
        reply = expect((yield Ask(Match, (joined, lease_ms, bool(prefetch)), access)), MatchReply)
        tiers = [_TIER_NAMES[tier] for tier, count in reply.tiers for _ in range(count)]
        lease_s = lease_ms / 1000 if reply.lease else 0.0
        return MatchResult(reply.hits, tiers, access, reply.lease, lease_s, reply.fidelity)

    def exists(self, keys: Sequence[bytes]) -> Steps[list[bool]]:
        """Whether each block is complete."""
        present: list[bool] = []
        for some in _batches(keys):
            present += map(bool, expect((yield Ask(Exists, (some,))), ExistsReply).tiers)
        return present

    def fidelities(self, keys: Sequence[bytes]) -> Steps[list[int]]:
        """The lowest effective fidelity of each block's records; -1 where it is not complete, or not known to be."""
        found: list[int] = []
        for some in _batches(keys):
            reply = expect((yield Ask(Exists, (some,))), ExistsReply)
            # A daemon that does not say it leaves it out.
            known = reply.fidelities or bytes(len(reply.tiers))
            found += [level if tier else -1 for tier, level in zip(reply.tiers, known, strict=True)]
        return found

    def remove(self, keys: Sequence[bytes]) -> Steps[int]:
        """Remove blocks; how many were there."""
        removed = 0
        for some in _batches(keys):
            removed += expect((yield Ask(Remove, (some,))), CountReply).count
        return removed

    def prefetch(self, keys: Sequence[bytes], tier: str, wait: bool) -> Steps[int]:
        """Ask to have blocks in a tier; how many are there or on their way, or with ``wait`` in the end are there."""
        if tier not in get_args(TierName):
            raise InvalidArgument(f"unknown tier {tier!r}; there are: {', '.join(get_args(TierName))}")
        count = 0
        for some in _batches(keys):
            ask = Ask(Prefetch, (some, TierId[tier.upper()], bool(wait)), waits=bool(wait))
            count += expect((yield ask), CountReply).count
        return count

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
                for some in _batches([keys[index] for index in todo]):
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

    def hint(self, keys: Sequence[bytes], soon: bool) -> Steps[int]:
        """Say that a session comes back soon, or is over; how many of its blocks the daemon knows."""
        known = 0
        for some in _batches(keys):
            known += expect((yield Ask(Hint, (some, bool(soon)))), CountReply).count
        return known

    def clear(self) -> Steps[int]:
        """Remove all blocks of the namespace; how many there were."""
        return expect((yield Ask(Clear)), CountReply).count

    def release(self, lease: int) -> Steps[bool]:
        """Give a lease back; whether it still held."""
        return bool(expect((yield Ask(Release, (lease,))), CountReply).count)

    def invalidate(self) -> Steps[None]:
        """Move on to the next generation, or join it where another client already moved on."""
        session = self._session
        while True:
            if session.namespace_id or not session.number:
                told = yield Ask(Invalidate, (session.generation,))
                if session.namespace_id:
                    session.joined(expect(told, Attached))
                    return
            # Stale since the greeting, perhaps one that this request itself brought about: joining is enough, unless
            # that brings about another one, by a daemon that does not know of the later generation.
            greeted = session.number
            attached = expect((yield session.attach(session.locked, -1)), Attached)
            if session.number == greeted:
                session.joined(attached)
                return

    def stats(self) -> Steps[DaemonStats]:
        """The daemon's statistics."""
        return expect((yield Ask(Stats)), StatsReply).stats

    def verify(self) -> Steps[VerifyReply]:
        """Have the daemon check its invariants and every record."""
        return expect((yield Ask(Verify)), VerifyReply)

    def ping(self) -> Steps[None]:
        """A round trip."""
        expect((yield Ask(Ping)), Done)


def list_of(items: Sequence[Any]) -> list[Any]:
    """A list, as compiled functions take it, without a copy where it is one.

    Raises:
        InvalidArgument: it is no sequence of several things, but one key.
    """
    if type(items) is list:
        return items
    if isinstance(items, (bytes, bytearray, memoryview, str)) or not isinstance(items, Iterable):
        raise InvalidArgument(f"keys must be a sequence of 32-byte keys, got one {type(items).__name__}")
    return list(items)


def check_read(part: object, request: object) -> None:
    """``check_part`` and ``check_request``, the usual case first."""
    if request is None and type(part) is int and 0 <= part < 1 << 16:
        return
    check_part(part)
    check_request(request)


def check_request(request: object) -> None:
    """Refuse what is no ``Match.request``.

    Raises:
        InvalidArgument: not None and not a whole number below 2**63.
    """
    if request is not None and (type(request) is not int or not 0 <= request < 1 << 63):
        raise InvalidArgument(f"request must be the .request of a match, got {request!r}")


def check_durable(durable: object, wait: object) -> None:
    """Refuse a put that is to be durable and does not wait.

    Raises:
        InvalidArgument: it is one.
    """
    if durable and not wait:
        raise InvalidArgument("durable=True waits until the blocks are durable; it does not go with wait=False")


def check_part(part: object) -> None:
    """Refuse a part that no record can have.

    Raises:
        InvalidArgument: not an integer in 0 to 65535.
    """
    if not isinstance(part, int) or isinstance(part, bool) or not 0 <= part < 1 << 16:
        raise InvalidArgument(f"part must be a whole number from 0 to 65535, got {part!r}")


def _batches(keys: Sequence[bytes]) -> list[bytes]:
    joined = join_keys(keys)
    step = 32 * MAX_KEYS_PER_REQUEST
    return [joined[at : at + step] for at in range(0, len(joined), step)]


def _reason_name(reason: int) -> str:
    try:
        return Reason(reason).name.lower()
    except ValueError:
        return f"reason {reason}"
