"""Faulty variants of the mapped protocol, made of its own primitives: the stress must find each of them.

A stress that finds nothing proves something only if it finds these:

1. ``copy_unchecked``: a reader that does not look at the sequence again after it copied.
2. A writer that looks at no hazard before it uses a slot again: ``Index.watch_hazards([])``, nothing of its own here.
3. ``ScanFirstIndex``: a writer that looks at hazards first and makes the entries unfindable afterwards. A reader whose
   hazard comes between the two reads a slot that nobody keeps for it. That takes some 100 ns: on two busy cores a few
   reads a second go wrong. Where none does within two seconds, the window is made wider and wider.

None of them can be switched on in the product: they exist only here.

What no stress on x86-64 shows is the need for the full fence between a hazard's store and the load behind it (and for
its twin in the writer): the store leaves its processor's buffer within nanoseconds, and a prototype without that fence
ran 16 million checked reads without one wrong word. The fence stays by reasoning (``docs/mapped.md``).
"""

from __future__ import annotations

import time
from typing import Final

from kvstore.cli.stress.checked_reads import add_hit, add_other, next_row
from kvstore.cli.stress.pattern import KEY_LENGTH, spoiled
from kvstore.mapped.atomics import copy, fence_full, load, store
from kvstore.mapped.compiled import compiled
from kvstore.mapped.context import ITEM_TARGET, MISS
from kvstore.mapped.index_reader import look_up, payload_of
from kvstore.mapped.index_writer import HAZARD_WORDS, NO_ENTRY, invalidate
from kvstore.tiers.index import Index

__all__ = ["ScanFirstIndex", "copy_unchecked"]

_AS_IT_IS_NS: Final = 2_000_000_000
_NS_A_LOAD: Final = 1_000_000
"""From then on the pause grows by a load, about a nanosecond, each millisecond."""


@compiled("void(int64, int64, int64, int64, int64, int64)", nogil=True)
def copy_unchecked(context: int, item: int, keys: int, key_count: int, rounds: int, tally: int) -> None:
    """``copy_and_check`` with a read that takes what it copied for granted."""
    for _ in range(rounds):
        row = next_row(tally, keys, key_count)
        store(tally, load(tally) + 1)
        entry, _, where, identity = look_up(context, row, 0)
        if entry <= 0:
            add_other(tally, MISS)
            continue
        source, length = payload_of(context, where, identity)
        target = load(item + ITEM_TARGET)
        spoiled(target, load(row + KEY_LENGTH))
        copy(target, source, length)
        add_hit(tally, target, length, row)


@compiled("int64(int64, int64, int64, int64, int64, int64, int64)")
def _scan_then_withdraw(
    buckets: int, entries: int, clients: int, client_count: int, slots: int, count: int, pause: int
) -> int:
    """``index_writer.withdraw`` in the wrong order, with a pause of so many loads between its halves."""
    held = 0
    for at in range(slots, slots + 8 * count, 8):
        slot = load(at)
        for number in range(client_count):
            words = load(clients + 8 * number)
            for index in range(HAZARD_WORDS):
                if load(words + 8 * index) == slot + 1:
                    store(at, -slot - 1)
        held += load(at) < 0
    for _ in range(pause):
        held += load(slots) < -slots
    for at in range(slots, slots + 8 * count, 8):
        slot = load(at) if load(at) >= 0 else -load(at) - 1
        invalidate(buckets, entries, slot)
        store(entries + 8 * slot, NO_ENTRY)
    fence_full()
    return held


class ScanFirstIndex(Index):
    """An index whose ``withdraw`` looks at hazards before it invalidates."""

    _first_ns = 0

    def withdraw(self, slots: list[int]) -> list[int]:
        """As ``Index.withdraw``, for at most 512 slots."""
        count = len(slots)
        self._slots[:count] = slots
        now_ns = time.monotonic_ns()
        self._first_ns = self._first_ns or now_ns
        pause = max(now_ns - self._first_ns - _AS_IT_IS_NS, 0) // _NS_A_LOAD
        clients = (self._hazards_at, len(self._hazards))
        _scan_then_withdraw(self._buckets, self._entries_at, *clients, self._slots_at, count, pause)
        return [-slot - 1 for slot in self._slots[:count].tolist() if slot < 0]
