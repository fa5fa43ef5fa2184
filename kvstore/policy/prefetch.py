"""The order in which blocks come up from a tier below: urgent ones first, parents before children, each only once.

A request wants records, in the order of a chain. Several requests that want one record share its load, which is as
urgent as the most urgent of them. What a request wants is dropped when its deadline passes or its client is gone,
unless another wants it too.

Requests of one urgency take turns, sixteen records each, so that a long one does not keep all others waiting; a new one
begins in the turn that is being served (start-time fair queueing, Goyal et al., 1996). Within a turn the earliest
deadline comes first.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Iterator
from enum import IntEnum
from typing import Final, Generic, Protocol, TypeVar

__all__ = ["Load", "LoadQueue", "LoadRequest", "Outcome", "Urgency"]

_COMPACT_FROM: Final = 64
_TURN_RECORDS: Final = 16


class Urgency(IntEnum):
    """Who wants something, the most urgent first."""

    WAITED = 0
    """A client waits: a get, or a prefetch with ``wait=True``."""
    ARRIVED = 1
    """A request arrived, and its gets come soon: a match with ``prefetch=True``."""
    AHEAD = 2
    """A client asked for it ahead of time."""
    HINTED = 3
    """A session is expected to come back."""
    WARMING = 4
    """A list of blocks that are likely to be used."""


class Outcome(IntEnum):
    """What became of one record that a request wanted."""

    BROUGHT = 1
    """It was read, and is in DRAM."""
    THERE = 2
    """It was in DRAM already."""
    LOST = 3
    """It is not below any more, or could not be read."""
    NO_ROOM = 4
    """DRAM had no room for it."""
    EXPIRED = 5
    """The request's time was over."""
    CANCELLED = 6
    """The request's client is gone."""


class Loadable(Protocol):
    """What the queue sees of a record: compared by identity, and hashable.

    Attributes:
        home_bytes: of the slot that it gets in DRAM.
    """

    home_bytes: int


RecordT = TypeVar("RecordT", bound=Loadable)
SpaceT = TypeVar("SpaceT")


class LoadRequest:
    """Somebody wants records to come up.

    Args:
        urgency: of it.
        deadline_ns: nothing begins for it after that.
        session: of its client, 0 for the daemon itself.
        access: number of the access that it is.
        only_free: nothing may leave DRAM for it.

    Attributes:
        outcomes: of its records so far.
        left: records of which the outcome is not known yet.
        bytes: slots of those.
        wanted: records that it wanted until now.
        turn: in which it begins; the queue's own.
        ended: called once, when none is left.
    """

    __slots__ = (
        "access",
        "bytes",
        "deadline_ns",
        "ended",
        "left",
        "loads",
        "only_free",
        "outcomes",
        "over",
        "session",
        "turn",
        "urgency",
        "wanted",
    )

    def __init__(
        self, urgency: Urgency, deadline_ns: int, session: int = 0, access: int = 0, *, only_free: bool = False
    ) -> None:
        self.urgency = urgency
        self.deadline_ns = deadline_ns
        self.session = session
        self.access = access
        self.only_free = only_free
        self.outcomes: Counter[Outcome] = Counter()
        self.left = 0
        self.bytes = 0
        self.wanted = 0
        self.turn = 0
        self.loads: dict[object, None] = {}
        self.over: Outcome | None = None
        self.ended: Callable[[], None] | None = None


class Load(Generic[RecordT, SpaceT]):
    """One record on its way up.

    Attributes:
        record, space: what is loaded, and the namespace that it goes to.
        wants: the requests that want it, the first one first.
        flying: it is being read.
        place: what it is ordered by; None once it is over.
    """

    __slots__ = ("flying", "place", "record", "space", "wants")

    def __init__(self, record: RecordT, space: SpaceT) -> None:
        self.record = record
        self.space = space
        self.wants: list[LoadRequest] = []
        self.flying = False
        self.place: tuple[int, int, int, int] | None = None

    @property
    def urgency(self) -> Urgency:
        """Of the most urgent request that wants it. Precondition: it is not over."""
        assert self.place is not None
        return Urgency(self.place[0])

    @property
    def first(self) -> LoadRequest:
        """The most urgent request that wants it."""
        return min(self.wants, key=lambda request: (request.urgency, request.deadline_ns))


class LoadQueue(Generic[RecordT, SpaceT]):
    """All loads that are wanted, waiting or on their way. O(log n) for each record of a call.

    Attributes:
        waiting_bytes: slots of loads that wait, by urgency.
        flying_bytes: slots of loads that are on their way.
        flying: how many those are.
        merged: wants that found their record wanted already.
    """

    def __init__(self) -> None:
        self._loads: dict[RecordT, Load[RecordT, SpaceT]] = {}
        self._order: list[tuple[int, int, int, int, Load[RecordT, SpaceT]]] = []
        self._aside: list[Load[RecordT, SpaceT]] = []
        self._turns = [0] * len(Urgency)
        self._number = 0
        self.waiting_bytes = [0] * len(Urgency)
        self.flying_bytes = 0
        self.flying = 0
        self.merged = 0
        self.outcomes: Counter[Outcome] = Counter()

    def __len__(self) -> int:
        return len(self._loads)

    def __iter__(self) -> Iterator[Load[RecordT, SpaceT]]:
        return iter(list(self._loads.values()))

    def holds(self, record: RecordT) -> bool:
        """Whether a record is wanted, or on its way."""
        return record in self._loads

    def want(self, request: LoadRequest, record: RecordT, space: SpaceT) -> bool:
        """A request wants one record more, behind those that it wanted before; whether others want it already."""
        load = self._loads.get(record)
        merged = load is not None
        if load is None:
            load = self._loads[record] = Load(record, space)
        elif request in load.wants:
            return True
        self.merged += merged
        self._number += 1
        load.wants.append(request)
        if not request.wanted:
            request.turn = self._turns[request.urgency]
        turn = request.turn + request.wanted // _TURN_RECORDS
        request.loads[load] = None
        request.wanted += 1
        request.left += 1
        request.bytes += record.home_bytes
        place = (int(request.urgency), turn, request.deadline_ns, self._number)
        if load.flying:
            if load.place is not None and place < load.place:
                load.place = place
        elif load.place is None or place < load.place:
            self._move(load, place)
        return merged

    def next(self, now_ns: int) -> Load[RecordT, SpaceT] | None:
        """The load to begin next, None where none waits; it stays. What nobody has time for any more is dropped."""
        while self._order:
            *place, load = self._order[0]
            if load.flying or load.place != tuple(place):
                heapq.heappop(self._order)
                continue
            late = [request for request in load.wants if request.over or request.deadline_ns <= now_ns]
            for request in late:
                load.wants.remove(request)
                self._tell(request, load, request.over or Outcome.EXPIRED)
            if not load.wants:
                self._drop(load)
            elif late:
                first = load.first
                self._move(load, (int(first.urgency), place[1], first.deadline_ns, place[3]))
            else:
                return load
        return None

    def set_aside(self, load: Load[RecordT, SpaceT]) -> None:
        """Look at others before a load that waits, until ``take_up``. Precondition: ``next`` gave it."""
        heapq.heappop(self._order)
        self._aside.append(load)

    def take_up(self) -> None:
        """What was set aside is to be looked at again."""
        for load in self._aside:
            if load.place is not None and not load.flying:
                heapq.heappush(self._order, (*load.place, load))
        self._aside.clear()

    def begin(self, load: Load[RecordT, SpaceT]) -> None:
        """A load that waited is being read."""
        assert load.place is not None
        urgency, turn, *_ = load.place
        self.waiting_bytes[urgency] -= load.record.home_bytes
        self._turns[urgency] = max(self._turns[urgency], turn)
        load.flying = True
        self.flying += 1
        self.flying_bytes += load.record.home_bytes

    def end(self, load: Load[RecordT, SpaceT], outcome: Outcome) -> None:
        """A load is over, or will never begin."""
        wants, load.wants = load.wants, []
        self._drop(load)
        for request in wants:
            self._tell(request, load, outcome)

    def cancel(self, request: LoadRequest, outcome: Outcome) -> None:
        """Nobody wants what a request wanted any more; what is being read is read to its end."""
        request.over = outcome
        for load in self.wanted_by(request):
            load.wants.remove(request)
            self._tell(request, load, outcome)
            if not load.wants and not load.flying:
                self._drop(load)

    def wanted_by(self, request: LoadRequest) -> list[Load[RecordT, SpaceT]]:
        """The loads of a request that are not over."""
        return [load for load in request.loads if isinstance(load, Load)]

    def _move(self, load: Load[RecordT, SpaceT], place: tuple[int, int, int, int]) -> None:
        """Give a load that waits another place."""
        if load.place is not None:
            self.waiting_bytes[load.place[0]] -= load.record.home_bytes
        load.place = place
        self.waiting_bytes[place[0]] += load.record.home_bytes
        heapq.heappush(self._order, (*place, load))
        if len(self._order) > _COMPACT_FROM + 2 * len(self._loads):
            self._order = [(*one.place, one) for one in self._loads.values() if one.place and not one.flying]
            heapq.heapify(self._order)

    def _drop(self, load: Load[RecordT, SpaceT]) -> None:
        if load.flying:
            self.flying -= 1
            self.flying_bytes -= load.record.home_bytes
        elif load.place is not None:
            self.waiting_bytes[load.place[0]] -= load.record.home_bytes
        load.place = None
        del self._loads[load.record]

    def _tell(self, request: LoadRequest, load: Load[RecordT, SpaceT], outcome: Outcome) -> None:
        self.outcomes[outcome] += 1
        request.outcomes[outcome] += 1
        request.loads.pop(load, None)
        request.left -= 1
        request.bytes -= load.record.home_bytes
        if not request.left and request.ended is not None:
            ended, request.ended = request.ended, None
            ended()
