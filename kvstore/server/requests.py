"""One request in, one reply out: decoding, the session's right to ask, and what each request does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, cast

import zmq

import kvstore
from kvstore.core.block import Block
from kvstore.core.events import (
    Accessed,
    ClearWanted,
    InvalidateWanted,
    Joined,
    RemoveWanted,
    SessionClosed,
    SessionOpened,
)
from kvstore.core.instructions import Count, Namespaced
from kvstore.core.ssd_record import SsdBlock
from kvstore.errors import ErrorCode, InvalidArgument
from kvstore.format.constants import RECORD_HEADER_BYTES
from kvstore.observability.logs import Log, RepeatedLog
from kvstore.policy.prefetch import Urgency
from kvstore.protocol.framing import decode_request, encode, request_id
from kvstore.protocol.messages import (
    AnyRequest,
    Attach,
    Attached,
    Bye,
    Chains,
    Clear,
    Configure,
    CountReply,
    Done,
    ErrorReply,
    Exists,
    ExistsReply,
    Flush,
    Get,
    GetReply,
    GetStatus,
    Hello,
    Hint,
    Invalidate,
    Match,
    MatchReply,
    Persist,
    Ping,
    Prefetch,
    Put,
    Reason,
    Record,
    Release,
    Remove,
    Reply,
    ReportPrefill,
    Reserve,
    Retain,
    Stats,
    StatsReply,
    TierId,
    Verify,
    Warm,
    Welcome,
    Why,
)
from kvstore.protocol.version import (
    PROTOCOL_OLDEST,
    PROTOCOL_VERSION,
    TIERS_SINCE,
    negotiate,
)
from kvstore.server.below import Below, deepest_of, tiers_of
from kvstore.server.counters import RequestCounters
from kvstore.server.executor import Executor
from kvstore.server.gets import Reads
from kvstore.server.lane_requests import LaneRequests
from kvstore.server.lower_requests import LowerRequests
from kvstore.server.mapping import Mapping
from kvstore.server.outbound import Outbound
from kvstore.server.overload import Overload
from kvstore.server.policy_requests import PolicyRequests
from kvstore.server.puts import Puts, refused
from kvstore.server.record_requests import RecordRequests
from kvstore.server.recorder import Recorder
from kvstore.server.refusal import Refused, check_ahead, keys_of
from kvstore.server.retention_requests import RetentionRequests
from kvstore.server.sessions import Session, Sessions, TooManySessions
from kvstore.server.statistics import Statistics
from kvstore.server.transport import RouterTransport
from kvstore.server.verify_requests import VerifyRequests
from kvstore.server.warm_requests import WarmRequests
from kvstore.server.why_requests import WhyRequests

_NOT_ITS_FAULT: Final = frozenset({ErrorCode.THROTTLED, ErrorCode.SHUTTING_DOWN, ErrorCode.LIMIT})
"""What a request may be answered that was a right one."""


class Requests:
    """Serves requests as they come out of the transport. Memory answers come from inside the drain.

    Args:
        parts: the daemon's other rooms, as named.
        boot_id: of this kernel, to know clients whose clock is ours.
        hint_ns: how long blocks are retained of which a hint says that they are needed soon.
        clock: nanoseconds, monotonic.
    """

    def __init__(
        self,
        *,
        executor: Executor,
        sessions: Sessions,
        outbound: Outbound,
        overload: Overload,
        reads: Reads,
        puts: Puts,
        counters: RequestCounters,
        incarnation: int,
        boot_id: str,
        max_lease_s: float,
        pid: int,
        mapping: Mapping,
        below: Below | None,
        recorder: Recorder,
        hint_ns: int,
        clock: Callable[[], int],
        log: Log,
    ) -> None:
        self._executor = executor
        self._store = executor.store
        self._sessions = sessions
        self._outbound = outbound
        self._overload = overload
        self._reads = reads
        self._puts = puts
        self._counters = counters
        self._incarnation = incarnation
        self._boot_id = boot_id
        self._max_lease_s = max_lease_s
        self._pid = pid
        self._mapping = mapping
        self._below = below
        self._clock = clock
        self._log = RepeatedLog(log)
        self._lower = LowerRequests(executor, sessions, below, mapping.drain_all, incarnation, self._send, self._log)
        self._retentions = RetentionRequests(executor, below, incarnation, hint_ns)
        warming = WarmRequests(self._store, self._lower, incarnation, self._send_payloads)
        tier = None if below is None else below.tier
        self._verifying = VerifyRequests(executor, tier, incarnation, self._send, self._log)
        self.transport: RouterTransport | None = None
        self.statistics: Statistics | None = None
        self.stopping = False
        # Handlers that answer by themselves return None.
        self._handlers: dict[type, Callable[[Session, Any], Reply | None]] = {
            Match: self._match,
            Get: self._get,
            Verify: self._verifying.verify,
            Bye: self._bye,
            Attach: self._attach,
            Exists: self._exists,
            Remove: self._remove,
            Clear: self._clear,
            Flush: self._done,
            Ping: self._done,
            Invalidate: self._invalidate,
            Prefetch: self._lower.prefetch,
            Persist: self._lower.persist,
            Hint: self._retentions.hint,
            Retain: self._retentions.retain,
            Release: self._retentions.release,
            Reserve: LaneRequests(self._store, mapping, incarnation).reserve,
            Stats: self._stats,
            ReportPrefill: self._lower.report_prefill,
            Warm: warming.warm,
            Chains: warming.chains,
            Configure: PolicyRequests(
                executor, 0 if below is None else below.tier.settings.capacity_bytes or 0, clock, incarnation, log
            ).configure,
            Record: RecordRequests(recorder, mapping.drain_all, self._lower.later, self._send, incarnation, log).record,
            Why: WhyRequests(executor, incarnation, clock, self._send, self._lower.later, below).why,
        }

    # -------------------------------------------------------------- dispatch

    def on_message(self, identity: bytes, header: bytes, payloads: list[zmq.Frame]) -> None:
        """Serve one message. Never raises: whatever a peer sends, the daemon goes on."""
        self._counters.requests += 1
        try:
            request = decode_request(header)
        except InvalidArgument as error:
            self._counters.bad_requests += 1
            number = request_id(header)
            if number is not None:
                self._send(identity, ErrorReply(number, self._incarnation, ErrorCode.BAD_REQUEST, str(error)))
            return
        try:
            self._serve(identity, request, payloads)
        except Refused as error:
            if error.code not in _NOT_ITS_FAULT:
                self._counters.bad_requests += 1
            self._send(identity, ErrorReply(request.id, self._incarnation, error.code, str(error)))
        except Exception as error:
            # A defect of ours must not end the service of other clients; it is loud in the log.
            self._log.log_every(
                1,
                type(error).__name__,
                "error",
                "request_failed",
                request=type(request).__name__,
                error=repr(error),
                exc_info=error,
            )
            message = f"the daemon failed on this request: {error!r}; see its log"
            self._send(identity, ErrorReply(request.id, self._incarnation, ErrorCode.INTERNAL, message))

    def _serve(self, identity: bytes, request: AnyRequest, payloads: list[zmq.Frame]) -> None:
        if self.stopping:
            raise Refused(ErrorCode.SHUTTING_DOWN, "the daemon is stopping")
        kind = type(request)
        if kind is Hello:
            self._hello(identity, cast("Hello", request))
            return
        session = self._sessions.of(identity, request.session)
        if session is None:
            raise Refused(ErrorCode.UNKNOWN_SESSION, "no session of this connection has that number; greet again")
        session.last_ns = self._clock()
        session.requests += 1
        # What the client did before it asked comes first: its remove does not overtake its put.
        self._mapping.before_request(session)
        self._require(session)
        if request.namespace_id and request.namespace_id not in session.namespaces:
            raise Refused(
                ErrorCode.UNKNOWN_NAMESPACE, f"namespace id {request.namespace_id} was not given to this session"
            )
        if kind is Put:
            reply: Reply | None = self._put(session, cast("Put", request), payloads)
        elif payloads:
            raise Refused(ErrorCode.BAD_REQUEST, f"{len(payloads)} payload frames do not belong to this request")
        else:
            reply = self._handlers[kind](session, request)
        if reply is not None:
            self._send(identity, reply)

    def _send(self, identity: bytes, reply: Reply) -> None:
        assert self.transport is not None
        self.transport.send(identity, encode(reply))

    def _send_payloads(self, identity: bytes, reply: Reply, payloads: list[memoryview]) -> None:
        assert self.transport is not None
        self.transport.send(identity, encode(reply), payloads)

    # -------------------------------------------------------------- sessions

    def _hello(self, identity: bytes, request: Hello) -> None:
        version = negotiate(request.protocol_oldest, request.protocol_newest)
        if version is None:
            raise Refused(
                ErrorCode.PROTOCOL_MISMATCH,
                f"the daemon (kvstored {kvstore.__version__}) speaks protocol {PROTOCOL_OLDEST} to {PROTOCOL_VERSION}, "
                f"the client (kvstored {request.client_version or 'unknown'}) {request.protocol_oldest} to "
                f"{request.protocol_newest}; install the same version on both sides",
            )
        before = self._sessions.of_connection(identity)
        if before is not None:
            self.close_session(before)
        # Sessions that ended count until their clients let go of their memory.
        self._mapping.look_at_retired()
        same_host = bool(request.boot_id) and request.boot_id == self._boot_id
        unmapped = self._mapping.refuses(request, same_host)
        try:
            session = self._sessions.open(
                identity,
                request.pid,
                request.client_version[:64],
                version,
                same_host,
                self._clock(),
                mapped=not unmapped,
            )
        except TooManySessions as error:
            raise Refused(ErrorCode.LIMIT, str(error)) from None
        self._executor.apply(SessionOpened(session.id))
        files = self._mapping.add(session, unmapped)
        self._send(
            identity,
            Welcome(
                request.id,
                self._incarnation,
                version,
                session.id,
                kvstore.__version__,
                self._store.max_record_bytes,
                str(session.file.path) if session.file is not None else "",
                same_host,
                self._pid,
                files.arena,
                files.index,
                files.doorbell,
                files.unmapped,
                0 if self._below is None else 1 << TierId.SSD,
            ),
        )

    def _require(self, session: Session) -> None:
        """Refuse a request of a session that ended because of what stood in its client's ring."""
        if self._sessions.of(session.identity, session.id) is None:
            raise Refused(
                ErrorCode.UNKNOWN_SESSION, "what this client wrote into its ring ended its session; greet again"
            )

    def close_session(self, session: Session) -> None:
        """End a session: what the client held is free again, and what it wanted is wanted no more."""
        if self._below is not None:
            self._below.client_gone(session.id)
        self._sessions.close(session)
        if not self._mapping.retire(session):
            self._executor.apply(SessionClosed(session.id))
            if session.file is not None:
                session.file.close()

    def _attach(self, session: Session, request: Attach) -> Reply:
        sizes = request.payload_bytes
        if not all(sizes):
            raise Refused(ErrorCode.BAD_REQUEST, "payload_bytes takes sizes above 0")
        session.locked = request.locked and session.file is not None and session.file.locked()
        # A lock that is not there any more may be a client's that died on its way to here.
        session.greeted = session.locked or not request.locked
        # A size that can never be stored is refused when it is put, by its own reason.
        fitting = tuple(
            RECORD_HEADER_BYTES + size for size in sizes if RECORD_HEADER_BYTES + size <= self._store.max_record_bytes
        )
        try:
            answer = self._executor.apply(Joined(request.namespace, fitting, request.generation, session.id))
        except InvalidArgument as error:
            raise Refused(ErrorCode.LIMIT, str(error)) from None
        return self._attached(session, request.id, answer)

    def _attached(self, session: Session, number: int, answer: object) -> Attached:
        assert isinstance(answer, Namespaced)
        state = answer.namespace
        identity = 0 if answer.stale else state.id
        session.namespaces.add(identity)
        return Attached(number, self._incarnation, identity, state.generation, state.digest)

    # -------------------------------------------------------------- reading and writing

    def _match(self, session: Session, request: Match) -> None:
        keys = keys_of(request.keys)
        if not 0 <= request.lease_ms <= self._max_lease_s * 1000:
            raise Refused(
                ErrorCode.BAD_REQUEST,
                f"a lease lasts at most {self._max_lease_s:g} s (limits.max_lease_s), "
                f"{request.lease_ms / 1000:g} s were asked for",
            )
        check_ahead(request.prefetch_ms)
        below = self._below_for(session)
        blocks: Sequence[Block | SsdBlock]
        refused = 0
        if below is None:
            blocks = self._store.leading(request.namespace_id, keys)
        else:
            found = self._store.leading_in_tiers(request.namespace_id, keys)
            blocks = below.worth_loading(request.namespace_id, found)
            refused = len(found) - len(blocks)
        lease, worth = 0, blocks
        if request.lease_ms and blocks:
            lease, count = self._retentions.lease(session, blocks, request.lease_ms)
            # Where not all may be held, it is for the first ones: what is answered is what stays.
            blocks = blocks[:count]
        hits = len(blocks)
        tiers = ((int(TierId.DRAM), hits),) if below is None and hits else tiers_of(blocks)
        fidelity = self._store.fidelity_of(blocks)
        self._send(session.identity, MatchReply(request.id, self._incarnation, hits, tiers, lease, fidelity, refused))
        # The client waits for the answer, not for the policy's bookkeeping.
        # A match asks for a chain: its deepest hit was used, and with it all above, as mapped clients report it.
        report = Accessed(
            session.id,
            request.access,
            deepest_of(worth),
            len(keys),
            tuple(keys[len(worth) :]),
            request.namespace_id,
            matched=True,
            refused=refused,
        )
        self._executor.apply(report)
        counters = self._counters
        counters.matches += 1
        counters.match_keys += len(keys)
        # All that was there, also what a lease could not hold: it is no miss.
        counters.match_hits += len(worth)
        if below is not None and request.prefetch and hits:
            namespace = self._store.namespaces.by_id[request.namespace_id]
            lower = [block for block in blocks if isinstance(block, SsdBlock)]
            below.prefetch(namespace, lower, Urgency.ARRIVED, request.prefetch_ms, session.id)

    def _put(self, session: Session, request: Put, payloads: list[zmq.Frame]) -> Reply:
        if request.count < 1 or len(payloads) != 2 * request.count:
            raise Refused(
                ErrorCode.BAD_REQUEST, f"a put of {request.count} records does not have {len(payloads)} payload frames"
            )
        # What is evicted for it depends on what clients read before.
        self._mapping.drain_all()
        self._require(session)
        if self._overload.refuses(request, session.last_ns, session.same_host):
            self._counters.throttled += request.count
            self._counters.reasons[Reason.OVERLOADED.name.lower()] += request.count
            self._puts.tell_overloaded(request, payloads)
            return refused(request, self._incarnation)
        return self._puts.put(session, request, payloads, self._incarnation)

    def _get(self, session: Session, request: Get) -> None:
        count = len(keys_of(request.keys))
        if self._overload.refuses(request, session.last_ns, session.same_host):
            self._counters.get_throttled += count
            statuses = bytes([GetStatus.THROTTLED]) * count
            self._send(session.identity, GetReply(request.id, self._incarnation, statuses))
            return
        if not 0 <= request.part < 1 << 16:
            raise Refused(ErrorCode.BAD_REQUEST, f"part {request.part} is not in 0 to 65535")
        below = self._below_for(session)
        if below is not None:
            namespace = self._store.namespaces.by_id.get(request.namespace_id)
            lacking = below.lacking(namespace, keys_of(request.keys), request.part)
            if lacking and namespace is not None:
                promoted = below.promote(namespace, lacking, below.deadline_ns(request.timeout_ms), session.id)
                self._lower.later(session, promoted, lambda: self._answer_get(session, request))
                return
        self._answer_get(session, request)

    def _below_for(self, session: Session) -> Below | None:
        """The tiers below DRAM, as far as a client knows of such."""
        return self._below if session.protocol >= TIERS_SINCE else None

    def _answer_get(self, session: Session, request: Get) -> None:
        assert self.transport is not None
        reply, payloads, slots, payload_bytes, report = self._reads.get(session, request, self._incarnation)
        tracker = self.transport.send(session.identity, encode(reply), payloads)
        if tracker is not None:
            self._outbound.add(tracker, session.id, slots, payload_bytes)
        else:
            self._executor.unpin(slots)
        self._executor.apply(report)

    def _exists(self, session: Session, request: Exists) -> Reply:
        below = self._below_for(session) is not None
        tiers, fidelities = self._reads.exists(request.namespace_id, keys_of(request.keys), below=below)
        return ExistsReply(request.id, self._incarnation, tiers, fidelities)

    def _remove(self, session: Session, request: Remove) -> Reply | None:
        reply = self._count(request.id, RemoveWanted(request.namespace_id, keys_of(request.keys)))
        return self._lower.once_said(session, request, reply)

    def _clear(self, session: Session, request: Clear) -> Reply | None:
        return self._lower.once_said(session, request, self._count(request.id, ClearWanted(request.namespace_id)))

    def _count(self, number: int, event: RemoveWanted | ClearWanted) -> Reply:
        answer = self._executor.apply(event)
        assert isinstance(answer, Count)
        return CountReply(number, self._incarnation, answer.count)

    def _invalidate(self, session: Session, request: Invalidate) -> Reply | None:
        state = self._store.namespaces.by_id.get(request.namespace_id)
        if state is None:
            raise Refused(ErrorCode.UNKNOWN_NAMESPACE, "no namespace was joined")
        if request.generation != state.generation:
            raise Refused(
                ErrorCode.BAD_REQUEST,
                f"namespace id {state.id} is generation {state.generation}, not {request.generation}",
            )
        try:
            answer = self._executor.apply(InvalidateWanted(request.namespace_id, session.id))
        except InvalidArgument as error:
            raise Refused(ErrorCode.LIMIT, str(error)) from None
        return self._lower.once_said(session, request, self._attached(session, request.id, answer))

    def _done(self, session: Session, request: Flush | Ping) -> Reply:
        # Requests of a connection are served in order, so earlier puts are published or refused by now.
        return Done(request.id, self._incarnation)

    def _stats(self, session: Session, request: Stats) -> Reply:
        assert self.statistics is not None
        return StatsReply(request.id, self._incarnation, self.statistics.snapshot(self._clock()))

    # -------------------------------------------------------------- work that waits

    def _bye(self, session: Session, request: Bye) -> None:
        self.close_session(session)

    async def stop(self) -> None:
        """Refuse new requests and answer those that wait."""
        self.stopping = True
        self._verifying.cancel()
        await self._lower.stop()
        await self._verifying.stop()
