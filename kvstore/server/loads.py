"""Loads: which blocks come up from the SSD next, how many at a time, and who is told.

Gets wait for what they need; prefetches, hints and warm-up lists are loaded ahead of their use. All go through one
queue (``kvstore.policy.prefetch``): a get that wants a block that is being prefetched waits for that load.
"""

from __future__ import annotations

import asyncio
import functools
import heapq
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Final

from kvstore.core.block import Record
from kvstore.core.namespaces import NamespaceState
from kvstore.core.prefetched import Prefetched
from kvstore.core.ssd_record import SsdBlock, SsdRecord
from kvstore.policy.prefetch import Load, LoadQueue, LoadRequest, Outcome, Urgency
from kvstore.protocol.messages import PutStatus, Reason
from kvstore.server.ssd_promotion import Promotions

__all__ = ["Loads"]

_MOST_READS: Final = 64
_MOST_AHEAD: Final = 16
"""Reads for blocks that nobody waits for yet: a get finds no more than that before its own."""

_MOST_PASSED: Final = 64
"""Loads without room that are passed over to find one that has some."""

_PAUSE_S: Final = 0.005
_SESSION_SHARE: Final = 2
"""Of what may wait to be brought up ahead, one client may have this part."""


class Loads:
    """The queue, and what begins loads as there is room.

    Args:
        promotions: reads records.
        prefetched: knows what becomes of blocks that were brought up ahead.
        most_bytes: slots that may wait to be brought up ahead, or be on their way.
        flying_bytes: slots that may be on their way at one time; half of them for what nobody waits for.
        clock: nanoseconds, monotonic.
    """

    def __init__(
        self,
        promotions: Promotions,
        prefetched: Prefetched,
        most_bytes: int,
        flying_bytes: int,
        clock: Callable[[], int],
    ) -> None:
        self._promotions = promotions
        self.prefetched = prefetched
        self.most_bytes = most_bytes
        self._flying_bytes = flying_bytes
        self._clock = clock
        self.queue: LoadQueue[SsdRecord, NamespaceState] = LoadQueue()
        self._requests: dict[int, dict[LoadRequest, None]] = {}
        self._session_bytes: Counter[int] = Counter()
        self._ahead_bytes = 0
        self._later: list[tuple[int, int, int, Callable[..., None]]] = []
        self._laters = 0
        self._timer: asyncio.TimerHandle | None = None
        self._timer_ns = 0
        self._pumping = False
        self._stopped = False
        self.refused: Counter[str] = Counter()
        self.wanted: Counter[str] = Counter()

    # -------------------------------------------------------------- wanting

    async def bring_up(
        self, namespace: NamespaceState, blocks: Sequence[SsdBlock], deadline_ns: int, session: int = 0
    ) -> None:
        """Have blocks come up for somebody who waits; ends when that is done, or cannot be, or time is over."""
        request = LoadRequest(Urgency.WAITED, deadline_ns, session, self._promotions.next_access())
        await self._until_ended(request, namespace, blocks)

    def prefetch(
        self,
        namespace: NamespaceState,
        blocks: Sequence[SsdBlock],
        urgency: Urgency,
        deadline_ns: int,
        session: int = 0,
    ) -> int:
        """Have blocks come up ahead of their use, as many leading ones as there is room for in the queue; how many."""
        some = self._within_bounds(blocks, session)
        if not some:
            return 0
        request = LoadRequest(urgency, deadline_ns, session, self._promotions.next_access())
        self.wanted[urgency.name.lower()] += len(some)
        self._want(request, namespace, some)
        if request.left:
            self._account(request, request.bytes)
        else:
            self._forget(request)
        self.pump()
        return len(some)

    async def warm(
        self,
        namespace: NamespaceState,
        blocks: Sequence[SsdBlock],
        deadline_ns: int,
        session: int,
        *,
        only_free: bool,
    ) -> Counter[Outcome]:
        """Have blocks come up that are likely to be used; what became of their records."""
        request = LoadRequest(
            Urgency.WARMING, deadline_ns, session, self._promotions.next_access(), only_free=only_free
        )
        self.wanted[Urgency.WARMING.name.lower()] += len(blocks)
        await self._until_ended(request, namespace, blocks)
        return request.outcomes

    async def _until_ended(self, request: LoadRequest, namespace: NamespaceState, blocks: Sequence[SsdBlock]) -> None:
        over = asyncio.Event()
        request.ended = over.set
        self._want(request, namespace, blocks)
        try:
            if request.left:
                self.pump()
                async with asyncio.timeout(max((request.deadline_ns - self._clock()) / 1e9, 0.0)):
                    await over.wait()
        except TimeoutError:
            pass
        finally:
            self._forget(request)
            if request.left:
                if request.urgency is Urgency.WAITED:
                    for load in self.queue.wanted_by(request):
                        self._promotions.tell_failed(load.space, load.record)
                self.queue.cancel(request, Outcome.EXPIRED)

    def later(self, at_ns: int, session: int, begin: Callable[..., None]) -> None:
        """Call ``begin(dropped=False)`` at a time, or with True when the client is gone; bounded by the caller."""
        self._laters += 1
        heapq.heappush(self._later, (at_ns, self._laters, session, begin))
        self._wake()

    @property
    def delayed(self) -> int:
        """How much waits for its time to begin."""
        return len(self._later)

    def client_gone(self, session: int) -> None:
        """Drop what only this client wanted."""
        for request in list(self._requests.get(session, ())):
            self.queue.cancel(request, Outcome.CANCELLED)
        dropped = [one for one in self._later if one[2] == session]
        if dropped:
            self._later = [one for one in self._later if one[2] != session]
            heapq.heapify(self._later)
            for *_, begin in dropped:
                begin(dropped=True)

    def queued_bytes(self, urgency: Urgency) -> int:
        """Slots of loads that come before a new one of that urgency."""
        return self.queue.flying_bytes + sum(self.queue.waiting_bytes[: urgency + 1])

    def _want(self, request: LoadRequest, namespace: NamespaceState, blocks: Iterable[SsdBlock]) -> None:
        self._requests.setdefault(request.session, {})[request] = None
        for block in blocks:
            for record in list(block.parts.values()):
                if self._promotions.wants(namespace, record):
                    self.queue.want(request, record, namespace)

    def _within_bounds(self, blocks: Sequence[SsdBlock], session: int) -> Sequence[SsdBlock]:
        """The leading blocks that may wait; the others are counted with the bound that they met."""
        room = self.most_bytes - self._ahead_bytes
        mine = self.most_bytes // _SESSION_SHARE - self._session_bytes[session]
        reason = "client_bytes" if mine < room else "bytes"
        left = min(room, mine)
        for index, block in enumerate(blocks):
            left -= sum(record.home_bytes for record in block.parts.values())
            if left < 0:
                self.refused[reason] += len(blocks) - index
                return blocks[:index]
        return blocks

    def _account(self, request: LoadRequest, size_bytes: int) -> None:
        """Hold a request's bytes against the bounds until it is over."""
        self._ahead_bytes += size_bytes
        self._session_bytes[request.session] += size_bytes

        def ended() -> None:
            self._ahead_bytes -= size_bytes
            self._session_bytes[request.session] -= size_bytes
            if not self._session_bytes[request.session]:
                del self._session_bytes[request.session]
            self._forget(request)

        request.ended = ended

    def _forget(self, request: LoadRequest) -> None:
        requests = self._requests.get(request.session)
        if requests is not None:
            requests.pop(request, None)
            if not requests:
                del self._requests[request.session]

    # -------------------------------------------------------------- beginning

    def pump(self) -> None:
        """Begin as many loads as may be on their way."""
        if self._pumping or self._stopped:
            return
        self._pumping = True
        queue = self.queue
        # Room that one tenant's quota lacks, or slots of one size, keep nobody else waiting.
        lacking: set[tuple[int, int]] = set()
        passed = 0
        try:
            while (load := queue.next(self._clock())) is not None and self._may_fly(load) and passed < _MOST_PASSED:
                kind = load.space.id, load.record.home_bytes
                if kind in lacking or not self._begin(load):
                    queue.set_aside(load)
                    lacking.add(kind)
                    passed += 1
        finally:
            queue.take_up()
            self._pumping = False
        self._wake()

    def _may_fly(self, load: Load[SsdRecord, NamespaceState]) -> bool:
        """Whether one more read may be on its way."""
        queue = self.queue
        if load.urgency is Urgency.WAITED:
            return queue.flying < _MOST_READS
        more_bytes = queue.flying_bytes + load.record.home_bytes
        return queue.flying < _MOST_AHEAD and (not queue.flying or more_bytes <= self._flying_bytes // 2)

    def _begin(self, load: Load[SsdRecord, NamespaceState]) -> bool:
        """Begin a load, or end it; False where there is no room for it now."""
        waited = load.urgency is Urgency.WAITED
        record, namespace = load.record, load.space
        if not self._promotions.wants(namespace, record):
            there = self._promotions.there(namespace, record)
            self.queue.end(load, Outcome.THERE if there else Outcome.LOST)
            return True
        first = load.first
        answer = self._promotions.slot_for(namespace, record, first.access, only_free=first.only_free)
        if isinstance(answer, Record):
            self.queue.begin(load)
            # What is only likely to be used is as old as its copy.
            used = record.namespace.tree.blocks[record.key].used if first.only_free else 0
            ended = functools.partial(self._ended, load)
            self._promotions.read(namespace, record, answer, first.access, ended, used=used, ahead=not waited)
            return True
        full = answer.reason in (Reason.NO_ROOM, Reason.ALL_HELD)
        if answer.status is PutStatus.THROTTLED and not (first.only_free and full):
            return False
        if waited:
            self._promotions.tell_failed(namespace, record)
        else:
            self.refused["no_room"] += 1
        self.queue.end(load, Outcome.NO_ROOM)
        return True

    def _ended(self, load: Load[SsdRecord, NamespaceState], stored: bool) -> None:
        record, namespace = load.record, load.space
        if stored and load.wants and load.urgency is not Urgency.WAITED:
            block = namespace.blocks.get(record.key)
            if block is not None:
                self.prefetched.brought(block)
        self.queue.end(load, Outcome.BROUGHT if stored else Outcome.LOST)
        self.pump()

    def _wake(self) -> None:
        """Look again soon where something waits that no end of a read will begin."""
        if self._stopped:
            return
        now_ns = self._clock()
        at_ns = self._later[0][0] if self._later else 0
        if len(self.queue) > self.queue.flying and self.queue.flying < _MOST_AHEAD:
            soon_ns = now_ns + int(_PAUSE_S * 1e9)
            at_ns = min(at_ns, soon_ns) if at_ns else soon_ns
        if not at_ns or (self._timer is not None and self._timer_ns <= at_ns):
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer_ns = at_ns
        self._timer = asyncio.get_running_loop().call_later(max((at_ns - now_ns) / 1e9, 0.0), self._look)

    def _look(self) -> None:
        self._timer = None
        now_ns = self._clock()
        while self._later and self._later[0][0] <= now_ns:
            heapq.heappop(self._later)[3](dropped=False)
        self.pump()

    def stop(self) -> None:
        """Begin nothing more; who waits is told that it will not come."""
        self._stopped = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._later.clear()
        for session in list(self._requests):
            self.client_gone(session)
