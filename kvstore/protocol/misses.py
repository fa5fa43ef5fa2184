"""Why lookups miss: the causes, by the names that statistics, stories and metrics have for them."""

from __future__ import annotations

from enum import StrEnum

__all__ = ["MissCause"]


class MissCause(StrEnum):
    """Why a block that was asked for was not there. The names are persisted on the wire; others may be added."""

    NEVER_SEEN = "never_seen"
    """Nobody stored it, as far as is remembered."""
    EVICTED = "evicted"
    """It left for others."""
    EXPIRED = "expired"
    """Its time to live was over."""
    QUOTA = "quota"
    """Its tenant had more than its quota."""
    REMOVED = "removed"
    """A client removed it, or cleared its namespace."""
    INVALIDATED = "invalidated"
    """An earlier generation of its namespace had it, or the client that asked is in one."""
    CORRUPT = "corrupt"
    """Its bytes were not what was committed, so it was dropped."""
    DIVERGED = "diverged"
    """It was never seen, but the block before it was, with others behind it: the prompt differs from here on."""
    FAILED_LOAD = "failed_load"
    """A tier below has or had it, and it could not be read, or not in time, or there was no room for it."""
    RECOMPUTE = "recompute"
    """A tier below has it, and loading it would take longer than computing it anew."""
    PART_MISSING = "part_missing"
    """A part of it is there, another is not."""
    NOT_STORED = "not_stored"
    """The last put of it was throttled or rejected."""
