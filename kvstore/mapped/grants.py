"""Slots lent to a client ahead of time: eight lanes, each a ring of slots of one size.

A grant in a lane belongs to whoever takes it out with an atomic exchange, the client to write into it or the daemon to
have it back. So grants that an idle client does not use can be had without asking it.
"""

from __future__ import annotations

from typing import Final

from kvstore.format.constants import PAGE_BYTES
from kvstore.mapped.atomics import exchange, load, load_acquire, store, store_release
from kvstore.mapped.client_file import (
    GRANT_OFFSET,
    LANE_BYTES,
    LANE_GRANTS,
    LANE_HEAD,
    LANE_OFFSET,
    LANE_SLOT_BYTES,
    LANE_TAIL,
)
from kvstore.mapped.compiled import compiled, inlined

GRANT_PAGES_SHIFT: Final = 32
GRANT_SLOT_MASK: Final = (1 << GRANT_PAGES_SHIFT) - 1
_MASK: Final = LANE_GRANTS - 1


@inlined
def _lane(file: int, lane: int) -> int:
    return file + LANE_OFFSET + lane * LANE_BYTES


@inlined
def _word(file: int, lane: int, number: int) -> int:
    return file + GRANT_OFFSET + 8 * (lane * LANE_GRANTS + (number & _MASK))


@inlined
def claim(file: int, lane: int) -> int:
    """Take a grant out of a lane, for writing: slot | its pages << 32, 0 where there is none. Called by the client.

    The size comes with the slot: a lane may serve another size by the time its client hears of it.
    """
    words = _lane(file, lane)
    tail = load(words + LANE_TAIL)
    # Acquire: the grants before this head are there. The exchange acquires what made the slot free: its old entry was
    # withdrawn and seen so before the grant was put here, hence before the first byte that is written into it.
    head = load_acquire(words + LANE_HEAD)
    grant = 0
    while grant == 0 and tail < head:
        grant = exchange(_word(file, lane, tail), 0)
        tail += 1
    store_release(words + LANE_TAIL, tail)
    return grant


@inlined
def waiting_grants(file: int, lane: int) -> int:
    """Grants in a lane, at most; some may have been taken back."""
    words = _lane(file, lane)
    return load(words + LANE_HEAD) - load(words + LANE_TAIL)


@compiled("int64(int64, int64, int64, int64, int64, int64)")
def offer(file: int, lane: int, head: int, slot_bytes: int, slots: int, count: int) -> int:
    """Put slots into a lane, as far as it has room; the lane's new head. Called by the daemon.

    ``head`` is how many were ever put in, by the daemon's own count; ``slot_bytes`` is for people who look at the file;
    ``slots`` is the address of ``count`` words.
    """
    words = _lane(file, lane)
    # The tail is the client's and may say anything: what stands in a lane is the client's own loss.
    room = LANE_GRANTS - (head - load_acquire(words + LANE_TAIL))
    store(words + LANE_SLOT_BYTES, slot_bytes)
    pages = slot_bytes // PAGE_BYTES << GRANT_PAGES_SHIFT
    for index in range(min(count, room)):
        exchange(_word(file, lane, head), load(slots + 8 * index) | pages)
        head += 1
    store_release(words + LANE_HEAD, head)
    return head


@compiled("int64(int64, int64, int64)")
def revoke(file: int, lane: int, out: int) -> int:
    """Take all grants out of a lane again; how many slots were written to ``out`` (room for 256). By the daemon."""
    found = 0
    for number in range(LANE_GRANTS):
        word = _word(file, lane, number)
        if load(word) != 0:
            grant = exchange(word, 0)
            if grant != 0:
                store(out + 8 * found, grant & GRANT_SLOT_MASK)
                found += 1
    return found


@compiled("int64(int64, int64)")
def offered(file: int, lane: int) -> int:
    """Grants that lie in a lane at this moment. By the daemon, which alone adds to them."""
    found = 0
    for number in range(LANE_GRANTS):
        if load(_word(file, lane, number)) != 0:
            found += 1
    return found
