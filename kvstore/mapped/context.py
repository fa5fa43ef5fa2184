"""What compiled functions know of one client's mapping: a block of words that Python fills once and they pass around.

One integer argument costs less than the addresses one by one. The block belongs to one client of one process; fields
marked *scratch* are used within one call that holds the interpreter lock.
"""

from __future__ import annotations

from typing import Final

from kvstore.mapped.client_file import LANE_COUNT

BUCKETS: Final = 8 * 0
BUCKET_COUNT: Final = 8 * 1
SEED: Final = 8 * 2
ARENA: Final = 8 * 3
ARENA_BYTES: Final = 8 * 4
EPOCH: Final = 8 * 5
"""Address of the index file's state word."""
NAMESPACE: Final = 8 * 6
"""Address of the namespace's state word."""
FILE: Final = 8 * 7
"""Address of the client's file."""
NAMESPACE_ID: Final = 8 * 8
PARTS: Final = 8 * 9
VERIFY_EVERY: Final = 8 * 10
READS: Final = 8 * 11
"""Reads so far, for ``VERIFY_EVERY``."""
COPIED: Final = 8 * 12
"""Bytes copied so far: the clock by which a target is recent."""
RECENT: Final = 8 * 13
"""Address of the table of recent targets: ``RECENT_TARGETS`` times page number, clock."""
KEYS: Final = 8 * 14
"""Address of the match's window: ``WINDOW`` times ``WINDOW_WORDS`` words. Scratch."""
HEADER: Final = 8 * 15
"""Address of 256 bytes, the header of raw records of this client. Scratch, but for its constant fields."""
NEXT_LOOK: Final = 8 * 16
"""When the daemon's lock has to be looked at again, CLOCK_MONOTONIC in ns."""
TOUCHED: Final = 8 * 17
"""Address of a byte for each ``CHUNK_BYTES`` of the arena: 1 where this process has its pages."""
POPULATE: Final = 8 * 18
"""``madvise`` advice that gives this process the pages: MADV_POPULATE_WRITE, or _READ where it may not write."""
LANE_PAGES: Final = 8 * 19
"""For each lane the pages of the records that it is for, 0 for none."""
BELL: Final = 8 * (19 + LANE_COUNT)
"""Descriptor of the doorbell, -1 once it is closed."""
PAIR: Final = 8 * (20 + LANE_COUNT)
"""Two words. Scratch."""

CHUNK_BYTES: Final = 1 << 16
RECENT_TARGETS: Final = 1024
WINDOW: Final = 128
WINDOW_WORDS: Final = 5

# One item of a batch of gets or puts.
ITEM_KEY: Final = 0
ITEM_TARGET: Final = 32
ITEM_CAPACITY: Final = 40
ITEM_RESULT: Final = 48
ITEM_SLOT: Final = 56
ITEM_SEQUENCE: Final = 64
ITEM_CHAINED: Final = 72
"""Gets: 1 where the block's parent is the hit before it in the batch."""
ITEM_BUFFER: Final = 80
ITEM_BYTES: Final = 160
ITEM_WORDS: Final = ITEM_BYTES // 8

CONTEXT_BYTES: Final = PAIR + 16

# Results below 0; 0 and more is a length, or what the function says.
MISS: Final = -1
TOO_SMALL: Final = -2
BUSY: Final = -3
"""The entry changed again and again; ask over ZeroMQ."""
OVER: Final = -4
"""The daemon is gone, or it ended this session."""
STALE: Final = -5
"""The namespace was invalidated."""
CORRUPT: Final = -6
OTHER_CODEC: Final = -7
BAD_ARGUMENT: Final = -8
LARGE: Final = -9
"""So much to copy that it should be done without the interpreter lock."""
NO_GRANT: Final = -10
NO_LANE: Final = -11
FULL: Final = -12
"""The ring has no room."""
LOOK: Final = -13
"""Look at the daemon's lock first, then call again."""
