"""What is written to the SSD when it leaves DRAM: everything, or what is likely to be asked for again.

``predicted`` decides for the blocks of one engine request together, since a hole makes all that is behind it useless.
Such a run of blocks has a class: the turn of its chat session and its length. How often runs of a class return within
the time that blocks stay on the SSD is learned online, whether they were written or not; so is how often blocks return
within that time after the SSD evicted them. While the SSD has room everything is written; once it is full a run is
written only if its class returns at least as often as what would have to leave for it.

Time is the access number, as for eviction.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Final, Protocol, Self

from kvstore.errors import InvalidArgument

_MOST_DECISIONS: Final = 8192
_MOST_GHOSTS: Final = 16_384
_HALVED_AT: Final = 4096
"""Outcomes of a class after which all counts are halved: old ones fade."""

_FIRST_OUTCOMES: Final = 16
"""Outcomes that a class must have before it can be refused."""

_TURNS: Final = 4
_LENGTHS: Final = (4, 16, 64)
_EVICTED: Final = _TURNS * (len(_LENGTHS) + 1)
_EVICTED_SAMPLE: Final = 8
_STAY_WEIGHT: Final = 1 / 1024


class Admissible(Protocol):
    """What admission sees of a block.

    Attributes:
        key: of the block.
        born: access number of the engine request that put it.
        turn: how many requests its prefix was put by, one after the other.
    """

    key: bytes
    born: int
    turn: int

    @property
    def parent(self) -> Self | None:
        """The resident parent."""


class Admission(Protocol):
    """Decides what is written when it leaves DRAM."""

    @property
    def name(self) -> str:
        """Name in the settings."""

    def admits(self, block: Admissible, now: int, *, scarce: bool) -> bool:
        """Whether a block that leaves is written; ``scarce``: others must leave the SSD for it."""

    def used(self, keys: Iterable[bytes], now: int) -> None:
        """Blocks that had left DRAM were used again, or asked for in vain."""

    def evicted(self, key: bytes, used: int, now: int) -> None:
        """A block that was last used then left the SSD for others."""


class AdmitAll:
    """Everything is written."""

    name = "all"

    def admits(self, block: Admissible, now: int, *, scarce: bool) -> bool:
        """See ``Admission``."""
        return True

    def used(self, keys: Iterable[bytes], now: int) -> None:
        """See ``Admission``."""

    def evicted(self, key: bytes, used: int, now: int) -> None:
        """See ``Admission``."""


class AdmitPredicted:
    """What is likely to return is written. See the module. Bounded: 24,576 keys and numbers."""

    name = "predicted"

    def __init__(self) -> None:
        self._decisions: OrderedDict[int, bool] = OrderedDict()
        self._ghosts: OrderedDict[bytes, tuple[int, int]] = OrderedDict()
        self._returned = [0.0] * (_EVICTED + 1)
        self._outcomes = [0.0] * (_EVICTED + 1)
        self._stay = 0.0

    def admits(self, block: Admissible, now: int, *, scarce: bool) -> bool:
        """See ``Admission``. The first block of a run decides for all: the deepest, since it leaves first."""
        decision = self._decisions.get(block.born)
        if decision is not None:
            return decision
        first, length = block, 1
        while first.parent is not None and first.parent.born == block.born:
            first = first.parent
            length += 1
        kind = (min(block.turn, _TURNS) - 1) * (len(_LENGTHS) + 1) + sum(length >= least for least in _LENGTHS)
        self._watch(first.key, kind, now)
        sure = min(self._outcomes[kind], self._outcomes[_EVICTED]) >= _FIRST_OUTCOMES
        decision = not scarce or not sure or self._rate(kind) >= self._rate(_EVICTED)
        self._decisions[block.born] = decision
        if len(self._decisions) > _MOST_DECISIONS:
            self._decisions.popitem(last=False)
        return decision

    def used(self, keys: Iterable[bytes], now: int) -> None:
        """See ``Admission``."""
        for key in keys:
            found = self._ghosts.pop(key, None)
            if found is not None:
                kind, since = found
                self._count(kind, returned=now - since <= self._stay)

    def evicted(self, key: bytes, used: int, now: int) -> None:
        """See ``Admission``. One in eight is watched, by its key."""
        self._stay += (now - used - self._stay) * _STAY_WEIGHT
        if key[0] % _EVICTED_SAMPLE == 0:
            self._watch(key, _EVICTED, now)

    def _rate(self, kind: int) -> float:
        return (self._returned[kind] + 0.5) / (self._outcomes[kind] + 1)

    def _watch(self, key: bytes, kind: int, now: int) -> None:
        self._ghosts.pop(key, None)
        self._ghosts[key] = (kind, now)
        while self._ghosts:
            oldest, (other, since) = next(iter(self._ghosts.items()))
            if len(self._ghosts) <= _MOST_GHOSTS and now - since <= self._stay:
                break
            del self._ghosts[oldest]
            if self._stay:
                self._count(other, returned=False)

    def _count(self, kind: int, *, returned: bool) -> None:
        self._outcomes[kind] += 1
        self._returned[kind] += returned
        if self._outcomes[kind] >= _HALVED_AT:
            self._outcomes[kind] /= 2
            self._returned[kind] /= 2


ADMISSIONS: Final[dict[str, Callable[[], Admission]]] = {"all": AdmitAll, "predicted": AdmitPredicted}


def make_admission(name: str) -> Admission:
    """A new admission policy.

    Raises:
        InvalidArgument: none has that name; the message lists those there are.
    """
    try:
        return ADMISSIONS[name]()
    except KeyError:
        raise InvalidArgument(f"unknown admission {name!r}; there are: {', '.join(ADMISSIONS)}") from None
