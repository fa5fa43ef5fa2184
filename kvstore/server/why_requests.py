"""Requests for the story of keys."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Coroutine
from typing import Any, Final

from kvstore.core.misses import MOST_EXPLAINED, Misses
from kvstore.core.namespaces import NamespaceState
from kvstore.core.stories import Stories, keys_with
from kvstore.errors import ErrorCode
from kvstore.protocol.messages import AnyReply, ErrorReply, Why, WhyReply
from kvstore.protocol.statistics import NamespaceStats
from kvstore.protocol.stories import NO_SUCH_PREFIX
from kvstore.server.below import Below
from kvstore.server.executor import Executor
from kvstore.server.refusal import Refused, keys_of
from kvstore.server.sessions import Session

_DIGITS: Final = re.compile("[0-9a-f]{8,64}")
_MOST_NAMED: Final = 4
"""Keys or namespaces that an error names."""


class WhyRequests:
    """Answers them. Prefixes are looked for in a thread: there may be millions of keys.

    Args:
        executor: of the store.
        incarnation: of the daemon.
        clock: nanoseconds, monotonic.
        send: sends a reply to a connection.
        later: answers a request when some work has ended.
        below: the tiers below DRAM, None where there are none.
    """

    def __init__(
        self,
        executor: Executor,
        incarnation: int,
        clock: Callable[[], int],
        send: Callable[[bytes, AnyReply], None],
        later: Callable[[Session, Coroutine[Any, Any, None], Callable[[], None]], None],
        below: Below | None,
    ) -> None:
        self._store = executor.store
        self._below = below
        self._incarnation = incarnation
        self._clock = clock
        self._send = send
        self._later = later

    def why(self, session: Session, request: Why) -> WhyReply | None:
        """The story of each key."""
        misses = self._store.explainer
        if not isinstance(misses, Misses):
            raise Refused(ErrorCode.BAD_REQUEST, "this daemon does not explain misses: explain.memory_bytes is 0")
        keys = keys_of(request.keys)
        if len(keys) + len(request.prefixes) > MOST_EXPLAINED:
            raise Refused(ErrorCode.BAD_REQUEST, f"at most {MOST_EXPLAINED} keys are explained at once")
        for prefix in request.prefixes:
            if not _DIGITS.fullmatch(prefix):
                raise Refused(ErrorCode.BAD_REQUEST, f"{prefix!r} is not 8 to 64 hexadecimal digits of a key")
        namespace = self._namespace(request)
        if not request.prefixes:
            return self._reply(request, misses, namespace, keys)

        async def found() -> None:
            reply: AnyReply
            try:
                more = await self._complete(misses, namespace, request.prefixes)
                reply = self._reply(request, misses, namespace, keys + more)
            except Refused as error:
                reply = ErrorReply(request.id, self._incarnation, error.code, str(error))
            self._send(session.identity, reply)

        self._later(session, found(), lambda: None)
        return None

    def _reply(self, request: Why, misses: Misses, namespace: NamespaceState, keys: list[bytes]) -> WhyReply:
        told = Stories(self._store, misses)
        if self._below is not None:
            told = Stories(self._store, misses, self._below.would_load)
        stories = told.tell(namespace, keys, self._clock(), chained=request.chained)
        return WhyReply(
            request.id,
            self._incarnation,
            _label(namespace),
            namespace.digest.hex(),
            namespace.generation,
            namespace.description.block_tokens,
            namespace.parts,
            stories,
        )

    def _namespace(self, request: Why) -> NamespaceState:
        """The namespace that is meant, in its current generation."""
        known = self._store.namespaces
        if not request.namespace:
            own = known.by_id.get(request.namespace_id)
            if own is None:
                raise Refused(ErrorCode.BAD_REQUEST, "this client's generation of its namespace is over: invalidate()")
            return own if own.current else known.current_of(own)
        fitting = [
            state
            for state in known.by_id.values()
            if state.current and state.digest.hex().startswith(request.namespace)
        ]
        if not _DIGITS.fullmatch(request.namespace) or len(fitting) != 1:
            told = ", ".join(f"{_label(state)} ({state.digest.hex()[:8]})" for state in fitting[:_MOST_NAMED])
            raise Refused(
                ErrorCode.BAD_REQUEST,
                f"{request.namespace!r} are not the first digits of one namespace's digest"
                + (f": there are {told}" if told else ""),
            )
        return fitting[0]

    async def _complete(self, misses: Misses, namespace: NamespaceState, prefixes: tuple[str, ...]) -> list[bytes]:
        """The keys that begin so: resident, below, or remembered."""
        misses.settle()
        there = dict.fromkeys(namespace.blocks)
        if namespace.ssd is not None:
            there |= dict.fromkeys(namespace.ssd.tree.blocks)

        def look() -> list[list[bytes]]:
            gone = [key for key in misses.ghosts.all_keys() if key not in there]
            return [[*keys_with(prefix, list(there)), *keys_with(prefix, gone)] for prefix in prefixes]

        keys: list[bytes] = []
        for prefix, found in zip(prefixes, await asyncio.to_thread(look), strict=True):
            # Ghosts of other namespaces are told apart only here.
            fitting = [key for key in found if key in there or misses.ghosts.find(namespace.salt, key) >= 0]
            if not fitting:
                raise Refused(
                    ErrorCode.BAD_REQUEST,
                    f"{NO_SUCH_PREFIX}{_label(namespace)} that is there or remembered begins with {prefix}",
                )
            if len(fitting) > 1:
                named = ", ".join(key.hex()[: len(prefix) + 8] for key in fitting[:_MOST_NAMED])
                raise Refused(
                    ErrorCode.BAD_REQUEST,
                    f"{len(fitting)} keys begin with {prefix}: {named}{', ...' if len(fitting) > _MOST_NAMED else ''}; "
                    "give more digits",
                )
            keys += fitting
        return keys


def _label(namespace: NamespaceState) -> str:
    description = namespace.description
    named = NamespaceStats(
        name=description.name, generation=0, blocks=0, slot_bytes=0, model=description.model, codec=description.codec
    )
    return named.label
