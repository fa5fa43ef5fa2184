"""What ``Why`` is answered with: the story of each key, as MessagePack maps.

Evolution: fields are only added, with defaults, which a daemon that does not know them leaves out. Times say how long
ago something was. Names of tiers are those of ``TierName``, causes those of ``MissCause``, reasons those of ``Reason``.
"""

from __future__ import annotations

from typing import Final

import msgspec

from kvstore.protocol.statistics import Unsigned

NO_SUCH_PREFIX: Final = "no block of "
"""What the refusal of a prefix says that no key of the namespace has; one that several have is refused otherwise."""


class GhostStory(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What is remembered of a block that left, or could not be stored or loaded.

    Attributes:
        cause: why.
        ago_s: when.
        tier: that it left for good, "" where it was in none.
        policy: by which it was evicted, "" where it was not.
        extra_bytes: so many more bytes of that tier would have kept it, 0 where that would not have helped.
        reason: why a put of it was refused since then, "" where none was.
        back: it was stored again since then.
    """

    cause: str
    ago_s: float
    tier: str = ""
    policy: str = ""
    extra_bytes: Unsigned = 0
    reason: str = ""
    back: bool = False


class ChapterStory(msgspec.Struct, kw_only=True):
    """A change of state of one of a block's records in DRAM: which part, from which state to which, and why."""

    ago_s: float
    part: Unsigned
    before: str
    after: str
    cause: str


class KeyStory(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A block, or what is known of one that is not there.

    Attributes:
        key: of the block.
        state: "resident" (complete in DRAM), "leaving" (likewise, and chosen to leave), "below" (complete only with a
            tier below), "incomplete" (of some parts only), "gone" (a ghost) or "unknown".
        cause: why a lookup of it, or of the chain that was asked about up to it, misses now; "" where it hits.
        tiers: that have some of it, nearest first.
        depth: blocks before it, -1 where that is unknown.
        parent: the block before it: "root" (there is none), a tier, "gone" or "" (unknown).
        parent_key: of that one; empty where it is unknown, or the root.
        children: blocks behind it, in the nearest tier that it is in.
        branched: there are or were blocks behind it.
        parts: that are there, in any tier.
        used_ago: requests since its last use, -1 where that is unknown.
        leases: clients' leases on it.
        slot_bytes: that it takes, in all tiers.
        codec, fidelity: of its worst record.
        retention: what keeps it longer, or shorter, than the policy would have it, for people; "" for nothing.
        ghost: what is remembered of its last departure.
        chapters: what happened to its records lately, oldest first.
    """

    key: bytes
    state: str
    cause: str = ""
    tiers: list[str] = []
    depth: int = -1
    parent: str = ""
    parent_key: bytes = b""
    children: Unsigned = 0
    branched: bool = False
    parts: Unsigned = 0
    used_ago: int = -1
    leases: Unsigned = 0
    slot_bytes: Unsigned = 0
    codec: str = ""
    fidelity: Unsigned = 255
    retention: str = ""
    ghost: GhostStory | None = None
    chapters: list[ChapterStory] = []
