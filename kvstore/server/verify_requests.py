"""Requests to verify everything that is stored: one verification at a time, for all who wait for it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from kvstore.errors import ErrorCode
from kvstore.observability.logs import RepeatedLog
from kvstore.protocol.messages import AnyReply, ErrorReply, Reply, Verify, VerifyReply
from kvstore.server.executor import Executor
from kvstore.server.sessions import Session
from kvstore.server.ssd import SsdTier
from kvstore.server.verification import Verified, verify


class VerifyRequests:
    """Answers them when the verification has ended.

    Args:
        executor: of the store.
        tier: the SSD tier, None where there is none.
        incarnation: of the daemon.
        send: sends a reply to a connection.
        log: for defects.
    """

    def __init__(
        self,
        executor: Executor,
        tier: SsdTier | None,
        incarnation: int,
        send: Callable[[bytes, Reply], None],
        log: RepeatedLog,
    ) -> None:
        self._executor = executor
        self._tier = tier
        self._incarnation = incarnation
        self._send = send
        self._log = log
        self._verification: asyncio.Task[Verified] | None = None
        self._waiting: set[asyncio.Task[None]] = set()

    def verify(self, session: Session, request: Verify) -> None:
        """Verify, or wait for the verification that runs."""
        if self._verification is None or self._verification.done():
            self._verification = asyncio.ensure_future(verify(self._executor, self._tier))
        waiting = asyncio.ensure_future(self._answer(session.identity, request.id, self._verification))
        self._waiting.add(waiting)
        waiting.add_done_callback(self._waiting.discard)

    async def _answer(self, identity: bytes, number: int, verification: asyncio.Task[Verified]) -> None:
        reply: AnyReply
        try:
            found = await asyncio.shield(verification)
        except asyncio.CancelledError:
            reply = ErrorReply(number, self._incarnation, ErrorCode.SHUTTING_DOWN, "the daemon is stopping")
        except Exception as error:
            self._log.log_every(1, "verify", "error", "verification_failed", error=repr(error), exc_info=error)
            reply = ErrorReply(number, self._incarnation, ErrorCode.INTERNAL, f"the verification failed: {error!r}")
        else:
            reply = VerifyReply(
                number, self._incarnation, found.records, found.record_bytes, found.seconds, found.problems
            )
        self._send(identity, reply)

    def cancel(self) -> None:
        """End the verification that runs; those that wait are told that the daemon stops."""
        if self._verification is not None:
            self._verification.cancel()

    async def stop(self) -> None:
        """Have those that wait be answered."""
        if self._waiting:
            await asyncio.wait(self._waiting, timeout=1.0)
