"""Every operation of the SDK, once, as a generator that the sync and the async client drive.

Those that store are in ``kvstore_client.puts``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final, get_args

from kvstore.errors import CorruptRecord, DeadlineExceeded, InvalidArgument, Throttled
from kvstore.format.constants import FIDELITY_EXACT, CodecId
from kvstore.format.record import RecordHeader, decode_record
from kvstore.mapped.context import BUSY, CORRUPT, MISS, STALE
from kvstore.protocol.keys import join_keys
from kvstore.protocol.messages import (
    Attached,
    Clear,
    Configure,
    Configured,
    CountReply,
    Done,
    Exists,
    ExistsReply,
    Get,
    GetReply,
    GetStatus,
    Hint,
    Invalidate,
    Match,
    MatchReply,
    Ping,
    Prefetch,
    Record,
    Recorded,
    Release,
    Remove,
    Retain,
    Retained,
    Stats,
    StatsReply,
    TierId,
    TierName,
    Verify,
    VerifyReply,
    Why,
    WhyReply,
)
from kvstore.protocol.statistics import DaemonStats, RecordStats
from kvstore.protocol.version import MAX_KEYS_PER_REQUEST, MAX_KEYS_PER_RETAIN, MAX_LEASE_MS
from kvstore_client.arguments import (
    batches,
    buffer_of,
    check_part,
    check_request,
    check_retention,
    check_text,
    milliseconds,
)
from kvstore_client.puts import PutOperations
from kvstore_client.results import MatchResult
from kvstore_client.session import Ask, Session, Steps, expect
from kvstore_client.why import Explanation, explanation_of

if TYPE_CHECKING:
    from kvstore_client.mapped_session import MappedSession

_log: Final = logging.getLogger("kvstore_client")

_GET_PAUSES_S: Final = (0.002, 0.004, 0.008, 0.016, 0.032)
"""Pauses before a get is asked again of which the daemon sent nothing; then it is throttled."""

NOT_THERE: Final = frozenset({MISS, STALE, CORRUPT})
"""Results of a mapped read that are a miss, as they would be if they were asked for."""

MISSED: Final = BUSY
"""Result of a mapped read that is not sure to be a miss, because the block may be in a tier below."""

_TIER_NAMES: Final[dict[int, TierName]] = {
    TierId.HBM: "hbm",
    TierId.DRAM: "dram",
    TierId.SSD: "ssd",
    TierId.REMOTE: "remote",
}


class Operations(PutOperations):
    """The operations in one session.

    Attributes:
        corrupt: records received whose checksum or identity was wrong; each was answered as a miss.
    """

    def __init__(self, session: Session) -> None:
        super().__init__(session)
        self.corrupt = 0

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

    def bring_up(self, missed: Sequence[bytes]) -> Steps[int]:
        """Have blocks that are in tiers below come up into mapped memory; how many did not, -1 where time was over.

        Asks for all of them at once. Afterwards what is not in mapped memory is nowhere, or does not come up.
        """
        below = 0
        try:
            for some in batches(missed):
                below += expect((yield Ask(Prefetch, (some, TierId.DRAM, True), waits=True)), CountReply).below
        except DeadlineExceeded:
            return -1
        return below

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
        lengths: list[int | None] = [None] * len(keys)
        rest = list(range(len(keys)))
        while True:
            below = yield from self.bring_up(missed)
            mapped = self._session.mapped
            if mapped is None:
                break
            some = [keys[at] for at in rest]
            results = mapped.get_many_into(some, [outs[at] for at in rest], part, request or 0, True)
            if not isinstance(results, list):
                break
            for at, result in zip(rest, results, strict=True):
                lengths[at] = result if result >= 0 else None
            left = [(at, result) for at, result in zip(rest, results, strict=True) if result < 0]
            missed = [keys[at] for at, result in left if result in NOT_THERE]
            if below <= 0 or len(left) == len(rest):
                # What is not there is nowhere, or does not come up; anything else than a miss is asked for.
                rest = [at for at, result in left if result not in NOT_THERE]
                break
            rest = [at for at, _ in left]
        if rest and below >= 0:
            found = yield from self.get_into([keys[at] for at in rest], [outs[at] for at in rest], part, request)
            for at, length in zip(rest, found, strict=True):
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
            in_time = (yield from self.bring_up([key])) >= 0
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

    def match(self, keys: Sequence[bytes], lease: float | None, prefetch: bool | float) -> Steps[MatchResult]:
        """Count leading blocks, lease them, and have those below DRAM begin to come up."""
        prefetch_ms = 0 if isinstance(prefetch, bool) else milliseconds(prefetch, "prefetch")
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
        wanted = prefetch is True or prefetch_ms > 0
        reply = expect((yield Ask(Match, (joined, lease_ms, wanted, prefetch_ms), access)), MatchReply)
        tiers = [_TIER_NAMES[tier] for tier, count in reply.tiers for _ in range(count)]
        lease_s = lease_ms / 1000 if reply.lease else 0.0
        return MatchResult(reply.hits, tiers, access, reply.lease, lease_s, reply.fidelity, reply.recompute)

    def exists(self, keys: Sequence[bytes]) -> Steps[list[bool]]:
        """Whether each block is complete."""
        present: list[bool] = []
        for some in batches(keys):
            present += map(bool, expect((yield Ask(Exists, (some,))), ExistsReply).tiers)
        return present

    def fidelities(self, keys: Sequence[bytes]) -> Steps[list[int]]:
        """The lowest effective fidelity of each block's records; -1 where it is not complete, or not known to be."""
        found: list[int] = []
        for some in batches(keys):
            reply = expect((yield Ask(Exists, (some,))), ExistsReply)
            # A daemon that does not say it leaves it out.
            known = reply.fidelities or bytes(len(reply.tiers))
            found += [level if tier else -1 for tier, level in zip(reply.tiers, known, strict=True)]
        return found

    def remove(self, keys: Sequence[bytes]) -> Steps[int]:
        """Remove blocks; how many were there."""
        removed = 0
        for some in batches(keys):
            removed += expect((yield Ask(Remove, (some,))), CountReply).count
        return removed

    def prefetch(self, keys: Sequence[bytes], tier: str, wait: bool, within_s: float | None) -> Steps[int]:
        """Ask to have blocks in a tier; how many are there or on their way, or with ``wait`` in the end are there."""
        within_ms = 0 if within_s is None else milliseconds(within_s, "within_s")
        if tier not in get_args(TierName):
            raise InvalidArgument(f"unknown tier {tier!r}; there are: {', '.join(get_args(TierName))}")
        count = 0
        for some in batches(keys):
            ask = Ask(Prefetch, (some, TierId[tier.upper()], bool(wait), within_ms), waits=bool(wait))
            count += expect((yield ask), CountReply).count
        return count

    def hint(self, keys: Sequence[bytes], soon: bool, within_s: float | None) -> Steps[int]:
        """Say that a session comes back soon, or is over; how many of its blocks the daemon knows."""
        within_ms = 0 if within_s is None else milliseconds(within_s, "within_s")
        known = 0
        for some in batches(keys):
            known += expect((yield Ask(Hint, (some, bool(soon), within_ms))), CountReply).count
        return known

    def configure(self, policy: str, ssd_policy: str, admission: str) -> Steps[Configured]:
        """Change what the running daemon does; what it does now."""
        check_text(policy=policy, ssd_policy=ssd_policy, admission=admission)
        return expect((yield Ask(Configure, (policy, ssd_policy, admission))), Configured)

    def record(self, action: str) -> Steps[RecordStats]:
        """Begin or end the recording of lookups; how it goes."""
        check_text(action=action)
        return expect((yield Ask(Record, (action,))), Recorded).recording

    def retain(self, keys: Sequence[bytes], priority: int, ttl_s: float | None, drop: bool) -> Steps[int]:
        """Have blocks leave later than others, or earlier; how many are retained."""
        check_retention(priority, ttl_s, drop)
        ttl_ms = 0 if ttl_s is None else max(round(ttl_s * 1000), 1)
        count = 0
        # The end of a chain first: what is before it may be lowered with it then.
        for some in reversed(batches(keys, MAX_KEYS_PER_RETAIN)):
            reply = expect((yield Ask(Retain, (some, priority, ttl_ms, bool(drop)))), Retained)
            count += reply.count + reply.waiting
        return count

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

    def why(self, keys: Sequence[bytes], chained: bool, prefixes: Sequence[str], namespace: str) -> Steps[Explanation]:
        """The stories of keys, and of those that begin with some digits."""
        if isinstance(prefixes, str):
            raise InvalidArgument(f"prefixes must be a sequence of texts, got one; put it into a list: [{prefixes!r}]")
        check_text(namespace=namespace, **{f"prefixes[{at}]": one for at, one in enumerate(prefixes)})
        ask = Ask(Why, (join_keys(keys), bool(chained), tuple(prefixes), namespace))
        return explanation_of(expect((yield ask), WhyReply), bool(chained))

    def stats(self) -> Steps[DaemonStats]:
        """The daemon's statistics."""
        return expect((yield Ask(Stats)), StatsReply).stats

    def verify(self) -> Steps[VerifyReply]:
        """Have the daemon check its invariants and every record."""
        return expect((yield Ask(Verify)), VerifyReply)

    def ping(self) -> Steps[None]:
        """A round trip."""
        expect((yield Ask(Ping)), Done)
