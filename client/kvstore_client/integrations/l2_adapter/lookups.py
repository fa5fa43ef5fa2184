"""Lookups: which keys are there, and leases of them, also where they are no prefix."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, Protocol

from kvstore.errors import Throttled
from kvstore.protocol.keys import BlockKey
from kvstore.protocol.version import MAX_KEYS_PER_REQUEST
from kvstore_client.client import Match

__all__ = ["find"]

_MOST_RUNS: Final = 64
"""Leases that one lookup takes in one place; what is there beyond them is found, and not leased."""


class Matches(Protocol):
    """What is asked of a client."""

    def match(self, keys: Sequence[BlockKey], *, lease: float | None = None, prefetch: bool = False) -> Match:
        """See ``Client.match``."""

    def exists(self, keys: Sequence[BlockKey]) -> list[bool]:
        """See ``Client.exists``."""


def find(
    client: Matches,
    keys: Sequence[BlockKey],
    lease_s: float,
    locked: Callable[[Sequence[BlockKey], Match], None],
) -> tuple[list[bool], int]:
    """Find keys, any of which may be there, and lease those that are.

    The daemon leases what a match counts, the leading keys. So all keys are matched; the ones behind the first gap are
    asked for, and each run of them that is there is matched by itself. One request where all or none but the last ones
    are there, two for a gap, and one more for each further run.

    Args:
        client: of the namespace.
        keys: at least one.
        lease_s: how long, 0 for no lease.
        locked: told of each lease, and which keys it holds.

    Returns:
        Whether each key is there, and how many of those are not leased though they were to be: the client holds as many
        leases as it may, or the keys are in too many runs.

    Raises:
        Throttled: the daemon would not answer now.
    """
    keys = list(keys)
    if not lease_s:
        return client.exists(keys), 0
    there = [False] * len(keys)
    unlocked = 0
    try:
        hits = _lease(client, keys[:MAX_KEYS_PER_REQUEST], lease_s, locked)
    except Throttled:
        present = client.exists(keys)
        return present, sum(present)
    there[:hits] = [True] * hits
    if hits == len(keys):
        return there, 0
    behind = client.exists(keys[hits + 1 :]) if hits + 1 < len(keys) else []
    at, runs = hits + 1, 0
    leasing = True
    while at < len(keys):
        if not behind[at - hits - 1]:
            at += 1
            continue
        stop = at
        while stop < len(keys) and behind[stop - hits - 1] and stop - at < MAX_KEYS_PER_REQUEST:
            stop += 1
        count = 0
        if leasing and runs < _MOST_RUNS:
            runs += 1
            try:
                count = _lease(client, keys[at:stop], lease_s, locked)
            except Throttled:
                leasing = False
            else:
                # What went in between is gone; what is behind it counts from the next run on.
                there[at : at + count] = [True] * count
                at += count + (at + count < stop)
                continue
        there[at:stop] = [True] * (stop - at)
        unlocked += stop - at
        at = stop
    return there, unlocked


def _lease(
    client: Matches, keys: list[BlockKey], lease_s: float, locked: Callable[[Sequence[BlockKey], Match], None]
) -> int:
    match = client.match(keys, lease=lease_s, prefetch=True)
    if match.hits:
        locked(keys[: match.hits], match)
    return match.hits
