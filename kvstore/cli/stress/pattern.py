"""Payloads whose every word follows from their key, and the compiled checker of each word.

Word ``i`` of a payload is ``key word (i mod 4) ^ i * step``: two keys agree in no word of the same place, and a word
of one key is in no other place of it, so bytes of another record, of another size or of another place are seen.
Addresses everywhere, because the memory that is checked is the very memory that another process may be writing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from kvstore.mapped.atomics import load, store
from kvstore.mapped.compiled import compiled, inlined

__all__ = [
    "KEY_LENGTH",
    "KEY_ROW_BYTES",
    "KeyTable",
    "Words",
    "count_wrong",
    "expected_tail",
    "fill",
    "spoil",
    "spoiled",
    "wrong_words",
]

_STEP: Final = 0x9E3779B97F
"""Odd, and so small that no product of it with a word's number overflows."""

_GROUP_WORDS: Final = 4
_LINE_BYTES: Final = 64
SPOILED: Final = 0x5D0115D0115D0115

KEY_LENGTH: Final = 32
"""Offset of the payload's length in a row of a ``KeyTable``."""
KEY_ROW_BYTES: Final = 48
_ROW_WORDS: Final = KEY_ROW_BYTES // 8

Words = npt.NDArray[np.int64]


class KeyTable:
    """Keys with their payloads' lengths, as compiled functions read them: a row is the key, the length, a word unused.

    Args:
        name: keys of two names differ.
        lengths: of the payloads in bytes, one a key.
    """

    def __init__(self, name: str, lengths: Sequence[int]) -> None:
        self.keys = [hashlib.sha256(f"{name} {number}".encode()).digest() for number in range(len(lengths))]
        self.lengths = list(lengths)
        self._rows: Words = np.zeros((len(lengths), _ROW_WORDS), np.int64)
        for row, key, length in zip(self._rows, self.keys, lengths, strict=True):
            row[:4] = np.frombuffer(key, np.int64)
            row[4] = length
        self.address = int(self._rows.ctypes.data)

    def __len__(self) -> int:
        return len(self.keys)

    def row(self, number: int) -> int:
        """Address of a key's row, which begins with the key."""
        return self.address + KEY_ROW_BYTES * number


@compiled("void(int64, int64, int64)", nogil=True)
def fill(target: int, length: int, key: int) -> None:
    """Write the whole words of a key's payload; what is behind the last of them is the caller's (``expected_tail``).

    The target is aligned to 8.
    """
    word0, word1, word2, word3 = load(key), load(key + 8), load(key + 16), load(key + 24)
    words = length // 8
    whole = words - words % _GROUP_WORDS
    for index in range(0, whole, _GROUP_WORDS):
        at = target + 8 * index
        store(at, word0 ^ (index * _STEP))
        store(at + 8, word1 ^ ((index + 1) * _STEP))
        store(at + 16, word2 ^ ((index + 2) * _STEP))
        store(at + 24, word3 ^ ((index + 3) * _STEP))
    for index in range(whole, words):
        store(target + 8 * index, load(key + 8 * (index % _GROUP_WORDS)) ^ (index * _STEP))


@inlined
def wrong_words(address: int, length: int, key: int) -> int:
    """How many of the whole words at an address are not those of the key's payload."""
    word0, word1, word2, word3 = load(key), load(key + 8), load(key + 16), load(key + 24)
    words = length // 8
    whole = words - words % _GROUP_WORDS
    wrong = 0
    for index in range(0, whole, _GROUP_WORDS):
        at = address + 8 * index
        wrong += load(at) != word0 ^ (index * _STEP)
        wrong += load(at + 8) != word1 ^ ((index + 1) * _STEP)
        wrong += load(at + 16) != word2 ^ ((index + 2) * _STEP)
        wrong += load(at + 24) != word3 ^ ((index + 3) * _STEP)
    for index in range(whole, words):
        wrong += load(address + 8 * index) != load(key + 8 * (index % _GROUP_WORDS)) ^ (index * _STEP)
    return wrong


@compiled("int64(int64, int64, int64)", nogil=True)
def count_wrong(address: int, length: int, key: int) -> int:
    """``wrong_words``, for Python."""
    return wrong_words(address, length, key)


@inlined
def spoiled(target: int, length: int) -> None:
    """Change one word of each 64 bytes of a buffer, so that what an earlier read left there cannot pass for a hit."""
    for at in range(target, target + length - 7, _LINE_BYTES):
        store(at, SPOILED)


@compiled("void(int64, int64)", nogil=True)
def spoil(target: int, length: int) -> None:
    """``spoiled``, for Python."""
    spoiled(target, length)


def expected_tail(key: bytes, length: int) -> bytes:
    """The last ``length % 8`` bytes of a payload."""
    return key[: length % 8]
