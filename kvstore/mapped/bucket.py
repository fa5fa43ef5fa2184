"""Buckets: hashing a key to its two buckets, and finding its entry. Called by compiled functions only.

Two-choice hashing (Azar, Broder, Karlin, Upfal: "Balanced allocations", 1994): a key lives in one of two buckets of
seven entries. There are no tombstones and nothing is ever moved to make room, so a miss costs two tag lines for ever.

An entry is read under its own sequence (a seqlock, Boehm: "Can seqlocks get along with programming language memory
models?", 2012): even while it is at rest, odd while the daemon writes it, never reset.
"""

from __future__ import annotations

from typing import Final

from kvstore.mapped.atomics import fence_acquire, load, load_acquire, multiply_fold, shift_right
from kvstore.mapped.compiled import inlined
from kvstore.mapped.index_file import (
    BUCKET_BYTES,
    BUCKET_ENTRIES,
    ENTRY_BYTES,
    ENTRY_IDENTITY,
    ENTRY_KEY,
    ENTRY_PLACE,
    STATE_SHIFT,
    WHO_MASK,
    EntryState,
)

_SPINS: Final = 200
"""How often an entry that is being written is looked at again; a daemon killed in mid-write leaves it odd for ever."""

_LIVE: Final = int(EntryState.LIVE)
_LOW: Final = (1 << 32) - 1
# Odd digits of pi: constants without structure.
_C1: Final = 0x243F6A8885A308D3
_C2: Final = 0x13198A2E03707344
_C3: Final = 0x24093822299F31D1
_C4: Final = 0x082EFA98EC4E6C89


@inlined
def hash_key(seed: int, word0: int, word1: int, word2: int, word3: int, who: int) -> int:
    """64 bits of a key (four words) with its namespace and part; never 0, because a tag of 0 is a free entry.

    Keys may be an engine's own and need not be random: every word is multiplied in.
    """
    left = multiply_fold(word0 ^ seed, word1 ^ _C1)
    right = multiply_fold(word2 ^ seed ^ _C2, word3 ^ _C3)
    mixed = multiply_fold(left ^ who ^ _C4, right ^ seed)
    return mixed if mixed != 0 else 1


@inlined
def first_bucket(tag: int, bucket_count: int) -> int:
    """Number of the first bucket of a tag."""
    return ((tag & _LOW) * bucket_count) >> 32


@inlined
def second_bucket(tag: int, bucket_count: int, first: int) -> int:
    """Number of the other bucket of a tag, never the same one."""
    second = (shift_right(tag, 32) * bucket_count) >> 32
    if second != first:
        return second
    return first + 1 if first + 1 < bucket_count else 0


@inlined
def find_entry(
    buckets: int, bucket_count: int, tag: int, word0: int, word1: int, word2: int, word3: int, who: int
) -> tuple[int, int, int, int]:
    """The live entry of a key: its address, sequence, place and identity words; address 0 where there is none.

    Address -1: an entry that may be the key's is being written for longer than a reader waits; the daemon was
    interrupted in the middle of it, or killed.

    What was read is consistent: the sequence was even and the same before and after. Whether it is still so when the
    caller has used it, the caller finds out by reading the sequence again.
    """
    number = first_bucket(tag, bucket_count)
    none = 0
    for choice in range(2):
        if choice == 1:
            number = second_bucket(tag, bucket_count, number)
        bucket = buckets + number * BUCKET_BYTES
        for index in range(BUCKET_ENTRIES):
            # Acquire: the entry behind a tag that is seen was written before it.
            if load_acquire(bucket + 8 * index) != tag:
                continue
            entry = bucket + ENTRY_BYTES * (index + 1)
            settled = False
            for _ in range(_SPINS):
                # Acquire: the fields below are not read before this sequence was.
                sequence = load_acquire(entry)
                if sequence & 1:
                    continue
                same = (
                    load(entry + ENTRY_KEY) == word0
                    and load(entry + ENTRY_KEY + 8) == word1
                    and load(entry + ENTRY_KEY + 16) == word2
                    and load(entry + ENTRY_KEY + 24) == word3
                )
                place = load(entry + ENTRY_PLACE)
                identity = load(entry + ENTRY_IDENTITY)
                # Acquire fence: the fields above were read before the sequence below. Had one of them been written by
                # a later change, whose odd sequence was stored before it with a release fence between, that sequence
                # would be seen here.
                fence_acquire()
                if load(entry) == sequence:
                    if same and (identity & WHO_MASK) == who and ((identity >> STATE_SHIFT) & 0xFF) == _LIVE:
                        return entry, sequence, place, identity
                    settled = True
                    break
            if not settled:
                none = -1
    return none, 0, 0, 0
