"""Requests that concern tiers below DRAM, most of which are answered when something has been read or written."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Final

from kvstore.errors import ErrorCode
from kvstore.observability.logs import RepeatedLog
from kvstore.policy.prefetch import Urgency
from kvstore.protocol.messages import (
    AnyReply,
    Clear,
    CountReply,
    Done,
    ErrorReply,
    Invalidate,
    Persist,
    Persisted,
    Prefetch,
    PutStatus,
    Reason,
    Remove,
    Reply,
    ReportPrefill,
    TierId,
)
from kvstore.server.below import Below
from kvstore.server.executor import Executor
from kvstore.server.refusal import Refused, check_ahead, keys_of
from kvstore.server.sessions import Session, Sessions

_MOST_REPORTED: Final = 1 << 40


class LowerRequests:
    """Answers them. A handler gives a reply, or None where it goes out later.

    Args:
        executor: of the store.
        sessions: of all clients: one that is gone gets no answer.
        below: the tiers below DRAM, None where there are none.
        drain_all: carries out what all mapped clients did.
        incarnation: of the daemon.
        send: sends a reply to a connection.
        log: for defects.
    """

    def __init__(
        self,
        executor: Executor,
        sessions: Sessions,
        below: Below | None,
        drain_all: Callable[[], None],
        incarnation: int,
        send: Callable[[bytes, Reply], None],
        log: RepeatedLog,
    ) -> None:
        self._store = executor.store
        self._sessions = sessions
        self.below = below
        self._drain_all = drain_all
        self._incarnation = incarnation
        self._send = send
        self._log = log
        self._waiting: set[asyncio.Task[None]] = set()

    def prefetch(self, session: Session, request: Prefetch) -> Reply | None:
        """Have blocks come up; answered at once, or when that is over."""
        if request.tier is not TierId.DRAM:
            raise Refused(
                ErrorCode.BAD_REQUEST, f"this daemon has no {request.tier.name.lower()} tier to prefetch into"
            )
        keys = keys_of(request.keys)
        check_ahead(request.within_ms)
        namespace = self._store.namespaces.by_id.get(request.namespace_id)
        below = self.below

        def count() -> CountReply:
            blocks = [] if namespace is None else [namespace.blocks.get(key) for key in keys]
            there = sum(block is not None and block.complete for block in blocks)
            left = [] if below is None or not request.wait else below.lacking(namespace, keys)
            return CountReply(request.id, self._incarnation, there, len(left))

        lacking = [] if below is None else below.lacking(namespace, keys)
        if not lacking or namespace is None or below is None:
            return count()
        if request.wait:
            promoted = below.promote(namespace, lacking, below.deadline_ns(request.timeout_ms), session.id)
            self.later(session, promoted, lambda: self._send(session.identity, count()))
            return None
        accepted = below.prefetch(namespace, lacking, Urgency.AHEAD, request.within_ms, session.id)
        coming = sum(block is None or not block.complete for block in map(namespace.blocks.get, keys))
        there = count().count + min(accepted, coming)
        return CountReply(request.id, self._incarnation, min(there, len(keys)))

    def persist(self, session: Session, request: Persist) -> Reply | None:
        """Make blocks durable; answered when they are, or cannot be."""
        keys = keys_of(request.keys)
        below = self.below
        if below is None:
            # Shared memory does not outlive the daemon.
            there = self._there(request.namespace_id, keys)
            reasons = bytes(Reason.NOT_DURABLE if known else Reason.MISSING for known in there)
            return Persisted(request.id, self._incarnation, bytes([PutStatus.REJECTED]) * len(reasons), reasons)
        self._drain_all()

        async def persisted() -> None:
            deadline_ns = below.deadline_ns(request.timeout_ms)
            statuses, reasons = await below.persist(request.namespace_id, keys, deadline_ns)
            self._send(session.identity, Persisted(request.id, self._incarnation, statuses, reasons))

        self.later(session, persisted(), lambda: None)
        return None

    def report_prefill(self, session: Session, request: ReportPrefill) -> Reply:
        """An engine computed so many tokens in so long."""
        if not 1 <= request.tokens <= _MOST_REPORTED or not 1 <= request.micros <= _MOST_REPORTED:
            raise Refused(ErrorCode.BAD_REQUEST, f"tokens and micros of a report are 1 to {_MOST_REPORTED}")
        if not request.namespace_id:
            raise Refused(ErrorCode.UNKNOWN_NAMESPACE, "a prefill rate is that of a namespace's engine; join one")
        if self.below is not None:
            self.below.tier.costs.rates.report(request.namespace_id, request.tokens, request.micros / 1e6)
        return Done(request.id, self._incarnation)

    def _there(self, namespace_id: int, keys: list[bytes]) -> list[bool]:
        """Whether each block is there, with one part at least."""
        namespace = self._store.namespaces.by_id.get(namespace_id)
        return [namespace is not None and key in namespace.blocks for key in keys]

    def once_said(self, session: Session, request: Remove | Clear | Invalidate, reply: Reply) -> Reply | None:
        """A reply that may go out at once, or None: it goes out when what ended cannot come back after a crash."""
        below = self.below
        if below is None or not below.unsaid:
            return reply

        async def said() -> None:
            answer: AnyReply | Reply = reply
            if not await below.said(below.deadline_ns(request.timeout_ms)):
                answer = ErrorReply(
                    request.id,
                    self._incarnation,
                    ErrorCode.THROTTLED,
                    "it is done in memory, but the SSD cannot be written now "
                    f"({below.tier.problem or 'it is behind'}), so blocks may be back after a restart; try again",
                )
            self._send(session.identity, answer)

        self.later(session, said(), lambda: None)
        return None

    def is_there(self, session: Session) -> bool:
        """Whether a client is there still."""
        return self._sessions.of(session.identity, session.id) is session

    def later(self, session: Session, work: Coroutine[Any, Any, None], then: Callable[[], None]) -> None:
        """Answer a request when some work has ended, unless its client is gone by then."""

        async def run() -> None:
            try:
                await work
                if self.is_there(session):
                    then()
            except asyncio.CancelledError:
                pass
            except Exception as error:
                # A defect of ours, and loud; the client finds its deadline.
                self._log.log_every(1, "later", "error", "request_failed", error=repr(error), exc_info=error)

        task = asyncio.get_running_loop().create_task(run())
        self._waiting.add(task)
        task.add_done_callback(self._waiting.discard)

    async def stop(self) -> None:
        """Answer those that wait, as far as that takes no time."""
        if self.below is not None:
            await self.below.stop()
        if self._waiting:
            _, late = await asyncio.wait(self._waiting, timeout=1.0)
            for task in late:
                task.cancel()
