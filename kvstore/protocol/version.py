"""Protocol version and limits that both sides enforce."""

from __future__ import annotations

from typing import Final

PROTOCOL_VERSION: Final = 5
"""The newest version this code speaks."""

PROTOCOL_OLDEST: Final = 1
"""The oldest version this code still accepts."""

TIERS_SINCE: Final = 4
"""Version from which clients know of tiers below DRAM; older ones are served from DRAM alone."""

POLICIES_SINCE: Final = 5
"""Version from which clients may ask why a key is missing, retain blocks, record, and change policies."""

MAX_KEYS_PER_REQUEST: Final = 65_536
MAX_HEADER_FRAME_BYTES: Final = 4 << 20
"""Upper bound of a message's first frame: 65,536 keys of 32 bytes and its fields, twice over."""

MAX_PAYLOAD_FRAMES: Final = 2 * 4096
MAX_DECLARED_SIZES: Final = 64
"""Payload sizes that one client may declare when it joins a namespace."""

MAX_PREFIXES: Final = 64
"""Keys that one request may name by their first digits."""

MAX_IDENT_CHARACTERS: Final = 128
"""Longest version or boot id in a greeting."""

MAX_GENERATION: Final = 1 << 62
"""Latest generation that a client may name: far enough from 2**64 that counting on never overflows."""

MAX_WAIT_MS: Final = 24 * 3600 * 1000
"""Longest time ahead that a client may name for what is to come up."""

MAX_LEASE_MS: Final = 10 * 60 * 1000
MAX_PRIORITY: Final = 100
NORMAL_PRIORITY: Final = 50
MAX_KEYS_PER_RETAIN: Final = 8192
"""Keys of one retention: each costs the daemon some microseconds, while others wait."""

MAX_TTL_MS: Final = 366 * 24 * 3600 * 1000
"""Longest time of a retention that has an end."""

MAX_OUTSTANDING_REQUESTS: Final = 512
"""Requests that one client may have unanswered; the daemon's send queue per client is deeper than this."""


def negotiate(oldest: int, newest: int) -> int | None:
    """Highest version that both this side and a peer speaking ``oldest..newest`` know, or None."""
    best = min(newest, PROTOCOL_VERSION)
    return best if best >= max(oldest, PROTOCOL_OLDEST) else None
