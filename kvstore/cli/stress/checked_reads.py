"""Compiled loops that read through the mapped readers and check every word of every hit.

The reads are those of ``kvstore.mapped.index_reader``, not copies of them: ``read_item``, ``copy_batch`` (called
between ``prepare_batch`` and ``check_batch``) and ``pin_entry`` with ``unpin``. What they found is added to a tally, a
block of words that the caller owns.
"""

from __future__ import annotations

from typing import Final

from kvstore.cli.stress.pattern import KEY_LENGTH, KEY_ROW_BYTES, spoiled, wrong_words
from kvstore.mapped.atomics import copy, load, store
from kvstore.mapped.client_file import HAZARD_OFFSET
from kvstore.mapped.compiled import compiled, inlined
from kvstore.mapped.context import (
    BUSY,
    FILE,
    ITEM_BYTES,
    ITEM_CAPACITY,
    ITEM_KEY,
    ITEM_RESULT,
    ITEM_TARGET,
    MISS,
)
from kvstore.mapped.index_reader import pin_entry, read_item, unpin
from kvstore.mapped.index_writer import HAZARD_WORDS

__all__ = [
    "TALLY",
    "TALLY_WORDS",
    "add_hit",
    "add_other",
    "check_batch",
    "copy_and_check",
    "next_row",
    "pin_and_check",
    "prepare_batch",
]

TALLY: Final = ("reads", "hits", "misses", "busy", "other", "wrong_blocks", "wrong_bytes", "held")
"""Words of a tally. ``busy``: the entry changed on every try; ``other``: an answer that must not come here; ``held``:
hazard words that were found set before they were used."""

TALLY_WORDS: Final = len(TALLY) + 1
"""The last word is the state of the random numbers."""

_READS: Final = 0
_HITS: Final = 8
_MISSES: Final = 16
_BUSY: Final = 24
_OTHER: Final = 32
_WRONG_BLOCKS: Final = 40
_WRONG_BYTES: Final = 48
_HELD: Final = 56
_STATE: Final = 64


@inlined
def _add(word: int, count: int) -> None:
    store(word, load(word) + count)


@inlined
def next_row(tally: int, keys: int, key_count: int) -> int:
    """Address of a random key's row; a linear congruence is enough."""
    state = (load(tally + _STATE) * 1103515245 + 12345) & 0x7FFFFFFF
    store(tally + _STATE, state)
    number: int = (state >> 8) % key_count
    return keys + KEY_ROW_BYTES * number


@inlined
def add_hit(tally: int, address: int, length: int, row: int) -> None:
    """Check a hit's bytes and count it."""
    expected = load(row + KEY_LENGTH)
    wrong = wrong_words(address, expected, row) if length == expected else expected // 8
    _add(tally + _HITS, 1)
    if wrong != 0:
        _add(tally + _WRONG_BLOCKS, 1)
        _add(tally + _WRONG_BYTES, 8 * wrong)


@inlined
def add_other(tally: int, result: int) -> None:
    """Count a read without a hit."""
    if result == MISS:
        _add(tally + _MISSES, 1)
    elif result == BUSY:
        _add(tally + _BUSY, 1)
    else:
        _add(tally + _OTHER, 1)


@inlined
def _aim(tally: int, item: int, row: int) -> None:
    """Let an item ask for a key; what its target holds is spoiled."""
    copy(item + ITEM_KEY, row, 32)
    spoiled(load(item + ITEM_TARGET), load(row + KEY_LENGTH))
    _add(tally + _READS, 1)


@compiled("void(int64, int64, int64, int64, int64, int64)", nogil=True)
def copy_and_check(context: int, item: int, keys: int, key_count: int, rounds: int, tally: int) -> None:
    """Copy random keys' records one by one; the item's target and capacity are set."""
    for _ in range(rounds):
        row = next_row(tally, keys, key_count)
        _aim(tally, item, row)
        read_item(context, item, 0, 0)
        result = load(item + ITEM_RESULT)
        if result >= 0:
            add_hit(tally, load(item + ITEM_TARGET), result, row)
        else:
            add_other(tally, result)


@compiled("void(int64, int64, int64, int64, int64, int64)", nogil=True)
def prepare_batch(items: int, count: int, rows: int, keys: int, key_count: int, tally: int) -> None:
    """Let each item of a batch ask for a random key, whose row's address goes to ``rows``."""
    for index in range(count):
        row = next_row(tally, keys, key_count)
        store(rows + 8 * index, row)
        _aim(tally, items + index * ITEM_BYTES, row)


@compiled("void(int64, int64, int64, int64)", nogil=True)
def check_batch(items: int, count: int, rows: int, tally: int) -> None:
    """Check what a batch copied."""
    for index in range(count):
        item = items + index * ITEM_BYTES
        result = load(item + ITEM_RESULT)
        if result >= 0:
            add_hit(tally, load(item + ITEM_TARGET), result, load(rows + 8 * index))
        else:
            add_other(tally, result)


@compiled("void(int64, int64, int64, int64, int64, int64, int64)", nogil=True)
def pin_and_check(context: int, item: int, keys: int, key_count: int, rounds: int, passes: int, tally: int) -> None:
    """Read random keys' records in place, each several times over while its hazard holds it."""
    hazards = load(context + FILE) + HAZARD_OFFSET
    for number in range(rounds):
        hazard = number % HAZARD_WORDS
        row = next_row(tally, keys, key_count)
        _add(tally + _READS, 1)
        if load(hazards + 8 * hazard) != 0:
            _add(tally + _HELD, 1)
        result = pin_entry(context, row, 0, hazard, item)
        if result != 0:
            add_other(tally, result)
            continue
        length, expected = load(item + ITEM_CAPACITY), load(row + KEY_LENGTH)
        wrong = 0
        for _ in range(passes):
            wrong = max(wrong, wrong_words(load(item + ITEM_TARGET), expected, row))
        if length != expected:
            wrong = expected // 8
        unpin(context, hazard)
        _add(tally + _HITS, 1)
        if wrong != 0:
            _add(tally + _WRONG_BLOCKS, 1)
            _add(tally + _WRONG_BYTES, 8 * wrong)
