"""Requests that say which blocks should stay, and which may go."""

from __future__ import annotations

from collections.abc import Sequence

from kvstore.core.block import Block
from kvstore.core.events import Hinted, LeaseReleased, LeaseWanted, RetainWanted
from kvstore.core.instructions import Count, Leased, Refuse
from kvstore.core.instructions import Retained as RetainedBlocks
from kvstore.core.ssd_record import SsdBlock
from kvstore.errors import ErrorCode
from kvstore.protocol.messages import CountReply, Hint, Release, Reply, Retain, Retained
from kvstore.protocol.version import MAX_KEYS_PER_RETAIN, MAX_PRIORITY, MAX_TTL_MS
from kvstore.server.below import Below
from kvstore.server.executor import Executor
from kvstore.server.refusal import Refused, check_ahead, keys_of
from kvstore.server.sessions import Session
from kvstore.sizes import format_size


class RetentionRequests:
    """Answers them, at once.

    Args:
        executor: of the store.
        below: the tiers below DRAM, None where there are none.
        incarnation: of the daemon.
        hint_ns: how long blocks are retained of which a hint says that they are needed soon.
    """

    def __init__(self, executor: Executor, below: Below | None, incarnation: int, hint_ns: int) -> None:
        self._executor = executor
        self._store = executor.store
        self._below = below
        self._incarnation = incarnation
        self._hint_ns = hint_ns

    def lease(self, session: Session, blocks: Sequence[Block | SsdBlock], lease_ms: int) -> tuple[int, int]:
        """Lease the leading blocks of a chain: the lease's id, and how many it holds.

        Raises:
            Refused: not one of them may be leased.
        """
        answer = self._executor.apply(LeaseWanted(session.id, blocks, lease_ms * 1_000_000))
        if isinstance(answer, Refuse):
            raise Refused(ErrorCode.THROTTLED, "this client holds too many leases; release some")
        assert isinstance(answer, Leased)
        if not answer.lease:
            leases = self._store.leases
            raise Refused(
                ErrorCode.THROTTLED,
                f"leases hold {format_size(leases.held_bytes)} of the {format_size(leases.limit_bytes)} of memory that "
                "they may (limits.lease_share), so no block of these can be leased; release some, or match without",
            )
        return answer.lease, answer.count

    def release(self, session: Session, request: Release) -> Reply:
        """Give a lease back."""
        answer = self._executor.apply(LeaseReleased(session.id, request.lease))
        assert isinstance(answer, Count)
        return CountReply(request.id, self._incarnation, answer.count)

    def retain(self, session: Session, request: Retain) -> Reply:
        """Have blocks leave later than others, or earlier, for a time."""
        keys = keys_of(request.keys)
        if len(keys) > MAX_KEYS_PER_RETAIN:
            raise Refused(ErrorCode.BAD_REQUEST, f"a retention takes at most {MAX_KEYS_PER_RETAIN} keys")
        if not 0 <= request.priority <= MAX_PRIORITY:
            raise Refused(
                ErrorCode.BAD_REQUEST, f"a priority is 0 to {MAX_PRIORITY} (50 is normal), got {request.priority}"
            )
        if not 0 <= request.ttl_ms <= MAX_TTL_MS:
            raise Refused(
                ErrorCode.BAD_REQUEST,
                f"a retention lasts at most {MAX_TTL_MS // 1000} s, {request.ttl_ms / 1000:g} s were asked for",
            )
        if request.drop and not request.ttl_ms:
            raise Refused(ErrorCode.BAD_REQUEST, "blocks are dropped at the end of a time: say which")
        ttl_ns = request.ttl_ms * 1_000_000
        answer = self._executor.apply(RetainWanted(request.namespace_id, keys, request.priority, ttl_ns, request.drop))
        assert isinstance(answer, RetainedBlocks)
        return Retained(request.id, self._incarnation, answer.count, answer.waiting)

    def hint(self, session: Session, request: Hint) -> Reply:
        """A session is about to come back, or is over."""
        keys = keys_of(request.keys)
        check_ahead(request.within_ms)
        # What is there stays as long as it is waited for.
        hint_ns = max(self._hint_ns, min(request.within_ms, MAX_TTL_MS) * 1_000_000) if self._hint_ns else 0
        answer = self._executor.apply(Hinted(request.namespace_id, keys, request.soon, hint_ns))
        assert isinstance(answer, Count)
        namespace = self._store.namespaces.by_id.get(request.namespace_id)
        if request.soon and self._below is not None and namespace is not None:
            self._below.hint(namespace, keys, request.within_ms, session.id)
        return CountReply(request.id, self._incarnation, answer.count)
