"""Blocks that many requests share, such as those of a system prompt: found online, counted exactly.

A block is *hot* where at least one engine request in a hundred uses it. No block is asked for oftener than the one
before it in its prefix, so only the beginning of each request is counted: as far as blocks are known, and the first one
behind them, which is known from then on. What turns out to be far from hot is forgotten again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, Protocol, TypeAlias

MOST_WATCHED: Final = 1024
"""Blocks that are known at one time, hot or not yet."""

_HOT_FROM: Final = 0.01
_HOT_UNTIL: Final = 0.005
_HOT_REQUESTS: Final = 128
"""Requests that a block must have been watched for before it is hot."""

Ident: TypeAlias = tuple[int, bytes]


class Linked(Protocol):
    """What the curve sees of a block, in DRAM or below; see ``Evictable``."""

    key: bytes
    depth: int
    slot_bytes: int

    @property
    def parent(self) -> Linked | None:
        """The resident parent."""


class Owner(Protocol):
    """A namespace, by its id."""

    id: int


class Resident(Linked, Protocol):
    """What the curve sees of a block in DRAM."""

    @property
    def namespace(self) -> Owner:
        """Whose it is."""


class _Frequent:
    """A block that may be hot.

    Attributes:
        count: requests that used it, faded.
        since: weight of all requests when it was first seen, faded as well.
        access: the last request that was counted.
        slot_bytes: its size.
        hot: it is counted, not sampled.
    """

    __slots__ = ("access", "count", "hot", "since", "slot_bytes")

    def __init__(self, since: float, access: int, slot_bytes: int) -> None:
        self.count = 1.0
        self.since = since
        self.access = access
        self.slot_bytes = slot_bytes
        self.hot = False


class HotBlocks:
    """Which blocks are hot, and how often they are used.

    Weights grow with time, so that what was counted before counts less: all calls get the weight of now.

    Attributes:
        blocks, bytes: that are hot now, and their slots.
        accesses: to hot blocks, by weight.
    """

    def __init__(self) -> None:
        self._known: dict[int, dict[bytes, _Frequent]] = {}
        self._watched = 0
        self._requests = 0.0
        self.blocks = 0
        self.bytes = 0
        self.accesses = 0.0

    def is_hot(self, namespace_id: int, key: bytes) -> bool:
        """Whether a block is hot."""
        known = self._known.get(namespace_id)
        one = None if known is None else known.get(key)
        return one is not None and one.hot

    def request(self, weight: float) -> None:
        """One engine request more."""
        self._requests += weight

    def scale(self, by: float) -> None:
        """Weights are so much smaller from now on."""
        self.accesses /= by
        self._requests /= by
        for known in self._known.values():
            for one in known.values():
                one.count /= by
                one.since /= by

    def count(
        self,
        namespace_id: int,
        access: int,
        chain: list[Linked],
        missing: Sequence[bytes],
        weight: float,
        *,
        first: bool,
    ) -> list[Linked]:
        """Count the beginning of a request.

        Args:
            namespace_id: its namespace.
            access: its number: what it used is counted once.
            chain: blocks that it hit and that were not counted for it yet, the deepest first.
            missing: keys that it missed, behind those.
            weight: of it.
            first: nothing was counted for it yet.

        Returns:
            The chain without its hot blocks.
        """
        known = self._known.get(namespace_id)
        if known is None:
            known = self._known[namespace_id] = {}
        if chain:
            head = chain[-1]
            if head.depth and (head.parent is None or head.parent.key not in known):
                return chain
        elif not first:
            return chain
        end = len(chain)
        for at in range(len(chain) + len(missing)):
            if at < len(chain):
                block = chain[-1 - at]
                key, slot_bytes = block.key, block.slot_bytes
            else:
                key, slot_bytes = missing[at - len(chain)], 0
            one = known.get(key)
            if one is None:
                if self._watched < MOST_WATCHED:
                    known[key] = _Frequent(self._requests - weight, access, slot_bytes)
                    self._watched += 1
                break
            if slot_bytes and slot_bytes != one.slot_bytes:
                if one.hot:
                    self.bytes += slot_bytes - one.slot_bytes
                one.slot_bytes = slot_bytes
            if one.hot and end == len(chain) - at:
                end -= 1
            if one.access < access:
                one.access = access
                one.count += weight
                if one.hot:
                    self.accesses += weight
        return chain[: max(end, 0)]

    def sweep(self, weight: float, *, heat: bool, on_hot: Callable[[Ident], None]) -> None:
        """Decide which blocks are hot, and forget those that are far from it; to be called now and then.

        Args:
            weight: of a request now.
            heat: whether others become hot.
            on_hot: called with each that does.
        """
        least = _HOT_REQUESTS * weight
        for namespace_id, known in list(self._known.items()):
            for key, one in list(known.items()):
                seen = self._requests - one.since
                if one.hot:
                    if one.count < _HOT_UNTIL * seen:
                        one.hot = False
                        self.blocks -= 1
                        self.bytes -= one.slot_bytes
                elif one.count >= _HOT_FROM * max(seen, least) and seen >= least and one.slot_bytes:
                    if heat:
                        one.hot = True
                        self.blocks += 1
                        self.bytes += one.slot_bytes
                        on_hot((namespace_id, key))
                elif one.count < _HOT_UNTIL * max(seen, least):
                    del known[key]
                    self._watched -= 1
            if not known:
                del self._known[namespace_id]
