"""Everything of mapped clients that the request path needs: who may map, whose rings to look at, slots lent ahead."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

from kvstore.core.events import LeasesEnded, SessionClosed, SlotWanted
from kvstore.core.instructions import Refuse
from kvstore.mapped.index_file import MAPPED_LAYOUT
from kvstore.observability.logs import RepeatedLog
from kvstore.protocol.messages import Hello
from kvstore.server.counters import RequestCounters
from kvstore.server.doorbell import Attention
from kvstore.server.executor import Executor
from kvstore.server.gets import Reads
from kvstore.server.lanes import Lanes
from kvstore.server.mapped_client import Lane, MappedClient
from kvstore.server.rings import Rings
from kvstore.server.sessions import Session, Sessions
from kvstore.tiers.files import Doorbell

_RETIRED_POLL_S: Final = 0.01
_RETIRED_POLLS: Final = 50
_SWITCHED_OFF: Final = "the daemon's setting dram.mapped is off"


@dataclass(frozen=True, slots=True)
class SharedFiles:
    """Paths of what a client may map and ring, or why it may not."""

    arena: str = ""
    index: str = ""
    doorbell: str = ""
    unmapped: str = ""


class Mapping:
    """Mapped clients of this daemon.

    Args:
        executor: has the arena and the index; without an index nobody maps.
        sessions: of all clients.
        bell: what clients ring; None without an index.
        counters, reads, log: of the request path.
        loop: where rings are drained.
        clock: nanoseconds, monotonic.
        hazard_bytes: what one client may hold with hazards of slots that are gone from the index.
        grace_ns: how long after its death the slots of a client with a device context are left alone.
        end_session: ends the session of a client that breaks the rules.
    """

    def __init__(
        self,
        executor: Executor,
        sessions: Sessions,
        bell: Doorbell | None,
        counters: RequestCounters,
        reads: Reads,
        log: RepeatedLog,
        loop: asyncio.AbstractEventLoop,
        clock: Callable[[], int],
        hazard_bytes: int,
        grace_ns: int,
    ) -> None:
        self._executor = executor
        self._bell = bell
        self._log = log
        self._hazard_bytes = hazard_bytes
        self._grace_ns = grace_ns
        self._clients: dict[int, MappedClient] = {}
        self._lanes = Lanes(executor, self._all)
        self._retired: list[MappedClient] = []
        self._looking: asyncio.TimerHandle | None = None
        self._looks = 0
        self._clock = clock
        self._loop = loop
        self._sessions = sessions
        self._rings: Rings | None = None
        self._attention: Attention | None = None
        self.end_session: Callable[[Session], None] = lambda session: None
        if bell is not None:
            self._rings = Rings(executor, counters, log, reads.check, self._lanes.replenish)
            self._attention = Attention(bell, self._rings, self._lanes, loop, clock, log, self._end)

    def __len__(self) -> int:
        return len(self._clients)

    def _all(self) -> Iterable[MappedClient]:
        return list(self._clients.values())

    def _end(self, client: MappedClient) -> None:
        if client.session.id in self._clients:
            self.end_session(client.session)

    # -------------------------------------------------------------- who maps

    def refuses(self, hello: Hello, same_host: bool) -> str:
        """Why a client that greets may not map, "" where it may. One that does not want to gets no reason."""
        if not hello.mapped_layout:
            return "it was not asked for"
        if self._bell is None:
            return _SWITCHED_OFF
        if not same_host:
            return "the client is on another host"
        if hello.mapped_layout != MAPPED_LAYOUT:
            return (
                f"the daemon's mapped layout is {MAPPED_LAYOUT}, the client's {hello.mapped_layout}; install the same "
                "version on both sides"
            )
        return ""

    def add(self, session: Session, unmapped: str) -> SharedFiles:
        """Begin to serve a new session's ring, if it has one."""
        if unmapped or self._bell is None or self._executor.index is None:
            return SharedFiles(unmapped=unmapped)
        client = MappedClient.of(session)
        if client is None:
            return SharedFiles(unmapped="the memory file system has no room for the client's file")
        self._clients[session.id] = client
        self._changed()
        return SharedFiles(str(self._executor.arena.path), str(self._executor.index.path), str(self._bell.path))

    def retire(self, session: Session) -> bool:
        """Hear a session no more, and close it once its client can neither write nor read the arena; False: not mapped.

        What the client committed before counts, what it was lent and did not take goes back. What it took it may be
        writing at this moment, and what its hazards name it may be reading, in another thread or in a view, until it
        gives up the lock on its file.
        """
        client = self._clients.pop(session.id, None)
        if client is None:
            return False
        if not client.broken and self._rings is not None:
            self._rings.drain(client)
        client.end()
        self._lanes.take_back(client)
        self._executor.apply(LeasesEnded(session.id))
        self._retired.append(client)
        self._looks = 0
        self._changed()
        self.look_at_retired()
        return True

    def look_at_retired(self) -> None:
        """Close sessions that ended, of those clients that let go of their locks meanwhile."""
        gone = [client for client in self._retired if self._let_go(client)]
        if gone:
            self._retired = [client for client in self._retired if client not in gone]
            self._changed()
            for client in gone:
                self._executor.apply(SessionClosed(client.session.id))
                if client.session.file is not None:
                    client.session.file.close()
            self._executor.look_at_hazards()
        self._sessions.retired = len(self._retired)
        if self._retired and self._looking is None and self._looks < _RETIRED_POLLS:
            # Usually it is a matter of moments: a client says goodbye and then unmaps. Afterwards the tick looks.
            self._looks += 1
            self._looking = self._loop.call_later(_RETIRED_POLL_S, self._look_again)

    def _let_go(self, client: MappedClient) -> bool:
        """Whether a client can neither read nor write the arena any more, and no device does for it."""
        session = client.session
        if session.file is not None and session.file.locked():
            return False
        now_ns = self._clock()
        session.died_ns = session.died_ns or now_ns
        return not client.has_device or now_ns - session.died_ns >= self._grace_ns

    def _look_again(self) -> None:
        self._looking = None
        self.look_at_retired()

    def _changed(self) -> None:
        index = self._executor.index
        assert index is not None
        watched = [*self._clients.values(), *(client for client in self._retired if client.heeded)]
        index.watch_hazards([client.hazards for client in watched])
        if self._attention is not None:
            self._attention.watch(self._clients.values())

    def is_mapped(self, session: Session) -> bool:
        """Whether a session has a ring."""
        return session.id in self._clients

    def dropped_reports(self) -> int:
        """Access reports that clients which are there could not make."""
        return sum(client.dropped_reports for client in self._clients.values())

    # -------------------------------------------------------------- what they say

    def before_request(self, session: Session) -> None:
        """Carry out what a client did before it sent a request."""
        client = self._clients.get(session.id)
        if client is not None and self._attention is not None:
            self._attention.drain(client)

    def drain_all(self) -> None:
        """Carry out what all clients did: before a decision that rests on it."""
        if self._attention is not None:
            self._attention.drain_all()

    def reserve(self, lane: int, wanted: SlotWanted) -> Lane | Refuse | None:
        """Lend slots ahead; None where the session maps nothing."""
        client = self._clients.get(wanted.session)
        return None if client is None else self._lanes.reserve(client, lane, wanted)

    def have_back(self) -> int:
        """Take back slots that were lent ahead and are not used; how many."""
        return self._lanes.take_back_idle()

    # -------------------------------------------------------------- time

    def grace_ns(self, session: Session) -> int:
        """How long after its death what a session held must be left alone."""
        client = self._clients.get(session.id)
        return self._grace_ns if client is not None and client.has_device else 0

    def tick(self) -> None:
        """Once a second: reports that did not ring, idle lanes, hazards, and clients that hold too much."""
        self.drain_all()
        if self._attention is not None:
            self._attention.rest()
        self.look_at_retired()
        self._lanes.age()
        self._executor.look_at_hazards()
        for client in self._all():
            client.suspects = 0
            if self._executor.hazarded_slots:
                self._check_hazards(client)

    def _check_hazards(self, client: MappedClient) -> None:
        """A client may hold slots that others wait for, though not without bound: the SDK keeps to it by itself.

        It counts payloads, and only after it set the hazard: for a moment there is one too many.
        """
        sizes = self._executor.hazarded_bytes(client.hazarded_slots())
        held = sum(sizes)
        if held - max(sizes, default=0) > self._hazard_bytes:
            self._log.log_every(
                5, "hazards", "error", "hazards_refused", pid=client.session.pid, held_bytes=held, why="over its limit"
            )
            # Others must not wait for it: what it reads in place from now on is its own loss.
            client.heeded = False
            self._end(client)

    def stop(self) -> None:
        """Drain no more, and tell all clients."""
        if self._attention is not None:
            self._attention.stop()
            self._attention = None
        if self._looking is not None:
            self._looking.cancel()
        for client in self._clients.values():
            client.end()
        for client in self._retired:
            if client.session.file is not None:
                client.session.file.close()
