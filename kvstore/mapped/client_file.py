"""The memory that one client shares with the daemon: hazards, ring, grants, doorbell. ``docs/mapped.md``.

It is the client's session file (``session_file``), made larger for a client that maps. Covers: the layout. Does not
cover: what is done with it (``ring``, ``grants``, ``index_reader``, ``index_writer``). The client can write all of it,
so the daemon believes nothing that it reads from it.

Each word that one side writes often has a line of its own: the other side's reads then do not slow it down.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Final

STATE_OFFSET: Final = 128
"""``ClientState``, written by the daemon."""

AWAKE_OFFSET: Final = 192
"""The doorbell: 1 while the daemon is going to look at the ring by itself, 0 where the client must ring."""

CONSUMED_OFFSET: Final = 256
"""Ring records that the daemon has dealt with, written by the daemon after it published them."""

HEAD_OFFSET: Final = 320
"""Ring records written, written by the client."""

FLAGS_OFFSET: Final = 384
"""``ClientFlag`` bits, written by the client."""

DROPPED_REPORTS_OFFSET: Final = 392
"""Access reports for which the ring had no room, written by the client."""

HAZARD_OFFSET: Final = 512
"""64 words: slot + 1 of a record that is being read in place, or 0."""

LANE_OFFSET: Final = 1024
LANE_COUNT: Final = 8
LANE_BYTES: Final = 128
# A lane's words: the daemon's line, then the client's.
LANE_HEAD: Final = 0
"""Grants ever put into the lane."""
LANE_SLOT_BYTES: Final = 8
LANE_TAIL: Final = 64
"""Grants ever taken out of the lane, or found taken back."""

ANSWER_OFFSET: Final = 4096
"""For each place in the ring: status u8 | reason u8 << 8 of the commit in it, written before it is consumed."""

GRANT_OFFSET: Final = 8192
LANE_GRANTS: Final = 256
"""Words of one lane: a granted slot's first page u32 | its pages u32 << 32, or 0."""

RING_OFFSET: Final = GRANT_OFFSET + 8 * LANE_GRANTS * LANE_COUNT
RING_RECORDS: Final = 2048
RING_RECORD_BYTES: Final = 64
CLIENT_FILE_BYTES: Final = RING_OFFSET + RING_RECORDS * RING_RECORD_BYTES

MAX_MISSING: Final = 16
"""Missing keys that an access report names; two in each continuation record."""

WORD_KIND: Final = 0
"""kind u8 | continuation records u8 << 8 | missing keys named u8 << 16 | part u16 << 32 | namespace u16 << 48."""
WORD_COUNTS: Final = 8
"""Reports: keys asked u32 | keys hit u32 << 32. Commits: record bytes."""
WORD_SLOT: Final = 16
"""The committed, returned or suspected slot; the deepest hit's."""
WORD_SEQUENCE: Final = 24
"""Sequence of the deepest hit's, or the suspect's, entry."""
WORD_ACCESS: Final = 32
"""The engine request, 0 for one of its own."""
WORD_TIME: Final = 40
"""CLOCK_MONOTONIC of the access, in nanoseconds."""
WORD_BYTES: Final = 48
"""Payload bytes read."""
WORD_RUNS: Final = 56
"""Of a get of several runs of blocks: 0 on its first report, 1 on those that follow it."""


class ClientState(IntEnum):
    """Whether the session is served. Persisted."""

    LIVE = 1
    OVER = 2
    """The daemon ended the session: nothing in the arena may be written or read through it any more."""


class ClientFlag(IntEnum):
    """What the daemon must know of a client that died. Persisted."""

    DEVICE = 1
    """It had a device context: transfers can outlive the process for a moment."""


class RingKind(IntEnum):
    """What a ring record says. Persisted; 0 is memory that nobody wrote."""

    COMMIT = 1
    """A granted slot was written."""
    RETURN = 2
    """A granted slot is given back unwritten."""
    MATCH = 3
    GET = 4
    SUSPECT = 5
    """A record's bytes are not what its entry says."""
