"""Ghosts: what is remembered of blocks that left, or that could not be stored or loaded; bounded in memory.

Each departure takes the next place of a ring, so the last ones are remembered. All of it lies in flat arrays by place:
a ghost costs 77 bytes, and no Python object. Keys are found as a compressor finds strings: a bucket of the hash has the
place of its last key, and each place the one before it in the same bucket. Nothing is ever taken out: a place that is
used again is recognised by its hash. Departures are written many at a time, at the speed of numpy.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

import numpy as np

from kvstore.core.ghost_bytes import SPAN, GhostBytes
from kvstore.protocol.keys import KEY_BYTES
from kvstore.protocol.messages import Reason, TierId
from kvstore.protocol.misses import MissCause

GHOST_BYTES: Final = 77
"""Memory for a place: hash, key, time, form and bytes (8 + 32 + 8 + 8 + 8), the place before it (4), at most two
buckets (8), and sums (1). A test measures it."""

SMALLEST_BYTES: Final = GHOST_BYTES * SPAN
"""Memory for the smallest ring."""

MOST_STEPS: Final = 32
"""Places of one bucket that are looked at for a key; one that lies behind more is not found."""

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

Departure = tuple[int, bytes, int, int, int]
"""The namespace's hash, key, form, time in ns, and bytes that are out with it."""


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
        buckets = 1 << (self.places - 1).bit_length()
        self._mask = buckets - 1
        self._heads_array = np.zeros(buckets, np.int32)
        self._before_array = np.zeros(self.places, np.int32)
        self._hashes_array = np.zeros(self.places, np.int64)
        self._keys_array = np.zeros((self.places, KEY_BYTES), np.uint8)
        self._since_array = np.zeros(self.places, np.int64)
        self._forms_array = np.zeros(self.places, np.int64)
        self._sums = GhostBytes(self.places)
        # The same memory: single numbers are read and written faster in this way. Places in it count from 1.
        self._heads = self._heads_array.data
        self._before = self._before_array.data
        self._hashes = self._hashes_array.data
        self._keys = self._keys_array.data.cast("B", (self.places * KEY_BYTES,))
        self._since_ns = self._since_array.data
        self._forms = self._forms_array.data
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
        return self._since_ns[self.next if self.departures > self.places else 0]

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

    def add(self, departures: Sequence[Departure]) -> None:
        """Blocks left, in that order.

        In a departure the form is one of ``form_of``; the bytes are 0 where more room would not have kept the block.
        """
        for begin in range(0, len(departures), self.places):
            self._add(departures[begin : begin + self.places])

    def _add(self, departures: Sequence[Departure]) -> None:
        count = len(departures)
        salts, keys, forms, since_ns, out_bytes = zip(*departures, strict=True)
        hashes = np.fromiter(map(hash, keys), np.int64, count) ^ np.array(salts, np.int64)
        packed = np.frombuffer(b"".join(keys), np.uint8).reshape(count, KEY_BYTES)
        formed, since = np.array(forms, np.int64), np.array(since_ns, np.int64)
        out = np.array(out_bytes, np.int64)
        done = 0
        while done < count:
            place = self.next
            end = min(place + count - done, self.places)
            some = slice(done, done + end - place)
            self._link(hashes[some], place, end)
            self._hashes_array[place:end] = hashes[some]
            self._keys_array[place:end] = packed[some]
            self._forms_array[place:end] = formed[some]
            self._since_array[place:end] = since[some]
            self._sums.write(place, out[some])
            done += end - place
            self.next = 0 if end == self.places else end
        self.departures += count

    def _link(self, hashes: np.ndarray[tuple[int], np.dtype[np.int64]], begin: int, end: int) -> None:
        """Put places at the front of the buckets of their hashes."""
        buckets = hashes & self._mask
        numbers = np.arange(begin + 1, end + 1, dtype=np.int32)
        self._before_array[begin:end] = self._heads_array[buckets]
        self._heads_array[buckets] = numbers
        if not np.array_equal(self._heads_array[buckets], numbers):
            # Some share a bucket: the last of them is its head already.
            last: dict[int, int] = {}
            for place, bucket in enumerate(buckets.tolist(), begin):
                if bucket in last:
                    self._before[place] = last[bucket]
                last[bucket] = place + 1

    def came_back(self, place: int) -> int:
        """A block was stored again; ``BRANCHED`` where something was behind it."""
        self._sums.clear(place)
        form = self._forms[place]
        self._forms[place] = (form | _BACK) & ~_REASON_MASK
        return form & BRANCHED

    def refused(self, place: int, reason: Reason, since_ns: int) -> None:
        """A put of a ghost was refused."""
        form = self._forms[place]
        if form & _BACK or form & _CAUSE_BITS == _NOT_STORED:
            # What became of it before is over.
            form = form & ~_CAUSE_BITS & ~_BACK | _NOT_STORED
            self._since_ns[place] = since_ns
        self._forms[place] = form & ~_REASON_MASK | reason << _REASON_SHIFT

    def branch(self, place: int) -> None:
        """A ghost has a block behind it."""
        self._forms[place] |= BRANCHED

    # -------------------------------------------------------------- reading

    def find(self, salt: int, key: bytes) -> int:
        """Place of the last departure of a key, -1 where none is remembered. ``salt``: the namespace's hash."""
        wanted = hash(key) ^ salt
        bucket = wanted & self._mask
        place = self._heads[bucket] - 1
        hashes = self._hashes
        for _ in range(MOST_STEPS):
            if place < 0:
                return -1
            found = hashes[place]
            if found == wanted and self._keys[KEY_BYTES * place : KEY_BYTES * (place + 1)] == key:
                return place
            if found & self._mask != bucket:
                # Used again since: what is behind it is older still.
                return -1
            place = self._before[place] - 1
        return -1

    def find_many(self, salts: Iterable[int], keys: Sequence[bytes]) -> list[tuple[int, int]]:
        """As ``find`` of each, at a fraction of the cost: which of them were found, and where."""
        wanted = np.fromiter(map(hash, keys), np.int64, len(keys)) ^ np.fromiter(salts, np.int64, len(keys))
        buckets = wanted & self._mask
        places = self._heads_array[buckets] - 1
        asked = np.arange(len(keys))
        found: list[tuple[int, int]] = []
        for _ in range(MOST_STEPS):
            known = places >= 0
            if not known.any():
                break
            asked, places = asked[known], places[known]
            hashes = self._hashes_array[places]
            same = hashes == wanted[asked]
            if same.any():
                for index, place in zip(asked[same].tolist(), places[same].tolist(), strict=True):
                    if self._keys[KEY_BYTES * place : KEY_BYTES * (place + 1)] == keys[index]:
                        found.append((index, place))
            further = ~same & (hashes & self._mask == buckets[asked])
            asked, places = asked[further], self._before_array[places[further]] - 1
        return found

    def all_keys(self) -> list[bytes]:
        """Keys of all ghosts, each once; O(places). May be asked in any thread."""
        joined = self._keys[: KEY_BYTES * len(self)].tobytes()
        return list(dict.fromkeys(joined[at : at + KEY_BYTES] for at in range(0, len(joined), KEY_BYTES)))

    def key(self, place: int) -> bytes:
        """Whose departure it was."""
        return bytes(self._keys[KEY_BYTES * place : KEY_BYTES * (place + 1)])

    def branched(self, place: int) -> bool:
        """Whether a ghost had a block behind it."""
        return bool(self._forms[place] & BRANCHED)

    def cause(self, place: int) -> MissCause:
        """Why a ghost is not there."""
        form = self._forms[place]
        return MissCause.NOT_STORED if form & _REASON_MASK else _CAUSES[form & _CAUSE_BITS]

    def tier(self, place: int) -> TierId:
        """The tier that a ghost left for good."""
        return TierId(self._forms[place] >> _TIER_SHIFT & _TIER_BITS)

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
        form = self._forms[place]
        return Ghost(
            _CAUSES[form & _CAUSE_BITS],
            self._since_ns[place],
            TierId(form >> _TIER_SHIFT & _TIER_BITS),
            self._policies[form >> _POLICY_SHIFT & _POLICY_BITS],
            Reason(form >> _REASON_SHIFT & _REASON_BITS),
            form >> DEPTH_SHIFT,
            bool(form & BRANCHED),
            bool(form & _BACK),
        )
