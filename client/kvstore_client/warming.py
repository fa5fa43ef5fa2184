"""What both clients can say about blocks that will be wanted: lists to warm up, and how fast the engine computes."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Final

from kvstore.errors import CorruptRecord, DeadlineExceeded, InvalidArgument
from kvstore.protocol.keys import join_keys, split_keys
from kvstore.protocol.messages import Chains, ChainsReply, Done, ReportPrefill, TierId, TierName, Warm, Warmed
from kvstore.protocol.version import MAX_WAIT_MS
from kvstore_client.operations import Operations
from kvstore_client.results import Chain, WarmResult
from kvstore_client.session import Ask, Steps, expect

WARM_TIMEOUT_S: Final = 600.0

_WARMED_KEYS: Final = 1024
"""Keys of one request to warm up, so that there is something to tell in between."""


class WarmingCalls:
    """Of ``Client``."""

    _run: Callable[..., Any]
    _operations: Operations

    def prefetch(
        self, keys: Sequence[bytes], tier: TierName = "dram", *, wait: bool = False, within_s: float | None = None
    ) -> int:
        """Ask to have blocks in a tier soon; how many are there or on their way.

        Args:
            keys: parents first.
            tier: where.
            wait: return when they came or will not come; how many are there then.
            within_s: without ``wait``, what did not begin to come by then is dropped (None: 30 s), and so it is when
                this client closes.
        """
        known: int = self._run(self._operations.prefetch(keys, tier, wait, within_s))
        return known

    def hint(self, keys: Sequence[bytes], *, soon: bool = True, within_s: float | None = None) -> int:
        """Say that a session which uses these blocks is about to come back, or with ``soon=False`` that it is over.

        What comes back soon is brought up, and retained for a while (``retention.hint_s``, or until it is due). Of a
        session that is over, the end of its chain that nothing else goes on behind leaves first, unless it is used
        again. Nothing is promised. How many of the blocks the daemon knows.

        Args:
            keys: the session's chain.
            soon: whether it comes back.
            within_s: how soon, at the latest. What would leave memory again by then comes up later; what did not begin
                to by then is dropped, and so it is when this client closes.

        Raises:
            ProtocolMismatch: the daemon is too old for hints.
        """
        known: int = self._run(self._operations.hint(keys, soon, within_s))
        return known

    def report_prefill(self, tokens: int, seconds: float) -> None:
        """Say that the engine computed so many tokens of prompts in so many seconds, without what it loaded.

        With it the daemon decides whether blocks below memory are worth loading (``match().recompute``). Some reports
        an hour are enough; the last half minute of computing counts most.

        Raises:
            ProtocolMismatch: the daemon is too old for this.
        """
        self._run(report_prefill_steps(tokens, seconds))

    def warm(
        self,
        chains: Iterable[Sequence[bytes]],
        *,
        evict: bool = False,
        budget_bytes: int = 0,
        timeout: float = WARM_TIMEOUT_S,
        progress: Callable[[WarmResult], None] | None = None,
        digest: bytes = b"",
    ) -> WarmResult:
        """Bring blocks that are on the SSD into memory because they are likely to be used; counts as no use.

        Args:
            chains: in the order of their worth, each with its parents first.
            evict: others may leave for them. Else they take free room only, and are as old as their copies: what is
                used now stays.
            budget_bytes: most bytes of memory to fill; 0: as there is room.
            timeout: seconds for all; what is not there by then is ``not_tried``.
            progress: called with what was done so far.
            digest: of the namespace that they are of, or its first bytes; empty: this client's.

        Raises:
            ProtocolMismatch: the daemon is too old for this.
        """
        result: WarmResult = self._run(warm_steps(chains, digest, evict, budget_bytes, progress), timeout)
        return result

    def chains(self, tier: TierName = "dram", *, budget_bytes: int = 0, timeout: float = WARM_TIMEOUT_S) -> list[Chain]:
        """The chains of all namespaces that a tier holds, those first that were used last; "dram" or "ssd".

        Args:
            tier: which.
            budget_bytes: the first blocks that take so much in memory; 0: all.
            timeout: seconds.

        Raises:
            ProtocolMismatch: the daemon is too old for this.
        """
        result: list[Chain] = self._run(chains_steps(tier, budget_bytes), timeout)
        return result


class AsyncWarmingCalls:
    """Of ``AsyncClient``."""

    _run: Callable[..., Any]
    _operations: Operations

    async def prefetch(
        self, keys: Sequence[bytes], tier: TierName = "dram", *, wait: bool = False, within_s: float | None = None
    ) -> int:
        """See ``Client.prefetch``."""
        known: int = await self._run(self._operations.prefetch(keys, tier, wait, within_s))
        return known

    async def hint(self, keys: Sequence[bytes], *, soon: bool = True, within_s: float | None = None) -> int:
        """See ``Client.hint``."""
        known: int = await self._run(self._operations.hint(keys, soon, within_s))
        return known

    async def report_prefill(self, tokens: int, seconds: float) -> None:
        """See ``Client.report_prefill``."""
        await self._run(report_prefill_steps(tokens, seconds))

    async def warm(
        self,
        chains: Iterable[Sequence[bytes]],
        *,
        evict: bool = False,
        budget_bytes: int = 0,
        timeout: float = WARM_TIMEOUT_S,
        progress: Callable[[WarmResult], None] | None = None,
        digest: bytes = b"",
    ) -> WarmResult:
        """See ``Client.warm``."""
        result: WarmResult = await self._run(warm_steps(chains, digest, evict, budget_bytes, progress), timeout)
        return result

    async def chains(
        self, tier: TierName = "dram", *, budget_bytes: int = 0, timeout: float = WARM_TIMEOUT_S
    ) -> list[Chain]:
        """See ``Client.chains``."""
        result: list[Chain] = await self._run(chains_steps(tier, budget_bytes), timeout)
        return result


def report_prefill_steps(tokens: int, seconds: float) -> Steps[None]:
    """Say how fast the engine computes prompts."""
    if isinstance(tokens, bool) or not isinstance(tokens, int) or not 1 <= tokens <= 1 << 40:
        raise InvalidArgument(f"tokens must be a whole number of at least 1, got {tokens!r}")
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0 < seconds <= MAX_WAIT_MS / 1000:
        raise InvalidArgument(f"seconds must be more than 0 and at most {MAX_WAIT_MS // 1000}, got {seconds!r}")
    expect((yield Ask(ReportPrefill, (tokens, max(round(seconds * 1e6), 1)))), Done)


def warm_steps(
    chains: Iterable[Sequence[bytes]],
    digest: bytes,
    evict: bool,
    budget_bytes: int,
    progress: Callable[[WarmResult], None] | None,
) -> Steps[WarmResult]:
    """Have chains come up, the first ones first, as far as there is room and time."""
    if isinstance(budget_bytes, bool) or not isinstance(budget_bytes, int) or not 0 <= budget_bytes < 1 << 63:
        raise InvalidArgument(f"budget_bytes must be a number of bytes, 0 for all, got {budget_bytes!r}")
    done = WarmResult()
    late = False
    for keys in _warm_batches(chains):
        left_bytes = budget_bytes - done.brought_bytes if budget_bytes else 0
        if late or (budget_bytes and left_bytes <= 0):
            done = replace(done, not_tried=done.not_tried + len(keys))
            continue
        try:
            ask = Ask(Warm, (join_keys(keys), digest, bool(evict), left_bytes), waits=True)
            told = expect((yield ask), Warmed)
        except DeadlineExceeded:
            late = True
            done = replace(done, not_tried=done.not_tried + len(keys))
            continue
        done = WarmResult(
            done.brought + told.brought,
            done.brought_bytes + told.brought_bytes,
            done.there + told.there,
            done.unknown + told.unknown,
            done.no_room + told.no_room,
            done.failed + told.failed,
            done.not_tried,
        )
        if progress is not None:
            progress(done)
    return done


def chains_steps(tier: str, budget_bytes: int) -> Steps[list[Chain]]:
    """What a tier holds, those chains first that were used last."""
    if tier not in ("dram", "ssd"):
        raise InvalidArgument(f"chains are listed of 'dram' or 'ssd', got {tier!r}")
    told = yield Ask(Chains, (TierId[tier.upper()], budget_bytes), waits=True)
    reply = expect(told, ChainsReply)
    if len(told.payloads) != 3:
        raise CorruptRecord(f"a list of chains came with {len(told.payloads)} payload frames, not 3")
    keys = split_keys(bytes(told.payloads[0]))
    lengths, places = (array("I", bytes(frame)) for frame in told.payloads[1:])
    if sys.byteorder == "big":
        lengths.byteswap()
        places.byteswap()
    if sum(lengths) != len(keys) or any(place >= len(reply.digests) for place in places):
        raise CorruptRecord("a list of chains came whose frames do not belong together")
    made: list[Chain] = []
    at = 0
    for length, place in zip(lengths, places, strict=True):
        made.append(Chain(reply.digests[place], reply.names[place], keys[at : at + length]))
        at += length
    return made


def _warm_batches(chains: Iterable[Sequence[bytes]]) -> Iterator[list[bytes]]:
    """Keys for one request each: of several short chains, or of a part of a long one."""
    some: list[bytes] = []
    for chain in chains:
        if isinstance(chain, (bytes, bytearray, memoryview, str)):
            raise InvalidArgument("chains must be sequences of keys, got one key; put it into a list")
        if some and len(some) + len(chain) > _WARMED_KEYS:
            yield some
            some = []
        some += chain
        while len(some) > _WARMED_KEYS:
            yield some[:_WARMED_KEYS]
            some = some[_WARMED_KEYS:]
    if some:
        yield some
