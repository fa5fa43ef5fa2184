"""Ghosts: what is remembered of blocks that left, or that could not be stored or loaded; bounded in memory.

Each departure takes the next place of a ring, so the last ones are remembered. All of it lies in flat arrays by place:
a ghost costs 88 bytes, and no Python object. Keys are found as a compressor finds strings: a bucket of the hash has the
place of its last key, and each place the one before it in the same bucket. Nothing is ever taken out: a place that is
used again is recognised by its hash. Departures are written many at a time, at the speed of numpy.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Final, NamedTuple

import numpy as np

from kvstore.core.ghost_bytes import SPAN, GhostBytes, Numbers
from kvstore.protocol.keys import KEY_BYTES
from kvstore.protocol.messages import Reason, TierId
from kvstore.protocol.misses import MissCause

DEPARTURE: Final = struct.Struct("<qqqq32s")
"""A departure: the key's hash mixed with its namespace's, the form (see ``Ghosts.form_of``), the time in ns, the bytes
that are out with it (0 where more room would not have kept the block), and the key."""

GHOST_BYTES: Final = 88
"""Memory for a place: a departure, with the place before it where its bytes were (64), the bytes (8), at most four
buckets (16). A test measures it, with the sums (0.1)."""

SMALLEST_BYTES: Final = GHOST_BYTES * SPAN
"""Memory for the smallest ring."""

MOST_STEPS: Final = 32
"""Places of one bucket that are looked at for a key; one that lies behind more is not found."""

# Numbers of a row, which is a departure in the ring.
_ROW: Final = 8
_HASH, _FORM, _SINCE, _BEFORE, _KEY = range(5)
_ROW_BYTES: Final = DEPARTURE.size
_KEY_BYTES_AT: Final = _ROW_BYTES - KEY_BYTES

_CAUSES: Final = tuple(MissCause)
_CAUSE_NUMBER: Final = {cause: number for number, cause in enumerate(_CAUSES)}

# The form of a ghost, one number: cause, tier, reason, policy, flags, and above them the depth.
_CAUSE_BITS: Final = 0x1F
_TIER_SHIFT: Final = 5
_TIER_BITS: Final = 0x7
_REASON_SHIFT: Final = 8
_REASON_BITS: Final = 0x3F
_REASON_MASK: Final = _REASON_BITS << _REASON_SHIFT
_POLICY_SHIFT: Final = 14
_POLICY_BITS: Final = 0x3F
BRANCHED: Final = 1 << 20
"""Flag: it had a block behind it."""
_BACK: Final = 1 << 21
"""Flag: it came back since."""
DEPTH_SHIFT: Final = 22
_NOT_STORED: Final = _CAUSE_NUMBER[MissCause.NOT_STORED]


Rows = np.ndarray[tuple[int, int], np.dtype[np.int64]]


class Ghost(NamedTuple):
    """What is remembered of a block.

    Attributes:
        cause: why it left, or was not stored or loaded.
        since_ns: when.
        tier: that it left for good.
        policy: by which it was evicted, "" where it was not.
        reason: why a put of it was refused since then, ``NONE`` where none was.
        depth: blocks before it, as far as was known.
        branched: a block was behind it.
        back: it was stored again since then.
    """

    cause: MissCause
    since_ns: int
    tier: TierId
    policy: str
    reason: Reason
    depth: int
    branched: bool
    back: bool


class Ghosts:
    """The last departures.

    Args:
        limit_bytes: memory that they may take, at least ``SMALLEST_BYTES``.

    Attributes:
        places: most ghosts that are remembered.
        departures: since the start.
        next: the place of the next departure.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.places: Final = max(limit_bytes // GHOST_BYTES // SPAN, 1) * SPAN
        self.departures = 0
        self.next = 0
        self._policies: list[str] = [""]
        # Zeros: their memory is taken as places are used.
        buckets = 2 << (self.places - 1).bit_length()
        self._mask = buckets - 1
        self._heads_array = np.zeros(buckets, np.int32)
        self._rows_array = np.zeros((self.places, _ROW), np.int64)
        self._sums = GhostBytes(self.places)
        # The same memory: single numbers are read and written faster in this way. Links count places from 1.
        self._heads = self._heads_array.data
        self._rows = self._rows_array.reshape(-1).data
        self._bytes = self._rows.cast("B")
        self.out = self._sums.out

    def __len__(self) -> int:
        """Departures that are remembered; several may be of one block."""
        return min(self.departures, self.places)

    @property
    def used_bytes(self) -> int:
        """Memory that they take."""
        return len(self) * GHOST_BYTES

    @property
    def oldest_ns(self) -> int:
        """When the oldest departure was that is remembered, 0 where none is."""
        return self._rows[_ROW * (self.next if self.departures > self.places else 0) + _SINCE]

    # -------------------------------------------------------------- writing

    def form_of(
        self,
        cause: MissCause,
        tier: TierId,
        policy: str = "",
        *,
        reason: Reason = Reason.NONE,
        depth: int = 0,
        branched: bool = False,
    ) -> int:
        """What is remembered of a block, but for times and bytes, as a number; see ``Ghost``."""
        if policy not in self._policies and len(self._policies) <= _POLICY_BITS:
            self._policies.append(policy)
        number = self._policies.index(policy) if policy in self._policies else 0
        form = _CAUSE_NUMBER[cause] | tier << _TIER_SHIFT | reason << _REASON_SHIFT | number << _POLICY_SHIFT
        return form | depth << DEPTH_SHIFT | (BRANCHED if branched else 0)

    def add_one(self, mixed: int, form: int, since_ns: int, out_bytes: int, key: bytes) -> None:
        """A block left: cheaper than ``add`` for a few. See ``DEPARTURE``."""
        place, bucket = self.next, mixed & self._mask
        DEPARTURE.pack_into(self._bytes, _ROW_BYTES * place, mixed, form, since_ns, self._heads[bucket], key)
        self._heads[bucket] = place + 1
        self._sums.write_one(place, out_bytes)
        self.next = 0 if place + 1 == self.places else place + 1
        self.departures += 1

    def add(self, rows: Rows) -> None:
        """Blocks left, in that order: a ``DEPARTURE`` each, as numbers."""
        for begin in range(0, len(rows), self.places):
            self._add(rows[begin : begin + self.places])

    def _add(self, rows: Rows) -> None:
        done = 0
        while done < len(rows):
            place = self.next
            end = min(place + len(rows) - done, self.places)
            some = rows[done : done + end - place]
            before = self._link(some[:, _HASH], place, end)
            self._rows_array[place:end] = some
            self._rows_array[place:end, _BEFORE] = before
            self._sums.write(place, some[:, _BEFORE])
            done += end - place
            self.next = 0 if end == self.places else end
        self.departures += len(rows)

    def _link(self, hashes: Numbers, begin: int, end: int) -> Numbers:
        """Put places at the front of the buckets of their hashes; the places before them there."""
        buckets = hashes & self._mask
        numbers = np.arange(begin + 1, end + 1, dtype=np.int32)
        before: Numbers = self._heads_array[buckets].astype(np.int64)
        self._heads_array[buckets] = numbers
        if not np.array_equal(self._heads_array[buckets], numbers):
            # Some share a bucket: the last of them is its head already.
            last: dict[int, int] = {}
            for index, bucket in enumerate(buckets.tolist()):
                if bucket in last:
                    before[index] = last[bucket]
                last[bucket] = begin + index + 1
        return before

    def came_back(self, place: int) -> int:
        """A block was stored again; ``BRANCHED`` where something was behind it."""
        self._sums.clear(place)
        form = self._rows[_ROW * place + _FORM]
        self._rows[_ROW * place + _FORM] = (form | _BACK) & ~_REASON_MASK
        return form & BRANCHED

    def left_again(self, place: int) -> None:
        """A block came back and left once more, to this place: what was out with it before is not out twice."""
        wanted = self._rows[_ROW * place + _HASH]
        for earlier in self._with(wanted, self._rows[_ROW * place + _BEFORE] - 1):
            self._sums.clear(earlier)

    def refused(self, place: int, reason: Reason, since_ns: int) -> None:
        """A put of a ghost was refused."""
        form = self._rows[_ROW * place + _FORM]
        if form & _BACK or form & _CAUSE_BITS == _NOT_STORED:
            # What became of it before is over.
            form = form & ~_CAUSE_BITS & ~_BACK | _NOT_STORED
            self._rows[_ROW * place + _SINCE] = since_ns
        self._rows[_ROW * place + _FORM] = form & ~_REASON_MASK | reason << _REASON_SHIFT

    def branch(self, place: int) -> None:
        """A ghost has a block behind it."""
        self._rows[_ROW * place + _FORM] |= BRANCHED

    # -------------------------------------------------------------- reading

    def find(self, salt: int, key: bytes) -> int:
        """Place of the last departure of a key, -1 where none is remembered. ``salt``: the namespace's hash."""
        wanted = hash(key) ^ salt
        for place in self._with(wanted, self._heads[wanted & self._mask] - 1):
            if self.key(place) == key:
                return place
        return -1

    def _with(self, wanted: int, place: int) -> Iterator[int]:
        """Places of a hash, from one of its bucket on, the last first."""
        rows, mask = self._rows, self._mask
        for _ in range(MOST_STEPS):
            if place < 0:
                return
            at = _ROW * place
            found = rows[at + _HASH]
            if found == wanted:
                yield place
            elif (found ^ wanted) & mask:
                # Used again since: what is behind it is older still.
                return
            place = rows[at + _BEFORE] - 1

    def find_many(self, hashes: Numbers) -> list[tuple[int, int]]:
        """Which of many keys may have been found, by their hashes mixed with the namespaces', and where.

        Two keys may have one hash: whoever asks compares ``key``.
        """
        buckets = hashes & self._mask
        places = self._heads_array[buckets] - 1
        asked = np.flatnonzero(places >= 0)
        places = places[asked]
        column, before = self._rows_array[:, _HASH], self._rows_array[:, _BEFORE]
        found: list[tuple[int, int]] = []
        for _ in range(MOST_STEPS):
            if not len(asked):
                break
            mixed = column[places] ^ hashes[asked]
            same = mixed == 0
            if same.any():
                found += zip(asked[same].tolist(), places[same].tolist(), strict=True)
            further = (mixed & self._mask == 0) & ~same
            asked, places = asked[further], before[places[further]] - 1
            known = places >= 0
            asked, places = asked[known], places[known]
        return found

    def all_keys(self) -> list[bytes]:
        """Keys of all ghosts, each once; O(places). May be asked in any thread."""
        rows = self._rows_array[: len(self), _KEY:].tobytes()
        return list(dict.fromkeys(rows[at : at + KEY_BYTES] for at in range(0, len(rows), KEY_BYTES)))

    def key(self, place: int) -> bytes:
        """Whose departure it was."""
        begin = _ROW_BYTES * place + _KEY_BYTES_AT
        return bytes(self._bytes[begin : begin + KEY_BYTES])

    def _form(self, place: int) -> int:
        return self._rows[_ROW * place + _FORM]

    def branched(self, place: int) -> bool:
        """Whether a ghost had a block behind it."""
        return bool(self._form(place) & BRANCHED)

    def cause(self, place: int) -> MissCause:
        """Why a ghost is not there."""
        form = self._form(place)
        return MissCause.NOT_STORED if form & _REASON_MASK else _CAUSES[form & _CAUSE_BITS]

    def tier(self, place: int) -> TierId:
        """The tier that a ghost left for good."""
        return TierId(self._form(place) >> _TIER_SHIFT & _TIER_BITS)

    def extra_bytes(self, place: int) -> int:
        """How many more bytes would have kept an evicted ghost: what left since then and is out, and itself.

        With LRU that is exact where blocks have one size: in a larger tier all of them would be there, in this order.
        """
        return self._sums.since(place, self.next)

    def bytes_between(self, begin: int, end: int) -> int:
        """What is out of a few departures, one after the other."""
        return self._sums.between(begin, end)

    def ghost(self, place: int) -> Ghost:
        """All that is remembered."""
        form = self._form(place)
        return Ghost(
            _CAUSES[form & _CAUSE_BITS],
            self._rows[_ROW * place + _SINCE],
            TierId(form >> _TIER_SHIFT & _TIER_BITS),
            self._policies[form >> _POLICY_SHIFT & _POLICY_BITS],
            Reason(form >> _REASON_SHIFT & _REASON_BITS),
            form >> DEPTH_SHIFT,
            bool(form & BRANCHED),
            bool(form & _BACK),
        )
