"""Payload bytes that derive from a block's key, so that a reader can check every byte of what it gets.

Word ``i`` of a payload (little-endian u64) is the SplitMix64 finaliser of ``key word (i mod 4) + i x golden ratio``
(mod 2**64): all of the key shapes the bytes, and no word of a block equals the word at another place or of another
key, except by chance of 2**-64. Bytes are derived and compared for many blocks in one pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from kvstore.errors import InvalidArgument
from kvstore.protocol.keys import KEY_BYTES

__all__ = ["BlockBytes"]

_GOLDEN: Final = 0x9E3779B97F4A7C15
_FIRST_FACTOR: Final = np.uint64(0xBF58476D1CE4E5B9)
_SECOND_FACTOR: Final = np.uint64(0x94D049BB133111EB)
_SHIFTS: Final = (np.uint64(30), np.uint64(27), np.uint64(31))
_KEY_WORDS: Final = KEY_BYTES // 8
_PASS_BYTES: Final = 256 * 1024
"""Bytes worked on at a time: source, scratch and destination stay in a core's second-level cache."""

_POISON: Final = 0xA5


class BlockBytes:
    """Derives, hands out and checks the payloads of up to ``max_blocks`` blocks at once, in memory that is reused.

    Not thread-safe. Two regions of ``max_blocks x payload_bytes`` are held: ``derived`` and ``received``.

    Args:
        payload_bytes: length of every payload, at least 1.
        max_blocks: most blocks handled in one call, at least 1.

    Raises:
        InvalidArgument: a length or count below 1.
    """

    def __init__(self, payload_bytes: int, max_blocks: int) -> None:
        if payload_bytes < 1 or max_blocks < 1:
            raise InvalidArgument(f"cannot derive {max_blocks} blocks of {payload_bytes} bytes: both must be 1 or more")
        self.payload_bytes = payload_bytes
        self.max_blocks = max_blocks
        rows = -(-payload_bytes // KEY_BYTES)
        self._padded_bytes = rows * KEY_BYTES
        self._blocks_per_pass = max(1, _PASS_BYTES // self._padded_bytes)
        indices = np.arange(rows * _KEY_WORDS, dtype=np.uint64)
        self._offsets = (indices * np.uint64(_GOLDEN)).reshape(1, rows, _KEY_WORDS)
        self._scratch = np.empty((self._blocks_per_pass, rows, _KEY_WORDS), dtype=np.uint64)
        self._derived = np.empty((max_blocks, self._padded_bytes), dtype=np.uint8)
        self._received = np.zeros((max_blocks, payload_bytes), dtype=np.uint8)
        self._derived_views = [row.data[:payload_bytes].toreadonly() for row in self._derived]
        self._received_views = [row.data for row in self._received]

    def derive(self, keys: Sequence[bytes]) -> list[memoryview]:
        """Payloads of ``keys``, read-only, valid until the next ``derive`` or ``wrong_bytes``."""
        self._fill(keys)
        return self._derived_views[: len(keys)]

    def receivers(self, count: int) -> list[memoryview]:
        """Writable buffers for ``count`` payloads, overwritten first, so that bytes of an earlier use never pass."""
        self._check_count(count)
        self._received[:count].fill(_POISON)
        return self._received_views[:count]

    def wrong_bytes(self, keys: Sequence[bytes], lengths: Sequence[int | None]) -> int:
        """Compare every byte in the receivers with what the keys say.

        Args:
            keys: of the blocks received, in the receivers' order.
            lengths: bytes received for each; None (a miss) is not looked at. Of a payload of another length every
                byte counts as wrong.

        Returns:
            How many bytes differ.
        """
        if len(keys) != len(lengths):
            raise InvalidArgument(f"{len(keys)} keys but {len(lengths)} lengths")
        self._expect(keys)
        count, size = len(keys), self.payload_bytes
        wrong = 0
        for first in range(0, count, self._blocks_per_pass):
            last = min(count, first + self._blocks_per_pass)
            if all(length == size for length in lengths[first:last]) and np.array_equal(
                self._derived[first:last, :size], self._received[first:last]
            ):
                continue
            for index in range(first, last):
                length = lengths[index]
                if length is None:
                    continue
                if length != size:
                    wrong += max(size, length)
                else:
                    wrong += int(np.count_nonzero(self._derived[index, :size] != self._received[index]))
        return wrong

    def _check_count(self, count: int) -> None:
        if count > self.max_blocks:
            raise InvalidArgument(f"{count} blocks at once, over the {self.max_blocks} that were prepared for")

    def _expect(self, keys: Sequence[bytes]) -> None:
        """Have ``derived`` hold what readers of these keys must get."""
        self._fill(keys)

    def _fill(self, keys: Sequence[bytes]) -> None:
        self._check_count(len(keys))
        if not keys:
            return
        words = np.frombuffer(b"".join(keys), dtype="<u8").astype(np.uint64, copy=False)
        words = words.reshape(len(keys), 1, _KEY_WORDS)
        for first in range(0, len(keys), self._blocks_per_pass):
            chunk = words[first : first + self._blocks_per_pass]
            out: NDArray[np.uint64] = (
                self._derived[first : first + len(chunk)].view("<u8").reshape(len(chunk), -1, _KEY_WORDS)
            )
            shifted = self._scratch[: len(chunk)]
            np.add(chunk, self._offsets, out=out)
            for shift, factor in zip(_SHIFTS, (_FIRST_FACTOR, _SECOND_FACTOR, None), strict=True):
                np.right_shift(out, shift, out=shifted)
                np.bitwise_xor(out, shifted, out=out)
                if factor is not None:
                    np.multiply(out, factor, out=out)
