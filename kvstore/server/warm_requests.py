"""Requests about warming up: lists of chains, and chains that are to come up."""

from __future__ import annotations

from collections.abc import Callable

from kvstore.core.store import Store
from kvstore.errors import ErrorCode, InvalidArgument
from kvstore.format.warm_list import FEWEST_DIGEST_BYTES
from kvstore.protocol.messages import Chains, ChainsReply, Reply, TierId, Warm, Warmed
from kvstore.protocol.namespace import DIGEST_BYTES
from kvstore.server.chains import list_chains
from kvstore.server.lower_requests import LowerRequests
from kvstore.server.refusal import Refused, keys_of
from kvstore.server.sessions import Session
from kvstore.server.warming import WarmOutcome, namespace_of_digest, warm

__all__ = ["WarmRequests"]


class WarmRequests:
    """Answers them, later.

    Args:
        store: the state.
        lower: requests that wait.
        incarnation: of the daemon.
        send: sends a reply with payload frames to a connection.
    """

    def __init__(
        self,
        store: Store,
        lower: LowerRequests,
        incarnation: int,
        send: Callable[[bytes, Reply, list[memoryview]], None],
    ) -> None:
        self._store = store
        self._lower = lower
        self._incarnation = incarnation
        self._send = send

    def warm(self, session: Session, request: Warm) -> Reply | None:
        """Have a chain come up; answered when that is over."""
        keys = keys_of(request.keys)
        if request.digest:
            if not FEWEST_DIGEST_BYTES <= len(request.digest) <= DIGEST_BYTES:
                raise Refused(ErrorCode.BAD_REQUEST, f"a digest has {FEWEST_DIGEST_BYTES} to {DIGEST_BYTES} bytes")
            try:
                namespace = namespace_of_digest(self._store, request.digest)
            except InvalidArgument as error:
                raise Refused(ErrorCode.BAD_REQUEST, str(error)) from None
        else:
            namespace = self._store.namespaces.by_id.get(request.namespace_id)
        below = self._lower.below
        outcome = WarmOutcome()
        if below is None:
            there = [namespace is not None and key in namespace.blocks for key in keys]
            return Warmed(request.id, self._incarnation, 0, 0, sum(there), len(keys) - sum(there), 0, 0)

        async def work() -> None:
            deadline_ns = below.deadline_ns(request.timeout_ms)
            outcome.add(
                await warm(
                    below,
                    namespace,
                    keys,
                    deadline_ns,
                    session.id,
                    evict=request.evict,
                    budget_bytes=request.budget_bytes,
                )
            )

        def answer() -> None:
            told = (
                outcome.brought,
                outcome.brought_bytes,
                outcome.there,
                outcome.unknown,
                outcome.no_room,
                outcome.failed,
            )
            self._send(session.identity, Warmed(request.id, self._incarnation, *told), [])

        self._lower.later(session, work(), answer)
        return None

    def chains(self, session: Session, request: Chains) -> Reply | None:
        """List what a tier holds; answered when that is done."""
        if request.tier not in (TierId.DRAM, TierId.SSD):
            raise Refused(ErrorCode.BAD_REQUEST, f"this daemon has no {request.tier.name.lower()} tier to list")

        async def work() -> None:
            found = await list_chains(self._store, request.tier, request.budget_bytes)
            states = [self._store.namespaces.by_id.get(identity) for identity in found.namespaces]
            # One that ended meanwhile has a digest that nobody has.
            digests = tuple(bytes(32) if state is None else state.digest for state in states)
            names = tuple("" if state is None else state.description.name for state in states)
            reply = ChainsReply(request.id, self._incarnation, digests, names, found.slot_bytes)
            payloads = [memoryview(b"".join(found.keys)), *(memoryview(numbers) for numbers in found.arrays())]
            if self._lower.is_there(session):
                self._send(session.identity, reply, payloads)

        self._lower.later(session, work(), lambda: None)
        return None
